"""Full fine-tuning, to be compared with: every weight is trained, in f32, with AdamW.

Takes the documents that the trainer's loop takes, in its order, with its loss weights, clipping and
schedule; products are in `dtype` (autocast). Knows no adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loriner.model.config import ModelConfig
from loriner.train import attention
from loriner.train.data import DataSet
from loriner.train.feed import Pass
from loriner.train.job import make_feed, num_steps
from loriner.train.optim import check_finite, clip, learning_rate, make_optimizer
from loriner.train.passes import Flat, lengths_of
from loriner.train.settings import JobConfig


class FullModel:
    """All weights of a dense folder in training."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        attention.register()
        self.device, self.dtype = device, dtype
        load: Any = AutoModelForCausalLM.from_pretrained
        self._model: Any = load(
            folder, dtype=torch.float32, attn_implementation=attention.NAME, local_files_only=True
        )
        self._model.to(device)

    def parameters(self) -> list[nn.Parameter]:
        return list(self._model.parameters())

    def tensors(self, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
        """By their Hugging Face names."""
        state = self._model.state_dict()
        for name in config.tensors():
            yield name, state[name]

    def loss(self, documents: Pass) -> Tensor:
        """The sum over the learnt tokens, to call backward on."""
        flat = Flat.of(documents, self.device)
        plan = attention.Groups.of(lengths_of(documents), self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            states = self._model.model(
                input_ids=flat.ids.unsqueeze(0),
                position_ids=flat.positions.unsqueeze(0),
                plan=plan,
                use_cache=False,
            ).last_hidden_state.squeeze(0)
            logits = self._model.lm_head(states.index_select(0, flat.rows - 1))  # [S, vocab]
        targets = flat.ids[flat.rows]
        return nn.functional.cross_entropy(logits.float(), targets, reduction="sum")


def train_full(model: FullModel, settings: JobConfig, data: DataSet) -> list[float]:
    """Train to the end; the mean loss of each step."""
    feed = make_feed(settings, data)
    count = num_steps(settings, feed)
    optimizer = make_optimizer(settings, model.parameters())
    losses = []
    for step in range(count):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, count)
        losses.append(_step(model, optimizer, feed.passes(step), settings.max_grad_norm))
    return losses


def _step(model: FullModel, optimizer: Any, passes: Sequence[Pass], max_norm: float) -> float:
    num_learnt = sum(document.num_learnt for documents in passes for document in documents)
    total = torch.zeros((), device=model.device)
    for documents in passes:
        loss = model.loss(documents) / num_learnt
        torch.autograd.backward(loss)
        total += loss.detach()
    loss, norm = torch.stack((total, clip(model.parameters(), max_norm))).tolist()
    check_finite("all weights", loss, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss)
