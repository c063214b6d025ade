"""Attention within documents that lie one after the other in a flat batch: block-diagonal, causal.

Two plans of one batch: `Starts` is a launch of variable lengths, for GPUs in half precision, and
says all of the batch in tensors; `Groups` is for the rest. Invariant: a row sees the rows of its
own document up to itself, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

NAME = "loriner_documents"
# Rows of a group, as a multiple of those that are no padding: a launch costs more on a GPU.
FILLED = {"cpu": 1.25, "cuda": 2.0}


@dataclass(frozen=True, slots=True)
class Starts:
    """Documents by their first rows. What differs between batches of one size is all in `starts`,
    so a CUDA graph of one serves the others."""

    starts: Tensor  # [documents + 1] int32: first rows, and the end; empty documents at the end
    longest: int  # rows of a document, at most

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        device: torch.device,
        num_documents: int = 0,
        longest: int = 0,
    ) -> Starts:
        """The plan of documents with these lengths, which fill the batch in this order; with empty
        ones up to `num_documents`, and for a longest of `longest` or more."""
        empty = max(0, num_documents - len(lengths))
        starts = torch.tensor([0, *lengths, *[0] * empty]).cumsum(0).to(torch.int32)
        return cls(starts.to(device, non_blocking=True), max(longest, *lengths))

    def attend(self, scaling: float | None, dropout: float, *states: Tensor) -> Tensor:
        """[heads, T, D] of each -> [T, heads, D]."""
        q, k, v = (x.transpose(0, 1) for x in states)
        if not q.is_cuda:
            return self._attend_each(scaling, dropout, *states)
        flash: Any = torch.ops.aten._flash_attention_forward
        lengths = (self.starts, self.starts, self.longest, self.longest)
        y: Tensor = flash(q, k, v, *lengths, dropout, True, False, scale=scaling)[0]
        return y

    def _attend_each(self, scaling: float | None, dropout: float, *states: Tensor) -> Tensor:
        """What `attend` means, one document after the other."""
        sizes = self.starts.diff().tolist()
        documents = zip(*(torch.split(x, sizes, 1) for x in states), strict=True)
        return torch.cat(
            [
                _attend_group(scaling, dropout, *(x.unsqueeze(1) for x in document))
                for document, size in zip(documents, sizes, strict=True)
                if size
            ]
        )


@dataclass(frozen=True, slots=True)
class Groups:
    """Documents of about one length are padded to the longest and attended to together; padding
    comes after the real rows, which causal attention never looks at, so no mask is needed."""

    shapes: tuple[tuple[int, int], ...]  # of each group: documents, rows of each
    rows: Tensor  # [P] int64: rows of the batch in the order of the groups, padding included
    places: Tensor  # [T] int64: where each row of the batch is among `rows`
    length: int = 0  # of all documents, where it is the same: nothing needs to be moved then

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Groups:
        """The plan of documents with these lengths, which fill the batch in this order."""
        starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
        places = torch.empty(starts[-1], dtype=torch.int64)
        shapes, parts, offset = [], list[Tensor](), 0
        for members in _grouped(lengths, FILLED[device.type]):
            longest = lengths[members[0]]
            for member in members:
                start, end = starts[member], starts[member + 1]
                place = torch.arange(longest)
                parts.append((start + place).clamp_(max=end - 1))
                places[start:end] = offset + place[: end - start]
                offset += longest
            shapes.append((len(members), longest))
        rows = torch.cat(parts).to(device, non_blocking=True)
        length = lengths[0] if len(set(lengths)) == 1 else 0
        return cls(tuple(shapes), rows, places.to(device, non_blocking=True), length)

    def attend(self, scaling: float | None, dropout: float, *states: Tensor) -> Tensor:
        """[heads, T, D] of each -> [T, heads, D]."""
        if self.length:
            split = (-1, self.length)
            parts = (x.view(x.shape[0], *split, x.shape[2]) for x in states)
            return _attend_group(scaling, dropout, *parts)
        spread: Any = _Spread.apply
        heads = [x.shape[0] for x in states]
        sizes = [count * longest for count, longest in self.shapes]
        outputs = []
        for shape, group in zip(
            self.shapes, spread(torch.cat(states), self).split(sizes, 1), strict=True
        ):
            parts = (x.unflatten(1, shape) for x in group.split(heads))
            outputs.append(_attend_group(scaling, dropout, *parts))
        return torch.cat(outputs).index_select(0, self.places)


Plan = Starts | Groups


def _grouped(lengths: Sequence[int], filled: float) -> list[list[int]]:
    """Indices of documents, longest first, in groups that padding makes `filled` times as large at
    most."""
    groups: list[list[int]] = []
    real = 0  # rows of the last group
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        real += lengths[i]
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= filled * real:
            groups[-1].append(i)
        else:
            groups.append([i])
            real = lengths[i]
    return groups


class _Spread(torch.autograd.Function):
    """x [heads, T, D] -> [heads, P, D], the plan's rows. The gradient of padding is left out: it is
    zero, as nothing looks at it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: Groups) -> Tensor:
        ctx.places = plan.places
        return x.index_select(1, plan.rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0].index_select(1, ctx.places), None


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    plan: Plan,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, heads, T, D], key and value [1, kv heads, T, D]
    -> [1, T, heads, D]."""
    states = (x.squeeze(0) for x in (query, key, value))
    return plan.attend(scaling, dropout, *states).unsqueeze(0), None


def _attend_group(scaling: float | None, dropout: float, *states: Tensor) -> Tensor:
    """[heads, documents, longest, D] of each -> [documents * longest, heads, D]."""
    q, k, v = (x.transpose(0, 1) for x in states)
    y = scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=True
    )  # [documents, heads, longest, D]
    return y.transpose(1, 2).reshape(-1, y.shape[1], y.shape[3])


def register() -> None:
    """Make it known to transformers under NAME; doing it again changes nothing."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
