"""From what the caller wrote (messages, text, token ids) to token ids, off the event loop where it
costs.

Knows the Service's tokenizer and template by their two methods alone. Invariant: every piece of
content is used or refused with `param`.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loriner.adapters.names import show
from loriner.api.reasoning import effort_kwargs
from loriner.api.schema import (
    ChatBody,
    CompletionBody,
    ContentPart,
    EmbeddingBody,
    Message,
    ToolCall,
)
from loriner.api.tool_calling import ToolCalling
from loriner.api.tool_formats import format_of, knows_system, knows_tools
from loriner.api.tool_prompt import Turn, explained
from loriner.api.tool_schema import ToolUse
from loriner.core import MAX_CHOICES
from loriner.engine.admission import check_length
from loriner.errors import InvalidRequestError

if TYPE_CHECKING:
    from loriner.engine.service import Service

MAX_PROMPTS = 128
MAX_INPUTS = 2048
_ON_LOOP_CHARS = 2048  # longer texts are tokenised in a thread

# What a caller's chat_template_kwargs may not replace.
_RESERVED_KWARGS = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, ready to run. `text` is what `echo` puts before the answer: of a chat, the last
    message if it is the assistant's. `continued`: that message when the answer goes on with it."""

    ids: list[int]
    text: str = ""
    continued: str | None = None


async def from_chat(
    service: Service,
    body: ChatBody,
    template: str,
    calling: ToolCalling | None,
    *,
    is_own: bool = False,
) -> Prompt:
    """Render the chat template; `is_own`: an adapter brought it. Raises InvalidRequestError naming
    the message and part."""
    kwargs = _kwargs(body, template)
    generation_prompt = body.add_generation_prompt
    turns = [_plain(message, f"messages[{i}]") for i, message in enumerate(body.messages)]
    use = None if calling is None else calling.use
    echoed = turns[-1]["content"] if body.echo and turns[-1]["role"] == "assistant" else ""
    turns, tools = _with_tools(template, service.tool_format, turns, use)
    ids = await service.render_chat(
        turns,
        tools=tools,
        add_generation_prompt=(
            not body.continue_final_message if generation_prompt is None else generation_prompt
        ),
        continue_final_message=body.continue_final_message,
        template_kwargs=kwargs or None,
        template=template if is_own else None,
        add_special_tokens=body.add_special_tokens,
    )
    return Prompt(ids, echoed, turns[-1]["content"] if body.continue_final_message else None)


def _kwargs(body: ChatBody, template: str) -> dict[str, Any]:
    """What the template is given beside messages and tools."""
    asked = effort_kwargs(template, body.reasoning_effort)
    reserved = (_RESERVED_KWARGS | asked.keys()) & body.chat_template_kwargs.keys()
    if reserved:
        beside = " beside reasoning_effort" if reserved <= asked.keys() else ""
        raise InvalidRequestError(
            f"chat_template_kwargs may not set {', '.join(sorted(reserved))}{beside}.",
            "chat_template_kwargs",
        )
    return {**body.chat_template_kwargs, **asked}


def _with_tools(
    template: str, tool_format: str, turns: list[Turn], use: ToolUse | None
) -> tuple[list[Turn], list[dict[str, Any]] | None]:
    """The turns and the tools to render: those that a template cannot write are in the turns."""
    if use is None and not any(turn["role"] == "tool" or "tool_calls" in turn for turn in turns):
        return turns, None
    if knows_tools(template):
        return turns, None if use is None else use.described()
    form = format_of(template, tool_format)
    return explained(turns, use, form, has_system=knows_system(template)), None


async def template_of(service: Service) -> str:
    """The chat template, whose tokenizer may still be loading."""
    return await asyncio.to_thread(lambda: service.chat.template)


async def from_completion(service: Service, body: CompletionBody) -> list[Prompt]:
    """One Prompt for each entry of `prompt`: string, strings, token ids, or lists of token ids."""
    entries = _entries(body.prompt, "prompt")
    if len(entries) > MAX_PROMPTS or len(entries) * body.n > MAX_CHOICES:
        raise InvalidRequestError(
            f"prompt has {len(entries)} entries with n {body.n}: at most {MAX_PROMPTS} prompts and "
            f"{MAX_CHOICES} choices in one request.",
            "prompt",
        )
    return await _encoded(service, entries, "prompt", body.add_special_tokens, body.echo)


