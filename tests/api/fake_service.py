"""A scripted stand-in for `engine.service.Service`: same methods, no model, no process.

Answers are words that name the adapter, so a test can see who answered; the knobs at the top of
FakeService make it slow, full, broken or dead. Adapters live in a dict.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import struct
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from loriner.adapters.mixture import Mixture
from loriner.adapters.names import parse_name, parse_ref
from loriner.config import EngineConfig
from loriner.core import Event, FinishReason, SamplingParams, Scaled, TokenLogprob, Turn
from loriner.engine.grammars import Constraint
from loriner.engine.stats import EngineStats, GenerationStats
from loriner.errors import (
    AdapterConflictError,
    AdapterNotFoundError,
    EngineUnavailableError,
    InvalidAdapterError,
    InvalidRequestError,
    LorinerError,
)

BASE_DIGEST = "b" * 64
NO_TURN = Turn()


@dataclass(frozen=True, slots=True)
class FakeRecord:
    name: str
    short_name: str
    generation: str
    ranks: tuple[int, ...] = (8,)
    targets: tuple[str, ...] = ("q_proj",)
    num_bytes: int = 1000
    pinned: bool = False
    created_at: int = 1_700_000_000
    alias_of: str | None = None
    base_digest: str | None = BASE_DIGEST
    source: str = "upload"
    state: str = "ready"
    has_template: bool = False


@dataclass(frozen=True, slots=True)
class FakeReport:
    name: str
    generation: str
    ranks: tuple[int, ...]
    targets: tuple[str, ...]
    num_bytes: int
    modules_matched: int
    modules_total: int
    created_at: int
    existed: bool


class FakeStore:
    """Names -> records, in memory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.records: dict[str, FakeRecord] = {}
        self.published: list[dict[str, bytes]] = []

    def add(self, name: str, generation: str | None = None) -> FakeRecord:
        full = parse_name(name)
        digest = generation or hashlib.sha256(str(full).encode()).hexdigest()
        record = FakeRecord(str(full), full.short, digest)
        self.records[str(full)] = record
        return record

    def resolve(self, name: str) -> FakeRecord:
        ref = parse_ref(name)
        record = self.records.get(str(ref.name))
        if record is None or not record.generation.startswith(ref.digest or ""):
            raise AdapterNotFoundError(name)
        return record

    def get(self, name: str) -> FakeRecord:
        return self.resolve(name)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        self.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.root) as folder:
            yield Path(folder)

    def list(self, tenant: str | None = None, *, all_states: bool = False) -> list[FakeRecord]:
        found = sorted(self.records.values(), key=lambda record: record.name)
        return [record for record in found if tenant in (None, record.name.partition("/")[0])]

    def history(self, name: str) -> list[FakeRecord]:
        return [self.resolve(name)]

    def set_alias(
        self, name: str, target: str, *, expected_generation: str | None = None
    ) -> FakeRecord:
        found = self.resolve(target)
        self._expect(name, expected_generation)
        return self.add(name, found.generation)

    def delete(self, name: str, *, expected_generation: str | None = None) -> FakeRecord:
        record = self.resolve(name)
        self._expect(name, expected_generation)
        return self.records.pop(record.name)

    def publish(
        self, folder: Path, name: str, *, expected_generation: str | None = None
    ) -> FakeReport:
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
        self._expect(name, expected_generation)
        if files["adapter_model.safetensors"].startswith(b"bad"):
            raise InvalidAdapterError(["tensor x matches no module", "rank 0 is not 1 to 256"])
        self.published.append(files)
        digest = hashlib.sha256(files["adapter_model.safetensors"]).hexdigest()
        record = self.add(name, digest)
        return FakeReport(
            record.name, digest, (8,), ("q_proj",), 1000, 30, 30, record.created_at, False
        )

    def set_pinned(self, name: str, pinned: bool) -> None:
        record = self.resolve(name)
        self.records[record.name] = replace(record, pinned=pinned)

    def _expect(self, name: str, expected: str | None) -> None:
        record = self.records.get(str(parse_name(name)))
        current = "" if record is None else record.generation
        if expected is not None and expected != current:
            raise AdapterConflictError(f"`{name}` does not point at {expected}.")


@dataclass(slots=True)
class FakeGeneration:
    """Yields `events` one by one, after what the service's knobs say."""

    service: FakeService
    request_id: str
    record: FakeRecord | None
    events: list[Event]
    closed: bool = False
    position: int = field(default=0)

    def __aiter__(self) -> FakeGeneration:
        return self

    async def __anext__(self) -> Event:
        service = self.service
        if self.position == 0 and service.hold is not None:
            await service.hold.wait()
        if service.delay_s:
            await asyncio.sleep(service.delay_s)
        if service.fail_after is not None and self.position >= service.fail_after:
            await self.close()
            raise service.fail_with
        if self.position == len(self.events):
            await self.close()
            raise StopAsyncIteration
        self.position += 1
        return self.events[self.position - 1]

    async def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.service.closed.append(self.request_id)


