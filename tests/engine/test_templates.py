"""Templates that adapters bring: rendered as the base's tokenizer would, and within bounds."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loriner.engine.chat import ChatTokenizer
from loriner.engine.templates import RENDER_S, Templates
from loriner.errors import InvalidAdapterError, InvalidRequestError
from tests.tiny import write_tokenizer

HI = [{"role": "user", "content": "hi"}]
OWN = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}>{{ mood | default('') }}{% endif %}"
)


@pytest.fixture(scope="module")
def templates() -> Iterator[Templates]:
    templates = Templates()
    yield templates
    templates.close()


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatTokenizer]:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    made = ChatTokenizer(folder)
    yield made
    made.close()


def test_it_is_rendered_as_the_tokenizer_would(chat: ChatTokenizer) -> None:
    asked = {"tools": None, "add_generation_prompt": True, "continue_final_message": False}
    kwargs = {"mood": "gay"}
    ids = chat.render(HI, template_kwargs=kwargs, template=OWN, **asked)  # type: ignore[arg-type]
    wanted = chat._tokenizer.apply_chat_template(
        HI, chat_template=OWN, tokenize=False, **asked, **kwargs
    )

    assert chat.decode(ids) == wanted == "<|im_start|>[user] hi<|im_end|>>gay"


def test_tokens_are_spelled_as_in_the_vocabulary(chat: ChatTokenizer) -> None:
    ids = chat.encode("a é\n<|im_end|>", add_special_tokens=False)
    assert chat.spellings(ids) == ["a", "Ġ", "Ã", "©", "Ċ", "<|im_end|>"]


def test_the_bases_own_template_is_not_the_adapters(chat: ChatTokenizer) -> None:
    assert chat.own_template(chat.template) is None
    assert chat.own_template(chat.template + "\n") is None
    assert chat.own_template(OWN) == OWN
    with pytest.raises(InvalidAdapterError, match="does not compile"):
        chat.own_template("{% for %}")


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}",
        "{{ " + "(" * 30_000 + ")" * 30_000 + " }}",
        "{% include 'x' %}{% endif %}",
    ],
)
def test_what_does_not_compile_is_refused_with_the_reason(
    templates: Templates, template: str
) -> None:
    with pytest.raises(InvalidAdapterError, match="its chat template does not compile: ."):
        templates.compile(template)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system here') }}", "no system here"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "2 s"),
        ("{{ 'a' * 10 ** 10 }}", "memory"),  # tried while it is compiled, too
        ("{% set n = 10 ** 9 %}{{ 'a' * (n * 9) }}", "memory"),
        ("{% for a in range(9999) %}{{ 'a' * 999 }}{% endfor %}", "more than 4194304"),
        ("{% include 'x' %}", "."),
    ],
)
def test_a_hostile_template_ends_in_a_refusal(
    templates: Templates, template: str, reason: str
) -> None:
    began = time.monotonic()
    with pytest.raises(InvalidRequestError, match=reason) as refused:
        templates.render(template, HI, {})
    assert refused.value.param == "messages"
    assert time.monotonic() - began < RENDER_S + 20

    assert templates.render("{{ messages[0].content }}", HI, {}) == "hi"


def test_the_process_has_none_of_our_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORINER_API_KEY", "secret")
    templates = Templates()
    try:
        templates.compile("x")
        assert templates._child is not None
        environment = Path(f"/proc/{templates._child[0].pid}/environ").read_bytes()
    finally:
        templates.close()
    assert b"secret" not in environment and b"PATH=" in environment


def test_a_process_that_was_killed_is_started_again() -> None:
    templates = Templates()
    try:
        templates.compile("x")
        assert templates._child is not None
        os.kill(templates._child[0].pid, 9)
        templates._child[0].wait()
        with pytest.raises(Exception, match="template"):
            templates.render("x", HI, {})
        assert templates.render("x", HI, {}) == "x"
    finally:
        templates.close()
