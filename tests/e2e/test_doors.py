"""Both doors of one real server: the same request has the same tokens and the same refusals, and
a caller who leaves frees the engine whichever door it came through."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import loriner_client as lc
from loriner.api.status import TABLE
from tests.e2e.kit import Kit
from tests.servers import ServerProcess, wait_until

HI, STORY = "hi", "tell me a story about a harness"
GREEDY: lc.Sampling = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
ANSWER = {
    "type": "object",
    "properties": {
        "ok": {"type": "boolean"},
        "n": {"type": "integer", "maximum": 99, "minimum": 0},
    },
    "required": ["ok", "n"],
    "additionalProperties": False,
}
ABORTED = "loriner_aborted_sequences_total"
GRPC_CODES = {row.code or "invalid_request": row.grpc for row in TABLE.values()}


@pytest.fixture(scope="module")
def server(kit: Kit, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    store = tmp_path_factory.mktemp("doors") / "store"
    flags = ("--grpc-port", "0", "--max-upload-bytes", "32M", "--max-waiting", "8")
    with ServerProcess(kit.base, store, *flags) as server:
        with lc.Client(server.grpc_address) as client:
            client.adapters.upload(kit.adapters["a0"], "a0")
        server.publish(kit.adapters["a1"], "a1")
        yield server


@pytest.fixture(scope="module")
def grpc(server: ServerProcess) -> Iterator[lc.Client]:
    with lc.Client(server.grpc_address) as client:
        yield client


@pytest.fixture(scope="module")
def http(server: ServerProcess) -> Iterator[lc.Client]:
    with lc.Client(server.url) as client:
        yield client


WEATHER = lc.Function("get_weather", "Weather now", ANSWER)
TIME = lc.Function("get_time")
CHATS: list[tuple[str, dict[str, Any]]] = [
    (HI, {**GREEDY}),
    (HI, {**GREEDY, "adapter": "a0"}),
    (STORY, {**GREEDY, "model": "a1"}),
    (STORY, {**GREEDY, "model": "tiny:a0"}),
    (HI, {"temperature": 1.0, "seed": 7, "max_tokens": 12, "top_p": 0.9, "top_k": 40}),
    (HI, {"temperature": 0.8, "seed": 3, "max_tokens": 8, "n": 3, "adapter": "a1"}),
    (HI, {**GREEDY, "adapter": {"a0": 0.75, "a1": -1.25}}),
    (STORY, {"seed": 2, "adapter": {"a1": 0.5}}),
    (HI, {**GREEDY, "logprobs": 3}),
    (STORY, {**GREEDY, "prompt_logprobs": 2, "adapter": "a1", "n": 2}),
    (HI, {**GREEDY, "repetition_penalty": 1.3, "frequency_penalty": 0.5}),
    (HI, {**GREEDY, "logit_bias": {65: 100.0}}),
    (STORY, {"temperature": 0.0, "max_tokens": 30, "stop_token_ids": [65, 66, 67, 97, 101]}),
    (STORY, {"temperature": 0.0, "max_tokens": 30, "logit_bias": {65: 100.0}, "stop": ["AAA"]}),
    (HI, {"temperature": 0.0, "max_tokens": 4, "min_tokens": 4}),
    (HI, {"temperature": 0.0, "structured_outputs": {"regex": "[a-z]{3,9}: (yes|no)"}}),
    (STORY, {"seed": 5, "n": 3, "adapter": "a0", "structured_outputs": {"json": ANSWER}}),
    (STORY, {"seed": 6, "logprobs": 2, "structured_outputs": {"choice": ["yes", "no", "ünï"]}}),
    (HI, {"seed": 7, "structured_outputs": {"grammar": 'start: "<" /[a-f]{2,8}/ ">"'}}),
    (HI, {"seed": 8, "max_tokens": 9, "structured_outputs": {"json_object": True}}),
    (HI, {"seed": 9, "max_tokens": 20, "tools": [WEATHER, TIME]}),
    (HI, {"seed": 1, "tools": [WEATHER, TIME], "tool_choice": WEATHER, "adapter": "a0"}),
    (
        STORY,
        {
            "seed": 2,
            "n": 2,
            "tools": [WEATHER, TIME],
            "tool_choice": "required",
            "parallel_tool_calls": False,
        },
    ),
    (STORY, {"seed": 3, "tools": [lc.Function("f", None, ANSWER, strict=True)], "max_tokens": 30}),
    (HI, {**GREEDY, "tools": [TIME], "tool_choice": "none", "reasoning_effort": "none"}),
]


def plain(answer: lc.Completion) -> dict[str, Any]:
    """What must be equal: not the answer's own id, nor what the cache had by then."""
    choices = [
        {
            "text": choice.text,
            "token_ids": choice.token_ids,
            "finish": (choice.finish_reason, choice.stop_reason),
            "calls": [(call.index, call.name, call.arguments) for call in choice.tool_calls],
            "reasoning": choice.reasoning,
            "logprobs": [
                (one.token, pytest.approx(one.logprob, abs=1e-4), len(one.top))
                for one in choice.logprobs
            ],
        }
        for choice in answer.choices
    ]
    opening = answer.opening
    where = (opening.model, opening.adapter, opening.generation, opening.base_digest)
    prompt = [
        (one.token, one.token_id, pytest.approx(one.logprob, abs=1e-4), len(one.top))
        for one in opening.prompt_logprobs
    ]
    usage = (answer.usage.prompt_tokens, answer.usage.completion_tokens)
    return {"choices": choices, "opening": where, "prompt": prompt, "usage": usage}


