"""One pass of all jobs: their documents in one flat batch, each job's rows one segment.

Invariant: a row's loss weight is 1 / (learnt tokens of its job's optimiser step), so a job's
gradient is the mean over its step however it is cut into passes or whom it shares them with.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.nn.functional import pad

from loriner.train.attention import Plan, Starts
from loriner.train.base import Base
from loriner.train.dropout import seed_of
from loriner.train.lora import Lora, Pair, Segment
from loriner.train.loss import head_loss
from loriner.train.masks import Document
from loriner.train.padding import Sizes


@dataclass(frozen=True, slots=True)
class Flat:
    """Documents one after the other, as a forward takes them."""

    ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, from 0 in each document
    rows: Tensor  # [S] int64: the rows of `ids` to predict, each from the row before it

    @classmethod
    def of(cls, documents: Sequence[Document], device: torch.device, num_rows: int = 0) -> Flat:
        """The last row to predict is repeated up to `num_rows`."""
        ids = torch.tensor([i for d in documents for i in d.token_ids])
        positions = torch.cat([torch.arange(length) for length in lengths_of(documents)])
        rows = torch.tensor([flag for d in documents for flag in d.is_learnt]).nonzero().squeeze(1)
        if num_rows > len(rows):
            rows = torch.cat((rows, rows[-1:].expand(num_rows - len(rows))))
        return cls(*(x.to(device, non_blocking=True) for x in (ids, positions, rows)))


def lengths_of(documents: Sequence[Document]) -> list[int]:
    return [len(document.token_ids) for document in documents]


@dataclass(frozen=True, slots=True)
class Share:
    """What one job brings to a pass. `seed`: of its noise, None for none. `padding`: documents that
    follow its own (`train.padding`), which learn nothing and get no noise."""

    documents: Sequence[Document]
    lora: Lora | None  # None: the base alone
    weight: float = 1.0  # of the loss of each learnt token
    seed: str | None = None
    neftune: float = 0.0
    padding: Sequence[Document] = ()

    @property
    def num_tokens(self) -> int:
        """Padding included."""
        return sum(lengths_of((*self.documents, *self.padding)))

    @property
    def num_learnt(self) -> int:
        return sum(document.num_learnt for document in self.documents)


@dataclass(frozen=True, slots=True)
class Batch:
    """All that the device must know of the documents of a pass."""

    embedded: Tensor  # [T, H], noise included
    positions: Tensor  # [T] int64
    plan: Plan
    rows: Tensor  # [S] int64: whose states predict
    targets: Tensor  # [S] int64
    weights: Tensor  # [S] f32, of each row's loss
    seeds: Tensor  # [shares] int32, of dropout

    @classmethod
    def of(cls, base: Base, shares: Sequence[Share], sizes: Sizes | None = None) -> Batch:
        """With `sizes`, of shares that are padded to them."""
        documents = [d for share in shares for d in (*share.documents, *share.padding)]
        lengths = lengths_of(documents)
        plan: Plan = (
            Starts.of(lengths, base.device, sizes.num_documents, sizes.longest)
            if sizes
            else base.plan(lengths)
        )
        flat = Flat.of(documents, base.device, sizes.num_learnt if sizes else 0)
        counts = torch.tensor([share.num_learnt for share in shares])
        weights = torch.tensor([s.weight for s in shares]).repeat_interleave(counts)
        weights = pad(weights, (0, len(flat.rows) - len(weights)))
        embedded = _with_noise(base.embed(flat.ids), shares)
        weights = weights.to(base.device, non_blocking=True)
        targets = flat.ids.index_select(0, flat.rows)
        numbers = torch.tensor([seed_of(share.seed or "") for share in shares], dtype=torch.int32)
        seeds = numbers.to(base.device, non_blocking=True)
        return cls(embedded, flat.positions, plan, flat.rows - 1, targets, weights, seeds)

    def copy(self, other: Batch) -> None:
        """Take what `other`, a padded batch of the same sizes, holds."""
        assert isinstance(self.plan, Starts) and isinstance(other.plan, Starts)
        assert self.plan.longest == other.plan.longest
        self.plan.starts.copy_(other.plan.starts)
        for name in ("embedded", "positions", "rows", "targets", "weights", "seeds"):
            getattr(self, name).copy_(getattr(other, name))


def learn(base: Base, shares: Sequence[Share]) -> list[Tensor]:
    """Each share's losses, one a learnt token. The gradients of their weighted sum are added onto
    those of the adapters. One forward and backward of the base for all shares."""
    return by_share(learn_batch(base, Batch.of(base, shares), shares), shares)


def learn_batch(base: Base, batch: Batch, shares: Sequence[Share]) -> Tensor:
    """`learn` on a batch that was made of `shares`: losses [S]. Waits for the device nowhere, reads
    the batch and the adapters where they are, and adds to gradients where they are."""
    segments = _segments(shares, batch.seeds, lambda lora: lora.leaves(base.dtype))
    with torch.enable_grad():
        total, losses = _losses(base, batch, segments)
    leaves = [leaf for s in segments for pair in s.weights.values() for leaf in pair]
    if leaves:
        gradients = iter(torch.autograd.grad(total, leaves, allow_unused=True))
        for segment in segments:
            segment.lora.add(list(islice(gradients, 2 * len(segment.weights))))
    base.routing.segments = ()
    return losses


def by_share(losses: Tensor, shares: Sequence[Share]) -> list[Tensor]:
    """Losses [S] of a batch -> those of each share."""
    counts = [share.num_learnt for share in shares]
    return list(torch.split(losses[: sum(counts)], counts))


@torch.no_grad()
def run_pass(base: Base, shares: Sequence[Share]) -> tuple[Tensor, list[Tensor]]:
    """(the sum of weighted losses; each share's losses, one a learnt token), nothing learnt."""
    batch = Batch.of(base, shares)
    segments = _segments(shares, batch.seeds, lambda lora: lora.cast(base.dtype))
    total, losses = _losses(base, batch, segments)
    return total, by_share(losses, shares)


def _losses(base: Base, batch: Batch, segments: Sequence[Segment]) -> tuple[Tensor, Tensor]:
    hidden = base.hidden(batch.embedded, batch.positions, batch.plan, segments)
    states = hidden.index_select(0, batch.rows)
    return head_loss(states, base.head, batch.targets, batch.weights)


def mean_loss(
    base: Base, lora: Lora | None, documents: Sequence[Document], max_tokens: int
) -> float:
    """Mean loss over the learnt tokens, in passes of about `max_tokens`, each one turn."""
    total, count = 0.0, 0
    for start, end in chunks([len(d.token_ids) for d in documents], max_tokens):
        with base.pace.turn():
            _, (losses,) = run_pass(base, [Share(documents[start:end], lora)])
            total += losses.double().sum().item()
        count += len(losses)
    return total / count


def chunks(lengths: Sequence[int], max_tokens: int) -> list[tuple[int, int]]:
    """(start, end) of runs of about `max_tokens`."""
    made, start, size = [], 0, 0
    for i, length in enumerate(lengths):
        if i > start and size + length > max_tokens:
            made.append((start, i))
            start, size = i, 0
        size += length
    return [*made, (start, len(lengths))]


def _segments(
    shares: Sequence[Share], seeds: Tensor, weights: Callable[[Lora], Mapping[str, Pair]]
) -> list[Segment]:
    segments, start = [], 0
    for share, seed in zip(shares, seeds, strict=True):
        end = start + share.num_tokens
        if share.lora is not None:
            own = None if share.seed is None else seed
            segments.append(Segment(start, end, share.lora, weights(share.lora), own))
        start = end
    return segments


def _with_noise(embedded: Tensor, shares: Sequence[Share]) -> Tensor:
    """NEFTune: uniform noise of alpha / sqrt(L H) on each document of L tokens (equation 1)."""
    if not any(share.neftune and share.seed for share in shares):
        return embedded
    noisy, start = embedded.clone(), 0
    for share in shares:
        if share.neftune and share.seed:
            lengths = torch.tensor(lengths_of(share.documents))
            end = start + int(lengths.sum())
            noise = _uniform(end - start, embedded, f"{share.seed} neftune")
            size = share.neftune / (lengths * embedded.shape[1]).sqrt()
            scale = size.repeat_interleave(lengths).to(embedded.device)
            noisy[start:end] += (noise * scale.unsqueeze(1)).to(noisy.dtype)
        start += share.num_tokens
    return noisy


def _uniform(num_rows: int, like: Tensor, seed: str) -> Tensor:
    generator = torch.Generator(like.device).manual_seed(zlib.crc32(seed.encode()))
    noise = torch.empty(num_rows, like.shape[1], device=like.device)
    return noise.uniform_(-1.0, 1.0, generator=generator)
