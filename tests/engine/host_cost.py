"""What a decode step costs the host: an engine on a runner that computes nothing.

`python -m tests.engine.host_cost [--profile]` prints microseconds a step of 128 sequences.
"""

from __future__ import annotations

import cProfile
import pstats
import sys
import time
from types import SimpleNamespace
from typing import Any

from loriner.adapters.pool import Pool, SeatWeights
from loriner.config import EngineConfig
from loriner.core import Request, SamplingParams
from loriner.engine.engine import Engine
from loriner.engine.messages import Events, frame
from loriner.engine.readings import Read
from loriner.engine.sampler import Sampled
from loriner.engine.step_input import StepInput
from tests.tiny import make_tokenizer

NUM_SEQUENCES, NUM_STEPS, NUM_ADAPTERS = 128, 500, 64


class IdleStep:
    def __init__(self, count: int) -> None:
        self._count = count

    def choose(self) -> None: ...

    def result(self) -> list[Sampled]:
        return [Sampled(97)] * self._count

    def read(self) -> list[Read]:
        return []


class IdleRunner:
    """Every token is an `a`."""

    is_async = True
    usual_step_tokens = 512
    shared_step_tokens = 512
    max_len = 8192
    num_blocks = 20_000
    operand_bytes = 0
    model_config: Any = SimpleNamespace(eos_token_ids=(257,), vocab_size=259)
    checkpoint: Any = SimpleNamespace(num_bytes=0)

    def make_pool(self, max_seats: int, on_copied: object) -> Pool:
        return Pool(1 << 30, max_seats)

    def pack(self, adapter: object) -> SeatWeights:
        raise NotImplementedError

    def source(self, store: object) -> Any:
        raise NotImplementedError

    def needs_host(self, params: SamplingParams) -> bool:
        return False

    def launch(self, step: StepInput) -> IdleStep:
        return IdleStep(len(step.draws))

    def check(self) -> None:
        pass


def build() -> Engine:
    config = EngineConfig(
        max_sequences=NUM_SEQUENCES, max_step_tokens=2048, max_seats=NUM_ADAPTERS, block_size=16
    )
    engine = Engine(config, IdleRunner(), make_tokenizer(), lambda g: SeatWeights({}, None, 10))
    params = SamplingParams(max_tokens=4000, temperature=0.7, ignore_eos=True)
    for i in range(NUM_SEQUENCES):
        generation = None if i % 9 == 0 else f"{i % NUM_ADAPTERS:064x}"
        prompt = tuple(j % 251 for j in range(i, i + 128))
        engine.submit(Request(str(i), prompt, params, generation))
    while len(engine.scheduler.running) < NUM_SEQUENCES or engine.scheduler.waiting:
        engine.step()
        time.sleep(0.001)
    for _ in range(50):
        engine.step()
    return engine


def measure(engine: Engine) -> dict[str, float]:
    """Microseconds a step: of the engine, and of making the message."""
    spent = {"step": 0.0, "frame": 0.0}
    for _ in range(NUM_STEPS):
        start = time.perf_counter()
        events = engine.step()
        middle = time.perf_counter()
        frame(Events(events))
        spent["step"] += middle - start
        spent["frame"] += time.perf_counter() - middle
        assert len(events) == NUM_SEQUENCES
    return {name: seconds / NUM_STEPS * 1e6 for name, seconds in spent.items()}


def main() -> None:
    engine = build()
    if "--profile" in sys.argv:
        profile = cProfile.Profile()
        profile.runcall(measure, engine)
        pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    sys.stdout.write(f"{measure(engine)}\n")
    engine.close()


if __name__ == "__main__":
    main()
