"""A store without a server: adapters are published into it, and answered by an engine of our own.

Runs `engine.service.Service` for as long as the block lasts. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import gc
import uuid
from collections.abc import Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch

from loriner.config import EngineConfig, ServerConfig
from loriner.core import SamplingParams
from loriner.engine.service import Service
from loriner.train.base import device_of
from loriner.train.canaries import Canary, Replay
from loriner.train.settings import RunConfig

T = TypeVar("T")


class StoreServed:
    """Use it in a `with` block; the engine's process ends with it."""

    def __init__(self, run: RunConfig, store: Path) -> None:
        gc.collect()  # the base that was trained on, if it was on this GPU
        torch.cuda.empty_cache()
        engine = EngineConfig(model=run.base, device=device_of(run).type)
        self._service = Service(engine, ServerConfig(store=store))
        self._runner = asyncio.Runner()

    def __enter__(self) -> StoreServed:
        self._run(self._start())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self._run(self._service.stop())
        finally:
            self._runner.close()

    def publish(self, folder: Path, name: str) -> str:
        report = self._run(self._service.publish(folder, name, source="train"))
        return report.generation

    def replay(self, canary: Canary, adapter: str) -> Replay:
        return self._run(self._replay(canary, adapter))

    def point(self, name: str, generation: str) -> None:
        self._run(self._service.set_alias(name, generation))

    def forget(self, name: str) -> None:
        self._run(self._service.delete(name))

    async def _start(self) -> None:
        await self._service.start()
        await self._service.wait_until_ready()

    async def _replay(self, canary: Canary, adapter: str) -> Replay:
        service, count = self._service, len(canary.token_ids)
        if canary.messages:
            prompt = await service.render_chat([dict(m) for m in canary.messages])
        else:
            prompt = service.encode(canary.text)
        sampling = SamplingParams(
            max_tokens=count, temperature=0.0, ignore_eos=True, logprobs=len(canary.logprobs[0])
        )
        ids: list[int] = []
        tops: list[tuple[float, ...]] = []
        async with await service.generate(
            prompt, sampling, adapter=adapter, request_id=f"canary-{uuid.uuid4().hex}"
        ) as generation:
            async for event in generation:
                ids += event.token_ids
                for entry in event.logprobs:
                    tops.append(tuple(sorted((t.logprob for t in entry.top), reverse=True)))
        return Replay(tuple(prompt), tuple(ids), tuple(tops))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)
