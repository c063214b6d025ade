"""Who runs: budget, chunks, order, preemption, seats, starvation."""

from __future__ import annotations

import pytest

from loriner.core import Sequence
from loriner.engine.kv_cache import BlockManager
from loriner.engine.runs import Run
from loriner.engine.scheduler import DRAIN_S, SHARED_S, Scheduler
from loriner.errors import AdapterError
from tests.fakes import Clock, FakeRegistry, make_sequence


def make(
    *,
    seats: int = 8,
    num_blocks: int = 64,
    max_sequences: int = 8,
    max_step_tokens: int = 16,
    shared_step_tokens: int | None = None,
    clock: Clock | None = None,
) -> Scheduler:
    return Scheduler(
        BlockManager(num_blocks, 4, prefix_cache=True),
        FakeRegistry(seats),  # type: ignore[arg-type]
        max_sequences=max_sequences,
        max_step_tokens=max_step_tokens,
        shared_step_tokens=shared_step_tokens,
        clock=clock or Clock(),
    )


def step(scheduler: Scheduler) -> list[Run]:
    """Schedule, and pretend that each sampling sequence got token 99."""
    runs = scheduler.schedule()
    for run in runs:
        run.sequence.num_computed += run.num_rows
        scheduler.blocks.commit(run.sequence, run.sequence.num_computed)
        if run.samples:
            run.sequence.append(99)
    return runs


def add(scheduler: Scheduler, *sequences: Sequence) -> None:
    for sequence in sequences:
        scheduler.add(sequence)


def test_a_long_prompt_runs_in_chunks_within_the_budget() -> None:
    scheduler = make(max_step_tokens=16)
    add(scheduler, make_sequence(range(40)))
    assert [[r.num_rows for r in step(scheduler)] for _ in range(4)] == [[16], [16], [8], [1]]


def test_steps_are_shorter_while_tenants_share_and_a_while_after() -> None:
    clock = Clock()
    scheduler = make(max_step_tokens=16, shared_step_tokens=6, clock=clock)
    add(scheduler, make_sequence(range(40), salt="a"))
    assert [run.num_rows for run in step(scheduler)] == [16]

    quiet = make_sequence(range(3), salt="b")
    add(scheduler, quiet)
    assert sum(run.num_rows for run in step(scheduler)) == 6
    scheduler.finish(quiet)
    clock.now += SHARED_S / 2
    assert [run.num_rows for run in step(scheduler)] == [6]
    clock.now += SHARED_S
    assert [run.num_rows for run in step(scheduler)] == [15]  # all that is left


@pytest.mark.parametrize("shared", [3, 5, 7])
def test_where_a_step_is_too_short_for_all_they_take_turns(shared: int) -> None:
    scheduler = make(max_step_tokens=32, shared_step_tokens=shared, num_blocks=1000)
    sequences = [
        make_sequence(range(2), request_id=f"{i}", salt=tenant, max_tokens=200)
        for i, tenant in enumerate("aaaaaaab")
    ]
    *flood, other = sequences
    add(scheduler, *flood)
    for _ in range(3):  # all have their prompts behind them
        step(scheduler)
    add(scheduler, other)
    step(scheduler)
    before = [one.num_output for one in sequences]
    steps = [step(scheduler) for _ in range(70)]

    assert all(len(runs) == min(shared, 8) for runs in steps)
    *gained, most = [one.num_output - had for one, had in zip(sequences, before, strict=True)]
    assert max(gained) - min(gained) <= 1 and 0 < min(gained) <= most


def test_the_last_two_rows_of_a_prompt_run_together() -> None:
    for num_prompt, expected in ((17, [15, 2]), (16, [16]), (18, [16, 2]), (33, [16, 15, 2])):
        scheduler = make(max_step_tokens=16)
        add(scheduler, make_sequence(range(num_prompt)))
        found = [step(scheduler)[0].num_rows for _ in expected]
        assert found == expected
        assert step(scheduler)[0].num_rows == 1  # what is generated comes singly


def test_a_step_of_one_row_takes_any_prompt() -> None:
    scheduler = make(max_step_tokens=1)
    add(scheduler, make_sequence(range(3)))
    assert [step(scheduler)[0].num_rows for _ in range(4)] == [1, 1, 1, 1]


def test_decodes_go_before_prefills() -> None:
    scheduler = make(max_step_tokens=8)
    short, long = make_sequence([1, 2], request_id="s"), make_sequence(range(30), request_id="l")
    add(scheduler, short)
    step(scheduler)
    add(scheduler, long)
    assert [(r.sequence, r.num_rows) for r in step(scheduler)] == [(short, 1), (long, 7)]


