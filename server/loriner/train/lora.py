"""The segmented LoRA linear, for training: y = x W^T + s (drop(x) A^T) B^T, segment by segment.

One adapter and many are the same code: rows of one adapter are neighbours and share the base's
product with all others. Forward and both gradients are written out, so nothing is kept but x and
x A^T. Invariant: W is read, never written, and never dense for longer than one product.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from loriner.kernels.operands import NESTED_BLOCK, NestedScales, Nf4
from loriner.model.nf4 import BLOCK
from loriner.train.dropout import Dropout, seed_of


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


ALIGN = 256  # elements: a block of eight-bit optimiser states lies in one tensor


class Lora:
    """One adapter in training: A and B of every target, f32, one after the other in `flat`, so that
    what is done to all of them is one launch. Invariant: `flat` and its gradient stay where they
    are; between the tensors gradients are zero, and nothing reads the values."""

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
        self._shapes = {name: ((rank, k), (n, rank)) for name, (n, k) in targets.items()}
        sizes = [math.prod(shape) for pair in self._shapes.values() for shape in pair]
        self._spaces = [-(-size // ALIGN) * ALIGN for size in sizes]
        self.num_parameters = sum(sizes)
        self.flat = nn.Parameter(torch.zeros(sum(self._spaces), device=device))
        self.flat.grad = self.gradient = torch.zeros_like(self.flat.data)
        self.weights: Mapping[str, Pair] = self._views(self.flat.data)
        self.gradients: Mapping[str, Pair] = self._views(self.gradient)
        generator = torch.Generator().manual_seed(seed)
        for a, _ in self.weights.values():
            start = torch.empty(a.shape)
            a.copy_(nn.init.kaiming_uniform_(start, math.sqrt(5), generator=generator))

    def parameters(self) -> list[nn.Parameter]:
        """What an optimiser takes: `flat`, whose gradient is `gradient`."""
        return [self.flat]

    def cast(self, dtype: torch.dtype) -> Mapping[str, Pair]:
        """A and B of every target as a pass in `dtype` multiplies by them; in f32, the weights."""
        return self.weights if dtype == torch.float32 else self._views(self.flat.data.to(dtype))

    def leaves(self, dtype: torch.dtype) -> Mapping[str, Pair]:
        """As `cast`, for a backward to ask the gradients of."""
        cast = self.cast(dtype).items()
        return {
            name: (a.detach().requires_grad_(), b.detach().requires_grad_())
            for name, (a, b) in cast
        }

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Add gradients of the leaves, in their order and dtype, onto `gradient`; None is zero."""
        places = [place for pair in self.gradients.values() for place in pair]
        found = [(p, g) for p, g in zip(places, gradients, strict=True) if g is not None]
        torch._foreach_add_([place for place, _ in found], [gradient for _, gradient in found])

    def _views(self, flat: Tensor) -> dict[str, Pair]:
        spaces = iter(torch.split(flat, self._spaces))
        return {
            name: (
                next(spaces)[: math.prod(a)].view(a),
                next(spaces)[: math.prod(b)].view(b),
            )
            for name, (a, b) in self._shapes.items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """By the names that PEFT gives them; shares memory."""
        named = {}
        for name, (a, b) in self.weights.items():
            named[f"base_model.model.{name}.lora_A.weight"] = a
            named[f"base_model.model.{name}.lora_B.weight"] = b
        return named

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy in what `tensors` gave; the names and shapes must be the same."""
        mine = self.tensors()
        assert mine.keys() == tensors.keys()
        for name, tensor in mine.items():
            tensor.copy_(tensors[name])


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows [start, end) of a pass and the adapter they use. `weights`: its own in the dtype of the
    pass (`Lora.cast` or `leaves`). `seed`: of dropout, None for none."""

    start: int
    end: int
    lora: Lora
    weights: Mapping[str, Pair]
    seed: Tensor | None = None  # [] int32


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
                parts.append(_Part(*span, segment.lora.scaling, _dropout(segment, self.name)))
                weights += pair
        product: Any = _Product.apply
        y: Tensor = product(rows, self.weight, self.bias, tuple(parts), *weights)
        return y.view(*x.shape[:-1], -1)


@dataclass(frozen=True, slots=True)
class _Part:
    start: int
    end: int
    scaling: float
    dropout: Dropout | None

    def drop(self, x: Tensor) -> Tensor:
        return x if self.dropout is None else self.dropout(x)


def _dropout(segment: Segment, name: str) -> Dropout | None:
    if segment.seed is None or not segment.lora.dropout:
        return None
    return Dropout(segment.lora.dropout, segment.seed, seed_of(name))


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