@pytest.mark.parametrize(("text", "fields"), CHATS)
def test_a_chat_has_the_same_tokens_through_both_doors(
    grpc: lc.Client, http: lc.Client, text: str, fields: dict[str, Any]
) -> None:
    answers = [plain(client.chat(text, **fields)) for client in (grpc, http)]
    for client in (grpc, http):
        with client.stream_chat(text, **fields) as stream:
            answers.append(plain(stream.completion()))

    assert answers[0]["choices"][0]["token_ids"]
    assert bool(answers[0]["prompt"]) == ("prompt_logprobs" in fields)
    assert all(answer == answers[0] for answer in answers[1:])


@pytest.mark.parametrize(
    "fields",
    [{**GREEDY}, {**GREEDY, "adapter": "a0"}, {"seed": 4}, {**GREEDY, "prompt_logprobs": 1}],
)
@pytest.mark.parametrize("prompt", ["Once upon", [79, 110, 99, 101]])
def test_a_continued_text_has_the_same_tokens_through_both_doors(
    grpc: lc.Client, http: lc.Client, prompt: Any, fields: dict[str, Any]
) -> None:
    first, second = (plain(client.generate(prompt, **fields)) for client in (grpc, http))

    assert first == second and first["choices"][0]["token_ids"]


@pytest.mark.parametrize(
    "fields",
    [{}, {"adapter": "a0"}, {"model": "tiny:a1"}, {"adapter": {"a0": 0.75, "a1": -1.25}}],
    ids=str,
)
def test_a_text_has_the_same_vector_through_both_doors(
    grpc: lc.Client, http: lc.Client, kit: Kit, fields: dict[str, Any]
) -> None:
    inputs = [STORY, HI, [79, 110, 99, 101], "x" * 3000]
    first, second = (client.embed(inputs, **fields) for client in (grpc, http))
    assert first.vectors == second.vectors and len(first.vectors) == len(inputs)
    assert first.usage == second.usage == lc.Usage(len(STORY) + len(HI) + 4 + 3000, 0)
    assert first.opening.generation == second.opening.generation
    assert (first.opening.adapter is None) == (not fields)

    for vector, given in zip(first.vectors, inputs, strict=True):
        alone = grpc.embed([given], **fields).vectors[0]
        assert vector == pytest.approx(alone, abs=1e-5)
        ids = list(given.encode()) if isinstance(given, str) else given
        if "adapter" not in fields or isinstance(fields["adapter"], str):
            name = fields.get("adapter") or ("a1" if "model" in fields else None)
            assert vector == pytest.approx(kit.embedding(tuple(ids), name), abs=1e-5)


