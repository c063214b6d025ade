"""Canaries: prompts whose first tokens and top log-probabilities are kept with an adapter.

Recorded by the trainer (`recording.py`), replayed through whatever serves. Knows no transport.
Invariant: a replay that agrees has the recorded tokens up to near ties, log-probabilities within
the tolerance, and within a quarter of it on average.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loriner.errors import TrainError
from loriner.train.json_file import write_json

FILE = "loriner_canaries.json"
FORMAT = 1
# Natural logarithms. bf16 was seen to be up to 0.22 off f32 (SmolLM2, 64 tokens, the five highest),
# and both who trains and who serves may round. On average over a prompt's tokens it is up to 0.04
# off, and a trained adapter at 1.2 times its scale 0.22 to 0.58 (at 1.05 times, 0.06 to 0.17).
TOLERANCES = {"float32": 0.01, "bfloat16": 0.5}
MEAN_SHARE = 0.25  # of the tolerance: what the mean over a canary may be


@dataclass(frozen=True, slots=True)
class Canary:
    """`messages` for a chat, else `text`; what must come out of it, greedily."""

    messages: tuple[dict[str, str], ...]
    text: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[tuple[float, ...], ...]  # of each token: the highest, descending


@dataclass(frozen=True, slots=True)
class Canaries:
    """All of one adapter."""

    base_digest: str
    dtype: str  # of the activations they were recorded with
    canaries: tuple[Canary, ...]

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.dtype]


@dataclass(frozen=True, slots=True)
class Replay:
    """What something that serves made of one canary."""

    prompt_ids: tuple[int, ...] | None  # None: not told
    token_ids: tuple[int, ...]
    logprobs: tuple[tuple[float, ...], ...]


def write(folder: Path, canaries: Canaries) -> None:
    document = {
        "format": FORMAT,
        "base_digest": canaries.base_digest,
        "dtype": canaries.dtype,
        "canaries": [
            {
                "messages": list(canary.messages),
                "text": canary.text,
                "prompt_ids": list(canary.prompt_ids),
                "token_ids": list(canary.token_ids),
                "logprobs": [[round(v, 5) for v in row] for row in canary.logprobs],
            }
            for canary in canaries.canaries
        ],
    }
    write_json(folder / FILE, document)


def read(folder: Path) -> Canaries:
    """Raises TrainError when the folder has none, or they cannot be read."""
    try:
        document = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if document["format"] != FORMAT or document["dtype"] not in TOLERANCES:
            raise ValueError(f"format {document['format']}, dtype {document['dtype']}")
        made = tuple(_parse(entry) for entry in document["canaries"])
        return Canaries(str(document["base_digest"]), document["dtype"], made)
    except FileNotFoundError:
        raise TrainError(f"{folder} has no {FILE}: it was not made by `loriner train`.") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainError(f"{folder / FILE} cannot be read: {error}") from error


def _parse(entry: dict[str, Any]) -> Canary:
    return Canary(
        messages=tuple(entry["messages"]),
        text=str(entry["text"]),
        prompt_ids=tuple(map(int, entry["prompt_ids"])),
        token_ids=tuple(map(int, entry["token_ids"])),
        logprobs=tuple(tuple(map(float, row)) for row in entry["logprobs"]),
    )


def difference(canary: Canary, replay: Replay, tolerance: float) -> str | None:
    """What differs, in words; None when served is trained. `tolerance`: natural logarithms, of one
    log-probability."""
    if replay.prompt_ids is not None and replay.prompt_ids != canary.prompt_ids:
        return "the prompt has other tokens: chat template or tokenizer differ"
    if len(replay.token_ids) != len(canary.token_ids):
        return f"{len(replay.token_ids)} tokens came back, {len(canary.token_ids)} were asked for"
    gaps: list[float] = []
    for place, expected in enumerate(canary.logprobs):
        if len(replay.logprobs) <= place:
            return "no log-probabilities came back"
        pairs = zip(expected, replay.logprobs[place], strict=False)
        own = [abs(a - b) for a, b in pairs]
        off = [gap for gap in own if not gap <= tolerance]
        if off:
            return f"token {place + 1}: a log-probability is {off[0]:.3g} off (limit {tolerance:g})"
        gaps += own
        if canary.token_ids[place] != replay.token_ids[place]:
            if expected[0] - expected[1] <= 2 * tolerance:
                break  # a near tie: both went on from different tokens
            return f"token {place + 1} is {replay.token_ids[place]}, not {canary.token_ids[place]}"
    mean, limit = sum(gaps) / max(1, len(gaps)), tolerance * MEAN_SHARE
    if mean > limit:
        return f"log-probabilities are {mean:.3g} off on average (limit {limit:g})"
    return None
