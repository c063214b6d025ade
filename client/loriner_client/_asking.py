"""What both clients do before a transport is asked: settings from arguments, turns from texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from loriner_client._config import Retry, Settings, Tls
from loriner_client._errors import InvalidRequestError
from loriner_client._queries import (
    Asked,
    Chat,
    ChatOptions,
    Message,
    Sampling,
    StructuredOutputs,
    TemplateValue,
    Tokenize,
    Which,
)
from loriner_client._transport import AsyncTransport, Transport

Turns = str | Sequence[Message | Mapping[str, str]]


def settings_of(
    address: str | Sequence[str], key: str, tls: Tls | None, retry: Retry | None
) -> Settings:
    """Raises ConfigError."""
    addresses = (address,) if isinstance(address, str) else tuple(address)
    return Settings(addresses, key, tls, retry or Retry())


def open_transport(settings: Settings) -> Transport:
    """The transport's library is imported only when it is used."""
    if settings.is_http:
        from loriner_client._http import HttpTransport

        return HttpTransport(settings)
    from loriner_client._grpc import GrpcTransport

    return GrpcTransport(settings)


def open_async_transport(settings: Settings) -> AsyncTransport:
    """The same for `AsyncClient`."""
    if settings.is_http:
        from loriner_client._http import AsyncHttpTransport

        return AsyncHttpTransport(settings)
    from loriner_client._grpc import AsyncGrpcTransport

    return AsyncGrpcTransport(settings)


def chat_query(
    messages: Turns,
    adapter: Which | None,
    model: str | None,
    priority: int | None,
    template: Mapping[str, TemplateValue] | None,
    structured_outputs: StructuredOutputs | None,
    asked: Asked,
) -> Chat:
    """A text is one user's turn; a mapping has the fields of a Message."""
    turns = [Message("user", messages)] if isinstance(messages, str) else messages
    made = [turn if isinstance(turn, Message) else _message(turn) for turn in turns]
    given = cast(dict[str, Any], asked)
    options = {name: given[name] for name in given if name in ChatOptions.__annotations__}
    sampling = {name: given[name] for name in given if name not in options}
    return Chat(
        made,
        adapter,
        model,
        cast(Sampling, sampling),
        priority,
        template or {},
        structured_outputs,
        cast(ChatOptions, options),
    )


def tokenize_query(
    text: str | Sequence[Message],
    add_special_tokens: bool | None,
    adapter: Which | None,
    model: str | None,
) -> Tokenize:
    """Raises InvalidRequestError for a text on an adapter: its tokens are the same on all."""
    if isinstance(text, str) and (adapter is not None or model is not None):
        raise InvalidRequestError("adapter and model are of a conversation, not of a text.")
    return Tokenize(text, add_special_tokens, adapter, model)


def _message(turn: Mapping[str, str]) -> Message:
    return Message(turn.get("role", ""), turn.get("content"), turn.get("name"))