@pytest.mark.parametrize("adapter", ["base", "a0"])
def test_a_prompts_log_probabilities_are_told_once_and_alike(
    server: ServerProcess, adapter: str
) -> None:
    asked = {"prompt": [STORY, [79, 110]], "adapter": adapter, "n": 2, "max_tokens": 3}
    asked |= {"echo": True, "logprobs": 1, "prompt_logprobs": 2, "temperature": 0}
    for _ in range(2):  # the second time the prompt is in the cache
        choices = server.http.post("/v1/completions", json=asked).json()["choices"]
        assert [len(choice["prompt_logprobs"]) for choice in choices] == [len(STORY)] * 2 + [2, 2]
        assert choices[0]["prompt_logprobs"] == choices[1]["prompt_logprobs"]
        for choice in choices:
            first, *others = choice["prompt_logprobs"]
            own = [next(iter(entry.values()))["logprob"] for entry in others]
            echoed = choice["logprobs"]["token_logprobs"]
            assert first is echoed[0] is None and all(value < 0 for value in own)
            assert echoed[1 : len(own) + 1] == own and len(echoed) == len(own) + 4

    chat = {"messages": [{"role": "user", "content": HI}], "adapter": adapter, "max_tokens": 2}
    whole = server.http.post("/v1/chat/completions", json={**chat, "prompt_logprobs": 0}).json()
    assert len(whole["prompt_logprobs"]) == whole["usage"]["prompt_tokens"]
    assert all(len(entry) == 1 for entry in whole["prompt_logprobs"][1:])


@pytest.mark.parametrize("which", ["base", "a0", "a1"])
def test_a_prompt_is_scored_without_an_answer_and_alike(
    server: ServerProcess, grpc: lc.Client, http: lc.Client, which: str
) -> None:
    """What evaluation harnesses ask for."""
    body = {"adapter": which, "prompt": [STORY, HI], "echo": True, "logprobs": 1, "temperature": 0}
    scored, answered = (
        server.http.post("/v1/completions", json={**body, "max_tokens": limit}).json()
        for limit in (0, 1)
    )
    usage = scored["usage"]
    assert usage["prompt_tokens"] == usage["total_tokens"] == len(STORY) + len(HI)
    assert usage["completion_tokens"] == 0
    for one, other, text in zip(scored["choices"], answered["choices"], (STORY, HI), strict=True):
        told, more = one["logprobs"], other["logprobs"]
        assert (one["text"], one["finish_reason"]) == (text, "length")
        assert "".join(told["tokens"]) == text and told["text_offset"][0] == 0
        assert told["token_logprobs"][0] is None
        assert told["token_logprobs"][1:] == pytest.approx(more["token_logprobs"][1:-1], abs=1e-4)

    first = [one["token_logprobs"] for one in (c["logprobs"] for c in scored["choices"])][0]
    for client in (grpc, http):
        for ask in (client.generate, client.chat):
            answer = ask(STORY, adapter=which, max_tokens=0, prompt_logprobs=2)
            (choice,) = answer.choices
            assert (choice.text, choice.token_ids, choice.finish_reason) == ("", (), "length")
            assert answer.usage.completion_tokens == 0 < answer.usage.prompt_tokens
            assert len(answer.opening.prompt_logprobs) == answer.usage.prompt_tokens - 1
        answer = client.generate(STORY, adapter=which, max_tokens=0, prompt_logprobs=2)
        found = [one.logprob for one in answer.opening.prompt_logprobs]
        assert found == pytest.approx(first[1:], abs=1e-4)
    wait_until(lambda: grpc.status().num_running == 0, server=server)
    wait_until(lambda: _metric(server, "loriner_kv_usage_ratio") == 0, server=server)


def test_more_texts_than_the_queue_holds_are_embedded(
    server: ServerProcess, grpc: lc.Client, http: lc.Client
) -> None:
    texts = [f"text {i}" for i in range(200)]  # 40 sequences may wait or run
    first, second = (client.embed(texts, adapter="a0") for client in (grpc, http))
    assert len(set(first.vectors)) == 200
    assert all(
        one == pytest.approx(other, abs=1e-5)
        for one, other in zip(first.vectors, second.vectors, strict=True)
    )
    assert server.http.get("/admin/status").json()["num_waiting"] == 0


