"""Inference over gRPC: what is sent reaches the service as HTTP's JSON would, and ends cleanly."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import grpc
import pytest
from starlette.testclient import TestClient

from loriner.core import SamplingParams
from loriner.errors import EngineFailedError, EngineUnavailableError, OverloadedError
from loriner_proto.v1 import inference_pb2 as pb
from tests.api.fake_service import FakeService
from tests.api.grpc_kit import Door, chat, open_door, refused, user
from tests.api.live import wait_until

RETRY = json.dumps(
    {
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 3,
                    "initialBackoff": "0.01s",
                    "maxBackoff": "0.02s",
                    "backoffMultiplier": 1,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]
    }
)


def test_a_stream_opens_adds_up_and_closes_with_usage(door: Door) -> None:
    parts = list(door.inference.Generate(pb.GenerateRequest(text="hi", adapter="pirate")))

    assert [part.WhichOneof("part") for part in parts] == ["opening", *["delta"] * 6, "usage"]
    assert parts[0].opening.adapter == "default/pirate" and parts[0].opening.model == "pirate"
    assert len(parts[0].opening.generation) == 64 and parts[0].opening.num_prompt_tokens == 3
    assert "".join(part.delta.text for part in parts) == "pirate answers you (0) ünï."
    reasons = [part.delta.finish_reason for part in parts if part.HasField("delta")]
    assert reasons == [0] * 5 + [pb.FINISH_REASON_STOP]
    assert parts[-1].usage == pb.Usage(prompt_tokens=3, completion_tokens=6, cached_tokens=3)


def test_a_chat_in_one_piece_and_streamed_say_the_same(door: Door) -> None:
    request = chat(sampling=pb.SamplingParams(n=2, max_tokens=3, logprobs=1))
    whole = door.inference.Chat(request)
    parts = list(door.inference.StreamChat(pb.StreamChatRequest(chat=request)))

    assert whole.usage == parts[-1].usage
    for choice in whole.choices:
        mine = [p.delta for p in parts if p.HasField("delta") and p.delta.index == choice.index]
        assert choice.text == "".join(delta.text for delta in mine)
        assert list(choice.token_ids) == [i for delta in mine for i in delta.token_ids]
        assert list(choice.logprobs) == [one for delta in mine for one in delta.logprobs]
        assert choice.finish_reason == mine[-1].finish_reason == pb.FINISH_REASON_LENGTH
    assert not whole.opening.HasField("adapter") and not whole.opening.HasField("generation")


def test_metadata_tells_the_generation_and_gives_the_request_id_back(door: Door) -> None:
    call = door.inference.Generate(
        pb.GenerateRequest(text="x", model="pirate"), metadata=(("x-request-id", "mine-1"),)
    )
    opening = next(iter(call)).opening
    metadata = dict(call.initial_metadata())

    assert metadata["x-request-id"] == "mine-1"
    assert metadata["x-loriner-generation"] == opening.generation


CHATS: list[tuple[pb.ChatRequest, dict[str, Any]]] = [
    (chat(), {}),
    (chat(adapter="pirate"), {"adapter": "pirate"}),
    (chat(model="acme/legal"), {"model": "acme/legal"}),
    (chat(adapter="", model="pirate"), {"adapter": "", "model": "pirate"}),
    (
        chat(
            sampling=pb.SamplingParams(
                max_tokens=5,
                min_tokens=1,
                temperature=0.7,
                top_p=0.9,
                top_k=-1,
                min_p=0.01,
                seed=-7,
                repetition_penalty=1.1,
                frequency_penalty=-0.5,
                presence_penalty=0.5,
                logit_bias={5: -1.5, 6: 2},
                stop=["a", "b"],
                stop_token_ids=[3, 4],
                include_stop_str_in_output=True,
                ignore_eos=True,
                n=2,
                logprobs=0,
            )
        ),
        {
            "max_completion_tokens": 5,
            "min_tokens": 1,
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": -1,
            "min_p": 0.01,
            "seed": -7,
            "repetition_penalty": 1.1,
            "frequency_penalty": -0.5,
            "presence_penalty": 0.5,
            "logit_bias": {"5": -1.5, "6": 2},
            "stop": ["a", "b"],
            "stop_token_ids": [3, 4],
            "include_stop_str_in_output": True,
            "ignore_eos": True,
            "n": 2,
            "logprobs": True,
        },
    ),
    (chat(sampling=pb.SamplingParams(logprobs=3)), {"logprobs": True, "top_logprobs": 3}),
    (chat(priority=-4), {"priority": -4}),
    (chat(continue_final_message=True), {"continue_final_message": True}),
    (
        chat(chat_template_kwargs={"a": pb.TemplateValue(bool_value=True)}),
        {"chat_template_kwargs": {"a": True}},
    ),
]


@pytest.mark.parametrize(("request_", "body"), CHATS)
def test_a_chat_reaches_the_service_as_over_http(
    door: Door, client: TestClient, service: FakeService, request_: pb.ChatRequest, body: Any
) -> None:
    door.inference.Chat(request_)
    client.post(
        "/v1/chat/completions", json={"messages": [{"role": "user", "content": "hi"}], **body}
    )
    grpc_call, http_call = service.calls

    assert {**grpc_call, "request_id": ""} == {**http_call, "request_id": ""}
    assert service.rendered[0] == service.rendered[1]


def test_every_sampling_parameter_of_the_core_has_a_field_of_its_name() -> None:
    made_by_the_door = {"grammar", "special_text"}
    ours = set(SamplingParams.__dataclass_fields__) - made_by_the_door

    assert {field.name for field in pb.SamplingParams.DESCRIPTOR.fields} == ours


def test_turns_with_tool_calls_reach_the_template(door: Door, service: FakeService) -> None:
    door.inference.Chat(
        pb.ChatRequest(
            messages=[
                pb.Message(role=pb.ROLE_DEVELOPER, content="be brief", name="me"),
                pb.Message(
                    role=pb.ROLE_ASSISTANT,
                    tool_calls=[pb.ToolCall(id="c1", name="f", arguments='{"a": 1}')],
                ),
                pb.Message(role=pb.ROLE_TOOL, content="1", tool_call_id="c1"),
            ]
        )
    )

    function = {"name": "f", "arguments": {"a": 1}}
    assert service.rendered[0]["messages"] == [
        {"role": "system", "content": "be brief", "name": "me"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c1", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "1", "tool_call_id": "c1"},
    ]


def test_tokens_may_be_the_prompt_and_can_be_asked_for(door: Door, service: FakeService) -> None:
    text = door.inference.Tokenize(pb.TokenizeRequest(text="hi"))
    bare = door.inference.Tokenize(pb.TokenizeRequest(text="hi", add_special_tokens=False))
    turns = door.inference.Tokenize(pb.TokenizeRequest(chat=chat("hi")))
    list(door.inference.Generate(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[7, 8]))))

    assert list(text.token_ids) == [1, 104, 105] == list(turns.token_ids)
    assert list(bare.token_ids) == [104, 105] and bare.max_model_len == 512
    assert service.calls[-1]["prompt_ids"] == [7, 8]
    assert service.calls[-1]["sampling"].max_tokens == 16


def sampled(**fields: Any) -> pb.ChatRequest:
    return chat(sampling=pb.SamplingParams(**fields))


CALL = pb.ToolCall(name="f", arguments="[")
REFUSED_CHATS = [
    (pb.ChatRequest(), "messages"),
    (pb.ChatRequest(messages=[pb.Message(content="x")]), "messages[0].role"),
    (pb.ChatRequest(messages=[pb.Message(role=pb.ROLE_USER)]), "messages[0].content"),
    (
        pb.ChatRequest(messages=[user("x"), pb.Message(role=pb.ROLE_ASSISTANT, tool_calls=[CALL])]),
        "messages[1].tool_calls[0].arguments",
    ),
    (chat(model="x" * 300), "model"),
    (chat(chat_template_kwargs={"tools": pb.TemplateValue(int_value=1)}), "chat_template_kwargs"),
    (chat(add_generation_prompt=True, continue_final_message=True), "continue_final_message"),
    (chat(priority=1001), "priority"),
    (chat(adapters=[pb.ScaledAdapter(name="pirate", scale=500)]), "adapters[0].scale"),
    (chat(adapters=[pb.ScaledAdapter()]), "adapters[0].name"),
    (chat(adapter="pirate", adapters=[pb.ScaledAdapter(name="pirate")]), "adapters"),
    (sampled(temperature=2.5), "sampling.temperature"),
    (sampled(temperature=float("nan")), "sampling.temperature"),
    (sampled(top_p=0.0), "sampling.top_p"),
    (sampled(max_tokens=0), "sampling.max_tokens"),
    (sampled(max_tokens=1, min_tokens=2), "sampling.min_tokens"),
    (sampled(n=0), "sampling.n"),
    (sampled(n=129), "sampling.n"),
    (sampled(logprobs=21), "sampling.logprobs"),
    (sampled(logprobs=-1), "sampling.logprobs"),
    (sampled(stop=[""]), "sampling.stop"),
    (sampled(stop=["x"] * 17), "sampling.stop"),
    (sampled(logit_bias={1: 200.0}), "sampling.logit_bias"),
    (sampled(stop_token_ids=range(129)), "sampling.stop_token_ids"),
    (chat(structured_outputs=pb.StructuredOutputs(json="bad")), "structured_outputs.json"),
    (chat(tools=[pb.Function()]), "tools[0].name"),
    (chat(tools=[pb.Function(name="f", parameters="{")]), "tools[0].parameters"),
    (chat(tools=[pb.Function(name="f", parameters="[]")]), "tools[0].parameters"),
    (chat(tool_choice=pb.ToolChoice()), "tool_choice"),
    (
        chat(tools=[pb.Function(name="f")], tool_choice=pb.ToolChoice(function="g")),
        "tool_choice.function",
    ),
    (chat(reasoning_effort="high"), "reasoning_effort"),
    (
        pb.ChatRequest(messages=[pb.Message(role=pb.ROLE_USER, content="x", reasoning="y")]),
        "messages[0].reasoning",
    ),
    (
        chat(structured_outputs=pb.StructuredOutputs(choice=pb.Choices())),
        "structured_outputs.choice",
    ),
]


WEATHER = pb.Function(
    name="get_weather",
    description="Weather now",
    parameters='{"type": "object", "properties": {"city": {"type": "string"}}}',
)
SAYS = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def mode(name: str) -> pb.ToolChoice:
    return pb.ToolChoice(mode=pb.ToolChoiceMode.Value(f"TOOL_CHOICE_MODE_{name}"))


def test_calls_are_read_whole_and_streamed(door: Door, service: FakeService) -> None:
    text = f"Let me look. {SAYS}"
    service.says = [text[i : i + 9] for i in range(0, len(text), 9)]
    asked = chat(tools=[WEATHER])
    (choice,) = door.inference.Chat(asked).choices
    (call,) = choice.tool_calls
    parts = list(door.inference.StreamChat(pb.StreamChatRequest(chat=asked)))
    deltas = [part.delta for part in parts if part.HasField("delta")]
    pieces = [call for delta in deltas for call in delta.tool_calls]

    assert choice.text == "Let me look." == "".join(delta.text for delta in deltas)
    assert choice.finish_reason == pb.FINISH_REASON_TOOL_CALLS == deltas[-1].finish_reason
    assert (call.name, call.arguments) == ("get_weather", '{"city": "Paris"}')
    assert pieces[0].name == "get_weather" and pieces[0].HasField("id") and call.id
    assert not any(piece.HasField("name") or piece.HasField("id") for piece in pieces[1:])
    assert "".join(piece.arguments for piece in pieces) == call.arguments
    function = service.rendered[0]["tools"][0]["function"]
    assert function["description"] == "Weather now" and "city" in str(function["parameters"])


@pytest.mark.parametrize(
    ("choice", "has_tools", "has_grammar"),
    [
        (mode("AUTO"), True, False),
        (mode("NONE"), False, False),
        (mode("REQUIRED"), True, True),
        (pb.ToolChoice(function="get_weather"), True, True),
    ],
)
def test_a_tool_choice_is_kept(
    door: Door, service: FakeService, choice: pb.ToolChoice, has_tools: bool, has_grammar: bool
) -> None:
    door.inference.Chat(chat(tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False))

    assert (service.rendered[0]["tools"] is not None) is has_tools
    assert (service.calls[0]["sampling"].grammar is not None) is has_grammar


def test_tools_are_counted_by_tokenize(door: Door, service: FakeService) -> None:
    door.inference.Tokenize(pb.TokenizeRequest(chat=chat(tools=[WEATHER])))
    assert service.rendered[0]["tools"][0]["function"]["name"] == "get_weather"


def test_reasoning_is_apart_and_counted(door: Door, service: FakeService) -> None:
    service.chat.template = "<think></think>{{ enable_thinking }}"
    service.says = ["<think>", "so", "</think>", "Yes."]
    turns = [user("hi"), pb.Message(role=pb.ROLE_ASSISTANT, content="x", reasoning="y")]
    asked = pb.ChatRequest(messages=turns, reasoning_effort="none")
    answer = door.inference.Chat(asked)
    hidden = door.inference.Chat(chat(include_reasoning=False))

    assert (answer.choices[0].reasoning, answer.choices[0].text) == ("so", "Yes.")
    assert answer.usage.reasoning_tokens == 3 == hidden.usage.reasoning_tokens
    assert (hidden.choices[0].reasoning, hidden.choices[0].text) == ("", "Yes.")
    assert service.rendered[0]["messages"][1]["reasoning_content"] == "y"
    assert service.rendered[0]["template_kwargs"] == {"enable_thinking": False}


@pytest.mark.parametrize(("request_", "field"), REFUSED_CHATS)
def test_a_refused_chat_names_the_field_as_the_proto_has_it(
    door: Door, service: FakeService, request_: pb.ChatRequest, field: str
) -> None:
    found = refused(lambda: door.inference.Chat(request_))
    stream = pb.StreamChatRequest(chat=request_)
    streamed = refused(lambda: list(door.inference.StreamChat(stream)))

    assert (found.code, found.reason) == ("INVALID_ARGUMENT", "INVALID_REQUEST")
    assert found.fields == [field] and streamed.fields == [f"chat.{field}"]
    assert found.details["ErrorInfo"].metadata["param"] == field
    assert found.message == streamed.message.replace("chat.", "") and service.calls == []


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.GenerateRequest(), "prompt"),
        (pb.GenerateRequest(token_ids=pb.TokenIds()), "prompt"),
        (pb.GenerateRequest(text="x", sampling=pb.SamplingParams(top_k=-2)), "sampling.top_k"),
    ],
)
def test_a_refused_generate_names_the_field(
    door: Door, request_: pb.GenerateRequest, field: str
) -> None:
    assert refused(lambda: list(door.inference.Generate(request_))).fields == [field]


def test_a_field_from_the_future_is_refused_not_dropped(door: Door, service: FakeService) -> None:
    future = b"\xa2\x06\x01x"  # field 100, a string
    whole = pb.ChatRequest.FromString(chat().SerializeToString() + future)
    deep = chat(sampling=pb.SamplingParams.FromString(future))
    turn = pb.ChatRequest(messages=[pb.Message.FromString(user("x").SerializeToString() + future)])

    for request, fields in ((whole, []), (deep, ["sampling"]), (turn, ["messages[0]"])):
        found = refused(lambda request=request: door.inference.Chat(request))
        assert (found.code, found.fields) == ("INVALID_ARGUMENT", fields)
        assert "Field number 100" in found.message
    assert service.calls == []


def test_nothing_to_tokenise_is_refused(door: Door) -> None:
    assert refused(lambda: door.inference.Tokenize(pb.TokenizeRequest())).fields == ["input"]
    empty = pb.TokenizeRequest(chat=pb.ChatRequest())
    assert refused(lambda: door.inference.Tokenize(empty)).fields == ["chat.messages"]


@pytest.mark.parametrize(
    ("fields", "kind", "reason"),
    [
        ({"adapter": "nope"}, "adapter", "ADAPTER_NOT_FOUND"),
        ({"model": "nope"}, "model", "MODEL_NOT_FOUND"),
        ({"model": ""}, "model", "MODEL_NOT_FOUND"),
    ],
)
def test_an_unknown_adapter_is_not_found_and_named(
    door: Door, fields: dict[str, str], kind: str, reason: str
) -> None:
    found = refused(lambda: door.inference.Chat(chat(**fields)))
    resource = found.details["ResourceInfo"]

    assert (found.code, found.reason) == ("NOT_FOUND", reason)
    assert (resource.resource_type, resource.resource_name) == (kind, next(iter(fields.values())))


def test_a_full_queue_says_when_to_come_back(door: Door, service: FakeService) -> None:
    service.refuse = OverloadedError("The queue is full.", 1.5)
    found = refused(lambda: door.inference.Chat(chat()))

    assert (found.code, found.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
    assert found.details["RetryInfo"].retry_delay.ToMilliseconds() == 1500


def test_a_fault_of_ours_tells_its_id_and_nothing_else(door: Door, service: FakeService) -> None:
    service.refuse = RuntimeError("0x7f secret")
    found = refused(lambda: door.inference.Chat(chat()))

    assert (found.code, found.reason) == ("INTERNAL", "INTERNAL_ERROR")
    assert "secret" not in found.message and found.request_id in found.message


def test_a_stream_that_breaks_ends_with_its_status(door: Door, service: FakeService) -> None:
    service.fail_after, service.fail_with = 2, EngineFailedError("gone")
    call = door.inference.Generate(pb.GenerateRequest(text="x"))
    seen = []

    def read() -> None:
        seen.extend(iter(call))

    assert refused(read).reason == "ENGINE_FAILED"
    assert [part.WhichOneof("part") for part in seen] == ["opening", "delta", "delta"]
    assert service.closed == [service.calls[0]["request_id"]]


@pytest.mark.parametrize("is_streamed", [True, False])
@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_a_caller_who_leaves_frees_the_sequence(
    door: Door, service: FakeService, is_streamed: bool, how: str
) -> None:
    service.hold = asyncio.Event()
    timeout = 0.3 if how == "deadline" else None
    if is_streamed:
        request = pb.StreamChatRequest(chat=chat())
        call: Any = door.inference.StreamChat(request, timeout=timeout)
    else:
        call = door.inference.Chat.future(chat(), timeout=timeout)
    wait_until(lambda: len(service.open) == 1)
    if how == "cancel":
        call.cancel()

    wait_until(lambda: len(service.closed) == 1)
    wanted = {"cancel": grpc.StatusCode.CANCELLED, "deadline": grpc.StatusCode.DEADLINE_EXCEEDED}
    wait_until(lambda: call.code() is wanted[how])


def test_a_caller_who_leaves_amid_the_stream_frees_it(door: Door, service: FakeService) -> None:
    service.delay_s = 0.05
    call = door.inference.Generate(pb.GenerateRequest(text="x"))
    assert next(iter(call)).HasField("opening")
    call.cancel()

    wait_until(lambda: len(service.closed) == 1)


def test_what_was_not_run_may_be_tried_again_and_what_was_may_not(
    door: Door, service: FakeService
) -> None:
    address = door.channel._channel.target().decode()  # type: ignore[attr-defined]
    attempts = []
    generate = service.generate

    async def twice_down(*args: Any, **more: Any) -> Any:
        attempts.append(time.monotonic())
        if len(attempts) < 3:
            raise EngineUnavailableError("restarting")
        return await generate(*args, **more)

    service.generate = twice_down  # type: ignore[method-assign]
    with open_door(address, options=[("grpc.service_config", RETRY)]) as patient:
        assert patient.inference.Chat(chat()).choices[0].text
        assert len(attempts) == 3

        service.fail_after, service.fail_with = 1, EngineUnavailableError("stopping")
        stream = patient.inference.StreamChat(pb.StreamChatRequest(chat=chat()))
        assert refused(lambda: list(stream)).code == "UNAVAILABLE"
        assert len(attempts) == 4