async def from_inputs(service: Service, body: EmbeddingBody) -> list[Prompt]:
    """One Prompt for each entry of `input`, as of `prompt`; all of them can be run."""
    entries = _entries(body.input, "input")
    if len(entries) > MAX_INPUTS:
        raise InvalidRequestError(
            f"input has {len(entries)} entries: at most {MAX_INPUTS} in one request.", "input"
        )
    made = await _encoded(service, entries, "input", body.add_special_tokens)
    for i, prompt in enumerate(made):
        param = "input" if len(made) == 1 else f"input[{i}]"
        check_length(len(prompt.ids), service.max_model_len, param)
        check_ids(prompt.ids, param, service.vocab_size)
    return made


async def from_text(service: Service, text: str, add_special_tokens: bool) -> list[int]:
    """The tokens of one text, in a thread when it is long."""
    if len(text) <= _ON_LOOP_CHARS:
        return service.encode(text, add_special_tokens=add_special_tokens)
    return await asyncio.to_thread(service.encode, text, add_special_tokens)


def _entries(prompt: str | list[Any], param: str) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if prompt and all(type(entry) is int for entry in prompt):
        return [prompt]
    if not prompt:
        raise InvalidRequestError(f"{param} must not be empty.", param)
    for i, entry in enumerate(prompt):
        is_ids = isinstance(entry, list) and entry and all(type(token) is int for token in entry)
        if not (isinstance(entry, str) or is_ids):
            raise InvalidRequestError(
                f"{param} must be a string, a list of strings, a list of token ids, or a list of "
                "lists of token ids.",
                f"{param}[{i}]",
            )
    return prompt


async def _encoded(
    service: Service,
    entries: list[str | list[int]],
    param: str,
    special: bool,
    echo: bool = False,
) -> list[Prompt]:
    if sum(len(entry) for entry in entries) <= _ON_LOOP_CHARS:
        return _encode(service, entries, param, special, echo)
    return await asyncio.to_thread(_encode, service, entries, param, special, echo)


def _encode(
    service: Service, entries: list[str | list[int]], param: str, special: bool, echo: bool
) -> list[Prompt]:
    prompts = []
    for entry in entries:
        if isinstance(entry, str):
            ids = service.encode(entry, add_special_tokens=special)
            prompts.append(Prompt(ids, entry if echo else ""))
        else:
            check_ids(entry, param)
            prompts.append(Prompt(entry, service.decode(entry) if echo else ""))
    return prompts


def check_ids(ids: list[int], param: str, vocab_size: int = 2**31) -> None:
    """Before the detokenizer sees them; of prompts the Service knows the exact bound."""
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        raise InvalidRequestError(f"{param} holds a token id that is out of vocabulary.", param)


def _plain(message: Message, param: str) -> dict[str, Any]:
    """The message as chat templates expect it: plain strings, `developer` as `system`."""
    content = _text_of(message.content, f"{param}.content")
    if content is None and message.role != "assistant":
        raise InvalidRequestError(f"'{param}.content' must be given.", f"{param}.content")
    plain: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": content or "",
    }
    if message.name is not None:
        plain["name"] = message.name
    if thought := message.reasoning_content or message.reasoning:
        if message.role != "assistant":
            field = f"{param}.reasoning"
            raise InvalidRequestError(f"'{field}' is of an assistant alone.", field)
        plain["reasoning_content"] = thought
    if message.tool_calls:
        plain["tool_calls"] = [
            _tool_call(call, f"{param}.tool_calls[{i}]")
            for i, call in enumerate(message.tool_calls)
        ]
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    return plain


def _text_of(content: str | list[ContentPart] | None, param: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    texts = []
    for i, part in enumerate(content):
        text = {"text": part.text, "refusal": part.refusal}.get(part.type)
        if part.type not in ("text", "refusal"):
            raise InvalidRequestError(
                f"Content of type '{show(part.type)}' is not served: this is a text model.",
                f"{param}[{i}].type",
            )
        if text is None:
            raise InvalidRequestError(
                f"Missing required parameter: '{param}[{i}].{part.type}'.",
                f"{param}[{i}].{part.type}",
            )
        texts.append(text)
    return "\n".join(texts)


def _tool_call(call: ToolCall, param: str) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        raise InvalidRequestError(
            "Tool call arguments must be a JSON object in a string.", f"{param}.function.arguments"
        ) from None
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}
