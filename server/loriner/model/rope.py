"""Rotary position tables: default, linear, dynamic, Llama-3 and YaRN scaling.

Source: RoFormer (arXiv 2104.09864); YaRN (arXiv 2309.00071); Llama 3.1's smoothing as published
with its configuration. The oracle is transformers' `modeling_rope_utils`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loriner.model.config import ModelConfig, RopeScaling


def tables(config: ModelConfig, max_len: int) -> tuple[Tensor, Tensor]:
    """cos and sin [max_len, D] f32 for `kernels.rope`: the first half of sin is negated."""
    inverse, factor = frequencies(config, max_len)
    angles = torch.outer(torch.arange(max_len, dtype=torch.float32), inverse)  # [max_len, D/2]
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def frequencies(config: ModelConfig, max_len: int) -> tuple[Tensor, float]:
    """Inverse frequencies [D/2] f32 and the factor on cos and sin."""
    dim, theta, scaling = config.head_dim, config.rope_theta, config.rope_scaling
    if scaling.kind == "dynamic":
        theta = _dynamic_theta(theta, dim, scaling.factor, config.max_position_embeddings, max_len)
    exponents = torch.arange(0, dim, 2, dtype=torch.float32) / dim
    inverse = 1.0 / theta**exponents
    if scaling.kind in ("default", "dynamic"):
        return inverse, 1.0
    if scaling.kind == "linear":
        return inverse / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(inverse, scaling), 1.0
    assert scaling.kind == "yarn", scaling.kind
    return _yarn(inverse, theta, dim, scaling, config.max_position_embeddings)


def _dynamic_theta(theta: float, dim: int, factor: float, trained: int, max_len: int) -> float:
    length = max(max_len, trained)
    return float(theta * ((factor * length / trained) - (factor - 1)) ** (dim / (dim - 2)))


def _llama3(inverse: Tensor, scaling: RopeScaling) -> Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    original = scaling.original_max_position_embeddings
    assert original
    wavelength = 2 * math.pi / inverse
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * inverse / scaling.factor + smooth * inverse
    scaled = torch.where(wavelength > original / low, inverse / scaling.factor, inverse)
    between = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(between, blended, scaled)


def _yarn(
    inverse: Tensor, theta: float, dim: int, scaling: RopeScaling, trained: int
) -> tuple[Tensor, float]:
    original = scaling.original_max_position_embeddings or trained

    def turns_to_dim(turns: float) -> float:
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(turns_to_dim(scaling.beta_fast)), 0)
    high = min(math.ceil(turns_to_dim(scaling.beta_slow)), dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)
    factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
    return inverse / scaling.factor * (1 - keep) + inverse * keep, factor
