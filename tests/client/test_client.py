"""Every kind of client against a live server: the same questions have the same answers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import loriner_client as lc
from loriner.adapters.store import Store
from loriner.config import ServerConfig
from loriner.errors import EngineFailedError, EngineUnavailableError, OverloadedError
from tests.adapters.samples import BASE, TINY, config, tensors, write_adapter
from tests.api.fake_service import FakeService
from tests.api.live import LiveServer, wait_until
from tests.client.kinds import KINDS, open_client

SAID = "pirate answers you (0) ünï."


def test_a_chat_is_answered_with_its_origin_and_usage(client: Any) -> None:
    answer = client.chat("hi", adapter="pirate")

    assert answer.text == SAID and answer.choices[0].finish_reason == "stop"
    assert answer.opening.adapter == "default/pirate" and len(answer.opening.generation) == 64
    assert answer.usage == lc.Usage(prompt_tokens=3, completion_tokens=6, cached_tokens=3)
    assert client.chat("hi").opening.adapter is None


def test_a_stream_has_its_opening_first_and_usage_last(client: Any) -> None:
    with client.stream_chat("hi", adapter="pirate") as stream:
        assert stream.opening.adapter == "default/pirate" and stream.usage is None
        deltas = list(stream)
        assert stream.usage.completion_tokens == 6

    assert "".join(delta.text for delta in deltas) == SAID
    assert [delta.token_ids for delta in deltas] == [(i,) for i in range(10, 16)]
    assert [delta.finish_reason for delta in deltas] == [None] * 5 + ["stop"]


def test_a_text_is_continued_from_words_or_tokens(client: Any, service: FakeService) -> None:
    whole = client.generate("hi", model="pirate", max_tokens=100)
    with client.stream_generate([7, 8], max_tokens=3) as stream:
        rest = stream.completion()

    assert whole.text == SAID and whole.usage.prompt_tokens == 3
    assert rest.choices[0].finish_reason == "length"
    assert service.calls[-1]["prompt_ids"] == [7, 8]


def test_texts_and_tokens_are_embedded(client: Any, service: FakeService) -> None:
    answer = client.embed(["hi", [7, 8]], adapter="pirate", priority=2, add_special_tokens=False)
    one = client.embed("hi", model="codeword")

    sent = [call["prompt_ids"] for call in service.calls]
    assert sent == [[104, 105], [7, 8], [1, 104, 105]]
    assert [vector[:2] for vector in (*answer.vectors, *one.vectors)] == [
        (len(ids), sum(ids)) for ids in sent
    ]
    assert all(len(vector) == service.hidden_size for vector in answer.vectors)
    assert (answer.opening.adapter, one.opening.adapter) == ("default/pirate", "default/codeword")
    assert answer.usage == lc.Usage(4, 0) and one.usage == lc.Usage(3, 0)
    assert [call["turn"].priority for call in service.calls] == [2, 2, 0]


def test_several_adapters_embed_together(client: Any, service: FakeService) -> None:
    client.embed("hi", adapter={"pirate": 0.5, "codeword": 2.0})
    assert service.calls[-1]["adapter"] == [("pirate", 0.5), ("codeword", 2.0)]


@pytest.mark.parametrize(
    ("inputs", "fields", "kind"),
    [
        ([], {}, lc.InvalidRequestError),
        (["a", []], {}, lc.InvalidRequestError),
        ([[2**31]], {}, lc.InvalidRequestError),
        (["a", "x" * 600], {}, lc.ContextLengthError),
        (["a"] * 2049, {}, lc.InvalidRequestError),
        (["a"], {"adapter": "nope"}, lc.AdapterNotFoundError),
        (["a"], {"priority": 10**6}, lc.InvalidRequestError),
    ],
)
def test_what_cannot_be_embedded_is_refused_by_name(
    client: Any, service: FakeService, inputs: Any, fields: dict[str, Any], kind: type[Exception]
) -> None:
    with pytest.raises(kind) as caught:
        client.embed(inputs, **fields)
    named = next(iter(fields), "input")
    assert str(caught.value.param).startswith(named)  # type: ignore[attr-defined]
    assert not service.calls


@pytest.mark.parametrize(
    ("asked", "grammar"),
    [
        ({"json": {"type": "object"}}, 'json: {"type": "object"}'),
        ({"json": '{"type": "object"}'}, 'json: {"type": "object"}'),
        ({"regex": "a+"}, "regex: a+"),
        ({"choice": ("a", "b")}, 'choice: ["a", "b"]'),
        ({"grammar": 'start: "a"'}, 'grammar: start: "a"'),
        ({"json_object": True}, 'json: {"type": "object"}'),
    ],
)
def test_a_structure_reaches_the_server(
    client: Any, service: FakeService, asked: lc.StructuredOutputs, grammar: str
) -> None:
    client.chat("hi", structured_outputs=asked)
    client.generate("hi", structured_outputs=asked)
    with client.stream_chat("hi", structured_outputs=asked) as stream:
        stream.completion()

    assert [call["sampling"].grammar for call in service.calls] == [grammar] * 3


@pytest.mark.parametrize("asked", [{"regex": "bad"}, {"regex": "a", "choice": ["b"]}])
def test_a_structure_that_cannot_be_kept_is_refused(
    client: Any, service: FakeService, asked: lc.StructuredOutputs
) -> None:
    with pytest.raises(lc.InvalidRequestError, match="structured_outputs"):
        client.chat("hi", structured_outputs=asked)
    assert service.calls == []


WEATHER = lc.Function(
    "get_weather",
    "Weather now",
    {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
)
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>'


def test_calls_come_whole_and_in_pieces(client: Any, service: FakeService) -> None:
    text = f"Let me look. {CALL}\n{OTHER}"
    service.says = [text[i : i + 9] for i in range(0, len(text), 9)]
    tools = [WEATHER, lc.Function("get_time")]
    whole = client.chat("hi", tools=tools)
    with client.stream_chat("hi", tools=tools) as stream:
        streamed = stream.completion()

    for answer in (whole, streamed):
        assert answer.text == "Let me look." and answer.choices[0].finish_reason == "tool_calls"
        assert [(call.name, call.arguments, call.index) for call in answer.tool_calls] == [
            ("get_weather", '{"city": "Paris"}', 0),
            ("get_time", "{}", 1),
        ]
        assert all(call.id for call in answer.tool_calls)
    first, second = (call["tools"] for call in service.rendered)
    assert first == second and first[0]["function"]["parameters"] == WEATHER.parameters


def test_a_call_is_answered_in_the_next_turn(client: Any, service: FakeService) -> None:
    service.says = [CALL]
    (call,) = client.chat("hi", tools=[WEATHER], tool_choice=WEATHER).tool_calls
    turns = [
        lc.Message("user", "hi"),
        lc.Message("assistant", None, tool_calls=[call], reasoning="so"),
        lc.Message("tool", "sunny", tool_call_id=call.id),
    ]
    client.chat(turns, tools=[WEATHER], tool_choice="none", parallel_tool_calls=False)
    _, assistant, result = service.rendered[-1]["messages"]

    assert "get_weather" in service.calls[0]["sampling"].grammar
    assert assistant["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}
    assert assistant["reasoning_content"] == "so"
    assert result["tool_call_id"] == call.id and service.rendered[-1]["tools"] is None


@pytest.mark.parametrize(
    "asked",
    [
        {"tools": [lc.Function("a b")]},
        {"tools": [lc.Function("f", parameters="{")]},
        {"tools": [WEATHER], "tool_choice": lc.Function("g")},
        {"tool_choice": "sometimes"},
        {"reasoning_effort": "high"},
    ],
)
def test_options_that_cannot_be_kept_are_refused(
    client: Any, service: FakeService, asked: lc.ChatOptions
) -> None:
    with pytest.raises(lc.InvalidRequestError):
        client.chat("hi", **asked)
    assert service.calls == []


def test_reasoning_comes_apart(client: Any, service: FakeService) -> None:
    service.chat.template = "<think></think>"
    service.says = ["<think>", "so", "</think>", "Yes."]
    whole = client.chat("hi")
    with client.stream_chat("hi") as stream:
        streamed = stream.completion()

    for answer in (whole, streamed):
        assert (answer.choices[0].reasoning, answer.text) == ("so", "Yes.")
        assert answer.usage.reasoning_tokens == 3
    assert client.chat("hi", include_reasoning=False).choices[0].reasoning == ""


ALL: lc.Sampling = {
    "max_tokens": 5,
    "min_tokens": 1,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 7,
    "min_p": 0.01,
    "seed": 3,
    "repetition_penalty": 1.1,
    "frequency_penalty": 0.25,
    "presence_penalty": -0.25,
    "logit_bias": {5: -1.5},
    "stop": ["a"],
    "stop_token_ids": [9],
    "include_stop_str_in_output": True,
    "ignore_eos": True,
    "n": 2,
    "logprobs": 2,
    "prompt_logprobs": 1,
}


def test_every_way_to_sample_reaches_the_server(client: Any, service: FakeService) -> None:
    chat = client.chat("hi", priority=-2, **ALL)
    text = client.generate("hi", priority=3, **ALL)
    first, second = (call["sampling"] for call in service.calls)

    assert ALL.keys() == lc.Sampling.__annotations__.keys()
    assert first == second
    assert [call["turn"].priority for call in service.calls] == [-2, 3]
    for name, value in ALL.items():
        wanted = ((5, -1.5),) if name == "logit_bias" else value
        wanted = tuple(wanted) if isinstance(wanted, list) else wanted
        assert getattr(first, name) == wanted, name
    for answer in (chat, text):
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert [entry.token for entry in answer.choices[1].logprobs][0] == "base"
        assert {top.token for top in answer.choices[0].logprobs[0].top} >= {"t0", "t1"}
        assert answer.opening.prompt_logprobs == tuple(
            lc.TokenLogprob(c, -3.0, ord(c), (lc.TokenLogprob("t0", -0.5, 20),)) for c in "hi"
        )


def test_several_adapters_reach_the_server(client: Any, service: FakeService) -> None:
    chat = client.chat("hi", adapter={"pirate": 0.7, "codeword": 1.0})
    text = client.generate("hi", adapter={"pirate": -2.0})

    first, second = (call["adapter"] for call in service.calls)
    assert first == [("pirate", 0.7), ("codeword", 1.0)] and second == [("pirate", -2.0)]
    assert chat.opening.adapter == "default/pirate*0.7+default/codeword"
    assert text.opening.generation.startswith("mix:")


def test_a_conversation_reaches_the_template(client: Any, service: FakeService) -> None:
    call = lc.ToolCall("c1", "f", "{}")
    turns = [
        {"role": "system", "content": "be brief"},
        lc.Message("assistant", None, tool_calls=[call]),
        lc.Message("tool", "1", tool_call_id="c1"),
    ]
    client.chat(turns, template={"a": True, "b": 1, "c": 0.5, "d": "x"})

    function = {"name": "f", "arguments": {}}
    assert service.rendered[0]["template_kwargs"] == {"a": True, "b": 1, "c": 0.5, "d": "x"}
    assert service.rendered[0]["messages"] == [
        {"role": "system", "content": "be brief"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "c1", "type": "function", "function": function}],
        },
        {"role": "tool", "content": "1", "tool_call_id": "c1"},
    ]


def test_tokens_status_and_drain(client: Any) -> None:
    assert client.tokenize("hi") == (1, 104, 105)
    assert client.tokenize("hi", add_special_tokens=False) == (104, 105)
    assert client.tokenize([lc.Message("user", "hi")]) == (1, 104, 105)
    assert client.status().model == "tiny" and client.status().max_model_len == 512
    assert client.drain() == 0
    assert client.status().state == "draining"


def test_a_conversation_is_tokenized_for_the_adapter(client: Any, service: FakeService) -> None:
    turns = [lc.Message("user", "hi")]
    own = service.store.resolve("pirate").generation
    service.templates[own] = "own"
    client.tokenize(turns, adapter="pirate", add_special_tokens=True)
    client.tokenize(turns, model="codeword")
    client.tokenize(turns, adapter={"pirate": 0.5})

    assert [one["template"] for one in service.rendered] == ["own", None, "own"]
    assert [one["add_special_tokens"] for one in service.rendered] == [True, False, False]
    with pytest.raises(lc.AdapterNotFoundError):
        client.tokenize(turns, adapter="nobody")
    with pytest.raises(lc.InvalidRequestError):
        client.tokenize("hi", adapter="pirate")


REFUSALS: list[tuple[dict[str, Any], type[lc.LorinerError], str]] = [
    ({"adapter": "nope"}, lc.AdapterNotFoundError, "adapter"),
    ({"adapter": {"pirate": 1.0, "nope": 0.5}}, lc.AdapterNotFoundError, "adapter"),
    ({"model": "nope"}, lc.ModelNotFoundError, "model"),
    ({"temperature": 3.0}, lc.InvalidRequestError, "temperature"),
    ({"logprobs": 30}, lc.InvalidRequestError, "logprobs"),
]


@pytest.mark.parametrize(("fields", "kind", "param"), REFUSALS)
def test_a_refusal_is_raised_as_what_it_is(
    client: Any, fields: dict[str, Any], kind: type[lc.LorinerError], param: str
) -> None:
    for ask in (client.chat, lambda *a, **m: client.stream_chat(*a, **m).__enter__()):
        with pytest.raises(kind) as caught:
            ask("hi", **fields)
        assert str(caught.value.param).endswith(param)
        assert str(caught.value.request_id).startswith("req_")
    with pytest.raises(lc.InvalidRequestError):
        client.chat([{"role": "nobody", "content": "x"}])


def test_what_cannot_be_written_is_refused_here(client: Any, service: FakeService) -> None:
    for prompt, fields in (("hi", {"temperature": "hot"}), ([-1], {}), ([2**40], {})):
        with pytest.raises(lc.InvalidRequestError):
            client.generate(prompt, **fields)
    assert service.calls == []


def test_a_full_queue_says_when_to_come_back(client: Any, service: FakeService) -> None:
    service.refuse = OverloadedError("full", 1.5)
    with pytest.raises(lc.OverloadedError) as caught:
        client.chat("hi")
    assert caught.value.retry_after_s == 1.5


def test_a_fault_of_the_server_is_told_by_its_id(client: Any, service: FakeService) -> None:
    service.refuse = RuntimeError("secret")
    with pytest.raises(lc.ServerError, match="request id req_") as caught:
        client.chat("hi")
    assert "secret" not in str(caught.value)


def test_a_stream_that_breaks_raises_after_what_came(client: Any, service: FakeService) -> None:
    service.fail_after, service.fail_with = 2, EngineFailedError("gone")
    seen = []
    with pytest.raises(lc.EngineFailedError), client.stream_chat("hi") as stream:
        for delta in stream:
            seen.append(delta.text)
    assert seen == ["base", " answers"]
    assert len(service.calls) == 1, "a stream that began is never tried again"


def test_leaving_the_block_ends_the_request(client: Any, service: FakeService) -> None:
    service.delay_s = 0.05
    with client.stream_chat("hi") as stream:
        next(iter(stream))
    wait_until(lambda: len(service.closed) == 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_deadline_ends_the_request(live: LiveServer, service: FakeService, kind: str) -> None:
    service.hold = asyncio.Event()
    with open_client(kind, live, timeout_s=0.3) as client:
        with pytest.raises(lc.DeadlineExceededError):
            client.chat("hi")
        with pytest.raises(lc.DeadlineExceededError), client.stream_chat("hi"):
            pass
    wait_until(lambda: len(service.closed) == 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_is_sent_and_never_shown(service: FakeService, tmp_path: Path, kind: str) -> None:
    config = ServerConfig(port=0, grpc_port=0, store=tmp_path, api_key="user", admin_key="admin")
    with LiveServer(service, config) as live:
        with open_client(kind, live) as nobody, pytest.raises(lc.AuthenticationError):
            nobody.chat("hi")
        with open_client(kind, live, key="user") as user:
            assert user.chat("hi").text
            with pytest.raises(lc.PermissionDeniedError):
                user.status()
        with open_client(kind, live, key="admin") as admin:
            assert admin.status().state == "ready"


def test_nobody_at_the_address_is_a_connect_error() -> None:
    for address in ("127.0.0.1:1", "http://127.0.0.1:1"):
        client = lc.Client(address, retry=lc.Retry(attempts=1))
        with client, pytest.raises(lc.ConnectError):
            client.chat("hi")


def test_adapters_are_listed_moved_kept_and_forgotten(client: Any, service: FakeService) -> None:
    names = [adapter.name for adapter in client.adapters.list()]
    assert names == ["acme/legal", "default/codeword", "default/pirate"]
    detail = client.adapters.get("pirate")
    assert detail.adapter.tier == "disk" and detail.adapter.state == "ready"
    assert [entry.generation for entry in detail.history] == [detail.adapter.generation]

    assert client.adapters.alias("prod", "pirate").generation == detail.adapter.generation
    assert client.adapters.pin("prod").pinned and not client.adapters.unpin("prod").pinned
    client.adapters.evict("prod")
    assert service.evicted == [detail.adapter.generation]
    with pytest.raises(lc.AdapterConflictError):
        client.adapters.delete("prod", expected_generation="f" * 64)
    assert client.adapters.delete("prod").name == "default/prod"
    with pytest.raises(lc.AdapterNotFoundError):
        client.adapters.get("prod")


def test_a_folder_is_uploaded_with_progress(
    client: Any, service: FakeService, tmp_path: Path
) -> None:
    told: list[tuple[int, int]] = []
    with Store(tmp_path / "real", TINY, BASE) as store:
        service.store = store  # type: ignore[assignment]
        folder = write_adapter(tmp_path / "a")
        (folder / "tokenizer.json").write_text("{}")
        report = client.adapters.upload(folder, "a", progress=lambda *at: told.append(at))

        assert report.name == "default/a" and report.generation == store.get("a").generation
        assert told[-1][0] == told[-1][1] > 0 and told == sorted(told)
        with pytest.raises(lc.AdapterConflictError):
            client.adapters.upload(folder, "a", expected_generation="")


def test_a_bad_upload_says_every_reason(client: Any, service: FakeService, tmp_path: Path) -> None:
    with Store(tmp_path / "real", TINY, BASE) as store:
        service.store = store  # type: ignore[assignment]
        folder = write_adapter(tmp_path / "a", tensors(), config(use_dora=True))
        with pytest.raises(lc.InvalidAdapterError) as caught:
            client.adapters.upload(str(folder), "a")
        assert any("dora" in reason.lower() for reason in caught.value.reasons)
        assert store.list(all_states=True) == []


def test_what_cannot_be_sent_is_told_before_it_is_tried(client: Any, tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(lc.ConfigError, match=str(path)):
            client.adapters.upload(path, "a")


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_not_run_is_tried_again(live: LiveServer, service: FakeService, kind: str) -> None:
    refusals, generate = [EngineUnavailableError("restarting")] * 2, service.generate

    async def soon(*args: Any, **more: Any) -> Any:
        if refusals:
            raise refusals.pop()
        return await generate(*args, **more)

    service.generate = soon  # type: ignore[method-assign]
    with open_client(kind, live) as client:
        assert client.chat("hi").text
        refusals.append(EngineUnavailableError("restarting"))
        with client.stream_chat("hi") as stream:
            assert stream.completion().text
    service.refuse = EngineUnavailableError("down")
    hasty = open_client(kind, live, retry=lc.Retry(2, 0.01))
    with hasty as client, pytest.raises(lc.EngineUnavailableError):
        client.chat("hi")
