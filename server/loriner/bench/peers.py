"""Who is measured, and in which environment: each engine is one worker script in its own process.

A peer whose packages are importable runs in this interpreter; another gets a virtual environment of
its own, made on demand. Invariant: a peer that cannot run is reported as missing and stops nothing.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loriner.bench.worker import run_command, run_script

HF = ("torch", "transformers", "bitsandbytes", "accelerate", "peft", "safetensors")
LLAMA_CPP = "llama-cpp-python==0.3.36"
ALL_ADAPTERS = 8


@dataclass(frozen=True, slots=True)
class Engine:
    """One worker process: a script and what to tell it beyond the common job."""

    key: str
    label: str
    script: str
    job: Mapping[str, Any]
    modules: tuple[str, ...] = ()  # what the script imports
    requirements: tuple[str, ...] = ()  # what to install where one of them is missing
    environ: Mapping[str, str] = field(default_factory=dict)  # for the installation


def hf_peer(key: str, label: str, weights: str, rows: list[int], adapters: bool = False) -> Engine:
    job = {"weights": weights, "rows": rows, "num_adapters": ALL_ADAPTERS if adapters else 0}
    return Engine(key, label, "peer_hf.py", job, HF, HF)


ENGINES = (
    Engine("loriner", "loriner NF4", "own.py", {"num_adapters": ALL_ADAPTERS}),
    hf_peer("transformers", "transformers fp32", "dense", [1, 4, 8]),
    hf_peer("bitsandbytes", "bitsandbytes NF4", "nf4", [1, 4]),
    hf_peer("peft", "PEFT on fp32", "dense", [4, 8], adapters=True),
    hf_peer("peft-nf4", "PEFT on NF4", "nf4", [4, 8], adapters=True),
    Engine(
        "llama.cpp",
        "llama.cpp Q4_1",
        "peer_llama.py",
        {"rows": [1, 4, 8], "num_adapters": 0},
        ("llama_cpp", "numpy"),
        ("cmake", "ninja", LLAMA_CPP),
        {"CMAKE_ARGS": "-DGGML_NATIVE=ON"},
    ),
)


def interpreter(engine: Engine, venvs: Path) -> Path:
    """The Python that can run `engine`, installing it under `venvs` when needed. Raises
    WorkerError when it cannot be."""
    if all(importlib.util.find_spec(module) for module in engine.modules):
        return Path(sys.executable)
    python = venvs / engine.key / "bin" / "python"
    if not python.exists():
        run_command([sys.executable, "-m", "venv", str(venvs / engine.key)], {})
    probe = "import " + ", ".join(engine.modules)
    if subprocess.run([python, "-c", probe], capture_output=True).returncode != 0:
        run_command([str(python), "-m", "pip", "install", *engine.requirements], engine.environ)
    return python


def measure(
    engine: Engine, python: Path, common: Mapping[str, Any], timeout_s: float
) -> list[dict[str, Any]]:
    """Run the worker of `engine` and return its cases. Raises WorkerError when it fails."""
    job = {**common, **engine.job}
    job["adapters"] = common["adapters"][: engine.job["num_adapters"]]
    cases: list[dict[str, Any]] = run_script(
        engine.script, job, python=str(python), timeout_s=timeout_s
    )
    return cases
