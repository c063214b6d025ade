"""Several adapters as one: y += sum of scale_i * delta_i, ranks side by side, nothing merged.

A mixture's generation is a text that names its parts, so whoever loads one needs no register of
them; it is pinned, seated and keyed in the KV cache like any other. Knows no store and no device.
Invariant: the same parts with the same scales are the same text, in whatever order they were given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from loriner.adapters.adapter import Adapter, LoraWeight
from loriner.adapters.records import AdapterRecord

MARK = "mix:"
MAX_MIXED = 8
MAX_RANK = 256  # of all parts together


class Part(NamedTuple):
    """One adapter of a mixture."""

    generation: str
    scale: float


@dataclass(frozen=True, slots=True)
class Mixture:
    """What a request is served with when it names several adapters, or one with a scale."""

    records: tuple[AdapterRecord, ...]
    scales: tuple[float, ...]

    @property
    def name(self) -> str:
        """For people: `acme/a*0.5+acme/b`."""
        pairs = zip(self.records, self.scales, strict=True)
        return "+".join(r.name if s == 1.0 else f"{r.name}*{s:g}" for r, s in pairs)

    @property
    def generation(self) -> str:
        pairs = zip(self.records, self.scales, strict=True)
        return generation_of([Part(r.generation, s) for r, s in pairs])

    @property
    def has_template(self) -> bool:
        """Of several, none: the base's chat template serves them."""
        return len(self.records) == 1 and self.records[0].has_template


Served = AdapterRecord | Mixture


def generations(served: Served | None) -> tuple[str, ...]:
    """The published ones that serve; of the base, none."""
    if isinstance(served, Mixture):
        return tuple(record.generation for record in served.records)
    return () if served is None else (served.generation,)


def generation_of(parts: Sequence[Part]) -> str:
    """The digest itself where it is one adapter as it is."""
    if len(parts) == 1 and parts[0].scale == 1.0:
        return parts[0].generation
    ordered = sorted(parts)
    return MARK + ",".join(f"{part.generation}*{part.scale.hex()}" for part in ordered)


def is_mixture(generation: str) -> bool:
    return generation.startswith(MARK)


def parts_of(generation: str) -> tuple[Part, ...]:
    if not is_mixture(generation):
        return (Part(generation, 1.0),)
    return tuple(_parse(text) for text in generation.removeprefix(MARK).split(","))


def load(generation: str, load_one: Callable[[str], Adapter]) -> Adapter:
    """The adapter of this generation, its parts read by `load_one`."""
    if not is_mixture(generation):
        return load_one(generation)
    parts = [(load_one(part.generation), part.scale) for part in parts_of(generation)]
    return combine(generation, parts)


def combine(generation: str, parts: Sequence[tuple[Adapter, float]]) -> Adapter:
    """Each module has the ranks of all its parts: A stacked, B side by side, scaling in B."""
    names = sorted({name for adapter, _ in parts for name in adapter.modules})
    modules = {name: _joined(list(_weights(name, parts))) for name in names}
    return Adapter(generation, MappingProxyType(modules), parts[0][0].base_digest)


def _weights(
    name: str, parts: Sequence[tuple[Adapter, float]]
) -> Iterator[tuple[LoraWeight, float]]:
    for adapter, scale in parts:
        if (weight := adapter.modules.get(name)) is not None:
            yield weight, weight.scaling * scale


def _joined(weights: Sequence[tuple[LoraWeight, float]]) -> LoraWeight:
    """Where all scale alike the numbers stay as they are; else B takes the scales in, in f32."""
    scalings = {scaling for _, scaling in weights}
    if len(scalings) == 1:
        (scaling,) = scalings
        pairs = [(weight, 1.0) for weight, _ in weights]
    else:
        scaling, pairs = 1.0, list(weights)
    biases = [_scaled(weight.bias, own) for weight, own in pairs if weight.bias is not None]
    return LoraWeight(
        a=torch.cat([weight.a for weight, _ in pairs]),
        b=torch.cat([_scaled(weight.b, own) for weight, own in pairs], dim=1),
        bias=torch.stack(biases).sum(0) if biases else None,
        scaling=scaling,
    )


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    return tensor if scale == 1.0 else tensor.float() * scale


def _parse(text: str) -> Part:
    digest, _, scale = text.partition("*")
    return Part(digest, float.fromhex(scale))
