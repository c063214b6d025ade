"""One response as bytes: its typed events, or its whole body.

Knows no sending. Invariant: the response that the last event holds is the whole body.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import msgspec

from loriner.api import response_shapes as shapes
from loriner.api.formats import Gathered
from loriner.api.response_body import ResponseBody
from loriner.api.response_output import Output
from loriner.api.running import Run
from loriner.api.schema import ChatBody
from loriner.api.shapes import Origin
from loriner.api.status import message_of, row_of
from loriner.api.voice import Said

_STATUSES = {"length": "incomplete"}  # of finish reasons; all others are complete


class ResponseWriter:
    """Of one run."""

    def __init__(self, run: Run, origin: Origin, asked: ResponseBody, chat: ChatBody) -> None:
        self._run = run
        stem = run.answer_id.rpartition("-")[2]
        self._output = Output(stem)
        self._response = _echoed(run, origin, asked, chat, f"resp_{stem}")

    def opening(self) -> bytes:
        return self._now("created") + self._now("in_progress")

    def part(self, said: Said) -> bytes:
        events = self._output.add(said.pieces)
        if said.finish_reason is not None:
            events += self._finish(said.finish_reason)
        return b"".join(_encode(event) for event in events)

    def closing(self) -> bytes:
        return self._now(self._response.status)

    def failure(self, error: Exception) -> bytes:
        status = row_of(error).status
        code = "server_error" if status >= 500 else "invalid_prompt"
        message = message_of(error, self._run.job.request_id)
        self._response.status, self._response.output = "failed", list(self._output.items)
        self._response.error = shapes.Failure(
            "rate_limit_exceeded" if status == 429 else code, message
        )
        return self._now("failed")

    def whole(self, choices: Sequence[Gathered]) -> shapes.Response:
        (choice,) = choices
        self._output.add(choice.pieces)
        self._finish(choice.finish_reason)
        return self._response

    def _finish(self, reason: str) -> list[shapes.Event]:
        response, run = self._response, self._run
        response.status = _STATUSES.get(reason, "completed")
        events = self._output.end(response.status)
        response.output = list(self._output.items)
        if response.status == "completed":
            response.completed_at = int(time.time())
        else:
            response.incomplete_details = shapes.Cut()
        response.usage = shapes.ResponseUsage(
            run.prompt_tokens,
            run.output_tokens,
            run.prompt_tokens + run.output_tokens,
            shapes.InputTokens(run.cached_tokens),
            shapes.OutputTokens(run.reasoning_tokens),
        )
        return events

    def _now(self, what: str) -> bytes:
        event = shapes.ResponseEvent(f"response.{what}", self._output.number(), self._response)
        return _encode(event)


def _encode(event: shapes.Event) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (event.type.encode(), msgspec.json.encode(event))


def _echoed(
    run: Run, origin: Origin, asked: ResponseBody, chat: ChatBody, response_id: str
) -> shapes.Response:
    """The response before its first token, with what was asked."""
    return shapes.Response(
        id=response_id,
        created_at=run.created,
        model=run.model,
        instructions=asked.instructions,
        max_output_tokens=asked.max_output_tokens,
        metadata=asked.metadata,
        parallel_tool_calls=asked.parallel_tool_calls,
        prompt_cache_key=asked.prompt_cache_key,
        safety_identifier=asked.safety_identifier,
        reasoning=shapes.Effort(chat.reasoning_effort),
        presence_penalty=chat.presence_penalty,
        frequency_penalty=chat.frequency_penalty,
        temperature=asked.temperature,
        text=_text(asked),
        tool_choice=_plain(asked.tool_choice),
        tools=[_tool(tool) for tool in asked.tools],
        top_p=asked.top_p,
        user=asked.user,
        loriner=origin,
    )


def _text(asked: ResponseBody) -> dict[str, Any]:
    form = asked.text.format
    shown = {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)
    return {"format": shown, "verbosity": "medium"}


def _tool(tool: Any) -> dict[str, Any]:
    return {"parameters": None, "strict": False, **tool.model_dump(exclude_none=True)}


def _plain(choice: Any) -> Any:
    return choice if isinstance(choice, str) else choice.model_dump()
