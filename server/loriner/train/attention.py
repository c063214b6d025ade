"""Attention within documents that lie one after the other in a flat batch: block-diagonal, causal.

Documents of about one length are padded to it and attended to together; padding comes after the
real rows, which causal attention never looks at, so no mask is needed. Invariant: a row sees the
rows of its own document up to itself, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

NAME = "loriner_documents"
SPREAD = 0.7  # shortest document of a group, as a share of its longest


@dataclass(frozen=True, slots=True)
class Plan:
    """Which rows are attended to together."""

    groups: tuple[Tensor, ...]  # each [documents, longest] int64: rows of the batch
    places: Tensor  # [T] int64: where each row is among the groups' rows
    length: int = 0  # of all documents, where it is the same: nothing needs to be moved then

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Plan:
        """The plan of documents with these lengths, which fill the batch in this order."""
        starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
        places = torch.empty(starts[-1], dtype=torch.int64)
        groups, offset = [], 0
        for members in _grouped(lengths):
            longest = lengths[members[0]]
            rows = torch.zeros(len(members), longest, dtype=torch.int64)
            for i, member in enumerate(members):
                start, length = starts[member], lengths[member]
                rows[i, :length] = torch.arange(start, start + length)
                first = offset + i * longest
                places[start : start + length] = torch.arange(first, first + length)
            offset += rows.numel()
            groups.append(rows.to(device))
        length = lengths[0] if len(set(lengths)) == 1 else 0
        return cls(tuple(groups), places.to(device), length)


def _grouped(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of documents, longest first, in groups of about one length."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if groups and lengths[i] >= SPREAD * lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


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
    states = (query[0], key[0], value[0])
    if plan.length:
        split = (-1, plan.length)
        parts = (x.view(x.shape[0], *split, x.shape[2]) for x in states)
        return _attend_group(scaling, dropout, *parts).unsqueeze(0), None
    outputs = []
    for rows in plan.groups:
        taken = (x.index_select(1, rows.flatten()) for x in states)
        parts = (x.view(x.shape[0], *rows.shape, -1) for x in taken)
        outputs.append(_attend_group(scaling, dropout, *parts))
    return torch.cat(outputs).index_select(0, plan.places).unsqueeze(0), None


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
