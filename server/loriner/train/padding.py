"""Passes padded to a few sizes, so that what was prepared for one serves others of its size.

Padding is documents of token 0 at the end of each job's own: nothing in them is learnt, and no row
of another document sees them. Knows no tensors. Invariant: a padded pass has the losses and the
gradients of the pass it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loriner.train.masks import Document

STEP = 64  # tokens or learnt rows, at least
LONGEST = 128  # tokens: the smallest size of the longest document


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a padded pass."""

    tokens: tuple[int, ...]  # of each job
    num_documents: int  # empty ones at the end included
    longest: int  # tokens of a document, at most
    num_learnt: int  # rows, those of weight zero at the end included


def padded(parts: Sequence[Sequence[Document]]) -> tuple[list[list[Document]], Sizes]:
    """The documents of each job with its padding, and the sizes that they come to."""
    longest = _power(max(len(d.token_ids) for part in parts for d in part), LONGEST)
    filled = [[*part, *_filling(part, longest)] for part in parts]
    tokens = tuple(sum(len(d.token_ids) for d in part) for part in filled)
    num_learnt = sum(d.num_learnt for part in parts for d in part)
    num_documents = _power(sum(map(len, filled)), 1)
    return filled, Sizes(tokens, num_documents, longest, eighth(num_learnt))


def eighth(count: int) -> int:
    """The next of the sizes, of which there are eight between a power of two and the next."""
    step = max(STEP, 1 << max(0, (count - 1).bit_length() - 4))
    return -(-count // step) * step


def _power(count: int, least: int) -> int:
    """The least power of two times `least` that holds `count`."""
    return least << (-(-count // least) - 1).bit_length()


def _filling(part: Sequence[Document], longest: int) -> list[Document]:
    count = sum(len(d.token_ids) for d in part)
    left = eighth(count) - count
    lengths = [longest] * (left // longest) + [left % longest] * bool(left % longest)
    return [Document((0,) * length, (False,) * length) for length in lengths]
