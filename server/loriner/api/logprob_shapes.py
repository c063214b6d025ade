"""Log-probabilities in the shapes of OpenAI and vLLM.

Pure. Invariant: JSON has no infinity and no NaN, so neither leaves here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from loriner.api import shapes
from loriner.core import TokenLogprob

_FLOOR = -9999.0  # OpenAI's stand-in for minus infinity, which JSON lacks


def of_prompt(told: Sequence[TokenLogprob], num_top: int) -> shapes.PromptLogprobs:
    """One entry for each token, `num_top` of the likeliest after it; null for the first."""
    return [
        None
        if math.isnan(entry.logprob)
        else {
            str(one.token_id): shapes.PromptLogprob(finite(one.logprob), one.rank, one.token)
            for one in (entry, *entry.top[:num_top])
        }
        for entry in told
    ]


def by_ids(entry: TokenLogprob) -> TokenLogprob:
    """It and its alternatives, named by their ids as vLLM does: no two tokens share a name."""
    top = tuple([by_ids(one) for one in entry.top])
    return replace(entry, token=f"token_id:{entry.token_id}", top=top)


def token_logprob(entry: TokenLogprob) -> shapes.TokenLogprob:
    top = [shapes.TopLogprob(t.token, finite(t.logprob), _bytes(t.token)) for t in entry.top]
    return shapes.TokenLogprob(entry.token, finite(entry.logprob), _bytes(entry.token), top)


def by_text(entry: TokenLogprob) -> dict[str, float]:
    """Text -> log-probability, its own first; of two tokens with one text the likelier stands."""
    best: dict[str, float] = {}
    for candidate in (entry, *entry.top):
        logprob = finite(candidate.logprob)
        best[candidate.token] = max(logprob, best.get(candidate.token, logprob))
    return best


def _bytes(token: str) -> list[int] | None:
    """None for a piece of a character: its bytes are not those of the replacement sign."""
    return None if "�" in token else list(token.encode())


def finite(logprob: float) -> float:
    return max(logprob, _FLOOR) if logprob == logprob else _FLOOR
