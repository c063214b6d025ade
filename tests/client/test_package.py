"""The package as its users meet it: names, what an import brings, errors, the fake."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys

import pytest

import loriner_client as lc
from loriner import errors
from loriner.api.status import TABLE
from loriner_client import _config, _errors


def test_public_names_are_sorted_and_complete() -> None:
    public = {name for name in vars(lc) if not name.startswith("_")}
    modules = {name for name, value in vars(lc).items() if inspect.ismodule(value)}

    assert lc.__all__ == sorted(lc.__all__)
    assert set(lc.__all__) == public - modules


@pytest.mark.parametrize(
    ("code", "brings"),
    [
        ("import loriner_client", ()),
        ("import loriner_client as c; c.Client('127.0.0.1:1').close()", ("grpc",)),
        ("import loriner_client as c; c.Client('http://127.0.0.1:1').close()", ("httpx",)),
    ],
)
def test_an_import_brings_neither_server_nor_torch(code: str, brings: tuple[str, ...]) -> None:
    heavy = ("torch", "loriner", "transformers", "pydantic", "msgspec", "numpy", "grpc", "httpx")
    check = f"import sys; {code}; print(*[m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)

    assert tuple(done.stdout.split()) == brings


def test_the_error_tree_mirrors_the_servers() -> None:
    rows = {cls: row for cls, row in TABLE.items() if row.code not in ("internal_error",)}
    for cls, row in rows.items():
        mine = _errors.BY_CODE[row.code or "invalid_request"]
        if row.code is None:
            assert mine is lc.InvalidRequestError
            continue
        assert mine.__name__ == cls.__name__
        assert [base.__name__ for base in mine.__mro__] == [base.__name__ for base in cls.__mro__]
    assert len(_errors.BY_CODE) == len(rows)
    assert issubclass(errors.LorinerError, Exception) and issubclass(lc.LorinerError, Exception)


def test_a_code_that_is_new_here_is_a_server_error() -> None:
    error = _errors.error_of(_errors.Refusal("odd", "from_the_future"))

    assert type(error) is lc.ServerError and error.code == "from_the_future"


def test_a_key_does_not_show() -> None:
    assert "secret" not in repr(_config.Settings(("a:1",), key="secret"))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: lc.Client(),
        lambda: lc.Client(""),
        lambda: lc.Client(["http://a", "http://b"]),
        lambda: lc.Client("http://"),
        lambda: lc.Client(["127.0.0.1:x", "127.0.0.1:2"]),
        lambda: lc.Client("a:1", retry=lc.Retry(attempts=9)),
        lambda: lc.Client("a:1", tls=lc.Tls(authorities=_config.Path("/no/such"))),
    ],
)
def test_what_cannot_work_is_told_at_once(wrong: object) -> None:
    assert callable(wrong)
    with pytest.raises(lc.ConfigError):
        wrong()


def test_a_fake_stands_in_for_a_server() -> None:
    fake = lc.FakeTransport(lambda query: "hello")
    with lc.Client(transport=fake) as client:
        assert client.chat("hi", adapter="a", temperature=0).text == "hello"
        with client.stream_generate("x") as stream:
            assert [delta.text for delta in stream] == ["hello"]

    chat, generate = fake.queries
    assert isinstance(chat, lc.Chat) and chat.messages == [lc.Message("user", "hi")]
    assert chat.adapter == "a" and chat.sampling == {"temperature": 0}
    assert isinstance(generate, lc.Generate) and fake.is_closed


def test_a_fake_embeds() -> None:
    fake = lc.FakeTransport(lambda query: lc.embeddings([[1.0, 0.0]] * len(query.inputs)))
    answer = lc.Client(transport=fake).embed(["a", [1, 2]], adapter="t/a")

    assert answer.vectors == ((1.0, 0.0),) * 2
    assert fake.queries == [lc.Embed(["a", [1, 2]], "t/a")]


def test_a_fake_can_refuse() -> None:
    client = lc.Client(transport=lc.FakeTransport(lambda query: lc.OverloadedError("full")))
    with pytest.raises(lc.OverloadedError), client.stream_chat("hi"):
        pass


def test_an_async_fake_is_the_same() -> None:
    fake = lc.AsyncFakeTransport(lambda query: lc.completion("hello", adapter="t/a"))

    async def use() -> str:
        client = lc.AsyncClient(transport=fake)
        async with client, client.stream_chat("hi") as stream:
            assert stream.opening.adapter == "t/a"
            return (await stream.completion()).text

    assert asyncio.run(use()) == "hello" and fake.is_closed
