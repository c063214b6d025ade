"""The resident base for training: transformers' decoder over the very NF4 bytes that are served.

The decoder is built empty and filled from `Checkpoint`, its linears replaced by ours, so loading
knows one layout and `base_digest` names what is trained on. Invariant: nothing here is trainable.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loriner.errors import ConfigError
from loriner.model.config import ModelConfig
from loriner.model.shards import read_json
from loriner.model.weights import Checkpoint
from loriner.train import attention
from loriner.train.attention import Groups, Plan, Starts
from loriner.train.lora import Frozen, Routing, Segment, SegmentedLinear
from loriner.train.pace import Pace
from loriner.train.settings import RunConfig


class Base:
    """`hidden(...)` -> [T, H] of a flat pass; `head` makes logits of it. What computes does so in
    turns of `pace`."""

    def __init__(
        self,
        weights: Checkpoint,
        raw_config: Mapping[str, Any],
        *,
        device: torch.device,
        dtype: torch.dtype,
        gradient_checkpointing: bool = False,
        duty: float = 1.0,
    ) -> None:
        self.config: ModelConfig = weights.config
        self.device, self.dtype, self.path = device, dtype, weights.path
        self.digest = weights.base_digest
        self.pace = Pace(device, duty)
        self.routing = Routing()
        self._model = _empty_model(raw_config, dtype)
        _fill(self._model, weights, self.routing, device, dtype)
        embedding = self._model.get_input_embeddings().weight
        tied = weights.config.tie_word_embeddings
        self.head = Frozen(embedding if tied else weights.linear("lm_head"), dtype, device)
        if gradient_checkpointing:
            _checkpoint_layers(self._model)
        self._model.train(gradient_checkpointing)  # the only thing that looks at it is that

    @property
    def decoder(self) -> Any:
        """transformers' decoder, without the head."""
        return self._model

    @property
    def has_flash(self) -> bool:
        """Whether attention is one launch for documents of any lengths (`Starts`)."""
        fits = self.config.head_dim % 8 == 0 and self.config.head_dim <= 256
        if self.device.type != "cuda" or self.dtype == torch.float32 or not fits:
            return False
        is_built = torch.backends.cuda.is_flash_attention_available()
        return is_built and torch.cuda.get_device_capability(self.device) >= (8, 0)

    def plan(self, lengths: Sequence[int]) -> Plan:
        """How documents of these lengths are attended to."""
        plan: Any = Starts if self.has_flash else Groups
        made: Plan = plan.of(lengths, self.device)
        return made

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T] -> [T, H]."""
        embedded: Tensor = self._model.get_input_embeddings()(token_ids)
        return embedded

    def hidden(
        self, embedded: Tensor, positions: Tensor, plan: Plan, segments: Sequence[Segment]
    ) -> Tensor:
        """embedded [T, H], positions [T] -> normed states [T, H]. The segments stay in place for
        the backward; one forward and its backward at a time."""
        self.routing.segments, self.routing.per_row = tuple(segments), 1
        out: Tensor = self._model(
            inputs_embeds=embedded.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            plan=plan,
            use_cache=False,
        ).last_hidden_state
        return out.squeeze(0)


def open_base(run: RunConfig) -> Base:
    """Load the base that `run` names. Raises CheckpointError, ConfigError."""
    device = device_of(run)
    dtype = dtype_of(run, device)
    if run.num_threads:
        torch.set_num_threads(run.num_threads)
    if device.type == "cuda" and run.memory_fraction < 1:
        torch.cuda.set_per_process_memory_fraction(run.memory_fraction)
    weights = Checkpoint.open(run.base)
    raw = read_json(run.base / "config.json")
    return Base(
        weights,
        raw,
        device=device,
        dtype=dtype,
        gradient_checkpointing=run.gradient_checkpointing,
        duty=run.duty,
    )


def device_of(run: RunConfig) -> torch.device:
    has_gpu = torch.cuda.is_available()
    if run.device == "cuda" and not has_gpu:
        raise ConfigError("device: there is no CUDA device.")
    return torch.device("cuda" if has_gpu and run.device != "cpu" else "cpu")


def dtype_of(run: RunConfig, device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU; float32 on a CPU, where bfloat16 is slow and rarely native."""
    if run.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.float32 if run.dtype == "float32" else torch.bfloat16


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _empty_model(raw_config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The decoder with all tensors on the meta device."""
    from transformers import AutoConfig, AutoModel

    attention.register()
    raw = {k: v for k, v in raw_config.items() if k not in ("quantization_config", "architectures")}
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    with torch.device("meta"):
        make: Any = AutoModel.from_config
        return make(config, dtype=dtype, attn_implementation=attention.NAME).requires_grad_(False)


def _fill(
    model: Any, weights: Checkpoint, routing: Routing, device: torch.device, dtype: torch.dtype
) -> None:
    linears = weights.config.linears()
    for name in linears:
        bias = f"{name}.bias"
        linear = SegmentedLinear(
            name,
            Frozen(weights.linear(name), dtype, device),
            _moved(weights.tensor(bias), device, dtype) if weights.has(bias) else None,
            routing,
        )
        parent, _, last = name.removeprefix("model.").rpartition(".")
        setattr(model.get_submodule(parent), last, linear)
    for name in weights.config.tensors():
        module, _, kind = name.removeprefix("model.").rpartition(".")
        if f"model.{module}" not in linears and module != "lm_head":
            tensor = _moved(weights.tensor(name), device, dtype)
            setattr(model.get_submodule(module), kind, nn.Parameter(tensor, requires_grad=False))
    _fuse_norms(model)
    _fill_buffers(model, device)


class Norm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension: RMSNorm (arXiv 1910.07467) in one
    launch, where transformers takes eight."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight, requires_grad=False), eps

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


def _fuse_norms(model: Any) -> None:
    """Norms of the Llama family alone: Gemma's, which multiplies by 1 + weight, has no
    `variance_epsilon`."""
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            parent, _, last = name.rpartition(".")
            norm = Norm(module.weight.data, module.variance_epsilon)
            setattr(model.get_submodule(parent), last, norm)


def _checkpoint_layers(model: Any) -> None:
    """What transformers' own switch does, whose name differs between versions."""
    for layer in model.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(
            checkpoint, use_reentrant=False, preserve_rng_state=False
        )


def _fill_buffers(model: Any, device: torch.device) -> None:
    """What transformers computes rather than stores: rotary tables, Gemma's embedding scale."""
    model.rotary_emb = type(model.rotary_emb)(model.config).to(device)
    embedding = model.get_input_embeddings()
    if hasattr(embedding, "embed_scale"):
        embedding.embed_scale = torch.tensor(embedding.scalar_embed_scale, device=device)
    left = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta]
    assert not left, f"not filled: {left}"


def _moved(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return tensor.to(device=device, dtype=dtype, copy=True)