@pytest.mark.parametrize(
    ("inputs", "fields"),
    [
        ([], {}),
        ([""], {}),
        (["a", ""], {}),
        (["x" * 9000], {}),
        (["a", [10**6]], {}),
        (["a", []], {}),
        (["a"] * 2049, {}),
        (["a"], {"adapter": "nope"}),
        (["a"], {"model": "nope"}),
        (["a"], {"adapter": {"a0": 1.0, "nope": 1.0}}),
        (["a"], {"adapter": {"a0": 1000.0}}),
        (["a"], {"priority": 5000}),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_cannot_be_embedded_is_refused_alike(
    grpc: lc.Client, http: lc.Client, inputs: Any, fields: dict[str, Any]
) -> None:
    by_grpc = _refused(lambda: grpc.embed(inputs, **fields))
    assert by_grpc == _refused(lambda: http.embed(inputs, **fields)) and by_grpc.param


@pytest.mark.parametrize("which", ["grpc", "http"])
def test_a_structured_answer_has_its_structure(
    grpc: lc.Client, http: lc.Client, which: str
) -> None:
    client = {"grpc": grpc, "http": http}[which]
    answer = client.chat(STORY, n=4, structured_outputs={"json": ANSWER})
    for choice in answer.choices:
        assert set(json.loads(choice.text)) == {"ok", "n"} and choice.finish_reason == "stop"
    text = client.generate("x", structured_outputs={"choice": ["left", "right"]}).text
    assert text in ("left", "right")


def test_an_answer_is_the_one_it_has_alone(grpc: lc.Client, kit: Kit) -> None:
    for adapter in (None, "a0", "a1"):
        answer = grpc.chat(STORY, adapter=adapter, temperature=0.0, max_tokens=16, ignore_eos=True)
        assert list(answer.choices[0].token_ids) == kit.alone(STORY, adapter)


def test_tokens_and_adapters_look_the_same(grpc: lc.Client, http: lc.Client) -> None:
    turns = [lc.Message("user", HI)]
    assert grpc.tokenize(STORY) == http.tokenize(STORY)
    assert grpc.tokenize(turns) == http.tokenize(turns)

    def listed(client: lc.Client) -> list[tuple[Any, ...]]:
        return [(a.name, a.generation, a.ranks, a.targets, a.state) for a in client.adapters.list()]

    assert listed(grpc) == listed(http)
    assert [entry[0] for entry in listed(grpc)] == ["default/a0", "default/a1"]
    assert grpc.status().base_digest == http.status().base_digest


def test_a_conversations_tokens_are_the_prompt_of_the_chat_that_names_the_same_adapter(
    server: ServerProcess, grpc: lc.Client, http: lc.Client, kit: Kit, tmp_path: Path
) -> None:
    turns = [lc.Message("system", "be brief"), lc.Message("user", HI)]
    first = publish_with(server, kit, tmp_path / "one", "{{ messages[-1].content }}>")
    assert grpc.tokenize(turns, adapter="own") == tuple(f"{HI}>".encode())
    publish_with(server, kit, tmp_path / "two", "{{ messages | length }} turns:")

    found = set()
    for which in ("base", "a0", "own", f"own@{first}", {"own": 0.5}, {"own": 1.0, "a0": 1.0}):
        ids = {client.tokenize(turns, adapter=which) for client in (grpc, http)}
        prompt, sizes = prompt_of(server, turns, which), set()
        for client in (grpc, http):
            answer = client.chat(turns, adapter=which, max_tokens=1)
            sizes.add(answer.usage.prompt_tokens)
        assert ids == {prompt} and sizes == {len(prompt)}
        found.add(prompt)
    assert len(found) == 3, "the base's, and those of two generations of `own`"

    for client in (grpc, http):
        with pytest.raises(lc.AdapterNotFoundError):
            client.tokenize(turns, adapter="acme/own")
    grpc.adapters.delete("own")
    with pytest.raises(lc.AdapterNotFoundError):
        http.tokenize(turns, adapter="own")


def publish_with(server: ServerProcess, kit: Kit, folder: Path, template: str) -> str:
    """Publishes `own`, with a chat template of its own."""
    shutil.copytree(kit.adapters["a2"], folder)
    (folder / "chat_template.jinja").write_text(template)
    return server.publish(folder, "own")


def prompt_of(server: ServerProcess, turns: list[lc.Message], which: Any) -> tuple[int, ...]:
    """The prompt of a chat, as its answer tells it."""
    body = {"messages": [{"role": turn.role, "content": turn.content} for turn in turns]}
    parts = which.items() if isinstance(which, dict) else ()
    adapter = [{"name": name, "scale": scale} for name, scale in parts] or which
    asked = {**body, "adapter": adapter, "max_tokens": 1, "return_token_ids": True}
    answer = server.http.post("/v1/chat/completions", json=asked).json()
    assert len(answer["prompt_token_ids"]) == answer["usage"]["prompt_tokens"]
    return tuple(answer["prompt_token_ids"])


REFUSED: list[dict[str, Any]] = [
    {"adapter": "nope"},
    {"model": "nope"},
    {"model": "tiny:nope"},
    {"adapter": "a0@000000000000"},
    {"adapter": "no/such/name"},
    {"adapter": "x" * 300},
    {"temperature": -1.0},
    {"temperature": float("inf")},
    {"top_p": 0.0},
    {"top_k": -2},
    {"min_p": 2.0},
    {"max_tokens": 0},
    {"max_tokens": 10**6},
    {"min_tokens": 3, "max_tokens": 2},
    {"n": 0},
    {"n": 129},
    {"n": 128},
    {"seed": 2**62, "n": 200},
    {"stop": [""]},
    {"stop": ["x"] * 20},
    {"stop_token_ids": [10**6]},
    {"logit_bias": {10**6: 1.0}},
    {"logit_bias": {1: 1000.0}},
    {"logprobs": 21},
    {"prompt_logprobs": 21},
    {"prompt_logprobs": -1},
    {"repetition_penalty": 0.0},
    {"frequency_penalty": 3.0},
    {"presence_penalty": -3.0},
    {"template": {"messages": 1}},
    {"structured_outputs": {"regex": "a(b"}},
    {"structured_outputs": {"regex": ""}},
    {"structured_outputs": {"json": {"type": "objekt"}}},
    {"structured_outputs": {"json": {"not": {}}}},
    {"structured_outputs": {"choice": []}},
    {"structured_outputs": {"choice": ["a", ""]}},
    {"structured_outputs": {"grammar": "start: nobody"}},
    {"structured_outputs": {"regex": "a+"}, "ignore_eos": True},
    {"structured_outputs": {"regex": "a+"}, "min_tokens": 2},
    {"tools": [lc.Function("a b")]},
    {"tools": [TIME, TIME]},
    {"tools": [TIME], "tool_choice": WEATHER},
    {"tools": [TIME], "structured_outputs": {"regex": "a+"}},
    {"tools": [lc.Function("f", parameters={"type": "objekt"})], "tool_choice": "required"},
    {"tool_choice": "required"},
    {"reasoning_effort": "high"},
    {"reasoning_effort": "enormous"},
]


@pytest.mark.parametrize("fields", REFUSED, ids=lambda fields: str(fields)[:40])
def test_a_refusal_is_the_same_through_both_doors(
    grpc: lc.Client, http: lc.Client, fields: dict[str, Any]
) -> None:
    by_grpc = _refused(lambda: grpc.chat(HI, **fields))
    by_http = _refused(lambda: http.chat(HI, **fields))
    if "inf" in str(fields):  # JSON has no infinity: the client cannot send it
        assert by_grpc.kind is by_http.kind is lc.InvalidRequestError
        return
    assert by_grpc == by_http
    assert by_grpc.code in GRPC_CODES


def test_a_token_out_of_vocabulary_is_named(grpc: lc.Client, http: lc.Client) -> None:
    for client in (grpc, http):
        with pytest.raises(lc.InvalidRequestError, match="token id 70000 is out of vocabulary"):
            client.generate([5, 70000, 80000])
        with pytest.raises(lc.InvalidRequestError, match=r"logit_bias: .* 70001 .* which has \d+"):
            client.generate("x", logit_bias={5: 1.0, 70001: 1.0})


def test_long_prompts_and_empty_ones_are_refused_alike(grpc: lc.Client, http: lc.Client) -> None:
    for ask, kind in (
        (lambda client: client.chat("x" * 9000), lc.ContextLengthError),
        (lambda client: client.generate([]), lc.InvalidRequestError),
        (lambda client: client.generate([10**6]), lc.InvalidRequestError),
        (lambda client: client.chat([]), lc.InvalidRequestError),
    ):
        messages = []
        for client in (grpc, http):
            with pytest.raises(kind) as caught:
                ask(client)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_a_bad_upload_is_refused_alike(
    grpc: lc.Client, http: lc.Client, kit: Kit, tmp_path: Path
) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((kit.adapters["a0"] / name).read_bytes())
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "use_dora": True}))
    reasons = []
    for client in (grpc, http):
        with pytest.raises(lc.InvalidAdapterError) as caught:
            client.adapters.upload(tmp_path, "bad")
        reasons.append(caught.value.reasons)

    assert reasons[0] == reasons[1] and "dora" in reasons[0][0].lower()


