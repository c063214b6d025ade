"""The contract: what is committed is what the .proto files say, and they keep buf's rules."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.protos.generate import ROOT, generate

BUF = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf")
RULES = json.dumps({"version": "v2", "lint": {"use": ["STANDARD"]}})


def committed() -> dict[str, bytes]:
    folder = ROOT / "loriner_proto" / "v1"
    return {path.name: path.read_bytes() for path in folder.glob("*_pb2*.py*")}


def test_the_committed_code_is_what_the_protos_say(tmp_path: Path) -> None:
    pytest.importorskip("grpc_tools", reason="needs the dev extra")
    generate(tmp_path)
    made = {path.name: path.read_bytes() for path in (tmp_path / "loriner_proto/v1").iterdir()}

    assert made == committed()


def test_every_proto_has_code_and_types_for_messages_and_services() -> None:
    wanted = {
        f"{path.stem}_{part}"
        for path in (ROOT / "loriner_proto/v1").glob("*.proto")
        for part in ("pb2.py", "pb2.pyi", "pb2_grpc.py", "pb2_grpc.pyi")
    }

    assert committed().keys() == wanted


@pytest.mark.skipif(BUF is None, reason="buf is not installed")
@pytest.mark.parametrize("check", [["lint", "--config", RULES], ["format", "-d", "--exit-code"]])
def test_the_protos_keep_bufs_standard_rules(check: list[str]) -> None:
    done = subprocess.run([str(BUF), *check], cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr
