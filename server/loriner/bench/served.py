"""`loriner serve` from outside: one for a benchmark; seconds to /ready, and the memory it holds."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from loriner.bench.machine import resident_mib
from loriner.errors import LorinerError

TIMEOUT_S = 120.0
READY_S = 540.0  # of a large base


class ServeFailedError(LorinerError):
    """The server did not become ready."""


@dataclass(frozen=True, slots=True)
class Served:
    """What a start of the server cost. Memory is PSS of all its processes, MiB."""

    start_s: float
    ready_mib: float
    used_mib: float  # after one answer


def measure_serve(model: Path, threads: int) -> Served:
    """Start the server on a free port with an empty store, wait, ask once, stop it."""
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "log"), "w+b") as log:
        port = free_port()
        command = [sys.executable, "-m", "loriner", "serve", "--model", str(model)]
        command += ["--port", str(port), "--store", str(Path(folder, "store"))]
        command += ["--num-threads", str(threads)]
        start = time.perf_counter()
        server = subprocess.Popen(command, stdout=log, stderr=log, env=dict(os.environ))
        try:
            url = f"http://127.0.0.1:{port}"
            wait_ready(server, url, Path(folder, "log"))
            seconds = time.perf_counter() - start
            ready = resident_mib(server.pid)
            _ask(url)
            return Served(seconds, ready, resident_mib(server.pid))
        finally:
            stop(server)


@contextmanager
def serving(flags: Sequence[str], folder: Path) -> Iterator[int]:
    """A server that is ready; its port. Its store is `store` in `folder`, and paths in `uploads`
    there may be published."""
    port, log = free_port(), folder / "log"
    (folder / "uploads").mkdir()
    command = [sys.executable, "-m", "loriner", "serve", "--port", str(port)]
    command += ["--store", str(folder / "store"), "--adapter-root", str(folder / "uploads")]
    with log.open("wb") as out:
        server = subprocess.Popen([*command, *flags], stdout=out, stderr=out, env=dict(os.environ))
    try:
        wait_ready(server, f"http://127.0.0.1:{port}", log, READY_S)
        yield port
    except BaseException:
        sys.stderr.write(log.read_text(errors="replace")[-4000:])
        raise
    finally:
        stop(server)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def wait_ready(
    server: subprocess.Popen[bytes], url: str, log: Path, timeout_s: float = TIMEOUT_S
) -> None:
    """Until it answers. Raises ServeFailedError, with the log's last line when it has ended."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if server.poll() is not None:
            last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no message"]
            raise ServeFailedError(f"serve ended with status {server.returncode}: {last[0]}")
        if _is_ready(url):
            return
        time.sleep(0.05)
    raise ServeFailedError(f"serve was not ready after {timeout_s:.0f} s")


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=1).status_code == 200
    except httpx.HTTPError:
        return False


def _ask(url: str) -> None:
    model = httpx.get(f"{url}/v1/models", timeout=10).json()["data"][0]["id"]
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16}
    httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).raise_for_status()


def stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(20)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
