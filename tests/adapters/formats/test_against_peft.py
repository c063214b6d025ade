"""PEFT itself is the oracle: what it adapts, at which rank and scaling, and what it computes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loriner.adapters import formats
from loriner.adapters.adapter import LoraWeight
from loriner.adapters.formats.peft_config import parse_config
from tests.adapters.samples import PEFT_FOLDERS, SEVEN, SHARED, SMOLLM2, TINY, Modules, config

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft.tuners.lora.layer import LoraLayer  # noqa: E402
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists  # noqa: E402
from peft.utils.other import get_pattern_key  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

CASES: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "rank and alpha patterns": {
        "target_modules": list(SEVEN),
        "rank_pattern": {"q_proj": 5, "layers.1.mlp.down_proj": 3, r".*\.2\..*\.o_proj": 4},
        "alpha_pattern": {"^model.layers.0.self_attn.k_proj": 7, "(gate|up)_proj": 1.5},
    },
    "a pattern whose dot matches any character": {
        "target_modules": list(SEVEN),
        "rank_pattern": {"self.attn.q.proj": 6},
        "alpha_pattern": {"layers.[02].mlp.up_proj": 3},
    },
    "overlapping patterns": {
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 6, "q_proj": 3},
        "alpha_pattern": {"self_attn.v_proj": 2, "v_proj": 32},
    },
    "rslora": {"target_modules": ["v_proj"], "use_rslora": True, "rank_pattern": {"1.+": 3}},
    "all-linear": {"target_modules": "all-linear"},
    "exclude a list": {
        "target_modules": "all-linear",
        "exclude_modules": ["k_proj", "mlp.up_proj"],
    },
    "exclude an expression": {"target_modules": list(SEVEN), "exclude_modules": r".*\.1\..*"},
    "target an expression": {"target_modules": r".*\.(0|2)\.mlp\.(up|down)_proj"},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "one layer by its list": {
        "target_modules": ["q_proj", "model.layers.2.mlp.up_proj"],
        "layers_to_transform": 1,
        "layers_pattern": ["h", "layers"],
    },
    "bias": {"target_modules": ["o_proj", "down_proj"], "lora_bias": True},
    "head": {"target_modules": ["lm_head", "k_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"], "use_rslora": True},
    "orthogonal": {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"},
    "mica": {"target_modules": ["q_proj"], "init_lora_weights": "mica"},
}


def tiny_llama() -> Any:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=48,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
        )
    )


@pytest.mark.parametrize("case", CASES)
def test_what_peft_saves_is_loaded_as_peft_computes_it(tmp_path: Path, case: str) -> None:
    settings = {"r": 2, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | CASES[case]
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    adapter = formats.load(tmp_path, TINY)
    layers = {
        name: layer
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, LoraLayer)
    }
    assert set(adapter.modules) == set(layers)
    for name, layer in layers.items():
        assert adapter.modules[name].rank == layer.r["default"]
        assert adapter.modules[name].scaling == layer.scaling["default"]
        assert_computes_alike(adapter.modules[name], layer)


@torch.inference_mode()
def assert_computes_alike(weight: LoraWeight, layer: Any) -> None:
    base = layer.get_base_layer()
    if isinstance(base, torch.nn.Embedding):
        ids = torch.arange(base.num_embeddings)
        ours = weight.scaling * (weight.b @ weight.a[:, ids]).T
        theirs = layer(ids) - base(ids)
    else:
        x = torch.randn(5, base.in_features)
        ours = x @ weight.a.T @ weight.b.T * weight.scaling
        if weight.bias is not None:
            ours = ours + weight.scaling * weight.bias
        theirs = layer(x) - base(x)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("folder", "modules"),
    [
        *((folder, TINY) for folder in sorted(PEFT_FOLDERS.glob("[!R]*/"))),
        *((folder, SMOLLM2) for folder in sorted(SHARED.glob("*/"))),
    ],
    ids=lambda value: value.name if isinstance(value, Path) else "",
)
def test_saved_adapters_have_the_ranks_and_scalings_that_peft_gives_them(
    folder: Path, modules: Modules
) -> None:
    if folder.name.startswith("unsupported"):
        pytest.skip("refused")
    theirs = peft.LoraConfig.from_pretrained(folder)
    adapter = formats.load(folder, modules)
    assert set(adapter.modules) == {m for m in modules if peft_names(theirs, m)}
    for module, weight in adapter.modules.items():
        assert (weight.rank, weight.scaling) == peft_scaling(theirs, module)


def peft_names(theirs: Any, module: str) -> bool:
    found = check_target_module_exists(theirs, module)
    return bool(found) and not isinstance(found, _ExcludedModule)


def peft_scaling(theirs: Any, module: str) -> tuple[int, float]:
    """As `LoraModel._create_and_replace` and `LoraLayer.update_layer` do."""
    rank = theirs.rank_pattern.get(get_pattern_key(theirs.rank_pattern, module), theirs.r)
    key = get_pattern_key(theirs.alpha_pattern, module)
    alpha = theirs.alpha_pattern.get(key, theirs.lora_alpha)
    return rank, alpha / rank**0.5 if theirs.use_rslora else alpha / rank


NAMES = st.sampled_from(
    ["q_proj", "mlp.up_proj", "layers.1.mlp.up_proj", "model.layers.0.self_attn.k_proj", "proj"]
    + ["lm_head", "embed_tokens", "model.embed_tokens", "self.attn.q.proj", "model"]
)
EXPRESSIONS = st.sampled_from(
    [r".*\.q_proj", r".*(q|v)_proj", r"model\.layers\.[01]\..*", "lm_head", r".*layers.\d.mlp.\w+"]
)
KEYS = NAMES | EXPRESSIONS
CONFIGS = st.fixed_dictionaries(
    {
        "target_modules": st.lists(NAMES, min_size=1, max_size=4) | EXPRESSIONS,
        "exclude_modules": st.none() | st.lists(NAMES, max_size=2) | EXPRESSIONS,
        "layers_to_transform": st.none()
        | st.integers(0, 3)
        | st.lists(st.integers(0, 3), max_size=3),
        "layers_pattern": st.sampled_from(
            [None, "layers", "h", ["h", "layers"], "model.layers", ""]
        ),
        "rank_pattern": st.dictionaries(KEYS, st.integers(1, 9), max_size=3),
        "alpha_pattern": st.dictionaries(KEYS, st.integers(1, 9) | st.floats(0.5, 4), max_size=3),
        "use_rslora": st.booleans(),
    }
)


@settings(max_examples=300)
@given(CONFIGS)
def test_any_config_selects_and_scales_as_in_peft(changes: dict[str, Any]) -> None:
    document = json.loads(json.dumps(config(**changes)))
    try:
        theirs = peft.LoraConfig(**changes, r=2, lora_alpha=4)
    except ValueError:  # it minds an empty list beside an expression; the answer is the same
        is_empty = not changes["layers_pattern"] and changes["layers_to_transform"] in (None, [])
        assert is_empty or parse_config(document)[1]
        return
    ours, reasons = parse_config(document)
    assert ours is not None and not reasons
    for module in TINY:
        assert ours.targets.names(module) == peft_names(theirs, module), module
        expected = peft_scaling(theirs, module)
        rank = ours.rank_of(module)
        assert (rank, ours.scaling_of(module, rank)) == expected, module
