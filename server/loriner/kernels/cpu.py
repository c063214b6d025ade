"""The CPU backend: binds `csrc/cpu.c`. NF4 bytes are read as they are stored; there is no compute
copy.

Each function means what its namesake in `reference.py` says, and takes the same arguments. A row's
result does not depend on how many rows are beside it. Tensors are f32 unless said otherwise; where
the C code cannot take a weight (its inputs are no multiple of 64, or it is stored in f16 or f32),
dense torch takes its place.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from ctypes import c_float, c_int32, c_void_p
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from loriner.kernels import native, reference
from loriner.kernels.operands import AttentionPlan, Segment
from loriner.kernels.reference import (
    Dense,
    dequantize_nf4,
    dequantized,
    gelu_mul,
    lora_embed_add,
)

__all__ = [
    "dequantize_nf4",
    "dequantized",
    "gelu_mul",
    "linear",
    "lora_embed_add",
    "nbytes",
    "paged_attention",
    "prepare_dense",
    "prepare_lora",
    "prepare_nf4",
    "rms_norm",
    "rope",
    "silu_mul",
    "start",
    "store_kv",
]

NF4_BLOCK = 64
MAX_HEAD_DIM = 256
MAX_GROUP = 16

_library = native.library()
assert _library is not None, "kernels.select checks"
_c = _library
VL = _c.loriner_lanes()  # outputs that the C code computes side by side


class Nf4(NamedTuple):
    """An NF4 weight: bitsandbytes' bytes with VL outputs side by side, and their scales
    likewise."""

    packed: Tensor  # [groups, K/2, VL] u8
    absmax: Tensor  # [groups, K/64, VL] f32
    code: Tensor  # [16] f32
    bias: Tensor | None  # [groups * VL] f32
    outputs: int


class Bf16(NamedTuple):
    """A weight stored in bf16, with VL outputs side by side."""

    weight: Tensor  # [groups, K, VL] bf16
    bias: Tensor | None  # [groups * VL] f32
    outputs: int


Operand = Nf4 | Bf16 | Dense


def start(num_threads: int) -> str:
    """As `reference.start`. Torch's own threads would fight with ours, so it keeps one."""
    cores = num_threads or len(os.sched_getaffinity(0))
    running = _c.loriner_start(cores)
    torch.set_num_threads(1)
    return f"native, {running} threads"


def prepare_nf4(
    packed: Tensor, absmax: Tensor, code: Tensor, shape: tuple[int, int], bias: Tensor | None
) -> Operand:
    """As `reference.prepare_nf4`. Bytes are moved, none is changed."""
    outputs, inputs = shape
    if inputs % NF4_BLOCK or absmax.numel() * NF4_BLOCK != outputs * inputs:
        return reference.prepare_nf4(packed, absmax, code, shape, bias)
    return Nf4(
        _side_by_side(packed.view(outputs, -1)),
        _side_by_side(absmax.view(outputs, -1)),
        code.contiguous(),
        _padded(bias),
        outputs,
    )


def prepare_dense(weight: Tensor, bias: Tensor | None) -> Operand:
    """As `reference.prepare_dense`."""
    if weight.dtype is not torch.bfloat16 or weight.shape[1] % 2:
        return reference.prepare_dense(weight, bias)
    return Bf16(_side_by_side(weight), _padded(bias), weight.shape[0])


def _side_by_side(rows: Tensor) -> Tensor:
    """[N, C] -> [N / VL, C, VL], the last group filled up with zeros."""
    rows = F.pad(rows, (0, 0, 0, -len(rows) % VL))
    return rows.view(-1, VL, rows.shape[1]).transpose(1, 2).contiguous()


