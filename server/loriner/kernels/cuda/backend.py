"""The surface of `reference.py` on a GPU: allocates outputs and launches; the model calls nothing
else.

bf16 activations, f32 residual stream, bf16 keys and values. Everything here can be captured in a
graph: sizes that change from step to step are read on the device. Up to `MAX_FUSED_ROWS` rows a
row's result does not depend on the others; beyond, cuBLAS multiplies dequantised weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from loriner.kernels.cuda import attention
from loriner.kernels.cuda import linear as linears
from loriner.kernels.cuda.attention import Attention
from loriner.kernels.cuda.launch import Device
from loriner.kernels.cuda.many_rows import MAX_FUSED_ROWS, ManyRows
from loriner.kernels.cuda.params import Operand
from loriner.kernels.cuda.seats import LoraCall, SeatLora, Seats
from loriner.kernels.operands import Nf4

EPILOGUES = {
    "linear": linears.STORE,
    "linear_add": linears.ADD,
    "linear_gated": linears.GATED,
    "logits": linears.LOGITS,
}
Ints = np.typing.NDArray[np.int32]


class Rotation(NamedTuple):
    """Angles by position, and the rows' positions."""

    cos: Tensor  # [max_len, D/2] f32
    sin: Tensor  # [max_len, D/2] f32
    positions: Tensor  # [R] i32


class AttentionPlan(NamedTuple):
    """Which keys each row sees; all on the device, i32. Lists are `attention.py`'s."""

    q_start: Tensor  # [S + 1]
    context: Tensor  # [S]
    block_table: Tensor  # [S, W]
    attn_items: Tensor  # [.., 8]
    num_attn_items: Tensor  # [1]
    tile_items: Tensor | None  # [.., 2]; None: every sequence has one row
    num_tile_items: Tensor  # [1]


