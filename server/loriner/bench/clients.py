"""Client processes that stream at once: shares of the streams, and their answers on one clock."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loriner.errors import LorinerError

SCRIPT = Path(__file__).resolve().parent / "sse_client.py"
TIMEOUT_S = 540.0
START_S = 1.0  # for the processes to be there


class ClientFailedError(LorinerError):
    """A stream did not end well; the message is the last line of its process."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer."""

    turn: int  # of its stream, from 0
    first: float  # seconds from its request to its first token
    tokens: tuple[float, ...]  # when each came, monotonic seconds


def stream(
    port: int, streams: Sequence[Sequence[Mapping[str, object]]], num_clients: int
) -> list[Answer]:
    """Send the bodies of each stream one after another, all streams at once.

    Raises ClientFailedError.
    """
    num_clients = min(num_clients, len(streams))
    start_at = time.monotonic() + START_S
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clients = []
        for i in range(num_clients):
            job = {"port": port, "start_at": start_at, "streams": streams[i::num_clients]}
            (folder / f"job-{i}").write_text(json.dumps(job))
            command = [sys.executable, "-S", "-P", str(SCRIPT)]
            command += [str(folder / f"job-{i}"), str(folder / f"out-{i}")]
            clients.append(
                subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            )
        try:
            for client in clients:
                _, stderr = client.communicate(timeout=TIMEOUT_S)
                if client.returncode != 0:
                    last = stderr.decode(errors="replace").strip().splitlines()[-1:]
                    raise ClientFailedError(last[0] if last else "a client failed")
        finally:
            for client in clients:
                if client.poll() is None:
                    client.kill()
                    client.wait()
        return [a for i in range(num_clients) for a in _answers(folder / f"out-{i}")]


def _answers(file: Path) -> list[Answer]:
    return [
        Answer(turn, answer["tokens"][0] - answer["start"], tuple(answer["tokens"]))
        for turns in json.loads(file.read_text())
        for turn, answer in enumerate(turns)
    ]
