"""What both doors call: validate, resolve, pin, submit, stream. Below it nothing knows which door
it was.

Owns the engine process, the adapter store and the tokenizer of the doors. Invariant: a generation
that a request was admitted with stays acquired until that request's stream is closed, however it
ends.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from loriner import errors
from loriner.adapters.records import AdapterRecord, PublishReport
from loriner.adapters.store import Store
from loriner.config import EngineConfig, ServerConfig
from loriner.core import Request, SamplingParams, Scaled, Turn
from loriner.engine.admission import check_ids, check_length, fit
from loriner.engine.admitted import Admitted
from loriner.engine.chat import ChatTokenizer
from loriner.engine.generation import Generation
from loriner.engine.grammars import Grammars
from loriner.engine.holds import Holds
from loriner.engine.messages import Abort, Evict, Submit
from loriner.engine.pins import Pins
from loriner.engine.process import EngineProcess
from loriner.engine.stats import EngineStats
from loriner.model.weights import Checkpoint

logger = logging.getLogger(__name__)

NO_TURN = Turn()
STOP_S = 5.0  # for releases that are under way when the service stops


class Service:
    """The server below its doors."""

    def __init__(self, engine_config: EngineConfig, server_config: ServerConfig) -> None:
        self.engine_config, self.server_config = engine_config, server_config
        checkpoint = Checkpoint.open(engine_config.model)
        self.model_config = checkpoint.config
        self.base_digest = checkpoint.base_digest
        self.tool_format = server_config.tool_format
        self.model_name = server_config.served_name or engine_config.model.resolve().name
        self.created = int(time.time())
        self.chat = ChatTokenizer(engine_config.model)
        self.store = Store(
            server_config.store,
            self.model_config.modules(),
            self.base_digest,
            base_tensor=checkpoint.dense,
            check_template=self.chat.own_template,
        )
        self.grammars = Grammars(
            engine_config.model, self.model_config.vocab_size, self.model_config.eos_token_ids
        )
        self._engine = EngineProcess(engine_config, server_config.store, server_config.watchdog_s)
        self._admitted = Admitted(engine_config.max_waiting + engine_config.max_sequences)
        self._engine.on_event = self._admitted.deliver
        self._engine.on_down = self._admitted.fail
        self._engine.on_ready = self._on_ready
        self._holds = Holds(self.store)
        self._pins = Pins(self.store, self._engine, engine_config)
        self._draining = False

    async def start(self) -> None:
        """Start the engine process; returns at once, `ready` tells when it can serve."""
        self._engine.start()
        self.grammars.warm()
        self._warming = asyncio.create_task(asyncio.to_thread(self.chat.warm))

    async def wait_until_ready(self) -> None:
        """Raises EngineUnavailableError when the engine cannot start."""
        await self._engine.wait_until_ready()
        await self._warming
        if self._engine.state == "failed":
            raise errors.EngineUnavailableError(
                self._engine.failure or "The engine failed to start."
            )

    def drain(self) -> int:
        """Refuse new requests from now on; how many are under way."""
        self._draining = True
        return len(self._admitted)

    async def stop(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, give running ones `drain_s` seconds, then end the engine."""
        if self._engine.state == "stopped":
            return
        self._draining = True
        deadline = time.monotonic() + drain_s
        while self._admitted and time.monotonic() < deadline:  # noqa: ASYNC110  streams end by themselves
            await asyncio.sleep(0.02)
        await self._engine.stop()
        self._admitted.fail()
        self.grammars.close()
        self.chat.close()
        await self._holds.wait(STOP_S)
        self.store.close()

    @property
    def state(self) -> str:
        return "draining" if self._draining else self._engine.state

    @property
    def healthy(self) -> bool:
        return self._engine.state in ("starting", "ready")

    @property
    def ready(self) -> bool:
        return self.state == "ready"

    @property
    def num_restarts(self) -> int:
        return self._engine.num_restarts

    @property
    def engine_pid(self) -> int | None:
        return self._engine.pid

    @property
    def max_model_len(self) -> int:
        return self._engine.max_model_len or self.model_config.max_position_embeddings

    def stats(self) -> EngineStats:
        return self._engine.stats

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.chat.encode(text, add_special_tokens)

    @property
    def vocab_size(self) -> int:
        return self.model_config.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.model_config.hidden_size

    def decode(self, ids: Sequence[int]) -> str:
        return self.chat.decode(ids)

    async def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        template: str | None = None,
        add_special_tokens: bool = False,
    ) -> list[int]:
        """Messages -> token ids by the base's chat template, or one that an adapter brought, off
        the event loop."""
        return await asyncio.to_thread(
            self.chat.render,
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=dict(template_kwargs or {}),
            template=template,
            add_special_tokens=add_special_tokens,
        )

    async def own_template(self, adapter: str) -> tuple[str, str] | None:
        """The chat template that an adapter brought, and `name@digest` of just that generation;
        None: the base's serves. Raises AdapterNotFoundError."""
        return await asyncio.to_thread(own_template, self.store, adapter)

    def holding(self, adapters: Sequence[Scaled]) -> AbstractAsyncContextManager[None]:
        """Keep what they stand for, as `generate` does. Raises what it raises about them."""
        return self._holds.holding(adapters)

    async def generate(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        adapter: str | Sequence[Scaled] | None,
        request_id: str,
        tenant: str = "default",
        turn: Turn = NO_TURN,
        prompt_param: str = "messages",
        embeds: bool = False,
    ) -> Generation:
        """Admit one request. Raises before anything is queued: InvalidRequestError,
        AdapterNotFoundError, OverloadedError, EngineUnavailableError. Several adapters add up.
        `embeds`: its one event is the prompt's embedding; `sampling` says nothing then."""
        self._check_up()
        if embeds:
            check_length(len(prompt_ids), self.max_model_len, prompt_param)
        else:
            sampling = fit(sampling, len(prompt_ids), self.max_model_len, prompt_param)
        check_ids(prompt_ids, sampling, self.model_config.vocab_size, prompt_param)
        with self._admitted.room(request_id, sampling.n):
            record = await self._holds.acquire(adapter) if adapter else None
        digest = record.generation if record else None
        now, ids = time.monotonic(), tuple(prompt_ids)
        request = Request(request_id, ids, sampling, digest, tenant, now, turn, embeds)
        generation = Generation(request, record, self._forget)
        self._admitted.add(generation)
        self._engine.send(Submit(request))
        if self._engine.state != "ready":
            self._admitted.fail()
        return generation

    async def publish(
        self,
        folder: Path,
        name: str,
        *,
        expected_generation: str | None = None,
        source: str = "upload",
    ) -> PublishReport:
        """Check and publish an adapter folder, beside the running steps."""
        report = await asyncio.to_thread(
            self.store.publish,
            folder,
            name,
            expected_generation=expected_generation,
            source=source,
        )
        await self._pins.sync()
        return report

    async def set_alias(
        self, name: str, target: str, *, expected_generation: str | None = None
    ) -> AdapterRecord:
        """Point `name` at what `target` stands for now; requests under way keep their
        generation."""
        record = await asyncio.to_thread(
            self.store.set_alias, name, target, expected_generation=expected_generation
        )
        await self._pins.sync()
        return record

    async def delete(self, name: str, *, expected_generation: str | None = None) -> AdapterRecord:
        """Forget a name, and free its generation's memory when no other name has it."""
        record = await asyncio.to_thread(
            self.store.delete, name, expected_generation=expected_generation
        )
        await self._pins.sync()
        left = await asyncio.to_thread(self.store.list)
        if all(other.generation != record.generation for other in left):
            self._engine.send(Evict(record.generation))
        return record

    async def evict(self, name: str) -> None:
        """Take the adapter out of seat and host memory unless it is running."""
        record = await asyncio.to_thread(self.store.resolve, name)
        self._engine.send(Evict(record.generation))

    async def set_pinned(self, name: str, pinned: bool) -> None:
        """Keep the adapter in memory whatever comes, or let it go when room is needed."""
        await self._pins.set(name, pinned)

    def _forget(self, generation: Generation) -> None:
        """Close the books of one request; called by its stream, once."""
        if not self._admitted.remove(generation):
            return
        if not generation.finished:
            self._engine.send(Abort(generation.request_id))
        for held in generation.held:
            self._holds.release(held)

    def _on_ready(self) -> None:
        self._holds.in_background(self._pins.sync())

    def _check_up(self) -> None:
        if self._draining:
            raise errors.EngineUnavailableError("The server is shutting down.")
        if self._engine.state != "ready":
            raise errors.EngineUnavailableError(f"The engine is {self._engine.state}.")


def own_template(store: Store, adapter: str) -> tuple[str, str] | None:
    """See `Service.own_template`."""
    record = store.resolve(adapter)
    template = store.template(record.generation) if record.has_template else None
    return None if template is None else (template, f"{record.name}@{record.generation}")
