"""`python -m tests.protos.generate`: write the code that the .proto files stand for beside them.

Needs the `dev` extra. Proto path and package path are one, so that no import needs rewriting.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2] / "protos"
SOURCES = sorted(path.relative_to(ROOT) for path in ROOT.glob("loriner_proto/v1/*.proto"))
FLAGS = ("--python_out", "--pyi_out", "--grpc_python_out", "--mypy_grpc_out")


def generate(target: Path) -> None:
    """Write all generated files under `target`."""
    plugin = Path(sys.executable).with_name("protoc-gen-mypy_grpc")
    subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc"),
            *(f"-I{ROOT}", f"-I{files('grpc_tools') / '_proto'}"),
            f"--plugin=protoc-gen-mypy_grpc={plugin}",
            *(f"{flag}={target}" for flag in FLAGS),
            *map(str, SOURCES),
        ],
        cwd=ROOT,
        check=True,
    )


if __name__ == "__main__":
    generate(ROOT)
