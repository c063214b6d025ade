"""Streams of completions over HTTP, as a process of its own: `python sse_client.py JOB OUT`.

Knows sockets and the framing of server-sent events, and notes when each token came. Bare sockets:
a client library costs more time for a chunk than the server does. Standard library alone.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

TOKEN = b'"token_ids":['  # not of `prompt_token_ids`, which has another letter before it
DONE = b"data: [DONE]"
READ_BYTES = 1 << 16


class StreamFailedError(Exception):
    """The server answered with an error, or not to the end."""


async def complete(port: int, body: dict[str, Any], key: str, tokens: list[float]) -> None:
    """One streaming completion; monotonic seconds of each token are added to `tokens`."""
    payload = json.dumps({**body, "stream": True, "return_token_ids": True}).encode()
    right = f"authorization: Bearer {key}\r\n" if key else ""
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        f"{right}content-type: application/json\r\ncontent-length: {len(payload)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head.encode() + payload)
        await writer.drain()
        answer = await reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in answer.partition(b"\r\n")[0]:
            raise StreamFailedError((await reader.read()).decode(errors="replace")[:500])
        await read_events(reader, tokens)
    finally:
        writer.close()


async def read_events(reader: asyncio.StreamReader, times: list[float]) -> None:
    """Add when each token came. An event ends in an empty line; one is one token here."""
    rest = b""
    while data := await reader.read(READ_BYTES):
        now = time.monotonic()
        *events, rest = (rest + data).split(b"\n\n")
        for event in events:
            if TOKEN in event:
                times.append(now)
            elif DONE in event:
                return
            elif b'"error"' in event:
                raise StreamFailedError(event.decode(errors="replace")[:500])
    raise StreamFailedError(f"the stream broke off after {len(times)} tokens")


async def in_turn(job: dict[str, Any], bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers that have a token: monotonic seconds of start and tokens."""
    until = job["until"]
    answers: list[dict[str, Any]] = []
    try:
        async with asyncio.timeout_at(until) as limit:
            for body in bodies if until is None else itertools.cycle(bodies):
                await asyncio.sleep(random.uniform(0, job["pause_s"]))
                answers.append({"start": time.monotonic(), "tokens": []})
                await complete(job["port"], body, job["key"], answers[-1]["tokens"])
    except TimeoutError:
        if not limit.expired():
            raise
    return [answer for answer in answers if answer["tokens"]]


async def main(job: dict[str, Any]) -> list[list[dict[str, Any]]]:
    """`streams`: the bodies that each stream sends one after another, from `start_at` on, with
    `key`, after a pause of at most `pause_s` before each; over and over where there is an `until`,
    at which what is still streaming is broken off."""
    await asyncio.sleep(job["start_at"] - time.monotonic())
    return await asyncio.gather(*(in_turn(job, bodies) for bodies in job["streams"]))


if __name__ == "__main__":
    job_file, out_file = map(Path, sys.argv[1:])
    out_file.write_text(json.dumps(asyncio.run(main(json.loads(job_file.read_text())))))
