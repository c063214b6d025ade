"""The engine that a benchmark measures: the one that `serve` runs, without doors, on a random base.

The only file of `bench` that knows how runner and engine are put together. Invariant: the measured
path is the server's own; nothing here computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loriner.adapters.image import PAGE_BYTES
from loriner.adapters.memory import Weights
from loriner.adapters.store import Store
from loriner.bench.base_folder import make_tokenizer
from loriner.bench.random_adapters import RandomAdapters
from loriner.bench.random_base import RandomBase
from loriner.bench.timing import Stopwatch
from loriner.bench.traffic import kv_token_bytes
from loriner.config import MIB, EngineConfig
from loriner.engine.engine import Engine
from loriner.engine.runner import Runner
from loriner.engine.step_input import StepInput

BLOCK_SIZE = 16


@dataclass(frozen=True, slots=True)
class Need:
    """What a run must have room for."""

    rows: int
    tokens: int  # longest context of a row, its answer included
    seat_sizes: Sequence[int] = ()  # bytes of the adapters that have seats at once
    step_tokens: int = 8192
    num_hosted: int = 4  # adapters on the host beside those in seats
    bf16_shadow: bool = False


class Target:
    """An engine in this process. `close` it."""

    def __init__(
        self,
        base: RandomBase,
        adapters: RandomAdapters,
        need: Need,
        num_threads: int = 0,
        store: Store | None = None,
    ) -> None:
        """`store`: from where adapters are loaded; without one, from `adapters`."""
        self.base, self.adapters = base, adapters
        self.watch = Stopwatch(str(base.device))
        config = engine_config(base, need, num_threads)
        self.runner = open_runner(config, base)
        self.kv_itemsize = kv_itemsize(base.device.type)
        self.step_tokens = config.max_step_tokens
        self.last_step: StepInput | None = None
        self._record(self.runner)
        source = self._packed if store is None else self.runner.source(store)
        tokenizer = make_tokenizer(base.config.vocab_size)
        self.engine = Engine(config, self.runner, tokenizer, source)

    @property
    def vocab_size(self) -> int:
        return self.base.config.vocab_size

    def again(self, step: StepInput) -> Callable[[], object]:
        """What the device does for `step`, once more for each call; the engine must be idle.

        On a GPU the step's graph is replayed; a CPU's step is launched again.
        """
        self.runner.launch(step).result()
        found: Callable[[], object] = getattr(
            self.runner, "run_again", lambda: self.runner.launch(step).result()
        )
        return found

    def bypass_store(self) -> None:
        """From now on adapters are loaded from `adapters`, by their names there."""
        self.engine.registry.loaders.source = self._packed

    def close(self) -> None:
        self.engine.close()

    def _packed(self, generation: str) -> Weights:
        return self.runner.pack(self.adapters.load(generation))

    def _record(self, runner: Runner) -> None:
        launch = runner.launch

        def recorded(step: StepInput) -> Any:
            self.last_step = step
            return launch(step)

        runner.launch = recorded  # type: ignore[method-assign]


def engine_config(base: RandomBase, need: Need, num_threads: int = 0) -> EngineConfig:
    """Settings that fit `need` and not much more."""
    blocks = need.rows * (-(-need.tokens // BLOCK_SIZE) + 1) + 8
    block_bytes = BLOCK_SIZE * kv_token_bytes(base.config, kv_itemsize(base.device.type))
    # An image ends in whole pages after each of its chunks, which are no more than the linears.
    slack = MIB + 4 * base.config.num_layers * PAGE_BYTES
    largest = max(need.seat_sizes, default=0) + slack
    return EngineConfig(
        model=Path("unused"),
        device=base.device.type,
        max_model_len=min(need.tokens, base.config.max_context),
        max_sequences=need.rows,
        max_step_tokens=max(need.step_tokens, need.rows),
        block_size=BLOCK_SIZE,
        kv_bytes=blocks * block_bytes,
        max_seats=max(1, len(need.seat_sizes)),
        pool_bytes=sum(need.seat_sizes) + len(need.seat_sizes) * slack + MIB,
        host_bytes=64 * MIB + need.num_hosted * largest,
        prefix_cache=False,
        gpu_memory_fraction=0.95,
        bf16_shadow=need.bf16_shadow,
        num_threads=num_threads,
    )


def open_runner(config: EngineConfig, base: RandomBase) -> Runner:
    """The runner of `config.device` on a base that has no folder."""
    if config.device == "cpu":
        from loriner.engine.cpu_runner import CpuRunner

        return CpuRunner(config, checkpoint=base)
    from loriner.engine.cuda_runner import CudaRunner

    return CudaRunner(config, checkpoint=base)


def kv_itemsize(device: str) -> int:
    """Bytes of one number in the KV cache."""
    return 2 if device == "cuda" else 4