@pytest.mark.parametrize("how", ["leave", "deadline", "unary deadline"])
def test_a_caller_who_leaves_frees_the_engine(
    server: ServerProcess, grpc: lc.Client, how: str
) -> None:
    aborted = _metric(server, ABORTED)
    if how == "leave":
        with grpc.stream_chat(HI, max_tokens=6000, ignore_eos=True, adapter="a0") as stream:
            next(iter(stream))
            wait_until(lambda: grpc.status().num_running == 1)
    else:
        hasty = lc.Client(server.grpc_address, timeout_s=0.5)
        with hasty, pytest.raises(lc.DeadlineExceededError):
            if how == "deadline":
                with hasty.stream_chat(HI, max_tokens=6000, ignore_eos=True) as stream:
                    list(stream)
            hasty.chat(HI, max_tokens=6000, ignore_eos=True)

    wait_until(lambda: grpc.status().num_running == 0 == grpc.status().num_waiting, 5)
    assert _metric(server, ABORTED) == aborted + 1


def _metric(server: ServerProcess, name: str) -> float:
    lines = server.http.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


class _Refusal(NamedTuple):
    """What both doors have to say alike."""

    kind: type[lc.LorinerError]
    message: str
    code: str | None
    param: str


def _refused(ask: Callable[[], object]) -> _Refusal:
    with pytest.raises(lc.LorinerError) as caught:
        ask()
    error = caught.value
    return _Refusal(type(error), _bare(str(error)), error.code, _bare(error.param or ""))


def _bare(text: str) -> str:
    """A field's name without the place and the number that a door gives it."""
    for by_a_door, bare in (
        ("].function", "]"),
        ("tool_choice.function.name", "tool_choice.function"),
        ("sampling.", ""),
        ("top_logprobs", "logprobs"),
        ("inputs", "input"),
        ("adapters", "adapter"),
    ):
        text = text.replace(by_a_door, bare)
    return text


def test_a_killed_engine_ends_streams_and_the_next_calls_wait_for_the_new_one(
    server: ServerProcess, grpc: lc.Client
) -> None:
    wanted = grpc.chat(HI, **GREEDY).choices[0].token_ids
    endless = grpc.stream_chat(HI, max_tokens=6000, ignore_eos=True)
    with pytest.raises(lc.EngineFailedError), endless as stream:
        next(iter(stream))
        server.engine.kill()
        list(stream)
    wait_until(lambda: _answers(grpc), 30, server)

    assert grpc.chat(HI, **GREEDY).choices[0].token_ids == wanted
    assert grpc.status().num_restarts >= 1


def _answers(client: lc.Client) -> bool:
    try:
        return bool(client.chat(HI, **GREEDY).choices)
    except lc.EngineError:
        return False
