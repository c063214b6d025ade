"""From an upload to a clean folder: the files that an adapter is made of, and no tricks.

Knows names, sizes and first bytes; what the files mean is for `formats`. Invariant: a folder it
made holds plain files with names from its own list, copied byte for byte, within the limits.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from loriner.adapters.archives import members
from loriner.adapters.header import foreign_format, listing
from loriner.adapters.names import show
from loriner.adapters.tar import CHUNK, Member, Readable
from loriner.errors import InvalidAdapterError, PayloadTooLargeError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

_KEPT = re.compile(
    r"adapter_config\.json|adapter_model\.safetensors|README\.md|loriner\w*\.json"
    r"|chat_template\.jinja|tokenizer_config\.json"
)
_CODE = re.compile(
    r".*\.(bin|pt|pth|pkl|pickle|ckpt|npy|npz|joblib|dill|h5|hdf5|keras|gguf)", re.IGNORECASE
)
_COMPONENT = re.compile(r"[^\x00-\x1f\x7f\\/:]{1,128}")
_MAX_DEPTH = 16
_MAX_REASONS = 20


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one upload."""

    max_bytes: int = 2 << 30  # all of it, unpacked
    max_members: int = 256
    max_text_bytes: int = 4 << 20  # each file but the weights


@dataclass(frozen=True, slots=True)
class Collected:
    """What was taken from an upload and what was left aside, by name."""

    kept: tuple[str, ...]
    ignored: tuple[str, ...]


