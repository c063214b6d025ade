"""One script of this folder in a process of its own: a job as JSON in, its answer as JSON out.

A script runs beside nothing else, so its peak memory is its own. Light to import.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loriner.errors import LorinerError

HERE = Path(__file__).resolve().parent
TIMEOUT_S = 3600.0
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class WorkerError(LorinerError):
    """A process of a benchmark failed; the message ends with its last line."""


def run_script(
    script: str,
    job: Mapping[str, Any],
    *,
    python: str = sys.executable,
    timeout_s: float = TIMEOUT_S,
) -> Any:
    """What `script` answers to `job`, whose `threads` (0: all cores) hold for every library; this
    interpreter finds in it what it finds here. Raises WorkerError."""
    with tempfile.TemporaryDirectory() as folder:
        job_file, out_file = Path(folder, "job.json"), Path(folder, "out.json")
        job_file.write_text(json.dumps(job))
        command = [python, "-P", str(HERE / script), str(job_file), str(out_file)]
        run_command(command, _environ(job["threads"], is_ours=python == sys.executable), timeout_s)
        return json.loads(out_file.read_text())


def run_command(
    command: list[str], environ: Mapping[str, str], timeout_s: float = TIMEOUT_S
) -> None:
    """Run it to its end with `environ` beside the environment. Raises WorkerError."""
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **environ},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise WorkerError(str(error)) from error
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise WorkerError(f"exit status {done.returncode}: {last[0]}")


def _environ(threads: int, *, is_ours: bool) -> dict[str, str]:
    """One thread count for every library, no hub, and the packages of this interpreter."""
    environ = {"HF_HUB_OFFLINE": "1"}
    if threads:
        environ |= dict.fromkeys(THREADS, str(threads))
    if is_ours:
        environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    return environ
