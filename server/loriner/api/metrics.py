"""What /metrics shows: counters kept at the doors, and the engine's last snapshot.

One registry for each app, so two apps in one process do not mix. Invariant: the number of label
sets is bounded; adapter labels are names that the store knows, the first `MAX_ADAPTER_LABELS` of
them, then `other`.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from types import TracebackType
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import choose_encoder

from loriner.api.engine_metrics import EngineCollector
from loriner.api.status import row_of
from loriner.core import Event

if TYPE_CHECKING:
    from loriner.engine.service import Service

MAX_ADAPTER_LABELS = 200
MAX_KNOWN_NAMES = 4096
BASE, OTHER = "base", "other"
CLIENT_CLOSED = 499  # nginx's status for a client that went away

# vLLM's buckets, so that its dashboards and alerts fit.
_TTFT_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560),
)
_TOKEN_S = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1, 2.5, 5, 7.5, 10, 20, 40, 80),
)
_REQUEST_S = (
    *(0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60),
    *(120, 240, 480, 960, 1920, 7680),
)


class Metrics:
    """All metrics of one app."""

    def __init__(self, service: Service) -> None:
        self.names = AdapterNames()
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(service, self.names.of))
        registry = self.registry
        self.responses = Counter(
            "loriner_http_responses", "HTTP responses", ["route", "status"], registry=registry
        )
        self.calls = Counter(
            "loriner_grpc_responses", "gRPC calls ended", ["method", "code"], registry=registry
        )
        self.requests = Counter(
            "loriner_requests",
            "Inference requests ended",
            ["endpoint", "adapter", "status"],
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "loriner_prompt_tokens", "Prompt tokens admitted", ["adapter"], registry=registry
        )
        self.cached_tokens = Counter(
            "loriner_cached_prompt_tokens",
            "Prompt tokens found in the prefix cache",
            ["adapter"],
            registry=registry,
        )
        self.output_tokens = Counter(
            "loriner_output_tokens", "Tokens generated", ["adapter"], registry=registry
        )
        self.finished = Counter(
            "loriner_sequences", "Sequences finished", ["finish_reason"], registry=registry
        )
        self.first_token = Histogram(
            "loriner_time_to_first_token_seconds",
            "From the parsed request to its first event; start is cold when the adapter was loaded",
            ["start"],
            buckets=_TTFT_S,
            registry=registry,
        )
        self.inter_token = Histogram(
            "loriner_inter_token_seconds",
            "Between the tokens of one sequence",
            buckets=_TOKEN_S,
            registry=registry,
        )
        self.duration = Histogram(
            "loriner_request_seconds",
            "From the parsed request to its end",
            ["endpoint"],
            buckets=_REQUEST_S,
            registry=registry,
        )

    def request(self, endpoint: str) -> RequestMeter:
        return RequestMeter(self, endpoint)

    def count_call(self, method: str, code: str) -> None:
        """A gRPC call has ended; `method` is empty for one that we do not have."""
        self.calls.labels(method or "unmatched", code).inc()

    async def exposition(self, accept: str) -> tuple[bytes, str]:
        """(body, content type) in the format that the scraper asks for; encoded in a thread."""
        encoder, content_type = choose_encoder(accept)
        return await asyncio.to_thread(encoder, self.registry), content_type


class AdapterNames:
    """Generation digest -> the name it was last called by, and the bound on adapter labels."""

    def __init__(self) -> None:
        self._names: OrderedDict[str, str] = OrderedDict()
        self._labels: set[str] = set()

    def learn(self, generation: str, name: str) -> None:
        self._names[generation] = name
        self._names.move_to_end(generation)
        if len(self._names) > MAX_KNOWN_NAMES:
            self._names.popitem(last=False)

    def of(self, generation: str) -> str:
        """The adapter's name; a short digest when no request or upload named it here."""
        return self._names.get(generation, generation[:12])

    def label(self, name: str) -> str:
        if name not in self._labels and len(self._labels) >= MAX_ADAPTER_LABELS:
            return OTHER
        self._labels.add(name)
        return name


class RequestMeter:
    """Watches one inference request from parsing to its end."""

    def __init__(self, metrics: Metrics, endpoint: str) -> None:
        self._metrics = metrics
        self._endpoint = endpoint
        self._adapter = BASE
        self._status: int | None = None
        self._started = time.perf_counter()
        self._last: dict[int, float] = {}

    def __enter__(self) -> RequestMeter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        status = self._status or 200
        if error is not None:
            cancelled = isinstance(error, asyncio.CancelledError)
            status = CLIENT_CLOSED if cancelled else row_of(error).status
        metrics = self._metrics
        metrics.requests.labels(self._endpoint, self._adapter, str(status)).inc()
        metrics.duration.labels(self._endpoint).observe(time.perf_counter() - self._started)

    def admitted(self, name: str, generation: str, num_prompt_tokens: int) -> None:
        """`name` and `generation` are empty for the base."""
        if name:
            self._metrics.names.learn(generation, name)
            self._adapter = self._metrics.names.label(name)
        self._metrics.prompt_tokens.labels(self._adapter).inc(num_prompt_tokens)

    def event(self, index: int, event: Event) -> None:
        """Count one event of choice `index`."""
        metrics, now = self._metrics, time.perf_counter()
        if not self._last and event.token_ids:
            metrics.first_token.labels("cold" if event.cold_start else "warm").observe(
                now - self._started
            )
        if index not in self._last:
            metrics.cached_tokens.labels(self._adapter).inc(event.num_cached_tokens)
        elif event.token_ids:
            metrics.inter_token.observe((now - self._last[index]) / len(event.token_ids))
        self._last[index] = now
        metrics.output_tokens.labels(self._adapter).inc(len(event.token_ids))
        if event.finish_reason is not None:
            metrics.finished.labels(event.finish_reason.value).inc()

    def failed(self, status: int) -> None:
        """The request failed after its first byte, so that no exception will tell."""
        self._status = status
