"""The machine and versions behind a figure, and how busy the cores were meanwhile. Linux."""

from __future__ import annotations

import bisect
import os
import platform
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import loriner

PRESSURE = Path("/proc/pressure/cpu")
CPUINFO = Path("/proc/cpuinfo")
VECTOR_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "sve")
PACKAGES = ("torch", "transformers", "bitsandbytes", "peft")


class PressureLog:
    """Notes how long tasks waited for a core (PSI `some`) while its `with` block runs."""

    def __init__(self, period_s: float = 0.1) -> None:
        self.period_s = period_s
        self._times: list[float] = []
        self._waited: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pressure", daemon=True)

    def __enter__(self) -> PressureLog:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def share(self, start: float, end: float) -> float:
        """Of the monotonic times [start, end], in [0, 1]: how much of it some task waited."""
        first = max(0, bisect.bisect_right(self._times, start) - 1)
        last = min(len(self._times) - 1, bisect.bisect_left(self._times, end))
        if last <= first:
            return 0.0
        elapsed = self._times[last] - self._times[first]
        return min(1.0, (self._waited[last] - self._waited[first]) / elapsed)

    def _run(self) -> None:
        while True:
            stopping = self._stop.is_set()  # asked before the sample, so that the last one is taken
            self._times.append(time.monotonic())
            self._waited.append(_some("total") / 1e6)
            if stopping:
                return
            self._stop.wait(self.period_s)


def wait_until_quiet(limit_s: float, busy_percent: float = 5.0) -> bool:
    """Wait until few tasks waited for a core in the last 10 s, at most `limit_s`; whether so."""
    deadline = time.monotonic() + limit_s
    while (busy := _some("avg10")) > busy_percent and time.monotonic() < deadline:
        time.sleep(1.0)
    return busy <= busy_percent


def describe(threads: int) -> dict[str, str]:
    """What to print beside the figures."""
    info = CPUINFO.read_text() if CPUINFO.exists() else ""
    fields = dict(_field(line) for line in info.splitlines() if ":" in line)
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "cpu": fields.get("model name", platform.machine()),
        "vector": " ".join(flag for flag in VECTOR_FLAGS if flag in flags),
        "cores": str(len(os.sched_getaffinity(0))),
        "threads": str(threads),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "python": platform.python_version(),
        **versions(),
    }


def versions() -> dict[str, str]:
    found = {"loriner": loriner.__version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Short hash of the checkout this runs from, `+` when it has changes, or "none"."""
    here = Path(loriner.__file__).parent
    hash_ = _git(here, "rev-parse", "--short=12", "HEAD")
    dirty = "+" if hash_ and _git(here, "status", "--porcelain", "--untracked-files=no") else ""
    return hash_ + dirty if hash_ else "none"


def resident_mib(pid: int) -> float:
    """Resident memory of `pid` and its descendants, shared pages counted once (PSS)."""
    total = sum(_pss_kib(member) for member in _tree(pid))
    return total / 1024


def _pss_kib(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def _tree(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = {int(c) for t in tasks for c in (t / "children").read_text().split()}
    except OSError:
        return []
    return [pid, *(member for child in children for member in _tree(child))]


def _field(line: str) -> tuple[str, str]:
    key, _, value = line.partition(":")
    return key.strip(), value.strip()


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _some(field: str) -> float:
    """`total` (microseconds) or `avg10` (percent) of the line `some`; 0 where there is none."""
    try:
        line = PRESSURE.read_text().splitlines()[0]
    except OSError:
        return 0.0
    return float(line.split(f"{field}=", 1)[1].split()[0])


def is_supported() -> bool:
    return sys.platform == "linux"