class CudaKernels:
    """One GPU's kernels for one model."""

    def __init__(self, index: int = 0) -> None:
        self.device = Device(index)
        self.place = self.device.torch_device
        self.linears = linears.Linears(self.device)
        self._attention: Attention | None = None
        self.many_rows = ManyRows(self.device)
        self.seats = Seats(self.many_rows.lora)
        norm = self.device.module("norm.cu")
        self._embed, self._norm = norm.kernel("embed"), norm.kernel("rms_norm")

    def start(self, num_threads: int) -> str:
        return f"CUDA kernels for {self.device.arch}"

    # ---- operands, made at load ----

    def prepare_nf4(
        self, parts: Sequence[Nf4], bias: Tensor | None, *, gated: bool = False
    ) -> Operand:
        return self.linears.prepare_nf4(parts, bias, gated=gated)

    def prepare_dense(
        self, weights: Sequence[Tensor], bias: Tensor | None, *, gated: bool = False
    ) -> Operand:
        return self.linears.prepare_dense(weights, bias, gated=gated)

    def compile_ahead(
        self, products: Iterable[tuple[str, Operand]], rows: Sequence[int], act: str
    ) -> None:
        """Compile what steps of so many rows launch for these operands, by the name of the method
        that multiplies by each."""
        few, uses = [count for count in rows if count <= MAX_FUSED_ROWS], []
        for name, operand in products:
            epilogue = EPILOGUES[name]
            use = linears.Use(operand, epilogue, epilogue == linears.GATED and act != "silu")
            uses.append((use, rows if epilogue == linears.LOGITS else few))
        self.device.compile_ahead(linears.SOURCE, self.linears.variants(uses))

    def keep_bf16(self, operand: Operand) -> int:
        """Keep its weight in bf16, too, for more rows than `MAX_FUSED_ROWS`. Returns the bytes."""
        return self.many_rows.keep_bf16(operand)

    def prepare_norm(self, weight: Tensor) -> Tensor:
        return weight.float().to(self.place)

    def prepare_embedding(self, weight: Tensor) -> Tensor:
        return weight.to(self.place).bfloat16().contiguous()

    def prepare_rope(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        half = cos.shape[1] // 2
        tables = (cos[:, :half].contiguous(), sin[:, half:].contiguous())
        return tables[0].to(self.place), tables[1].to(self.place)

    def nbytes(self, operand: Operand) -> int:
        return operand.num_bytes

    def kv_shapes(self, config: Any, num_blocks: int, block: int) -> tuple[tuple[int, ...], ...]:
        """Of keys and of values, over all layers."""
        shape = (config.num_layers, num_blocks, config.num_kv_heads, block, config.head_dim)
        return shape, shape

    # ---- work lists, made for each step on the host ----

    def configure(self, config: Any, block: int, max_len: int, max_sequences: int) -> None:
        """Fix the shapes of attention. Before the first step."""
        self._max_len = max_len
        self._attention = Attention(
            self.device,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            block_size=block,
            max_chunks=attention.max_chunks(max_sequences, max_len),
        )

    @property
    def attention(self) -> Attention:
        assert self._attention is not None, "configure comes first"
        return self._attention

    def max_work_items(self, rows: int, sequences: int) -> tuple[int, int]:
        """Longest decode and prefill list of a step of this size."""
        tokens = self.attention.tile_tokens
        decode = attention.max_decode_items(sequences)
        return decode, max(1, attention.max_prefill_items(rows, sequences, tokens))

    def work_lists(self, q_start: Ints, context: Ints) -> tuple[Ints, Ints]:
        tiles = attention.prefill_items(q_start, context, self.attention.tile_tokens)
        return attention.decode_items(q_start, context), tiles

    def seat_lora(
        self, table: Tensor, row_seat: Tensor, items: Tensor, num_items: Tensor
    ) -> SeatLora:
        """Call it in the step that uses it, before its linears: it plans them."""
        return self.seats.plan(table, row_seat, items, num_items)

    def tile_seat(self, entries: Tensor) -> None:
        """Put B of the adapter with this row [G, 96] of the seat table in tiles."""
        self.seats.tile(entries)

    # ---- the step ----

    def embed(self, token_ids: Tensor, table: Tensor) -> Tensor:
        h = torch.empty(len(token_ids), table.shape[1], dtype=torch.float32, device=self.place)
        self._embed(len(token_ids), 128, h, token_ids, table, table.shape[1], table.shape[0])
        return h

    def lora_embed_add(self, h: Tensor, token_ids: Tensor, call: LoraCall) -> None:
        self.seats.embed(h, token_ids, call)

    def rms_norm(self, h: Tensor, weight: Tensor, eps: float, rows: Tensor | None = None) -> Tensor:
        """bf16; of the given rows of `h`, or of all."""
        count = len(h) if rows is None else len(rows)
        x = torch.empty(count, h.shape[1], dtype=torch.bfloat16, device=self.place)
        self._norm(count, 256, x, h, weight, rows, h.shape[1], eps)
        return x

    def linear(self, x: Tensor, operand: Operand, call: LoraCall | None = None) -> Tensor:
        y = torch.empty(len(x), operand.outputs, dtype=torch.bfloat16, device=self.place)
        self._run(x, operand, y, linears.STORE, call)
        return y

    def linear_add(
        self, h: Tensor, x: Tensor, operand: Operand, call: LoraCall | None = None
    ) -> Tensor:
        self._run(x, operand, h, linears.ADD, call)
        return h

    def linear_gated(self, x: Tensor, operand: Operand, call: LoraCall | None, act: str) -> Tensor:
        y = torch.empty(len(x), operand.outputs // 2, dtype=torch.bfloat16, device=self.place)
        self._run(x, operand, y, linears.GATED, call, is_gelu=act != "silu")
        return y

    def logits(self, x: Tensor, operand: Operand, call: LoraCall | None = None) -> Tensor:
        y = torch.empty(len(x), operand.outputs, dtype=torch.float32, device=self.place)
        self._run(x, operand, y, linears.LOGITS, call)
        return y

    def rotation(self, tables: tuple[Tensor, Tensor], positions: Tensor) -> Rotation:
        return Rotation(*tables, positions)

    def rope_store(
        self,
        qkv: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
        rotation: Rotation,
        slots: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
    ) -> Tensor:
        q_norm, k_norm = norms or (None, None)
        cos, sin, positions = rotation
        caches = (k_cache, v_cache)
        self.attention.rope_store(qkv, positions, slots, cos, sin, *caches, q_norm, k_norm, eps)
        return qkv

    def paged_attention(
        self, q: Tensor, k_cache: Tensor, v_cache: Tensor, plan: AttentionPlan, scale: float
    ) -> Tensor:
        kernel = self.attention
        assert scale == kernel.head_dim**-0.5, "the scale that the kernels were made for"
        width = kernel.num_heads * kernel.head_dim
        out = torch.empty(len(q), width, dtype=torch.bfloat16, device=self.place)
        table = plan.block_table
        caches = (q, k_cache, v_cache)
        kernel.decode(*caches, plan.attn_items, plan.num_attn_items, table, out)
        if plan.tile_items is not None:
            tiles = (plan.tile_items, plan.num_tile_items)
            kernel.prefill(*caches, *tiles, plan.q_start, plan.context, table, out)
        return out

    def attention_plan(self, step: Any, has_tiles: bool) -> AttentionPlan:
        return AttentionPlan(
            step.q_start,
            step.context,
            step.block_table,
            step.attn_items,
            step.num_attn_items,
            step.tile_items if has_tiles else None,
            step.num_tile_items,
        )

    def _run(
        self,
        x: Tensor,
        operand: Operand,
        y: Tensor,
        epilogue: int,
        call: LoraCall | None,
        *,
        is_gelu: bool = False,
    ) -> None:
        adapters = None if call is None else call.adapters
        if len(x) <= MAX_FUSED_ROWS or epilogue == linears.LOGITS:
            self.linears.run(x, operand, y, epilogue, adapters, is_gelu=is_gelu)
        else:
            self.many_rows.run(x, operand, y, epilogue, adapters, is_gelu=is_gelu)
