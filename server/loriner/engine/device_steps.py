"""Steps on a device that runs beside the host: upload, replay, read back one step later.

Knows streams, events and shapes; what a step computes it is given. Invariant: everything happens
on one stream in the order of the launches, so that a step finds the tokens of the one before it.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from loriner.core import MAX_LOGPROBS
from loriner.engine.graphs import Graphs, Variant, buckets, variants
from loriner.engine.read_back import Copies, Results
from loriner.engine.readings import Read, Reader
from loriner.engine.sampler import Sampled
from loriner.engine.step_buffers import Seats, Shape, StepBuffers, StepTensors, WorkLists, seats_of
from loriner.engine.step_input import Draw, Ints, Reading, Span, StepInput

_NONE = np.empty(0, np.int32)
NO_ITEMS = np.empty((0, 3), np.int32)
NOTHING = StepInput(
    token_ids=_NONE,
    token_source=_NONE,
    positions=_NONE,
    slots=_NONE,
    q_start=np.zeros(1, np.int32),
    context=_NONE,
    block_table=np.empty((0, 0), np.int32),
    spans=(),
    sample_rows=_NONE,
    sample_spans=(),
    draws=(),
)


class Limits(NamedTuple):
    """The largest step."""

    rows: int
    sequences: int
    context: int  # tokens
    block_size: int


class Computation(Protocol):
    """What a step computes."""

    def max_items(self, rows: int, sequences: int) -> tuple[int, int]:
        """Most attention items and tile items of a step."""

    def work_lists(self, step: StepInput) -> WorkLists: ...

    def reader(self, readings: Seq[Reading]) -> Reader:
        """Before the step's other kernels."""

    def forward(
        self,
        step: StepTensors,
        token_ids: Tensor,
        variant: Variant,
        reader: Reader | None = None,
    ) -> Tensor:
        """Logits [B, V] f32. Launches kernels only: it is captured, but where there is a reader."""


class Chooser(Protocol):
    """Samples on the device. `results` stays at its address: for B rows (the most there can be) B
    ids, B log-probabilities, [B, 20] most likely ids, [B, 20] their log-probabilities; floats as
    bits; an id is -1 where the logits are not finite."""

    results: Tensor  # i32

    def load(self, draws: Seq[Draw]) -> None:
        """What the next call chooses by; padding beyond. Never waits."""

    def __call__(self, logits: Tensor) -> None:
        """logits [rows, V] -> `results`. Launches kernels only: it is captured."""

    def bar(self, logits: Tensor, rows: Seq[int], words: Seq[Ints]) -> None:
        """Make -inf of what these rows may not choose: `words` has a bit for each token that they
        may. Never waits."""


