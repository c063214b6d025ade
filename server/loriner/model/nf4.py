"""The NF4 encoder: weights -> packed nibbles and scales, bit for bit bitsandbytes 0.50 on a CPU.

Knows tensors only, no files; the decoder is `kernels.dequantize_nf4`. Sources: QLoRA (arXiv
2305.14314) for NF4, arXiv 1511.04561 for the 8-bit map of the nested scales. Invariant: the result
depends on the values alone, never on vector width or threads: `base_digest` is over these bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from loriner.kernels.operands import NESTED_BLOCK, NestedScales

BLOCK = 64  # weights that share one scale
PIECE = 1 << 16  # blocks quantised at a time, which bounds the working memory

NF4_VALUES = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True, slots=True)
class Quantized:
    """One NF4 weight as it is stored."""

    packed: Tensor  # [N*K/2] u8, element 2i in the high nibble of byte i
    absmax: Tensor | NestedScales  # [N*K/64] f32
    shape: tuple[int, int]

    def expanded(self) -> Tensor:
        """The scales [N*K/64] f32."""
        return self.absmax.expand() if isinstance(self.absmax, NestedScales) else self.absmax


def nf4_code() -> Tensor:
    """The 16 NF4 values [16] f32, ascending."""
    return torch.tensor(NF4_VALUES, dtype=torch.float32)


def quantize_nf4(weight: Tensor, *, double_quant: bool) -> Quantized:
    """Quantise `weight` [N, K] (K a multiple of 64) to NF4 in blocks of 64 along K.

    Per block: absmax = max |w|, and each w / absmax goes to the nearest NF4 value. `double_quant`
    also quantises the scales to 8 bits (`nest`).
    """
    assert weight.dim() == 2 and weight.shape[1] % BLOCK == 0, weight.shape
    blocks = weight.reshape(-1, BLOCK)
    pieces = [_encode(blocks[i : i + PIECE]) for i in range(0, len(blocks), PIECE)]
    packed, absmax = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    shape = (weight.shape[0], weight.shape[1])
    return Quantized(packed, nest(absmax) if double_quant else absmax, shape)


def _encode(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks [B, 64] -> packed [B*32] u8 and absmax [B] f32."""
    code, blocks = nf4_code(), weight.float()
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38)).unsqueeze(1)).clamp_(-1.0, 1.0)
    index = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2, out_int32=True).to(torch.uint8)
    return (index[:, ::2] << 4 | index[:, 1::2]).flatten(), absmax


def nest(absmax: Tensor) -> NestedScales:
    """Quantise scales [blocks] f32 to 8 bits around their mean, in blocks of 256.

    The offset is the exact mean rounded once to f32. bitsandbytes sums in f32, so that its last bit
    changes with the machine's vector width and threads; given the offset, all else equals it.
    """
    offset = absmax.double().mean().float()
    index, scales, code = _quantize_8bit(absmax - offset)
    return NestedScales(index, scales, code, float(offset))


def _quantize_8bit(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest value of the dynamic map, in blocks of 256, by a table of 65,536 cells on [-1, 1].

    That is how bitsandbytes' CPU code finds it, so near zero a cell is wider than the map is fine.
    The last step of the cell's number is a fused multiply-add there: float64 holds it exactly.
    """
    code = dynamic_map()
    count = values.numel()
    blocks = pad(values, (0, -count % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    scales = blocks.abs().amax(dim=1)  # [ceil(blocks / 256)]
    cells = torch.arange(65536, dtype=torch.float32) * 2 / 65535 - 1
    table = torch.bucketize(cells, (code[:-1] + code[1:]) * 0.5).to(torch.uint8)
    unit = ((blocks * (1.0 / scales).unsqueeze(1)).clamp_(-1.0, 1.0) + 1.0) * 0.5
    cell = (unit.double() * 65535 + 0.5).float().nan_to_num_().long()
    index = torch.where(scales.unsqueeze(1) > 0, table[cell.clamp_(0, 65535)], 0)
    return index.flatten()[:count], scales, code


def dynamic_map() -> Tensor:
    """The signed 8-bit dynamic map [256] f32, ascending: 7 decades of ever more steps."""
    values = [0.0, 1.0]
    for decade in range(7):
        edges = _edges(2**decade)
        means = (edges[:-1] + edges[1:]) / 2.0
        positive = (10 ** (decade - 6) * means).tolist()
        negative = (-(10 ** (decade - 6)) * means).tolist()
        values += positive + negative
    return torch.tensor(sorted(values), dtype=torch.float32)


def _edges(steps: int) -> Tensor:
    """torch.linspace(0.1, 1, steps + 1) as CPUs with fused multiply-add round it, on any CPU."""
    start, end = torch.tensor([0.1, 1.0], dtype=torch.float32)
    step = ((end - start) / steps).double()
    i = torch.arange(steps + 1)
    return torch.where(i <= (steps - 1) // 2, start + step * i, end - step * (steps - i)).float()
