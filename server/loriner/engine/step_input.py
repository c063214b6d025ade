"""All that one step is made of, in plain numbers: what a runner is given.

Made by `batch.py`, read by every runner; knows neither torch nor sequences. Invariant: frozen, and
shares no memory with the engine's state, so a runner may read it later.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loriner.core import Guide, SamplingParams, Sequence

Ints = NDArray[np.int32]


class Span(NamedTuple):
    """Rows [start, end) of one generation."""

    start: int
    end: int
    generation: str


class Reading(NamedTuple):
    """What is wanted of the rows [start, end) of a prompt: the sum of their last hidden states, or
    what they say of the tokens that follow them."""

    start: int
    end: int
    generation: str | None
    targets: Ints | None = None  # [end - start]: the tokens that follow; None: the sum
    num_top: int = 0  # likeliest tokens beside each target


class Draw(NamedTuple):
    """What the choice of one token depends on besides its logits."""

    params: SamplingParams
    seed: int
    place: int  # of the token in the output, from 0
    num_prompt: int
    token_ids: Seq[int]  # prompt and output so far when `params.looks_back`, else empty
    needs_host: bool  # a device leaves the choice to the host
    memo: dict[str, object]  # kept as long as the sequence: what a runner makes of it once
    guide: Guide | None = None  # waits for the step's masks when it is asked

    @classmethod
    def of(cls, sequence: Sequence, num_tokens: int) -> Draw:
        """For the token that follows the first `num_tokens` of `sequence`."""
        num_prompt = sequence.num_prompt
        tokens = sequence.token_ids[:num_tokens] if sequence.looks_back else ()
        return cls(
            sequence.request.sampling,
            sequence.seed,
            num_tokens - num_prompt,
            num_prompt,
            tokens,
            sequence.needs_host,
            sequence.memo,
            sequence.guide,
        )


@dataclass(frozen=True, slots=True)
class StepInput:
    """T rows of S sequences, of which B tokens are wanted. Rows of one sequence are neighbours, in
    order of position; rows of one generation are one span, base-only rows come last."""

    token_ids: Ints  # [T]; 0 where `token_source` tells
    token_source: Ints  # [T]: -1, or which of the previous step's B tokens it is
    positions: Ints  # [T]
    slots: Ints  # [T]: block * block_size + offset in the KV cache
    q_start: Ints  # [S + 1]: rows of sequence s are [q_start[s], q_start[s + 1])
    context: Ints  # [S]: keys that the last row of s sees, its own included
    block_table: Ints  # [S, blocks of the longest context]; beyond a context it is unread
    spans: tuple[Span, ...]
    sample_rows: Ints  # [B]: rows whose next token is wanted
    sample_spans: tuple[Span, ...]  # `spans` over those rows
    draws: tuple[Draw, ...]  # [B]
    readings: tuple[Reading, ...] = ()

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)

    @property
    def num_sequences(self) -> int:
        return len(self.context)
