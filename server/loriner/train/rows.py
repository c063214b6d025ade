"""The shapes of training rows, recognised by their keys, made into one of three examples.

    messages                          chat (OpenAI; a turn's `weight` 0 or 1 is honoured)
    conversations                     chat (ShareGPT: from/value)
    prompt, completion                two texts, or two lists of messages
    instruction, output (input)       a chat of one turn (Alpaca)
    text                              all of it is learnt; named as a column, it comes first

Knows no tokens. Invariant: a key that would change what is learnt is honoured or refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant")
_RENAMED = {"developer": "system", "human": "user", "gpt": "assistant", "bot": "assistant"}
_RENAMED |= {"model": "assistant", "chatgpt": "assistant"}
_MEDIA = ("images", "image", "audio", "videos", "video")
_REFUSED = ("tools", "functions", *_MEDIA, "chosen", "rejected", "history", "documents")


class RowError(Exception):
    """Why a row cannot be used; becomes a `Fault` with its line."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message; only the assistant's can be learnt."""

    role: str
    content: str
    is_learnt: bool

    @property
    def message(self) -> dict[str, str]:
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, rendered by the base's chat template."""

    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt that is given and a completion that is learnt, without a template."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Text:
    """A text that is learnt from its first token on."""

    text: str


Example = Chat | Pair | Text


def recognise(row: Mapping[str, Any], columns: Mapping[str, str]) -> Example:
    """`columns` gives our key for a column of another name. Raises RowError with the reason."""
    values = {columns.get(key, key): value for key, value in row.items()}
    if refused := [key for key in _REFUSED if values.get(key) not in (None, "", [])]:
        raise RowError(f"`{refused[0]}` cannot be trained on")
    if "text" in columns.values() and "text" in values:
        return Text(_text(values, "text"))
    if "messages" in values:
        return Chat(
            _answered(_turns(values["messages"], "messages", "role", "content"), "messages")
        )
    if "conversations" in values:
        turns = _turns(values["conversations"], "conversations", "from", "value")
        return Chat(_with_system(values, _answered(turns, "conversations")))
    if "prompt" in values and "completion" in values:
        return _pair(values["prompt"], values["completion"])
    if "instruction" in values and "output" in values:
        return Chat(_with_system(values, _alpaca(values)))
    if "text" in values:
        return Text(_text(values, "text"))
    raise RowError(
        f"none of the known shapes has the keys {', '.join(sorted(values)[:8]) or '(none)'}; known "
        "are messages | conversations | prompt, completion | instruction, output | text"
    )


def _turns(raw: Any, key: str, role_key: str, content_key: str) -> tuple[Turn, ...]:
    if not isinstance(raw, list) or not raw:
        raise RowError(f"`{key}` must be a list of messages")
    turns = []
    for number, message in enumerate(raw):
        if not isinstance(message, dict):
            raise RowError(f"{key}[{number}] is not an object")
        is_openai = "role" in message and role_key not in message
        keys = ("role", "content") if is_openai else (role_key, content_key)
        turns.append(_turn(message, f"{key}[{number}]", *keys))
    return tuple(turns)


def _answered(turns: tuple[Turn, ...], key: str) -> tuple[Turn, ...]:
    """Templates trim, so of a blank answer only the end token would be learnt."""
    for number, turn in enumerate(turns):
        if turn.is_learnt and not turn.content.strip():
            raise RowError(f"{key}[{number}] is an empty answer; with weight 0 it is not learnt")
    return turns


def _turn(message: Mapping[str, Any], where: str, role_key: str, content_key: str) -> Turn:
    role = message.get(role_key)
    role = _RENAMED.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise RowError(f"{where}.{role_key} is {role!r}, not one of {', '.join(ROLES)}")
    for key in ("tool_calls", "function_call"):
        if message.get(key):
            raise RowError(f"{where}.{key} cannot be trained on")
    content = message.get(content_key)
    if isinstance(content, list):
        content = _joined(content, f"{where}.{content_key}")
    if not isinstance(content, str):
        raise RowError(f"{where}.{content_key} must be a text")
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise RowError(f"{where}.weight is {weight!r}, not 0 or 1")
    return Turn(role, content, role == "assistant" and bool(weight))


def _joined(parts: Sequence[Any], where: str) -> str:
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    plain = [text for text in texts if isinstance(text, str)]
    if len(plain) != len(parts):
        raise RowError(f"{where} has parts that are no text")
    return "\n".join(plain)


def _with_system(values: Mapping[str, Any], turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    if not values.get("system"):
        return turns
    return (Turn("system", _text(values, "system"), False), *turns)


def _pair(prompt: Any, completion: Any) -> Example:
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise RowError("`completion` is empty")
        return Pair(prompt, completion)
    given = _turns(prompt, "prompt", "role", "content")
    learnt = _turns(completion, "completion", "role", "content")
    learnt = _answered(learnt, "completion")
    return Chat((*(Turn(t.role, t.content, False) for t in given), *learnt))


def _alpaca(values: Mapping[str, Any]) -> tuple[Turn, ...]:
    question = _text(values, "instruction")
    if values.get("input"):
        question += "\n\n" + _text(values, "input")
    return Turn("user", question, False), Turn("assistant", _text(values, "output"), True)


def _text(values: Mapping[str, Any], key: str) -> str:
    value = values[key]
    if not isinstance(value, str) or not value:
        raise RowError(f"`{key}` must be a text that is not empty")
    return value
