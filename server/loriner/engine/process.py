"""The engine's own process and the channel to it: the only file that knows both sides.

Frames are a 4-byte length and MessagePack of the tagged structs below, over a socket pair that no
other process can open; nothing is ever unpickled. The parent holds one end: when the child dies the
parent's reader sees the end of the stream, and when the parent dies the child does, and leaves.
Invariant: each submitted request's stream ends, with an error if the engine is lost.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from loriner.config import EngineConfig
from loriner.core import EngineStats, Event, Request

logger = logging.getLogger(__name__)

MAX_FRAME_BYTES = 256 << 20
STATS_PERIOD_S = 0.25
RESTART_DELAYS_S = (0.1, 1.0, 2.0, 5.0, 10.0, 30.0)
HEALTHY_AFTER_S = 60.0  # a process that lived this long starts the delays anew


class Start(msgspec.Struct, frozen=True, tag=True):
    config: EngineConfig
    store: Path


class Submit(msgspec.Struct, frozen=True, tag=True):
    request: Request


class Abort(msgspec.Struct, frozen=True, tag=True):
    request_id: str


class Evict(msgspec.Struct, frozen=True, tag=True):
    generation: str


class Keep(msgspec.Struct, frozen=True, tag=True):
    generations: tuple[str, ...]  # all that are to stay in memory from now on


class Ready(msgspec.Struct, frozen=True, tag=True):
    max_model_len: int
    load_s: float


class Failed(msgspec.Struct, frozen=True, tag=True):
    message: str


class Events(msgspec.Struct, frozen=True, tag=True):
    events: list[Event]


class Stats(msgspec.Struct, frozen=True, tag=True):
    stats: EngineStats


ToEngine = Start | Submit | Abort | Evict | Keep
FromEngine = Ready | Failed | Events | Stats


def _encode_path(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(type(value))


def _decode_path(kind: type, value: Any) -> Any:
    return kind(value) if issubclass(kind, Path) else value


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_encode_path)


def _child_environment() -> dict[str, str]:
    """OpenMP threads that spin while they wait make a busy machine up to 15 times slower; ours
    sleep."""
    return {"OMP_WAIT_POLICY": "passive", **os.environ}


def _spawn(command: list[str], channel: socket.socket) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, pass_fds=[channel.fileno()], start_new_session=True, env=_child_environment()
    )


def _frame(message: object) -> bytes:
    body = _ENCODER.encode(message)
    return struct.pack("<I", len(body)) + body


class EngineProcess:
    """The parent's side: starts the child, feeds it, sorts its events, restarts it when it dies."""

    def __init__(self, config: EngineConfig, store: Path) -> None:
        self.config, self.store = config, store
        self.state = "starting"  # ready | restarting | failed | stopped
        self.failure: str | None = None  # why the state is failed
        self.num_restarts = 0
        self.stats = EngineStats()
        self.max_model_len = 0
        self.load_s = 0.0
        self.on_event: Callable[[Event], None] = lambda event: None
        self.on_down: Callable[[], None] = lambda: None
        self.on_ready: Callable[[], None] = lambda: None
        self._child: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)

    @property
    def pid(self) -> int | None:
        return self._child.pid if self._child else None

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
            self._writer.write(_frame(message))

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
            self.on_down()
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
            logger.error("the engine process died; restarting in %.1f s", delay)
            await asyncio.sleep(delay)

    async def _run_once(self) -> bool:
        """One life of the child; says whether it ever became ready."""
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "loriner.engine.process", str(theirs.fileno())]
        try:
            self._child = await asyncio.to_thread(_spawn, command, theirs)
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=1 << 20)
        self.send(Start(self.config, self.store))
        try:
            await self._read(reader)
        finally:
            became_ready = self.state == "ready"
            self._writer.close()
            self._writer = None
            await self._reap()
        return became_ready

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while True:
            try:
                (size,) = struct.unpack("<I", await reader.readexactly(4))
                if size > MAX_FRAME_BYTES:
                    raise ConnectionError(f"a frame of {size} bytes")
                self._handle(self._decoder.decode(await reader.readexactly(size)))
            except (asyncio.IncompleteReadError, ConnectionError, msgspec.DecodeError):
                return

    def _handle(self, message: FromEngine) -> None:
        if isinstance(message, Events):
            for event in message.events:
                self.on_event(event)
        elif isinstance(message, Stats):
            self.stats = message.stats
        elif isinstance(message, Ready):
            self.max_model_len, self.load_s = message.max_model_len, message.load_s
            self._set("ready")
            self.on_ready()
        else:
            self.failure = message.message
            self._set("failed")

    async def _reap(self) -> None:
        if self._child is None:
            return
        if self._child.poll() is None:
            self._child.kill()
        await asyncio.to_thread(self._child.wait)
        self._child = None
        self.stats = EngineStats()

    def _set(self, state: str) -> None:
        if self.state != "stopped":
            self.state = state
        self._changed.set()


