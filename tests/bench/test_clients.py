"""What a client process reads from a stream: tokens, the end, and everything that is no answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Event, Thread

import pytest

from loriner.bench import sse_client
from loriner.bench.clients import START_S, ClientFailedError, flooding, stream, stream_until

OPENING = b'data: {"choices":[{"prompt_token_ids":[9,9]}]}\n\n'
DONE = b"data: [DONE]\n\n"


def token(number: int) -> bytes:
    return b'data: {"choices":[{"text":" w","token_ids":[%d]}]}\n\n' % number


def read(*pieces: bytes) -> list[float]:
    times: list[float] = []

    async def feed() -> None:
        reader = asyncio.StreamReader()
        for piece in pieces:
            reader.feed_data(piece)
        reader.feed_eof()
        await sse_client.read_events(reader, times)

    asyncio.run(feed())
    return times


def test_each_event_with_a_token_counts_once_however_it_is_cut() -> None:
    whole = OPENING + token(300) + token(301) + DONE

    assert len(read(whole)) == 2
    for cut in range(len(whole)):
        assert len(read(whole[:cut], whole[cut:])) == 2


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (token(300), "the stream broke off after 1 tokens"),
        (b'data: {"error":{"message":"no"}}\n\n' + DONE, '"message":"no"'),
    ],
)
def test_a_stream_that_does_not_end_well_is_an_error(sent: bytes, message: str) -> None:
    with pytest.raises(sse_client.StreamFailedError, match=message):
        read(sent)


@contextmanager
def serving(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            answer(self)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def test_client_processes_stream_in_turns_on_one_clock() -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(OPENING + token(1))
        handler.wfile.write(token(2) + DONE)

    begin = time.monotonic()
    with serving(answer) as port:
        answers = stream(port, [[{"n": 1}, {"n": 2}], [{"n": 1}]], num_clients=2)

    assert sorted(answer.turn for answer in answers) == [0, 0, 1]
    assert all(len(answer.tokens) == 2 and answer.first > 0 for answer in answers)
    assert all(begin < at < time.monotonic() for answer in answers for at in answer.tokens)


def test_a_refused_request_fails_the_run_with_the_servers_words() -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(404)
        handler.end_headers()
        handler.wfile.write(b'{"error":{"message":"no such adapter"}}')

    with serving(answer) as port, pytest.raises(ClientFailedError, match="no such adapter"):
        stream(port, [[{}]], num_clients=1)


def test_a_flood_asks_over_and_over_with_its_key_until_its_block_ends() -> None:
    keys: list[str | None] = []

    def answer(handler: BaseHTTPRequestHandler) -> None:
        keys.append(handler.headers["authorization"])
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(token(1) + DONE)

    with serving(answer) as port:
        with flooding(port, [[{}]], num_clients=1, key="secret"):
            deadline = time.monotonic() + 20
            while len(keys) < 5:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        num_asked = len(keys)
        time.sleep(0.1)

    assert set(keys) == {"Bearer secret"} and len(keys) <= num_asked + 1


def test_a_flood_that_breaks_off_fails_the_run() -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(429)
        handler.end_headers()
        handler.wfile.write(b'{"error":{"message":"too many"}}')

    with (
        serving(answer) as port,
        pytest.raises(ClientFailedError, match="too many"),
        flooding(port, [[{}]], num_clients=1),
    ):
        time.sleep(2)


def test_streams_until_a_time_keep_what_they_had_when_they_are_broken_off() -> None:
    is_over, asked = Event(), list[int]()

    def answer(handler: BaseHTTPRequestHandler) -> None:
        asked.append(1)
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(token(1) + token(2))
        if len(asked) < 3:
            handler.wfile.write(DONE)
        else:
            is_over.wait(20)

    until = time.monotonic() + START_S + 1
    with serving(answer) as port:
        answers = stream_until(port, [[{}]], num_clients=1, until=until)
        is_over.set()

    assert [(answer.turn, len(answer.tokens)) for answer in answers] == [(0, 2), (1, 2), (2, 2)]
    assert until < time.monotonic() < until + 10
    assert all(at < until for answer in answers for at in answer.tokens)
