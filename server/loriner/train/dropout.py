"""Dropout as a function of a seed on the device, a module and a place, and of nothing else.

So a backward finds again what a forward dropped, neighbours make no difference, and a CUDA graph
drops anew with each seed that is copied into it. Bits are mixed as in C. Wellons' `lowbias32`
(nullprogram.com/blog/2018/07/31).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

STEP = 0x9E3779B1  # from one row or column to the next: 2^32 / golden ratio
FIRST, SECOND = 0x7FEB352D, 0x846CA68B


def seed_of(text: str) -> int:
    """32 bits, signed."""
    return _signed(zlib.crc32(text.encode()))


@dataclass(frozen=True, slots=True)
class Dropout:
    """Drops `share` of the elements."""

    share: float
    seed: Tensor  # [] int32
    salt: int  # the module's, 32 bits

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, K] without the dropped elements, the same at every call; all others are larger by
        1 / (1 - share)."""
        rows, columns = x.shape
        row, column = (torch.arange(n, dtype=torch.int32, device=x.device) for n in (rows, columns))
        noise = _mixed(row * _signed(STEP) + self.seed).unsqueeze(1) ^ _mixed(
            column * _signed(STEP) + self.salt
        )
        kept = _mixed(noise) >= round(self.share * 2**32) - 2**31
        return x * kept / (1 - self.share)


def _mixed(x: Tensor) -> Tensor:
    """int32, in place."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(_signed(FIRST))
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_signed(SECOND))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def _signed(bits: int) -> int:
    return bits - (bits >> 31 << 32)