class _Channel:
    """The child's side: a reader thread fills `inbox`; `send` writes from the engine's thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._file = sock.makefile("rb")
        self._decoder = msgspec.msgpack.Decoder(ToEngine, dec_hook=_decode_path)
        self.inbox: queue.SimpleQueue[ToEngine | None] = queue.SimpleQueue()  # None only wakes

    def read(self) -> ToEngine | None:
        head = self._file.read(4)
        if len(head) < 4:
            return None
        body = self._file.read(struct.unpack("<I", head)[0])
        message: ToEngine = self._decoder.decode(body)
        return message

    def read_forever(self) -> None:
        status = 1
        try:
            while (message := self.read()) is not None:
                self.inbox.put(message)
            status = 0
        finally:
            os._exit(
                status
            )  # the parent is gone, or we can't hear it: nobody wants what we'd still do

    def send(self, message: FromEngine) -> None:
        try:
            self._sock.sendall(_frame(message))
        except OSError:
            os._exit(0)


def _serve(channel: _Channel, start: Start) -> None:
    """The engine's loop: take in what came, step, publish."""
    began = time.monotonic()
    engine = _build(start, lambda: channel.inbox.put(None))
    channel.send(Stats(engine.stats()))
    channel.send(Ready(engine.runner.max_len, time.monotonic() - began))
    threading.Thread(target=channel.read_forever, name="reader", daemon=True).start()
    stats_at = 0.0
    while True:
        now = time.monotonic()
        if now - stats_at > STATS_PERIOD_S or not engine.ran:
            channel.send(Stats(engine.stats()))
            stats_at = now
        events = _take_in(engine, channel)
        events += engine.step()
        if events:
            channel.send(Events(events))


def _take_in(engine: Any, channel: _Channel) -> list[Event]:
    """Handle all waiting messages. When the last step had nothing to run, wait for one: only a
    message or a finished load, which sends one, can change that."""
    events: list[Event] = []
    wait = not engine.ran
    while wait or not channel.inbox.empty():
        message = channel.inbox.get()
        wait = False
        if isinstance(message, Submit):
            engine.submit(message.request)
        elif isinstance(message, Abort):
            events += engine.abort(message.request_id)
        elif isinstance(message, Evict):
            engine.registry.evict(message.generation)
        elif isinstance(message, Keep):
            engine.keep(message.generations)
    return events


def _build(start: Start, on_loaded: Callable[[], None]) -> Any:
    from tokenizers import Tokenizer

    from loriner.adapters.pool import pack
    from loriner.adapters.store import Store
    from loriner.engine.engine import Engine
    from loriner.engine.runner import Runner
    from loriner.model.transformer import layout

    runner = Runner(start.config)
    checkpoint, placed = runner.checkpoint, layout(runner.model_config)
    store = Store(
        start.store,
        runner.model_config.modules(),
        checkpoint.base_digest,
        base_tensor=checkpoint.dense,
    )

    def source(generation: str) -> Any:
        return pack(store.load(generation), placed, runner.dtype)

    tokenizer = Tokenizer.from_file(str(start.config.model / "tokenizer.json"))
    return Engine(start.config, runner, tokenizer, source, on_loaded)


def main() -> None:
    """Entry point of the child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when we end
    logging.basicConfig(level=logging.INFO, format="%(asctime)s engine %(levelname)s %(message)s")
    channel = _Channel(socket.socket(fileno=int(sys.argv[1])))
    start = channel.read()
    assert isinstance(start, Start)
    from loriner.errors import CheckpointError, ConfigError

    try:
        _serve(channel, start)
    except (CheckpointError, ConfigError) as error:  # trying again would not help
        channel.send(Failed(str(error)))
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
