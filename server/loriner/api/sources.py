"""Where an adapter's files come from: an upload's parts or archive, or a path inside
`adapter_root`.

Works in a staging folder of the store, so on the store's own disk. Invariant: a path that resolves
outside the root is refused with the words for a path that is not there.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from loriner.adapters.intake import Limits, unpack
from loriner.adapters.names import show
from loriner.api.incoming import ARCHIVE
from loriner.errors import InvalidRequestError, PermissionDeniedError


class Sources:
    """`staging` gives an empty folder that is gone when its block ends."""

    def __init__(
        self,
        staging: Callable[[], AbstractContextManager[Path]],
        root: Path | None,
        max_bytes: int,
    ) -> None:
        self._staging = staging
        self._root = root
        self._limits = Limits(max_bytes=max_bytes)

    @contextlib.asynccontextmanager
    async def workspace(self) -> AsyncIterator[Path]:
        """A new empty folder, gone at the end whatever happened."""
        stack = contextlib.ExitStack()
        try:
            yield await asyncio.to_thread(stack.enter_context, self._staging())
        finally:
            await asyncio.shield(asyncio.to_thread(stack.close))

    def from_upload(self, folder: Path, files: Sequence[str]) -> Path:
        """The adapter's folder in what `upload.receive` left. Raises InvalidAdapterError."""
        if ARCHIVE not in files:
            return folder
        if len(files) > 1:
            raise InvalidRequestError("Send either `archive` or the files, not both.", ARCHIVE)
        return self._unpack(folder / ARCHIVE, folder)

    def from_path(self, folder: Path, path: str) -> Path:
        """The adapter that `path` names inside the root; an archive is unpacked in `folder`."""
        source = self._inside(path)
        return source if source.is_dir() else self._unpack(source, folder)

    def _inside(self, path: str) -> Path:
        if self._root is None:
            raise PermissionDeniedError(
                "Publishing from a path is off; start the server with --adapter-root."
            )
        missing = InvalidRequestError(
            f"`{show(path)}` is not a folder or archive inside the adapter root.", "path"
        )
        try:
            root = self._root.resolve(strict=True)
            source = (root / path).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            raise missing from None
        if not source.is_relative_to(root) or not (source.is_dir() or source.is_file()):
            raise missing
        return source

    def _unpack(self, archive: Path, folder: Path) -> Path:
        clean = folder / "unpacked"
        clean.mkdir()
        unpack(archive, clean, self._limits)
        return clean
