"""Which weights a request asks for: the base, or an adapter named by `adapter` or by `model`.

Order: `adapter` when it names anything, else `model` equal to the base's name, an adapter's name,
or `base:adapter`. The base's own name comes first, so that no adapter can take its place. Whether
an adapter exists is the store's word, asked once, at admission.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loriner.adapters.mixture import Mixture, Served
from loriner.adapters.names import DEFAULT_TENANT, show
from loriner.core import Scaled
from loriner.errors import (
    AdapterNotFoundError,
    InvalidRequestError,
    LorinerError,
    ModelNotFoundError,
)

BASE = "base"  # `adapter: "base"` asks for the base, as "" does
SEVERAL = "several"  # in metrics


@dataclass(frozen=True, slots=True)
class Choice:
    """`name`: the adapter as the caller wrote it, None for the base or where there are several;
    `model`: what `model` said."""

    name: str | None
    model: str | None
    by_model: bool
    parts: tuple[Scaled, ...] = ()  # several adapters, or one with a scale

    def named(self) -> tuple[Scaled, ...]:
        """All adapters that are asked for; none: the base."""
        return self.parts or (() if self.name is None else (Scaled(self.name),))

    def not_found(self, full: str = "") -> LorinerError:
        """The error for an adapter that the store does not know (of several, the one it calls
        `full`), naming the field that chose it as the caller wrote it."""
        if self.by_model:
            return ModelNotFoundError(show(self.model or ""))
        meant = [part.name for part in self.parts if full in (part.name, show(part.name))]
        meant += [part.name for part in self.parts if full.endswith(f"/{part.name}")]
        return AdapterNotFoundError(show(next(iter(meant), self.name or full)))


def choose(model: str | None, adapter: str | Sequence[Scaled] | None, base_name: str) -> Choice:
    """None means the field was left out or null. Raises ModelNotFoundError for an empty `model`,
    InvalidRequestError for an adapter that is named twice."""
    if adapter is not None and not isinstance(adapter, str):
        if len({part.name for part in adapter}) < len(adapter):
            raise InvalidRequestError("adapter names one adapter twice.", "adapter")
        return Choice(None, model, by_model=False, parts=tuple(adapter))
    if adapter is not None:
        return Choice(None if adapter in ("", BASE) else adapter, model, by_model=False)
    if model is None or model == base_name:
        return Choice(None, model, by_model=True)
    if not model:
        raise ModelNotFoundError(model)
    prefix = f"{base_name}:"
    name = model.removeprefix(prefix)
    is_base = model.startswith(prefix) and name in ("", BASE)
    return Choice(None if is_base else name, model, by_model=True)


def public_name(record: Served) -> str:
    """The name to use in `model`: short for the default tenant, else `tenant/name`. What several
    adapters serve has none: for people alone."""
    if isinstance(record, Mixture):
        return SEVERAL
    tenant, _, short = record.name.partition("/")
    return short if tenant == DEFAULT_TENANT else record.name
