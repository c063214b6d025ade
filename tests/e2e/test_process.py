"""The engine in its own process: it is fed, refuses and is stopped; nobody waits for ever."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from loriner.config import EngineConfig, ServerConfig
from loriner.core import SamplingParams
from loriner.engine.service import Service
from loriner.errors import (
    AdapterNotFoundError,
    ContextLengthError,
    EngineUnavailableError,
    InvalidRequestError,
    OverloadedError,
)
from tests.e2e.services import LONG, SHORT, ask, collect, is_alive, scenario, until
from tests.tiny import write_tiny_base

pytestmark = [pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(
        tmp_path_factory.mktemp("process") / "base", max_position_embeddings=1024
    )


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


def test_stopping_ends_the_engine(base: Path, tmp_path: Path) -> None:
    async def run(service: Service) -> None:
        pid = service.engine_pid
        assert pid is not None
        await service.stop()
        assert not is_alive(pid)
        await service.stop()

    scenario(base, tmp_path, run)


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
