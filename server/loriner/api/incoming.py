"""The files of one upload, written to a folder as they arrive, whichever door they come through.

Knows which names an upload may have, not what is in the files (`adapters.intake`). Invariant: only
`ARCHIVE` and names that `intake.is_kept` knows are ever created, and never more than `max_bytes`.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import BinaryIO

from loriner.adapters.intake import WEIGHTS_NAME, Limits, is_kept
from loriner.adapters.names import show
from loriner.errors import InvalidRequestError, PayloadTooLargeError

ARCHIVE = "archive"


class Incoming:
    """Used from one thread at a time. Close it."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.names: list[str] = []
        self._max_bytes = max_bytes
        self._left = max_bytes
        self._file: BinaryIO | None = None
        self._file_left: int | None = None  # bytes; None is bounded by the whole alone

    def begin(self, name: str) -> None:
        """Start a file. Raises InvalidRequestError for a name that no adapter has, or twice."""
        if name != ARCHIVE and not is_kept(name):
            raise InvalidRequestError(
                f"The upload has a part `{show(name)}`; beside name and expected_generation it may "
                "have adapter_config.json, adapter_model.safetensors, README.md, loriner*.json, "
                "chat_template.jinja, tokenizer_config.json, or archive (.tar, .tar.gz, .zip).",
                show(name),
            )
        if name in self.names:
            raise InvalidRequestError(f"The part `{name}` is there twice.", name)
        self.names.append(name)
        self._file = (self.folder / name).open("xb")
        self._file_left = None if name in (ARCHIVE, WEIGHTS_NAME) else Limits().max_text_bytes

    @property
    def is_open(self) -> bool:
        """Whether a file was begun and not ended."""
        return self._file is not None

    def write(self, data: bytes | memoryview) -> None:
        """Add to the open file. Raises PayloadTooLargeError."""
        assert self._file is not None
        self._left -= len(data)
        if self._left < 0:
            raise PayloadTooLargeError(f"The upload is larger than {self._max_bytes} bytes.")
        if self._file_left is not None:
            self._file_left -= len(data)
            if self._file_left < 0:
                raise PayloadTooLargeError("A part other than the weights is too large.")
        self._file.write(data)

    def end(self) -> None:
        """Close the open file."""
        assert self._file is not None
        file, self._file = self._file, None
        file.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            if self._file is not None:
                self._file.close()
