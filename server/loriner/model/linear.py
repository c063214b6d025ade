"""The one place where base and adapters meet: y = x W^T + segments of (x A^T) B."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor

from loriner.model.batch_meta import LoraBatch


class Nf4Linear:
    """A fused linear of the base (q|k|v, o, gate|up, down, lm_head) and its key in adapter
    layouts."""

    __slots__ = ("group", "ops", "weight")

    def __init__(self, group: str, weight: Any, ops: ModuleType) -> None:
        self.group = group
        self.weight = weight  # what `ops.prepare` made
        self.ops = ops

    def __call__(self, x: Tensor, lora: LoraBatch | None) -> Tensor:
        """x [T, K] -> [T, N]."""
        operand = None if lora is None else lora.operand(self.group)
        y: Tensor = self.ops.linear(x, self.weight, operand)
        return y
