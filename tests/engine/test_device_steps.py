"""Staging, padding, seats and read-back of the GPU's steps, driven on the CPU: the tensors that a
graph would find are taken back to a `BatchMeta` and run by the CPU's model."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher
from torch import Tensor

from loriner.adapters.pool import Pool
from loriner.config import GIB, MIB, EngineConfig
from loriner.core import MAX_LOGPROBS, SamplingParams
from loriner.engine.cpu_runner import CpuRunner
from loriner.engine.device_steps import DeviceSteps, Limits, PendingStep
from loriner.engine.gpu_chooser import GpuChooser
from loriner.engine.graphs import Variant, buckets, variants
from loriner.engine.readings import Reader
from loriner.engine.sampler import sample
from loriner.engine.step_buffers import (
    LORA_ROWS,
    Shape,
    StepBuffers,
    StepTensors,
    WorkLists,
    offsets,
    seats_of,
)
from loriner.engine.step_input import Draw, Reading, Span, StepInput
from loriner.kernels.cuda.sampling import NO_LISTS, Records
from loriner.kernels.operands import AttentionPlan
from loriner.model.batch_meta import BatchMeta, LoraBatch
from loriner.model.transformer import KvCache
from tests.e2e.test_neighbours import random_adapters
from tests.engine.test_pipeline import answers, random_request
from tests.engines import WatchedEngine, build_engine, engine_config
from tests.fakes import make_request, make_sequence
from tests.tiny import write_tiny_base

CPU = torch.device("cpu")
GUIDED: list[dict[str, Any]] = [
    {"ignore_eos": True},
    {"grammar": LLMatcher.grammar_from_regex("[ab]{5}")},
    {"grammar": LLMatcher.grammar_from_regex("[0-9]{2,}"), "top_k": 3, "repetition_penalty": 1.1},
]
BLOCK = 4
TILE, CHUNK = 16, 8


class DeviceLikeRunner(CpuRunner):
    """Steps go the GPU's way: uploaded, padded, run from static tensors, read back late."""

    is_async = True

    def begin(self, limits: Limits) -> None:
        self.computation = CpuComputation(self)
        self._limits = limits

    def make_pool(self, max_seats: int, on_copied: Callable[[], None]) -> Pool:
        pool = super().make_pool(max_seats, on_copied)
        eos_ids = self.model_config.eos_token_ids
        chooser = CpuChooser(self._limits.sequences, eos_ids)
        self._steps = DeviceSteps(
            self.computation, chooser, self._limits, CPU, pool.seat_id, eos_ids
        )
        return pool

    def needs_host(self, params: SamplingParams) -> bool:
        return params.looks_back or (params.grammar is not None and params.logprobs is not None)

    def launch(self, step: StepInput) -> PendingStep:  # type: ignore[override]
        self.computation.step = step
        return self._steps.launch(step)


