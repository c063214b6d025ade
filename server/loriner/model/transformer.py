"""The decoder of the Llama family, outside-in; each `__call__` is the equation.

Driven by `ModelConfig` alone. Knows no sequences and no adapters: rows in, logits out; what rows
see and which adapter they use is in `BatchMeta`. Weights go to `ops.prepare` once, at load.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from loriner.adapters.pool import Placement
from loriner.kernels.operands import EMBEDDING, Nf4
from loriner.kernels.reference import dequantized
from loriner.model.batch_meta import BatchMeta, LoraBatch
from loriner.model.config import ModelConfig
from loriner.model.linear import Nf4Linear
from loriner.model.rope import tables
from loriner.model.weights import Checkpoint

LOAD_THREADS = 4
Progress = Callable[[int, int], None]  # (layers done, layers)


class KvCache:
    """Keys and values of every layer, in blocks that the engine hands out."""

    def __init__(
        self, config: ModelConfig, num_blocks: int, block: int, dtype: torch.dtype
    ) -> None:
        self.block = block
        self.num_blocks = num_blocks
        heads = (config.num_layers, num_blocks, config.num_kv_heads)
        self.k = torch.zeros(*heads, config.head_dim, block, dtype=dtype)
        self.v = torch.zeros(*heads, block, config.head_dim, dtype=dtype)

    @staticmethod
    def block_bytes(config: ModelConfig, block: int, dtype: torch.dtype) -> int:
        """Bytes of one block over all layers, keys and values."""
        row = config.num_kv_heads * config.head_dim * dtype.itemsize
        return 2 * config.num_layers * block * row


class Transformer:
    """tokens [T] -> logits [S, vocab] of the sampled rows."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        ops: Any,
        *,
        max_len: int,
        progress: Progress | None = None,
    ) -> None:
        config = checkpoint.config
        self.config, self.ops = config, ops
        load = _Loader(checkpoint, ops)
        self.embed = ops.prepare_embedding(checkpoint.tensor("model.embed_tokens.weight"))  # [V, H]
        self.layers = load.layers(progress)
        self.norm = load.norm("model.norm")
        head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
        self.lm_head = load.linear("lm_head", [head])
        self.rope = ops.prepare_rope(*tables(config, max_len))
        self.num_bytes = load.num_bytes  # of the operands that `ops` keeps resident

    @property
    def products(self) -> Iterator[tuple[str, Any]]:
        """Every linear's operand, and the method of `ops` that multiplies by it."""
        for layer in self.layers:
            yield "linear", layer.attention.qkv.weight
            yield "linear_add", layer.attention.o.weight
            yield "linear_gated", layer.mlp.gate_up.weight
            yield "linear_add", layer.mlp.down.weight
        yield "logits", self.lm_head.weight

    @torch.inference_mode()
    def __call__(self, batch: BatchMeta, kv: KvCache) -> Tensor:
        x = self.ops.embed(batch.token_ids, self.embed)  # [T, H]
        if batch.lora is not None:
            self.ops.lora_embed_add(x, batch.token_ids, batch.lora.embeddings)
        if self.config.embed_scale != 1.0:
            x *= self.config.embed_scale
        rotation = self.ops.rotation(self.rope, batch.positions)
        for i, layer in enumerate(self.layers):
            x = layer(x, rotation, batch, kv.k[i], kv.v[i])
        if batch.reader is not None:
            batch.reader(x)
        return self.lm_head.logits(self.normed(x, batch.sample_rows), batch.sample_lora)

    def normed(self, h: Tensor, rows: Tensor) -> Tensor:
        """The last hidden states of `rows` [S]: [S, H]."""
        x: Tensor = self.ops.rms_norm(h, self.norm, self.config.rms_norm_eps, rows)
        return x


class Layer:
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, index: int, load: _Loader) -> None:
        prefix = f"model.layers.{index}"
        self.ops, self.eps = load.ops, load.config.rms_norm_eps
        self.attention = Attention(index, load)
        self.mlp = Mlp(index, load)
        self.input_norm = load.norm(f"{prefix}.input_layernorm")
        self.mlp_norm = load.norm(f"{prefix}.post_attention_layernorm")

    def __call__(self, x: Tensor, rotation: Any, batch: BatchMeta, k: Tensor, v: Tensor) -> Tensor:
        x = self.attention(
            x, self.ops.rms_norm(x, self.input_norm, self.eps), rotation, batch, k, v
        )
        return self.mlp(x, self.ops.rms_norm(x, self.mlp_norm, self.eps), batch.lora)


