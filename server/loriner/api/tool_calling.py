"""One request's tools, from its prompt to its answer: what is rendered, enforced and read.

Joins the caller's `ToolUse` with the base's `ToolFormat`. Invariant: a call that must be made, or
whose function is strict, is written under a grammar; others are read as the model wrote them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loriner.api.tool_formats import ToolFormat
from loriner.api.tool_reader import ToolReader
from loriner.api.tool_schema import ToolUse
from loriner.core import SamplingParams
from loriner.engine.grammars import Constraint, Kind
from loriner.errors import InvalidRequestError

if TYPE_CHECKING:
    from loriner.engine.service import Service


@dataclass(frozen=True, slots=True)
class ToolCalling:
    """What may be called, and how the base writes it."""

    use: ToolUse
    form: ToolFormat

    def reader(self) -> ToolReader:
        names = {function.name for function in self.use.functions}
        return ToolReader(self.form, names, max_calls=None if self.use.is_parallel else 1)

    def finish_reason(self, reason: str, num_calls: int) -> str:
        """OpenAI's: an answer with calls ends with `tool_calls`, unless its function was named."""
        called = num_calls > 0 and reason == "stop" and not self.use.is_named
        return "tool_calls" if called else reason

    async def constrain(
        self, service: Service, sampling: SamplingParams, before: str
    ) -> SamplingParams:
        """`before`: Lark, of what may stand before the answer. Raises InvalidRequestError naming
        the function whose schema cannot be kept."""
        mark = service.chat.special_id(self.form.mark)
        if mark is not None:
            sampling = replace(sampling, special_text=True)
        if not (self.use.must_call or self.use.is_strict):
            return sampling
        if self.form.is_bare and not self.use.must_call:
            raise InvalidRequestError(
                "strict functions need tool_choice `required` or a named one: this base writes "
                "calls without a mark.",
                "tools",
            )
        for i, function in enumerate(self.use.all_functions):
            if function in self.use.functions and function.parameters is not None:
                text = json.dumps(function.parameters)
                param = f"tools[{i}].function.parameters"
                await service.grammars.compile(Constraint(Kind.JSON, text, param))
        lark = self.form.grammar(self.use, lambda text: spelled(service, text))
        grammar = await service.grammars.compile(Constraint(Kind.GRAMMAR, lark, "tools", before))
        return replace(sampling, grammar=grammar)


def spelled(service: Service, mark: str) -> str:
    """Lark: the token that a mark is on this base, or its text."""
    token = service.chat.unspelled_id(mark)
    return json.dumps(mark) if token is None else f"<[{token}]>"