class DeviceSteps:
    """Launches steps of one computation on the current stream of `device`."""

    def __init__(
        self,
        computation: Computation,
        chooser: Chooser,
        limits: Limits,
        device: torch.device,
        seat_of: Callable[[str], int],
        eos_ids: tuple[int, ...],
    ) -> None:
        self._computation, self._chooser = computation, chooser
        self._limits, self._device = limits, device
        self._seat_of, self._eos_ids = seat_of, eos_ids
        width = -(-limits.context // limits.block_size)
        self._buckets = buckets(limits.rows)
        largest = self._shape(max(limits.rows, self._buckets[-1]))
        self._buffers = StepBuffers(largest, width, device)
        self._tensors: dict[Shape, StepTensors] = {}
        is_cuda = device.type == "cuda"
        self._num_samples = largest.samples
        size = largest.samples * (2 + 2 * MAX_LOGPROBS)
        self._read_back = [
            torch.zeros(size, dtype=torch.int32, pin_memory=is_cuda) for _ in range(2)
        ]
        self._turn = 0
        self._last = Variant(self._buckets[0], has_lora=False, has_tiles=False)
        self._graphs = Graphs(self._run, self.clear, device) if is_cuda else None

    def capture(self) -> None:
        """Capture all graphs. Until then, and beyond the largest, steps run eagerly."""
        if self._graphs is not None:
            self._graphs.capture(variants(self._limits.rows, self._limits.sequences))

    def launch(self, step: StepInput) -> PendingStep:
        """Never waits for the device."""
        seats = self._seats(step.spans)
        sampled = seats if step.sample_spans is step.spans else self._seats(step.sample_spans)
        variant = Variant(
            self._bucket(step.num_rows), bool(step.spans), step.num_rows > step.num_sequences
        )
        lists = self._computation.work_lists(step)
        self._last = variant
        with torch.inference_mode():
            self._buffers.upload(step, self._shape(variant.rows), lists, seats, sampled)
            self._chooser.load(step.draws)
            reader = self._computation.reader(step.readings) if step.readings else None
            logits = self._compute(variant, reader)
        copy = partial(self._begin_reading, step.draws, logits, reader)
        guided = [i for i, d in enumerate(step.draws) if d.guide is not None and not d.needs_host]
        if not guided:
            copies = copy()
            return PendingStep(copies.event, copies)
        return PendingStep(self._event(), partial(self._choose, step.draws, guided, logits, copy))

    def _choose(
        self,
        draws: tuple[Draw, ...],
        guided: Seq[int],
        logits: Tensor,
        copy: Callable[[], Copies],
    ) -> Copies:
        """Once more, with `guided` rows under their masks; others get what they had."""
        masks = [(row, guide.words()) for row in guided if (guide := draws[row].guide) is not None]
        known = [(row, words) for row, words in masks if words is not None]
        with torch.inference_mode():
            if known:
                rows, words = zip(*known, strict=True)
                self._chooser.bar(logits, rows, words)
                self._chooser(logits)
        return copy()

    def run_again(self) -> None:
        """Compute the last step once more; nothing is uploaded or read back."""
        with torch.inference_mode():
            self._compute(self._last)

    def _compute(self, variant: Variant, reader: Reader | None = None) -> Tensor:
        """A step whose prompts are read runs eagerly: graphs read none."""
        if self._graphs is not None and variant in self._graphs and reader is None:
            return self._graphs.replay(variant)
        return self._run(variant, reader)

    def clear(self, variant: Variant) -> None:
        """Upload a step of no rows."""
        lists = WorkLists(NO_ITEMS, NO_ITEMS)
        nobody = seats_of((), [])
        with torch.inference_mode():
            self._buffers.upload(NOTHING, self._shape(variant.rows), lists, nobody, nobody)
            self._chooser.load(())

    def _seats(self, spans: tuple[Span, ...]) -> Seats:
        return seats_of(spans, [self._seat_of(span.generation) for span in spans])

    def _bucket(self, num_rows: int) -> int:
        """Rows of the smallest graph that holds the step; beyond the largest, the step's own."""
        return next((rows for rows in self._buckets if rows >= num_rows), num_rows)

    def _shape(self, rows: int) -> Shape:
        sequences = min(rows, self._limits.sequences)
        attn_items, tile_items = self._computation.max_items(rows, sequences)
        return Shape(rows, sequences, sequences, attn_items, tile_items)

    def _run(self, variant: Variant, reader: Reader | None = None) -> Tensor:
        shape = self._shape(variant.rows)
        step = self._tensors.get(shape)
        if step is None:
            step = self._buffers.tensors(shape)
            if self._bucket(shape.rows) in self._buckets:
                self._tensors[shape] = step
        with torch.inference_mode():
            logits = self._computation.forward(step, self._feed(step), variant, reader)
            self._chooser(logits)
        return logits

    def _feed(self, step: StepTensors) -> Tensor:
        """Token ids, those that the host does not know from the step before. A broken row's -1
        becomes a token that exists: its sequence ends anyway."""
        source = step.token_source
        before = self._chooser.results.index_select(0, source.clamp(min=0))
        return torch.where(source >= 0, before, step.token_ids).clamp_(min=0)

    def _begin_reading(
        self, draws: tuple[Draw, ...], logits: Tensor, reader: Reader | None
    ) -> Copies:
        """Start all copies to the host."""
        self._turn ^= 1
        with_logprobs = [row for row, draw in enumerate(draws) if draw.params.logprobs is not None]
        results = self._read_back[self._turn]
        used = len(results) if with_logprobs else len(draws)  # ids stand first
        by_host = [row for row, draw in enumerate(draws) if draw.needs_host]
        kept = torch.empty((len(by_host), logits.shape[1]), pin_memory=self._device.type == "cuda")
        with torch.inference_mode():
            results[:used].copy_(self._chooser.results[:used], non_blocking=True)
            for place, row in enumerate(by_host):
                kept[place].copy_(logits[row], non_blocking=True)
            prompts = None if reader is None else reader.copied()
        return Copies(
            event=self._event(),
            draws=draws,
            results=Results(results, self._num_samples),
            with_logprobs=with_logprobs,
            by_host=by_host,
            logits=kept,
            prompts=prompts,
            eos_ids=self._eos_ids,
        )

    def _event(self) -> Any:
        """Comes when all that was launched is over; None where nothing runs beside the host."""
        if self._device.type != "cuda":
            return None
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event


class PendingStep:
    """A launched step. One with guided rows is read only when they have been chosen."""

    def __init__(self, event: Any, copies: Copies | Callable[[], Copies]) -> None:
        """`event` has come when the forward pass is over."""
        self.event = event
        self._copies = copies

    def choose(self) -> None:
        if not isinstance(self._copies, Copies):
            self._copies = self._copies()

    def result(self) -> list[Sampled]:
        """Before the second launch from here: then the buffers are another step's."""
        return self._known().result()

    def read(self) -> list[Read]:
        prompts = self._known().prompts
        return [] if prompts is None else prompts.told()

    def _known(self) -> Copies:
        assert isinstance(self._copies, Copies), "guided rows are not chosen yet"
        return self._copies
