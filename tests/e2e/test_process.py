"""The engine in its own process: it is fed, it dies, it comes back; nobody waits for ever."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loriner.config import MIB, EngineConfig, ServerConfig
from loriner.core import SamplingParams
from loriner.engine import process
from loriner.engine.generation import Generation
from loriner.engine.messages import Failed
from loriner.engine.service import Service
from loriner.errors import (
    AdapterNotFoundError,
    ContextLengthError,
    EngineFailedError,
    EngineUnavailableError,
    InvalidRequestError,
    OverloadedError,
)
from tests.tiny import write_tiny_base

pytestmark = [pytest.mark.timeout(120)]
LONG = SamplingParams(max_tokens=900, temperature=0.0, ignore_eos=True)
SHORT = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(
        tmp_path_factory.mktemp("process") / "base", max_position_embeddings=1024
    )


@asynccontextmanager
async def running(
    base: Path, store: Path, *, watchdog_s: float = 300, **engine: int
) -> AsyncIterator[Service]:
    settings = {"kv_bytes": 16 * MIB, "num_threads": 1, **engine}
    server = ServerConfig(store=store, watchdog_s=watchdog_s)
    service = Service(EngineConfig(model=base, **settings), server)  # type: ignore[arg-type]
    await service.start()
    try:
        await service.wait_until_ready()
        yield service
    finally:
        await service.stop()


def scenario(
    base: Path, store: Path, run: Callable[[Service], Awaitable[None]], **settings: Any
) -> None:
    async def main() -> None:
        async with running(base, store, **settings) as service:
            await run(service)

    asyncio.run(main())


async def collect(generation: Generation) -> list[int]:
    async with generation:
        return [i async for event in generation for i in event.token_ids]


async def ask(service: Service, sampling: SamplingParams = SHORT, name: str = "r") -> Generation:
    return await service.generate([1, 2, 3], sampling, adapter=None, request_id=name)


async def until(condition: Callable[[], bool], seconds: float = 20.0) -> float:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "it never became true"
        await asyncio.sleep(0.02)
    return time.monotonic() - start


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_answers_and_frees_what_it_used(base: Path, tmp_path: Path) -> None:
    async def run(service: Service) -> None:
        first = await collect(await ask(service, name="a"))
        streams = [await ask(service, name=n) for n in "bc"]
        both = await asyncio.gather(*map(collect, streams))
        assert len(first) == 5 and both == [first, first]
        await until(lambda: service.stats().num_output_tokens == 15)
        await until(lambda: service.stats().num_free_blocks == service.stats().num_blocks)

    scenario(base, tmp_path, run)


@pytest.mark.parametrize(("n", "sequences"), [(2, 8), (3, 1), (1, 1)])
def test_those_who_wait_run_when_all_who_ran_end_at_once(
    base: Path, tmp_path: Path, n: int, sequences: int
) -> None:
    one = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, n=n)

    async def run(service: Service) -> None:
        streams = [await ask(service, one, name=str(i)) for i in range(3)]
        answers = await asyncio.wait_for(asyncio.gather(*map(collect, streams)), 10)
        assert [len(answer) for answer in answers] == [n] * 3

    scenario(base, tmp_path, run, max_sequences=sequences)


def test_a_caller_that_leaves_during_admission_holds_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(service: Service) -> None:
        entered = threading.Event()
        held: list[str] = []

        def slow_acquire(name: str) -> SimpleNamespace:
            entered.set()
            time.sleep(0.2)
            held.append(name)
            return SimpleNamespace(generation=name)

        monkeypatch.setattr(service.store, "acquire", slow_acquire)
        monkeypatch.setattr(service.store, "release", held.remove)
        asking = asyncio.create_task(service.generate([1], SHORT, adapter="a", request_id="gone"))
        await asyncio.to_thread(entered.wait)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.sleep(0.3)
        await until(lambda: not held)

    scenario(base, tmp_path, run)


def test_the_watch_survives_a_process_that_cannot_be_started(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(service: Service) -> None:
        spawn, failures = process._spawn, iter([OSError("no more processes")])

        def flaky(*arguments: object) -> object:
            for failure in failures:
                raise failure
            return spawn(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(process, "_spawn", flaky)
        assert service.engine_pid is not None
        os.kill(service.engine_pid, signal.SIGKILL)
        await until(lambda: service.num_restarts == 2)
        await until(lambda: service.ready)
        assert len(await collect(await ask(service))) == 5

    scenario(base, tmp_path, run)


def test_a_killed_engine_ends_its_requests_and_restarts(base: Path, tmp_path: Path) -> None:
    async def run(service: Service) -> None:
        open_streams = [await ask(service, LONG, name=str(i)) for i in range(3)]
        for stream in open_streams:
            await anext(stream)
        pid = service.engine_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        start = time.monotonic()
        for stream in open_streams:
            with pytest.raises(EngineFailedError):
                await collect(stream)
        assert time.monotonic() - start < 5
        assert not service.healthy
        with pytest.raises(EngineUnavailableError):
            await ask(service, name="while down")
        await until(lambda: service.ready)
        assert service.num_restarts == 1 and service.engine_pid != pid
        assert len(await collect(await ask(service, name="after"))) == 5

    scenario(base, tmp_path, run)


def test_an_engine_that_hangs_is_ended_with_its_requests_and_restarts(
    base: Path, tmp_path: Path
) -> None:
    async def run(service: Service) -> None:
        stream = await ask(service, LONG)
        await anext(stream)
        pid = service.engine_pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(EngineFailedError):
            await collect(stream)
        assert 2 <= time.monotonic() - start < 6
        assert not service.healthy
        with pytest.raises(EngineUnavailableError):
            await ask(service, name="while down")
        await until(lambda: service.ready)
        assert service.num_restarts == 1 and not is_alive(pid)
        assert len(await collect(await ask(service, name="after"))) == 5

    scenario(base, tmp_path, run, watchdog_s=2)


def test_requests_do_not_wait_for_a_killed_engine_to_end(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(service: Service) -> None:
        ended, reap = asyncio.Event(), process.EngineProcess._reap

        async def late(engine: process.EngineProcess) -> None:
            await ended.wait()
            await reap(engine)

        monkeypatch.setattr(process.EngineProcess, "_reap", late)
        stream = await ask(service, LONG)
        await anext(stream)
        assert service.engine_pid is not None
        os.kill(service.engine_pid, signal.SIGKILL)
        with pytest.raises(EngineFailedError):
            await asyncio.wait_for(collect(stream), 5)
        assert not service.healthy
        ended.set()
        await until(lambda: service.ready)

    scenario(base, tmp_path, run)


def test_requests_end_with_an_engine_that_gives_up(base: Path, tmp_path: Path) -> None:
    async def run(service: Service) -> None:
        stream = await ask(service, LONG)
        await anext(stream)
        service._engine._handle(Failed("it cannot be served"))
        assert service.engine_pid is not None
        os.kill(service.engine_pid, signal.SIGKILL)
        with pytest.raises(EngineFailedError):
            await asyncio.wait_for(collect(stream), 5)
        assert service.state == "failed"

    scenario(base, tmp_path, run)


def test_idleness_and_a_stall_of_the_server_are_not_taken_for_an_engine_that_hangs(
    base: Path, tmp_path: Path
) -> None:
    async def run(service: Service) -> None:
        pid = service.engine_pid
        await asyncio.sleep(3)
        time.sleep(3)  # noqa: ASYNC251  nothing else runs in the meantime
        await asyncio.sleep(0.5)
        assert service.ready and service.engine_pid == pid and not service.num_restarts
        assert len(await collect(await ask(service))) == 5

    scenario(base, tmp_path, run, watchdog_s=2)


def test_a_killed_engine_ends_requests_that_wait_in_it(base: Path, tmp_path: Path) -> None:
    async def run(service: Service) -> None:
        streams = [await ask(service, LONG, name=str(i)) for i in range(4)]
        assert service.engine_pid is not None
        os.kill(service.engine_pid, signal.SIGKILL)
        for stream in streams:
            with pytest.raises((EngineFailedError, EngineUnavailableError)):
                await collect(stream)

    scenario(base, tmp_path, run, max_sequences=1)


def test_stopping_ends_the_engine(base: Path, tmp_path: Path) -> None:
    async def run(service: Service) -> None:
        pid = service.engine_pid
        assert pid is not None
        await service.stop()
        assert not is_alive(pid)
        await service.stop()

    scenario(base, tmp_path, run)


PARENT = """
import asyncio, sys
from pathlib import Path
from tests.e2e.test_process import running

