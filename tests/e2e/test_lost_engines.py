"""Engines that die, hang or give up, and servers that are killed: requests end, and an engine comes
back or is gone."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loriner.engine import process
from loriner.engine.messages import Failed
from loriner.engine.service import Service
from loriner.errors import EngineFailedError, EngineUnavailableError
from tests.e2e.services import LONG, ask, collect, is_alive, scenario, until
from tests.tiny import write_tiny_base

pytestmark = [pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("lost") / "base", max_position_embeddings=1024)


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


@pytest.mark.parametrize(
    ("lost_by", "least_s", "most_s"), [(signal.SIGKILL, 0, 5), (signal.SIGSTOP, 2, 6)]
)
def test_a_killed_engine_and_one_that_hangs_end_their_requests_and_restart(
    base: Path, tmp_path: Path, lost_by: signal.Signals, least_s: int, most_s: int
) -> None:
    async def run(service: Service) -> None:
        open_streams = [await ask(service, LONG, name=str(i)) for i in range(3)]
        for stream in open_streams:
            await anext(stream)
        pid = service.engine_pid
        assert pid is not None
        os.kill(pid, lost_by)
        start = time.monotonic()
        for stream in open_streams:
            with pytest.raises(EngineFailedError):
                await collect(stream)
        assert least_s <= time.monotonic() - start < most_s
        assert not service.healthy
        with pytest.raises(EngineUnavailableError):
            await ask(service, name="while down")
        await until(lambda: service.ready)
        assert service.num_restarts == 1 and service.engine_pid != pid and not is_alive(pid)
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


PARENT = """
import asyncio, sys
from pathlib import Path
from tests.e2e.services import running

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
