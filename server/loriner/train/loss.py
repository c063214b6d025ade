"""Cross entropy over the rows that are learnt, in pieces: logits of a whole pass never exist.

loss[i] = logsumexp(z[i]) - z[i, target[i]], z = h W^T; dL/dh = weight (softmax(z) - onehot) W is
worked out in the same piece, as the head is frozen. Sums are f32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from loriner.train.lora import Frozen

PIECE = 1 << 24  # logits at a time


def head_loss(
    hidden: Tensor, head: Frozen, targets: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """hidden [S, H], targets [S] int64, weights [S] f32 -> (sum of weights * losses, to call
    backward on; losses [S] f32)."""
    apply: Any = _HeadLoss.apply
    total, losses = apply(hidden, head, targets, weights)
    return total, losses


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Frozen, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        weight = head.dense()
        size = max(1, PIECE // weight.shape[0])
        losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        grad = torch.empty_like(hidden) if hidden.requires_grad else None
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            z = (hidden[rows] @ weight.T).float()  # [piece, vocab]
            top = z.logsumexp(dim=1)
            index = targets[rows].unsqueeze(1)
            losses[rows] = top - z.gather(1, index).squeeze(1)
            if grad is not None:
                z.sub_(top.unsqueeze(1)).exp_()
                z.scatter_add_(1, index, torch.full_like(top, -1.0).unsqueeze(1))
                z.mul_(weights[rows].unsqueeze(1))
                grad[rows] = z.to(hidden.dtype) @ weight
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = ctx.saved_tensors
        return grad * grads[0].to(grad.dtype), None, None, None
