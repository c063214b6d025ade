"""Locks that die with their holder: numbered bytes of one file.

Open-file-description locks (Linux, fcntl(2) F_OFD_SETLK) hold between processes and between two
stores of one process, and the kernel drops them when the holder is killed. Knows numbers, not what
they stand for. Invariant: two `Locks` on the same path never both hold one number exclusively. Must
not be used across fork(): the child would share the parent's locks.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FLOCK = struct.Struct("hhqqi4x")  # l_type, l_whence, l_start, l_len, l_pid


class Locks:
    """Shared and exclusive locks on numbers below 2**63."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def close(self) -> None:
        os.close(self._fd)

    def try_share(self, number: int) -> bool:
        """Hold `number` together with others; False when one holds it exclusively."""
        return self._set(number, fcntl.F_RDLCK)

    def try_own(self, number: int) -> bool:
        """Hold `number` alone; False when anybody else holds it."""
        return self._set(number, fcntl.F_WRLCK)

    def release(self, number: int) -> None:
        self._set(number, fcntl.F_UNLCK)

    @contextmanager
    def owning(self, number: int) -> Iterator[None]:
        """Wait until `number` is held alone."""
        self._set(number, fcntl.F_WRLCK, wait=True)
        try:
            yield
        finally:
            self.release(number)

    def _set(self, number: int, kind: int, *, wait: bool = False) -> bool:
        command = fcntl.F_OFD_SETLKW if wait else fcntl.F_OFD_SETLK
        try:
            fcntl.fcntl(self._fd, command, _FLOCK.pack(kind, os.SEEK_SET, number, 1, 0))
        except BlockingIOError:
            return False
        except PermissionError:  # EACCES: the other spelling of "held" that POSIX allows
            return False
        return True
