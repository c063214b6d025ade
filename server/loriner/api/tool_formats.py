"""How a base writes tool calls: Hermes and Qwen, Llama 3, Mistral; chosen by its chat template.

Spells calls, as text for prompts and as a grammar for answers; `tool_reader.py` reads them.
Knows no request. Invariant: what a grammar made here admits, the reader of the same format reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loriner.api.tool_schema import NOTHING, Function, ToolUse
from loriner.engine.grammars import SPACE
from loriner.errors import InvalidRequestError

Spell = Callable[[str], str]  # a piece -> Lark: a string, or the token that it is
GUIDANCE = {"whitespace_flexible": True, "whitespace_pattern": SPACE, "lenient": False}


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """One way to write calls. An answer's calls are `opening`, call, `between`, call, ...,
    `closing`; a piece that equals `mark` is the mark."""

    name: str
    mark: str  # what tells a call from text
    opening: tuple[str, ...]
    between: tuple[str, ...]
    closing: tuple[str, ...]
    key: str = "arguments"
    is_bare: bool = False  # a text that begins as a call is one, without the mark
    has_args_mark: bool = False  # the name stands before its arguments: name[ARGS]{...}
    id_chars: int = 24  # of a call's id
    is_single: bool = False  # its templates refuse turns with several calls

    def spelled(self, name: str, arguments: str) -> str:
        """One call as an answer has it."""
        head, tail = self._around(name)
        return "".join((*self.opening, head, arguments, tail, *self.closing))

    def grammar(self, use: ToolUse, spell: Spell) -> str:
        """Lark: an answer that calls, or one of text and calls whose arguments fit."""
        between = self._lark(self.between, spell)
        more = f" ({between} call)*" if use.is_parallel and not self.is_single else ""
        closing = self._lark(self.closing, spell)
        if use.must_call:
            start = f"start: {self._lark(self.opening, spell)} call{more} {closing}"
            return f"{start}\n{self._calls(use.functions)}"
        assert not self.is_bare, "a call without a mark cannot be told from text"
        rest = f"{self._lark(self.opening[1:], spell)} call{more} {closing}"
        mark = spell(self.mark)
        start = "start: (tag)* TEXT" if use.is_parallel else "start: TEXT | tag"
        if mark.startswith("<"):
            tag = f"tag: TEXT {mark} {rest}"
        else:
            tag = f"mark[lazy]: TEXT {mark}\ntag: mark {rest}"
        return f"{start}\nTEXT: /(.|\\n)*/\n{tag}\n{self._calls(use.functions)}"

    def _lark(self, pieces: Sequence[str], spell: Spell) -> str:
        return " ".join(map(spell, pieces))

    def _around(self, name: str) -> tuple[str, str]:
        if self.has_args_mark:
            return f"{name}[ARGS]", ""
        return f'{{"name": {json.dumps(name)}, "{self.key}": ', "}"

    def _calls(self, functions: Sequence[Function]) -> str:
        """One rule for each function: its arguments' schema is a document of its own, so that its
        references hold."""
        rules = ["call: " + " | ".join(f"f{i}" for i in range(len(functions)))]
        for i, function in enumerate(functions):
            head, tail = self._around(function.name)
            schema = {**(function.parameters or NOTHING), "x-guidance": GUIDANCE}
            end = f" {json.dumps(tail)}" if tail else ""
            rules.append(f"f{i}: {json.dumps(head)} %json {json.dumps(schema)}{end}")
        return "\n".join(rules)


HERMES = ToolFormat(
    name="hermes",
    mark="<tool_call>",
    opening=("<tool_call>", "\n"),
    between=("\n", "</tool_call>", "\n", "<tool_call>", "\n"),
    closing=("\n", "</tool_call>"),
)
LLAMA3 = ToolFormat(
    name="llama3",
    mark="<|python_tag|>",
    opening=(),
    between=("; ",),
    closing=(),
    key="parameters",
    is_bare=True,
    is_single=True,
)
MISTRAL = ToolFormat(
    name="mistral",
    mark="[TOOL_CALLS]",
    opening=("[TOOL_CALLS]", "["),
    between=(", ",),
    closing=("]",),
    id_chars=9,  # its templates refuse any other
)
MISTRAL_ARGS = ToolFormat(
    name="mistral",
    mark="[TOOL_CALLS]",
    opening=("[TOOL_CALLS]",),
    between=("[TOOL_CALLS]",),
    closing=(),
    has_args_mark=True,
    id_chars=9,
)


_XML_CALL = "<function="  # inside of Hermes' mark


def knows_tools(template: str) -> bool:
    """Whether a chat template writes the tools that it is given."""
    return re.search(r"\btools\b", template) is not None


def knows_system(template: str) -> bool:
    """Whether a chat template takes a system's turn; Gemma's do not."""
    return "System role not supported" not in template


def format_of(template: str, setting: str = "auto") -> ToolFormat:
    """By the marks in the template. One that knows no tools gets Hermes' format, which
    `tool_prompt.py` explains to the model. Raises InvalidRequestError for one that writes calls in
    another way."""
    mistral = MISTRAL_ARGS if "[ARGS]" in template else MISTRAL
    named = {"hermes": HERMES, "llama3": LLAMA3, "mistral": mistral}
    if setting in named:
        return named[setting]
    if MISTRAL.mark in template:
        return mistral
    if not knows_tools(template) or (HERMES.mark in template and _XML_CALL not in template):
        return HERMES
    if "<|start_header_id|>" in template and f'"{LLAMA3.key}"' in template:
        return LLAMA3
    raise InvalidRequestError(
        "tools are not served on this base: its chat template writes calls in a way that is none "
        "of hermes, llama3 and mistral. The setting tool_format overrules this.",
        "tools",
    )
