"""Our own OpenAPI 3.1 document, drawn from the routes that serve and the models that validate.

Knows no handler. Invariant: a route that is not in the document does not exist, and a body in it is
the class that reads it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response

from loriner import __version__
from loriner.api.access import Right
from loriner.api.auth import GuardedRoute, Told
from loriner.api.responses import json_response
from loriner.api.shapes import Refusal

ASKED = "#/components/schemas/{model}"
ANSWERED = "#/components/schemas/Answered{name}"
_PARAMETER = re.compile(r"\{(\w+)(?::path)?\}")

Json = dict[str, Any]

EVENT: Json = {  # one of a stream, as OpenAPI 3.1 has it
    "type": "object",
    "properties": {
        "event": {"type": "string"},
        "data": {"type": "string", "description": "JSON, or [DONE] at the end of some streams."},
    },
    "required": ["data"],
    "additionalProperties": False,
}


class Document:
    """Made once, of all other routes; answers GET /openapi.json."""

    def __init__(self, routes: Sequence[GuardedRoute]) -> None:
        own = GuardedRoute("/openapi.json", self.get, right=Right.OPEN, methods=["GET"])
        self.routes = [own]
        self.document = document([*routes, own])

    async def get(self, request: Request) -> Response:
        """This document."""
        return json_response(self.document)


def document(routes: Iterable[GuardedRoute]) -> Json:
    """OpenAPI 3.1 of these routes."""
    routes = list(routes)
    paths: dict[str, Json] = {}
    for route in routes:
        for method in sorted(route.methods or ()):
            if method != "HEAD":
                paths.setdefault(path_of(route), {})[method.lower()] = _operation(route, method)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Loriner", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {**_bodies(routes), **_answers(routes)},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def path_of(route: GuardedRoute) -> str:
    """As OpenAPI writes it: {name}, whatever it may match."""
    return _PARAMETER.sub(r"{\1}", route.path)


def _operation(route: GuardedRoute, method: str) -> Json:
    told = route.told
    name = getattr(route.endpoint, "__name__", "")
    words = inspect.getdoc(route.endpoint) or name.replace("_", " ").capitalize() + "."
    made: Json = {
        "operationId": re.sub(r"\W+", "_", f"{method.lower()}{path_of(route)}").strip("_"),
        "summary": words.partition("\n")[0],
        "responses": {
            str(status): {"description": "Done.", "content": _content(told)}
            for status in told.statuses
        },
        "security": [] if route.right is Right.OPEN else [{"key": []}],
        "x-right": route.right.value,
    }
    made["responses"]["default"] = {
        "description": "Refused or failed; `error.code` says why.",
        "content": {"application/json": {"schema": _answer_ref(Refusal)}},
    }
    if parameters := _PARAMETER.findall(route.path):
        made["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in parameters
        ]
    if told.body is not None or told.form:
        made["requestBody"] = {"required": True, "content": _asked(told)}
    return made


def _asked(told: Told) -> Json:
    content: Json = {}
    if told.body is not None:
        schema = {"$ref": ASKED.format(model=told.body.__name__)}
        content["application/json"] = {"schema": schema}
    if told.form:
        text, file = {"type": "string"}, {"type": "string", "format": "binary"}
        fields = {name: file if name in told.files else text for name in told.form}
        content["multipart/form-data"] = {
            "schema": {"type": "object", "properties": fields, "required": [told.form[0]]}
        }
    return content


def _content(told: Told) -> Json:
    if told.media != "application/json":
        return {told.media: {"schema": {"type": "string"}}}
    schema = {"type": "object"} if told.answer is None else _answer_ref(told.answer)
    content: Json = {"application/json": {"schema": schema}}
    if told.streams:
        content["text/event-stream"] = {"schema": EVENT}
    return content


def _answer_ref(answer: type) -> Json:
    return {"$ref": ANSWERED.format(name=answer.__name__)}


def _bodies(routes: Iterable[GuardedRoute]) -> Json:
    models: dict[type[BaseModel], None] = {}
    for route in routes:
        if route.told.body is not None:
            models[route.told.body] = None
    pairs = [(model, "validation") for model in models]
    _, drawn = models_json_schema(pairs, ref_template=ASKED)  # type: ignore[arg-type]
    schemas: Json = drawn.get("$defs", {})
    return schemas


def _answers(routes: Iterable[GuardedRoute]) -> Json:
    answers = {route.told.answer for route in routes if route.told.answer is not None}
    ordered = sorted({*answers, Refusal}, key=lambda answer: answer.__name__)
    _, drawn = msgspec.json.schema_components(ordered, ref_template=ANSWERED)
    return {f"Answered{name}": schema for name, schema in drawn.items()}
