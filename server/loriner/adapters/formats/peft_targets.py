"""Which modules of the base a PEFT config names: PEFT's own rules, without running its regexes.

Follows `check_target_module_exists` and `get_pattern_key` of peft 0.21.2 (tuners_utils.py,
other.py) line by line. Knows module names only. Invariant: the answer is what PEFT would have
trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loriner.adapters.adapter import EMBEDDING
from loriner.adapters.patterns import Pattern

LM_HEAD = "lm_head"

# With no layers_pattern PEFT takes the first number that stands after `<something>.<list>.`
ANY_LAYER_LIST = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")


def layer_list(literal: str) -> re.Pattern[str]:
    """PEFT's expression for one `layers_pattern`; `literal` must be plain text."""
    return re.compile(rf"(?:^|.*?\.){literal}\.(?P<idx>\d+)\.")


@dataclass(frozen=True, slots=True)
class Selection:
    """`target_modules` or `exclude_modules`: a list of name endings, a pattern, or neither."""

    keys: frozenset[str] = frozenset()
    pattern: Pattern | None = None

    def has_exactly(self, name: str) -> bool:
        return name in self.keys

    def has_ending(self, name: str) -> bool:
        """Whether `name.endswith("." + key)` for one of the keys."""
        return any(name[i + 1 :] in self.keys for i, char in enumerate(name) if char == ".")

    def selects(self, name: str) -> bool:
        if self.pattern is not None:
            return self.pattern.matches_whole(name)
        return self.has_exactly(name) or self.has_ending(name)

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """The keys that select none of `names`."""
        endings = {name[i:] for name in names for i in _starts(name)}
        return sorted(self.keys - endings)


@dataclass(frozen=True, slots=True)
class Targets:
    """All of a config that decides which modules are adapted."""

    selected: Selection | None  # None: "all-linear"
    excluded: Selection
    layers: frozenset[int] | None
    layer_lists: tuple[re.Pattern[str], ...]

    def names(self, module: str) -> bool:
        """Whether PEFT would adapt `module`."""
        if self.excluded.selects(module):
            return False
        if self.selected is None:
            return module.rpartition(".")[2] not in (EMBEDDING, LM_HEAD)
        if self.selected.pattern is not None or self.selected.has_exactly(module):
            return self.selected.selects(module)
        return self.selected.has_ending(module) and self._is_in_layers(module)

    def unmatched(self, modules: Iterable[str]) -> list[str]:
        """What the config names and the base does not have."""
        modules = list(modules)
        keys = self.selected.unmatched(modules) if self.selected else []
        if self.layers is None:
            return keys
        known = {self._layer_of(module) for module in modules}
        return keys + [f"layer {index}" for index in sorted(self.layers) if index not in known]

    def _is_in_layers(self, module: str) -> bool:
        return self.layers is None or self._layer_of(module) in self.layers

    def _layer_of(self, module: str) -> int | None:
        for expression in self.layer_lists:
            if match := expression.match(module):
                return int(match["idx"])
        return None


def first_match(patterns: Mapping[Pattern, float], name: str) -> float | None:
    """The value of the first key that matches, in the order of the file, as PEFT looks it up."""
    for pattern, value in patterns.items():
        if pattern.matches_tail(name):
            return value
    return None


def _starts(name: str) -> list[int]:
    return [0, *(i + 1 for i, char in enumerate(name) if char == ".")]
