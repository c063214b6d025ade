"""What the decoder must know about a base: `ModelConfig`, read from a Hugging Face `config.json`.

Knows no files and no tensors (and does not import torch). Invariant: an architecture or an option
that the decoder would not compute exactly is refused by name, never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from loriner.errors import CheckpointError
from loriner.model.scaling import RopeScaling, positive, read_rope

__all__ = ["FAMILIES", "ModelConfig", "RopeScaling", "token_ids"]

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One decoder of the Llama family. Lengths are tokens, sizes are elements."""

    architecture: str  # Hugging Face's model_type
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMSNorm over each head of q and k, before rope
    sliding_window: int | None  # keys that a row of `sliding_layers` sees, itself included
    sliding_layers: tuple[int, ...]
    hidden_act: str  # silu | gelu_tanh
    norm_offset: bool  # norms multiply by 1 + w
    embed_scale: float  # embeddings are multiplied by this
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> ModelConfig:
        """Read a Hugging Face config. Raises CheckpointError naming what is not supported."""
        family = _family(config)
        _refuse_options(config)
        read = _Reader(config)
        hidden, heads = read.count("hidden_size"), read.count("num_attention_heads")
        head_dim = read.count("head_dim", family.head_dim or hidden // heads)
        num_layers = read.count("num_hidden_layers")
        positions = read.count("max_position_embeddings")
        window, sliding = _sliding(config, num_layers, positions)
        theta, scaling = read_rope(config, positions)
        bias = bool(config.get("attention_bias", False)) and family.attention_bias
        built = cls(
            architecture=str(config["model_type"]),
            vocab_size=read.count("vocab_size"),
            hidden_size=hidden,
            intermediate_size=read.count("intermediate_size"),
            num_layers=num_layers,
            num_heads=heads,
            num_kv_heads=read.count("num_key_value_heads", heads),
            head_dim=head_dim,
            max_position_embeddings=positions,
            rms_norm_eps=read.positive("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", family.tied)),
            qkv_bias=bias or family.qkv_bias,
            o_bias=bias,
            mlp_bias=bool(config.get("mlp_bias", False)) and family.mlp_bias,
            qk_norm=family.qk_norm,
            sliding_window=window,
            sliding_layers=sliding,
            hidden_act=_activation(config, family),
            norm_offset=family.gemma,
            embed_scale=math.sqrt(hidden) if family.gemma else 1.0,
            eos_token_ids=token_ids(config.get("eos_token_id")),
            bos_token_id=config.get("bos_token_id"),
        )
        built._check()
        return built

    @property
    def max_context(self) -> int:
        """Tokens up to which plain causal attention is this model's attention."""
        window = self.sliding_window or self.max_position_embeddings
        return min(window, self.max_position_embeddings)

    def linears(self) -> dict[str, tuple[int, int]]:
        """Full name of every linear inside the layers -> (out_features, in_features)."""
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        hidden, inner = self.hidden_size, self.intermediate_size
        shapes = ((query, hidden), (kv, hidden), (kv, hidden), (hidden, query))
        attention = dict(zip(ATTENTION, shapes, strict=True))
        mlp = dict(zip(MLP, ((inner, hidden), (inner, hidden), (hidden, inner)), strict=True))
        names: dict[str, tuple[int, int]] = {}
        for i in range(self.num_layers):
            names |= {f"model.layers.{i}.self_attn.{n}": s for n, s in attention.items()}
            names |= {f"model.layers.{i}.mlp.{n}": s for n, s in mlp.items()}
        return names

    def modules(self) -> dict[str, tuple[int, int]]:
        """Full name of every module that LoRA can target -> (out_features, in_features).

        `model.embed_tokens` stands there as (vocab, hidden), the shape of its weight.
        """
        vocab = (self.vocab_size, self.hidden_size)
        return {**self.linears(), "lm_head": vocab, "model.embed_tokens": vocab}

    def linears_named(self, names: Collection[str]) -> dict[str, tuple[int, int]]:
        """Of `linears`, those with these last names: `q_proj`, not a full name."""
        return {n: shape for n, shape in self.linears().items() if n.rpartition(".")[2] in names}

    @property
    def num_parameters(self) -> int:
        """Weights of the dense model."""
        return sum(math.prod(shape) for shape in self.tensors().values())

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Full name of every tensor of the dense model -> its shape; a tied lm_head has none."""
        linears = self.linears()
        shapes: dict[str, tuple[int, ...]] = {f"{n}.weight": s for n, s in linears.items()}
        for name, (out, _) in linears.items():
            if self._has_bias(name.rsplit(".", 1)[-1]):
                shapes[f"{name}.bias"] = (out,)
        norms = [f"model.layers.{i}.{n}" for i in range(self.num_layers) for n in NORMS]
        shapes |= {f"{n}.weight": (self.hidden_size,) for n in (*norms, "model.norm")}
        if self.qk_norm:
            for i in range(self.num_layers):
                prefix = f"model.layers.{i}.self_attn"
                shapes |= {f"{prefix}.{n}_norm.weight": (self.head_dim,) for n in "qk"}
        shapes["model.embed_tokens.weight"] = (self.vocab_size, self.hidden_size)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def _has_bias(self, projection: str) -> bool:
        if projection in MLP:
            return self.mlp_bias
        return self.o_bias if projection == "o_proj" else self.qkv_bias

    def _check(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"num_attention_heads {self.num_heads} is not a multiple of "
                f"num_key_value_heads {self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim {self.head_dim} is odd.")


NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True, slots=True)
class _Family:
    """Where the members of the Llama family differ; the defaults are Llama's own."""

    attention_bias: bool = True  # the config key `attention_bias` is honoured
    mlp_bias: bool = False  # the config key `mlp_bias` is honoured
    qkv_bias: bool = False  # q, k and v always have one
    qk_norm: bool = False
    tied: bool = False
    head_dim: int = 0  # 0: hidden_size / num_attention_heads
    gemma: bool = False


