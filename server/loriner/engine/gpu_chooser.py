"""What sequences ask of their next tokens, as the GPU's sampler reads it.

A sequence's parameters are made into a record once and kept in its memo. Knows no logits. Penalties
are the host's: a row that needs them is chosen here without, and the host chooses again.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from loriner.engine.step_input import Draw, Ints
from loriner.kernels.cuda.sampling import ROW, Records, adjustments, describe

MEMO = "gpu sampler"


class GpuSampler(Protocol):
    """kernels/cuda/sampling.py: Sampler."""

    results: Tensor

    def load(
        self, rows: Records, positions: Seq[int], lists: Mapping[int, Records] = ...
    ) -> None: ...

    def __call__(self, logits: Tensor) -> None: ...

    def bar(self, logits: Tensor, rows: Seq[int], words: Seq[Ints]) -> None: ...


class Record(NamedTuple):
    """One sequence's parameters."""

    row: bytes  # of one ROW: 128 of them are joined far faster than arrays
    early: Records | None  # added to its logits while its output is shorter than `min_tokens`
    later: Records | None  # and from then on
    min_tokens: int


class GpuChooser:
    """`Chooser` over the GPU's sampler."""

    def __init__(self, sampler: GpuSampler, eos_ids: tuple[int, ...]) -> None:
        self._sampler, self._eos_ids = sampler, eos_ids
        self.results = sampler.results

    def load(self, draws: Seq[Draw]) -> None:
        rows: list[bytes] = []
        lists: dict[int, Records] = {}
        for i, draw in enumerate(draws):
            made = draw.memo.get(MEMO)
            if made is None:
                made = draw.memo[MEMO] = self._record(draw)
            assert isinstance(made, Record)
            rows.append(made.row)
            entries = made.early if draw.place < made.min_tokens else made.later
            if entries is not None:
                lists[i] = entries
        records = np.frombuffer(b"".join(rows), dtype=ROW)
        self._sampler.load(records, [draw.place for draw in draws], lists)

    def __call__(self, logits: Tensor) -> None:
        self._sampler(logits)

    def bar(self, logits: Tensor, rows: Seq[int], words: Seq[Ints]) -> None:
        self._sampler.bar(logits, rows, words)

    def _record(self, draw: Draw) -> Record:
        params = draw.params
        row = describe(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            seed=draw.seed,
            logprobs=params.logprobs,
        )
        barred = {*self._eos_ids, *params.stop_token_ids} if params.min_tokens else set()
        early = adjustments(params.logit_bias, sorted(barred))
        later = adjustments(params.logit_bias)
        return Record(
            row.tobytes(),
            early if len(early) else None,
            later if len(later) else None,
            params.min_tokens,
        )
