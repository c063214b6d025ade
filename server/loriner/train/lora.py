"""The segmented LoRA linear, for training: y = x W^T + s (drop(x) A^T) B^T, segment by segment.

One adapter and many are the same code: rows of one adapter are neighbours and share the base's
product with all others. Forward and both gradients are written out, so nothing is kept but x and
x A^T. Invariant: W is read, never written, and never dense for longer than one product.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from loriner.kernels.operands import NESTED_BLOCK, NestedScales, Nf4
from loriner.model.nf4 import BLOCK


class Frozen:
    """A weight [N, K] of the base, NF4 or dense."""

    def __init__(self, weight: Nf4 | Tensor, dtype: torch.dtype, device: torch.device) -> None:
        self.shape = tuple(weight.shape)
        self._state: Any = None
        if isinstance(weight, Nf4):
            self._weight = weight.packed.to(device).view(-1, 1)
            self._state = _quant_state(weight, dtype, device)
        else:
            self._weight = weight.to(device=device, dtype=dtype)

    @property
    def num_bytes(self) -> int:
        """Of the codes, or of a dense weight; scales are not counted."""
        return self._weight.nbytes

    def dense(self) -> Tensor:
        """[N, K] in the dtype of activations."""
        if self._state is None:
            return self._weight
        dense: Tensor = bitsandbytes().dequantize_4bit(self._weight, self._state)
        return dense


@cache
def bitsandbytes() -> Any:
    """Its functions; without its word, at import, that an optional CPU kernel is not installed."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from bitsandbytes import functional

    return functional


def _quant_state(weight: Nf4, dtype: torch.dtype, device: torch.device) -> Any:
    make: Any = bitsandbytes().QuantState
    scales, nested, offset = weight.absmax, None, None
    if isinstance(scales, NestedScales):
        nested = make(
            absmax=scales.absmax.to(device),
            code=scales.code.to(device),
            blocksize=NESTED_BLOCK,
            dtype=torch.float32,
        )
        offset = torch.tensor(scales.offset, dtype=torch.float32, device=device)
        scales = scales.index
    return make(
        absmax=scales.to(device),
        shape=torch.Size(weight.shape),
        code=weight.code.to(device),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=offset,
        state2=nested,
    )


Pair = tuple[Tensor, Tensor]  # A [R, K], B [N, R]


