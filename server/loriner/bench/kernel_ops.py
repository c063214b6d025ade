"""The kernels as a benchmark calls them: operands of the real shapes, launches, expected results.

The only file of `bench` that knows how each device's kernels are called. Invariant: an op is
launched as the model launches it, on weights of its own for every launch of a round.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loriner import kernels
from loriner.bench.random_base import RandomBase
from loriner.kernels.operands import Nf4

Launch = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Fused:
    """One fused linear of a layer."""

    name: str  # qkv, o, gate_up, down
    members: tuple[str, ...]
    adds: bool = False  # into the residual
    gated: bool = False  # silu(gate) * up is stored

    def weights(self, base: RandomBase, layer: int) -> list[Nf4]:
        """Of one layer of the base."""
        prefix = f"model.layers.{layer % base.config.num_layers}"
        return [nf4(base, f"{prefix}.{member}.weight") for member in self.members]

    def shape(self, base: RandomBase) -> tuple[int, int]:
        """(outputs, inputs)."""
        linears = base.config.linears()
        shapes = [linears[f"model.layers.0.{member}"] for member in self.members]
        return sum(n for n, _ in shapes), shapes[0][1]


LINEARS = (
    Fused("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    Fused("o", ("self_attn.o_proj",), adds=True),
    Fused("gate_up", ("mlp.gate_proj", "mlp.up_proj"), gated=True),
    Fused("down", ("mlp.down_proj",), adds=True),
)


class Surface:
    """The kernels through the methods that the model calls, on the device of `base`."""

    def __init__(self, base: RandomBase, num_threads: int) -> None:
        self.device = base.device
        self.on_gpu = base.device.type == "cuda"
        self.ops: Any = kernels.select(base.device.type)
        self.ops.start(num_threads)
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32  # of the activations

    def prepare(self, fused: Fused, weights: Sequence[Nf4]) -> Any:
        """What is resident."""
        return self.ops.prepare_nf4(weights, None, gated=fused.gated)

    def random(self, *shape: int) -> Tensor:
        """Activations that bf16 holds exactly."""
        return torch.randn(shape, device=self.device).bfloat16().to(self.dtype)

    def residual(self, fused: Fused, rows: int, outputs: int) -> Tensor | None:
        """[M, N] f32, where the linear adds to one."""
        return torch.randn(rows, outputs, device=self.device) if fused.adds else None

    def launch(
        self, fused: Fused, x: Tensor, operand: Any, residual: Tensor | None, lora: Any = None
    ) -> Tensor:
        """x [M, K] -> [M, N], or [M, N/2] where gated; a residual may be changed in place."""
        y: Tensor
        if residual is not None:
            y = self.ops.linear_add(residual, x, operand, lora)
        elif fused.gated:
            y = self.ops.linear_gated(x, operand, lora, "silu")
        else:
            y = self.ops.linear(x, operand, lora)
        return y

    def poison(self, fused: Fused, rows: int, outputs: int) -> None:
        """Leave NaN in the memory that the allocator gives the next launch for its result."""
        width = outputs // 2 if fused.gated else outputs
        torch.full((rows, width), torch.nan, dtype=self.dtype, device=self.device)

    def expected(self, fused: Fused, product: Tensor) -> Tensor:
        """What a launch gives beside its residual, in float64, of x W^T [M, N]."""
        if fused.gated:
            gate, up = product.chunk(2, dim=-1)
            return F.silu(gate) * up
        return product


def nf4(base: RandomBase, name: str) -> Nf4:
    """A weight of the base as it is stored, by the weight's name."""
    stored = base.quantized(name)
    return Nf4(stored.packed, stored.absmax, base.tensor(f"{name}.quant_map"), stored.shape)


def dequantized(weights: Sequence[Nf4], dtype: torch.dtype) -> Tensor:
    """[N, K]: the NF4 values, each product rounded once to `dtype`."""
    return torch.cat([_dequantized(weight, dtype) for weight in weights])


def _dequantized(weight: Nf4, dtype: torch.dtype) -> Tensor:
    code = weight.code.double() if dtype is torch.float64 else weight.code
    scales = weight.expanded().to(code.dtype)
    high, low = code[(weight.packed >> 4).long()], code[(weight.packed & 15).long()]
    values = torch.stack((high, low), dim=-1).view(len(scales), -1)
    return (values * scales.unsqueeze(1)).view(weight.shape).to(dtype)


class Bitsandbytes:
    """bitsandbytes' matmul_4bit on the same bytes. Raises ImportError where it is absent."""

    def __init__(self) -> None:
        import bitsandbytes
        from bitsandbytes import functional

        self._matmul: Any = getattr(bitsandbytes, "matmul_4bit")  # noqa: B009  not exported by name
        self._functional: Any = functional

    def prepare(self, weights: Sequence[Nf4]) -> Any:
        """Fused along the outputs, with plain f32 scales, which are its quicker kind."""
        packed = torch.cat([w.packed for w in weights]).view(-1, 1)
        state = self._functional.QuantState(
            absmax=torch.cat([w.expanded() for w in weights]),
            shape=torch.Size((sum(w.shape[0] for w in weights), weights[0].shape[1])),
            code=weights[0].code,
            blocksize=64,
            quant_type="nf4",
            dtype=torch.bfloat16,
        )
        return packed, state

    def launch(self, x: Tensor, operand: Any) -> Tensor:
        packed, state = operand
        y: Tensor = self._matmul(x, packed.t(), quant_state=state)
        return y
