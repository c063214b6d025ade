"""Linears of many rows: the weight in bf16, made for the call or kept, then cuBLAS, then what the
fused kernel's end does in kernels of its own.

Beyond `MAX_FUSED_ROWS` that is quicker than reading NF4 once for every 64 rows. Here a row's result
may depend on how many rows there are: cuBLAS chooses by that. Whether a weight was kept or made for
the call changes no bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loriner.kernels.cuda import packing
from loriner.kernels.cuda.launch import Device
from loriner.kernels.cuda.linear import ADD, GATED, STORE, Adapters
from loriner.kernels.cuda.params import Operand
from loriner.kernels.cuda.tiling import KIND_BF16, MAX_RANK, MAX_STACKED_RANK

MAX_FUSED_ROWS = 256
MAX_SHRINKS = 64  # items of A x in flight in each slice: some more than an H200 holds


class ManyRows:
    """As `Linears.run`, for more rows than that is made for."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._cluster = 8 if device.capability >= (9, 0) else 1
        self.lora = device.module("lora.cu", CLUSTER=self._cluster, MAX_RANK=MAX_RANK)
        self._shrink = self.lora.kernel("lora_shrink")
        # By the address of the operand's weight, which stays as long: it, and the bf16 one.
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        finish = device.module("finish.cu")
        self._bias, self._add = finish.kernel("add_bias"), finish.kernel("add_rows")
        self._gate = finish.kernel("gate")
        self._finish = {  # by epilogue and is_gelu
            (STORE, False): finish.kernel("lora_store"),
            (ADD, False): finish.kernel("lora_add"),
            (GATED, False): finish.kernel("lora_gate_silu"),
            (GATED, True): finish.kernel("lora_gate_gelu"),
        }

    def keep_bf16(self, operand: Operand) -> int:
        """Keep the weight in bf16 from now on. Returns its bytes."""
        weight = self.dequantized(operand)
        self._kept[operand.weight.data_ptr()] = operand.weight, weight
        return weight.nbytes

    def dequantized(self, operand: Operand) -> Tensor:
        """The weight [N, K] bf16 in its own order, made anew."""
        if operand.kind == KIND_BF16:
            rows = packing.unpack_bf16(operand.weight)[:, : operand.inputs]
            return packing.deinterleave(rows[: operand.outputs], gated=operand.gated)
        place = self.device.torch_device
        out = torch.empty(operand.outputs, operand.inputs, dtype=torch.bfloat16, device=place)
        module = self.device.module("dequantize.cu", KIND=operand.kind, GATED=int(operand.gated))
        tiles, blocks = operand.weight.shape[:2]
        nested = operand.nested
        module.kernel("dequantize")(
            (-(-blocks // 8), -(-tiles // 4)),
            256,
            out,
            operand.weight,
            operand.scale,
            None if nested is None else nested.outer,
            None if nested is None else nested.offset,
            operand.values,
            tiles,
            operand.outputs,
            operand.inputs,
            blocks,
            0 if nested is None else nested.span_shift,
        )
        return out

    def run(
        self,
        x: Tensor,
        operand: Operand,
        y: Tensor,
        epilogue: int,
        adapters: Adapters | None,
        *,
        is_gelu: bool,
    ) -> None:
        """As `Linears.run`, but for LOGITS."""
        kept = self._kept.get(operand.weight.data_ptr())
        weight = self.dequantized(operand) if kept is None else kept[1]
        out = y if epilogue == STORE else None
        product = torch.matmul(x, weight.t(), out=out)
        rows, outputs = product.shape
        if operand.bias is not None:
            self._bias((-(-outputs // 256), rows), 256, product, operand.bias, outputs)
        if adapters is not None:
            self._finish_adapted(y, product, x, operand, epilogue, adapters, is_gelu=is_gelu)
        elif epilogue == GATED:
            half = outputs // 2
            self._gate((-(-half // 2048), rows), 256, y, product, half, int(is_gelu))
        elif epilogue == ADD:
            count = rows * outputs
            self._add(-(-count // 1024), 256, y, product, count)

    def _finish_adapted(
        self,
        y: Tensor,
        product: Tensor,
        x: Tensor,
        operand: Operand,
        epilogue: int,
        adapters: Adapters,
        *,
        is_gelu: bool,
    ) -> None:
        rows, inputs = x.shape
        t = torch.empty(rows, MAX_STACKED_RANK, dtype=torch.float32, device=x.device)
        seats = (adapters.seats, adapters.group, adapters.seats.shape[1])
        self._shrink(
            (self._cluster, min(len(adapters.items), MAX_SHRINKS), operand.num_slices),
            128,
            x,
            inputs,
            *seats,
            adapters.items,
            adapters.num_items,
            t,
            t.shape[1],
            cluster=self._cluster,
        )
        self._finish[epilogue, is_gelu](
            (-(-y.shape[1] // 128), -(-rows // 32)),
            128,
            y,
            product,
            rows,
            operand.outputs,
            t,
            t.shape[1],
            adapters.row_seat,
            *seats,
            *operand.slices,
        )
