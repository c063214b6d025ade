"""Values <-> the JSON of the HTTP door. Knows no path, no connection."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from loriner_client import _answers as a
from loriner_client import _queries as q
from loriner_client._errors import InvalidRequestError, Refusal, TransportError, error_of
from loriner_client._tool_json import calls, options

Json = dict[str, Any]
DONE = "[DONE]"


def chat_body(query: q.Chat) -> Json:
    body = _body(query)
    body["messages"] = [_message(message) for message in query.messages]
    if query.template:
        body["chat_template_kwargs"] = dict(query.template)
    body |= options(query.options)
    if "logprobs" in query.sampling:
        body |= {"logprobs": True, "top_logprobs": query.sampling["logprobs"]}
    return body


def generate_body(query: q.Generate) -> Json:
    prompt = query.prompt if isinstance(query.prompt, str) else list(query.prompt)
    return {**_body(query), "prompt": prompt}


def _body(query: q.StreamQuery) -> Json:
    body: Json = {**query.sampling, "return_token_ids": True}
    if "logit_bias" in query.sampling:
        bias = query.sampling["logit_bias"].items()
        body["logit_bias"] = {str(token): value for token, value in bias}
    for name in ("stop", "stop_token_ids"):
        if name in body:
            body[name] = list(body[name])
    chosen = {
        "model": query.model,
        "adapter": _which(query.adapter),
        "priority": query.priority,
        "structured_outputs": query.structured_outputs,
    }
    return body | {key: value for key, value in chosen.items() if value is not None}


def _which(adapter: q.Which | None) -> str | list[Json] | None:
    if adapter is None or isinstance(adapter, str):
        return adapter
    return [{"name": name, "scale": scale} for name, scale in adapter.items()] or None


def _message(message: q.Message) -> Json:
    body: Json = {"role": message.role, "content": message.content}
    for name in ("name", "tool_call_id", "reasoning"):
        if getattr(message, name) is not None:
            body[name] = getattr(message, name)
    if message.tool_calls:
        body["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in message.tool_calls
        ]
    return body


def tokenize_body(query: q.Tokenize) -> Json:
    if isinstance(query.input, str):
        body: Json = {"prompt": query.input}
    else:
        body = {"messages": [_message(message) for message in query.input]}
    chosen = {
        "add_special_tokens": query.add_special_tokens,
        "adapter": _which(query.adapter),
        "model": query.model,
    }
    return body | {key: value for key, value in chosen.items() if value is not None}


def embed_body(query: q.Embed) -> Json:
    inputs = [one if isinstance(one, str) else list(one) for one in query.inputs]
    chosen = {
        "model": query.model,
        "adapter": _which(query.adapter),
        "priority": query.priority,
        "add_special_tokens": query.add_special_tokens,
    }
    body: Json = {key: value for key, value in chosen.items() if value is not None}
    return body | {"input": inputs, "encoding_format": "base64"}


def completion(body: Json) -> a.Completion:
    choices = tuple(delta(choice, choice["message"]) for choice in body["choices"])
    return a.Completion(opening(body), choices, usage(body))


def embeddings(body: Json) -> a.Embeddings:
    vectors = tuple(_vector(entry["embedding"]) for entry in body["data"])
    return a.Embeddings(opening(body), vectors, a.Usage(body["usage"]["prompt_tokens"], 0))


def _vector(text: str) -> tuple[float, ...]:
    data = base64.b64decode(text)
    return struct.unpack(f"<{len(data) // 4}f", data)


class Reader:
    """The lines of one event stream -> its parts. Raises what an error event says."""

    def __init__(self) -> None:
        self._is_open = False
        self.is_done = False

    def feed(self, line: str) -> list[a.Part]:
        data = line.removeprefix("data: ")
        if data == line or self.is_done:
            return []
        if data == DONE:
            self.is_done = True
            return []
        event = json.loads(data)
        refused = refusal(event, {})
        if refused is not None:
            raise error_of(refused)
        found: list[a.Part] = decoded(self._parts, event)
        return found

    def finish(self) -> None:
        """Raises TransportError when the stream was cut."""
        if not self.is_done:
            raise TransportError("The answer was cut.")

    def _parts(self, event: Json) -> list[a.Part]:
        found: list[a.Part] = []
        if not self._is_open and "loriner" in event:
            self._is_open = True
            found.append(opening(event))
        for choice in event["choices"]:
            adds = choice["delta"] if "delta" in choice else {"content": choice["text"]}
            made = delta(choice, adds)
            if made != a.Delta("", made.index):
                found.append(made)
        if event.get("usage"):
            found.append(usage(event))
        return found


def opening(body: Json) -> a.Opening:
    origin = body["loriner"]
    return a.Opening(
        body["id"],
        body["model"],
        origin["adapter"],
        origin["generation"],
        origin["base_digest"],
        origin["cold_start"],
        tuple(_of_prompt(body)),
    )


def _of_prompt(body: Json) -> Iterator[a.TokenLogprob]:
    """In vLLM's shape: by token id, the prompt's own first."""
    choice: Json = next(iter(body.get("choices") or ()), {})
    for entry in body.get("prompt_logprobs") or choice.get("prompt_logprobs") or ():
        if entry is not None:
            own, *top = (
                a.TokenLogprob(one["decoded_token"], one["logprob"], int(token_id))
                for token_id, one in entry.items()
            )
            yield a.TokenLogprob(own.token, own.logprob, own.token_id, tuple(top))


def delta(choice: Json, adds: Json) -> a.Delta:
    """`adds`: a message, or what is added to it."""
    return a.Delta(
        adds.get("content") or "",
        choice["index"],
        tuple(choice.get("token_ids") or ()),
        tuple(_logprobs(choice.get("logprobs") or {})),
        choice.get("finish_reason"),
        choice.get("stop_reason"),
        adds.get("reasoning") or "",
        tuple(calls(adds)),
    )


def _logprobs(found: Json) -> Iterator[a.TokenLogprob]:
    for entry in found.get("content") or ():
        top = tuple(a.TokenLogprob(one["token"], one["logprob"]) for one in entry["top_logprobs"])
        yield a.TokenLogprob(entry["token"], entry["logprob"], top=top)
    for token, logprob, best in zip(
        found.get("tokens", ()),
        found.get("token_logprobs", ()),
        found.get("top_logprobs", ()),
        strict=True,
    ):
        top = tuple(a.TokenLogprob(text, value) for text, value in best.items())
        yield a.TokenLogprob(token, logprob, top=top)


def usage(body: Json) -> a.Usage:
    found = body["usage"]
    cached = found["prompt_tokens_details"]["cached_tokens"]
    thought = found["completion_tokens_details"]["reasoning_tokens"]
    return a.Usage(found["prompt_tokens"], found["completion_tokens"], cached, thought)


def adapter(body: Json) -> a.Adapter:
    known: Json = {name: body.get(name) for name in a.Adapter.__dataclass_fields__}
    known |= {"ranks": tuple(body["ranks"]), "targets": tuple(body["targets"])}
    return a.Adapter(**known)


def detail(body: Json) -> a.AdapterDetail:
    return a.AdapterDetail(adapter(body), tuple(map(adapter, body["history"])))


def page(body: Json) -> a.AdapterPage:
    return a.AdapterPage(tuple(map(adapter, body["adapters"])))


def report(body: Json) -> a.UploadReport:
    known: Json = {name: body.get(name) for name in a.UploadReport.__dataclass_fields__}
    for name in ("ranks", "targets", "ignored"):
        known[name] = tuple(known[name] or ())
    return a.UploadReport(**known)


def status(body: Json) -> a.Status:
    return a.Status(**{name: body[name] for name in a.Status.__dataclass_fields__})


def refusal(body: Any, headers: Mapping[str, str]) -> Refusal | None:
    """None when it is not the body of an error of ours."""
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return None
    code = error.get("code")
    if code is None and error.get("type") == "invalid_request_error":
        code = "invalid_request"
    retry_ms = headers.get("retry-after-ms")
    return Refusal(
        str(error.get("message")),
        code,
        error.get("param"),
        headers.get("x-request-id"),
        tuple(error.get("reasons", ())),
        float(retry_ms) / 1000 if retry_ms else None,
    )


def encoded(body: Json | None) -> bytes | None:
    """Raises InvalidRequestError for what JSON cannot say."""
    try:
        return None if body is None else json.dumps(body, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(f"The request cannot be written: {error}.") from error


def decoded(decode: Callable[[Any], Any], body: Any) -> Any:
    """Raises TransportError when `body` is not what the door answers with."""
    try:
        return decode(body)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise TransportError(f"The answer is not a Loriner server's: {error!r}.") from error
