"""The engine's own process as its parent sees it: started, fed, watched, started again.

Knows the messages and nothing of what the child does with them. When the child dies the reader sees
the end of the stream; when it hangs, silence. Invariant: each submitted request's stream ends, with
an error if the engine is lost.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from loriner.config import EngineConfig
from loriner.core import Event
from loriner.engine.messages import (
    HEAD,
    MAX_FRAME_BYTES,
    Events,
    FromEngine,
    Probe,
    Ready,
    Start,
    Stats,
    ToEngine,
    frame,
)
from loriner.engine.snapshots import Latest
from loriner.engine.stats import EngineStats

logger = logging.getLogger(__name__)

RESTART_DELAYS_S = (0.1, 1.0, 2.0, 5.0, 10.0, 30.0)
HEALTHY_AFTER_S = 60.0  # a process that lived this long starts the delays anew
WATCHDOG_TICKS = 10  # in the time that an answer may take
REAP_S = 10.0  # a killed process ends in that time, unless a driver holds it


def _child_environment() -> dict[str, str]:
    """OpenMP threads that spin while they wait make a busy machine up to 15 times slower; ours
    sleep."""
    return {"OMP_WAIT_POLICY": "passive", **os.environ}


def _spawn(command: list[str], channel: socket.socket) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, pass_fds=[channel.fileno()], start_new_session=True, env=_child_environment()
    )


class EngineProcess:
    """The parent's side: starts the child, feeds it, sorts its events, restarts it when it dies or
    does not answer for `watchdog_s` seconds (0: it may take for ever)."""

    def __init__(self, config: EngineConfig, store: Path, watchdog_s: float) -> None:
        self.config, self.store = config, store
        self._watchdog_s = watchdog_s
        self._num_heard = 0  # messages
        self.state = "starting"  # ready | restarting | failed | stopped
        self.failure: str | None = None  # why the state is failed
        self.num_restarts = 0
        self.max_model_len = 0
        self.load_s = 0.0
        self.on_event: Callable[[Event], None] = lambda event: None
        self.on_down: Callable[[], None] = lambda: None
        self.on_ready: Callable[[], None] = lambda: None
        self._latest = Latest()
        self._child: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child else None

    @property
    def stats(self) -> EngineStats:
        return self._latest.stats

    def start(self) -> None:
        """Start the child and keep it running until `stop`."""
        self._keeper = asyncio.create_task(self._keep_running())

    async def wait_until_ready(self) -> None:
        while self.state == "starting":
            self._changed.clear()
            await self._changed.wait()

    def send(self, message: ToEngine) -> None:
        """Send to the child; dropped when it is down, because its streams have been told."""
        if self._writer is not None:
            self._writer.write(frame(message))

    async def stop(self) -> None:
        """End the child and the watch over it."""
        self._set("stopped")
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        await self._reap()

    async def _keep_running(self) -> None:
        failures = 0
        while self.state != "stopped":
            started = time.monotonic()
            ran = False
            try:
                ran = await self._run_once()
            except Exception:
                logger.exception("the watch over the engine process failed")
            if self.state == "failed":
                return
            failures = 0 if time.monotonic() - started > HEALTHY_AFTER_S else failures + 1
            if not ran and failures >= len(RESTART_DELAYS_S):
                self.failure = "the engine process does not start; its log says why"
                self._set("failed")
                return
            self._set("restarting")
            self.num_restarts += 1
            delay = RESTART_DELAYS_S[min(failures, len(RESTART_DELAYS_S)) - 1] if failures else 0
            logger.error("the engine process ended; restarting in %.1f s", delay)
            await asyncio.sleep(delay)

    async def _run_once(self) -> bool:
        """One life of the child; says whether it ever became ready."""
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "loriner.engine.worker", str(theirs.fileno())]
        try:
            self._child = await asyncio.to_thread(_spawn, command, theirs)
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=1 << 20)
        self.send(Start(self.config, self.store))
        tasks = [asyncio.create_task(self._read(reader))]
        tasks += [asyncio.create_task(self._watch())] if self._watchdog_s else []
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            became_ready = self.state == "ready"
            self._writer.close()
            self._writer = None
            if became_ready:
                self._set("restarting")
            if self.state != "stopped":  # before it is reaped: what hangs in a driver ends late
                self.on_down()
            await self._reap()
        return became_ready

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while True:
            try:
                (size,) = HEAD.unpack(await reader.readexactly(HEAD.size))
                if size > MAX_FRAME_BYTES:
                    raise ConnectionError(f"a frame of {size} bytes")
                self._handle(self._decoder.decode(await reader.readexactly(size)))
                self._num_heard += 1
            except (asyncio.IncompleteReadError, ConnectionError, msgspec.DecodeError):
                return

    async def _watch(self) -> None:
        """Ends when the child has not answered for `watchdog_s`. Ticks are counted, that what holds
        up this process alone is one tick of silence, however long."""
        ticks = 0
        while True:
            heard = self._num_heard
            await asyncio.sleep(self._watchdog_s / WATCHDOG_TICKS)
            ticks = ticks + 1 if self.state == "ready" and self._num_heard == heard else 0
            if ticks == 1:
                self.send(Probe())
            elif ticks > WATCHDOG_TICKS:
                logger.critical("the engine has not answered for %g s", self._watchdog_s)
                return

    def _handle(self, message: FromEngine) -> None:
        if isinstance(message, Events):
            for event in message.events:
                self.on_event(event)
        elif isinstance(message, Stats):
            self._latest.learn(message.stats)
        elif isinstance(message, Ready):
            self.max_model_len, self.load_s = message.max_model_len, message.load_s
            self._set("ready")
            self.on_ready()
        else:
            self.failure = message.message
            self._set("failed")

    async def _reap(self) -> None:
        """End the child, which holds the GPU's memory; a server that stops waits `REAP_S` for it at
        most."""
        if self._child is None:
            return
        if self._child.poll() is None:
            self._child.kill()
        deadline = time.monotonic() + REAP_S
        while self._child.poll() is None:
            if self.state == "stopped" and time.monotonic() > deadline:
                logger.error("the engine process %d does not end", self._child.pid)
                break
            await asyncio.sleep(0.01)
        self._child = None
        self._latest = Latest()

    def _set(self, state: str) -> None:
        if self.state != "stopped":
            self.state = state
        self._changed.set()
