"""The one place where base and adapters meet: y = x W^T + segments of (x A^T) B."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from loriner.model.batch_meta import LoraBatch


class Nf4Linear:
    """A fused linear of the base (q|k|v, o, gate|up, down, lm_head) and its key in adapter
    layouts."""

    __slots__ = ("group", "ops", "weight")

    def __init__(self, group: str, weight: Any, ops: Any) -> None:
        self.group = group
        self.weight = weight  # what `ops.prepare` made
        self.ops = ops

    def __call__(self, x: Tensor, lora: LoraBatch | None) -> Tensor:
        """x [T, K] -> [T, N]."""
        y: Tensor = self.ops.linear(x, self.weight, self._adapters(lora))
        return y

    def add(self, h: Tensor, x: Tensor, lora: LoraBatch | None) -> Tensor:
        """h [T, N] + self(x)."""
        y: Tensor = self.ops.linear_add(h, x, self.weight, self._adapters(lora))
        return y

    def gated(self, x: Tensor, lora: LoraBatch | None, act: str) -> Tensor:
        """act(g) * u [T, N/2], where [g | u] = self(x)."""
        y: Tensor = self.ops.linear_gated(x, self.weight, self._adapters(lora), act)
        return y

    def logits(self, x: Tensor, lora: LoraBatch | None) -> Tensor:
        """self(x) in f32."""
        y: Tensor = self.ops.logits(x, self.weight, self._adapters(lora))
        return y

    def _adapters(self, lora: LoraBatch | None) -> Any:
        return None if lora is None else lora.operand(self.group)
