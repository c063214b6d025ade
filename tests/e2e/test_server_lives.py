"""Servers that start, run short of seats, stop, are killed and come back; and the openai package
against a real one."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
import pytest

from tests.e2e.kit import Kit
from tests.servers import Answer, Case, ServerProcess, Traffic, wait_until

pytestmark = [pytest.mark.timeout(120)]

KEY = "secret"
HI = "hello there"
PROMPTS = (HI, "Tell me a story that is longer than a block of the cache.")
MESSAGES: list[Any] = [{"role": "user", "content": HI}]
LONG = 3000  # tokens; seconds of streaming
START_UP_S = 20.0  # on a busy machine; alone it takes a few


@pytest.fixture(scope="module")
def small(kit: Kit, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with a key, eight adapters and two seats."""
    store = tmp_path_factory.mktemp("small") / "store"
    with ServerProcess(kit.base, store, "--max-seats", "2", key=KEY) as server:
        for name, folder in kit.adapters.items():
            server.publish(folder, name)
        yield server


@pytest.fixture
def openai(small: ServerProcess) -> Iterator[Any]:
    package = pytest.importorskip("openai")
    with package.OpenAI(base_url=f"{small.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def assert_same(answers: dict[Case, Answer], kit: Kit) -> None:
    wrong = {case: a for case, a in answers.items() if a.token_ids != kit.alone(*case)}
    assert not wrong


def test_more_adapters_than_seats_are_all_answered(small: ServerProcess, kit: Kit) -> None:
    cases: list[Case] = [(p, a) for a in (*kit.adapters, None) for p in PROMPTS]
    for _ in range(3):
        running = {case: small.later(small.read, *case) for case in cases}
        assert_same({case: answer.result(30) for case, answer in running.items()}, kit)


def test_long_streams_on_every_seat_do_not_starve_others(small: ServerProcess, kit: Kit) -> None:
    streams = {name: small.stream(HI, name, max_tokens=LONG) for name in ("a0", "a1")}
    for stream in streams.values():
        stream.wait_begun()
    others: list[Case] = [(HI, name) for name in (None, "a2", "a3", "a4", "a5")]
    running = {case: small.later(small.read, *case) for case in others}

    assert_same({case: answer.result(30) for case, answer in running.items()}, kit)
    for name, stream in streams.items():
        assert stream.result().token_ids == kit.alone(HI, name, LONG)
    base = running[HI, None].result()
    assert base.ended_at < min(stream.result().ended_at for stream in streams.values())


def test_an_adapter_without_a_seat_is_served_while_others_never_pause(
    small: ServerProcess, kit: Kit
) -> None:
    busy: list[Case] = [(prompt, name) for prompt in PROMPTS for name in ("a0", "a1")]
    with Traffic(small, kit.expected(busy), num_clients=6) as traffic:
        for name in ("a2", "a3", "a4"):
            traffic.wait_for_more(5)
            assert small.later(small.ask, HI, name).result(10).token_ids == kit.alone(HI, name)


def test_a_killed_server_leaves_no_engine_and_comes_back_as_it_was(
    kit: Kit, tmp_path: Path
) -> None:
    names = ("a0", "a1", "a2")
    cases: list[Case] = [(HI, name) for name in (*names, None)]
    with ServerProcess(kit.base, tmp_path / "store") as first:
        made = {name: first.publish(kit.adapters[name], name) for name in names}
        first.http.put("/admin/aliases/prod", json={"target": "a1"}).raise_for_status()
        first.http.post("/admin/adapters/a2/pin").raise_for_status()
        before, models = catalogue(first), first.models()
        assert_same({case: first.ask(*case) for case in cases}, kit)
        stream, engine = first.stream(HI, "a0", max_tokens=LONG).wait_begun(), first.engine
        first.process.kill()
        wait_until(lambda: not engine.is_running(), 5)
        with pytest.raises(httpx.TransportError):
            stream.result()

    with ServerProcess(kit.base, tmp_path / "store") as second:
        wait_until(lambda: entry_of(second, "a2")["tier"] != "disk")  # pinned: loaded unasked
        assert catalogue(second) == before and second.models() == models
        assert second.ask(HI, "prod").generation == made["a1"]
        assert_same({case: second.ask(*case) for case in cases}, kit)
        assert not list((second.store / "incoming").glob("*/*"))


def catalogue(server: ServerProcess) -> list[tuple[Any, ...]]:
    """Names, generations, aliases and pins, as the admin door lists them."""
    entries = server.http.get("/admin/adapters").json()["adapters"]
    keys = ("name", "generation", "alias_of", "pinned", "created_at", "ranks", "source")
    return [tuple(map(entry.__getitem__, keys)) for entry in entries]


def entry_of(server: ServerProcess, name: str) -> dict[str, Any]:
    entry: dict[str, Any] = server.http.get(f"/admin/adapters/{name}").json()
    return entry


def test_a_terminated_server_finishes_its_streams(kit: Kit, tmp_path: Path) -> None:
    with ServerProcess(kit.base, tmp_path / "store") as server:
        server.publish(kit.adapters["a0"], "a0")
        cases = [None, "a0", "a0"]
        streams = [server.stream(HI, name, max_tokens=LONG).wait_begun() for name in cases]
        engine = server.engine
        code = server.terminate()
        server.wait_for("/ready", 503, 5)
        assert server.ask(HI).status == 503
        refused_at = time.monotonic()

        answers = [stream.result() for stream in streams]
        assert code.result(20) == 0, server.log
        ended_at = [answer.ended_at for answer in answers]
        assert time.monotonic() - max(ended_at) < 15, "nothing else is waited for"
        assert all(answer.is_done for answer in answers) and min(ended_at) > refused_at
        for name, answer in zip(cases, answers, strict=True):
            assert answer.token_ids == kit.alone(HI, name, LONG)
        assert not engine.is_running()


def test_the_openai_package_chats_and_streams(openai: Any, kit: Kit) -> None:
    ask = openai.chat.completions.create
    greedy = {"temperature": 0, "max_tokens": 16}
    extra = {"ignore_eos": True, "return_token_ids": True}
    base = ask(model="tiny", messages=MESSAGES, extra_body=extra, **greedy)
    named = ask(model="tiny", messages=MESSAGES, extra_body={"adapter": "a1", **extra}, **greedy)
    model = ask(model="a1", messages=MESSAGES, extra_body=extra, **greedy)
    chunks = list(ask(model="a1", messages=MESSAGES, extra_body=extra, stream=True, **greedy))

    assert base.choices[0].token_ids == kit.alone(HI, None)
    assert named.choices[0].token_ids == model.choices[0].token_ids == kit.alone(HI, "a1")
    assert named.usage.completion_tokens == 16 and named.choices[0].finish_reason == "length"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == named.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"


def test_the_openai_package_lists_models_and_raises_its_errors(
    openai: Any, small: ServerProcess
) -> None:
    import openai as package

    ask = openai.chat.completions.create
    listed = {model.id: model for model in openai.models.list()}
    assert next(iter(listed)) == "tiny" and set(listed) == {"tiny", *(f"a{i}" for i in range(8))}
    assert listed["a3"].parent == "tiny"

    with pytest.raises(package.NotFoundError) as unknown:
        ask(model="tiny", messages=MESSAGES, extra_body={"adapter": "nobody"})
    assert (unknown.value.code, unknown.value.param) == ("adapter_not_found", "adapter")
    with pytest.raises(package.NotFoundError) as no_model:
        ask(model="nobody", messages=MESSAGES)
    assert (no_model.value.code, no_model.value.param) == ("model_not_found", "model")
    with pytest.raises(package.BadRequestError) as bad:
        ask(model="tiny", messages=MESSAGES, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(package.BadRequestError) as long:
        ask(model="tiny", messages=[{"role": "user", "content": "x" * 9000}])
    assert long.value.code == "context_length_exceeded"
    for key in ("wrong", KEY[:-1]):
        with pytest.raises(package.AuthenticationError):
            openai.with_options(api_key=key).models.list()
    assert small.http.get("/health", headers={"authorization": ""}).status_code == 200


def test_the_real_base_is_ready_soon_and_answers_eight_at_once(
    smollm2: Path, tmp_path: Path
) -> None:
    threads = str(psutil.cpu_count() or 1)
    with ServerProcess(smollm2, tmp_path / "store", "--num-threads", threads) as server:
        start_up_s = time.monotonic() - server.started_at
        folders = sorted(Path(str(files("loriner") / "data" / "adapters")).iterdir())
        names = [folder.name for folder in folders if server.publish(folder, folder.name)]
        chosen = [*names, None] * 2
        running = [
            server.later(server.read, "Why is the sky blue?", name, max_tokens=24)
            for name in chosen[:8]
        ]
        answers = [answer.result(60) for answer in running]
        server_mib, engine_mib = (
            process.memory_info().rss >> 20
            for process in (psutil.Process(server.process.pid), server.engine)
        )

    sys.stdout.write(
        f"ready in {start_up_s:.1f} s; resident: server {server_mib} MiB, engine {engine_mib} MiB\n"
    )
    assert all(answer.is_done and len(answer.token_ids) == 24 for answer in answers)
    assert [answers[i].token_ids for i in range(3)] == [answers[i + 5].token_ids for i in range(3)]
    assert start_up_s <= START_UP_S
