"""GET /v1/models: the base first, adapters after, each with root and parent."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from tests.api.fake_service import BASE_DIGEST, FakeService
from tests.api.schemas import check


def test_the_base_comes_first_and_adapters_after(client: TestClient, service: FakeService) -> None:
    body = client.get("/v1/models").json()

    check("ListModelsResponse", body)
    assert [model["id"] for model in body["data"]] == ["tiny", "acme/legal", "codeword", "pirate"]
    base, legal, *_ = body["data"]
    assert (base["root"], base["parent"], base["max_model_len"]) == (BASE_DIGEST, None, 512)
    assert legal["root"] == service.store.resolve("acme/legal").generation
    assert legal["parent"] == "tiny"
    assert legal["owned_by"] == "acme"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("tiny", "tiny"),
        ("pirate", "pirate"),
        ("default/pirate", "pirate"),
        ("acme/legal", "acme/legal"),
        ("tiny:pirate", "pirate"),
    ],
)
def test_one_model_is_found_by_any_name_that_selects_it(
    client: TestClient, name: str, found: str
) -> None:
    body = client.get(f"/v1/models/{name}").json()

    check("Model", body)
    assert body["id"] == found


@pytest.mark.parametrize("name", ["nope", "legal", "a/b/c", "X", "%2e%2e"])
def test_an_unknown_model_is_404(client: TestClient, name: str) -> None:
    response = client.get(f"/v1/models/{name}")

    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("path", ["/v1/models/", "/v1/", "/v1/embedding", "/"])
def test_other_paths_are_404_with_openais_body(client: TestClient, path: str) -> None:
    response = client.get(path)

    check("ErrorResponse", response.json())
    assert response.status_code == 404


def test_a_wrong_method_is_405_and_says_which_are_right(client: TestClient) -> None:
    response = client.put("/v1/chat/completions", json={})

    check("ErrorResponse", response.json())
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
