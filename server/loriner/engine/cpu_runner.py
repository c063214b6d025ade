"""The base on the CPU: a step has ended when `launch` returns.

Turns a `StepInput` into the tensors that the kernels read. A step with the same mixture of adapters
as the last one reuses its prepared operands.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from loriner import kernels
from loriner.adapters import mixture
from loriner.adapters.adapter import Adapter
from loriner.adapters.pool import Pool, SeatWeights, pack
from loriner.adapters.store import Store
from loriner.config import MIB, EngineConfig
from loriner.core import SamplingParams
from loriner.engine.readings import Read, Reader
from loriner.engine.runner import Progress, longest_context
from loriner.engine.sampler import Sampled, sample
from loriner.engine.step_input import Ints, Reading, Span, StepInput
from loriner.errors import ConfigError
from loriner.kernels.operands import AttentionPlan
from loriner.model.batch_meta import BatchMeta, LoraBatch
from loriner.model.transformer import KvCache, Transformer, layout
from loriner.model.weights import Checkpoint

logger = logging.getLogger(__name__)

KV_BYTES = 512 * MIB  # where the setting is 0
POOL_BYTES = 512 * MIB


@dataclass(frozen=True, slots=True)
class Ended:
    """A step whose tokens are here."""

    sampled: list[Sampled]
    told: list[Read] = field(default_factory=list)

    def choose(self) -> None:
        raise AssertionError("chosen when it was launched")

    def result(self) -> list[Sampled]:
        return self.sampled

    def read(self) -> list[Read]:
        return self.told


class CpuRunner:
    """The resident base, its KV cache and the seats of its adapters."""

    is_async = False
    usual_step_tokens = 32  # a row costs the same from there on: longer steps only make others wait
    shared_step_tokens = 16  # a row costs a tenth more, and the step takes half the time

    def __init__(
        self,
        config: EngineConfig,
        progress: Progress | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """`checkpoint`: instead of the one in `config.model`."""
        if config.bf16_shadow:
            raise ConfigError("bf16_shadow: is for a GPU.")
        self.ops: ModuleType = kernels.select("cpu")
        backend = self.ops.start(config.num_threads)
        self.dtype = torch.float32
        self.checkpoint = checkpoint or Checkpoint.open(config.model)
        self.model_config = self.checkpoint.config
        block_bytes = KvCache.block_bytes(self.model_config, config.block_size, self.dtype)
        num_blocks = (config.kv_bytes or KV_BYTES) // block_bytes
        self.max_len = longest_context(config, self.model_config, num_blocks * config.block_size)
        self.model = Transformer(self.checkpoint, self.ops, max_len=self.max_len, progress=progress)
        self.kv = KvCache(self.model_config, num_blocks, config.block_size, self.dtype)
        self._pool_bytes = config.pool_bytes or POOL_BYTES
        self._layout = layout(self.model_config)
        self._last: dict[str, tuple[object, LoraBatch | None]] = {}
        logger.info(
            "CPU (%s): the base is %.1f MiB on disk, and %.1f MiB of operands are resident%s",
            backend,
            self.checkpoint.num_bytes / MIB,
            self.model.num_bytes / MIB,
            "" if backend.startswith("native") else ": a dequantised compute copy",
        )

    @property
    def num_blocks(self) -> int:
        return self.kv.num_blocks

    @property
    def operand_bytes(self) -> int:
        return self.model.num_bytes

    def make_pool(self, max_seats: int, on_copied: Callable[[], None]) -> Pool:
        self.pool = Pool(self._pool_bytes, max_seats)
        return self.pool

    def pack(self, adapter: Adapter) -> SeatWeights:
        return pack(adapter, self._layout, self.dtype)

    def source(self, store: Store) -> Callable[[str], SeatWeights]:
        return lambda generation: self.pack(mixture.load(generation, store.load))

    def needs_host(self, params: SamplingParams) -> bool:
        return False

    def launch(self, step: StepInput) -> Ended:
        assert (step.token_source < 0).all(), "every token is known before the next step"
        reader = self.reader(step.readings)
        logits = self.run(self.meta(step, reader))
        sampled = sample(logits, step.draws, self.model_config.eos_token_ids)
        return Ended(sampled, reader.copied().told())

    def check(self) -> None:
        pass

    def reader(self, readings: Seq[Reading]) -> Reader:
        """For one step."""

        def lora_of(generation: str, num_rows: int) -> LoraBatch:
            return LoraBatch([(0, num_rows, self.pool.weights(generation))], num_rows, self.ops)

        return Reader(self.model, readings, lora_of)

    def run(self, batch: BatchMeta) -> Tensor:
        """One step: logits [B, vocab] f32 of the sampled rows."""
        return self.model(batch, self.kv)

    def meta(self, step: StepInput, reader: Reader | None = None) -> BatchMeta:
        counts = step.q_start[1:] - step.q_start[:-1]
        starts = step.q_start.tolist()
        sequence = torch.arange(step.num_sequences, dtype=torch.int32)
        return BatchMeta(
            token_ids=_long(step.token_ids),
            positions=_long(step.positions),
            slots=_long(step.slots),
            attention=AttentionPlan(
                spans=tuple(zip(starts[:-1], starts[1:], strict=True)),
                blocks=torch.from_numpy(step.block_table),
                sequence=sequence.repeat_interleave(torch.from_numpy(counts)),
                context=torch.from_numpy(step.positions + 1),
            ),
            lora=self._lora("rows", step.spans, step.num_rows),
            sample_rows=_long(step.sample_rows),
            sample_lora=self._lora("sampled", step.sample_spans, len(step.sample_rows)),
            reader=reader,
        )

    def _lora(self, which: str, spans: tuple[Span, ...], num_rows: int) -> LoraBatch | None:
        weights = [self.pool.weights(span.generation) for span in spans]
        key = (spans, num_rows, [id(w) for w in weights])
        last = self._last.get(which)
        if last is not None and last[0] == key:
            return last[1]
        segments = [(s.start, s.end, w) for s, w in zip(spans, weights, strict=True)]
        made = LoraBatch(segments, num_rows, self.ops) if segments else None
        self._last[which] = (key, made)
        return made


def _long(values: Ints) -> Tensor:
    return torch.from_numpy(values).long()
