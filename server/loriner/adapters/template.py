"""The chat template in an upload: found as transformers would find it, as text alone.

Knows no template language; whoever publishes brings a check that compiles it. Invariant: what
leaves here is at most MAX_TEMPLATE_BYTES of UTF-8, and a folder has one template or none.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from loriner.adapters.strict_json import parse_object
from loriner.errors import InvalidAdapterError

TEMPLATE_NAME = "chat_template.jinja"
TOKENIZER_NAME = "tokenizer_config.json"
MAX_TEMPLATE_BYTES = 64 << 10
MAX_TOKENIZER_BYTES = 4 << 20  # Gemma's has over a megabyte

# A template -> itself when it is the adapter's own, None when it is the base's. Raises
# InvalidAdapterError for one that does not compile.
CheckTemplate = Callable[[str], str | None]


def refuse_template(template: str) -> str | None:
    """The check of a store that was given none."""
    raise InvalidAdapterError([f"it brings a {TEMPLATE_NAME}, which cannot be checked here"])


def take_template(folder: Path, check: CheckTemplate) -> tuple[str | None, tuple[str, ...]]:
    """The adapter's own template, and the names of files that held none. The files go: what is
    kept of them is the text. Raises InvalidAdapterError."""
    names = [name for name in (TEMPLATE_NAME, TOKENIZER_NAME) if (folder / name).is_file()]
    found = _find(folder)
    for name in names:
        (folder / name).unlink()
    own = None if found is None else check(found)
    return own, tuple(names if own is None else names[1:])


def _find(folder: Path) -> str | None:
    """Of chat_template.jinja, else of tokenizer_config.json."""
    if (folder / TEMPLATE_NAME).is_file():
        data = (folder / TEMPLATE_NAME).read_bytes()
        try:
            return _bounded(data.decode(), TEMPLATE_NAME)
        except UnicodeDecodeError:
            raise InvalidAdapterError([f"{TEMPLATE_NAME} is not UTF-8"]) from None
    if not (folder / TOKENIZER_NAME).is_file():
        return None
    data = (folder / TOKENIZER_NAME).read_bytes()
    found = parse_object(data, TOKENIZER_NAME, MAX_TOKENIZER_BYTES).get("chat_template")
    if found is None:
        return None
    if not isinstance(found, str):
        raise InvalidAdapterError(
            [f"chat_template in {TOKENIZER_NAME} is not one text; several templates are not served"]
        )
    return _bounded(found, f"chat_template in {TOKENIZER_NAME}")


def _bounded(template: str, where: str) -> str | None:
    size = len(template.encode("utf-8", "surrogatepass"))
    if size > MAX_TEMPLATE_BYTES:
        raise InvalidAdapterError([f"{where} has {size} bytes, at most {MAX_TEMPLATE_BYTES}"])
    try:
        template.encode()
    except UnicodeEncodeError:
        raise InvalidAdapterError([f"{where} holds half a character"]) from None
    return template if template.strip() else None
