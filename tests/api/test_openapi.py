"""The OpenAPI document, and what property-based requests made from it find at a real server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from jsonschema import validate

from loriner.config import ServerConfig
from tests.api.fake_service import FakeService
from tests.api.live import LiveServer

schemathesis: Any = pytest.importorskip("schemathesis")
from schemathesis.specs.openapi.checks import response_schema_conformance  # noqa: E402

EXAMPLES = 12  # requests for each operation


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> FakeService:
    return FakeService(tmp_path_factory.mktemp("store"), "pirate")


@pytest.fixture(scope="module")
def live(service: FakeService, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    root = tmp_path_factory.mktemp("server")
    config = ServerConfig(port=0, store=root / "store", training=root / "training")
    with LiveServer(service, config) as live:
        yield live


@pytest.fixture(scope="module")
def document(live: LiveServer) -> dict[str, Any]:
    made: dict[str, Any] = httpx.get(f"{live.url}/openapi.json", trust_env=False).json()
    return made


def test_any_request_gets_an_answer_that_the_document_tells(
    document: dict[str, Any], live: LiveServer, service: FakeService
) -> None:
    checks = schemathesis.checks
    conforms = response_schema_conformance
    asked = set()
    for found in schemathesis.openapi.from_dict(document).get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=EXAMPLES,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            service.state = "ready"  # whatever /admin/drain did
            case.call_and_validate(base_url=live.url, checks=[checks.not_a_server_error, conforms])

        ask()
        asked.add(operation.label)
    assert len(asked) == sum(map(len, document["paths"].values()))


def test_the_document_holds_every_route(document: dict[str, Any], live: LiveServer) -> None:
    app = live.server.config.app
    routes = [route for route in app.routes if hasattr(route, "right")]  # type: ignore[union-attr]
    told = {(m.upper(), path) for path, ops in document["paths"].items() for m in ops}
    served = {
        (method, route.path.replace(":path}", "}"))
        for route in routes
        for method in route.methods - {"HEAD"}
    }
    assert told == served and ("POST", "/v1/chat/completions") in told
    ids = [op["operationId"] for ops in document["paths"].values() for op in ops.values()]
    assert len(ids) == len(set(ids))


def test_bodies_are_the_models_that_validate(document: dict[str, Any]) -> None:
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]
    assert body["application/json"]["schema"] == {"$ref": "#/components/schemas/ChatBody"}
    fields = document["components"]["schemas"]["ChatBody"]
    assert {"messages", "adapter", "top_logprobs"} <= fields["properties"].keys()
    assert fields["required"] == ["messages"]
    upload = document["paths"]["/admin/adapters"]["post"]["requestBody"]["content"]
    assert upload.keys() == {"application/json", "multipart/form-data"}


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/responses", {"input": "hi"}),
    ],
)
def test_streams_are_of_the_events_that_the_document_tells(
    document: dict[str, Any], live: LiveServer, path: str, asked: dict[str, Any]
) -> None:
    told = document["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]
    answer = httpx.post(live.url + path, json=asked | {"stream": True}, trust_env=False)
    events = answer.text.removesuffix("\n\n").split("\n\n")
    assert len(events) > 2
    for event in events:
        validate(dict(line.split(": ", 1) for line in event.split("\n")), told["schema"])


def test_probes_are_told_to_be_open_and_all_else_to_need_a_key(document: dict[str, Any]) -> None:
    paths = document["paths"]
    assert paths["/health"]["get"]["security"] == []
    assert paths["/v1/chat/completions"]["post"]["security"] == [{"key": []}]