def test_only_the_chunk_with_the_newest_token_samples() -> None:
    scheduler = make(max_step_tokens=4)
    sequence = make_sequence(range(6))
    assert [Run.of(sequence, 4).samples, Run.of(sequence, 6).samples] == [False, True]
    add(scheduler, sequence)
    runs = step(scheduler) + step(scheduler)
    assert [(r.num_rows, r.samples) for r in runs] == [(4, False), (2, True)]


def test_the_latest_admitted_is_preempted_and_comes_back_first() -> None:
    scheduler = make(num_blocks=4)
    first = make_sequence(range(8), request_id="a")
    second = make_sequence(range(50, 57), request_id="b")
    add(scheduler, first, second)
    step(scheduler)
    runs = step(scheduler)  # first needs a third block, second fills its second
    assert [r.sequence for r in runs] == [first]
    assert (
        next(iter(scheduler.waiting)) is second
        and second.blocks == []
        and scheduler.num_preemptions == 1
    )
    scheduler.finish(first)
    assert [r.sequence for r in step(scheduler)] == [second]
    assert second.num_computed == 8


def test_a_loading_adapter_does_not_hold_up_others() -> None:
    scheduler = make()
    scheduler.registry.loading.add("slow")  # type: ignore[attr-defined]
    slow = make_sequence(generation="slow", request_id="slow")
    base, other = make_sequence(request_id="b"), make_sequence(generation="g", request_id="g")
    add(scheduler, slow, base, other)
    assert {r.sequence for r in step(scheduler)} == {base, other}
    scheduler.registry.loading.clear()  # type: ignore[attr-defined]
    assert slow in {r.sequence for r in step(scheduler)}


def test_an_adapter_that_fails_to_load_fails_its_own_sequences_only() -> None:
    scheduler = make()
    error = AdapterError("broken")
    scheduler.registry.failures["bad"] = error  # type: ignore[attr-defined]
    bad = [make_sequence(generation="bad", request_id=str(i)) for i in range(2)]
    good = make_sequence(generation="good")
    add(scheduler, bad[0], good, bad[1])
    assert [r.sequence for r in step(scheduler)] == [good]
    assert scheduler.failed == [(bad[0], error), (bad[1], error)]


def test_adapters_beyond_the_seats_wait_and_base_rows_do_not() -> None:
    scheduler = make(seats=1)
    a, b = make_sequence(generation="a", request_id="a"), make_sequence(generation="b")
    base = make_sequence(request_id="base")
    add(scheduler, a, b, base)
    assert [r.sequence for r in step(scheduler)] == [a, base]
    scheduler.finish(a)
    assert b in {r.sequence for r in step(scheduler)}


def test_a_waiting_adapter_is_not_starved_by_a_popular_one() -> None:
    clock = Clock()
    scheduler = make(seats=1, clock=clock)
    popular = make_sequence(generation="a", request_id="a0")
    add(scheduler, popular, make_sequence(generation="b", request_id="b"))
    served = False
    for i in range(1, 20):
        late = make_sequence(generation="a", request_id=f"a{i}", arrival_s=clock.now)
        add(scheduler, late)
        runs = step(scheduler)
        served = any(r.sequence.generation == "b" for r in runs)
        if served:
            break
        if i % 2 == 0:
            scheduler.finish(next(iter(scheduler.running)))
        clock.now += DRAIN_S / 2
    assert served, "b was passed over for ever"


def test_choices_wait_for_their_common_prompt() -> None:
    scheduler = make()
    choices = [make_sequence(range(10), n=3, index=i) for i in range(3)]
    add(scheduler, *choices)
    assert [r.sequence.index for r in step(scheduler)] == [0]
    runs = step(scheduler)
    assert [r.sequence.index for r in runs] == [0, 1, 2]
    assert [r.num_rows for r in runs] == [1, 2, 2]


def test_max_sequences_is_kept() -> None:
    scheduler = make(max_sequences=2)
    add(scheduler, *(make_sequence(request_id=str(i)) for i in range(5)))
    assert len(step(scheduler)) == 2 and len(scheduler.waiting) == 3


def test_finishing_a_waiting_sequence_forgets_it() -> None:
    scheduler = make(max_sequences=1)
    first, second = make_sequence(request_id="a"), make_sequence(request_id="b")
    add(scheduler, first, second)
    step(scheduler)
    scheduler.finish(second)
    scheduler.finish(first)
    assert not scheduler.waiting and not scheduler.running
    assert scheduler.blocks.num_free == scheduler.blocks.num_blocks
