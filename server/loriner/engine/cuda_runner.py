"""The base on a GPU: a step is begun by `launch` and read one step later.

Shares the card's memory out, makes tensors of a step into the `BatchMeta` that the model knows, and
leaves launching to `device_steps.py`. Knows no requests. Invariant: all memory is taken at start;
no step allocates on the device outside its graph.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from loriner import kernels
from loriner.adapters import mixture
from loriner.adapters.adapter import Adapter
from loriner.adapters.cuda_copies import cuda_seats, pinned_host
from loriner.adapters.gpu_pool import DeviceSeats
from loriner.adapters.image import ImageLayout, pack_image
from loriner.adapters.loading import ImageSource
from loriner.adapters.memory import Weights
from loriner.adapters.pool import Pool
from loriner.adapters.store import Store
from loriner.config import MIB, EngineConfig
from loriner.core import SamplingParams
from loriner.engine.device_steps import DeviceSteps, Limits, PendingStep
from loriner.engine.gpu_chooser import GpuChooser
from loriner.engine.graphs import Variant, buckets
from loriner.engine.readings import Reader, to_device
from loriner.engine.runner import Progress, longest_context
from loriner.engine.step_buffers import StepTensors, WorkLists, seats_of
from loriner.engine.step_input import Reading, Span, StepInput
from loriner.errors import ConfigError
from loriner.kernels.cuda.sampling import Sampler
from loriner.model.batch_meta import BatchMeta
from loriner.model.config import ModelConfig
from loriner.model.transformer import Transformer, layout
from loriner.model.weights import Checkpoint

logger = logging.getLogger(__name__)

RESERVE_BYTES = 512 * MIB  # for the driver, cuBLAS, graphs and the allocator's gaps


class DeviceKv(NamedTuple):
    """Keys and values of every layer, [L, blocks, ...] each as `ops.kv_shapes` says."""

    k: Tensor
    v: Tensor
    block: int
    num_blocks: int


class Shares(NamedTuple):
    """Bytes of the card."""

    kv: int
    pool: int


def bytes_left(config: EngineConfig, total: int, used: int) -> int:
    """Of what `gpu_memory_fraction` allows, beside the reserve. `used`: what is held now."""
    return int(total * config.gpu_memory_fraction) - used - RESERVE_BYTES


def share_out(config: EngineConfig, total: int, used: int, workspace: int) -> Shares:
    """One budget for everything. `used`: what the base and the driver hold now. Sizes that are set
    win. Raises ConfigError when nothing is left."""
    left = bytes_left(config, total, used) - workspace
    pool = config.pool_bytes or int(max(left - config.kv_bytes, 0) * config.pool_fraction)
    kv = config.kv_bytes or left - pool
    if kv <= 0 or pool + kv > left:
        raise ConfigError(
            f"gpu_memory_fraction: of {total / MIB:.0f} MiB, "
            f"{total * config.gpu_memory_fraction / MIB:.0f} may be used; the "
            f"base and the driver hold {used / MIB:.0f} and a step needs "
            f"{(workspace + RESERVE_BYTES) / MIB:.0f}, so {left / MIB:.0f} MiB are left for "
            f"adapters ({pool / MIB:.0f}) and the KV cache ({kv / MIB:.0f})."
        )
    return Shares(kv, pool)


def workspace_bytes(config: ModelConfig, rows: int, samples: int, *, shadow: bool) -> int:
    """An upper estimate of what one step holds at once beside weights and KV cache."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    by_row = 4 * hidden * 3 + 2 * (2 * hidden + 2 * heads + 3 * inner)
    # gate|up in bf16, where many rows go through cuBLAS
    dense = 0 if shadow else 2 * 2 * inner * hidden
    return rows * by_row + 2 * samples * config.vocab_size * 4 + dense


