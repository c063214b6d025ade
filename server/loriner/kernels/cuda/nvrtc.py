"""CUDA C++ -> machine code, by NVRTC, which torch brings along; cached on disk.

Knows files and architectures, no device: it runs on machines without a GPU. The key of a cached
file is a hash of every source, the options, the architecture and the compiler's version.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from cuda.bindings import nvrtc

SOURCES = Path(__file__).parent / "csrc"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a")
MOST_THREADS = 16  # a compilation takes some hundred megabytes
OPTIONS = ("--std=c++17", "-default-device", "-lineinfo")

Defines = Mapping[str, int | str]


class CompileError(Exception):
    """A kernel does not compile; the message is the compiler's log."""


def compile_cubin(source: str, arch: str, defines: Defines) -> bytes:
    """Machine code of `csrc/source` for `arch`, from the cache where it is there.

    Raises CompileError with the compiler's log.
    """
    options = [f"--gpu-architecture={arch}", *OPTIONS]
    options += [f"-D{name}={value}" for name, value in sorted(defines.items())]
    key = hashlib.sha256(repr((source, options, _sources(), version())).encode()).hexdigest()
    target = cache_folder() / f"{Path(source).stem}-{arch}-{key[:24]}.cubin"
    try:
        return target.read_bytes()
    except OSError:
        cubin = _compile(source, options)
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
        file.write(cubin)
    os.replace(file.name, target)
    return cubin


def compile_all(source: str, arch: str, wanted: Iterable[Defines]) -> None:
    """`compile_cubin` of each, on all cores: from then on the cache has them."""
    with ThreadPoolExecutor(min(MOST_THREADS, len(os.sched_getaffinity(0)))) as threads:
        for _ in threads.map(partial(compile_cubin, source, arch), wanted):
            pass


@functools.cache
def version() -> tuple[int, int]:
    """NVRTC's (major, minor)."""
    _, major, minor = nvrtc.nvrtcVersion()
    return major, minor


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "loriner" / "kernels"


@functools.cache
def _sources() -> tuple[tuple[str, str], ...]:
    """Name and digest of every source: headers are few, so any change compiles all again."""
    files = sorted(p for p in SOURCES.iterdir() if p.suffix in (".cu", ".cuh"))
    return tuple((p.name, hashlib.sha256(p.read_bytes()).hexdigest()) for p in files)


def _compile(source: str, options: list[str]) -> bytes:
    headers = sorted(SOURCES.glob("*.cuh"))
    program = _checked(
        nvrtc.nvrtcCreateProgram(
            (SOURCES / source).read_bytes(),
            source.encode(),
            len(headers),
            [p.read_bytes() for p in headers],
            [p.name.encode() for p in headers],
        )
    )
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise CompileError(f"{source} for {options[0]}: {_log(program)}")
        cubin: bytes = b"\0" * _checked(nvrtc.nvrtcGetCUBINSize(program))
        _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
        return cubin
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _log(program: nvrtc.nvrtcProgram) -> str:
    log: bytes = b"\0" * _checked(nvrtc.nvrtcGetProgramLogSize(program))
    nvrtc.nvrtcGetProgramLog(program, log)
    return log.rstrip(b"\0").decode(errors="replace")


def _checked(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"NVRTC: {status.name}")
    return values[0] if values else None
