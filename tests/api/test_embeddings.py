"""POST /v1/embeddings: inputs of every kind, both encodings, refusals by name, quotas."""

from __future__ import annotations

import base64
import struct
from typing import Any

import pytest
from starlette.testclient import TestClient

from loriner.adapters.names import DEFAULT_TENANT
from loriner.api.tenants import Quota, Tenants
from loriner.config import EngineConfig
from loriner.core import Scaled
from loriner.errors import EngineFailedError, OverloadedError
from tests.api.conftest import Client
from tests.api.fake_service import FakeService


def post(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/embeddings", json={"input": "hi", **fields})


def ask(client: TestClient, **fields: Any) -> Any:
    response = post(client, **fields)
    assert response.status_code == 200, response.text
    return response.json()


def test_an_answer_is_openais(client: TestClient, service: FakeService) -> None:
    body = ask(client, model="pirate", user="me", priority=3)

    assert body["object"] == "list"
    (entry,) = body["data"]
    assert (entry["object"], entry["index"]) == ("embedding", 0)
    assert len(entry["embedding"]) == service.hidden_size
    assert body["model"] == "pirate"
    assert body["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    record = service.store.resolve("pirate")
    assert body["loriner"]["generation"] == record.generation
    (call,) = service.calls
    assert (call["embeds"], call["prompt_param"], call["turn"].priority) == (True, "input", 3)
    assert len(service.closed) == 1


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("hi", [[1, 104, 105]]),
        (["a", "b"], [[1, 97], [1, 98]]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
        (["a", [9]], [[1, 97], [9]]),
    ],
)
def test_inputs_are_text_or_tokens_one_or_many(
    client: TestClient, service: FakeService, given: object, sent: list[list[int]]
) -> None:
    body = ask(client, input=given)

    assert [call["prompt_ids"] for call in service.calls] == sent
    assert [entry["index"] for entry in body["data"]] == list(range(len(sent)))
    assert [entry["embedding"][:2] for entry in body["data"]] == [[len(i), sum(i)] for i in sent]
    assert body["usage"]["prompt_tokens"] == sum(map(len, sent))


def test_base64_holds_the_same_floats(client: TestClient) -> None:
    floats = ask(client, input=["a", "bc"], encoding_format="float")["data"]
    texts = ask(client, input=["a", "bc"], encoding_format="base64")["data"]

    for as_list, as_text in zip(floats, texts, strict=True):
        unpacked = struct.unpack("<4f", base64.b64decode(as_text["embedding"]))
        assert list(unpacked) == as_list["embedding"]


@pytest.mark.parametrize(
    ("fields", "adapter"),
    [
        ({"adapter": "pirate"}, "pirate"),
        ({"model": "tiny:codeword"}, "codeword"),
        ({"model": "tiny"}, None),
        ({"model": "pirate", "adapter": "base"}, None),
        ({"adapter": {"name": "pirate", "scale": 0.5}}, [Scaled("pirate", 0.5)]),
        (
            {"adapter": [{"name": "pirate"}, {"name": "codeword", "scale": -2.0}]},
            [Scaled("pirate", 1.0), Scaled("codeword", -2.0)],
        ),
    ],
)
def test_the_adapter_is_named_as_in_chat(
    client: TestClient, service: FakeService, fields: dict[str, Any], adapter: object
) -> None:
    ask(client, **fields)
    assert service.calls[0]["adapter"] == adapter


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [[]]}, "input[0]"),
        ({"input": ["a", 5]}, "input[1]"),
        ({"input": [1, "a"]}, "input[0]"),
        ({"input": 5}, "input"),
        ({"input": {"a": 1}}, "input"),
        ({"input": [True]}, "input[0]"),
        ({"input": "", "add_special_tokens": False}, "input"),
        ({"input": ["a", ""], "add_special_tokens": False}, "input[1]"),
        ({"input": "x" * 600}, "input"),
        ({"input": ["a", "x" * 600]}, "input[1]"),
        ({"input": [-1]}, "input"),
        ({"input": [[1], [0x110000]]}, "input[1]"),
        ({"input": ["a"] * 2049}, "input"),
        ({"encoding_format": "hex"}, "encoding_format"),
        ({"dimensions": 3}, "dimensions"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": "4"}, "dimensions"),
        ({"adapter": 5}, "adapter"),
        ({"priority": 5000}, "priority"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "messages"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ({"input_type": "query"}, "input_type"),
        ({"normalize": False}, "normalize"),
        ({"embed_dtype": "float16"}, "embed_dtype"),
        ({"lora_path": "x"}, "lora_path"),
    ],
)
def test_bad_input_is_refused_by_name(
    client: TestClient, service: FakeService, fields: dict[str, Any], param: str
) -> None:
    response = post(client, **fields)

    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert error["param"] == param
    assert not service.calls


def test_input_is_required(client: TestClient) -> None:
    response = client.post("/v1/embeddings", json={"model": "tiny"})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "input")


def test_the_models_own_width_may_be_asked_for(client: TestClient) -> None:
    assert ask(client, dimensions=4, normalize=True)["data"]


@pytest.mark.parametrize("field", ["adapter", "model"])
def test_an_unknown_adapter_is_404(client: TestClient, field: str) -> None:
    response = post(client, **{field: "nope"})
    assert (response.status_code, response.json()["error"]["param"]) == (404, field)


def test_a_full_queue_is_429(client: TestClient, service: FakeService) -> None:
    service.refuse = OverloadedError("full")
    assert post(client, input=["a", "b"]).status_code == 429


def test_a_failure_is_an_error_and_closes_all(client: TestClient, service: FakeService) -> None:
    service.fail_after, service.fail_with = 0, EngineFailedError("lost")
    assert post(client, input=["a", "b", "c"]).status_code == 500
    assert len(service.closed) == len(service.calls) > 0


def test_very_many_inputs_are_queued_some_at_a_time_on_one_generation(
    client: TestClient, service: FakeService
) -> None:
    service.engine_config = EngineConfig(max_sequences=32)
    most = 0
    generate = service.generate

    async def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal most
        made = await generate(*args, **kwargs)
        most = max(most, len(service.open) - len(service.closed))
        return made

    service.generate = watched  # type: ignore[method-assign]
    texts = ["x" * (1 + i % 50) for i in range(300)]
    body = ask(client, input=texts, model="pirate")

    assert [entry["embedding"][0] for entry in body["data"]] == [len(t) + 1 for t in texts]
    assert most <= 32 and len(service.calls) == 300
    generation = service.store.resolve("pirate").generation
    asked = {call["adapter"] for call in service.calls[1:]}
    assert asked == {f"default/pirate@{generation}"}, "the name may move meanwhile"


def test_a_tenants_quota_bounds_what_is_queued(make_client: Client, service: FakeService) -> None:
    tenants = Tenants(service.store.root)
    tenants.set_quota(DEFAULT_TENANT, Quota(max_sequences=2, tokens_per_minute=10))
    client = make_client()
    ask(client, input=["abc"] * 5)
    assert len(service.calls) == 5

    refused = post(client)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "quota_exceeded")
    assert float(refused.headers["retry-after"]) > 0
