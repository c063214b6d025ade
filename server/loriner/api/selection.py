"""Which weights a request asks for: the base, or an adapter named by `adapter` or by `model`.

Order: `adapter` when it names anything, else `model` equal to the base's name, an adapter's name,
or `base:adapter`. The base's own name comes first, so that no adapter can take its place. Whether
an adapter exists is the store's word, asked once, at admission.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loriner.adapters.names import DEFAULT_TENANT, show
from loriner.errors import AdapterNotFoundError, LorinerError, ModelNotFoundError

if TYPE_CHECKING:
    from loriner.adapters.records import AdapterRecord

BASE = "base"  # `adapter: "base"` asks for the base, as "" does


@dataclass(frozen=True, slots=True)
class Choice:
    """`name`: the adapter as the caller wrote it, None for the base; `model`: what `model` said."""

    name: str | None
    model: str | None
    by_model: bool

    def not_found(self) -> LorinerError:
        """The error for an adapter that the store does not know, naming the field that chose it."""
        if self.by_model:
            return ModelNotFoundError(show(self.model or ""))
        return AdapterNotFoundError(show(self.name or ""))


def choose(model: str | None, adapter: str | None, base_name: str) -> Choice:
    """None means the field was left out or null. Raises ModelNotFoundError for an empty `model`."""
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


def public_name(record: AdapterRecord) -> str:
    """The name to use in `model`: short for the default tenant, else `tenant/name`."""
    tenant, _, short = record.name.partition("/")
    return short if tenant == DEFAULT_TENANT else record.name
