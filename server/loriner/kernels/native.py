"""Compiles `csrc/cpu.c` for this very machine, once, and binds it.

The library is kept in the user's cache folder under the hash of source, compiler and processor, so
a later start takes milliseconds. Compilers tried: $CC, cc, gcc, clang, and the one in the `ziglang`
package. Knows nothing of tensors.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from ctypes import c_float, c_int, c_void_p
from functools import cache
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "csrc" / "cpu.c"
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC", "-w")
LIBRARIES = ("-lm", "-lpthread")
COMPILE_TIMEOUT_S = 180

PTR, INT, FLOAT = c_void_p, c_int, c_float
LORA = [PTR, PTR, INT, PTR, INT]  # segments, first_chunk, num_segments, z, z_stride
SIGNATURES: dict[str, list[type]] = {
    "loriner_nf4_linear": [*[PTR] * 7, INT, INT, INT, *LORA],
    "loriner_bf16_linear": [*[PTR] * 5, INT, INT, INT, *LORA],
    "loriner_attention": [*[PTR] * 7, *[INT] * 7, FLOAT],
    "loriner_rms_norm": [PTR, PTR, PTR, INT, INT, INT, FLOAT],
    "loriner_rope": [PTR, PTR, PTR, PTR, INT, INT, INT, INT],
    "loriner_store": [*[PTR] * 5, *[INT] * 6],
    "loriner_silu_mul": [PTR, PTR, INT, INT],
}


@cache
def library() -> ctypes.PyDLL | None:
    """The bound library, or None when this machine cannot compile it (the log says why)."""
    if sys.byteorder != "little" or os.environ.get("LORINER_NATIVE") == "0":
        return None
    for compiler in _compilers():
        try:
            return _bind(_build(compiler))
        except (OSError, subprocess.SubprocessError) as error:
            logger.warning("the CPU kernels could not be compiled with %s: %s", compiler[0], error)
    return None


def _compilers() -> list[list[str]]:
    found = [shlex.split(os.environ["CC"])] if os.environ.get("CC") else []
    found += [[path] for name in ("cc", "gcc", "clang") if (path := shutil.which(name))]
    if importlib.util.find_spec("ziglang") is not None:
        found.append([sys.executable, "-m", "ziglang", "cc"])
    return found


def _build(compiler: list[str]) -> Path:
    """Path of the compiled library; compiles when it is not in the cache."""
    key = hashlib.sha256(SOURCE.read_bytes())
    key.update(repr((compiler, FLAGS, _processor())).encode())
    target = _cache_folder() / f"cpu-{key.hexdigest()[:24]}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        command = [*compiler, *FLAGS, str(SOURCE), "-o", str(made), *LIBRARIES]
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False
        )
        if result.returncode:
            raise OSError(result.stderr.strip()[-400:] or f"exit status {result.returncode}")
        made.rename(target)
    return target


def _bind(path: Path) -> ctypes.PyDLL:
    """Bound without giving up the interpreter's lock: calls are short, and nothing waits in
    them."""
    bound = ctypes.PyDLL(str(path))
    for name, arguments in SIGNATURES.items():
        function = getattr(bound, name)
        function.argtypes, function.restype = arguments, None
    bound.loriner_start.argtypes, bound.loriner_start.restype = [c_int], c_int
    bound.loriner_lanes.argtypes, bound.loriner_lanes.restype = [], c_int
    return bound


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "loriner" / "kernels"


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
