"""Tools in the prompt of a base whose chat template knows none: said in words, in Hermes' way.

Calls and results of earlier turns become text of the roles that every template has. Pure.
Invariant: a template that writes tools itself is never given this.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from loriner.api.tool_formats import ToolFormat
from loriner.api.tool_schema import ToolUse

Turn = dict[str, Any]

_INTRO = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments like this:
{example}"""


def explained(
    turns: Sequence[Turn], use: ToolUse | None, form: ToolFormat, *, has_system: bool
) -> list[Turn]:
    """The turns as plain text, with the tools at the end of the system's turn; without such turns,
    before the first one."""
    plain = _plain(turns, form)
    if use is None:
        return plain
    tools = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in use.described())
    example = form.spelled("<function-name>", "<args-json-object>")
    intro = _INTRO.format(tools=tools, example=example)
    if plain and plain[0]["role"] == "system":
        return [{**plain[0], "content": f"{plain[0]['content']}\n\n{intro}"}, *plain[1:]]
    if has_system or not plain:
        return [{"role": "system", "content": intro}, *plain]
    return [{**plain[0], "content": f"{intro}\n\n{plain[0]['content']}"}, *plain[1:]]


def _plain(turns: Sequence[Turn], form: ToolFormat) -> list[Turn]:
    """Results that follow each other are one turn: some templates want roles to alternate."""
    plain: list[Turn] = []
    for before, turn in zip([None, *turns], turns, strict=False):
        if turn["role"] != "tool":
            plain.append(_with_calls(turn, form))
            continue
        result = f"<tool_response>\n{turn['content']}\n</tool_response>"
        if before is not None and before["role"] == "tool":
            plain[-1] = {"role": "user", "content": f"{plain[-1]['content']}\n{result}"}
        else:
            plain.append({"role": "user", "content": result})
    return plain


def _with_calls(turn: Turn, form: ToolFormat) -> Turn:
    if not turn.get("tool_calls"):
        return turn
    calls = [
        form.spelled(call["function"]["name"], json.dumps(call["function"]["arguments"]))
        for call in turn["tool_calls"]
    ]
    return {"role": turn["role"], "content": "\n".join(filter(None, [turn["content"], *calls]))}
