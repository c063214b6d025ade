"""The texts of single tokens, and log-probabilities with them.

Unlike a detokenizer's, the text of a special token shows. Knows no sequences. Invariant: what is
kept is bounded by the vocabulary.
"""

from __future__ import annotations

from tokenizers import Tokenizer

from loriner.core import TokenLogprob
from loriner.engine.sampler import Sampled


class TokenNames:
    """Of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._names: dict[int, str] = {}

    def __call__(self, token_id: int) -> str:
        name = self._names.get(token_id)
        if name is None:
            name = str(self._tokenizer.decode([token_id], skip_special_tokens=False))
            self._names[token_id] = name
        return name

    def logprobs(self, choice: Sampled | None) -> tuple[TokenLogprob, ...]:
        """Of a chosen token, when they were asked for."""
        if choice is None or choice.token_id is None or choice.logprob is None:
            return ()
        top = tuple(TokenLogprob(i, p, self(i)) for i, p in choice.top)
        return (TokenLogprob(choice.token_id, choice.logprob, self(choice.token_id), top),)
