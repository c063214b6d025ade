"""Random bases: their tensors, that the decoder loads and runs them, and the folder they become."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from loriner import kernels
from loriner.bench.base_folder import make_tokenizer, write_base
from loriner.bench.random_base import RandomBase
from loriner.bench.shapes import SHAPES, hf_config
from loriner.errors import CheckpointError, ConfigError
from loriner.model.config import ModelConfig
from loriner.model.transformer import Transformer
from loriner.model.weights import Checkpoint

DOWN = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_one_that_the_decoder_knows(shape: str) -> None:
    config = ModelConfig.from_hf(hf_config(shape))

    assert config.num_layers == SHAPES[shape]["num_hidden_layers"]
    assert all(k % 64 == 0 for _, k in config.linears().values())


def test_an_unknown_shape_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="'llama-9' is unknown"):
        hf_config("llama-9")


@pytest.mark.parametrize(
    ("shape", "billions"),
    [("llama-3-8b", 8.03), ("llama-2-7b", 6.74), ("llama-2-70b", 68.98), ("qwen3-4b", 4.02)],
)
def test_shapes_have_as_many_weights_as_the_models_they_are_named_after(
    shape: str, billions: float
) -> None:
    tensors = ModelConfig.from_hf(hf_config(shape)).tensors()

    assert sum(map(math.prod, tensors.values())) / 1e9 == pytest.approx(billions, abs=0.01)


def test_a_tensor_depends_on_name_and_seed_alone() -> None:
    base, same, other = RandomBase("tiny"), RandomBase("tiny"), RandomBase("tiny", seed=1)
    name = f"{DOWN}.weight"

    assert torch.equal(base.tensor(name), same.tensor(name))
    assert torch.equal(base.tensor(name), base.tensor(name))
    assert not torch.equal(base.tensor(name), other.tensor(name))
    assert not torch.equal(base.tensor(name), base.tensor(name.replace("1", "0")))
    assert base.base_digest == same.base_digest != other.base_digest


@pytest.mark.parametrize("double_quant", [True, False])
def test_weights_keep_the_size_of_their_inputs(double_quant: bool) -> None:
    base = RandomBase("smollm2", double_quant=double_quant)
    weight = base.quantized(f"{DOWN}.weight")
    scales = weight.expanded()
    n, k = base.config.linears()[DOWN]

    assert weight.packed.shape == (n * k // 2,) and scales.shape == (n * k // 64,)
    assert scales.min() > 0
    assert scales.std() / scales.mean() > 0.05
    counts = torch.bincount(weight.packed.int(), minlength=256)
    assert counts.min() > 0.5 * counts.float().mean()  # every byte of two codes
    assert (base.nested(DOWN) is not None) is double_quant


def test_it_has_what_its_config_asks_for_and_nothing_else() -> None:
    base = RandomBase("qwen3-4b")

    assert base.has("model.layers.3.self_attn.q_norm.weight")
    assert not base.has("lm_head.weight") and not base.has("model.layers.0.mlp.up_proj.bias")
    assert base.tensor("model.layers.3.self_attn.q_norm.weight").float().mean() > 0.8
    with pytest.raises(CheckpointError, match="has no tensor 'lm_head.weight'"):
        base.tensor("lm_head.weight")


def test_the_decoder_loads_it_and_its_activations_stay_finite() -> None:
    base = RandomBase("tiny")
    model = Transformer(base, kernels.select("cpu"), max_len=64)
    x = model.embed[torch.arange(8)].float()
    for layer in model.layers:
        x = layer.mlp(x, model.ops.rms_norm(x, layer.mlp_norm, 1e-5), None)

    assert torch.isfinite(x).all()
    assert 0.05 < x.std() < 20


def test_the_folder_opens_with_the_same_tensors(tmp_path: Path) -> None:
    base = RandomBase("tiny", seed=3)
    write_base(base, tmp_path / "base")
    opened = Checkpoint.open(tmp_path / "base")

    assert opened.config == base.config
    ours, theirs = base.linear(DOWN), opened.linear(DOWN)
    assert not isinstance(ours, torch.Tensor) and not isinstance(theirs, torch.Tensor)
    assert torch.equal(ours.packed, theirs.packed)
    assert torch.equal(base.quantized(f"{DOWN}.weight").expanded(), _scales(opened))
    for name, state in base.records():
        if state is None:
            assert torch.equal(base.tensor(name), opened.tensor(name))
    with pytest.raises(CheckpointError, match="exists already"):
        write_base(base, tmp_path / "base")


def test_every_token_of_its_tokenizer_has_a_text(tmp_path: Path) -> None:
    write_base(RandomBase("tiny"), tmp_path / "base")
    tokenizer = Tokenizer.from_file(str(tmp_path / "base" / "tokenizer.json"))

    assert tokenizer.encode("Hé").ids == [*"Hé".encode()]
    assert tokenizer.decode([*"Hé".encode()]) == "Hé"
    assert all(tokenizer.decode([i], skip_special_tokens=False) for i in range(512))
    assert make_tokenizer(512).get_vocab_size() == 512


def _scales(opened: Checkpoint) -> torch.Tensor:
    absmax = opened._absmax(f"{DOWN}.weight", opened._states[f"{DOWN}.weight"])
    return absmax if isinstance(absmax, torch.Tensor) else absmax.expand()
