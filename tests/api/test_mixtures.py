"""`adapter` as a list with scales: what reaches the service, what is refused, what is told."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from loriner.core import Scaled
from tests.api.fake_service import FakeService

TURNS = [{"role": "user", "content": "hi"}]


def chat(client: TestClient, adapter: Any, **more: Any) -> Any:
    body = {"messages": TURNS, "adapter": adapter, **more}
    return client.post("/v1/chat/completions", json=body)


def test_several_adapters_reach_the_service_with_their_scales(
    client: TestClient, service: FakeService
) -> None:
    asked = [{"name": "pirate", "scale": 0.5}, {"name": "acme/legal"}]
    answer = chat(client, asked).json()

    assert service.calls[-1]["adapter"] == [Scaled("pirate", 0.5), Scaled("acme/legal", 1.0)]
    assert answer["loriner"]["adapter"] == "default/pirate*0.5+acme/legal"
    assert answer["loriner"]["generation"].startswith("mix:")


def test_one_adapter_may_have_a_scale(client: TestClient, service: FakeService) -> None:
    assert chat(client, {"name": "pirate", "scale": -2}).status_code == 200
    assert service.calls[-1]["adapter"] == [Scaled("pirate", -2.0)]
    plain = chat(client, [{"name": "pirate"}]).json()
    assert plain["loriner"]["generation"] == service.store.resolve("pirate").generation
    text = client.post("/v1/completions", json={"prompt": "x", "adapter": {"name": "pirate"}})
    assert text.status_code == 200


@pytest.mark.parametrize(
    ("adapter", "param"),
    [
        ([], "adapter"),
        ([{"name": "pirate"}] * 9, "adapter"),
        ([{"name": "pirate"}, {"name": "pirate", "scale": 2}], "adapter"),
        ([{"name": "pirate", "scale": 101}], "adapter"),
        ([{"name": "pirate", "scale": "1"}], "adapter"),
        ([{"scale": 1}], "adapter"),
        (["pirate"], "adapter"),
        (7, "adapter"),
    ],
)
def test_what_cannot_be_mixed_is_refused_by_name(
    client: TestClient, adapter: Any, param: str
) -> None:
    refused = chat(client, adapter)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"].startswith(param)


def test_an_unknown_part_is_named_as_it_was_written(client: TestClient) -> None:
    refused = chat(client, [{"name": "pirate"}, {"name": "nobody"}])
    assert refused.status_code == 404
    assert "`nobody`" in refused.json()["error"]["message"]
