"""Turns of tenants: equals are served alike, a flood delays nobody else, weights hold."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from loriner.core import Sequence, Turn
from loriner.engine.fairness import HEAD_START, OUTPUT_COST, PROMPT_COST
from loriner.engine.kv_cache import BlockManager
from loriner.engine.runs import Run
from loriner.engine.scheduler import Scheduler
from tests.fakes import Clock, FakeRegistry, make_sequence

SEATS = 4
fresh = itertools.count()


def make(
    max_sequences: int = SEATS, load: dict[str, float] | None = None, **more: int
) -> Scheduler:
    settings = {"num_blocks": 4096, "max_step_tokens": 64, **more}
    return Scheduler(
        BlockManager(settings["num_blocks"], 4, prefix_cache=False),
        FakeRegistry(64),  # type: ignore[arg-type]
        max_sequences=max_sequences,
        max_step_tokens=settings["max_step_tokens"],
        clock=Clock(),
        load_of=lambda generation: (load or {}).get(generation, 1.0),
    )


def ask(scheduler: Scheduler, tenant: str, num_prompt: int = 4, **more: object) -> Sequence:
    sequence = make_sequence(
        range(num_prompt), request_id=f"{tenant}-{next(fresh)}", salt=tenant, **more
    )
    scheduler.add(sequence)
    return sequence


def step(scheduler: Scheduler, num_output: int, served: Counter[str]) -> list[Run]:
    """One step; a sequence ends with its `num_output`th token. `served` counts tokens' cost."""
    runs = scheduler.schedule()
    for run in runs:
        sequence, tenant = run.sequence, run.sequence.request.salt
        prompt = min(run.end, sequence.num_prompt) - min(run.start, sequence.num_prompt)
        served[tenant] += int(PROMPT_COST * prompt)
        sequence.num_computed += run.num_rows
        scheduler.blocks.commit(sequence, sequence.num_computed)
        if run.samples:
            sequence.append(99)
            served[tenant] += int(OUTPUT_COST)
            if sequence.num_output == num_output:
                scheduler.finish(sequence)
    return runs


def test_one_tenant_is_served_in_order_of_arrival() -> None:
    scheduler = make(max_sequences=1)
    asked = [ask(scheduler, "a") for _ in range(5)]
    seen: list[Sequence] = []
    while scheduler.waiting or scheduler.running:
        seen += [run.sequence for run in step(scheduler, 1, Counter())]
    assert seen == asked


@pytest.mark.parametrize("tenants", ["aaaa", "aaba"])
def test_inside_a_tenant_the_urgent_go_first(tenants: str) -> None:
    scheduler, served = make(max_sequences=1), Counter[str]()
    asked = [
        ask(scheduler, tenant, turn=Turn(priority=priority))
        for tenant, priority in zip(tenants, (0, 5, -1, -1), strict=True)
    ]
    seen: list[Sequence] = []
    while scheduler.waiting or scheduler.running:
        seen += [run.sequence for run in step(scheduler, 1, served)]
    mine = [sequence for sequence in seen if sequence.request.salt == "a"]
    assert mine == sorted(
        (one for one in asked if one.request.salt == "a"), key=lambda one: one.request.turn.priority
    )


def test_two_that_always_wait_are_served_alike_whatever_they_send() -> None:
    """The bound of the paper: 2 max(w_p L_input, w_q M)."""
    scheduler, served = make(), Counter[str]()
    longest, num_output = 24, 10
    bound = 2 * max(PROMPT_COST * longest, OUTPUT_COST * SEATS * num_output)
    for _ in range(400):
        for tenant, num_prompt, backlog in (("short", 3, 200), ("long", longest, 20)):
            waiting = sum(s.request.salt == tenant for s in scheduler.waiting)
            for _ in range(backlog - waiting):
                ask(scheduler, tenant, num_prompt)
        step(scheduler, num_output, served)
        assert abs(served["short"] - served["long"]) <= bound
    assert min(served.values()) > 10 * bound


@pytest.mark.parametrize("weight", [2.0, 4.0])
def test_twice_the_weight_is_twice_the_tokens(weight: float) -> None:
    scheduler, served = make(), Counter[str]()
    for _ in range(1000):
        for tenant, own in (("light", 1.0), ("heavy", weight)):
            if sum(s.request.salt == tenant for s in scheduler.waiting) < 8:
                ask(scheduler, tenant, turn=Turn(weight=own))
        step(scheduler, 5, served)
    assert served["heavy"] / served["light"] == pytest.approx(weight, rel=0.1)


def test_an_adapter_that_costs_more_counts_for_more() -> None:
    scheduler, served = make(load={"big": 3.0}), Counter[str]()
    for _ in range(1000):
        for tenant, generation in (("base", None), ("lora", "big")):
            if sum(s.request.salt == tenant for s in scheduler.waiting) < 8:
                ask(scheduler, tenant, generation=generation)
        step(scheduler, 5, served)
    assert served["base"] / served["lora"] == pytest.approx(3.0, rel=0.1)


def test_idling_earns_no_more_than_the_head_start() -> None:
    scheduler, served = make(), Counter[str]()
    for _ in range(300):
        if len(scheduler.waiting) < 8:
            ask(scheduler, "busy")
        step(scheduler, 5, served)
    before = served.copy()
    for _ in range(600):
        for tenant in ("busy", "back"):
            if sum(s.request.salt == tenant for s in scheduler.waiting) < 8:
                ask(scheduler, tenant)
        step(scheduler, 5, served)
    gained = served - before
    bound = 2 * OUTPUT_COST * SEATS * 5
    assert 0 < gained["back"] - gained["busy"] <= HEAD_START + bound
    assert gained["busy"] > 2 * HEAD_START


def test_no_room_is_left_empty_while_anybody_waits() -> None:
    scheduler, served = make(), Counter[str]()
    for tenant in "abc":
        for _ in range(10):
            ask(scheduler, tenant)
    while len(scheduler.waiting) > SEATS:
        runs = step(scheduler, 3, served)
        assert len(runs) == SEATS


def test_a_preempted_sequence_is_first_of_its_tenant_and_charged_once() -> None:
    scheduler = make(num_blocks=6, max_sequences=2)
    first, second = ask(scheduler, "a", 8), ask(scheduler, "a", 8)
    served: Counter[str] = Counter()
    step(scheduler, 99, served)
    ask(scheduler, "a", 12, turn=Turn(priority=-9))
    while not scheduler.num_preemptions:
        step(scheduler, 99, served)
    scheduler.turns.settle()
    charged = scheduler.turns.served("a")
    scheduler.finish(first)
    runs = step(scheduler, 99, served)
    scheduler.turns.settle()

    assert [run.sequence for run in runs] == [second]
    assert scheduler.turns.served("a") == charged + OUTPUT_COST
