"""Bytes that training takes, worked out from shapes: what a pass keeps, and what comes beside it.

Knows no files and no rows. Invariant: each figure is of the moment when most is alive, so what is
alive at another moment is not added to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loriner.model.config import ModelConfig
from loriner.train.loss import PIECE

STATE_BYTES = {"adamw": 8, "adamw_8bit": 2, "paged_adamw_8bit": 2, "paged_adamw_32bit": 8}
WORKSPACE = 128 << 20  # cuBLAS: 32 MiB for each of two threads on each of two streams
# On a CPU memory is the process's. Libraries were seen to take 430 MiB before there is a base, and
# what they do at the first step 35 to 140 more. malloc keeps holes that nothing fits in, whether
# layers are kept or computed again: a share of all that layers keep (glibc 2.36: 0.4 to 0.55).
PROCESS = 560 << 20
# And a step of an optimiser is many operations there, on tensors as large as the adapter: f32
# states, gradient and quotient, and for 8 bits the place of each among 256 values, in int64.
STEP_BYTES = {"adamw": 8, "adamw_8bit": 24, "paged_adamw_8bit": 24, "paged_adamw_32bit": 16}
HOLES = 0.45


@dataclass(frozen=True, slots=True)
class Adapter:
    """What of a job matters here."""

    rank: int
    num_modules: int  # of one layer
    num_parameters: int
    optimizer: str = "adamw"
    keeps_best: bool = False  # a copy of the best weights, on the host

    def state_bytes(self, on_gpu: bool) -> int:
        """f32 weights and gradients, and what of optimiser and best weights is in that memory."""
        best = 0 if on_gpu or not self.keeps_best else 4
        paged = self.paged_bytes if on_gpu else 0
        return self.num_parameters * (4 + 4 + STATE_BYTES[self.optimizer] + best) - paged

    @property
    def paged_bytes(self) -> int:
        """Of states that give way to the host's memory, on a GPU."""
        is_paged = self.optimizer.startswith("paged_")
        return self.num_parameters * STATE_BYTES[self.optimizer] if is_paged else 0


@dataclass(frozen=True, slots=True)
class PassSize:
    """One pass of all jobs. Padding is counted."""

    tokens: tuple[int, ...]  # of each job
    num_learnt: int
    num_spread: int = 0  # rows that attention copies into groups; 0 where it copies none


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes beside the base and the adapters' own states."""

    config: ModelConfig
    adapters: Sequence[Adapter]
    dtype: torch.dtype
    checkpointing: bool
    on_gpu: bool

    def learning(self, size: PassSize) -> int:
        """Of a forward and its backward, at most: either all that is kept and a piece of the
        loss, or what is kept or the gradients that take its place, and one layer's backward."""
        hidden, num_tokens, width = self.config.hidden_size, sum(size.tokens), self.dtype.itemsize
        layer, kept = self._layer(size) * width, self.kept(size)
        passing = num_tokens * (3 * self.config.intermediate_size + 2 * hidden) + self._widest
        backward = passing * width + (layer if self.checkpointing else 0)
        gradients = sum(adapter.num_parameters for adapter in self.adapters) * width
        most = max(kept + self._loss(size.num_learnt), max(kept, gradients) + backward)
        most += (3 * num_tokens + 2 * size.num_learnt) * hidden * width
        if not self.on_gpu:  # what the pass kept is not given back before the step
            most = max(most, kept + self._stepping)
            most += int(HOLES * self.config.num_layers * layer)
        return most + self._always

    def kept(self, size: PassSize) -> int:
        """By all layers, for the backward."""
        each = sum(size.tokens) * self.config.hidden_size
        elements = each if self.checkpointing else self._layer(size)
        return self.config.num_layers * elements * self.dtype.itemsize

    def evaluating(self, num_tokens: int, num_learnt: int) -> int:
        """Of a forward alone."""
        return (
            num_tokens * self._passing * self.dtype.itemsize
            + max(self._widest * self.dtype.itemsize, self._loss(num_learnt))
            + self._always
        )

    def answering(self, num_rows: int, length: int) -> int:
        """Of `num_rows` answers at a time, up to `length` tokens with their prompts: keys and
        values of all, and a forward of the prompts."""
        cached = 2 * self.config.num_kv_heads * self.config.head_dim * self.config.num_layers
        elements = num_rows * length * (cached + self._passing) + self._widest
        logits = num_rows * self.config.vocab_size * 8
        return elements * self.dtype.itemsize + logits + self._always

    @property
    def _stepping(self) -> int:
        """Of the optimisers' steps, one after the other."""
        return max(a.num_parameters * STEP_BYTES[a.optimizer] for a in self.adapters)

    @property
    def _always(self) -> int:
        """What the adapters are cast to, and the libraries' own."""
        parameters = sum(adapter.num_parameters for adapter in self.adapters)
        cast = 0 if self.dtype == torch.float32 else parameters * self.dtype.itemsize
        return cast + (WORKSPACE if self.on_gpu else 0)

    @property
    def _passing(self) -> int:
        """Elements a token of a layer whose backward never comes."""
        return 4 * self.config.hidden_size + 4 * self.config.intermediate_size

    @property
    def _widest(self) -> int:
        """Elements of the largest weight of a layer, which is made dense."""
        return max(n * k for n, k in self.config.linears().values())

    def _layer(self, size: PassSize) -> int:
        """Elements that one layer keeps: the inputs of both norms and what they make of them; q, k,
        v and their sum; gate, silu(gate), up and their product; x A^T of each module."""
        config, num_tokens = self.config, sum(size.tokens)
        queries, states = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        attention = 2 * (queries + states)
        kept = num_tokens * (4 * config.hidden_size + 4 * config.intermediate_size)
        kept += (size.num_spread or num_tokens) * attention
        kept += num_tokens * queries if size.num_spread else 0  # the sums in the rows' own order
        kept += num_tokens * (queries + states) if config.qk_norm else 0
        kept += num_tokens * 4 * config.hidden_size if config.norm_offset else 0  # f32 in its norms
        pairs = zip(size.tokens, self.adapters, strict=True)
        return kept + sum(count * a.rank * a.num_modules for count, a in pairs)

    def _loss(self, num_learnt: int) -> int:
        """Logits of a piece in f32, and their exponentials."""
        vocab = self.config.vocab_size
        return min(num_learnt, max(1, PIECE // vocab)) * vocab * 8
