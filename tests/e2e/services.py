"""A service with its engine, run in the test's own process, and what tests ask of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from loriner.config import MIB, EngineConfig, ServerConfig
from loriner.core import SamplingParams
from loriner.engine.generation import Generation
from loriner.engine.service import Service

LONG = SamplingParams(max_tokens=900, temperature=0.0, ignore_eos=True)
SHORT = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)


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
