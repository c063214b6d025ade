"""Probes and /metrics."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from loriner import __version__
from loriner.api import metrics
from loriner.api.app import build_app
from loriner.config import ServerConfig
from loriner.engine.stats import EngineStats
from loriner.errors import EngineFailedError
from tests.api.fake_service import BASE_DIGEST, FakeService, resident

HI = [{"role": "user", "content": "hi"}]


def ask(client: TestClient, **fields: object) -> int:
    body = {"messages": HI, **fields}
    return client.post("/v1/chat/completions", json=body).status_code


def scrape(client: TestClient) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(sample name, sorted labels) -> value."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def value(client: TestClient, name: str, **labels: str) -> float:
    return scrape(client)[name, tuple(sorted(labels.items()))]


def test_health_is_about_the_engine_and_ready_about_traffic(
    client: TestClient, service: FakeService
) -> None:
    assert client.get("/health").json() == {
        "state": "ready",
        "restarts": 0,
        "model": "tiny",
        "base_digest": BASE_DIGEST,
        "version": __version__,
    }
    assert client.get("/ready").status_code == 200

    service.state = "draining"
    assert client.get("/health").status_code == 200
    assert client.get("/ready").status_code == 503

    service.healthy, service.state, service.num_restarts = False, "restarting", 1
    for path in ("/health", "/ping", "/ready"):
        assert client.get(path).status_code == 503
    assert client.get("/health").json()["restarts"] == 1


def test_ping_answers_post_and_version_names_us(client: TestClient) -> None:
    assert client.post("/ping").status_code == 200
    assert client.get("/version").json() == {"version": __version__}


def test_requests_and_tokens_are_counted_by_adapter(
    client: TestClient, service: FakeService
) -> None:
    ask(client, model="pirate")
    ask(client, model="pirate", stream=True)
    ask(client)
    ask(client, model="nope")
    counted = scrape(client)

    def of(name: str, **labels: str) -> float:
        return counted[name, tuple(sorted(labels.items()))]

    requests = "loriner_requests_total"
    assert of(requests, endpoint="chatcmpl", adapter="pirate", status="200") == 2
    assert of(requests, endpoint="chatcmpl", adapter="base", status="200") == 1
    assert of(requests, endpoint="chatcmpl", adapter="base", status="404") == 1
    assert of("loriner_output_tokens_total", adapter="pirate") == 12
    assert of("loriner_prompt_tokens_total", adapter="pirate") == 6
    assert of("loriner_cached_prompt_tokens_total", adapter="pirate") == 6
    assert of("loriner_time_to_first_token_seconds_count", start="warm") == 3
    assert of("loriner_inter_token_seconds_count") == 15
    assert of("loriner_sequences_total", finish_reason="stop") == 3


def test_a_stream_that_fails_late_counts_as_failed(
    client: TestClient, service: FakeService
) -> None:
    service.fail_after, service.fail_with = 2, EngineFailedError("gone")
    ask(client, stream=True)

    labels = {"endpoint": "chatcmpl", "adapter": "base", "status": "500"}
    assert value(client, "loriner_requests_total", **labels) == 1


def test_a_cold_start_is_told_apart(client: TestClient, service: FakeService) -> None:
    service.cold_start = True
    ask(client, model="pirate")

    assert value(client, "loriner_time_to_first_token_seconds_count", start="cold") == 1


def test_responses_are_counted_by_route_not_by_path(client: TestClient) -> None:
    client.get("/v1/models/pirate")
    client.get("/v1/models/codeword")
    client.get("/random/1")

    route = "/v1/models/{name:path}"
    assert value(client, "loriner_http_responses_total", route=route, status="200") == 2
    assert value(client, "loriner_http_responses_total", route="unmatched", status="404") == 1


def test_the_engines_snapshot_is_shown_under_our_names_and_vllms(
    client: TestClient, service: FakeService
) -> None:
    pirate = service.store.resolve("pirate").generation
    unknown = "e" * 64
    service.engine_stats = EngineStats(
        num_running=3,
        num_waiting=2,
        num_blocks=10,
        num_free_blocks=4,
        max_seats=32,
        num_evictions=5,
        num_loads=3,
        generations=(
            resident(pirate, "gpu", num_running=2),
            resident(unknown, "host", num_waiting=1),
            resident("d" * 64, "disk"),
        ),
    )
    ask(client, model="pirate")
    counted = scrape(client)

    def of(name: str, **labels: str) -> float:
        return counted[name, tuple(sorted(labels.items()))]

    assert of("loriner_sequences_running") == 3
    assert of("loriner_kv_usage_ratio") == pytest.approx(0.6)
    assert of("loriner_adapters", tier="gpu") == 1
    assert of("loriner_adapter_evictions_total") == 5
    assert of("loriner_adapter_loads_total") == 3
    assert of("loriner_state", state="ready") == 1
    assert of("vllm:num_requests_running", model_name="tiny") == 3
    assert of("vllm:num_requests_waiting", model_name="tiny") == 2
    assert of("vllm:kv_cache_usage_perc", model_name="tiny") == pytest.approx(0.6)
    assert of("vllm:num_gpu_loaded_lora_adapters", model_name="tiny") == 1
    assert of("vllm:max_gpu_lora_adapters", model_name="tiny") == 32
    assert of("vllm:lora_adapter_loaded", adapter_name="pirate", level="gpu", pinned="false")
    assert of("vllm:lora_adapter_loaded", adapter_name="e" * 12, level="cpu", pinned="false")
    info = {"max_lora": "32", "running_lora_adapters": "pirate"}
    assert of("vllm:lora_requests_info", **info, waiting_lora_adapters="e" * 12) > 1.7e9


def test_what_left_leaves_no_series(client: TestClient, service: FakeService) -> None:
    service.engine_stats = EngineStats(generations=(resident("e" * 64),))
    assert "e" * 12 in client.get("/metrics").text
    service.engine_stats = EngineStats()
    assert "e" * 12 not in client.get("/metrics").text


def test_adapter_labels_are_bounded(
    client: TestClient, service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "MAX_ADAPTER_LABELS", 2)
    for i in range(4):
        service.store.add(f"a{i}")
        ask(client, model=f"a{i}")
    found = {
        dict(labels)["adapter"]
        for name, labels in scrape(client)
        if name == "loriner_output_tokens_total"
    }

    assert found == {"a0", "a1", "other"}


def test_two_apps_in_one_process_do_not_mix(tmp_path: Path) -> None:
    clients = [
        TestClient(
            build_app(FakeService(tmp_path), ServerConfig(store=tmp_path)),  # type: ignore[arg-type]
            base_url="http://localhost",
        )
        for _ in range(2)
    ]
    ask(clients[0])

    assert value(clients[0], "loriner_output_tokens_total", adapter="base") == 6
    assert "loriner_output_tokens_total{" not in clients[1].get("/metrics").text


def test_openmetrics_is_served_to_who_asks_for_it(client: TestClient) -> None:
    response = client.get("/metrics", headers={"accept": "application/openmetrics-text"})

    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert response.text.endswith("# EOF\n")
