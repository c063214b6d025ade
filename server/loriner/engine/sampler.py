"""Logits -> tokens. Each row is chosen by its own parameters, seed and position alone.

Noise is a counter-based hash of (seed, position), so a sequence draws the same tokens whatever runs
beside it, after a preemption, and on every machine with equal logits. Log-probabilities are of the
model's own distribution: before penalties, bias and temperature.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from loriner.core import SamplingParams, Sequence

_MASK = (1 << 64) - 1
FIRST = 1024  # most likely tokens that are looked at before all are sorted


@dataclass(frozen=True, slots=True)
class Sampled:
    """One row's choice. `token_id` is None when the row's logits were not finite."""

    token_id: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # the most likely tokens and their log-probabilities


def sample(logits: Tensor, sequences: Seq[Sequence], eos_ids: tuple[int, ...]) -> list[Sampled]:
    """logits [S, V] f32, one row for each of `sequences`; `logits` is not changed."""
    best, best_ids = logits.max(dim=-1)  # NaN wins a max, so this also finds broken rows
    finite = torch.isfinite(best).tolist()
    greedy_ids = best_ids.tolist()
    chosen = []
    for row, sequence in enumerate(sequences):
        if not finite[row]:
            chosen.append(Sampled(None))
            continue
        params = sequence.request.sampling
        token_id = greedy_ids[row]
        if not params.greedy or _adjusts(params, sequence):
            adjusted = _adjust(logits[row], sequence, eos_ids)
            token_id = int(adjusted.argmax()) if params.greedy else _draw(adjusted, sequence)
        chosen.append(_with_logprobs(logits[row], token_id, params))
    return chosen


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from (seed, position). Source: SplitMix64 (Steele et al., OOPSLA 2014)."""
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((z ^ (z >> 31)) >> 11) / float(1 << 53)


def _adjusts(params: SamplingParams, sequence: Sequence) -> bool:
    """Whether a greedy choice needs more than the raw logits."""
    return bool(
        params.logit_bias
        or params.repetition_penalty != 1.0
        or params.frequency_penalty
        or params.presence_penalty
        or sequence.num_output < params.min_tokens
    )


def _adjust(row: Tensor, sequence: Sequence, eos_ids: tuple[int, ...]) -> Tensor:
    """Penalties, bias and minimum length on a copy of `row` [V]."""
    params, row = sequence.request.sampling, row.clone()
    if params.repetition_penalty != 1.0:  # CTRL, arXiv 1909.05858, section 4.1; prompt included
        seen = torch.tensor(sorted(set(sequence.token_ids)))
        values, penalty = row[seen], params.repetition_penalty
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if params.frequency_penalty or params.presence_penalty:
        counts = Counter(sequence.output_ids)
        ids = torch.tensor(list(counts), dtype=torch.int64)
        times = torch.tensor(list(counts.values()), dtype=row.dtype)
        row[ids] -= params.frequency_penalty * times + params.presence_penalty
    if params.logit_bias:
        biased, biases = zip(*params.logit_bias, strict=True)
        row.index_add_(0, torch.tensor(biased), torch.tensor(biases, dtype=row.dtype))
    if sequence.num_output < params.min_tokens:
        row[list({*eos_ids, *params.stop_token_ids})] = -torch.inf
    return row


def _draw(row: Tensor, sequence: Sequence) -> int:
    """Temperature, min_p, top_k, top_p, then one uniform number through the inverse of the CDF."""
    params = sequence.request.sampling
    scaled = (row - row.max()).double() / params.temperature
    ids: Tensor | None = None
    if params.top_k or params.top_p < 1.0 or params.min_p:
        probs, ids = _likely(scaled, params)
        probs = probs[: _kept(probs, params)]
    else:
        probs = torch.softmax(scaled, dim=-1)  # [V]
    target = uniform(sequence.seed, sequence.num_output) * float(probs.sum())
    place = int(torch.searchsorted(probs.cumsum(0), target, right=True).clamp(max=len(probs) - 1))
    return place if ids is None else int(ids[place])


def _likely(scaled: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The most likely tokens' probabilities, descending, and their ids: all that the filters can
    keep.

    Sorting a whole vocabulary takes milliseconds; nearly always the first thousand tokens decide.
    """
    total = scaled.logsumexp(dim=-1)
    first = min(params.top_k or FIRST, FIRST, len(scaled))
    values, ids = scaled.topk(first)
    probs = (values - total).exp()
    if params.top_k:
        decided = params.top_k <= first
    elif params.min_p:
        decided = bool(probs[-1] < params.min_p * probs[0])
    else:
        decided = bool(probs.sum() >= params.top_p)
    if decided or first == len(scaled):
        return probs, ids
    values, ids = scaled.sort(descending=True, stable=True)
    return (values - total).exp(), ids


def _kept(probs: Tensor, params: SamplingParams) -> int:
    """How many of the sorted `probs` survive min_p, top_k and top_p; at least one."""
    count = len(probs)
    if params.min_p:
        count = int((probs >= params.min_p * probs[0]).sum())
    if params.top_k:
        count = min(count, params.top_k)
    if params.top_p < 1.0:
        cut = params.min_p or params.top_k
        kept = probs[:count] / (probs[:count].sum() if cut else 1.0)  # else `probs` may be a part
        before = kept.cumsum(0) - kept  # mass of the likelier ones (arXiv 1904.09751, section 3.1)
        count = int((before < params.top_p).sum())
    return max(count, 1)


def _with_logprobs(row: Tensor, token_id: int, params: SamplingParams) -> Sampled:
    if params.logprobs is None:
        return Sampled(token_id)
    logprobs = torch.log_softmax(row, dim=-1)
    values, ids = logprobs.topk(min(params.logprobs, len(row)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Sampled(token_id, float(logprobs[token_id]), top)
