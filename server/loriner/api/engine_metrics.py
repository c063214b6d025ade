"""The engine's snapshot as Prometheus families, under our names and under vLLM's.

Reads `service.stats()` when scraped and keeps nothing, so a generation that left has no stale
series. Label names of the `vllm:` families are what gateway endpoint pickers read. Invariant: a
scrape never waits for the engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from loriner.engine.stats import EngineStats, GenerationStats

if TYPE_CHECKING:
    from loriner.engine.service import Service

STATES = ("starting", "ready", "restarting", "draining", "failed")
MAX_RESIDENT_SERIES = 1000

_GAUGES: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("sequences_running", "Sequences in the current step", lambda s: s.num_running),
    ("sequences_waiting", "Sequences in the queue", lambda s: s.num_waiting),
    ("kv_blocks", "KV blocks in all", lambda s: s.num_blocks),
    ("kv_blocks_free", "KV blocks that can be allocated", lambda s: s.num_free_blocks),
    ("kv_usage_ratio", "Share of KV blocks in use", lambda s: kv_usage(s)),
    ("pool_bytes", "Memory for adapters that can run now", lambda s: s.pool_bytes),
    ("pool_used_bytes", "Of it, taken", lambda s: s.pool_used_bytes),
    ("host_bytes", "Memory for adapters kept warm on the host", lambda s: s.host_bytes),
    ("host_used_bytes", "Of it, taken", lambda s: s.host_used_bytes),
    ("max_seats", "Most adapters in one step", lambda s: s.max_seats),
    ("base_bytes", "Size of the NF4 base on disk", lambda s: s.base_bytes),
    (
        "operand_bytes",
        "Base weights as the kernels keep them",
        lambda s: s.operand_bytes,
    ),
)

_COUNTERS: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("engine_steps", "Forward passes", lambda s: s.num_steps),
    ("engine_prompt_tokens", "Prompt tokens of admitted sequences", lambda s: s.num_prompt_tokens),
    ("engine_output_tokens", "Tokens sampled", lambda s: s.num_output_tokens),
    ("engine_cached_tokens", "Prompt tokens served from cache", lambda s: s.num_cached_tokens),
    ("preemptions", "Sequences that gave their blocks back", lambda s: s.num_preemptions),
    ("adapter_evictions", "Adapters put out of the pool", lambda s: s.num_evictions),
    ("adapter_loads", "Adapters loaded to the host", lambda s: s.num_loads),
    ("aborted_sequences", "Sequences aborted", lambda s: s.num_aborted),
)


def kv_usage(stats: EngineStats) -> float:
    return 1 - stats.num_free_blocks / stats.num_blocks if stats.num_blocks else 0.0


class EngineCollector(Collector):
    """`name_of` turns a generation digest into the adapter's name."""

    def __init__(self, service: Service, name_of: Callable[[str], str]) -> None:
        self._service = service
        self._name_of = name_of

    def describe(self) -> Iterable[Metric]:
        return ()  # nothing is read at registration

    def collect(self) -> Iterator[Metric]:
        stats = self._service.stats()
        for name, text, read in _GAUGES:
            yield GaugeMetricFamily(f"loriner_{name}", text, value=read(stats))
        for name, text, read in _COUNTERS:
            yield CounterMetricFamily(f"loriner_{name}", text, value=read(stats))
        yield self._state()
        yield CounterMetricFamily(
            "loriner_engine_restarts", "Engine restarts", value=self._service.num_restarts
        )
        yield from self._adapters(stats.generations)
        yield from self._as_vllm(stats)

    def _state(self) -> Metric:
        family = GaugeMetricFamily("loriner_state", "1 for the current state", labels=["state"])
        for state in STATES:
            family.add_metric([state], float(self._service.state == state))
        return family

    def _adapters(self, generations: Iterable[GenerationStats]) -> Iterator[Metric]:
        tiers = GaugeMetricFamily("loriner_adapters", "Generations in a tier", labels=["tier"])
        counts = dict.fromkeys(("disk", "host", "gpu"), 0)
        for entry in generations:
            counts[entry.tier] = counts.get(entry.tier, 0) + 1
        for tier, count in counts.items():
            tiers.add_metric([tier], count)
        yield tiers

    def _as_vllm(self, stats: EngineStats) -> Iterator[Metric]:
        base = self._service.model_name
        resident = [entry for entry in stats.generations if entry.tier in ("gpu", "host")]
        on_gpu = sum(entry.tier == "gpu" for entry in resident)
        for name, text, value in (
            ("num_requests_running", "Sequences in the current step", stats.num_running),
            ("num_requests_waiting", "Sequences in the queue", stats.num_waiting),
            ("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1", kv_usage(stats)),
            ("num_gpu_loaded_lora_adapters", "Adapters in a seat", on_gpu),
            ("max_gpu_lora_adapters", "Seats", stats.max_seats),
        ):
            family = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name"])
            family.add_metric([base], value)
            yield family
        yield self._loaded(resident)
        yield self._lora_info(stats)

    def _loaded(self, resident: list[GenerationStats]) -> Metric:
        labels = ["adapter_name", "level", "pinned"]
        family = GaugeMetricFamily("vllm:lora_adapter_loaded", "1 while resident", labels=labels)
        names: set[str] = set()
        for entry in resident[:MAX_RESIDENT_SERIES]:
            name, level = self._name_of(entry.generation), "gpu" if entry.tier == "gpu" else "cpu"
            if name not in names:  # two generations of one name: the first speaks for it
                names.add(name)
                family.add_metric([name, level, str(entry.pinned).lower()], 1)
        return family

    def _lora_info(self, stats: EngineStats) -> Metric:
        labels = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        family = GaugeMetricFamily("vllm:lora_requests_info", "Adapters in flight", labels=labels)
        running = self._names_of(entry for entry in stats.generations if entry.num_running)
        waiting = self._names_of(entry for entry in stats.generations if entry.num_waiting)
        family.add_metric([str(stats.max_seats), running, waiting], time.time())
        return family

    def _names_of(self, entries: Iterable[GenerationStats]) -> str:
        return ",".join(sorted({self._name_of(entry.generation) for entry in entries}))
