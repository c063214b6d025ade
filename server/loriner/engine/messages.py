"""What crosses between the doors' process and the engine's, and how it is framed.

Frames are a 4-byte length and MessagePack of the tagged structs below, over a socket pair that no
other process can open; nothing is ever unpickled. `process.py` is the parent's end, `worker.py` the
child's.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import msgspec

from loriner.config import EngineConfig
from loriner.core import Event, Request
from loriner.engine.stats import EngineStats

HEAD = struct.Struct("<I")
MAX_FRAME_BYTES = 256 << 20


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


class Probe(msgspec.Struct, frozen=True, tag=True):
    """Asks for a sign of life: an idle engine says nothing by itself."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    max_model_len: int
    load_s: float


class Failed(msgspec.Struct, frozen=True, tag=True):
    message: str


class Events(msgspec.Struct, frozen=True, tag=True):
    events: list[Event]


class Stats(msgspec.Struct, frozen=True, tag=True):
    stats: EngineStats


ToEngine = Start | Submit | Abort | Evict | Keep | Probe
FromEngine = Ready | Failed | Events | Stats


def _encode_path(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(type(value))


def decode_path(kind: type, value: Any) -> Any:
    return kind(value) if issubclass(kind, Path) else value


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_encode_path)


def frame(message: object) -> bytes:
    body = _ENCODER.encode(message)
    return HEAD.pack(len(body)) + body