async def main():
    async with running(Path(sys.argv[1]), Path(sys.argv[2])) as service:
        print(service.engine_pid, flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


def test_a_killed_parent_leaves_no_engine_behind(base: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", PARENT, str(base), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert is_alive(pid)
        parent.kill()
    deadline = time.monotonic() + 10
    while is_alive(pid):
        assert time.monotonic() < deadline, "the engine outlived its parent"
        time.sleep(0.05)


def test_closing_a_stream_frees_its_sequence(base: Path, tmp_path: Path) -> None:
    async def run(service: Service) -> None:
        stream = await ask(service, LONG)
        await anext(stream)
        await stream.close()
        took = await until(lambda: service.stats().num_aborted == 1)
        took += await until(lambda: service.stats().num_free_blocks == service.stats().num_blocks)
        assert took < 2

    scenario(base, tmp_path, run)


def test_what_cannot_be_served_is_refused_at_once(base: Path, tmp_path: Path) -> None:
    async def run(service: Service) -> None:
        async def refuse(error: type[Exception], prompt: list[int], **kw: object) -> Exception:
            sampling = kw.pop("sampling", SHORT)
            with pytest.raises(error) as caught:
                await service.generate(
                    prompt,
                    sampling,  # type: ignore[arg-type]
                    adapter=kw.get("adapter"),  # type: ignore[arg-type]
                    request_id="x",
                )
            return caught.value

        width = service.model_config.vocab_size
        await refuse(InvalidRequestError, [])
        await refuse(InvalidRequestError, [1, width])
        await refuse(InvalidRequestError, [-1])
        await refuse(ContextLengthError, [1] * 1024)
        too_long = await refuse(ContextLengthError, [1] * 200, sampling=LONG)
        assert isinstance(too_long, ContextLengthError) and too_long.param == "max_tokens"
        await refuse(AdapterNotFoundError, [1], adapter="nobody")
        bias = SamplingParams(logit_bias=((width, 1.0),))
        await refuse(InvalidRequestError, [1], sampling=bias)
        stop = SamplingParams(stop_token_ids=(width,))
        await refuse(InvalidRequestError, [1], sampling=stop)
        assert len(await collect(await ask(service))) == 5

    scenario(base, tmp_path, run)


def test_a_full_queue_refuses_and_then_recovers(base: Path, tmp_path: Path) -> None:
    async def run(service: Service) -> None:
        held = [await ask(service, LONG, name=str(i)) for i in range(3)]
        with pytest.raises(OverloadedError):
            await ask(service, name="one too many")
        for stream in held:
            await stream.close()
        assert len(await collect(await ask(service, name="later"))) == 5

    scenario(base, tmp_path, run, max_sequences=1, max_waiting=2)


def test_a_base_that_cannot_be_served_says_why(base: Path, tmp_path: Path) -> None:
    async def main() -> None:
        service = Service(
            EngineConfig(model=base, kv_bytes=1), ServerConfig(store=tmp_path / "store")
        )
        await service.start()
        with pytest.raises(EngineUnavailableError, match="kv_bytes"):
            await service.wait_until_ready()
        assert not service.healthy
        await service.stop()

    asyncio.run(main())
