"""Client processes that stream at once: shares of the streams, and their answers on one clock."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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


Streams = Sequence[Sequence[Mapping[str, object]]]


def stream(
    port: int, streams: Streams, num_clients: int, key: str = "", *, pause_s: float = 0.0
) -> list[Answer]:
    """Send the bodies of each stream one after another, all streams at once; before each a pause
    of at most `pause_s`.

    Raises ClientFailedError.
    """
    return _collect(
        {"port": port, "key": key, "pause_s": pause_s, "until": None}, streams, num_clients
    )


def stream_until(port: int, streams: Streams, num_clients: int, until: float) -> list[Answer]:
    """Streams that send their bodies over and over until that time, monotonic seconds, which breaks
    them off; the answers that had a token by then.

    Raises ClientFailedError.
    """
    return _collect({"port": port, "key": "", "pause_s": 0.0, "until": until}, streams, num_clients)


def _collect(job: Mapping[str, object], streams: Streams, num_clients: int) -> list[Answer]:
    num_clients = min(num_clients, len(streams))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with _started(folder, job, streams, num_clients) as clients:
            for client in clients:
                _, stderr = client.communicate(timeout=TIMEOUT_S)
                if client.returncode != 0:
                    raise ClientFailedError(_last_line(stderr) or "a client failed")
        return [a for i in range(num_clients) for a in _answers(folder / f"out-{i}")]


@contextmanager
def flooding(port: int, streams: Streams, num_clients: int, key: str = "") -> Iterator[None]:
    """Streams that send their bodies over and over while the block runs.

    Raises ClientFailedError when one ended before.
    """
    job = {"port": port, "key": key, "pause_s": 0.0, "until": math.inf}
    with (
        tempfile.TemporaryDirectory() as name,
        _started(Path(name), job, streams, num_clients) as clients,
    ):
        yield
        for client in clients:
            if client.poll() is not None:
                _, stderr = client.communicate()
                raise ClientFailedError(_last_line(stderr) or "a client ended too early")


@contextmanager
def _started(
    folder: Path, job: Mapping[str, object], streams: Streams, num_clients: int
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that share the streams; none is left when the block ends."""
    clients = []
    start_at = time.monotonic() + START_S
    try:
        for i in range(num_clients):
            own = {**job, "start_at": start_at, "streams": streams[i::num_clients]}
            (folder / f"job-{i}").write_text(json.dumps(own))
            command = [sys.executable, "-S", "-P", str(SCRIPT)]
            command += [str(folder / f"job-{i}"), str(folder / f"out-{i}")]
            clients.append(
                subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            )
        yield clients
    finally:
        for client in clients:
            if client.poll() is None:
                client.kill()
                client.communicate()


def _last_line(stderr: bytes) -> str:
    lines = stderr.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def _answers(file: Path) -> list[Answer]:
    return [
        Answer(turn, answer["tokens"][0] - answer["start"], tuple(answer["tokens"]))
        for turns in json.loads(file.read_text())
        for turn, answer in enumerate(turns)
    ]
