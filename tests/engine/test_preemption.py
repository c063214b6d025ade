"""Who gives way to whom: a flood's places, blocks, seats and rows; and all come to their end."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from loriner.core import Sequence, Turn
from loriner.engine.kv_cache import BlockManager
from loriner.engine.preemption import MIN_TOKENS
from loriner.engine.runs import Run
from loriner.engine.scheduler import Scheduler
from tests.engine.test_fairness import SEATS, ask, make, step
from tests.fakes import Clock, FakeRegistry, make_sequence

FOR_EVER = 10**6


def flooded(num_steps: int = 20, **settings: int) -> Scheduler:
    """Every place is the flood's, and many wait."""
    scheduler = make(**settings)
    for _ in range(40):
        ask(scheduler, "flood")
    for _ in range(num_steps):
        step(scheduler, FOR_EVER, Counter())
    assert {one.request.salt for one in scheduler.running} == {"flood"}
    return scheduler


def tenants(runs: list[Run]) -> Counter[str]:
    return Counter(run.sequence.request.salt for run in runs)


def test_who_comes_in_a_flood_runs_in_the_next_step() -> None:
    scheduler = flooded()
    latest = list(scheduler.running)[-1]
    ask(scheduler, "other")
    assert tenants(step(scheduler, FOR_EVER, Counter())) == {"flood": SEATS - 1, "other": 1}
    assert next(iter(scheduler.waiting)) is latest and latest.num_preemptions == 1