class FakeGrammars:
    """Compiles nothing; texts that hold `bad` are refused."""

    async def compile(self, constraint: Constraint) -> str:
        if "bad" in constraint.text:
            raise InvalidRequestError(f"{constraint.param} is bad.", constraint.param)
        return f"{constraint.before}{constraint.kind}: {constraint.text}"


class FakeChat:
    """A template that knows tools, in Hermes' way."""

    def __init__(self) -> None:
        self.template = "{{ tools }}<tool_call>"
        self.special_ids: dict[str, int] = {}

    def special_id(self, text: str) -> int | None:
        return self.special_ids.get(text)

    def spellings(self, ids: Sequence[int]) -> list[str]:
        return [f"<{i}>" for i in ids]

    def unspelled_id(self, text: str) -> int | None:
        return self.special_ids.get(text)


class FakeService:
    """What the doors see. `calls` holds the keyword arguments of each `generate`."""

    def __init__(self, root: Path, *names: str) -> None:
        self.hold: asyncio.Event | None = None  # nothing is answered before it is set
        self.delay_s = 0.0
        self.fail_after: int | None = None  # events before `fail_with`
        self.fail_with: Exception = LorinerError("unset")
        self.refuse: Exception | None = None  # raised by generate
        self.cold_start = False
        self.model_name = "tiny"
        self.base_digest = BASE_DIGEST
        self.max_model_len = 512
        self.created = 1_700_000_000
        self.state = "ready"
        self.healthy = True
        self.num_restarts = 0
        self.engine_config = EngineConfig()
        self.store = FakeStore(root)
        self.grammars = FakeGrammars()
        self.chat = FakeChat()
        self.tool_format = "auto"
        self.says: list[str] | None = None  # instead of words that name the adapter
        self.templates: dict[str, str] = {}  # by generation: what adapters brought
        self.calls: list[dict[str, Any]] = []
        self.closed: list[str] = []
        self.open: list[FakeGeneration] = []
        self.evicted: list[str] = []
        self.held: list[list[str]] = []  # by `holding`, now
        self.rendered: list[dict[str, Any]] = []
        self.engine_stats = EngineStats(num_blocks=10, num_free_blocks=4, max_seats=32)
        for name in names:
            self.store.add(name)

    def renew(self, *names: str) -> None:
        """Be as new: for tests that share a server."""
        FakeService.__init__(self, self.store.root, *names)

    @property
    def ready(self) -> bool:
        return self.state == "ready"

    async def start(self) -> None:
        pass

    async def wait_until_ready(self) -> None:
        pass

    def drain(self) -> int:
        self.state = "draining"
        return sum(not one.closed for one in self.open)

    async def stop(self, drain_s: float = 0.0) -> None:
        self.state = "draining"
        deadline = time.monotonic() + drain_s
        while any(not one.closed for one in self.open):
            if time.monotonic() > deadline:
                return
            await asyncio.sleep(0.01)

    def stats(self) -> EngineStats:
        return self.engine_stats

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [ord(char) for char in text]

    @property
    def vocab_size(self) -> int:
        return 0x110000  # characters

    @property
    def hidden_size(self) -> int:
        return 4

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(i) for i in ids)

    async def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: object = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        template: str | None = None,
        add_special_tokens: bool = False,
    ) -> list[int]:
        self.rendered.append(
            {
                "messages": messages,
                "tools": tools,
                "add_generation_prompt": add_generation_prompt,
                "continue_final_message": continue_final_message,
                "template_kwargs": template_kwargs,
                "template": template,
                "add_special_tokens": add_special_tokens,
            }
        )
        return self.encode("".join(message["content"] for message in messages))

    async def own_template(self, adapter: str) -> tuple[str, str] | None:
        record = self.store.resolve(adapter)
        template = self.templates.get(record.generation)
        return None if template is None else (template, f"{record.name}@{record.generation}")

    @asynccontextmanager
    async def holding(self, adapters: Sequence[Scaled]) -> AsyncIterator[None]:
        self.held.append([self.store.resolve(name).name for name, _ in adapters])
        yield
        self.held.pop()

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
    ) -> FakeGeneration:
        if self.state == "draining":
            raise EngineUnavailableError("The server is shutting down.")
        if self.refuse is not None:
            raise self.refuse
        record: Any = None
        if isinstance(adapter, str) or not adapter:
            record = self.store.resolve(adapter) if adapter else None
        else:
            records = tuple(self.store.resolve(name) for name, _ in adapter)
            record = records[0]
            if [scale for _, scale in adapter] != [1.0]:
                record = Mixture(records, tuple(scale for _, scale in adapter))  # type: ignore[arg-type]
        self.calls.append(
            {"prompt_ids": list(prompt_ids), "sampling": sampling, "adapter": _plain(adapter)}
            | {"request_id": request_id, "tenant": tenant, "prompt_param": prompt_param}
            | {"turn": turn, "embeds": embeds}
        )
        events = script(request_id, record, prompt_ids, sampling, self.cold_start, self.says)
        if embeds:
            events = [embedded(request_id, record, prompt_ids, self.cold_start)]
        self.open.append(FakeGeneration(self, request_id, record, events))
        return self.open[-1]

    async def publish(
        self,
        folder: Path,
        name: str,
        *,
        expected_generation: str | None = None,
        source: str = "upload",
    ) -> FakeReport:
        return self.store.publish(folder, name, expected_generation=expected_generation)

    async def set_alias(
        self, name: str, target: str, *, expected_generation: str | None = None
    ) -> Any:
        return self.store.set_alias(name, target, expected_generation=expected_generation)

    async def delete(self, name: str, *, expected_generation: str | None = None) -> Any:
        return self.store.delete(name, expected_generation=expected_generation)

    async def evict(self, name: str) -> None:
        self.evicted.append(self.store.resolve(name).generation)

    async def set_pinned(self, name: str, pinned: bool) -> None:
        self.store.set_pinned(name, pinned)


