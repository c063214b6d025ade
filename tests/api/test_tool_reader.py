"""Tool calls in text: each format, however the text is cut; what is no call stays content."""

from __future__ import annotations

import random

import pytest

from loriner.api.pieces import Arguments, Call, Content
from loriner.api.tool_formats import HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS, ToolFormat, format_of
from loriner.api.tool_reader import ToolReader

Calls = list[tuple[str, str]]
A = '{"city": "Pa}r\\"is", "n": [1, {"x": 2}]}'
B = "{}"


def read(form: ToolFormat, parts: list[str], max_calls: int | None = None) -> tuple[str, Calls]:
    reader = ToolReader(form, {"f", "g"}, max_calls=max_calls)
    pieces = [piece for part in parts for piece in reader.feed(part)] + reader.finish()
    content, calls = "", []
    for piece in pieces:
        if isinstance(piece, Content):
            content += piece.text
        elif isinstance(piece, Call):
            assert piece.index == len(calls)
            calls.append((piece.name, ""))
        else:
            assert isinstance(piece, Arguments)
            name, written = calls[piece.index]
            calls[piece.index] = (name, written + piece.text)
    return content, calls


def hermes(*bodies: str) -> str:
    return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)


def body(name: str, arguments: str, key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


CASES: list[tuple[ToolFormat, str, str, Calls]] = [
    (HERMES, "Just text, <b>no</b> call. 1 < 2", "Just text, <b>no</b> call. 1 < 2", []),
    (HERMES, hermes(body("f", A)), "", [("f", A)]),
    (HERMES, hermes(body("f", A), body("g", B)), "", [("f", A), ("g", B)]),
    (HERMES, "Let me see. " + hermes(body("f", A)) + "\n", "Let me see.", [("f", A)]),
    (HERMES, hermes(body("f", A)) + "\nDone.", "Done.", [("f", A)]),
    (HERMES, hermes(body("unknown", B)), "", [("unknown", B)]),
    (HERMES, "<tool_call>" + body("f", B) + "</tool_call>", "", [("f", B)]),
    (HERMES, hermes('{"arguments": {"a": 1}, "name": "f"}'), "", [("f", '{"a": 1}')]),
    (HERMES, hermes('{"name": "f", "arguments": "{\\"a\\": 1}"}'), "", [("f", '{"a": 1}')]),
    (HERMES, hermes('{"name": "f"}'), "", [("f", "{}")]),
    (HERMES, hermes('{"name": "f", "arguments": {}, "id": "}x"}'), "", [("f", "{}")]),
    (HERMES, "<tool_call>\nno json", "<tool_call>\nno json", []),
    (HERMES, '<tool_call>\n{"name": 3}', '<tool_call>\n{"name": 3}', []),
    (HERMES, '<tool_call>\n{"name": "f", "argu', '<tool_call>\n{"name": "f", "argu', []),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": 1', "", [("f", '{"a": 1')]),
    (HERMES, "ends with <tool_", "ends with <tool_", []),
    (LLAMA3, body("f", A, "parameters"), "", [("f", A)]),
    (LLAMA3, "\n" + body("f", A), "", [("f", A)]),
    (
        LLAMA3,
        body("f", A, "parameters") + "; " + body("g", B, "parameters"),
        "",
        [("f", A), ("g", B)],
    ),
    (LLAMA3, "<|python_tag|>" + body("other", A), "", [("other", A)]),
    (LLAMA3, '{"name": "nobody", "parameters": {}}', '{"name": "nobody", "parameters": {}}', []),
    (LLAMA3, '{"answer": 42}', '{"answer": 42}', []),
    (LLAMA3, "Hello { there", "Hello { there", []),
    (LLAMA3, '{"half": ', '{"half": ', []),
    (MISTRAL, f"[TOOL_CALLS][{body('f', A)}, {body('g', B)}]", "", [("f", A), ("g", B)]),
    (MISTRAL, f"[TOOL_CALLS] [{body('f', A)}]", "", [("f", A)]),
    (MISTRAL, "An [array] of words", "An [array] of words", []),
    (MISTRAL_ARGS, f"[TOOL_CALLS]f[ARGS]{A}[TOOL_CALLS]g[ARGS]{B}", "", [("f", A), ("g", B)]),
    (MISTRAL_ARGS, f"[TOOL_CALLS]f[CALL_ID]abc123[ARGS]{A}", "", [("f", A)]),
    (MISTRAL_ARGS, f"Hm. [TOOL_CALLS]f[ARGS]{A}", "Hm.", [("f", A)]),
]


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES)
def test_calls_are_read_however_the_text_is_cut(
    form: ToolFormat, text: str, content: str, calls: Calls
) -> None:
    assert read(form, [text]) == (content, calls)
    assert read(form, list(text)) == (content, calls)
    rng = random.Random(text)
    for _ in range(30):
        cuts = sorted(rng.sample(range(len(text) + 1), min(5, len(text))))
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert read(form, parts) == (content, calls)


@pytest.mark.parametrize("form", [HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS])
def test_what_a_format_spells_it_reads(form: ToolFormat) -> None:
    assert read(form, [form.spelled("f", A)]) == ("", [("f", A)])


def test_calls_beyond_the_allowed_number_are_dropped() -> None:
    text = hermes(body("f", A), body("g", B))
    assert read(HERMES, list(text), max_calls=1) == ("", [("f", A)])


def test_a_name_is_told_before_its_arguments_are_whole() -> None:
    reader = ToolReader(HERMES, {"f"})
    (call,) = reader.feed('<tool_call>\n{"name": "f", "arguments": ' + "{")[:1]
    assert isinstance(call, Call) and call.name == "f" and call.call_id.startswith("call_")
    assert reader.feed('"a": ') == [Arguments(0, '"a": ')]


TEMPLATES: list[tuple[str, ToolFormat]] = [
    ("{{ messages }}", HERMES),
    ("{% if tools %}<tools>{{ tools }}</tools><tool_call>{% endif %}", HERMES),
    ('{% if tools %}<|start_header_id|>{"name": f, "parameters": p}{% endif %}', LLAMA3),
    ("{% if tools %}[AVAILABLE_TOOLS]{{ tools }}[TOOL_CALLS]{% endif %}", MISTRAL),
    ("{% if tools %}[TOOL_CALLS]{{ name }}[ARGS]{% endif %}", MISTRAL_ARGS),
]


@pytest.mark.parametrize(("template", "form"), TEMPLATES)
def test_the_template_tells_the_format(template: str, form: ToolFormat) -> None:
    assert format_of(template) is form
    assert format_of(template, "llama3") is LLAMA3
