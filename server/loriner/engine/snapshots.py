"""What an engine tells of itself, and what its reader makes of it: totals, and what is where now.

Taken between steps, some times a second. Invariant: a snapshot costs what runs, waits or changed,
not what is known; a reader that learns every snapshot of an engine knows where everything is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from loriner.engine.stats import EngineStats, GenerationStats

if TYPE_CHECKING:
    from loriner.engine.engine import Engine


@dataclass(slots=True)
class Counters:
    """Totals since the start."""

    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    num_aborted: int = 0


class Snapshots:
    """Of one engine, for one reader: each tells of the generations that changed since the last."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._busy: set[str] = set()  # generations with sequences in the last snapshot

    def take(self) -> EngineStats:
        engine = self._engine
        return EngineStats(
            num_running=len(engine.scheduler.running),
            num_waiting=len(engine.scheduler.waiting),
            num_blocks=engine.blocks.num_blocks,
            num_free_blocks=engine.blocks.num_free,
            block_size=engine.blocks.block_size,
            pool_bytes=engine.pool.budget_bytes,
            pool_used_bytes=engine.pool.used_bytes,
            host_bytes=engine.registry.host_bytes,
            host_used_bytes=engine.registry.host_used_bytes,
            max_seats=engine.pool.max_seats,
            num_preemptions=engine.scheduler.num_preemptions,
            num_evictions=engine.pool.num_evictions,
            num_loads=engine.registry.num_loads,
            base_bytes=engine.runner.checkpoint.num_bytes,
            operand_bytes=engine.runner.operand_bytes,
            generations=tuple(self._changed()),
            **asdict(engine.counters),
        )

    def _changed(self) -> Iterator[GenerationStats]:
        scheduler, registry = self._engine.scheduler, self._engine.registry
        running = Counter(s.generation for s in scheduler.running if s.generation)
        waiting = Counter(s.generation for s in scheduler.waiting if s.generation)
        busy = running.keys() | waiting.keys()
        for generation in sorted(registry.take_changes() | busy | self._busy):
            known = registry.known(generation)
            yield GenerationStats(
                generation=generation,
                tier=registry.tier(generation),
                pinned=generation in registry.pool.kept,
                num_running=running[generation],
                num_waiting=waiting[generation],
                num_bytes=known.num_bytes,
                num_loads=known.num_loads,
                last_load_s=known.last_load_s,
            )
        self._busy = busy


class Latest:
    """What a reader of an engine's snapshots knows: the last one, with all generations."""

    def __init__(self) -> None:
        self._last = EngineStats()
        self._generations: dict[str, GenerationStats] = {}

    def learn(self, stats: EngineStats) -> None:
        self._last = stats
        for entry in stats.generations:
            if entry.tier == "disk" and not (entry.num_running or entry.num_waiting):
                self._generations.pop(entry.generation, None)
            else:
                self._generations[entry.generation] = entry

    @property
    def stats(self) -> EngineStats:
        """`generations` are those that are in memory or have sequences."""
        return replace(self._last, generations=tuple(self._generations.values()))
