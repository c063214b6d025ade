"""What a launch of `csrc/linear.cu` reads: an operand, and the parameters as the kernel has them.

Knows no kernel and no device. Invariant: fields stand in the order of `Params` there.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loriner.kernels.cuda.launch import TensorMap
from loriner.kernels.cuda.packing import Nested
from loriner.kernels.cuda.tiling import Tiling
from loriner.kernels.operands import Nf4

NUM_VALUES = 16 + 256  # of NF4 and of nested scales

Values = ctypes.c_float * NUM_VALUES

# A linear's table has NF4's values times CODE_UNIT. In bf16 those are off by 0.78e-3 of the norm of
# normally distributed weights, unscaled by 1.35e-3; the unit is the best of 2^21. Sums are scaled
# back: by 1 / CODE_UNIT, but for what rounding adds to the values as a whole.
CODE_UNIT, SUM_UNIT = 0.7184, 1.39206


class Params(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("weight", "scale", "nested", "offset")],
        *[(name, ctypes.c_void_p) for name in ("bias", "x", "y", "tiles", "num_tiles", "rows")],
        *[(name, ctypes.c_void_p) for name in ("shrunk", "gate")],
        ("values", Values),
        ("sum_unit", ctypes.c_float),
        ("shrunk_size", ctypes.c_int64),
        *[(name, ctypes.c_int) for name in ("M", "N", "K", "KB", "nested_shift", "max_tiles")],
        *[(name, ctypes.c_int) for name in ("shrunk_stride", "parts", "workers")],
        *[(name, ctypes.c_int) for name in ("helpers", "rounds")],
        *[(name, ctypes.c_int) for name in ("split0", "split1")],
    ]


class MappedParams(ctypes.Structure):
    """On Hopper, where x is copied by tensor maps. Aligned to 64 bytes over there."""

    _fields_ = [("x_map", TensorMap), ("rest", Params), ("padding", ctypes.c_uint64 * 8)]


class Operand(NamedTuple):
    """A fused linear of the base, ready for `Linears`."""

    kind: int
    weight: Tensor  # [tiles, KB, 512] u8 codes, or [tiles, KB, 1024] bf16
    scale: Tensor | None  # [tiles, KB / 4, 16, 4] f32, or u8 when nested
    nested: Nested | None
    values: Any  # `Values`: the 16 of NF4, then the 256 of nested scales
    scaled_values: Any  # the same with NF4's times CODE_UNIT
    bias: Tensor | None  # [N] f32
    outputs: int
    inputs: int
    gated: bool
    slices: tuple[int, int]  # ends of the first and second slice, for adapters
    tiling: Tiling

    @property
    def num_slices(self) -> int:
        first, second = self.slices
        return 1 + (first < self.outputs) + (second < self.outputs)

    @property
    def num_bytes(self) -> int:
        """Bytes that a call reads, and that stay resident."""
        tensors = [self.weight, self.scale]
        tensors += [] if self.nested is None else [self.nested.outer, self.nested.offset]
        return sum(t.nbytes for t in tensors if t is not None)


def values_of(part: Nf4) -> tuple[Any, Any]:
    """An operand's `values`, and its `scaled_values`."""
    nested = torch.zeros(256) if part.nested is None else part.nested.code
    plain, scaled = (
        Values(*(part.code * unit).tolist(), *nested.tolist()) for unit in (1.0, CODE_UNIT)
    )
    return plain, scaled


def params_of(x: Tensor, operand: Operand, y: Tensor) -> Params:
    nested = operand.nested
    return Params(
        weight=operand.weight.data_ptr(),
        scale=_pointer(operand.scale),
        nested=None if nested is None else nested.outer.data_ptr(),
        offset=None if nested is None else nested.offset.data_ptr(),
        values=operand.scaled_values,
        sum_unit=SUM_UNIT,
        bias=_pointer(operand.bias),
        x=x.data_ptr(),
        y=y.data_ptr(),
        M=x.shape[0],
        N=operand.outputs,
        K=operand.inputs,
        KB=operand.weight.shape[1],
        nested_shift=0 if nested is None else nested.span_shift,
        split0=operand.slices[0],
        split1=operand.slices[1],
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
