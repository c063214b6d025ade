"""Chat templates that adapters brought, compiled and rendered in a process of their own.

A template is a program by a stranger: it gets seconds and memory that are bounded, and no way back
but text. Started with the first one. Thread-safe. Invariant: a call ends within its limits, with a
text or with an error that says why.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from loriner.engine.template_child import MAX_RENDERED
from loriner.errors import EngineUnavailableError, InvalidAdapterError, InvalidRequestError

START_S = 60.0  # its library is imported
RENDER_S = 2.0
WAIT_S = 10.0  # behind others
_CHILD = "loriner.engine.template_child"


class Templates:
    """Owns the process. Close it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: tuple[subprocess.Popen[bytes], Connection] | None = None

    def compile(self, template: str) -> None:
        """Raises InvalidAdapterError with the reason when it does not compile."""
        answer = self._ask({"template": template, "messages": None})
        if reason := answer.get("reason"):
            raise InvalidAdapterError([f"its chat template does not compile: {reason}"])

    def render(
        self, template: str, messages: Sequence[Mapping[str, Any]], kwargs: Mapping[str, Any]
    ) -> str:
        """Raises InvalidRequestError with the template's own words when it refuses."""
        answer = self._ask({"template": template, "messages": messages, "kwargs": kwargs})
        if reason := answer.get("reason"):
            raise InvalidRequestError(f"The adapter's chat template refused: {reason}", "messages")
        return answer["text"]

    def close(self) -> None:
        with self._lock:
            self._end()

    def _ask(self, request: Mapping[str, Any]) -> dict[str, str]:
        if not self._lock.acquire(timeout=WAIT_S):
            raise EngineUnavailableError("Too many templates are being rendered.")
        try:
            channel = self._channel()
            channel.send_bytes(json.dumps(request).encode())
            answer = self._hear(channel, RENDER_S)
        except OSError:  # it died between two requests
            self._end()
            raise EngineUnavailableError("The template process ended.") from None
        finally:
            self._lock.release()
        return {"reason": f"it took more than {RENDER_S:g} s"} if answer is None else answer

    def _channel(self) -> Connection:
        if self._child is None:
            self._child = _start()
            if self._hear(self._child[1], START_S) is None:
                raise EngineUnavailableError("The template process did not start.")
        return self._child[1]

    def _hear(self, channel: Connection, timeout_s: float) -> dict[str, str] | None:
        """None when it took too long or died: it is ended then, and the next call starts one."""
        try:
            if channel.poll(timeout_s):
                answer: dict[str, str] = json.loads(channel.recv_bytes(8 * MAX_RENDERED))
                return answer
        except (EOFError, OSError):
            pass
        self._end()
        return None

    def _end(self) -> None:
        if self._child is not None:
            (process, channel), self._child = self._child, None
            channel.close()
            process.kill()
            process.wait()


def _start() -> tuple[subprocess.Popen[bytes], Connection]:
    """Without our settings in its environment: keys may be among them."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", _CHILD, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            env={k: v for k, v in os.environ.items() if not k.startswith("LORINER_")},
        )
    return process, Connection(ours.detach())