def _padded(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else F.pad(bias.float(), (0, -len(bias) % VL))


def nbytes(operand: Operand) -> int:
    """As `reference.nbytes`."""
    if isinstance(operand, Nf4):
        return operand.packed.nbytes + operand.absmax.nbytes
    return operand.weight.nbytes


class _CPart(ctypes.Structure):
    _fields_ = [
        ("offset", c_int32),
        ("rank_start", c_int32),
        ("rank_end", c_int32),
        ("outputs", c_int32),
        ("b", c_void_p),
        ("bias", c_void_p),
        ("scale", c_float),
    ]


class _CSegment(ctypes.Structure):
    _fields_ = [
        ("start", c_int32),
        ("end", c_int32),
        ("rank", c_int32),
        ("num_parts", c_int32),
        ("is_bf16", c_int32),
        ("a", c_void_p),
        ("parts", c_void_p),
    ]


class LoraOperand(NamedTuple):
    """Segments as C structs, and everything that their pointers point into."""

    segments: Sequence[Segment]
    address: int
    chunk_address: int
    max_rank: int  # of the slices of one adapter together
    keep: tuple[object, ...]


TILE = 8  # rows of one chunk of work, as in cpu.c


def prepare_lora(segments: Sequence[Segment], num_rows: int) -> LoraOperand:
    """As `reference.prepare_lora`."""
    made = (_CSegment * len(segments))()
    first_chunk = (c_int32 * (len(segments) + 1))()
    keep: list[object] = [made, first_chunk]
    for i, (begin, end, group) in enumerate(segments):
        assert group.a.is_contiguous() and all(part.b.is_contiguous() for part in group.parts)
        parts = (_CPart * len(group.parts))(
            *(
                _CPart(
                    part.offset,
                    part.rank_start,
                    part.rank_end,
                    part.b.shape[1],
                    part.b.data_ptr(),
                    None if part.bias is None else part.bias.data_ptr(),
                    part.scale,
                )
                for part in group.parts
            )
        )
        keep.append(parts)
        made[i] = _CSegment(
            begin,
            end,
            group.a.shape[0],
            len(parts),
            group.a.dtype is torch.bfloat16,
            group.a.data_ptr(),
            ctypes.addressof(parts),
        )
        first_chunk[i + 1] = first_chunk[i] + -(-(end - begin) // TILE)
    return LoraOperand(
        segments,
        ctypes.addressof(made),
        ctypes.addressof(first_chunk),
        max(group.a.shape[0] for _, _, group in segments),
        tuple(keep),
    )


def linear(x: Tensor, operand: Operand, lora: LoraOperand | None = None) -> Tensor:
    """As `reference.linear`. Adapters' A is read from memory while the base's sums are computed."""
    if isinstance(operand, Dense):
        return reference.linear(x, operand, None if lora is None else lora.segments)
    rows, inputs = x.shape
    y = torch.empty(rows, operand.outputs)
    scratch = torch.empty_like(x)
    z = None if lora is None else torch.empty(rows, lora.max_rank)
    adapters = (
        (None, None, 0, None, 0)
        if lora is None or z is None
        else (lora.address, lora.chunk_address, len(lora.segments), z.data_ptr(), lora.max_rank)
    )
    bias = None if operand.bias is None else operand.bias.data_ptr()
    ends = (bias, rows, inputs, operand.outputs, *adapters)
    weight = operand.packed if isinstance(operand, Nf4) else operand.weight
    pointers = (y.data_ptr(), x.data_ptr(), scratch.data_ptr(), weight.data_ptr())
    if isinstance(operand, Nf4):
        scales = (operand.absmax.data_ptr(), operand.code.data_ptr())
        _c.loriner_nf4_linear(*pointers, *scales, *ends)
    else:
        _c.loriner_bf16_linear(*pointers, *ends)
    return y


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, scale: float
) -> Tensor:
    """As `reference.paged_attention`."""
    rows, heads, dim = q.shape
    num_kv, size = v_cache.shape[1:3]
    assert heads <= MAX_GROUP * num_kv and dim <= MAX_HEAD_DIM and dim % 4 == 0
    out = torch.empty(rows, heads * dim)
    _c.loriner_attention(
        out.data_ptr(),
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        plan.blocks.data_ptr(),
        plan.sequence.data_ptr(),
        plan.context.data_ptr(),
        rows,
        q.stride(0),
        plan.blocks.shape[1],
        size,
        heads,
        num_kv,
        dim,
        scale,
    )
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.rms_norm`."""
    if x.dim() != 2:
        return reference.rms_norm(x, weight, eps)
    y = torch.empty(x.shape)
    rows, dim = x.shape
    _c.loriner_rms_norm(y.data_ptr(), x.data_ptr(), weight.data_ptr(), rows, x.stride(0), dim, eps)
    return y


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `reference.rope`."""
    rows, heads, dim = x.shape
    y = torch.empty(rows, heads, dim)
    _c.loriner_rope(
        y.data_ptr(), x.data_ptr(), cos.data_ptr(), sin.data_ptr(), rows, x.stride(0), heads, dim
    )
    return y


def silu_mul(gate_up: Tensor) -> Tensor:
    """As `reference.silu_mul`."""
    rows, width = gate_up.shape
    y = torch.empty(rows, width // 2)
    _c.loriner_silu_mul(y.data_ptr(), gate_up.data_ptr(), rows, width // 2)
    return y


def store_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """As `reference.store_kv`."""
    rows, num_kv, dim = k.shape
    _c.loriner_store(
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        slots.data_ptr(),
        rows,
        k.stride(0),
        v.stride(0),
        v_cache.shape[2],
        num_kv,
        dim,
    )
