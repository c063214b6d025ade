"""`adapter_config.json` of PEFT: what the honoured keys say, checked for type and range.

What is merely allowed or refused is in `peft_rules.py`. Knows no tensors and no base. Invariant: a
config that is returned says for every module name whether it is adapted, at which rank and scaling.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from loriner.adapters.formats.peft_rules import refusal
from loriner.adapters.formats.peft_targets import (
    ANY_LAYER_LIST,
    Selection,
    Targets,
    first_match,
    layer_list,
)
from loriner.adapters.names import is_digest, show
from loriner.adapters.patterns import Pattern, UnsafePatternError, compile_pattern

MAX_RANK = 256
MAX_ALPHA = 1e6
MAX_KEYS = 4096
MAX_PATTERN_CHARS = 4096  # of one table; keys that are plain names do not count
MAX_LAYER_LISTS = 64
MAX_TEXT = 256

_LITERAL = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The honoured part of a config."""

    rank: int
    alpha: float
    use_rslora: bool
    lora_bias: bool
    ties_weights: bool
    rank_pattern: Mapping[Pattern, float]
    alpha_pattern: Mapping[Pattern, float]
    targets: Targets
    base_name: str | None
    base_digest: str | None

    def rank_of(self, module: str) -> int:
        found = first_match(self.rank_pattern, module)
        return self.rank if found is None else int(found)

    def scaling_of(self, module: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) (rsLoRA, arXiv 2312.03732, equation 4)."""
        found = first_match(self.alpha_pattern, module)
        alpha = self.alpha if found is None else found
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def parse_config(document: Mapping[str, Any]) -> tuple[PeftConfig | None, list[str]]:
    """The config, if its honoured keys are usable, and every reason to refuse it."""
    reasons = [reason for key, value in document.items() if (reason := refusal(key, value))]
    reader = _Reader(document)
    config = PeftConfig(
        rank=reader.integer("r", 1, MAX_RANK),
        alpha=reader.number("lora_alpha"),
        use_rslora=reader.flag("use_rslora"),
        lora_bias=reader.flag("lora_bias"),
        ties_weights=reader.flag("ensure_weight_tying"),
        rank_pattern=reader.patterns("rank_pattern", reader.check_rank),
        alpha_pattern=reader.patterns("alpha_pattern", reader.check_alpha),
        targets=reader.targets(),
        base_name=reader.text("base_model_name_or_path"),
        base_digest=reader.digest("loriner_base_digest"),
    )
    if "peft_type" not in document:
        reasons.append("peft_type is missing")
    return None if reader.reasons else config, reasons + reader.reasons


@dataclass(slots=True)
class _Reader:
    """Reads honoured keys; a bad one leaves a reason and a stand-in value."""

    document: Mapping[str, Any]
    reasons: list[str] = field(default_factory=list)

    def integer(self, key: str, low: int, high: int) -> int:
        value = self.document.get(key)
        if type(value) is int and low <= value <= high:
            return value
        self._expect(key, f"a whole number from {low} to {high}")
        return low

    def number(self, key: str) -> float:
        value = self.document.get(key)
        if not self.check_alpha(value):
            return float(value)  # type: ignore[arg-type]
        self._expect(key, self.check_alpha(value))
        return 1.0

    def flag(self, key: str) -> bool:
        value = self.document.get(key)
        if value is not None and not isinstance(value, bool):
            self._expect(key, "true or false")
        return value is True

    def text(self, key: str) -> str | None:
        value = self.document.get(key)
        return show(value, MAX_TEXT) if isinstance(value, str) and value else None

    def digest(self, key: str) -> str | None:
        value = self.document.get(key)
        if value is None or (isinstance(value, str) and is_digest(value)):
            return value
        self._expect(key, "64 hex digits")
        return None

    def patterns(self, key: str, check: Callable[[object], str]) -> dict[Pattern, float]:
        value = self.document.get(key) or {}
        if not isinstance(value, dict) or len(value) > MAX_KEYS:
            self._expect(key, f"a table of at most {MAX_KEYS} entries")
            return {}
        result: dict[Pattern, float] = {}
        for source, number in value.items():
            if expected := check(number):
                self.reasons.append(f"{key} of `{show(source)}` must be {expected}")
            elif pattern := self._pattern(key, source):
                result[pattern] = number
        num_chars = sum(len(p.source) for p in result if not p.is_literal)
        if num_chars > MAX_PATTERN_CHARS:
            self._expect(key, f"patterns of at most {MAX_PATTERN_CHARS} characters in all")
        return result

    def targets(self) -> Targets:
        target = self.document.get("target_modules")
        is_all_linear = isinstance(target, str) and target.lower() == "all-linear"
        selected = None if is_all_linear else self._selection("target_modules")
        if not target:
            self._expect("target_modules", "a list of module names, a pattern or `all-linear`")
        layers = self._layers()
        if isinstance(target, str) and (layers is not None or self.document.get("layers_pattern")):
            self._expect("layers_to_transform", "unset when target_modules is text, as in PEFT")
        return Targets(selected, self._selection("exclude_modules"), layers, self._layer_lists())

    def check_rank(self, value: object) -> str:
        """What a rank should be, or nothing when it is."""
        fits = type(value) is int and 1 <= value <= MAX_RANK
        return "" if fits else f"a whole number from 1 to {MAX_RANK}"

    def check_alpha(self, value: object) -> str:
        """What an alpha should be, or nothing when it is."""
        fits = type(value) in (int, float) and abs(value) <= MAX_ALPHA  # type: ignore[arg-type]
        return "" if fits else f"a number within +-{MAX_ALPHA:g}"

    def _selection(self, key: str) -> Selection:
        value = self.document.get(key)
        if not value and value in (None, "", []):
            return Selection()
        if isinstance(value, str):
            return Selection(pattern=self._pattern(key, value))
        if self._is_text_list(value):
            return Selection(keys=frozenset(value))
        self._expect(key, "a list of module names or one pattern")
        return Selection()

    def _pattern(self, key: str, source: str) -> Pattern | None:
        try:
            return compile_pattern(source)
        except UnsafePatternError as error:
            self.reasons.append(
                f"{key}: the expression `{show(source)}` is not taken: {error}; "
                "list the modules' names instead"
            )
            return None

    def _layers(self) -> frozenset[int] | None:
        value = self.document.get("layers_to_transform")
        values = [value] if type(value) is int else value
        if values is None or values == []:
            return None
        is_list = isinstance(values, list) and len(values) <= MAX_KEYS
        if is_list and all(type(v) is int and 0 <= v < MAX_KEYS for v in values):
            return frozenset(values)
        self._expect("layers_to_transform", "a layer number or a list of them")
        return None

    def _layer_lists(self) -> tuple[re.Pattern[str], ...]:
        value = self.document.get("layers_pattern")
        values = [value] if isinstance(value, str) and value else value
        if not values and values in (None, "", []):
            return (ANY_LAYER_LIST,)
        if self.document.get("layers_to_transform") is None:
            self._expect("layers_pattern", "unset without layers_to_transform, as in PEFT")
        is_list = self._is_text_list(values) and len(values) <= MAX_LAYER_LISTS
        if is_list and all(_LITERAL.fullmatch(v) for v in values):
            return tuple(layer_list(v) for v in values)
        self._expect("layers_pattern", "a plain name or a list of them")
        return (ANY_LAYER_LIST,)

    def _is_text_list(self, value: object) -> bool:
        return (
            isinstance(value, list)
            and len(value) <= MAX_KEYS
            and all(isinstance(v, str) and 1 <= len(v) <= MAX_TEXT for v in value)
        )

    def _expect(self, key: str, expected: str) -> None:
        state = "wrong" if key in self.document else "missing"
        self.reasons.append(f"{key} is {state}: it must be {expected}")
