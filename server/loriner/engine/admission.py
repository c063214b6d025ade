"""What every request must satisfy before it is queued, whichever door it came through."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from loriner import errors
from loriner.adapters.mixture import MAX_RANK
from loriner.adapters.records import AdapterRecord
from loriner.core import SamplingParams

MAX_LOGPROBS_PER_REQUEST = 1 << 20


def fit(sampling: SamplingParams, num_prompt: int, limit: int, param: str) -> SamplingParams:
    """Fill in max_tokens from what is left of a context of `limit` tokens.

    Raises ContextLengthError; InvalidRequestError when the log-probabilities would fill the memory.
    """
    check_length(num_prompt, limit, param, room=sampling.max_tokens != 0)
    if sampling.max_tokens is None:
        sampling = dataclasses.replace(sampling, max_tokens=limit - num_prompt)
    assert sampling.max_tokens is not None
    if sampling.logprobs is not None:
        count = sampling.n * sampling.max_tokens * (1 + sampling.logprobs)
        if count > MAX_LOGPROBS_PER_REQUEST:
            raise errors.InvalidRequestError(
                f"n * max_tokens * (1 + logprobs) is {count}, at most {MAX_LOGPROBS_PER_REQUEST}.",
                "logprobs",
            )
    if num_prompt + sampling.max_tokens > limit:
        raise errors.ContextLengthError(
            f"The context is {limit} tokens long; the prompt has {num_prompt} and max_tokens "
            f"asks for {sampling.max_tokens} more.",
            "max_tokens",
        )
    return sampling


def check_length(num_prompt: int, limit: int, param: str, *, room: int = 0) -> None:
    """A prompt has a token, and leaves `room` for some in a context of `limit`. Raises
    InvalidRequestError, ContextLengthError."""
    if num_prompt == 0:
        raise errors.InvalidRequestError("The prompt has no tokens.", param)
    if num_prompt + room > limit:
        raise errors.ContextLengthError(
            f"The context is {limit} tokens long; the prompt has {num_prompt}.", param
        )


def check_ids(prompt: Sequence[int], sampling: SamplingParams, vocab_size: int, param: str) -> None:
    """Every token id must be a column of the logits: beyond it lie other sequences' memory."""
    for name, ids in (
        (param, prompt),
        ("stop_token_ids", sampling.stop_token_ids),
        ("logit_bias", [token_id for token_id, _ in sampling.logit_bias]),
    ):
        wrong = next((i for i in ids if not 0 <= i < vocab_size), None)
        if wrong is not None:
            raise errors.InvalidRequestError(
                f"{name}: token id {wrong} is out of vocabulary, which has {vocab_size}.",
                name,
            )


def check_mixture(records: Sequence[AdapterRecord]) -> None:
    """Raises InvalidRequestError when the ranks together pass what a seat may have."""
    total = sum(max(record.ranks) for record in records)
    if total > MAX_RANK:
        raise errors.InvalidRequestError(
            f"The adapters' ranks add up to {total}, at most {MAX_RANK}.", "adapter"
        )
