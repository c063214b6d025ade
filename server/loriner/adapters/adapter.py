"""One LoRA adapter on the host, in one form whatever file it came from.

Knows no file format, no name, no tenant and no device. Invariant: `generation` is the digest of
exactly the numbers in `modules`; two files with the same mathematics are the same generation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

DIGEST_DOMAIN = b"loriner adapter v1\n"
TEMPLATE_DOMAIN = b"loriner adapter with a chat template v1\n"
EMBEDDING = "embed_tokens"


@dataclass(frozen=True, slots=True)
class LoraWeight:
    """What one module adds: `y += scaling * (b @ (a @ x) + bias)`, all in the file's dtypes.

    For the token embedding `a` is [R, vocab] and the row of token t is `scaling * (b @ a[:, t])`.
    """

    a: Tensor  # [R, K]
    b: Tensor  # [N, R]
    bias: Tensor | None  # [N], scaled like b (PEFT's lora_bias)
    scaling: float  # alpha / R, or alpha / sqrt(R)

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors there are, by role."""
        roles = {"a": self.a, "b": self.b}
        return roles if self.bias is None else {**roles, "bias": self.bias}


@dataclass(frozen=True, slots=True)
class Adapter:
    """A whole adapter. `modules` is keyed by the module's full name in the Hugging Face model."""

    generation: str  # 64 hex digits
    modules: Mapping[str, LoraWeight]
    base_digest: str | None = None  # the base it says it was trained on
    base_name: str | None = None  # what its config calls that base; unreliable
    template: str | None = None  # its own chat template

    @classmethod
    def of(
        cls,
        modules: Mapping[str, LoraWeight],
        *,
        base_digest: str | None = None,
        base_name: str | None = None,
    ) -> Adapter:
        """The adapter of these weights, its generation computed from them."""
        return cls(digest_of(modules), MappingProxyType(dict(modules)), base_digest, base_name)

    def with_template(self, template: str | None) -> Adapter:
        """These weights with a chat template of their own: another generation."""
        assert self.template is None
        generation = templated(self.generation, template)
        return replace(self, generation=generation, template=template)

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for w in self.modules.values() for t in w.tensors.values())

    @property
    def ranks(self) -> tuple[int, ...]:
        """The distinct ranks, ascending."""
        return tuple(sorted({weight.rank for weight in self.modules.values()}))

    @property
    def max_rank(self) -> int:
        return self.ranks[-1]

    @property
    def targets(self) -> tuple[str, ...]:
        """Short names of the adapted modules (`q_proj`), sorted."""
        return tuple(sorted({name.rpartition(".")[2] for name in self.modules}))


def digest_of(modules: Mapping[str, LoraWeight]) -> str:
    """SHA-256, as hex, over the modules in order of their names.

    Each module is its name and scaling (C99 hex float), then for each of a, b, bias that it has:
    role, dtype, shape and bytes, little endian. Text parts end in a NUL, so no two adapters spell
    the same stream.
    """
    sha = hashlib.sha256(DIGEST_DOMAIN)
    for name in sorted(modules):
        weight = modules[name]
        sha.update(f"{name}\0{weight.scaling.hex()}\0".encode())
        for role, tensor in weight.tensors.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            sha.update(f"{role}\0{dtype}\0{tuple(tensor.shape)}\0".encode())
            sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def templated(weights: str, template: str | None) -> str:
    """The generation of weights with this digest and a chat template; without one, their digest."""
    if template is None:
        return weights
    return hashlib.sha256(TEMPLATE_DOMAIN + f"{weights}\n{template}".encode()).hexdigest()