class Lora:
    """One adapter in training: A and B of every target, f32."""

    def __init__(
        self,
        targets: Mapping[str, tuple[int, int]],
        *,
        rank: int,
        scaling: float,
        dropout: float = 0.0,
        seed: int = 0,
        device: torch.device | None = None,
    ) -> None:
        """`targets`: full module names -> (N, K). Starts as PEFT does: A uniform, B zero."""
        self.rank, self.scaling, self.dropout = rank, scaling, dropout
        self.weights: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
        generator = torch.Generator().manual_seed(seed)
        for name, (num_out, num_in) in targets.items():
            a = torch.empty(rank, num_in)
            nn.init.kaiming_uniform_(a, math.sqrt(5), generator=generator)
            b = torch.zeros(num_out, rank)
            self.weights[name] = nn.Parameter(a.to(device)), nn.Parameter(b.to(device))

    def parameters(self) -> list[nn.Parameter]:
        return [weight for pair in self.weights.values() for weight in pair]

    @property
    def num_parameters(self) -> int:
        return sum(weight.numel() for weight in self.parameters())

    def cast(self, dtype: torch.dtype) -> Mapping[str, Pair]:
        """A and B of every target as a pass in `dtype` multiplies by them. All at once: a launch
        for each of them, and for each gradient, costs a small model more than its products."""
        if dtype == torch.float32:
            return self.weights
        cast: Any = _Cast.apply
        flat = iter(cast(dtype, *self.parameters()))
        return {name: (next(flat), next(flat)) for name in self.weights}

    def tensors(self) -> dict[str, Tensor]:
        """By the names that PEFT gives them; shares memory."""
        named = {}
        for name, (a, b) in self.weights.items():
            named[f"base_model.model.{name}.lora_A.weight"] = a.data
            named[f"base_model.model.{name}.lora_B.weight"] = b.data
        return named

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy in what `tensors` gave; the names and shapes must be the same."""
        mine = self.tensors()
        assert mine.keys() == tensors.keys()
        for name, tensor in mine.items():
            tensor.copy_(tensors[name])


class _Cast(torch.autograd.Function):
    """(dtype, tensors ...) -> the tensors in dtype; gradients come back in the tensors' own."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [tensor.dtype for tensor in tensors]
        made = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
        torch._foreach_copy_(made, tensors)
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        found = [(i, grad) for i, grad in enumerate(grads) if grad is not None]
        made = [torch.empty_like(grad, dtype=ctx.dtypes[i]) for i, grad in found]
        if found:
            torch._foreach_copy_(made, [grad for _, grad in found])
        results: list[Tensor | None] = [None] * len(grads)
        for (i, _), grad in zip(found, made, strict=True):
            results[i] = grad
        return None, *results


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows [start, end) of a pass and the adapter they use. `weights`: its own in the dtype of the
    pass (`Lora.cast`). `seed`: of dropout, None for none."""

    start: int
    end: int
    lora: Lora
    weights: Mapping[str, Pair]
    seed: str | None = None


@dataclass(slots=True)
class Routing:
    """What all linears of one base look up: transformers' layers hand them x and nothing else.
    Set before a forward, and left alone until its backward is over."""

    segments: Sequence[Segment] = ()
    per_row: int = 1  # rows of x for each row that the segments count: tokens of a sequence


class SegmentedLinear(nn.Module):
    """Stands where transformers has a linear of the base."""

    def __init__(self, name: str, weight: Frozen, bias: Tensor | None, routing: Routing) -> None:
        super().__init__()
        self.name, self.weight, self.bias, self._routing = name, weight, bias, routing
        self.out_features, self.in_features = weight.shape

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])  # [T, K]
        scale = self._routing.per_row
        parts, weights = [], list[Tensor]()
        for segment in self._routing.segments:
            pair = segment.weights.get(self.name)
            if pair is not None:
                span = (segment.start * scale, segment.end * scale)
                parts.append(_Part(*span, segment.lora.scaling, _noise(segment, self.name)))
                weights += pair
        product: Any = _Product.apply
        y: Tensor = product(rows, self.weight, self.bias, tuple(parts), *weights)
        return y.view(*x.shape[:-1], -1)


@dataclass(frozen=True, slots=True)
class _Part:
    start: int
    end: int
    scaling: float
    dropout: tuple[float, int] | None  # (share, seed)

    def drop(self, x: Tensor) -> Tensor:
        """x with the same elements dropped at every call."""
        if self.dropout is None:
            return x
        share, seed = self.dropout
        generator = torch.Generator(x.device).manual_seed(seed)
        kept = torch.empty(x.shape, device=x.device).bernoulli_(1 - share, generator=generator)
        return x * kept.to(x.dtype) / (1 - share)


def _noise(segment: Segment, name: str) -> tuple[float, int] | None:
    if segment.seed is None or not segment.lora.dropout:
        return None
    return segment.lora.dropout, zlib.crc32(f"{segment.seed} {name}".encode())


class _Product(torch.autograd.Function):
    """(x [T, K], W [N, K], bias [N], parts, A1 [R, K], B1 [N, R], ...) -> [T, N]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Frozen,
        bias: Tensor | None,
        parts: tuple[_Part, ...],
        *pairs: Tensor,
    ) -> Tensor:
        y = nn.functional.linear(x, weight.dense(), bias)
        hidden = []  # x A^T of each part, [rows, R]
        for part, a, b in zip(parts, pairs[::2], pairs[1::2], strict=True):
            h = part.drop(x[part.start : part.end]) @ a.T
            y[part.start : part.end].addmm_(h, b.T, alpha=part.scaling)
            hidden.append(h)
        ctx.weight, ctx.parts = weight, parts
        ctx.save_for_backward(x, *hidden, *pairs)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (gy,) = grads
        x, *saved = ctx.saved_tensors
        hidden, pairs = saved[: len(ctx.parts)], saved[len(ctx.parts) :]
        gx = gy @ ctx.weight.dense() if ctx.needs_input_grad[0] else None
        results: list[Tensor] = []
        for part, h, a, b in zip(ctx.parts, hidden, pairs[::2], pairs[1::2], strict=True):
            g = gy[part.start : part.end]
            gh = g @ b  # [rows, R]
            results.append(_scaled(part.scaling, gh.T, part.drop(x[part.start : part.end])))
            results.append(_scaled(part.scaling, g.T, h))
            if gx is not None and part.dropout is None:
                gx[part.start : part.end].addmm_(gh, a, alpha=part.scaling)
            elif gx is not None:
                gx[part.start : part.end] += part.drop(_scaled(part.scaling, gh, a))
        return gx, None, None, None, *results


def _scaled(scale: float, a: Tensor, b: Tensor) -> Tensor:
    """scale a b, in one launch."""
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)
