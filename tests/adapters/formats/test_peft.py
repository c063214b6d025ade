"""PEFT folders are read as PEFT means them: every kind that is served, without PEFT."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loriner.adapters import formats
from loriner.errors import InvalidAdapterError
from tests.adapters.samples import (
    BASE,
    PEFT_FOLDERS,
    SEVEN,
    SHARED,
    SMOLLM2,
    TINY,
    config,
    tensors,
    write_adapter,
)


@pytest.mark.parametrize(
    ("folder", "ranks", "targets", "num_modules"),
    [
        ("all-r2-bf16", (2,), sorted(SEVEN), 21),
        ("attn-r4", (4,), ["k_proj", "o_proj", "q_proj", "v_proj"], 12),
        ("patterns", (2, 3, 6), sorted(SEVEN), 21),
        ("rslora-r8", (8,), ["q_proj", "v_proj"], 6),
        ("layers-1-2", (2,), sorted(SEVEN), 14),
        ("lora-bias", (1,), ["down_proj", "o_proj"], 6),
        ("lm-head", (2,), ["lm_head", "q_proj"], 4),
        ("embed", (2,), ["embed_tokens", "v_proj"], 4),
    ],
)
def test_what_peft_wrote_is_read(
    folder: str, ranks: tuple[int, ...], targets: list[str], num_modules: int
) -> None:
    adapter = formats.load(PEFT_FOLDERS / folder, TINY)
    assert adapter.ranks == ranks
    assert list(adapter.targets) == targets
    assert len(adapter.modules) == num_modules
    assert adapter.base_name == "tiny-llama" and adapter.base_digest is None
    in_file = load_file(PEFT_FOLDERS / folder / "adapter_model.safetensors")
    kept = [t for w in adapter.modules.values() for t in w.tensors.values()]
    assert len(kept) == len(in_file)
    assert adapter.num_bytes == sum(tensor.nbytes for tensor in in_file.values())


def test_tensors_keep_dtype_shape_and_bytes() -> None:
    adapter = formats.load(PEFT_FOLDERS / "rslora-r8", TINY)
    in_file = load_file(PEFT_FOLDERS / "rslora-r8" / "adapter_model.safetensors")
    weight = adapter.modules["model.layers.1.self_attn.v_proj"]
    key = "base_model.model.model.layers.1.self_attn.v_proj"
    assert weight.a.dtype == torch.float16
    assert torch.equal(weight.a, in_file[f"{key}.lora_A.weight"])
    assert torch.equal(weight.b, in_file[f"{key}.lora_B.weight"])
    assert weight.scaling == 16 / math.sqrt(8)


def test_patterns_decide_rank_and_alpha_of_each_module() -> None:
    modules = formats.load(PEFT_FOLDERS / "patterns", TINY).modules
    scalings = {name: weight.scaling for name, weight in modules.items()}
    assert scalings["model.layers.0.self_attn.q_proj"] == 16 / 6
    assert scalings["model.layers.1.mlp.down_proj"] == 16 / 3
    assert scalings["model.layers.0.mlp.down_proj"] == 16 / 2
    assert scalings["model.layers.2.self_attn.k_proj"] == 4 / 2


def test_embedding_and_bias_have_their_own_shapes() -> None:
    embedding = formats.load(PEFT_FOLDERS / "embed", TINY).modules["model.embed_tokens"]
    assert embedding.a.shape == (2, 48) and embedding.b.shape == (16, 2)
    with_bias = formats.load(PEFT_FOLDERS / "lora-bias", TINY)
    bias = with_bias.modules["model.layers.0.mlp.down_proj"].bias
    assert bias is not None and bias.shape == (16,)


def test_mixed_dtypes_are_kept_as_they_are(tmp_path: Path) -> None:
    weights = tensors()
    first = next(iter(weights))
    weights[first] = weights[first].bfloat16()
    adapter = formats.load(write_adapter(tmp_path, weights), TINY)
    dtypes = {t.dtype for w in adapter.modules.values() for t in w.tensors.values()}
    assert dtypes == {torch.float32, torch.bfloat16}


def test_the_loaded_tensors_outlive_the_file(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    adapter = formats.load(folder, TINY)
    before = adapter.modules["model.layers.0.self_attn.q_proj"].a.clone()
    (folder / "adapter_model.safetensors").write_bytes(b"\0" * 20_000)
    assert torch.equal(adapter.modules["model.layers.0.self_attn.q_proj"].a, before)


@pytest.mark.parametrize("rank", [1, 3, 256])
def test_any_rank_from_1_to_256_is_served(tmp_path: Path, rank: int) -> None:
    folder = write_adapter(tmp_path, tensors(rank=rank), config(r=rank))
    assert formats.load(folder, TINY).ranks == (rank,)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_mathematics_is_the_same_generation(tmp_path: Path, seed: int) -> None:
    one = write_adapter(tmp_path / "1", seed=seed)
    other = write_adapter(
        tmp_path / "2",
        seed=seed,
        keys=config(
            target_modules=["v_proj", "q_proj"],
            lora_alpha=99,
            alpha_pattern={"[qv]_proj": 4},
            lora_dropout=0.5,
            base_model_name_or_path="elsewhere",
        ),
    )
    assert formats.load(one, TINY).generation == formats.load(other, TINY).generation


def test_all_linear_means_all_but_lm_head_and_embedding(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, tensors(SEVEN), config(target_modules="All-Linear"))
    assert formats.load(folder, TINY).targets == tuple(sorted(SEVEN))


def test_exclusions_and_safe_expressions_select_as_in_peft(tmp_path: Path) -> None:
    weights = {k: v for k, v in tensors().items() if "layers.0" not in k}
    for i, keys in enumerate(
        (
            config(exclude_modules=["layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj"]),
            config(exclude_modules=r".*layers\.0\..*"),
            config(target_modules=r"model\.layers\.[12]\.self_attn\.(q|v)_proj"),
            config(layers_to_transform=[1, 2]),
            config(layers_to_transform=[1, 2], layers_pattern=["h", "layers"]),
        )
    ):
        assert len(formats.load(write_adapter(tmp_path / str(i), weights, keys), TINY).modules) == 4


def test_a_full_name_is_not_bound_by_layers_to_transform(tmp_path: Path) -> None:
    full = "model.layers.0.self_attn.q_proj"
    keys = config(target_modules=[full, "v_proj"], layers_to_transform=2)
    weights = {k: v for k, v in tensors().items() if full in k or "layers.2.self_attn.v_proj" in k}
    assert len(formats.load(write_adapter(tmp_path, weights, keys), TINY).modules) == 2


def test_keys_that_mean_nothing_here_are_accepted(tmp_path: Path) -> None:
    keys = config(
        init_lora_weights="gaussian",
        eva_config={"rho": 2.0},
        lora_dropout=0.1,
        inference_mode=False,
        task_type=None,
        auto_mapping={
            "base_model_class": "LlamaForCausalLM",
            "parent_library": "transformers.models.llama.modeling_llama",
        },
        runtime_config={"ephemeral_gpu_offload": False},
        revision="main",
        peft_version=...,
        from_the_future=None,
        also_from_the_future=False,
    )
    assert formats.load(write_adapter(tmp_path, keys=keys), TINY).ranks == (2,)


def test_a_named_base_must_be_this_one(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path)
    (folder / "loriner.json").write_text(json.dumps({"base_digest": BASE, "steps": 60}))
    assert formats.load(folder, TINY, base_digest=BASE).base_digest == BASE
    with pytest.raises(InvalidAdapterError, match="trained on another base: it names bbbbbbbbbbbb"):
        formats.load(folder, TINY, base_digest="c" * 64)


def test_the_config_may_name_the_base_too(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, keys=config(loriner_base_digest=BASE))
    assert formats.load(folder, TINY).base_digest == BASE
    with pytest.raises(InvalidAdapterError, match="another base"):
        formats.load(folder, TINY, base_digest="c" * 64)
    (folder / "loriner.json").write_text(json.dumps({"base_digest": "c" * 64}))
    with pytest.raises(InvalidAdapterError, match="name different bases"):
        formats.load(folder, TINY)


def test_copies_of_base_weights_are_compared_and_dropped(tmp_path: Path) -> None:
    """PEFT saves the whole base embedding beside LoRA on it unless told not to."""
    base = torch.randn(48, 16).bfloat16()
    weights = load_file(PEFT_FOLDERS / "lm-head" / "adapter_model.safetensors")
    copy = "base_model.model.lm_head.base_layer.weight"
    keys = json.loads((PEFT_FOLDERS / "lm-head" / "adapter_config.json").read_text())
    folder = write_adapter(tmp_path / "same", weights | {copy: base.float()}, keys)
    plain = formats.load(PEFT_FOLDERS / "lm-head", TINY)
    tensors_of_base = {"lm_head.weight": base}.get
    read = formats.load(folder, TINY, base_tensor=tensors_of_base)
    assert read.generation == plain.generation
    with pytest.raises(InvalidAdapterError, match="save_embedding_layers=False"):
        formats.load(folder, TINY)
    changed = write_adapter(tmp_path / "changed", weights | {copy: base.float() + 1}, keys)
    with pytest.raises(InvalidAdapterError, match="cannot be shown equal"):
        formats.load(changed, TINY, base_tensor=tensors_of_base)


def test_peft_is_never_imported() -> None:
    code = (
        "import sys, pathlib; from loriner.adapters import formats; from tests.adapters.samples "
        f"import TINY; formats.load(pathlib.Path({str(PEFT_FOLDERS / 'attn-r4')!r}), TINY); "
        "assert not {'peft', 'transformers', 'pickle5'} & set(sys.modules)"
    )
    root = Path(__file__).parents[3]
    path = ":".join([str(root), str(root / "server")])
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": path})


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared SmolLM2 adapters are not here")
@pytest.mark.parametrize("folder", sorted(SHARED.glob("*/")), ids=lambda folder: folder.name)
def test_adapters_for_smollm2_are_read_or_refused(folder: Path) -> None:
    if folder.name.startswith("unsupported"):
        with pytest.raises(InvalidAdapterError, match="DoRA is not served"):
            formats.load(folder, SMOLLM2)
        return
    adapter = formats.load(folder, SMOLLM2)
    in_file = load_file(folder / "adapter_model.safetensors")
    assert sum(len(weight.tensors) for weight in adapter.modules.values()) == len(in_file)