def words_of(record: FakeRecord | Mixture | None, index: int) -> list[str]:
    """What choice `index` says when it may say everything."""
    name = "base" if record is None else getattr(record, "short_name", record.name)
    return [f"{name}", " answers", " you", f" ({index})", " ünï", "."]


def script(
    request_id: str,
    record: FakeRecord | Mixture | None,
    prompt_ids: Sequence[int],
    sampling: SamplingParams,
    cold_start: bool,
    says: list[str] | None = None,
) -> list[Event]:
    """All choices, one token each in turn, as a batch would give them."""
    events = []
    all_words = [says or words_of(record, index) for index in range(sampling.n)]
    length = min(len(all_words[0]), sampling.max_tokens or 100)
    prompt_logprobs = _of_prompt(prompt_ids, sampling.prompt_logprobs)
    if sampling.max_tokens == 0:
        return [
            Event(
                request_id,
                index,
                finish_reason=FinishReason.LENGTH,
                num_prompt_tokens=len(prompt_ids),
                prompt_logprobs=() if index else prompt_logprobs,
            )
            for index in range(sampling.n)
        ]
    for step in range(length):
        for index, words in enumerate(all_words):
            is_last = step == length - 1
            reason = FinishReason.STOP if length == len(words) else FinishReason.LENGTH
            events.append(
                Event(
                    request_id,
                    index,
                    text=words[step],
                    token_ids=(step + 10,),
                    logprobs=_logprobs(words[step], sampling.logprobs),
                    prompt_logprobs=() if step or index else prompt_logprobs,
                    finish_reason=reason if is_last else None,
                    num_prompt_tokens=len(prompt_ids),
                    num_cached_tokens=3,
                    num_output_tokens=step + 1,
                    cold_start=cold_start,
                )
            )
    return events


def embedded(
    request_id: str, record: FakeRecord | Mixture | None, ids: Sequence[int], cold_start: bool
) -> Event:
    """A vector that tells of the prompt and of who answers."""
    who = 0 if record is None else sum(record.generation.encode())
    values = (len(ids), sum(ids), who, 0.5)
    return Event(
        request_id,
        0,
        finish_reason=FinishReason.STOP,
        num_prompt_tokens=len(ids),
        cold_start=cold_start,
        embedding=struct.pack("<4f", *values),
    )


def _logprobs(word: str, num_top: int | None) -> tuple[TokenLogprob, ...]:
    if num_top is None:
        return ()
    top = tuple(TokenLogprob(20 + i, -0.5 - i, f"t{i}") for i in range(num_top))
    return (TokenLogprob(10, -0.25, word, top),)


def _of_prompt(ids: Sequence[int], num_top: int | None) -> tuple[TokenLogprob, ...]:
    """Each token is the third likeliest, after two others."""
    if num_top is None:
        return ()
    made = [TokenLogprob(ids[0], math.nan, chr(ids[0]))]
    for i in ids[1:]:
        top = tuple(TokenLogprob(20 + j, -0.5 - j, f"t{j}", (), 1 + j) for j in range(num_top))
        made.append(TokenLogprob(i, -3.0, chr(i), top, 3))
    return tuple(made)


def resident(generation: str, tier: str = "gpu", **counts: int) -> GenerationStats:
    values = {"num_running": 0, "num_waiting": 0, "num_bytes": 10, "num_loads": 1} | counts
    return GenerationStats(generation, tier, False, last_load_s=0.01, **values)


def _plain(adapter: str | Sequence[Scaled] | None) -> object:
    """One adapter as it is, by name, as most tests want to see it."""
    if adapter is None or isinstance(adapter, str):
        return adapter
    if not adapter:
        return None
    return adapter[0].name if [s for _, s in adapter] == [1.0] else list(adapter)
