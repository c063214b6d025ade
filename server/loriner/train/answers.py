"""Greedy answers of base and adapters in one batch, by the trainer's own weights and cache.

For samples, canaries and gates while the base is resident. Knows no text. Invariant: what is
recorded here comes from the forward that was trained, not from the server's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from loriner.train import attention
from loriner.train.base import Base
from loriner.train.lora import Lora, Segment

MAX_ROWS = 16  # answered at a time, unless told otherwise
TURN_TOKENS = 2048  # of prompts, read in one turn where the device is shared
NUM_TOP = 5

Top = list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and who is to answer it; None is the base."""

    prompt_ids: Sequence[int]
    lora: Lora | None


@dataclass(slots=True)
class Answer:
    """The tokens up to an end-of-sequence token, and for each the most likely ones."""

    token_ids: list[int]
    top: list[Top]  # (token id, log-probability), best first


@torch.no_grad()
def answer(
    base: Base,
    questions: Sequence[Question],
    max_tokens: int,
    *,
    ignore_eos: bool = False,
    max_rows: int = MAX_ROWS,
) -> list[Answer]:
    """Greedy answers in the order of the questions, `max_rows` at a time."""
    loras = list({id(q.lora): None for q in questions})  # neighbours share their segment
    keys = [(loras.index(id(q.lora)), -len(q.prompt_ids)) for q in questions]
    order = sorted(range(len(questions)), key=keys.__getitem__)
    answers: dict[int, Answer] = {}
    with _ready_to_generate(base):
        for start in range(0, len(order), max_rows):
            chunk = order[start : start + max_rows]
            made = _generate(base, [questions[i] for i in chunk], max_tokens, ignore_eos)
            answers |= dict(zip(chunk, made, strict=True))
    return [answers[i] for i in range(len(questions))]


@contextlib.contextmanager
def _ready_to_generate(base: Base) -> Iterator[None]:
    """The decoder with a cache and ordinary attention, for as long as the block lasts."""
    model, was_training = base.decoder, base.decoder.training
    model.eval()
    model.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        model.config._attn_implementation = attention.NAME
        model.train(was_training)


def _generate(
    base: Base, questions: Sequence[Question], max_tokens: int, ignore_eos: bool
) -> list[Answer]:
    from transformers import DynamicCache

    ids, mask = _left_padded([q.prompt_ids for q in questions], base.device)
    cache: Any = DynamicCache(config=base.decoder.config)
    answers = [Answer([], []) for _ in questions]
    open_rows = set(range(len(questions)))
    base.routing.segments = _segments(questions, base.dtype)
    for _ in range(max_tokens):
        values, best = _read(base, ids, mask, cache)
        found, scores = best.tolist(), values.tolist()
        for row in sorted(open_rows):
            token = found[row][0]
            answers[row].token_ids.append(token)
            answers[row].top.append(list(zip(found[row], scores[row], strict=True)))
            if not ignore_eos and token in base.config.eos_token_ids:
                open_rows.discard(row)
        if not open_rows:
            break
        ids = best[:, :1]
        mask = torch.cat((mask, torch.ones_like(ids)), dim=1)
    return answers


def _read(base: Base, ids: Tensor, mask: Tensor, cache: Any) -> tuple[Tensor, Tensor]:
    """The log-probabilities and ids, [B, NUM_TOP] each, of what is likely to follow `ids` [B, L].
    In turns of the pace: where the device is shared, prompts are read in pieces."""
    size = max(1, TURN_TOKENS // len(ids)) if base.pace.is_shared else ids.shape[1]
    end = mask.shape[1] - ids.shape[1]
    for piece in torch.split(ids, size, dim=1):
        end += piece.shape[1]
        with base.pace.turn():
            logits = _next_logits(base, piece, mask[:, :end], cache)
            values, best = logits.log_softmax(dim=-1).topk(NUM_TOP)
    return values, best


def _next_logits(base: Base, ids: Tensor, mask: Tensor, cache: Any) -> Tensor:
    """[B, vocab] f32 after the last of `ids` [B, L]; the cache holds what came before."""
    base.routing.per_row = ids.shape[1]
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    out = base.decoder(
        input_ids=ids,
        attention_mask=_visible(mask, ids.shape[1]),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    logits: Tensor = (out[:, -1] @ base.head.dense().T).float()
    return logits


def _visible(mask: Tensor, num_new: int) -> Tensor:
    """mask [B, L], 1 for tokens and 0 for padding -> [B, 1, num_new, L] bool: which of all L rows
    each of the last `num_new` sees. Every row sees itself, also where it is padding: a row that
    sees nothing is NaN in some kernels."""
    length = mask.shape[1]
    place = torch.arange(length, device=mask.device)
    own = place[-num_new:].unsqueeze(1)  # [num_new, 1]
    earlier = (place <= own) & mask.bool()[:, None, None, :]
    return earlier | (place == own)


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def _segments(questions: Sequence[Question], dtype: torch.dtype) -> list[Segment]:
    segments: list[Segment] = []
    for row, question in enumerate(questions):
        if question.lora is None:
            continue
        if segments and segments[-1].end == row and segments[-1].lora is question.lora:
            segments[-1] = replace(segments[-1], end=row + 1)
        else:
            segments.append(Segment(row, row + 1, question.lora, question.lora.cast(dtype)))
    return segments
