"""An adapter on this machine as what an upload sends: files, pieces, digests; no transport."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from loriner_client._config import CHUNK_BYTES
from loriner_client._errors import ConfigError

Progress = Callable[[int, int], object]  # bytes sent, bytes in all

_KEPT = re.compile(
    r"adapter_config\.json|adapter_model\.safetensors|README\.md|loriner\w*\.json"
    r"|chat_template\.jinja|tokenizer_config\.json"
)


@dataclass(frozen=True, slots=True)
class Upload:
    """A PEFT folder or one .tar, .tar.gz or .zip of one, to be published as `name`."""

    name: str
    path: Path
    expected_generation: str | None = None
    progress: Progress = lambda sent, total: None

    def files(self) -> dict[str, Path]:
        """Part name -> file. Raises ConfigError when there is nothing to send."""
        if self.path.is_file():
            return {"archive": self.path}
        if not self.path.is_dir():
            raise ConfigError(f"path: {self.path} is neither a folder nor an archive.")
        found = {path.name: path for path in sorted(self.path.iterdir())}
        kept = {name: path for name, path in found.items() if _KEPT.fullmatch(name)}
        if "adapter_config.json" not in kept:
            raise ConfigError(f"path: {self.path} has no adapter_config.json.")
        return kept


@dataclass(frozen=True, slots=True)
class Begin:
    name: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class End:
    sha256: bytes


Piece = Begin | bytes | End


def pieces(upload: Upload) -> Iterator[Piece]:
    """Each file's begin, chunks and end, read once."""
    files = upload.files()
    sent, total = 0, sum(path.stat().st_size for path in files.values())
    for name, path in files.items():
        digest = hashlib.sha256()
        with path.open("rb") as file:
            yield Begin(name, path.stat().st_size)
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                yield chunk
                sent += len(chunk)
                upload.progress(sent, total)
        yield End(digest.digest())