def test_nobody_takes_more_than_the_other_keeps() -> None:
    scheduler = flooded()
    for _ in range(40):
        ask(scheduler, "other")
    for _ in range(200):
        runs = step(scheduler, FOR_EVER, Counter())
    assert tenants(runs) == {"flood": SEATS // 2, "other": SEATS // 2}
    assert scheduler.num_preemptions == SEATS // 2


def test_a_heavier_tenant_keeps_more() -> None:
    scheduler = flooded(max_sequences=8)
    for _ in range(40):
        ask(scheduler, "heavy", turn=Turn(weight=3.0))
    for _ in range(200):
        runs = step(scheduler, FOR_EVER, Counter())
    assert tenants(runs) == {"flood": 2, "heavy": 6}


def test_who_was_served_more_takes_nothing() -> None:
    scheduler = flooded()
    scheduler.turns.charge(make_sequence(range(2000), salt="other"), 2000)
    ask(scheduler, "other")
    assert tenants(step(scheduler, FOR_EVER, Counter())) == {"flood": SEATS}


def test_of_a_tenant_the_least_urgent_give_way_first() -> None:
    scheduler = make()
    lazy = ask(scheduler, "flood", turn=Turn(priority=5))
    for _ in range(SEATS + 3):
        ask(scheduler, "flood")
    while lazy not in scheduler.running:
        step(scheduler, 4, Counter())
    ask(scheduler, "other")
    step(scheduler, 4, Counter())
    assert lazy.num_preemptions == 1 and scheduler.num_preemptions == 1


@pytest.mark.parametrize("num_output", [40, 200])
def test_each_gives_way_a_bounded_number_of_times_and_all_end(num_output: int) -> None:
    scheduler = make()
    mine = [ask(scheduler, "flood") for _ in range(3 * SEATS)]
    visitor: Sequence | None = None
    for moment in range(30 * num_output):
        gone = visitor not in scheduler.running | scheduler.waiting
        if gone and moment % 5 == 0:
            visitor = ask(scheduler, "visitor", 2)
        runs = scheduler.schedule()
        for run in runs:
            one = run.sequence
            one.num_computed += run.num_rows
            scheduler.blocks.commit(one, one.num_computed)
            if run.samples:
                one.append(99)
                if one.num_output == (3 if one is visitor else num_output):
                    scheduler.finish(one)
    assert all(one.num_output == num_output for one in mine)
    assert max(one.num_preemptions for one in mine) <= 1 + num_output // MIN_TOKENS
    assert scheduler.num_preemptions > 0


def test_blocks_are_given_up_as_places_are() -> None:
    scheduler = make(num_blocks=32, max_sequences=16)
    for _ in range(30):
        ask(scheduler, "flood", 12)
    for _ in range(6):
        step(scheduler, FOR_EVER, Counter())
    assert len(scheduler.running) < 16 and scheduler.blocks.num_free < 4
    mine = ask(scheduler, "other", 15)
    runs = step(scheduler, FOR_EVER, Counter())
    assert mine in {run.sequence for run in runs}
    assert len(mine.blocks) == 4
    for run in runs:
        assert run.sequence in scheduler.running, "rows of one who gave way"


def test_a_seat_is_given_up_by_all_that_use_it() -> None:
    scheduler = Scheduler(
        BlockManager(4096, 4, prefix_cache=False),
        FakeRegistry(2),  # type: ignore[arg-type]
        max_sequences=8,
        max_step_tokens=64,
        clock=Clock(),
    )
    for generation in ("a", "a", "a", "b", "b"):
        ask(scheduler, "flood", generation=generation)
    for _ in range(3):
        step(scheduler, FOR_EVER, Counter())
    ask(scheduler, "other", generation="c")
    runs = step(scheduler, FOR_EVER, Counter())
    assert Counter(run.sequence.generation for run in runs) == {"a": 3, "c": 1}
    assert scheduler.num_preemptions == 2


def test_long_prompts_of_one_do_not_fill_the_steps_of_another() -> None:
    scheduler = make(max_sequences=16)
    for _ in range(16):
        ask(scheduler, "flood", 1000)
    for _ in range(20):
        step(scheduler, FOR_EVER, Counter())
    mine = ask(scheduler, "other", 100)
    steps = 0
    while not mine.num_output:
        step(scheduler, FOR_EVER, Counter())
        steps += 1
    assert steps == 2, "64 rows a step: as alone"


def test_a_tenant_that_grows_preempts_the_one_that_holds_most() -> None:
    scheduler = make(num_blocks=16, max_sequences=8)
    small = ask(scheduler, "small", 3)
    step(scheduler, FOR_EVER, Counter())
    large = [ask(scheduler, "large", 15) for _ in range(3)]
    late = ask(scheduler, "small", 3)
    while not scheduler.num_preemptions:
        step(scheduler, FOR_EVER, Counter())
    assert large[-1].num_preemptions == 1
    assert not small.num_preemptions and not late.num_preemptions


ROW_MS, STEP_MS = 2.0, 8.0  # as SmolLM2 on two cores


class Town:
    """A server in fake time: a step takes `STEP_MS` and `ROW_MS` for each row."""

    def __init__(self, max_sequences: int, num_flood: int) -> None:
        self.clock, self.rng = Clock(), random.Random(0)
        self.scheduler = Scheduler(
            BlockManager(728, 16, prefix_cache=True),
            FakeRegistry(64),  # type: ignore[arg-type]
            max_sequences=max_sequences,
            max_step_tokens=32,
            clock=self.clock,
        )
        self.left: dict[Sequence, int] = {}  # tokens
        for _ in range(num_flood):
            self.flood()

    def flood(self) -> None:
        self.ask("flood", 64, self.rng.randint(16, 128))

    def ask(self, tenant: str, num_prompt: int, num_output: int) -> Sequence:
        prompt = [self.rng.randrange(10**6) for _ in range(num_prompt)]
        sequence = make_sequence(prompt, request_id=str(self.rng.random()), salt=tenant)
        self.left[sequence] = num_output
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> None:
        runs = self.scheduler.schedule()
        self.clock.now += STEP_MS + ROW_MS * sum(run.num_rows for run in runs)
        for run in runs:
            one = run.sequence
            one.num_computed += run.num_rows
            self.scheduler.blocks.commit(one, one.num_computed)
            if run.samples:
                one.append(self.rng.randrange(10**6))
                self.left[one] -= 1
            if not self.left[one]:
                self.scheduler.finish(one)
                del self.left[one]
                if one.request.salt == "flood":
                    self.flood()

    def first_token_ms(self, num_prompt: int) -> float:
        """Of a quiet tenant's prompt that comes at any moment of a step; lets it end."""
        arrival = self.clock.now + self.rng.uniform(0, 300)
        while self.clock.now < arrival:
            self.step()
        mine = self.ask("quiet", num_prompt, 16)
        while not mine.num_output:
            self.step()
        seconds = self.clock.now - arrival
        while mine in self.left:
            self.step()
        return seconds

    def p95_ms(self, num_prompt: int) -> float:
        return sorted(self.first_token_ms(num_prompt) for _ in range(60))[57]


@pytest.mark.parametrize("num_prompt", [48, 128, 512])
@pytest.mark.parametrize("max_sequences", [16, 32])
def test_a_flood_no_more_than_doubles_the_time_to_anothers_first_token(
    num_prompt: int, max_sequences: int
) -> None:
    alone = Town(max_sequences, 0)
    town = Town(max_sequences, 4 * max_sequences)
    for _ in range(60):
        town.step()
    assert town.p95_ms(num_prompt) <= 2 * alone.p95_ms(num_prompt)
    assert len(town.scheduler.waiting) > max_sequences
