"""A data file -> documents ready to train on, with everything that was refused and why.

Invariant: a set that is returned has fewer bad rows than the stated share, each known by its line.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loriner.errors import ConfigError, DataError
from loriner.train.masks import Document, Masker, truncated
from loriner.train.reading import Fault, Row, digest_file, read_rows
from loriner.train.rows import Chat, Example, Pair, RowError, Turn, recognise

MAX_SHOWN = 10
MAX_COLUMNS_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Prompt:
    """What one row asks and the answer it wants: for samples, canaries and gates."""

    turns: tuple[Turn, ...]  # empty: `text` is the prompt, without a template
    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class Entry:
    """One good row."""

    prompt: Prompt
    documents: tuple[Document, ...]
    num_truncated: int  # of the documents


@dataclass(frozen=True, slots=True)
class DataSet:
    """The good rows of one file and what became of the others."""

    path: Path
    digest: str  # SHA-256 of the file
    entries: tuple[Entry, ...]
    faults: tuple[Fault, ...]

    @property
    def num_rows(self) -> int:
        """Good and bad ones."""
        return len(self.entries) + len(self.faults)

    @property
    def num_truncated(self) -> int:
        return sum(entry.num_truncated for entry in self.entries)

    @property
    def documents(self) -> list[Document]:
        return [document for entry in self.entries for document in entry.documents]

    @property
    def prompts(self) -> list[Prompt]:
        return [entry.prompt for entry in self.entries]

    @property
    def num_tokens(self) -> int:
        return sum(len(document.token_ids) for document in self.documents)

    @property
    def num_learnt(self) -> int:
        return sum(document.num_learnt for document in self.documents)

    def split(self, share: float, seed: int) -> tuple[DataSet, DataSet]:
        """(train, held out): `share` of the rows, at least one each, drawn by `seed`.

        The bad rows stay with the first.
        """
        count = max(1, round(share * len(self.entries)))
        if count >= len(self.entries):
            raise ConfigError(f"eval_split {share} leaves nothing to train on in {self.path}.")
        held = set(random.Random(seed).sample(range(len(self.entries)), count))
        train = [e for i, e in enumerate(self.entries) if i not in held]
        kept = [e for i, e in enumerate(self.entries) if i in held]
        return replace(self, entries=tuple(train)), replace(self, entries=tuple(kept), faults=())

    def limited(self, count: int) -> DataSet:
        """`count` of the rows at even distances (0: all)."""
        total = len(self.entries)
        if not 0 < count < total:
            return self
        return replace(self, entries=tuple(self.entries[i * total // count] for i in range(count)))

    def summary(self) -> str:
        """Rows, lengths and truncation, in lines for a terminal."""
        lengths = sorted(len(document.token_ids) for document in self.documents)
        p50, p95 = statistics.median(lengths), lengths[math.ceil(len(lengths) * 19 / 20) - 1]
        lines = [
            f"{self.path}: {self.num_rows} rows, {len(lengths)} documents, "
            f"{self.num_tokens} tokens, {self.num_learnt} of them learnt "
            f"({self.num_learnt / self.num_tokens:.0%})",
            f"  length: median {p50:g}, 95 % up to {p95}, longest {lengths[-1]}; "
            f"{self.num_truncated} truncated",
        ]
        if self.faults:
            lines += [f"  {len(self.faults)} bad rows left out:", *shown_faults(self.faults)]
        return "\n".join(lines)


def load_data(
    path: Path,
    masker: Masker,
    *,
    max_length: int,
    columns: Mapping[str, str] | None = None,
    max_bad_share: float = 0.0,
) -> DataSet:
    """Read, recognise, mask and cut. Raises DataError naming lines and reasons."""
    entries: list[Entry] = []
    faults: list[Fault] = []
    for row in _rows(path, columns or {}):
        try:
            example, whole = _understand(row, masker, columns or {})
            cut = tuple(truncated(document, max_length) for document in whole)
        except RowError as error:
            faults.append(Fault(row.line, str(error)))
            continue
        num_truncated = sum(a is not b for a, b in zip(whole, cut, strict=True))
        entries.append(Entry(prompt_of(example), cut, num_truncated))
    _check_share(path, len(entries) + len(faults), faults, max_bad_share)
    return DataSet(path, digest_file(path), tuple(entries), tuple(faults))


def load_prompts(
    path: Path, columns: Mapping[str, str] | None = None, max_bad_share: float = 0.0
) -> list[Prompt]:
    """Questions and wanted answers, without a tokenizer. Raises DataError as `load_data` does."""
    prompts: list[Prompt] = []
    faults: list[Fault] = []
    for row in _rows(path, columns or {}):
        try:
            if isinstance(row, Fault):
                raise RowError(row.reason)
            prompts.append(prompt_of(recognise(row.values, columns or {})))
        except RowError as error:
            faults.append(Fault(row.line, str(error)))
    _check_share(path, len(prompts) + len(faults), faults, max_bad_share)
    return prompts


def prompt_of(example: Example) -> Prompt:
    """The last learnt turn's question and answer."""
    if isinstance(example, Chat):
        learnt = [i for i, turn in enumerate(example.turns) if turn.is_learnt]
        if not learnt:
            raise RowError("no assistant turn to learn from")
        last = learnt[-1]
        return Prompt(example.turns[:last], "", example.turns[last].content)
    if isinstance(example, Pair):
        return Prompt((), example.prompt, example.completion)
    head = example.text[: max(1, min(64, len(example.text) // 2))]
    return Prompt((), head, example.text[len(head) :])


def parse_columns(text: str) -> dict[str, str]:
    """ "prompt=question,completion=answer" -> {"question": "prompt", "answer": "completion"}."""
    pairs = [part.split("=", 1) for part in text.split(",") if part.strip()]
    if any(len(pair) != 2 or not all(map(str.strip, pair)) for pair in pairs):
        raise ConfigError(f"columns must be KEY=COLUMN,..., got {text!r}.")
    return {column.strip(): key.strip() for key, column in pairs}


def shown_faults(faults: Sequence[Fault]) -> list[str]:
    """The first of them, one a line."""
    lines = [f"  line {fault.line}: {fault.reason}" for fault in faults[:MAX_SHOWN]]
    more = len(faults) - MAX_SHOWN
    return [*lines, f"  and {more} more"] if more > 0 else lines


def _rows(path: Path, columns: Mapping[str, str]) -> Iterator[Row | Fault]:
    """The rows of the file. Raises DataError at its end for a column that no row has."""
    seen: dict[str, None] = {}
    for row in read_rows(path):
        if isinstance(row, Row):
            seen.update(dict.fromkeys(row.values))
        yield row
    missing = [column for column in columns if column not in seen]
    if seen and missing:
        shown = ", ".join([*seen][:MAX_COLUMNS_SHOWN])
        more = len(seen) - MAX_COLUMNS_SHOWN
        raise DataError(
            f"{path} has no column {missing[0]!r} to be {columns[missing[0]]!r}; it has {shown}"
            + (f" and {more} more." if more > 0 else ".")
        )


def _understand(
    row: Row | Fault, masker: Masker, columns: Mapping[str, str]
) -> tuple[Example, list[Document]]:
    if isinstance(row, Fault):
        raise RowError(row.reason)
    example = recognise(row.values, columns)
    return example, masker.documents(example)


def _check_share(path: Path, num_rows: int, faults: list[Fault], max_bad_share: float) -> None:
    if num_rows and len(faults) <= max_bad_share * num_rows and len(faults) < num_rows:
        return
    if not num_rows:
        raise DataError(f"{path} has no rows.")
    shown = "\n".join(shown_faults(faults))
    raise DataError(
        f"{path}: {len(faults)} of {num_rows} rows are bad, more than max_bad_share "
        f"{max_bad_share:g} allows:\n{shown}"
    )
