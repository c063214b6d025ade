"""Counted, not measured: the bytes that one decode step must read, and the FLOP of a prefill."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from loriner.kernels.operands import NESTED_BLOCK
from loriner.model.config import ModelConfig
from loriner.model.nf4 import BLOCK


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes of one decode step. Each weight and each distinct adapter is read once; activations,
    norms and the rows of the embedding are left out."""

    linears: int  # NF4 codes and doubly quantised scales, as they are stored
    head: int  # bf16
    adapters: int  # A and B in bf16, at their exact rank
    kv: int  # keys and values of every row's context

    @property
    def total(self) -> int:
        return self.linears + self.head + self.adapters + self.kv


def step_traffic(
    config: ModelConfig, adapter_bytes: Iterable[int], rows: int, context: float, kv_itemsize: int
) -> Traffic:
    """`adapter_bytes`: of each distinct adapter; `context`: keys that a row sees, on average."""
    return Traffic(
        linears=sum(nf4_bytes(n * k) for n, k in config.linears().values()),
        head=2 * config.vocab_size * config.hidden_size,
        adapters=sum(adapter_bytes),
        kv=round(rows * context * kv_token_bytes(config, kv_itemsize)),
    )


def nf4_bytes(num_weights: int) -> int:
    """Codes and nested scales of so many weights."""
    num_blocks = num_weights // BLOCK
    return num_weights // 2 + num_blocks + 4 * -(-num_blocks // NESTED_BLOCK)


def kv_token_bytes(config: ModelConfig, itemsize: int) -> int:
    """Keys and values of one token over all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * itemsize


def prefill_flop(config: ModelConfig, tokens: int, rank: int) -> int:
    """Of the linears, one adapter of this rank (0: none), causal attention, and one row of logits.

    A multiply and an add are two. Attention: 2 products of tokens^2 / 2 pairs for each head.
    """
    weights = sum(n * k for n, k in config.linears().values())
    lora = sum(rank * (n + k) for n, k in config.linears().values())
    pairs = tokens * (tokens + 1) // 2
    attention = 2 * config.num_layers * config.num_heads * config.head_dim * pairs
    head = config.vocab_size * config.hidden_size
    return 2 * (tokens * (weights + lora) + attention + head)
