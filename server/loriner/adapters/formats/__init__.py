"""Adapter formats, one file each, found by being here: `matches(folder)`, `load(folder, ...)`.

A folder is hostile input. Invariant: `load` returns an adapter of which every tensor is used and
every config key is honoured, or raises InvalidAdapterError with every reason; it runs no code from
the folder.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, cast

from torch import Tensor

from loriner.adapters.adapter import Adapter
from loriner.errors import InvalidAdapterError

Modules = Mapping[
    str, tuple[int, int]
]  # full module name -> (outputs, inputs), as the base has them
BaseTensor = Callable[[str], Tensor | None]  # "lm_head.weight" -> the base's own tensor


class Format(Protocol):
    """What a module of this package offers; one without `matches` is a part of another."""

    def matches(self, folder: Path) -> bool:
        """Whether `folder` looks like this format; says nothing about its soundness."""

    def load(
        self,
        folder: Path,
        modules: Modules,
        *,
        base_digest: str | None = None,
        base_tensor: BaseTensor | None = None,
    ) -> Adapter: ...


def load(
    folder: Path,
    modules: Modules,
    *,
    base_digest: str | None = None,
    base_tensor: BaseTensor | None = None,
) -> Adapter:
    """Read and check the adapter in `folder` against the base's module table.

    `base_digest`: an adapter that names another base is refused. `base_tensor` lets copies of base
    weights that some trainers save beside an adapter be compared and dropped; without it they are
    refused. Raises InvalidAdapterError.
    """
    for candidate in _formats():
        if candidate.matches(folder):
            return candidate.load(folder, modules, base_digest=base_digest, base_tensor=base_tensor)
    raise InvalidAdapterError(["it is no adapter folder: there is no adapter_config.json"])


def _formats() -> Iterator[Format]:
    for module in pkgutil.iter_modules(__path__):
        found = importlib.import_module(f"{__name__}.{module.name}")
        if hasattr(found, "matches"):
            yield cast(Format, found)
