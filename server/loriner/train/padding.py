"""Passes padded to a few sizes, so that what was prepared for one serves others of its size.

Padding is documents of token 0 after each job's own: nothing in them is learnt, and no row of
another document sees them. Knows no tensors. Invariant: a padded pass has the losses and the
gradients of the pass it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loriner.train.masks import Document

STEP = 64  # tokens or learnt rows, at least
# The smallest sizes; beyond what is there, attention finds nothing to do and is soon done.
DOCUMENTS, LONGEST = 16, 512  # tokens of the longest document
# All jobs of a pass are padded to the largest, as long as that costs less than more sizes do: it
# makes the pass larger by this factor at most, or no larger than it takes to launch it.
EVENED, LAUNCHED = 1.3, 2048  # tokens


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a padded pass."""

    tokens: tuple[int, ...]  # of each job
    num_documents: int  # empty ones at the end included
    longest: int  # tokens of a document, at most
    num_learnt: int  # rows, those of weight zero at the end included


def padding(parts: Sequence[Sequence[Document]]) -> tuple[list[list[Document]], Sizes]:
    """What follows the documents of each job, and the sizes that the pass comes to."""
    documents = [document for part in parts for document in part]
    longest = power(max(len(d.token_ids) for d in documents), LONGEST)
    counts = [sum(len(d.token_ids) for d in part) for part in parts]
    tokens = _sizes(counts)
    fillings = [_filling(size - n, longest) for n, size in zip(counts, tokens, strict=True)]
    num_documents = power(len(documents) + sum(map(len, fillings)), DOCUMENTS)
    num_learnt = next_size(sum(d.num_learnt for d in documents), 4)
    return fillings, Sizes(tokens, num_documents, longest, num_learnt)


def next_size(count: int, num_between: int) -> int:
    """The least size that holds `count`; there are `num_between` from one power of two to the next,
    where they are not below STEP."""
    octave = 1 << max(0, (count - 1).bit_length() - 1)
    step = max(STEP, octave // num_between)
    return -(-count // step) * step


def power(count: int, least: int) -> int:
    """The least power of two times `least` that holds `count`."""
    return least << (-(-count // least) - 1).bit_length()


def _sizes(counts: Sequence[int]) -> tuple[int, ...]:
    own = tuple(next_size(count, 8) for count in counts)
    even = max(own) * len(own)
    return (max(own),) * len(own) if even <= max(LAUNCHED, EVENED * sum(counts)) else own


def _filling(left: int, longest: int) -> list[Document]:
    lengths = [longest] * (left // longest) + [left % longest] * bool(left % longest)
    return [Document((0,) * length, (False,) * length) for length in lengths]
