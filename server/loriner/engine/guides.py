"""Grammars in the engine: a matcher walks with each constrained sequence and says what may follow.

Grammars are compiled and a step's masks computed on threads of their own, during which llguidance
lets the interpreter go. Knows no logits. Invariant: a guide is asked only between the start of a
step's masks and the token of that step, so no two threads use one matcher.
"""

from __future__ import annotations

import queue
from collections import OrderedDict
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from llguidance import LLExecutor, LLMatcher
from numpy.typing import NDArray

from loriner import core
from loriner.core import Sequence
from loriner.engine.grammars import LIMITS, bridge, compiling_thread
from loriner.errors import EngineFailedError, InvalidRequestError, LorinerError

MASK_THREADS = 2
MAX_KEPT = 16  # compiled grammars; a hard one holds up to 40 MB
WORD_BITS = 32

Ids = NDArray[np.int64]  # of allowed tokens, ascending
Words = NDArray[np.int32]  # a bit for each token


class Mask(NamedTuple):
    """What may follow."""

    words: Words
    ids: Ids | None  # where they were asked for


class Guide:
    """One sequence's place in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self.matcher = matcher
        self._masks: Future[list[Mask]] | None = None
        self._row = 0

    def expect(self, masks: Future[list[Mask]], row: int) -> None:
        """The next mask will be `row` of these."""
        self._masks, self._row = masks, row

    def allowed(self) -> Ids:
        """Waits for the step's masks."""
        assert self._masks is not None, "asked before its mask was begun"
        words, ids = self._masks.result()[self._row]
        return _ids(words) if ids is None else ids

    def words(self) -> Words | None:
        """Waits for the step's masks."""
        return None if self._masks is None else self._masks.result()[self._row].words

    def accept(self, token_id: int) -> None:
        """Walk over a chosen token. Raises InvalidRequestError when the grammar, on this path,
        passes llguidance's limits."""
        self._masks = None
        if self.matcher.is_error() or not self.matcher.consume_token(token_id):
            reason = self.matcher.get_error().partition("\n")[0][:200]
            raise InvalidRequestError(f"The grammar cannot be followed further: {reason}.")

    @property
    def finished(self) -> bool:
        """Whether nothing may follow but the end."""
        return self.matcher.is_stopped()


@dataclass(frozen=True, slots=True)
class Compiled:
    """The sequences of one request, with their guides or what went wrong."""

    sequences: Seq[Sequence]
    error: LorinerError | None = None


class Guides:
    """All guides of one engine."""

    def __init__(
        self,
        tokenizer: str,
        vocab_size: int,
        eos_ids: tuple[int, ...],
        on_ready: Callable[[], None],
    ) -> None:
        """`tokenizer`: the text of a tokenizer.json. `on_ready` is called, on any thread, when
        `take` has something."""
        self._vocab_size, self._on_ready = vocab_size, on_ready
        self._compiler = compiling_thread()
        self._masker = ThreadPoolExecutor(1, "masks")
        self._trie = self._compiler.submit(bridge, tokenizer, vocab_size, eos_ids)
        self._executor: LLExecutor | None = None
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()  # compiled, at their beginning
        self._made: queue.SimpleQueue[Compiled] = queue.SimpleQueue()

    def wait(self) -> None:
        """Until the trie is built, or cannot be: then every grammar will hear of it."""
        self._trie.exception()

    def want(self, sequences: Seq[Sequence]) -> None:
        """Begin to compile one request's grammar for all its sequences; see `take`."""
        self._compiler.submit(self._prepare, sequences)

    def take(self) -> list[Compiled]:
        """What has been compiled since the last call."""
        made = []
        while not self._made.empty():
            made.append(self._made.get())
        return made

    def begin(self, of_rows: Seq[core.Guide | None], *, as_ids: bool) -> None:
        """Start the masks of one step's constrained rows; `as_ids`: the host chooses by them."""
        guides = [guide for guide in of_rows if isinstance(guide, Guide)]
        if guides:
            masks = self._masker.submit(self._compute, [guide.matcher for guide in guides], as_ids)
            for row, guide in enumerate(guides):
                guide.expect(masks, row)

    def close(self) -> None:
        for pool in (self._compiler, self._masker):
            pool.shutdown(wait=True, cancel_futures=True)

    def _prepare(self, sequences: Seq[Sequence]) -> None:
        error: LorinerError | None = None
        try:
            grammar = sequences[0].request.sampling.grammar
            assert grammar is not None
            matcher = self._compiled(grammar)
            for sequence in sequences:
                sequence.guide = Guide(matcher.deep_copy())
        except InvalidRequestError as refused:
            error = refused
        except Exception as failure:  # noqa: BLE001  one bad grammar fails one request
            error = EngineFailedError(f"The grammar could not be prepared: {failure}")
        self._made.put(Compiled(sequences, error))
        self._on_ready()

    def _compiled(self, grammar: str) -> LLMatcher:
        matcher = self._kept.pop(grammar, None)
        if matcher is None:
            matcher = LLMatcher(self._trie.result(), grammar, log_level=0, limits=LIMITS)
            if matcher.is_error():
                raise InvalidRequestError(f"The grammar was refused: {matcher.get_error()[:200]}")
        self._kept[grammar] = matcher
        if len(self._kept) > MAX_KEPT:
            self._kept.popitem(last=False)
        return matcher

    def _compute(self, matchers: Seq[LLMatcher], as_ids: bool) -> list[Mask]:
        return [Mask(row, _ids(row) if as_ids else None) for row in self._words(matchers)]

    def _words(self, matchers: Seq[LLMatcher]) -> Words:
        """One bit for each token."""
        num_words = -(-self._vocab_size // WORD_BITS)
        words = np.zeros((len(matchers), num_words), np.int32)
        if len(matchers) == 1:
            matchers[0].unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            return words
        if self._executor is None:
            self._executor = LLExecutor(MASK_THREADS)
        rows = [(matcher, row) for row, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(rows, words.ctypes.data, num_words * 4, len(rows))
        return words


def _ids(words: Words) -> Ids:
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little").view(np.bool_))
