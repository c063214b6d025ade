"""Owns the base and its KV cache: a batch in, logits out. Sizes the cache; knows no requests."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from loriner import kernels
from loriner.config import MIB, EngineConfig
from loriner.errors import ConfigError
from loriner.model.batch_meta import BatchMeta
from loriner.model.transformer import KvCache, Transformer
from loriner.model.weights import Checkpoint

logger = logging.getLogger(__name__)


class Runner:
    """The resident base on one device."""

    def __init__(
        self, config: EngineConfig, progress: Callable[[int, int], None] | None = None
    ) -> None:
        if config.device == "cuda":
            raise ConfigError("device: there are no GPU kernels in this version; use cpu.")
        self.ops: ModuleType = kernels.select("cpu")
        backend = self.ops.start(config.num_threads)
        self.dtype = torch.float32
        self.checkpoint = Checkpoint.open(config.model)
        self.model_config = self.checkpoint.config
        block_bytes = KvCache.block_bytes(self.model_config, config.block_size, self.dtype)
        num_blocks = config.kv_bytes // block_bytes
        self.max_len = self._max_len(config, num_blocks * config.block_size)
        self.model = Transformer(
            self.checkpoint,
            self.ops,
            max_len=self.max_len,
            progress=progress,
        )
        self.kv = KvCache(self.model_config, num_blocks, config.block_size, self.dtype)
        logger.info(
            "CPU (%s): the base is %.1f MiB on disk, and %.1f MiB of operands are resident%s",
            backend,
            self.checkpoint.num_bytes / MIB,
            self.model.num_bytes / MIB,
            "" if backend.startswith("native") else ": a dequantised compute copy",
        )

    def run(self, batch: BatchMeta) -> Tensor:
        """One step: logits [S, vocab] f32 of the sampled rows."""
        return self.model(batch, self.kv)

    def _max_len(self, config: EngineConfig, cache_tokens: int) -> int:
        """Context that both model and cache can hold. Raises ConfigError when the request is
        longer."""
        model = self.model_config
        trained = model.max_context
        if config.max_model_len > trained:
            raise ConfigError(f"max_model_len: the model's context is {trained} tokens.")
        wanted = config.max_model_len or trained
        if cache_tokens < min(wanted, 2 * config.block_size):
            raise ConfigError(f"kv_bytes: holds only {cache_tokens} tokens.")
        if config.max_model_len > cache_tokens:
            raise ConfigError(f"kv_bytes: holds {cache_tokens} tokens, less than max_model_len.")
        return min(wanted, cache_tokens)
