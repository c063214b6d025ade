"""Logits -> tokens. Each row is chosen by its own parameters, seed and position alone.

Noise is a counter-based hash of (seed, position), so a sequence draws the same tokens whatever runs
beside it, after a preemption, and on every machine with equal logits. Log-probabilities are of the
model's own distribution: before penalties, bias, grammar and temperature.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch
from torch import Tensor

from loriner.core import SamplingParams
from loriner.engine.step_input import Draw

_MASK = (1 << 64) - 1
FIRST = 1024  # most likely tokens that are looked at before all are sorted


class Sampled(NamedTuple):
    """One row's choice. `token_id` is None when the row's logits were not finite."""

    token_id: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # the most likely tokens and their log-probabilities


def sample(logits: Tensor, draws: Seq[Draw], eos_ids: tuple[int, ...]) -> list[Sampled]:
    """logits [B, V] f32, one row for each of `draws`; `logits` is not changed."""
    best, best_ids = logits.max(dim=-1)  # NaN wins a max, so this also finds broken rows
    finite = torch.isfinite(best).tolist()
    greedy_ids = best_ids.tolist()
    chosen = []
    for row, draw in enumerate(draws):
        if not finite[row]:
            chosen.append(Sampled(None))
            continue
        token_id = greedy_ids[row]
        if not draw.params.greedy or _adjusts(draw):
            token_id = _choose(_adjust(logits[row], draw, eos_ids), draw)
        chosen.append(_with_logprobs(logits[row], token_id, draw.params))
    return chosen


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from (seed, position). Source: SplitMix64 (Steele et al., OOPSLA 2014)."""
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((z ^ (z >> 31)) >> 11) / float(1 << 53)


def _adjusts(draw: Draw) -> bool:
    """Whether a greedy choice needs more than the raw logits."""
    params = draw.params
    return bool(
        params.logit_bias
        or params.looks_back
        or draw.place < params.min_tokens
        or draw.guide is not None
    )


def _adjust(row: Tensor, draw: Draw, eos_ids: tuple[int, ...]) -> Tensor:
    """Penalties, bias and minimum length on a copy of `row` [V]."""
    params, row = draw.params, row.clone()
    if params.repetition_penalty != 1.0:  # CTRL, arXiv 1909.05858, section 4.1; prompt included
        seen = torch.tensor(sorted(set(draw.token_ids)))
        values, penalty = row[seen], params.repetition_penalty
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if params.frequency_penalty or params.presence_penalty:
        counts = Counter(draw.token_ids[draw.num_prompt :])
        ids = torch.tensor(list(counts), dtype=torch.int64)
        times = torch.tensor(list(counts.values()), dtype=row.dtype)
        row[ids] -= params.frequency_penalty * times + params.presence_penalty
    if params.logit_bias:
        biased, biases = zip(*params.logit_bias, strict=True)
        row.index_add_(0, torch.tensor(biased), torch.tensor(biases, dtype=row.dtype))
    if draw.place < params.min_tokens:
        row[list({*eos_ids, *params.stop_token_ids})] = -torch.inf
    return row


def _choose(row: Tensor, draw: Draw) -> int:
    """The likeliest or a drawn token of `row` [V]; of those that the grammar allows alone."""
    ids: Tensor | None = None
    if draw.guide is not None:
        ids = torch.from_numpy(draw.guide.allowed())
        row = row[ids]
    place = int(row.argmax()) if draw.params.greedy else _draw(row, draw)
    return place if ids is None else int(ids[place])


def _draw(row: Tensor, draw: Draw) -> int:
    """Temperature, min_p, top_k, top_p, then one uniform number through the inverse of the CDF."""
    params = draw.params
    scaled = (row - row.max()).double() / params.temperature
    ids: Tensor | None = None
    if params.top_k or params.top_p < 1.0 or params.min_p:
        probs, ids = _likely(scaled, params)
        ids, order = ids[: _kept(probs, params)].sort()  # the CDF goes by id, filtered or not
        probs = probs[order]
    else:
        probs = torch.softmax(scaled, dim=-1)  # [V]
    target = uniform(draw.seed, draw.place) * float(probs.sum())
    place = int(torch.searchsorted(probs.cumsum(0), target, right=True).clamp(max=len(probs) - 1))
    return place if ids is None else int(ids[place])


def _likely(scaled: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The most likely tokens' probabilities, descending, and their ids: all that the filters can
    keep.

    Sorting a whole vocabulary takes milliseconds; nearly always the first thousand tokens decide.
    """
    total = scaled.logsumexp(dim=-1)
    first = min(params.top_k or FIRST, FIRST, len(scaled))
    least = scaled.topk(first).values[-1]
    ids = (scaled >= least).nonzero().squeeze(-1)  # equals in the order of their ids
    values, order = scaled[ids].sort(descending=True, stable=True)
    values, ids = values[:first], ids[order[:first]]
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
    """The choice of `token_id`, with what `params` asks for from the logits `row` [V]."""
    if params.logprobs is None:
        return Sampled(token_id)
    logprobs = torch.log_softmax(row, dim=-1)
    values, ids = logprobs.topk(min(params.logprobs, len(row)))
    top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Sampled(token_id, float(logprobs[token_id]), top)
