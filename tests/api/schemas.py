"""OpenAI's own response schemas, and reading an event stream."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

DOCUMENT = Path(__file__).parents[1] / "data" / "openai" / "schemas.json"


@cache
def validator(name: str) -> Draft202012Validator:
    document = json.loads(DOCUMENT.read_text())
    return Draft202012Validator({"$ref": f"#/components/schemas/{name}", **document})


def check(name: str, body: Any) -> None:
    """Raises jsonschema.ValidationError where `body` is not OpenAI's `name`."""
    validator(name).validate(body)


def events(text: str) -> list[Any]:
    """The data of each event; "[DONE]" stays a string."""
    blocks = text.split("\n\n")
    assert blocks.pop() == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    data = [block.removeprefix("data: ") for block in blocks]
    return [item if item == "[DONE]" else json.loads(item) for item in data]
