"""Protos -> the bodies that HTTP's JSON is validated as; names of those -> fields of protos.

Checks nothing itself: what is set is passed on, what is unset keeps the schema's default.
Invariant: a refusal names the field as the proto has it.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import AbstractContextManager
from typing import Any

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from loriner.api import grpc_tools
from loriner.api.schema import ChatBody, CompletionBody, EmbeddingBody
from loriner.api.validation import M, renamed, validate
from loriner.errors import InvalidRequestError
from loriner_proto.v1 import inference_pb2 as pb

_ON_LOOP_BYTES = 64 << 10  # larger messages are validated in a thread
_SAMPLING = frozenset(field.name for field in pb.SamplingParams.DESCRIPTOR.fields)
_CHAT_FIELDS = (
    "model",
    "adapter",
    "add_generation_prompt",
    "continue_final_message",
    "priority",
    "parallel_tool_calls",
    "include_reasoning",
    "reasoning_effort",
)
_RENAMED = {"top_logprobs": "logprobs", "max_completion_tokens": "max_tokens"}
_ROLES = {
    pb.ROLE_SYSTEM: "system",
    pb.ROLE_DEVELOPER: "developer",
    pb.ROLE_USER: "user",
    pb.ROLE_ASSISTANT: "assistant",
    pb.ROLE_TOOL: "tool",
}


def named_as_in_proto(prefix: str = "") -> AbstractContextManager[None]:
    """Within it, errors name fields by their path in the message; `prefix` is where that lies."""
    return renamed(lambda param: prefix + _path(param))


def _path(param: str) -> str:
    if param.startswith("adapter["):
        return f"adapters{param.removeprefix('adapter')}"
    head = re.split(r"[.\[]", param, maxsplit=1)[0]
    if head == "input":
        return f"inputs{param.removeprefix(head)}"
    renamed = _RENAMED.get(head, head)
    if renamed in _SAMPLING:
        return f"sampling.{renamed}{param[len(head) :]}"
    if param == "tool_choice.function.name":
        return "tool_choice.function"
    return re.sub(r"^(.*tool_calls\[\d+\]|tools\[\d+\])\.function\b", r"\1", param)


def refuse_unknown(message: Message, path: str = "") -> None:
    """Raises InvalidRequestError for a field that a newer client knows and this server does not:
    protobuf would drop it in silence."""
    unknown = UnknownFieldSet(message)
    if len(unknown):
        raise InvalidRequestError(
            f"Field number {unknown[0].field_number} of {message.DESCRIPTOR.name} is not known to "
            "this server.",
            path or None,
        )
    at = f"{path}." if path else ""
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        if field.is_repeated:
            for i, entry in enumerate(value):
                refuse_unknown(entry, f"{at}{field.name}[{i}]")
        else:
            refuse_unknown(value, f"{at}{field.name}")


async def chat_body(request: pb.ChatRequest) -> ChatBody:
    """Raises InvalidRequestError, in JSON's names."""
    return await _validated(ChatBody, _chat(request), request.ByteSize())


async def completion_body(request: pb.GenerateRequest) -> CompletionBody:
    """Raises InvalidRequestError, in JSON's names."""
    data = _set(request, "model", "adapter", "add_special_tokens", "priority")
    if request.HasField("text"):
        data["prompt"] = request.text
    elif request.HasField("token_ids"):
        data["prompt"] = list(request.token_ids.ids)
    data |= _sampling(request.sampling) | _structured(request) | _adapters(request)
    return await _validated(CompletionBody, data, request.ByteSize())


async def embedding_body(request: pb.EmbedRequest) -> EmbeddingBody:
    """Raises InvalidRequestError, in JSON's names."""
    data = _set(request, "model", "adapter", "add_special_tokens", "priority")
    data |= _adapters(request)
    data["input"] = [
        list(one.token_ids.ids) if one.HasField("token_ids") else _set(one, "text").get("text")
        for one in request.inputs
    ]
    return await _validated(EmbeddingBody, data, request.ByteSize())


async def _validated(model: type[M], data: dict[str, Any], size: int) -> M:
    if size <= _ON_LOOP_BYTES:
        return validate(model, data)
    return await asyncio.to_thread(validate, model, data)


def _chat(request: pb.ChatRequest) -> dict[str, Any]:
    data = {**_set(request, *_CHAT_FIELDS), **_sampling(request.sampling), **_structured(request)}
    data |= _adapters(request)
    data["messages"] = [_message(message) for message in request.messages]
    data |= grpc_tools.asked(request)
    if request.chat_template_kwargs:
        data["chat_template_kwargs"] = {
            key: getattr(value, value.WhichOneof("value") or "", None)
            for key, value in request.chat_template_kwargs.items()
        }
    if "logprobs" in data:
        data |= {"logprobs": True, "top_logprobs": data["logprobs"]}
    return data


def _sampling(params: pb.SamplingParams) -> dict[str, Any]:
    data: dict[str, Any] = {field.name: value for field, value in params.ListFields()}
    if "logit_bias" in data:
        data["logit_bias"] = {str(token): bias for token, bias in params.logit_bias.items()}
    for name in ("stop", "stop_token_ids"):
        if name in data:
            data[name] = list(data[name])
    return data


def _adapters(request: pb.ChatRequest | pb.GenerateRequest | pb.EmbedRequest) -> dict[str, Any]:
    if not request.adapters:
        return {}
    if request.HasField("adapter"):
        raise InvalidRequestError("adapter and adapters exclude each other.", "adapters")
    return {"adapter": [_set(one, "scale") | {"name": one.name} for one in request.adapters]}


def _structured(request: pb.ChatRequest | pb.GenerateRequest) -> dict[str, Any]:
    if not request.HasField("structured_outputs"):
        return {}
    asked = request.structured_outputs
    kind = asked.WhichOneof("constraint")
    if kind is None:
        return {"structured_outputs": {}}
    value = list(asked.choice.texts) if kind == "choice" else getattr(asked, kind)
    return {"structured_outputs": {kind: value}}


def _message(message: pb.Message) -> dict[str, Any]:
    data = {"role": _ROLES.get(message.role, ""), **_set(message, "content", "name", "reasoning")}
    data |= _set(message, "tool_call_id")
    if message.tool_calls:
        data["tool_calls"] = [
            {"id": call.id, "function": {"name": call.name, "arguments": call.arguments}}
            for call in message.tool_calls
        ]
    return data


def _set(message: Any, *names: str) -> dict[str, Any]:
    """The optional fields of these names that are set."""
    return {name: getattr(message, name) for name in names if message.HasField(name)}