def member_path(name: str) -> PurePosixPath:
    """The relative path that a member or upload part asks for. Raises InvalidAdapterError."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or len(parts) > _MAX_DEPTH:
        raise InvalidAdapterError([f"the name `{show(name)}` leads out of the folder"])
    if not all(_COMPONENT.fullmatch(part) for part in parts):
        raise InvalidAdapterError([f"the name `{show(name)}` is not a plain file name"])
    return PurePosixPath(*parts)


def is_kept(name: str) -> bool:
    """Whether a file of this name (no folder) belongs to an adapter."""
    return _KEPT.fullmatch(name) is not None


def collect(folder: Path, target: Path | None = None, limits: Limits | None = None) -> Collected:
    """Check the files directly in `folder` and, with `target`, copy those of an adapter there.

    Subfolders and harmless strangers (a tokenizer, a card) are left aside; links, devices, and
    files that may hold pickles are refused. Raises InvalidAdapterError with every reason,
    PayloadTooLargeError.
    """
    limits = limits or Limits()
    reasons: list[str] = []
    kept: list[str] = []
    ignored: list[str] = []
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name, mode in _entries(fd, limits.max_members):
            if stat.S_ISDIR(mode):
                ignored.append(show(name) + "/")
            elif fault := _fault(name, mode) or _foreign(fd, name):
                reasons.append(fault)
            else:
                (kept if is_kept(name) else ignored).append(name)
        reasons += [f"there is no {n}" for n in (CONFIG_NAME, WEIGHTS_NAME) if n not in kept]
        if reasons:
            raise InvalidAdapterError(reasons[:_MAX_REASONS])
        if target is not None:
            _copy_all(fd, kept, target, limits)
    finally:
        os.close(fd)
    return Collected(tuple(kept), tuple(show(name) for name in ignored))


def unpack(archive: Path, target: Path, limits: Limits | None = None) -> Collected:
    """Unpack the adapter in a .tar, .tar.gz or .zip into the empty folder `target`.

    The adapter may lie at the top or in one folder. Raises InvalidAdapterError with every reason
    that was found before it had to stop, or PayloadTooLargeError; `target` is then left empty.
    """
    limits = limits or Limits()
    try:
        ignored = _Unpacking(target, limits).run(archive)
        found = _lift(target)
        return Collected(found.kept, (*found.ignored, *ignored))
    except BaseException:
        _empty(target)
        raise


class _Unpacking:
    """One pass over an archive: checks every member, writes the ones that are kept."""

    def __init__(self, target: Path, limits: Limits) -> None:
        self._target = target
        self._limits = limits
        self._seen: set[PurePosixPath] = set()
        self._reasons: list[str] = []
        self._ignored: list[str] = []

    def run(self, archive: Path) -> list[str]:
        limits = self._limits
        with _reporting(self._reasons):
            for member in members(archive, limits.max_bytes, limits.max_members):
                with _reporting(self._reasons):
                    self._take(member)
                if len(self._reasons) >= _MAX_REASONS:
                    break
        if self._reasons:
            raise InvalidAdapterError(self._reasons[:_MAX_REASONS])
        return self._ignored

    def _take(self, member: Member) -> None:
        path = member_path(member.name)
        if member.kind == "folder" or not path.name:
            return
        if member.kind != "file":
            raise InvalidAdapterError([f"`{show(member.name)}` is {member.kind}"])
        if path in self._seen:
            raise InvalidAdapterError([f"`{show(member.name)}` occurs twice"])
        self._seen.add(path)
        if len(self._seen) > self._limits.max_members:
            raise InvalidAdapterError(["the archive has too many members"])
        if fault := _fault(path.name, stat.S_IFREG):
            raise InvalidAdapterError([fault])
        head = member.content.read(8)
        if kind := foreign_format(head):
            raise InvalidAdapterError([f"`{show(member.name)}` is {kind}"])
        if not is_kept(path.name) or len(path.parts) > 2:
            self._ignored.append(show(str(path)))
            return
        try:
            self._write(path, head, member.content)
        except (FileExistsError, NotADirectoryError):
            raise InvalidAdapterError([f"`{show(member.name)}` is a file and a folder"]) from None

    def _write(self, path: PurePosixPath, head: bytes, content: Readable) -> None:
        place = self._target / path
        place.parent.mkdir(exist_ok=True)
        with _creating(place) as write:
            write(head)
            _copy(content, write, path.name, self._limits, len(head))


def _lift(target: Path) -> Collected:
    """Bring the one adapter in `target` to its top and drop the rest."""
    inner = sorted(p.parent for p in target.glob(f"*/{CONFIG_NAME}"))
    if not (target / CONFIG_NAME).is_file() and len(inner) > 1:
        names = listing(folder.name for folder in inner)
        raise InvalidAdapterError([f"the archive holds more than one adapter: {names}"])
    if not (target / CONFIG_NAME).is_file() and inner:
        for loose in target.iterdir():
            if loose.is_file():
                loose.unlink()
        for file in list(inner[0].iterdir()):
            file.rename(target / file.name)
    for folder in [p for p in target.iterdir() if p.is_dir()]:
        shutil.rmtree(folder)
    return collect(target)


def _entries(fd: int, max_members: int) -> Iterator[tuple[str, int]]:
    names = sorted(os.listdir(fd))
    if len(names) > max_members:
        raise InvalidAdapterError([f"the folder has {len(names)} files, at most {max_members}"])
    for name in names:
        yield name, os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode


def _fault(name: str, mode: int) -> str | None:
    if stat.S_ISLNK(mode):
        return f"`{show(name)}` is a link"
    if not stat.S_ISREG(mode):
        return f"`{show(name)}` is not a plain file"
    if _CODE.fullmatch(name):
        return f"`{show(name)}` may hold a pickle; only safetensors are taken"
    return None


def _foreign(fd: int, name: str) -> str | None:
    with _opened(fd, name) as file:
        kind = foreign_format(file.read(8))
    return f"`{show(name)}` is {kind}" if kind else None


def _copy_all(fd: int, names: list[str], target: Path, limits: Limits) -> None:
    taken = 0
    for name in names:
        with _opened(fd, name) as file, _creating(target / name) as write:
            taken += _copy(file, write, name, limits, taken)


@contextmanager
def _opened(fd: int, name: str) -> Iterator[Readable]:
    # Non-blocking, so that a pipe put there since the check cannot hang us; it is refused below.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with open(os.open(name, flags, dir_fd=fd), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise InvalidAdapterError([f"`{show(name)}` is not a plain file"])
        yield file


@contextmanager
def _creating(path: Path) -> Iterator[Callable[[bytes], object]]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(path, flags, 0o600), "wb") as file:
        yield file.write


def _copy(
    source: Readable, write: Callable[[bytes], object], name: str, limits: Limits, taken: int
) -> int:
    """Copy all of `source` when `taken` bytes of the budget are spent. Returns the bytes copied."""
    num_bytes = 0
    text_left = None if name == WEIGHTS_NAME else limits.max_text_bytes
    while data := source.read(CHUNK):
        num_bytes += len(data)
        if taken + num_bytes > limits.max_bytes:
            raise PayloadTooLargeError(f"The adapter has more than {limits.max_bytes} bytes.")
        if text_left is not None and num_bytes > text_left:
            raise InvalidAdapterError([f"{name} has more than {text_left} bytes"])
        write(data)
    return num_bytes


@contextmanager
def _reporting(reasons: list[str]) -> Iterator[None]:
    try:
        yield
    except InvalidAdapterError as error:
        reasons.extend(error.reasons)


def _empty(folder: Path) -> None:
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
