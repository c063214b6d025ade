"""ModelConfig: what is read from config.json, and what is refused by name."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest

from loriner.errors import CheckpointError
from loriner.model.config import FAMILIES, ModelConfig, RopeScaling
from tests.tiny import tiny_config

SIZES = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)
LLAMA3 = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def read(family: str = "llama", **overrides: Any) -> ModelConfig:
    return ModelConfig.from_hf(tiny_config(family, **overrides))


def test_importing_the_config_does_not_import_torch() -> None:
    code = "import sys, loriner.model.config; sys.exit('torch' in sys.modules)"

    assert (
        subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": "server"}).returncode == 0
    )


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_shapes_are_those_of_transformers(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    raw = tiny_config(family, tie_word_embeddings=False)
    with torch.device("meta"):
        hf = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**raw))
    expected = {name: tuple(tensor.shape) for name, tensor in hf.state_dict().items()}

    assert ModelConfig.from_hf(raw).tensors() == expected


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_absent_keys_have_the_defaults_of_transformers(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {key: value for key, value in tiny_config(family).items() if key in SIZES}
    hf = transformers.AutoConfig.for_model(family, **sizes)
    read = ModelConfig.from_hf({"model_type": family, **sizes})

    assert read.head_dim == getattr(hf, "head_dim", 64 // 4)
    assert read.tie_word_embeddings == hf.tie_word_embeddings
    assert read.rms_norm_eps == hf.rms_norm_eps
    assert read.rope_theta == hf.rope_parameters["rope_theta"]
    assert read.hidden_act == {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}[hf.hidden_act]


def test_modules_are_every_linear_the_head_and_the_embedding() -> None:
    modules = read(num_hidden_layers=3).modules()

    assert len(modules) == 3 * 7 + 2
    assert modules["model.layers.2.self_attn.k_proj"] == (32, 64)
    assert modules["model.layers.0.mlp.down_proj"] == (64, 128)
    assert modules["lm_head"] == modules["model.embed_tokens"] == (320, 64)


def test_families_differ_in_biases_and_norms() -> None:
    assert (read("qwen2").qkv_bias, read("qwen2").o_bias) == (True, False)
    assert (read("qwen3").qk_norm, read("qwen3").qkv_bias) == (True, False)
    assert read("qwen3", attention_bias=True).o_bias
    assert read("llama", attention_bias=True).qkv_bias
    assert read("llama", mlp_bias=True).mlp_bias
    assert not read("mistral", attention_bias=True).qkv_bias
    gemma = read("gemma", hidden_act="gelu")
    assert (gemma.norm_offset, gemma.hidden_act) == (True, "gelu_tanh")
    assert gemma.embed_scale == math.sqrt(64)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_llama3_rope_is_read_from_old_and_new_keys(key: str) -> None:
    config = ModelConfig.from_hf({**tiny_config(rope_theta=500000.0), key: LLAMA3})

    assert config.rope_theta == 500000.0
    assert config.rope_scaling == RopeScaling(
        "llama3", 32.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0
    )


def test_theta_inside_rope_parameters_wins() -> None:
    config = read(rope_parameters={"rope_type": "default", "rope_theta": 1e6})

    assert (config.rope_theta, config.rope_scaling) == (1e6, RopeScaling())


def test_yarn_falls_back_to_the_models_own_context() -> None:
    scaling = read(rope_scaling={"type": "yarn", "factor": 4.0}).rope_scaling

    assert scaling == RopeScaling("yarn", 4.0, original_max_position_embeddings=512)


def test_mscale_becomes_the_attention_factor() -> None:
    yarn = {"type": "yarn", "factor": 4.0, "mscale": 0.5, "mscale_all_dim": 1.0}
    factor = read(rope_scaling=yarn).rope_scaling.attention_factor

    assert factor == pytest.approx((0.05 * math.log(4) + 1) / (0.1 * math.log(4) + 1))


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_simple_scalings_need_only_a_factor(kind: str) -> None:
    assert read(rope_scaling={"type": kind, "factor": 2}).rope_scaling == RopeScaling(kind, 2.0)


def test_a_window_shorter_than_the_context_bounds_what_plain_attention_may_serve() -> None:
    config = read("mistral", sliding_window=128)

    assert (config.sliding_window, config.sliding_layers) == (128, (0, 1))
    assert config.max_context == 128


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mistral", {"sliding_window": 512}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": False}),
        ("qwen2", {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 2}),
        ("llama", {"sliding_window": 64}),
    ],
)
def test_a_window_that_never_bites_is_none(family: str, options: dict[str, Any]) -> None:
    config = read(family, **options)

    assert (config.sliding_window, config.max_context) == (None, 512)


def test_only_the_named_layers_slide() -> None:
    kinds = ["full_attention", "sliding_attention"]
    config = read("qwen3", sliding_window=64, use_sliding_window=True, layer_types=kinds)

    assert config.sliding_layers == (1,)


@pytest.mark.parametrize(("eos", "ids"), [(2, (2,)), ([2, 5, 2], (2, 5)), (None, ())])
def test_end_tokens_are_a_tuple(eos: object, ids: tuple[int, ...]) -> None:
    assert read(eos_token_id=eos).eos_token_ids == ids


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model_type": "mixtral"}, "model_type 'mixtral'"),
        ({"model_type": None}, "model_type None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"num_experts": 8}, "num_experts = 8"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope type 'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "'linear' needs a factor"),
        ({"rope_scaling": {"type": "linear", "factor": "x"}}, "rope factor 'x'"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "odd": 1}}, "rope option odd"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": False}}, "truncate"),
        ({"rope_scaling": {"mrope_section": [1, 2]}}, "mrope_section"),
        ({"rope_parameters": {"full_attention": {}}}, "full_attention"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "not a multiple"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"eos_token_id": "</s>"}, "eos_token_id '</s>'"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(options: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words.replace("[", r"\[")):
        read(**options)


def test_a_window_of_no_length_is_refused() -> None:
    with pytest.raises(CheckpointError, match="sliding_window 0"):
        read("mistral", sliding_window=0)
