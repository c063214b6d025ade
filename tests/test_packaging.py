"""The package as a stranger meets it: metadata, pins, licence, and what a bare import costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import loriner

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = {
    name.lower().replace("_", "-"): version
    for name, version in re.findall(
        r"^([\w.-]+)==(\S+)$", (ROOT / "deploy" / "constraints.txt").read_text(), re.MULTILINE
    )
}
SHELL_SCRIPTS = ("deploy/venv.sh", "deploy/quickstart.sh", "tests/run.sh", ".ci/run")


def requirements_of(extra: str) -> list[str]:
    extras = PROJECT["project"]["optional-dependencies"]
    return [line for line in extras[extra] if not line.startswith("loriner[")]


@pytest.mark.parametrize("extra", ["server", "compiler", "train", "dev"])
def test_every_requirement_of_an_extra_is_pinned(extra: str) -> None:
    names = [re.split(r"[<>=!~\[; ]", line)[0] for line in requirements_of(extra)]

    assert [name for name in names if name.lower() not in PINS] == []


def test_torch_is_pinned_without_a_local_tag_inside_the_supported_range() -> None:
    assert PINS["torch"] == "2.13.0"
    assert "torch>=2.11,<3" in requirements_of("server")


def test_a_bare_install_is_the_client_and_needs_no_torch() -> None:
    bare = [re.split(r"[<>=]", line)[0] for line in PROJECT["project"]["dependencies"]]

    assert bare == ["googleapis-common-protos", "grpcio", "httpx", "protobuf"]
    assert [name for name in bare if name.lower() not in PINS] == []


def test_version_has_one_source() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", loriner.__version__)


def test_licence_is_the_whole_apache_2_0_text() -> None:
    text = (ROOT / "LICENSE").read_text()

    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_no_syntax_newer_than_the_oldest_supported_python() -> None:
    for path in (ROOT / "server").rglob("*.py"):
        ast.parse(path.read_text(), filename=str(path), feature_version=(3, 11))


@pytest.mark.parametrize("module", ["loriner", "loriner.core", "loriner.config", "loriner.bench"])
def test_light_modules_import_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("script", SHELL_SCRIPTS)
def test_shell_scripts_parse(script: str) -> None:
    assert subprocess.run(["bash", "-n", ROOT / script]).returncode == 0


def test_set_up_names_the_pythons_it_looked_for_when_none_will_do() -> None:
    command = "source deploy/venv.sh; PYTHON=/no/such/python; find_python"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 1
    assert "no Python >= 3.11 found" in done.stderr
    assert "/no/such/python" in done.stderr


def test_set_up_with_a_fresh_stamp_installs_nothing(tmp_path: Path) -> None:
    """A second quickstart does not call pip, so it starts at once and works without a network."""
    bin_dir = tmp_path / ".venv" / "bin"
    bin_dir.mkdir(parents=True)
    (bin_dir / "python").write_text(
        f'#!/bin/sh\ncase "$*" in *install*) exit 9;; esac\nexec {sys.executable} "$@"\n'
    )
    (bin_dir / "python").chmod(0o755)
    (tmp_path / "deploy").mkdir()
    for name in ("pyproject.toml", "deploy/constraints.txt", "deploy/venv.sh"):
        (tmp_path / name).write_text((ROOT / name).read_text())

    def ensure(extra: str) -> int:
        command = ["bash", "-c", f"source deploy/venv.sh; ensure_venv {extra}"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True).returncode

    assert ensure("server") == 1  # no stamp: pip is called, and fails here
    digest = "cat pyproject.toml deploy/constraints.txt | sha256sum | cut -d' ' -f1 >"
    subprocess.run(["bash", "-c", f"{digest} .venv/.loriner-dev"], cwd=tmp_path, check=True)
    assert ensure("server") == 0
    assert ensure("dev") == 0
    (tmp_path / "deploy" / "constraints.txt").write_text("torch==2.12.0\n")
    assert ensure("server") == 1
