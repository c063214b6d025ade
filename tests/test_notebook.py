"""deploy/colab.ipynb, run from its first cell to its last, without Jupyter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "deploy" / "colab.ipynb"
PREFIX = """
import subprocess


def shell(line):
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    print(done.stdout, done.stderr, flush=True)
    assert done.returncode == 0, line

"""


def script() -> str:
    """The code cells as one script: `!line` becomes a call, `%pip` is left out."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    lines = "\n\n".join(code).splitlines()
    kept = [line for line in lines if not line.startswith("%pip ")]
    return PREFIX + "\n".join(re.sub(r"^!(.*)$", r"shell(f'''\1''')", line) for line in kept)


def test_its_cells_are_python_and_hold_no_outputs() -> None:
    compile(script(), "notebook", "exec")
    cells = json.loads(NOTEBOOK.read_text())["cells"]

    assert all(not cell.get("outputs") for cell in cells)


@pytest.mark.timeout(900)
def test_it_pulls_trains_serves_and_answers(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "smollm2-nf4").symlink_to(smollm2.resolve())
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "loriner"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m loriner "$@"\n')
    command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", script().replace("8000", "18734")],
        cwd=tmp_path,
        env=environment | {"LORINER_URL": "http://127.0.0.1:18734"},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "served as it was trained" in done.stdout
    assert "Arrr" in done.stdout
