"""The engine's own process from inside: take in messages, step, publish.

Started by `process.py` as `python -m loriner.engine.worker FD`. When the parent dies, or can no
longer be heard, it leaves.
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec

from loriner.core import Event
from loriner.engine.messages import (
    HEAD,
    Abort,
    Events,
    Evict,
    Failed,
    FromEngine,
    Keep,
    Ready,
    Start,
    Stats,
    Submit,
    ToEngine,
    decode_path,
    frame,
)
from loriner.engine.snapshots import Snapshots

STATS_PERIOD_S = 0.25


class _Channel:
    """The child's side: a reader thread fills `inbox`; `send` writes from the engine's thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._file = sock.makefile("rb")
        self._decoder = msgspec.msgpack.Decoder(ToEngine, dec_hook=decode_path)
        self.inbox: queue.SimpleQueue[ToEngine | None] = queue.SimpleQueue()  # None only wakes

    def read(self) -> ToEngine | None:
        head = self._file.read(HEAD.size)
        if len(head) < HEAD.size:
            return None
        body = self._file.read(HEAD.unpack(head)[0])
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
            self._sock.sendall(frame(message))
        except OSError:
            os._exit(0)


def _serve(channel: _Channel, start: Start) -> None:
    """The engine's loop: take in what came, step, publish."""
    began = time.monotonic()
    engine = _build(start, lambda: channel.inbox.put(None))
    engine.guides.wait()
    snapshots = Snapshots(engine)
    channel.send(Stats(snapshots.take()))
    channel.send(Ready(engine.runner.max_len, time.monotonic() - began))
    gc.collect()
    gc.freeze()  # what is there now stays: later collections, which hold up steps, pass it over
    threading.Thread(target=channel.read_forever, name="reader", daemon=True).start()
    stats_at = 0.0
    while True:
        now = time.monotonic()
        if now - stats_at > STATS_PERIOD_S or not engine.ran:
            channel.send(Stats(snapshots.take()))
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

    from loriner.adapters.store import Store
    from loriner.engine.engine import Engine
    from loriner.engine.runner import open_runner

    runner = open_runner(start.config)
    checkpoint = runner.checkpoint
    store = Store(
        start.store,
        runner.model_config.modules(),
        checkpoint.base_digest,
        base_tensor=checkpoint.dense,
    )

    tokenizer = Tokenizer.from_file(str(start.config.model / "tokenizer.json"))
    return Engine(start.config, runner, tokenizer, runner.source(store), on_loaded)


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
