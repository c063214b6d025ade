"""Values <-> protos. Knows no method, no channel."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from loriner_client import _answers as a
from loriner_client import _queries as q
from loriner_client._tool_protos import calls, options
from loriner_client._upload import Begin, End, Upload, pieces
from loriner_proto.v1 import adapters_pb2 as ad
from loriner_proto.v1 import admin_pb2 as adm
from loriner_proto.v1 import inference_pb2 as inf

_ROLES = {
    "system": inf.ROLE_SYSTEM,
    "developer": inf.ROLE_DEVELOPER,
    "user": inf.ROLE_USER,
    "assistant": inf.ROLE_ASSISTANT,
    "tool": inf.ROLE_TOOL,
}
_FINISH = {
    inf.FINISH_REASON_STOP: "stop",
    inf.FINISH_REASON_LENGTH: "length",
    inf.FINISH_REASON_TOOL_CALLS: "tool_calls",
}
_TIERS = {ad.TIER_DISK: "disk", ad.TIER_HOST: "host", ad.TIER_GPU: "gpu"}
_STATES = {
    ad.ADAPTER_STATE_READY: "ready",
    ad.ADAPTER_STATE_QUARANTINED: "quarantined",
    ad.ADAPTER_STATE_OTHER_BASE: "other base",
}


def chat(query: q.Chat) -> inf.ChatRequest:
    return inf.ChatRequest(
        model=query.model,
        **_which(query.adapter),
        messages=[_message(message) for message in query.messages],
        sampling=_sampling(query.sampling),
        priority=query.priority,
        chat_template_kwargs={key: _template(value) for key, value in query.template.items()},
        structured_outputs=_structured(query.structured_outputs),
        **options(query.options),
    )


def _which(adapter: q.Which | None) -> dict[str, Any]:
    if adapter is None or isinstance(adapter, str):
        return {"adapter": adapter}
    parts = [inf.ScaledAdapter(name=name, scale=scale) for name, scale in adapter.items()]
    return {"adapters": parts}


def generate(query: q.Generate) -> inf.GenerateRequest:
    text = query.prompt if isinstance(query.prompt, str) else None
    ids = None if isinstance(query.prompt, str) else inf.TokenIds(ids=query.prompt)
    return inf.GenerateRequest(
        model=query.model,
        **_which(query.adapter),
        text=text,
        token_ids=ids,
        sampling=_sampling(query.sampling),
        priority=query.priority,
        structured_outputs=_structured(query.structured_outputs),
    )


def tokenize(query: q.Tokenize) -> inf.TokenizeRequest:
    if isinstance(query.input, str):
        return inf.TokenizeRequest(text=query.input, add_special_tokens=query.add_special_tokens)
    asked = chat(q.Chat(query.input, query.adapter, query.model))
    return inf.TokenizeRequest(chat=asked, add_special_tokens=query.add_special_tokens)


def embed(query: q.Embed) -> inf.EmbedRequest:
    return inf.EmbedRequest(
        model=query.model,
        **_which(query.adapter),
        inputs=[
            inf.EmbedInput(text=one)
            if isinstance(one, str)
            else inf.EmbedInput(token_ids=inf.TokenIds(ids=one))
            for one in query.inputs
        ],
        add_special_tokens=query.add_special_tokens,
        priority=query.priority,
    )


def _sampling(sampling: q.Sampling) -> inf.SamplingParams:
    return inf.SamplingParams(**sampling)


def _structured(asked: q.StructuredOutputs | None) -> inf.StructuredOutputs | None:
    """Raises TypeError for what names more than one."""
    if asked is None:
        return None
    if len(asked) > 1:
        raise TypeError(f"structured_outputs takes one of {', '.join(sorted(asked))}")
    made: dict[str, Any] = {**asked}
    if "choice" in asked:
        made["choice"] = inf.Choices(texts=asked["choice"])
    if "json" in asked and not isinstance(asked["json"], str):
        made["json"] = json.dumps(asked["json"])
    return inf.StructuredOutputs(**made)


def _message(message: q.Message) -> inf.Message:
    return inf.Message(
        role=_ROLES.get(message.role, inf.ROLE_UNSPECIFIED),
        content=message.content,
        name=message.name,
        tool_calls=[
            inf.ToolCall(id=call.id, name=call.name, arguments=call.arguments)
            for call in message.tool_calls
        ],
        tool_call_id=message.tool_call_id,
        reasoning=message.reasoning,
    )


def _template(value: q.TemplateValue) -> inf.TemplateValue:
    if isinstance(value, bool):
        return inf.TemplateValue(bool_value=value)
    if isinstance(value, int):
        return inf.TemplateValue(int_value=value)
    if isinstance(value, float):
        return inf.TemplateValue(double_value=value)
    return inf.TemplateValue(string_value=value)


def completion(answer: inf.ChatResponse) -> a.Completion:
    choices = tuple(_delta(choice) for choice in answer.choices)
    return a.Completion(_opening(answer.opening), choices, _usage(answer.usage))


def embeddings(answer: inf.EmbedResponse) -> a.Embeddings:
    vectors = tuple(tuple(one.values) for one in answer.embeddings)
    return a.Embeddings(_opening(answer.opening), vectors, _usage(answer.usage))


def part(message: inf.GenerateResponse | inf.StreamChatResponse) -> a.Part:
    if message.HasField("opening"):
        return _opening(message.opening)
    if message.HasField("usage"):
        return _usage(message.usage)
    return _delta(message.delta)


def _opening(opening: inf.Opening) -> a.Opening:
    return a.Opening(
        opening.answer_id,
        opening.model,
        _given(opening, "adapter"),
        _given(opening, "generation"),
        opening.base_digest,
        opening.cold_start,
        tuple(_of_prompt(entry) for entry in opening.prompt_logprobs),
    )


def _of_prompt(entry: inf.TokenLogprob) -> a.TokenLogprob:
    made = _logprob(entry)
    others = tuple(one for one in made.top if one.token_id != made.token_id)
    return a.TokenLogprob(made.token, made.logprob, made.token_id, others)


def _delta(delta: inf.Delta | inf.Choice) -> a.Delta:
    stop = delta.stop_reason.WhichOneof("reason")
    return a.Delta(
        delta.text,
        delta.index,
        tuple(delta.token_ids),
        tuple(_logprob(entry) for entry in delta.logprobs),
        _FINISH.get(delta.finish_reason),
        getattr(delta.stop_reason, stop) if stop else None,
        delta.reasoning,
        tuple(calls(delta)),
    )


def _logprob(entry: inf.TokenLogprob) -> a.TokenLogprob:
    top = tuple(a.TokenLogprob(one.token, one.logprob, one.token_id) for one in entry.top)
    return a.TokenLogprob(entry.token, entry.logprob, entry.token_id, top)


def _usage(usage: inf.Usage) -> a.Usage:
    return a.Usage(
        usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens, usage.reasoning_tokens
    )


def adapter(entry: ad.Adapter) -> a.Adapter:
    return a.Adapter(
        name=entry.name,
        generation=entry.generation,
        ranks=tuple(entry.ranks),
        targets=tuple(entry.targets),
        num_bytes=entry.num_bytes,
        pinned=entry.pinned,
        created_at=entry.created_at,
        alias_of=_given(entry, "alias_of"),
        base_digest=_given(entry, "base_digest"),
        source=entry.source,
        state=_STATES.get(entry.state, "unknown"),
        tier=_TIERS.get(entry.tier),
        has_template=entry.has_template,
    )


def detail(answer: ad.GetResponse) -> a.AdapterDetail:
    history = tuple(adapter(entry) for entry in answer.history)
    return a.AdapterDetail(adapter(answer.adapter), history)


def page(answer: ad.ListResponse) -> a.AdapterPage:
    return a.AdapterPage(tuple(map(adapter, answer.adapters)), answer.next_page_token)


def status(answer: adm.StatusResponse) -> a.Status:
    return a.Status(**{name: getattr(answer, name) for name in a.Status.__dataclass_fields__})


def _given(message: Any, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None


def upload_parts(upload: Upload) -> Iterator[ad.UploadRequest]:
    """The messages of one upload."""
    header = ad.UploadHeader(name=upload.name, expected_generation=upload.expected_generation)
    yield ad.UploadRequest(header=header)
    for piece in pieces(upload):
        if isinstance(piece, Begin):
            file = ad.UploadFile(name=piece.name, num_bytes=piece.num_bytes)
            yield ad.UploadRequest(file=file)
        elif isinstance(piece, End):
            yield ad.UploadRequest(file_end=ad.UploadFileEnd(sha256=piece.sha256))
        else:
            yield ad.UploadRequest(chunk=piece)


def report(answer: ad.UploadResponse) -> a.UploadReport:
    return a.UploadReport(
        name=answer.name,
        generation=answer.generation,
        ranks=tuple(answer.ranks),
        targets=tuple(answer.targets),
        num_bytes=answer.num_bytes,
        modules_matched=answer.modules_matched,
        modules_total=answer.modules_total,
        existed=answer.existed,
        ignored=tuple(answer.ignored),
    )
