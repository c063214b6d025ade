"""What an answer must look like -> llguidance's grammar, checked before anything is queued.

Used on the doors' side of the process boundary, on threads of its own; the engine compiles the same
text for its matchers. Invariant: a grammar that leaves here compiles within the limits, or the
caller has an InvalidRequestError that names the field.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from loriner.errors import EngineUnavailableError, InvalidRequestError

logger = logging.getLogger(__name__)

MAX_CHARS = 1 << 16  # of a schema, a regular expression or a grammar
MAX_WAIT_S = 10.0  # behind other callers' grammars; one alone takes under a second
STACK_BYTES = 256 << 20  # address space: the compiler recurses as deep as MAX_CHARS can nest

# Steps of llguidance's own: they bound the time of a compilation (about 0.5 s), of a mask (about
# 20 ms) and the memory of a matcher (about 2 KB a state).
LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=50_000,
    max_lexer_states=20_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
# One space, or a line with its indentation, where JSON allows space: without a bound a model that
# is unsure writes space for ever.
SPACE = r"[ ]?|\n[ ]{0,24}"


class Kind(StrEnum):
    """What the text of a constraint is."""

    JSON = "json"  # a JSON schema
    REGEX = "regex"
    CHOICE = "choice"  # a JSON list of strings
    GRAMMAR = "grammar"  # Lark, or GBNF


@dataclass(frozen=True, slots=True)
class Constraint:
    """What the whole answer must match; `param` is the field as the caller wrote it. `before`: Lark
    with a rule of that name, of what may stand before the answer."""

    kind: Kind
    text: str
    param: str
    before: str = ""


def bridge(tokenizer: str, vocab_size: int, eos_ids: tuple[int, ...]) -> LLTokenizer:
    """llguidance's trie over the tokens of a tokenizer.json; takes up to a second and holds the
    interpreter for it."""
    return LLTokenizer(_as_read(tokenizer), n_vocab=vocab_size, eos_token=list(eos_ids) or None)


def _as_read(tokenizer: str) -> str:
    """llguidance tells by the decoder how tokens spell bytes, and takes the first it knows. Some
    converters write several, of which the pre-tokenizer shows that one alone counts."""
    told = json.loads(tokenizer)
    split = told.get("pre_tokenizer") or {}
    for part in [split, *split.get("pretokenizers", [])]:
        if part.get("type") == "ByteLevel":
            return json.dumps({**told, "decoder": part})
    return tokenizer


def compiling_thread() -> ThreadPoolExecutor:
    """One thread whose stack no grammar overflows: that would end the process."""
    pool = ThreadPoolExecutor(1, "grammars")
    before = threading.stack_size(STACK_BYTES)
    try:
        pool.submit(int).result()  # it is started here, and stays
    finally:
        threading.stack_size(before)
    return pool


class Grammars:
    """Compiles what callers send."""

    def __init__(self, folder: Path, vocab_size: int, eos_ids: tuple[int, ...]) -> None:
        self._pool = compiling_thread()
        path = folder / "tokenizer.json"
        self._make = lambda: bridge(path.read_text("utf-8"), vocab_size, eos_ids)
        self._bridge: Future[LLTokenizer] | None = None

    def warm(self) -> Future[LLTokenizer]:
        """Begin to build the trie, once."""
        if self._bridge is None:
            self._bridge = self._pool.submit(self._make)
        return self._bridge

    async def compile(self, constraint: Constraint) -> str:
        """Raises InvalidRequestError with llguidance's own words; EngineUnavailableError when too
        many are being compiled."""
        if len(constraint.text) > MAX_CHARS:
            raise InvalidRequestError(
                f"{constraint.param} has {len(constraint.text)} characters, at most {MAX_CHARS}.",
                constraint.param,
            )
        loop = asyncio.get_running_loop()
        try:
            trie = self.warm()
            work = loop.run_in_executor(self._pool, _checked, constraint, trie)
        except RuntimeError:  # of a closed pool
            raise EngineUnavailableError("The server is shutting down.") from None
        try:
            return await asyncio.wait_for(work, MAX_WAIT_S)
        except TimeoutError:
            raise EngineUnavailableError("Too many grammars are being compiled.") from None

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _checked(constraint: Constraint, bridged: Future[LLTokenizer]) -> str:
    if bridged.exception() is not None:
        logger.error("no grammar can be kept", exc_info=bridged.exception())
        raise _refused(constraint, "the tokenizer of this base is of an unknown kind")
    trie = bridged.result()
    try:
        grammar = _FORMS[constraint.kind](constraint.text)
    except Exception as error:  # noqa: BLE001  the converter's parsers raise what they like
        raise _refused(constraint, str(error)) from None
    if constraint.before:
        grammar = _preceded(constraint.before, grammar)
    _, problems = LLMatcher.validate_grammar_with_warnings(grammar, trie, limits=LIMITS)
    if problems:  # a warning says that a part of it would not be kept
        raise _refused(constraint, problems[0])
    matcher = LLMatcher(trie, grammar, log_level=0, limits=LIMITS)
    matcher.compute_bitmask()
    if matcher.is_error():
        raise _refused(constraint, matcher.get_error())
    return grammar


def _preceded(before: str, grammar: str) -> str:
    """`before`, then `grammar`, each with rules of its own."""
    lead = {"name": "start", "lark_grammar": f"start: before @answer\n{before}"}
    if not grammar.lstrip().startswith("{"):
        return json.dumps({"grammars": [lead, {"name": "answer", "lark_grammar": grammar}]})
    (answer,) = json.loads(grammar)["grammars"]
    return json.dumps({"grammars": [lead, {**answer, "name": "answer"}]})


def _refused(constraint: Constraint, why: str) -> InvalidRequestError:
    first = re.sub(r"\s+", " ", why).strip()[:400].rstrip(".")
    return InvalidRequestError(f"{constraint.param} cannot be served: {first}.", constraint.param)


def _from_schema(text: str) -> str:
    options = {
        "whitespace_flexible": True,
        "whitespace_pattern": SPACE,
        "lenient": False,  # an unknown keyword is an error
        "coerce_one_of": False,
    }
    return LLMatcher.grammar_from_json_schema(text, overrides=options)  # type: ignore[arg-type]


def _from_choices(text: str) -> str:
    choices = [json.dumps(choice, ensure_ascii=False) for choice in json.loads(text)]
    return LLMatcher.grammar_from_lark("start: " + " | ".join(choices))


_FORMS: dict[Kind, Callable[[str], str]] = {
    Kind.JSON: _from_schema,
    Kind.REGEX: LLMatcher.grammar_from_regex,
    Kind.CHOICE: _from_choices,
    Kind.GRAMMAR: lambda text: LLMatcher.grammar_from_lark(any_to_lark(text)),
}
