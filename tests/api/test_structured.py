"""What an answer must look like: how callers say it, what reaches the engine, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from loriner_proto.v1 import inference_pb2 as pb
from tests.api.fake_service import FakeService
from tests.api.grpc_kit import Door, chat

HI = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
SCHEMA_TEXT = 'json: {"type": "object", "properties": {"a": {"type": "string"}}}'
ANY_OBJECT = 'json: {"type": "object"}'


def post(client: TestClient, **fields: Any) -> Any:
    return client.post("/v1/chat/completions", json={"messages": HI, **fields})


def named(schema: Any = SCHEMA, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **more}}


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"structured_outputs": {}}, None),
        ({"structured_outputs": {"json": None, "json_object": False}}, None),
        ({"response_format": {"type": "json_object"}}, ANY_OBJECT),
        ({"response_format": named()}, SCHEMA_TEXT),
        ({"response_format": named(strict=True, description="d")}, SCHEMA_TEXT),
        ({"structured_outputs": {"json": SCHEMA, "regex": None}}, SCHEMA_TEXT),
        ({"structured_outputs": {"json": '{"type": "object"}'}}, ANY_OBJECT),
        ({"structured_outputs": {"json_object": True}}, ANY_OBJECT),
        ({"structured_outputs": {"regex": "a+"}}, "regex: a+"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, 'choice: ["a", "b"]'),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, 'grammar: start: "a"'),
    ],
)
def test_what_is_asked_reaches_the_engine(
    client: TestClient, service: FakeService, fields: dict[str, Any], grammar: str | None
) -> None:
    assert post(client, **fields).status_code == 200
    answer = client.post("/v1/completions", json={"prompt": "hi", **fields})

    assert answer.status_code == 200, answer.text
    assert [call["sampling"].grammar for call in service.calls] == [grammar, grammar]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": named("object")}, "response_format.json_schema.schema"),
        ({"response_format": named({"bad": 1})}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "structural_tag"}}, "response_format"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"whitespace_pattern": "x"}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a", ""]}}, "structured_outputs.choice[1]"),
        ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "bad"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        (
            {"response_format": named(), "structured_outputs": {"regex": "a"}},
            "structured_outputs",
        ),
        ({"response_format": named(), "ignore_eos": True}, "ignore_eos"),
        ({"response_format": named(), "min_tokens": 2}, "min_tokens"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(
    client: TestClient, service: FakeService, fields: dict[str, Any], param: str
) -> None:
    error = post(client, **fields).json()["error"]

    assert error["type"] == "invalid_request_error" and error["param"].startswith(param), error
    assert service.calls == []


@pytest.mark.parametrize(
    ("asked", "grammar"),
    [
        (pb.StructuredOutputs(), None),
        (pb.StructuredOutputs(json='{"type": "object"}'), ANY_OBJECT),
        (pb.StructuredOutputs(json_object=True), ANY_OBJECT),
        (pb.StructuredOutputs(regex="a+"), "regex: a+"),
        (pb.StructuredOutputs(choice=pb.Choices(texts=["a", "b"])), 'choice: ["a", "b"]'),
        (pb.StructuredOutputs(grammar='start: "a"'), 'grammar: start: "a"'),
    ],
)
def test_grpc_asks_the_same(
    door: Door, service: FakeService, asked: pb.StructuredOutputs, grammar: str | None
) -> None:
    door.inference.Chat(chat(structured_outputs=asked))
    list(door.inference.Generate(pb.GenerateRequest(text="x", structured_outputs=asked)))

    assert [call["sampling"].grammar for call in service.calls] == [grammar, grammar]


@pytest.mark.parametrize("depth", [100, 300, 450, 900, 3000])
def test_a_schema_of_any_depth_has_an_answer(client: TestClient, depth: int) -> None:
    text = '{"items":' * depth + "{}" + "}" * depth
    for field in (
        f'"response_format":{{"type":"json_schema","json_schema":{{"name":"x","schema":{text}}}}}',
        f'"structured_outputs":{{"json":{text}}}',
        f'"tools":[{{"type":"function","function":{{"name":"f","parameters":{text}}}}}],'
        '"tool_choice":"required"',
    ):
        body = f'{{"messages":[{{"role":"user","content":"hi"}}],{field}}}'
        response = client.post("/v1/chat/completions", content=body)
        assert response.status_code in (200, 400), response.text
