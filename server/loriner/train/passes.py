"""One pass of all jobs: their documents in one flat batch, each job's rows one segment.

Invariant: a row's loss weight is 1 / (learnt tokens of its job's optimiser step), so a job's
gradient is the mean over its step however it is cut into passes or whom it shares them with.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loriner.train.attention import Plan
from loriner.train.base import Base
from loriner.train.lora import Lora, Segment
from loriner.train.loss import head_loss
from loriner.train.masks import Document


@dataclass(frozen=True, slots=True)
class Flat:
    """Documents one after the other, as a forward takes them."""

    ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, from 0 in each document
    plan: Plan
    rows: Tensor  # [S] int64: the rows of `ids` to predict, each from the row before it

    @classmethod
    def of(cls, documents: Sequence[Document], device: torch.device) -> Flat:
        lengths = [len(d.token_ids) for d in documents]
        ids = torch.tensor([i for d in documents for i in d.token_ids])
        positions = torch.cat([torch.arange(length) for length in lengths])
        rows = torch.tensor([flag for d in documents for flag in d.is_learnt]).nonzero().squeeze(1)
        plan = Plan.of(lengths, device)
        moved = [x.to(device, non_blocking=True) for x in (ids, positions, rows)]
        return cls(moved[0], moved[1], plan, moved[2])


@dataclass(frozen=True, slots=True)
class Share:
    """What one job brings to a pass. `seed`: of its noise, None for none."""

    documents: Sequence[Document]
    lora: Lora | None  # None: the base alone
    weight: float = 1.0  # of the loss of each learnt token
    seed: str | None = None
    neftune: float = 0.0

    @property
    def num_tokens(self) -> int:
        return sum(len(document.token_ids) for document in self.documents)

    @property
    def num_learnt(self) -> int:
        return sum(document.num_learnt for document in self.documents)


def run_pass(base: Base, shares: Sequence[Share]) -> tuple[Tensor, list[Tensor]]:
    """(the sum of weighted losses, to call backward on; each share's losses, one a learnt token).

    One forward of the base for all shares.
    """
    flat = Flat.of([document for share in shares for document in share.documents], base.device)
    counts = [share.num_learnt for share in shares]
    weights = torch.tensor([s.weight for s in shares]).repeat_interleave(torch.tensor(counts))
    weights = weights.to(base.device, non_blocking=True)  # [S]
    embedded = _with_noise(base.embed(flat.ids), shares)
    hidden = base.hidden(embedded, flat.positions, flat.plan, _segments(shares, base.dtype))
    states, targets = hidden.index_select(0, flat.rows - 1), flat.ids[flat.rows]
    total, losses = head_loss(states, base.head, targets, weights)
    return total, list(torch.split(losses, counts))


@torch.no_grad()
def mean_loss(
    base: Base, lora: Lora | None, documents: Sequence[Document], max_tokens: int
) -> float:
    """Mean loss over the learnt tokens, in passes of about `max_tokens`."""
    total, count = 0.0, 0
    for start, end in _chunks([len(d.token_ids) for d in documents], max_tokens):
        _, (losses,) = run_pass(base, [Share(documents[start:end], lora)])
        total += losses.double().sum().item()
        count += len(losses)
    return total / count


def _chunks(lengths: Sequence[int], max_tokens: int) -> list[tuple[int, int]]:
    chunks, start, size = [], 0, 0
    for i, length in enumerate(lengths):
        if i > start and size + length > max_tokens:
            chunks.append((start, i))
            start, size = i, 0
        size += length
    return [*chunks, (start, len(lengths))]


def _segments(shares: Sequence[Share], dtype: torch.dtype) -> list[Segment]:
    segments, start = [], 0
    for share in shares:
        end = start + share.num_tokens
        if share.lora is not None:
            segments.append(Segment(start, end, share.lora, share.lora.cast(dtype), share.seed))
        start = end
    return segments


def _with_noise(embedded: Tensor, shares: Sequence[Share]) -> Tensor:
    """NEFTune: uniform noise of alpha / sqrt(L H) on each document of L tokens (equation 1)."""
    if not any(share.neftune and share.seed for share in shares):
        return embedded
    noisy, start = embedded.clone(), 0
    for share in shares:
        if share.neftune and share.seed:
            noise = _uniform(share.num_tokens, embedded, f"{share.seed} neftune")
            lengths = torch.tensor([len(d.token_ids) for d in share.documents])
            size = share.neftune / (lengths * embedded.shape[1]).sqrt()
            scale = size.repeat_interleave(lengths).to(embedded.device)
            noisy[start : start + share.num_tokens] += (noise * scale.unsqueeze(1)).to(noisy.dtype)
        start += share.num_tokens
    return noisy


def _uniform(num_rows: int, like: Tensor, seed: str) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(zlib.crc32(seed.encode()))
    noise = torch.empty(num_rows, like.shape[1], device=like.device)
    return noise.uniform_(-1.0, 1.0, generator=generator)
