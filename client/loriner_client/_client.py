"""`Client`: one server, or several alike. Threads may share it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Unpack

from loriner_client import _answers as a
from loriner_client import _queries as q
from loriner_client._asking import (
    Turns,
    chat_query,
    open_transport,
    settings_of,
    tokenize_query,
)
from loriner_client._config import TIMEOUT_S, UPLOAD_TIMEOUT_S, Retry, Tls
from loriner_client._streams import Stream
from loriner_client._transport import Transport
from loriner_client._upload import Progress, Upload


class Client:
    """`with Client("127.0.0.1:8001") as client: print(client.chat("Hello", adapter="pirate").text)`

    `address`: `host:port` for gRPC, or several of them (round robin over the healthy ones), or one
    `http://` or `https://` URL. All methods raise `LorinerError`s.
    """

    def __init__(
        self,
        address: str | Sequence[str] = (),
        *,
        key: str = "",
        tls: Tls | None = None,
        retry: Retry | None = None,
        timeout_s: float | None = TIMEOUT_S,
        transport: Transport | None = None,
    ) -> None:
        """`timeout_s`: of each call, until its answer is whole. `transport`: instead of an
        address."""
        self._transport: Transport = transport or open_transport(
            settings_of(address, key, tls, retry)
        )
        self._timeout_s = timeout_s
        self.adapters = Adapters(self._transport, timeout_s)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._transport.close()

    def chat(
        self,
        messages: Turns,
        *,
        adapter: q.Which | None = None,
        model: str | None = None,
        priority: int | None = None,
        template: Mapping[str, q.TemplateValue] | None = None,
        structured_outputs: q.StructuredOutputs | None = None,
        **asked: Unpack[q.Asked],
    ) -> a.Completion:
        """Answer a conversation, or one user's text. `adapter`: a name, or several with scales,
        {"a": 0.5, "b": 1.0}. `priority`: lower runs earlier, inside the tenant. `tools`: what the
        answer may call."""
        query = chat_query(messages, adapter, model, priority, template, structured_outputs, asked)
        return self._transport.call(query, self._timeout_s)

    def stream_chat(
        self,
        messages: Turns,
        *,
        adapter: q.Which | None = None,
        model: str | None = None,
        priority: int | None = None,
        template: Mapping[str, q.TemplateValue] | None = None,
        structured_outputs: q.StructuredOutputs | None = None,
        **asked: Unpack[q.Asked],
    ) -> Stream:
        """The same, token by token: `with client.stream_chat(...) as stream`."""
        query = chat_query(messages, adapter, model, priority, template, structured_outputs, asked)
        return Stream(self._transport.stream(query, self._timeout_s))

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        adapter: q.Which | None = None,
        model: str | None = None,
        priority: int | None = None,
        structured_outputs: q.StructuredOutputs | None = None,
        **sampling: Unpack[q.Sampling],
    ) -> a.Completion:
        """Continue a text or a list of token ids."""
        stream_generate = self.stream_generate(
            prompt,
            adapter=adapter,
            model=model,
            priority=priority,
            structured_outputs=structured_outputs,
            **sampling,
        )
        with stream_generate as stream:
            return stream.completion()

    def stream_generate(
        self,
        prompt: str | Sequence[int],
        *,
        adapter: q.Which | None = None,
        model: str | None = None,
        priority: int | None = None,
        structured_outputs: q.StructuredOutputs | None = None,
        **sampling: Unpack[q.Sampling],
    ) -> Stream:
        """The same, token by token."""
        query = q.Generate(prompt, adapter, model, sampling, priority, structured_outputs)
        return Stream(self._transport.stream(query, self._timeout_s))

    def embed(
        self,
        inputs: str | Sequence[str | Sequence[int]],
        *,
        adapter: q.Which | None = None,
        model: str | None = None,
        priority: int | None = None,
        add_special_tokens: bool | None = None,
    ) -> a.Embeddings:
        """A vector for one text, or for each of several texts or lists of token ids."""
        all_inputs = [inputs] if isinstance(inputs, str) else inputs
        query = q.Embed(all_inputs, adapter, model, priority, add_special_tokens)
        return self._transport.call(query, self._timeout_s)

    def tokenize(
        self,
        text: str | Sequence[q.Message],
        *,
        adapter: q.Which | None = None,
        model: str | None = None,
        add_special_tokens: bool | None = None,
    ) -> tuple[int, ...]:
        """The token ids of a text, or of a conversation by the chat template, the adapter's own if
        it brought one."""
        query = tokenize_query(text, add_special_tokens, adapter, model)
        return self._transport.call(query, self._timeout_s)

    def status(self) -> a.Status:
        return self._transport.call(q.GetStatus(), self._timeout_s)

    def drain(self) -> int:
        """Let the server refuse new requests from now on; how many are under way."""
        return self._transport.call(q.Drain(), self._timeout_s)


class Adapters:
    """`client.adapters`. A name is `name` or `tenant/name`."""

    def __init__(self, transport: Transport, timeout_s: float | None) -> None:
        self._transport = transport
        self._timeout_s = timeout_s

    def upload(
        self,
        path: str | Path,
        name: str,
        *,
        expected_generation: str | None = None,
        progress: Progress | None = None,
        timeout_s: float | None = UPLOAD_TIMEOUT_S,
    ) -> a.UploadReport:
        """Publish a PEFT folder, or one .tar, .tar.gz or .zip of one.

        `progress(sent, total)` is told bytes, on another thread. `expected_generation`: what the
        name must stand for now; "": it must be new.
        """
        upload = Upload(name, Path(path), expected_generation, progress or (lambda s, t: None))
        return self._transport.upload(upload, timeout_s)

    def get(self, name: str) -> a.AdapterDetail:
        return self._transport.call(q.GetAdapter(name), self._timeout_s)

    def list(self) -> Iterator[a.Adapter]:
        """All that this key may see, by name, a page at a time."""
        page = self._transport.call(q.ListAdapters(), self._timeout_s)
        yield from page.adapters
        while page.next_page:
            page = self._transport.call(q.ListAdapters(page.next_page), self._timeout_s)
            yield from page.adapters

    def alias(self, name: str, target: str, *, expected_generation: str | None = None) -> a.Adapter:
        """Point `name` at what `target` stands for now."""
        return self._transport.call(q.SetAlias(name, target, expected_generation), self._timeout_s)

    def pin(self, name: str) -> a.Adapter:
        """Keep it in memory."""
        return self._transport.call(q.PinAdapter(name, True), self._timeout_s)

    def unpin(self, name: str) -> a.Adapter:
        return self._transport.call(q.PinAdapter(name, False), self._timeout_s)

    def evict(self, name: str) -> a.Adapter:
        """Take it out of memory unless it is running."""
        return self._transport.call(q.EvictAdapter(name), self._timeout_s)

    def delete(self, name: str, *, expected_generation: str | None = None) -> a.Adapter:
        """Forget the name."""
        return self._transport.call(q.DeleteAdapter(name, expected_generation), self._timeout_s)
