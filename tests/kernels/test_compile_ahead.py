"""Kernels that are compiled before the first step: all that steps ask for, on all cores, cached."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loriner.engine.graphs import buckets
from loriner.kernels.cuda import linear, nvrtc
from loriner.kernels.cuda.many_rows import MAX_FUSED_ROWS
from tests.gpu.operands import random_nf4

Defines = frozenset[tuple[str, int | str]]


class FakeDevice:
    """Notes what is compiled; launches nothing."""

    capability, arch, num_sms, max_smem = (8, 0), "sm_80", 108, 166_912
    torch_device = torch.device("cpu")

    def __init__(self) -> None:
        self.asked: set[Defines] = set()

    def module(self, source: str, **defines: int | str) -> Any:
        assert source == linear.SOURCE
        self.asked.add(frozenset(defines.items()))
        return SimpleNamespace(kernel=lambda name, smem: lambda *args, **options: None)


@pytest.mark.parametrize(("max_rows", "max_sequences"), [(64, 64), (512, 100), (512, 300)])
def test_a_step_asks_for_nothing_else(max_rows: int, max_sequences: int) -> None:
    device: Any = FakeDevice()
    linears = linear.Linears(device)
    plain = linears.prepare_nf4([random_nf4(960, 576, nested=False, device="cpu")], None)
    halves = [random_nf4(1536, 576, nested=False, device="cpu")] * 2
    gated = linears.prepare_nf4(halves, None, gated=True)
    head = linears.prepare_dense([torch.randn(1024, 576)], None)
    uses = [linear.Use(plain, linear.STORE), linear.Use(gated, linear.GATED, is_gelu=True)]
    sizes = [*buckets(max_rows), max_sequences]
    few = [rows for rows in sizes if rows <= MAX_FUSED_ROWS]
    last = linear.Use(head, linear.LOGITS)
    ahead = linears.variants([*((use, few) for use in uses), (last, sizes)])

    for rows in sizes:
        for operand, epilogue, is_gelu in (*uses, last):
            samples = min(rows, max_sequences) if epilogue == linear.LOGITS else rows
            if epilogue != linear.LOGITS and rows > MAX_FUSED_ROWS:
                continue
            x = torch.zeros(samples, 576, dtype=torch.bfloat16)
            y = torch.zeros(samples, operand.outputs)
            linears.run(x, operand, y, epilogue, is_gelu=is_gelu)
    without = {frozenset(d.items()) for d in ahead if not d["LORA"]}
    assert device.asked == without
    assert len(ahead) == 2 * len(without), "each with adapters, too"


def test_variants_are_compiled_at_the_same_time_and_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wanted = [{"BLOCK_SIZE": 16, "HEAD_DIM": dim} for dim in (64, 128, 256)]

    nvrtc.compile_all("rope.cu", "sm_80", wanted)

    files = set(nvrtc.cache_folder().iterdir())
    assert len(files) == 3
    begin = time.monotonic()
    assert all(nvrtc.compile_cubin("rope.cu", "sm_80", one) for one in wanted)
    assert time.monotonic() - begin < 0.2
    assert set(nvrtc.cache_folder().iterdir()) == files


def test_one_that_does_not_compile_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wanted = [{"BLOCK_SIZE": 16, "HEAD_DIM": dim} for dim in (64, 24)]
    with pytest.raises(nvrtc.CompileError, match="multiples of 16"):
        nvrtc.compile_all("rope.cu", "sm_80", wanted)
