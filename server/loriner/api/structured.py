"""What an answer must look like, as callers say it: OpenAI's response_format and vLLM's
structured_outputs -> a Constraint.

Knows no grammar. `strict` makes no difference: a schema is always kept. Invariant: one constraint
at most, and every key of it is honoured or refused by name.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from loriner.api.schema_base import Body
from loriner.engine.grammars import Constraint, Kind
from loriner.errors import InvalidRequestError

MAX_CHOICES_LISTED = 4096
ANY_OBJECT = '{"type": "object"}'

Schema = dict[str, Any]


class TextAnswer(Body):
    type: Literal["text"]


class JsonObjectAnswer(Body):
    type: Literal["json_object"]


class JsonSchema(Body):
    name: str | None = None
    description: str | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool | None = None


class JsonSchemaAnswer(Body):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[
    TextAnswer | JsonObjectAnswer | JsonSchemaAnswer, Field(discriminator="type")
]


class StructuredOutputs(Body):
    """One of its fields; what vLLM has beside them is refused."""

    model_config = ConfigDict(extra="forbid")

    json_: Schema | str | None = Field(None, alias="json")
    regex: Annotated[str, Field(min_length=1)] | None = None
    choice: (
        Annotated[
            list[Annotated[str, Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_CHOICES_LISTED),
        ]
        | None
    ) = None
    grammar: Annotated[str, Field(min_length=1)] | None = None
    json_object: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None}

    def constraints(self) -> list[Constraint]:
        field = "structured_outputs"
        found = []
        if self.json_ is not None:
            text = self.json_ if isinstance(self.json_, str) else json.dumps(self.json_)
            found.append(Constraint(Kind.JSON, text, f"{field}.json"))
        if self.regex is not None:
            found.append(Constraint(Kind.REGEX, self.regex, f"{field}.regex"))
        if self.choice is not None:
            found.append(Constraint(Kind.CHOICE, json.dumps(self.choice), f"{field}.choice"))
        if self.grammar is not None:
            found.append(Constraint(Kind.GRAMMAR, self.grammar, f"{field}.grammar"))
        if self.json_object:
            found.append(Constraint(Kind.JSON, ANY_OBJECT, f"{field}.json_object"))
        return found


def constraint_of(
    response_format: TextAnswer | JsonObjectAnswer | JsonSchemaAnswer | None,
    structured_outputs: StructuredOutputs | None,
) -> Constraint | None:
    """Raises InvalidRequestError when there is more than one."""
    found = [] if structured_outputs is None else structured_outputs.constraints()
    if len(found) > 1:
        names = ", ".join(one.param.partition(".")[2] for one in found)
        raise InvalidRequestError(
            f"structured_outputs takes one of its fields, got {names}.", "structured_outputs"
        )
    if isinstance(response_format, JsonObjectAnswer):
        found.append(Constraint(Kind.JSON, ANY_OBJECT, "response_format"))
    elif isinstance(response_format, JsonSchemaAnswer):
        text = json.dumps(response_format.json_schema.schema_)
        found.append(Constraint(Kind.JSON, text, "response_format.json_schema.schema"))
    if len(found) > 1:
        raise InvalidRequestError(
            "response_format and structured_outputs exclude each other.", "structured_outputs"
        )
    return found[0] if found else None
