"""A random base drawn on the device, and how launches are timed there."""

from __future__ import annotations

import time

import pytest
import torch

from loriner.bench.kernel_ops import dequantized, nf4
from loriner.bench.random_base import RandomBase
from loriner.bench.timing import Stopwatch, read_bandwidth

pytestmark = pytest.mark.gpu

DOWN = "model.layers.1.mlp.down_proj"


def test_its_tensors_are_drawn_on_the_device_and_keep_the_size_of_their_inputs() -> None:
    base = RandomBase("llama-3-8b", "cuda")
    weight = nf4(base, f"{DOWN}.weight")
    values = dequantized([weight], torch.float32)
    n, k = base.config.linears()[DOWN]

    assert weight.packed.is_cuda and weight.expanded().is_cuda
    assert values.shape == (n, k)
    assert float(values.pow(2).mean() * k) == pytest.approx(1.0, abs=0.1)
    assert torch.equal(base.tensor(f"{DOWN}.weight"), base.tensor(f"{DOWN}.weight"))
    assert base.tensor("lm_head.weight").dtype is torch.bfloat16


def test_the_largest_shape_takes_seconds_and_keeps_nothing() -> None:
    base = RandomBase("llama-2-70b", "cuda")
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    start = time.perf_counter()
    for name in base.config.linears():
        base.tensor(f"{name}.weight")
    torch.cuda.synchronize()

    assert time.perf_counter() - start < 10
    assert torch.cuda.memory_allocated() == held


def test_a_replayed_round_does_what_it_was_captured_with() -> None:
    watch = Stopwatch("cuda")
    x, y = torch.full((1 << 20,), 2.0, device="cuda"), torch.zeros(1 << 20, device="cuda")
    run = watch.replayable([lambda: y.copy_(x), lambda: y.mul_(3)])
    y.fill_(torch.nan)
    run()
    torch.cuda.synchronize()

    assert torch.equal(y, 3 * x)
    assert 0 < watch.each_us([lambda: y.copy_(x)] * 8) < 1000


def test_the_card_reads_faster_than_a_host_does() -> None:
    assert 1e11 < read_bandwidth(Stopwatch("cuda"), 1 << 30) < 2e13