class CudaRunner:
    """The resident base, its KV cache and the seats of its adapters on one GPU."""

    is_async = True
    usual_step_tokens = 512
    shared_step_tokens = 512  # some ten milliseconds

    def __init__(
        self,
        config: EngineConfig,
        progress: Progress | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """`checkpoint`: instead of the one in `config.model`."""
        self._config = config
        self.device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_stream(torch.cuda.Stream(self.device))  # type: ignore[no-untyped-call]
        self.ops: Any = kernels.select("cuda")
        backend = self.ops.start(config.num_threads)
        self.checkpoint = checkpoint or Checkpoint.open(config.model)
        self.model_config = model = self.checkpoint.config
        self._images = ImageLayout(layout(model))
        wanted = config.max_model_len or model.max_context
        self.model = Transformer(self.checkpoint, self.ops, max_len=wanted, progress=progress)
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        if config.bf16_shadow:
            self._keep_bf16()
        free, total = torch.cuda.mem_get_info(self.device)
        step_tokens = config.step_tokens(self.usual_step_tokens)
        samples, shadow = config.max_sequences, config.bf16_shadow
        workspace = workspace_bytes(model, step_tokens, samples, shadow=shadow)
        shares = share_out(config, total, total - free, workspace)
        self._pool_bytes = shares.pool
        self.kv = self._make_kv(shares.kv)
        self.max_len = longest_context(config, model, self.kv.num_blocks * config.block_size)
        self.ops.configure(model, config.block_size, self.max_len, config.max_sequences)
        self._host = pinned_host(config.host_bytes)
        logger.info(
            "%s (%s): %.1f MiB of operands, %d KV blocks of %d tokens (%.1f MiB), %.1f MiB for "
            "adapters",
            torch.cuda.get_device_name(self.device),
            backend,
            self.model.num_bytes / MIB,
            self.kv.num_blocks,
            config.block_size,
            shares.kv / MIB,
            shares.pool / MIB,
        )

    def _keep_bf16(self) -> None:
        """Every linear but the LM head, which more rows are never asked of. Raises ConfigError."""
        operands = [operand for name, operand in self.model.products if name != "logits"]
        wanted = sum(2 * operand.outputs * operand.inputs for operand in operands)
        free, total = torch.cuda.mem_get_info(self.device)
        left = bytes_left(self._config, total, total - free)
        if wanted > left:
            raise ConfigError(
                f"bf16_shadow: the base's linears take {wanted / MIB:.0f} MiB in bf16, and of what"
                f" gpu_memory_fraction allows {max(left, 0) / MIB:.0f} are left."
            )
        kept = sum(map(self.ops.keep_bf16, operands))
        logger.info("%.1f MiB of linears kept in bf16 for long prompts", kept / MIB)

    @property
    def num_blocks(self) -> int:
        return self.kv.num_blocks

    @property
    def operand_bytes(self) -> int:
        return self.model.num_bytes

    def make_pool(self, max_seats: int, on_copied: Callable[[], None]) -> Pool:
        """Makes the seats and captures the graphs that read them: once."""
        seats = cuda_seats(
            self._images,
            self._pool_bytes,
            max_seats,
            on_copied,
            self.device,
            self.ops.tile_seat,
        )
        self.pool = Pool(seats, max_seats)
        computation = GpuComputation(self, seats)
        eos_ids = self.model_config.eos_token_ids
        sampler = Sampler(self.ops.device, self.model_config.vocab_size, self._config.max_sequences)
        chooser = GpuChooser(sampler, eos_ids)
        config = self._config
        step_tokens = config.step_tokens(self.usual_step_tokens)
        limits = Limits(step_tokens, config.max_sequences, self.max_len, config.block_size)
        self._steps = DeviceSteps(
            computation, chooser, limits, self.device, self.pool.seat_id, eos_ids
        )
        self._compile(limits)
        self._steps.capture()
        return self.pool

    def _compile(self, limits: Limits) -> None:
        begin = time.monotonic()
        rows = [*buckets(limits.rows), limits.sequences]
        self.ops.compile_ahead(self.model.products, rows, self.model_config.hidden_act)
        logger.info("kernels compiled, or found in the cache, in %.1f s", time.monotonic() - begin)

    def pack(self, adapter: Adapter) -> Weights:
        return pack_image(adapter, self._images, self._host.allocate)

    def source(self, store: Store) -> Callable[[str], Weights]:
        of_file = ImageSource(store, self.model_config.modules(), self._images, self._host.allocate)

        def read(generation: str) -> Weights:
            if mixture.is_mixture(generation):
                return self.pack(mixture.load(generation, store.load))
            return of_file(generation)

        return read

    def needs_host(self, params: SamplingParams) -> bool:
        # The GPU keeps no count of a sequence's tokens, and masks of grammars overwrite the logits
        # that log-probabilities are of.
        return params.looks_back or (params.grammar is not None and params.logprobs is not None)

    def launch(self, step: StepInput) -> PendingStep:
        pending = self._steps.launch(step)
        self.pool.note_launch(pending.event)
        return pending

    def run_again(self) -> None:
        """What the device did for the last launch, once more: for whoever measures it."""
        self._steps.run_again()

    def check(self) -> None:
        """After a CUDA error nothing on the device can be trusted or used: this raises it again."""
        torch.cuda.synchronize(self.device)

    def _make_kv(self, num_bytes: int) -> DeviceKv:
        block = self._config.block_size
        shapes = self.ops.kv_shapes(self.model_config, 1, block)
        one = sum(torch.Size(shape).numel() for shape in shapes) * 2  # bf16
        num_blocks = num_bytes // one
        k, v = (
            torch.zeros(shape, dtype=torch.bfloat16, device=self.device)
            for shape in self.ops.kv_shapes(self.model_config, num_blocks, block)
        )
        return DeviceKv(k, v, block, num_blocks)


class GpuComputation:
    """A step's static tensors -> `BatchMeta` -> the model -> logits."""

    def __init__(self, runner: CudaRunner, seats: DeviceSeats) -> None:
        self._model, self._kv, self._ops = runner.model, runner.kv, runner.ops
        self._table, self._seat_of = seats.table, runner.pool.seat_id

    def max_items(self, rows: int, sequences: int) -> tuple[int, int]:
        attn_items, tile_items = self._ops.max_work_items(rows, sequences)
        return int(attn_items), int(tile_items)

    def work_lists(self, step: StepInput) -> WorkLists:
        return WorkLists(*self._ops.work_lists(step.q_start, step.context))

    def reader(self, readings: Seq[Reading]) -> Reader:
        return Reader(self._model, readings, self._lora_of)

    def _lora_of(self, generation: str, num_rows: int) -> Any:
        seats = seats_of((Span(0, num_rows, generation),), [self._seat_of(generation)])
        count = np.array([len(seats.items)], np.int32)
        rows, items, used = (to_device(values, self._table.device) for values in (*seats, count))
        return self._ops.seat_lora(self._table, rows, items, used)

    def forward(
        self,
        step: StepTensors,
        token_ids: Tensor,
        variant: Variant,
        reader: Reader | None = None,
    ) -> Tensor:
        lora = sample_lora = None
        if variant.has_lora:
            lora = self._ops.seat_lora(
                self._table, step.row_seat, step.lora_items, step.num_lora_items
            )
            sample_lora = self._ops.seat_lora(
                self._table, step.sample_seat, step.sample_items, step.num_sample_items
            )
        batch = BatchMeta(
            token_ids=token_ids,
            positions=step.positions,
            slots=step.slots,
            attention=self._ops.attention_plan(step, variant.has_tiles),
            lora=lora,
            sample_rows=step.sample_rows,
            sample_lora=sample_lora,
            reader=reader,
        )
        logits: Tensor = self._model(batch, self._kv)  # type: ignore[arg-type]
        return logits
