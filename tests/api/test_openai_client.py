"""The openai package, unchanged, against the real server over a socket."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from loriner.errors import (
    ContextLengthError,
    EngineFailedError,
    EngineUnavailableError,
    OverloadedError,
)
from tests.api.fake_service import FakeService
from tests.api.live import LiveServer, shared_server, wait_until

pytestmark = pytest.mark.clients("openai")

HI: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    root = tmp_path_factory.mktemp("shared")
    with shared_server(root, api_key="secret", admin_key="boss") as server:
        yield server


@pytest.fixture
def service(shared: LiveServer) -> FakeService:
    service = shared.service
    service.renew("pirate")
    assert isinstance(service, FakeService)
    return service


@pytest.fixture
def openai(shared: LiveServer, service: FakeService) -> Iterator[Any]:
    from openai import OpenAI

    with OpenAI(base_url=f"{shared.url}/v1", api_key="secret", max_retries=0) as client:
        yield client


def test_a_chat_is_answered(openai: Any) -> None:
    answer = openai.chat.completions.create(model="tiny", messages=HI)

    assert answer.choices[0].message.content == "base answers you (0) ünï."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert answer.loriner["generation"] is None


def test_an_adapter_is_chosen_by_model_or_in_extra_body(openai: Any, service: FakeService) -> None:
    ask = openai.chat.completions.create
    by_body = ask(model="tiny", messages=HI, extra_body={"adapter": "pirate"})
    by_model = ask(model="pirate", messages=HI)

    assert by_body.choices[0].message.content.startswith("pirate")
    assert by_body.choices == by_model.choices
    assert by_body.loriner["generation"] == service.store.resolve("pirate").generation


def test_a_stream_is_read_to_its_usage(openai: Any) -> None:
    chunks = list(
        openai.chat.completions.create(
            model="pirate", messages=HI, stream=True, stream_options={"include_usage": True}
        )
    )

    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "pirate answers you (0) ünï."
    assert chunks[-1].usage.completion_tokens == 6


def test_the_stream_helper_accumulates(openai: Any) -> None:
    with openai.chat.completions.stream(model="pirate", messages=HI, logprobs=True) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()

    assert final.choices[0].message.content == "pirate answers you (0) ünï."
    assert len(final.choices[0].logprobs.content) == 6


def test_completions_work_with_text_and_tokens(openai: Any) -> None:
    text = openai.completions.create(model="tiny", prompt=["a", "b"], echo=True)
    tokens = openai.completions.create(model="pirate", prompt=[1, 2], logprobs=1)

    assert [c.text[0] for c in text.choices] == ["a", "b"]
    assert tokens.choices[0].logprobs.tokens[0] == "pirate"


def test_models_are_listed_and_found(openai: Any) -> None:
    assert [model.id for model in openai.models.list()] == ["tiny", "pirate"]
    assert openai.models.retrieve("pirate").parent == "tiny"


@pytest.mark.parametrize(
    ("refusal", "name", "code"),
    [
        (ContextLengthError("long", "messages"), "BadRequestError", "context_length_exceeded"),
        (OverloadedError("full"), "RateLimitError", "queue_full"),
        (EngineUnavailableError("down"), "InternalServerError", "engine_unavailable"),
        (EngineFailedError("gone"), "InternalServerError", "engine_failed"),
    ],
)
def test_errors_become_its_exceptions(
    openai: Any, service: FakeService, refusal: Exception, name: str, code: str
) -> None:
    import openai as package

    service.refuse = refusal
    with pytest.raises(getattr(package, name)) as caught:
        openai.chat.completions.create(model="tiny", messages=HI)

    assert caught.value.code == code
    assert caught.value.request_id


def test_wrong_names_keys_and_values_become_its_exceptions(openai: Any) -> None:
    import openai as package

    with pytest.raises(package.NotFoundError) as unknown:
        openai.chat.completions.create(model="gpt-5", messages=HI)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")

    with pytest.raises(package.BadRequestError) as unserved:
        openai.chat.completions.create(model="tiny", messages=HI, store=True)
    assert unserved.value.param == "store"

    with pytest.raises(package.AuthenticationError):
        openai.with_options(api_key="wrong").models.list()

    with pytest.raises(package.PermissionDeniedError):
        openai.get("../admin/adapters", cast_to=object)


def test_a_failure_in_the_stream_is_an_api_error(openai: Any, service: FakeService) -> None:
    import openai as package

    service.fail_after, service.fail_with = 2, EngineFailedError("gone")
    stream = openai.chat.completions.create(model="tiny", messages=HI, stream=True)

    with pytest.raises(package.APIError, match="engine failed"):
        list(stream)


@pytest.mark.parametrize("given", ["hi", ["hi", "you"], [1, 2], [[1, 2], [3]]])
@pytest.mark.parametrize("encoding", [{}, {"encoding_format": "float"}])
def test_texts_are_embedded(
    openai: Any, service: FakeService, given: Any, encoding: dict[str, Any]
) -> None:
    answer = openai.embeddings.create(model="pirate", input=given, user="me", **encoding)

    sent = [call["prompt_ids"] for call in service.calls]
    assert [entry.embedding[:2] for entry in answer.data] == [[len(i), sum(i)] for i in sent]
    assert [entry.index for entry in answer.data] == list(range(len(sent)))
    assert answer.usage.total_tokens == sum(map(len, sent)) and answer.model == "pirate"


def test_a_prompt_is_echoed_with_its_logprobs(openai: Any) -> None:
    answer = openai.completions.create(
        model="tiny", prompt="hi", echo=True, logprobs=1, extra_body={"prompt_logprobs": 2}
    )
    (choice,) = answer.choices
    assert choice.logprobs.token_logprobs[:4] == [None, -3.0, -3.0, -0.25]
    assert choice.prompt_logprobs[1]["104"]["rank"] == 3


def test_a_full_queue_is_retried_and_then_served(openai: Any, service: FakeService) -> None:
    generate, refused = service.generate, []

    async def full_once(*args: Any, **kwargs: Any) -> Any:
        if not refused:
            refused.append(True)
            raise OverloadedError("full", 0.01)
        return await generate(*args, **kwargs)

    service.generate = full_once  # type: ignore[method-assign]
    client = openai.with_options(max_retries=2)

    assert client.chat.completions.create(model="tiny", messages=HI).choices
    assert refused


def test_closing_a_stream_frees_the_sequence(openai: Any, service: FakeService) -> None:
    service.delay_s = 0.05
    with openai.chat.completions.create(model="tiny", messages=HI, stream=True) as stream:
        next(iter(stream))
    wait_until(lambda: len(service.closed) == 1)

    assert service.open[0].position < 6


def test_the_async_client_runs_many_at_once(shared: LiveServer, service: FakeService) -> None:
    from openai import AsyncOpenAI

    async def ask_all() -> list[str]:
        async with AsyncOpenAI(base_url=f"{shared.url}/v1", api_key="secret") as client:
            create = client.chat.completions.create
            names = ["tiny", "pirate"] * 4
            answers = await asyncio.gather(*(create(model=n, messages=HI) for n in names))
            return [answer.choices[0].message.content or "" for answer in answers]

    assert [text.split()[0] for text in asyncio.run(ask_all())] == ["base", "pirate"] * 4
