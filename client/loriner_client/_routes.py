"""Which HTTP request asks which query, and what reads its answer. Knows no connection."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from loriner_client import _json
from loriner_client import _queries as q

ADAPTERS = "/admin/adapters"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@dataclass(frozen=True, slots=True)
class Ask:
    """One HTTP request."""

    method: str
    path: str
    body: _json.Json | None = None
    headers: Mapping[str, str] | None = None
    is_retryable: bool = True


def stream_ask(query: q.StreamQuery) -> Ask:
    more = {"stream": True, "stream_options": {"include_usage": True}}
    if isinstance(query, q.Chat):
        return Ask("POST", CHAT, _json.chat_body(query) | more)
    return Ask("POST", COMPLETIONS, _json.generate_body(query) | more)


def _alias(query: q.SetAlias) -> Ask:
    body: _json.Json = {"target": query.target}
    if query.expected_generation is not None:
        body["expected_generation"] = query.expected_generation
    return Ask("PUT", f"/admin/aliases/{quote(query.name)}", body, is_retryable=False)


def _delete(query: q.DeleteAdapter) -> Ask:
    expected = query.expected_generation
    headers = {} if expected is None else {"if-match": f'"{expected}"'}
    return Ask("DELETE", _one(query.name), headers=headers, is_retryable=False)


def _pin(query: q.PinAdapter) -> Ask:
    return Ask("POST", _one(query.name) + ("/pin" if query.pinned else "/unpin"))


def _one(name: str) -> str:
    return f"{ADAPTERS}/{quote(name)}"


Route = tuple[Callable[[Any], Ask], Callable[[Any], Any]]
ROUTES: dict[type, Route] = {
    q.Chat: (lambda query: Ask("POST", CHAT, _json.chat_body(query)), _json.completion),
    q.Tokenize: (
        lambda query: Ask("POST", "/tokenize", _json.tokenize_body(query)),
        lambda body: tuple(body["tokens"]),
    ),
    q.Embed: (
        lambda query: Ask("POST", "/v1/embeddings", _json.embed_body(query)),
        _json.embeddings,
    ),
    q.GetAdapter: (lambda query: Ask("GET", _one(query.name)), _json.detail),
    q.ListAdapters: (lambda query: Ask("GET", ADAPTERS), _json.page),
    q.SetAlias: (_alias, _json.adapter),
    q.PinAdapter: (_pin, _json.adapter),
    q.DeleteAdapter: (_delete, _json.adapter),
    q.EvictAdapter: (lambda query: Ask("POST", _one(query.name) + "/evict"), _json.adapter),
    q.GetStatus: (lambda query: Ask("GET", "/admin/status"), _json.status),
    q.Drain: (
        lambda query: Ask("POST", "/admin/drain", is_retryable=False),
        lambda body: body["num_open"],
    ),
}
