"""The host's side of the GPU sampler: what is packed, how a row is cut, that kernels compile."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

pytest.importorskip("cuda.bindings")

from loriner.kernels.cuda import nvrtc, sampling
from loriner.kernels.cuda.sampling import ENTRY, ROW, Plan, Sheet, adjustments, describe

H200 = ((9, 0), 227 << 10)
A100 = ((8, 0), 163 << 10)


def sheet(max_rows: int = 4, max_entries: int = 8) -> Sheet:
    size = Sheet.num_bytes(max_rows, max_entries)
    return Sheet(np.full(size, 0xA5, dtype=np.uint8), max_rows)


def test_records_have_the_layout_of_the_source() -> None:
    source = (nvrtc.SOURCES / sampling.SOURCE).read_text()
    body = re.search(r"struct Row \{(.*?)\};", source, re.S)
    assert body is not None
    fields = re.findall(r"^    (?:u64|double|float|i32) ([\w, ]+);", body[1], re.M)
    assert [name for group in fields for name in group.split(", ")] == list(ROW.names or ())
    assert (ROW.itemsize, ENTRY.itemsize) == (48, 8)
    for name in ("THREADS", "FIXED_SMEM", "MAX_TOP"):
        assert f"#define {name} {getattr(sampling, name)}\n" in source


def test_a_greedy_row_has_no_scale_and_no_filters() -> None:
    row = describe(temperature=0.0)[0]
    assert row["scale"] == 0.0 and row["gap"] == -math.inf and row["top_p"] == 1.0
    assert (row["top_k"], row["logprobs"], row["live"]) == (0, -1, 1)


def test_temperature_and_min_p_become_a_scale_and_a_gap() -> None:
    row = describe(temperature=0.5, min_p=0.25)[0]
    assert row["scale"] == pytest.approx(2 * math.log2(math.e))
    assert row["gap"] == pytest.approx(0.5 * math.log(0.25))


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-40])
def test_a_tiny_temperature_stays_finite(temperature: float) -> None:
    row = describe(temperature=temperature, min_p=0.1)[0]
    assert np.isfinite(row["scale"]) and row["scale"] > 0 and row["gap"] <= 0


def test_a_seed_is_taken_modulo_two_to_the_64() -> None:
    assert describe(temperature=1.0, seed=-1)[0]["seed"] == 2**64 - 1
    assert describe(temperature=1.0, seed=2**64 + 5)[0]["seed"] == 5


def test_adjustments_name_each_token_once_and_barring_wins() -> None:
    entries = adjustments([(9, 1.0), (2, 0.5), (9, 0.25)], barred=(2, 0))
    assert entries.tolist() == [(0, -math.inf), (2, -math.inf), (9, 1.25)]
    assert len(adjustments()) == 0


def test_a_sheet_holds_the_rows_then_their_entries_then_padding() -> None:
    made = sheet()
    rows = np.concatenate([describe(temperature=t) for t in (0.0, 1.0, 2.0)])
    lists = {2: adjustments([(5, 1.0)]), 0: adjustments(barred=(7, 8))}
    used = made.fill(rows, [4, 0, 9], lists)
    assert used == 4 * 48 + 3 * 8
    assert made.rows["position"][:3].tolist() == [4, 0, 9]
    assert made.rows["live"].tolist() == [1, 1, 1, 0]
    assert made.rows["num_entries"][:3].tolist() == [2, 0, 1]
    for row, entries in lists.items():
        first = made.rows["first_entry"][row]
        assert np.array_equal(made.entries[first : first + len(entries)], entries)


def test_a_sheet_forgets_the_last_step() -> None:
    made = sheet()
    rows = np.concatenate([describe(temperature=1.0)] * 3)
    made.fill(rows, [1, 2, 3], {1: adjustments([(5, 1.0)])})
    assert made.fill(rows[:2], [5, 6]) == 4 * 48
    assert made.rows["num_entries"][:2].tolist() == [0, 0]
    assert made.rows["live"].tolist() == [1, 1, 0, 0]


def test_too_many_entries_are_refused_before_anything_is_written() -> None:
    made = sheet(max_entries=2)
    with pytest.raises(ValueError, match="more than 2"):
        made.fill(describe(temperature=1.0), [0], {0: adjustments(barred=(1, 2, 3))})
    assert (made.rows.view(np.uint8) == 0xA5).all()


@pytest.mark.parametrize("card", [H200, A100])
@pytest.mark.parametrize("vocab", [1, 31, 32000, 49152, 128256, 151936, 262144])
def test_a_plan_covers_the_vocabulary_and_fits(
    vocab: int, card: tuple[tuple[int, int], int]
) -> None:
    plan = Plan.of(vocab, *card)
    assert plan.padded >= vocab and plan.segment % 32 == 0
    assert plan.smem <= card[1] and plan.cluster == (8 if card is H200 else 1)


def test_three_blocks_of_a_llama_vocabulary_share_a_multiprocessor() -> None:
    assert 3 * (Plan.of(128256, *H200).smem + 1024) <= 228 << 10


def test_a_card_with_little_shared_memory_reads_a_large_row_again_instead() -> None:
    small = ((12, 0), 99 << 10)
    assert Plan.of(128256, *small).cluster == 8
    assert Plan.of(262144, *small) == Plan.of(262144, *A100)


@pytest.mark.parametrize("vocab", [0, 262145])
def test_a_vocabulary_out_of_bounds_is_refused(vocab: int) -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        Plan.of(vocab, *H200)


@pytest.mark.parametrize("arch", nvrtc.ARCHITECTURES)
def test_the_source_compiles(arch: str) -> None:
    cluster = 1 if arch.startswith("sm_8") else sampling.CLUSTER
    assert nvrtc.compile_cubin(sampling.SOURCE, arch, {"CLUSTER": cluster})