class Attention:
    """Grouped-query attention with rotary positions over the paged cache."""

    def __init__(self, index: int, load: _Loader) -> None:
        config, self.ops = load.config, load.ops
        prefix = f"model.layers.{index}.self_attn"
        self.eps, self.scale = config.rms_norm_eps, config.head_dim**-0.5
        self.qkv = load.linear(f"{index}.qkv", [f"{prefix}.{p}_proj" for p in "qkv"])
        self.o = load.linear(f"{index}.o", [f"{prefix}.o_proj"])
        self.norms = None
        if config.qk_norm:
            self.norms = (load.norm(f"{prefix}.q_norm"), load.norm(f"{prefix}.k_norm"))

    def __call__(
        self, h: Tensor, x: Tensor, rotation: Any, batch: BatchMeta, k: Tensor, v: Tensor
    ) -> Tensor:
        """h + o(attention(x))."""
        qkv = self.qkv(x, batch.lora)
        q = self.ops.rope_store(qkv, self.norms, self.eps, rotation, batch.slots, k, v)
        y = self.ops.paged_attention(q, k, v, batch.attention, self.scale)
        return self.o.add(h, y, batch.lora)


class Mlp:
    """down(act(gate(x)) * up(x))."""

    def __init__(self, index: int, load: _Loader) -> None:
        prefix = f"model.layers.{index}.mlp"
        self.act = load.config.hidden_act
        names = [f"{prefix}.gate_proj", f"{prefix}.up_proj"]
        self.gate_up = load.linear(f"{index}.gate_up", names, gated=True)
        self.down = load.linear(f"{index}.down", [f"{prefix}.down_proj"])

    def __call__(self, h: Tensor, x: Tensor, lora: LoraBatch | None) -> Tensor:
        """h + mlp(x)."""
        return self.down.add(h, self.gate_up.gated(x, lora, self.act), lora)


def layout(config: ModelConfig) -> dict[str, Placement]:
    """Where every module that LoRA can target stands in the fused linears above."""
    modules = config.modules()
    placed = {"lm_head": Placement("lm_head", 0), "model.embed_tokens": Placement(EMBEDDING, 0)}
    for i in range(config.num_layers):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        fused = {
            f"{i}.qkv": [f"{attention}.{p}_proj" for p in "qkv"],
            f"{i}.o": [f"{attention}.o_proj"],
            f"{i}.gate_up": [f"{mlp}.gate_proj", f"{mlp}.up_proj"],
            f"{i}.down": [f"{mlp}.down_proj"],
        }
        for group, names in fused.items():
            offset = 0
            for name in names:
                placed[name] = Placement(group, offset)
                offset += modules[name][0]
    return placed


class _Loader:
    """Checkpoint -> prepared operands; counts the bytes of the compute copy."""

    def __init__(self, checkpoint: Checkpoint, ops: Any) -> None:
        self.checkpoint, self.ops = checkpoint, ops
        self.config = checkpoint.config
        self._sizes: list[int] = []  # appended to by several threads

    @property
    def num_bytes(self) -> int:
        return sum(self._sizes)

    def layers(self, progress: Progress | None) -> list[Layer]:
        """Load layers on a few threads: most of it is reading."""
        layers, total = [], self.config.num_layers
        with ThreadPoolExecutor(max_workers=LOAD_THREADS) as pool:
            for layer in pool.map(lambda i: Layer(i, self), range(total)):
                layers.append(layer)
                if progress:
                    progress(len(layers), total)
        return layers

    def linear(self, group: str, names: Sequence[str], *, gated: bool = False) -> Nf4Linear:
        weights = [self.checkpoint.linear(name) for name in names]
        biases = [n for n in names if self.checkpoint.has(f"{n}.bias")]
        bias = None
        if biases:
            assert biases == list(names), "biases of a fused linear come together"
            bias = torch.cat([self.checkpoint.tensor(f"{n}.bias").float() for n in names])
        operand = self._prepare(weights, bias, gated=gated)
        self._sizes.append(self.ops.nbytes(operand))
        return Nf4Linear(group, operand, self.ops)

    def norm(self, name: str) -> Tensor:
        weight = self.checkpoint.tensor(f"{name}.weight").float()
        prepared: Tensor = self.ops.prepare_norm(
            weight + 1.0 if self.config.norm_offset else weight
        )
        return prepared

    def _prepare(self, weights: Sequence[Nf4 | Tensor], bias: Tensor | None, *, gated: bool) -> Any:
        """Fuse along the outputs."""
        packed = [w for w in weights if isinstance(w, Nf4)]
        if len(packed) < len(weights):
            dense = [dequantized(w) if isinstance(w, Nf4) else w for w in weights]
            return self.ops.prepare_dense(dense, bias, gated=gated)
        assert all(torch.equal(part.code, packed[0].code) for part in packed)
        return self.ops.prepare_nf4(packed, bias, gated=gated)