FAMILIES: Mapping[str, _Family] = {
    "llama": _Family(mlp_bias=True),
    "mistral": _Family(attention_bias=False),
    "qwen2": _Family(attention_bias=False, qkv_bias=True),
    "qwen3": _Family(qk_norm=True, head_dim=128),
    "gemma": _Family(tied=True, head_dim=256, gemma=True),
}

# Options that would change the maths: any value but these is refused.
_HARMLESS: Mapping[str, tuple[object, ...]] = {
    "partial_rotary_factor": (None, 1),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (None, False),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "no_rope_layers": (None, []),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "embedding_multiplier": (None, 1),
    "residual_multiplier": (None, 1),
    "logits_scaling": (None, 1),
}


def token_ids(value: object) -> tuple[int, ...]:
    """`eos_token_id` as configs write it (absent, one id or a list) as a tuple."""
    if value is None:
        return ()
    ids = value if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(token, int) and token >= 0 for token in ids):
        raise CheckpointError(f"eos_token_id {value!r} is not a token id or a list of them.")
    return tuple(dict.fromkeys(ids))


def _family(config: Mapping[str, Any]) -> _Family:
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise CheckpointError(f"model_type {kind!r} is not supported; supported are {known}.")
    for name in config.get("architectures") or ():
        if not str(name).endswith("ForCausalLM"):
            raise CheckpointError(f"architecture {name!r} is not a causal language model.")
    return FAMILIES[kind]


def _refuse_options(config: Mapping[str, Any]) -> None:
    for key, harmless in _HARMLESS.items():
        if config.get(key) not in harmless:
            raise CheckpointError(f"option {key} = {config[key]!r} is not supported.")


def _activation(config: Mapping[str, Any], family: _Family) -> str:
    # Early Gemma configs say "gelu" and mean the tanh form, as their own code computes it.
    default = "gelu_pytorch_tanh" if family.gemma else "silu"
    name = config.get("hidden_activation") or config.get("hidden_act", default)
    if family.gemma and name == "gelu":
        name = default
    known = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    if name not in known:
        raise CheckpointError(f"hidden_act {name!r} is not supported; supported are {list(known)}.")
    return known[name]


def _sliding(
    config: Mapping[str, Any], num_layers: int, positions: int
) -> tuple[int | None, tuple[int, ...]]:
    """The window and the layers that have it; a window as long as the context is none."""
    window = config.get("sliding_window")
    if config["model_type"] == "mistral":
        layers = tuple(range(num_layers))
    elif not config.get("use_sliding_window", False):
        return None, ()
    elif kinds := config.get("layer_types"):
        layers = tuple(i for i, kind in enumerate(kinds) if kind == "sliding_attention")
    else:
        layers = tuple(range(config.get("max_window_layers", 28), num_layers))
    if window is None or window >= positions or not layers:
        return None, ()
    if not isinstance(window, int) or window < 1:
        raise CheckpointError(f"sliding_window {window!r} is not a positive number of tokens.")
    return window, layers


class _Reader:
    """Numbers of a config, checked."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def count(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"config.json: {key} is {value!r}, not a positive integer.")
        return value

    def positive(self, key: str, default: float) -> float:
        return positive(f"config.json: {key}", self.config.get(key, default))