class CpuComputation:
    """Takes a step's static tensors at their word, and checks the padding."""

    step: StepInput

    def __init__(self, runner: DeviceLikeRunner) -> None:
        self.runner = runner
        self.variants: set[Variant] = set()

    def max_items(self, rows: int, sequences: int) -> tuple[int, int]:
        return sequences * 64, rows // TILE + sequences

    def work_lists(self, step: StepInput) -> WorkLists:
        items, tiles = [], []
        for s, context in enumerate(step.context.tolist()):
            first, end = step.q_start[s : s + 2].tolist()
            if end - first == 1:
                keys = range(0, context, CHUNK)
                for chunk, key in enumerate(keys):
                    last = min(key + CHUNK, context)
                    items.append((s, key, last, chunk | len(keys) << 16, 0, 0, 0, 0))
            else:
                tiles += [(s, row) for row in range(first, end, TILE)]
        return WorkLists(
            np.array(items, np.int32).reshape(-1, 8), np.array(tiles, np.int32).reshape(-1, 2)
        )

    def reader(self, readings: Seq[Reading]) -> Reader:
        return self.runner.reader(readings)

    def forward(
        self,
        step: StepTensors,
        token_ids: Tensor,
        variant: Variant,
        reader: Reader | None = None,
    ) -> Tensor:
        self.variants.add(variant)
        num_rows, num_sequences = self.step.num_rows, self.step.num_sequences
        num_samples = len(self.step.draws)
        assert variant.rows == len(token_ids) >= num_rows
        assert (step.slots[num_rows:] == -1).all() and (step.row_seat[num_rows:] == -1).all()
        assert (step.q_start[num_sequences:] == num_rows).all()
        assert (step.context[num_sequences:] == 0).all()
        assert (token_ids >= 0).all()
        self.check_lists(step, num_sequences)
        starts = step.q_start[: num_sequences + 1].tolist()
        spans = tuple(zip(starts[:-1], starts[1:], strict=True))
        sequence = torch.arange(num_sequences, dtype=torch.int32)
        counts = torch.tensor([end - start for start, end in spans])
        width = -(-int(step.context.max()) // BLOCK)
        meta = BatchMeta(
            token_ids=token_ids[:num_rows].long(),
            positions=step.positions[:num_rows].long(),
            slots=step.slots[:num_rows].long(),
            attention=AttentionPlan(
                spans,
                step.block_table[:num_sequences, :width].contiguous(),
                sequence.repeat_interleave(counts),
                step.positions[:num_rows] + 1,
            ),
            lora=self.lora(step.lora_items, step.num_lora_items, step.row_seat, num_rows),
            sample_rows=step.sample_rows[:num_samples].long(),
            sample_lora=self.lora(
                step.sample_items, step.num_sample_items, step.sample_seat, num_samples
            ),
            reader=reader,
        )
        assert variant.has_lora == (meta.lora is not None)
        logits = torch.full((len(step.sample_rows), self.runner.model_config.vocab_size), torch.nan)
        logits[:num_samples] = self.runner.run(meta)
        return logits

    def check_lists(self, step: StepTensors, num_sequences: int) -> None:
        keys = torch.zeros(num_sequences, dtype=torch.int32)
        for s, first, end, packed, *_ in step.attn_items[: int(step.num_attn_items)].tolist():
            assert (packed & 0xFFFF, packed >> 16) == (first // CHUNK, -(-step.context[s] // CHUNK))
            keys[s] += end - first
        tiles = step.tile_items[: int(step.num_tile_items)].tolist()
        for s in range(num_sequences):
            first, end = step.q_start[s : s + 2].tolist()
            alone = end - first == 1
            assert keys[s] == (step.context[s] if alone else 0)
            assert [r for t, r in tiles if t == s] == ([] if alone else [*range(first, end, TILE)])

    def lora(self, items: Tensor, count: Tensor, seats: Tensor, num_rows: int) -> LoraBatch | None:
        pool = self.runner.pool
        by_seat = {pool.seat_id(g): pool.weights(g) for g in pool._seats}
        segments = []
        for first, rows, seat in items[: int(count)].tolist():
            assert rows <= LORA_ROWS and (seats[first : first + rows] == seat).all()
            segments.append((first, first + rows, by_seat[seat]))
        assert sum(e - s for s, e, _ in segments) == int((seats[:num_rows] >= 0).sum())
        return LoraBatch(segments, num_rows, self.runner.ops) if segments else None


class CpuChooser:
    """Chooses as a device does: all but what penalties need, and results as numbers in a row."""

    def __init__(self, num_rows: int, eos_ids: tuple[int, ...]) -> None:
        self.num_rows, self.eos_ids = num_rows, eos_ids
        self.results = torch.zeros(num_rows * (2 + 2 * MAX_LOGPROBS), dtype=torch.int32)
        sizes = [num_rows, num_rows, num_rows * MAX_LOGPROBS, num_rows * MAX_LOGPROBS]
        self.ids, logprobs, top_ids, top = torch.split(self.results, sizes)
        self.logprobs = logprobs.view(torch.float32)
        self.top_ids = top_ids.view(num_rows, MAX_LOGPROBS)
        self.top = top.view(torch.float32).view(num_rows, MAX_LOGPROBS)
        self.draws: tuple[Draw, ...] = ()

    def load(self, draws: Seq[Draw]) -> None:
        assert len(draws) <= self.num_rows
        self.draws = tuple(draws)

    def __call__(self, logits: Tensor) -> None:
        self.results.fill_(-7)
        self.ids.fill_(-1)
        for row, draw in enumerate(self.draws):
            if draw.needs_host:
                self.ids[row] = 1  # whatever: the host chooses
                continue
            free = draw._replace(guide=None)
            chosen = sample(logits[row : row + 1], [free], self.eos_ids)[0]
            self.ids[row] = -1 if chosen.token_id is None else chosen.token_id
            if chosen.logprob is not None:
                self.logprobs[row] = chosen.logprob
                for place, (token_id, logprob) in enumerate(chosen.top):
                    self.top_ids[row, place], self.top[row, place] = token_id, logprob

    def bar(self, logits: Tensor, rows: Seq[int], words: Seq[Any]) -> None:
        for row, mask in zip(rows, words, strict=True):
            bits = np.unpackbits(mask.view(np.uint8), bitorder="little")[: logits.shape[1]]
            logits[row][torch.from_numpy(bits == 0)] = -torch.inf


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("device") / "base")


@pytest.fixture(scope="module")
def runners(base: Path) -> tuple[CpuRunner, DeviceLikeRunner]:
    return CpuRunner(engine_config(base)), DeviceLikeRunner(engine_config(base))


def make(runner: CpuRunner, base: Path, **config: int) -> WatchedEngine:
    runner.kv = KvCache(runner.model_config, 128, BLOCK, torch.float32)
    runner.max_len = 128
    made = engine_config(base, block_size=BLOCK, **config)
    if isinstance(runner, DeviceLikeRunner):
        runner.begin(Limits(made.max_step_tokens, made.max_sequences, runner.max_len, BLOCK))
    return build_engine(made, random_adapters(runner), runner)


@pytest.mark.parametrize("seed", range(8))
def test_the_devices_way_gives_the_hosts_tokens(
    runners: tuple[CpuRunner, DeviceLikeRunner], base: Path, seed: int
) -> None:
    rng = random.Random(seed)
    settings = {
        "max_step_tokens": rng.choice([16, 40, 512, 2048]),
        "max_seats": rng.choice([1, 2, 8]),
    }
    requests = [random_request(rng, str(i)) for i in range(16)]
    results = []
    for runner in runners:
        engine = make(runner, base, **settings)
        engine.run_all(requests)
        engine.close()
        results.append(answers(engine))
    assert results[0] == results[1]


def test_prompts_answers_and_adapters_each_have_their_variant(
    runners: tuple[CpuRunner, DeviceLikeRunner], base: Path
) -> None:
    runner = runners[1]
    engine = make(runner, base)
    for name in (None, "g1"):
        request = make_request(range(3, 9), request_id=str(name), generation=name)
        engine.run_all([request])
    engine.close()
    used = {(v.has_tiles, v.has_lora) for v in runner.computation.variants}
    assert used == {(False, False), (False, True), (True, False), (True, True)}


def test_rows_whose_logits_are_broken_end_alone(
    runners: tuple[CpuRunner, DeviceLikeRunner], base: Path
) -> None:
    runner = runners[1]
    engine = make(runner, base)
    run = runner.run

    def broken(meta: BatchMeta) -> Tensor:
        logits = run(meta)
        logits[0] = torch.nan
        return logits

    runner.run = broken  # type: ignore[method-assign, assignment]
    good = make_request([4, 5], request_id="good", max_tokens=4, ignore_eos=True)
    engine.submit(make_request([1, 2], request_id="bad", max_tokens=4, ignore_eos=True))
    engine.submit(good)
    engine.step()
    engine.step()
    runner.run = run  # type: ignore[method-assign]
    engine.run_all()
    assert str(engine.ends["bad", 0].error) == "The model's output was not finite."
    assert len(engine.outputs["good", 0]) == 4


@pytest.mark.parametrize("logprobs", [None, 2])
def test_guided_rows_fit_their_grammar_and_disturb_nobody(
    runners: tuple[CpuRunner, DeviceLikeRunner], base: Path, logprobs: int | None
) -> None:
    """With log-probabilities the host chooses them."""
    results = []
    for runner in runners:
        engine = make(runner, base)
        engine.run_all(
            [
                make_request(
                    [3 + i, 5],
                    request_id=str(i),
                    seed=i,
                    temperature=float(i % 3),
                    max_tokens=12,
                    **GUIDED[i % 3],
                    logprobs=logprobs,
                )
                for i in range(9)
            ]
        )
        engine.close()
        results.append(answers(engine))
        assert all(re.fullmatch("[ab]{5}", engine.text[str(i), 0]) for i in range(1, 9, 3))
        assert all(re.fullmatch("[0-9]{2,}", engine.text[str(i), 0]) for i in range(2, 9, 3))
    assert results[0] == results[1]


class NotedSampler:
    """Keeps what the GPU's sampler would be given."""

    def __init__(self) -> None:
        self.results = torch.zeros(1, dtype=torch.int32)

    def load(
        self, rows: Records, positions: Seq[int], lists: Mapping[int, Records] = NO_LISTS
    ) -> None:
        self.rows, self.positions, self.lists = rows, list(positions), dict(lists)

    def __call__(self, logits: Tensor) -> None:
        raise NotImplementedError

    def bar(self, logits: Tensor, rows: Seq[int], words: Seq[Any]) -> None:
        raise NotImplementedError


def test_the_gpus_sampler_is_told_what_each_sequence_asks_for() -> None:
    asked: list[dict[str, Any]] = [
        {},
        {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "seed": -1},
        {"logit_bias": ((7, 2.0), (7, 1.0)), "logprobs": 4},
        {"min_tokens": 2, "stop_token_ids": (9,), "logit_bias": ((3, 1.0),)},
        {"repetition_penalty": 2.0},
    ]
    sequences = [make_sequence((1, 2), **params) for params in asked]
    noted = NotedSampler()
    chooser = GpuChooser(noted, (0,))
    chooser.load([Draw.of(sequence, 2) for sequence in sequences])
    assert noted.positions == [0] * 5 and noted.rows["live"].tolist() == [1] * 5
    assert noted.rows["scale"][0] == 0.0 and noted.rows["scale"][1] > 0
    assert noted.rows["top_k"].tolist() == [0, 3, 0, 0, 0]
    assert noted.rows["logprobs"].tolist() == [-1, -1, 4, -1, -1]
    assert noted.rows["seed"][1] == sequences[1].seed
    assert set(noted.lists) == {2, 3}
    assert noted.lists[2].tolist() == [(7, 3.0)]
    assert noted.lists[3].tolist() == [(0, -math.inf), (3, 1.0), (9, -math.inf)]
    chooser.load([Draw.of(sequence, 4) for sequence in sequences])
    assert noted.positions == [2] * 5
    assert noted.lists[3].tolist() == [(3, 1.0)]
    chooser.load(())
    assert len(noted.rows) == 0 and noted.lists == {}


def test_log_probabilities_come_from_the_rows_own_logits(
    runners: tuple[CpuRunner, DeviceLikeRunner], base: Path
) -> None:
    seen = []
    for runner in runners:
        engine = make(runner, base)
        engine.submit(make_request([1, 2], request_id="plain", max_tokens=5))
        engine.submit(make_request([3, 4], request_id="asked", logprobs=2, max_tokens=5))
        events = []
        while engine.has_work:
            events += engine.step()
        seen.append([e.logprobs for e in events if e.request_id == "asked"])
    assert all(seen[0])
    for ours, theirs in zip(*seen, strict=True):
        assert [p.token_id for p in ours] == [p.token_id for p in theirs]
        assert [p.logprob for p in ours] == pytest.approx([p.logprob for p in theirs], abs=1e-5)


@given(st.lists(st.integers(1, 100), max_size=6), st.integers(0, 3))
def test_every_row_of_a_span_is_in_one_item_of_its_seat(counts: list[int], rest: int) -> None:
    ends = np.cumsum(counts).tolist()
    spans = tuple(
        Span(end - count, end, f"g{i}")
        for i, (count, end) in enumerate(zip(counts, ends, strict=True))
    )
    made = seats_of(spans, [i * 10 for i in range(len(spans))])
    assert made.row_seat.dtype == made.items.dtype == np.int32  # kernels read their bytes
    covered: list[int] = []
    for first, rows, seat in made.items.tolist():
        assert 1 <= rows <= LORA_ROWS
        assert (made.row_seat[first : first + rows] == seat).all()
        covered += range(first, first + rows)
    assert covered == list(range(sum(counts)))


def test_fields_do_not_overlap_and_are_aligned() -> None:
    shape = Shape(7, 5, 5, 11, 6)
    ends = 0
    for start, end in offsets(shape).values():
        assert start >= ends and start % 4 == 0
        ends = end
    tensors = StepBuffers(shape, 9, CPU).tensors(shape)
    assert tensors.q_start.shape == (6,) and tensors.attn_items.shape == (11, 8)
    assert tensors.block_table.shape == (5, 9)


def test_a_graph_is_captured_with_padding_alone(
    runners: tuple[CpuRunner, DeviceLikeRunner], base: Path
) -> None:
    runner = runners[1]
    engine = make(runner, base)
    engine.run_all([make_request([1, 2], max_tokens=3)])
    steps = runner._steps
    variant = Variant(8, True, True)
    steps.clear(variant)
    step = steps._buffers.tensors(steps._shape(8))
    for field in (step.token_source, step.slots, step.row_seat, step.sample_seat):
        assert (field == -1).all()
    for field in (step.token_ids, step.q_start, step.context, step.counts):
        assert (field == 0).all()


def test_buckets_hold_every_step_up_to_the_largest_graph() -> None:
    assert buckets(1) == [1]
    assert buckets(100) == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 100]
    assert buckets(8192)[-1] == 1024
    made = variants(512, 100)
    assert len(set(made)) == len(made)
    decode = {v.rows for v in made if not v.has_tiles}
    assert max(decode) == 128, "no sequence has more than one row, so there are at most 100"
    assert max(v.rows for v in made if v.has_tiles) == 512
    assert [v.rows for v in made] == sorted((v.rows for v in made), reverse=True)


def test_memory_is_one_budget() -> None:
    from loriner.engine.cuda_runner import RESERVE_BYTES, share_out
    from loriner.errors import ConfigError

    auto = share_out(EngineConfig(), 100 * GIB, 10 * GIB, GIB)
    left = 90 * GIB - 10 * GIB - GIB - RESERVE_BYTES
    assert auto.kv + auto.pool == left and auto.pool == int(0.3 * left)
    fixed = share_out(EngineConfig(pool_bytes=GIB), 100 * GIB, 10 * GIB, GIB)
    assert (fixed.pool, fixed.kv) == (GIB, left - GIB)
    both = share_out(EngineConfig(pool_bytes=GIB, kv_bytes=MIB), 100 * GIB, 10 * GIB, GIB)
    assert both == (MIB, GIB)
    with pytest.raises(ConfigError, match="gpu_memory_fraction"):
        share_out(EngineConfig(kv_bytes=90 * GIB), 100 * GIB, 10 * GIB, GIB)
    with pytest.raises(ConfigError, match="gpu_memory_fraction"):
        share_out(EngineConfig(), 24 * GIB, 23 * GIB, GIB)
