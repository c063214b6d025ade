"""What is not served is refused at upload, with every reason in one error."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from loriner.adapters import formats
from loriner.adapters.formats.peft_config import parse_config
from loriner.errors import InvalidAdapterError
from tests.adapters.samples import PEFT_FOLDERS, TINY, config, module_table, tensors, write_adapter

Q = "base_model.model.model.layers.0.self_attn.q_proj"


def reasons(folder: Path, modules: dict[str, tuple[int, int]] = TINY) -> list[str]:
    with pytest.raises(InvalidAdapterError) as caught:
        formats.load(folder, modules)
    assert all(len(reason) < 2000 and reason.isprintable() for reason in caught.value.reasons)
    return list(caught.value.reasons)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_dora": True}, "use_dora: DoRA is not served"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: replacing whole modules"),
        ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
        ({"init_lora_weights": "pissa"}, "changes the base's weights"),
        ({"init_lora_weights": "pissa_niter_16"}, "changes the base's weights"),
        ({"init_lora_weights": "OLoRA"}, "changes the base's weights"),
        ({"init_lora_weights": "corda"}, "changes the base's weights"),
        ({"init_lora_weights": "loftq"}, "changes the base's weights"),
        ({"init_lora_weights": "lora_ga"}, "changes the base's weights"),
        ({"init_lora_weights": "novel"}, "this initialisation is unknown"),
        ({"init_lora_weights": 3}, "this initialisation is unknown"),
        ({"loftq_config": {"loftq_bits": 4}}, "LoftQ"),
        ({"corda_config": {"corda_method": "kpm"}}, "CorDA"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "MoE experts"),
        ({"layer_replication": [[0, 4], [2, 4]]}, "layer replication"),
        ({"trainable_token_indices": [7]}, "training single tokens"),
        ({"peft_type": "ADALORA"}, "peft_type is `ADALORA`: only `LORA`"),
        ({"peft_type": None}, "only `LORA`"),
        ({"peft_type": ...}, "peft_type is missing"),
        ({"task_type": "SEQ_CLS"}, "task_type is `SEQ_CLS`"),
        ({"auto_mapping": {"base_model_class": "X", "parent_library": "os"}}, "auto_mapping"),
        ({"bias": "all"}, "bias is `all`: only `none`"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"use_qalora": True}, "QALoRA"),
        ({"use_bdlora": {"nblocks": 2}}, "BD-LoRA"),
        ({"kasa_config": {"beta": 1}}, "KaSA"),
        ({"arrow_config": {"top_k": 3}}, "Arrow"),
        ({"megatron_config": {"x": 1}}, "Megatron"),
        ({"scale_everything_by": 2}, "`scale_everything_by` is unknown and set to `2`"),
        ({"r": ...}, "r is missing"),
        ({"r": 0}, "r is wrong: it must be a whole number from 1 to 256"),
        ({"r": 257}, "r is wrong"),
        ({"r": True}, "r is wrong"),
        ({"r": 2.0}, "r is wrong"),
        ({"r": "2"}, "r is wrong"),
        ({"lora_alpha": ...}, "lora_alpha is missing"),
        ({"lora_alpha": "4"}, "lora_alpha is wrong"),
        ({"lora_alpha": 1e7}, "lora_alpha is wrong"),
        ({"use_rslora": "true"}, "use_rslora is wrong: it must be true or false"),
        ({"lora_bias": 1}, "lora_bias is wrong"),
        ({"lora_dropout": "0.1"}, "lora_dropout"),
        ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path"),
        ({"target_modules": ...}, "target_modules is missing"),
        ({"target_modules": None}, "target_modules is wrong"),
        ({"target_modules": []}, "target_modules is wrong"),
        ({"target_modules": [1]}, "target_modules is wrong"),
        ({"target_modules": "(a+)+$"}, "`(a+)+$` is not taken: a group must not be repeated"),
        ({"target_modules": "q_proj"}, "names no module of this base"),
        ({"target_modules": ["q_proj", "v_proj", "c_attn"]}, "does not have: c_attn"),
        ({"target_modules": ["q_proj", "v_proj", "proj"]}, "does not have: proj"),
        ({"exclude_modules": {"a": 1}}, "exclude_modules is wrong"),
        ({"exclude_modules": r"(?=x)"}, "exclude_modules: the expression"),
        ({"rank_pattern": []}, None),
        ({"rank_pattern": [1]}, "rank_pattern is wrong"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern of `q_proj` must be"),
        ({"rank_pattern": {"q_proj": 300}}, "rank_pattern of `q_proj` must be"),
        ({"rank_pattern": {"(x+)+": 2}}, "rank_pattern: the expression `(x+)+` is not taken"),
        ({"alpha_pattern": {"q_proj": "8"}}, "alpha_pattern of `q_proj` must be"),
        (
            {"alpha_pattern": {f"[q]_{i:04}": 1 for i in range(600)}},
            "at most 4096 characters in all",
        ),
        ({"layers_to_transform": [0, 3]}, "does not have: layer 3"),
        ({"layers_to_transform": [-1]}, "layers_to_transform is wrong"),
        ({"layers_to_transform": True}, "layers_to_transform is wrong"),
        ({"layers_pattern": "layers"}, "layers_pattern is wrong: it must be unset without"),
        ({"layers_pattern": "(x+)+", "layers_to_transform": 1}, "a plain name"),
        ({"target_modules": ".*[qv]_proj", "layers_to_transform": 1}, "target_modules is text"),
        ({"loriner_base_digest": "abc"}, "loriner_base_digest is wrong"),
    ],
    ids=str,
)
def test_a_config_that_is_not_served_is_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str | None
) -> None:
    folder = write_adapter(tmp_path, keys=config(**changes))
    if reason is None:
        formats.load(folder, TINY)
    else:
        assert any(reason in found for found in reasons(folder))


def test_lora_bias_and_tensors_must_agree(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "1", keys=config(lora_bias=True))
    assert "lora_bias is set, but 6 modules without a bias" in reasons(folder)[0]
    weights = tensors() | {f"{Q}.lora_B.bias": torch.zeros(16)}
    folder = write_adapter(tmp_path / "2", weights)
    assert "lora_bias is not set, but 1 module with a bias" in reasons(folder)[0]


def test_tied_adapters_are_refused(tmp_path: Path) -> None:
    keys = json.loads((PEFT_FOLDERS / "lm-head" / "adapter_config.json").read_text())
    weights = tensors(("q_proj", "lm_head"))
    folder = write_adapter(tmp_path, weights, keys | {"ensure_weight_tying": True})
    assert "ensure_weight_tying with LoRA on lm_head" in reasons(folder)[0]


Change = Callable[[dict[str, Tensor]], object]


def fill(value: float, key: str = f"{Q}.lora_B.weight") -> Change:
    return lambda t: t[key].view(-1)[3:4].fill_(value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.pop(f"{Q}.lora_A.weight"), "1 module without lora_A"),
        (lambda t: t.pop(f"{Q}.lora_B.weight"), "1 module without lora_B"),
        (
            lambda t: (t.pop(f"{Q}.lora_A.weight"), t.pop(f"{Q}.lora_B.weight")),
            "1 module that the config names without tensors: model.layers.0.self_attn.q_proj",
        ),
        (
            lambda t: t.update({"a.b": torch.ones(2)}),
            "1 tensor that no module of this base takes: a.b",
        ),
        (
            lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(16)}),
            "1 tensor for DoRA, which is not served",
        ),
        (
            lambda t: t.update({f"{Q}.lora_A.default.weight": torch.ones(2, 16)}),
            "1 tensor that no module of this base takes",
        ),
        (
            lambda t: t.update(
                {Q.replace("q_proj", "k_proj") + ".lora_A.weight": torch.ones(2, 16)}
            ),
            "1 module that the config does not name: model.layers.0.self_attn.k_proj",
        ),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(2, 24)}),
            "made for another base: 1 tensor with a shape that does not fit this one: "
            "model.layers.0.self_attn.q_proj.lora_A is [2, 24], not [2, 16]",
        ),
        (lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(24, 2)}), "is [24, 2], not [16, 2]"),
        (lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(16)}), "is [16], not [16, 2]"),
        (
            lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(3, 16)}),
            "1 tensor with another rank than the config says",
        ),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(0, 16)}), "must not be empty"),
        (fill(float("nan")), f"NaN or infinity in {Q}.lora_B.weight"),
        (fill(float("inf")), f"NaN or infinity in {Q}.lora_B.weight"),
        (fill(float("-inf")), f"NaN or infinity in {Q}.lora_B.weight"),
        (
            fill(40_000.0),
            "magnitudes over 65504, once scaled, in model.layers.0.self_attn.q_proj.b",
        ),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(2, 16).double()}), "not F64"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(2, 16).int()}), "not I32"),
        (lambda t: t.clear(), "no tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, change: Change, reason: str) -> None:
    weights = tensors()
    change(weights)
    assert any(reason in found for found in reasons(write_adapter(tmp_path, weights)))


def test_an_adapter_of_another_base_is_named_as_such(tmp_path: Path) -> None:
    found = reasons(write_adapter(tmp_path), module_table(24, 48, 12, 3, 48))
    assert len(found) == 1
    assert found[0].startswith("it was made for another base: 12 tensors")
    assert "is [2, 16], not [2, 24]" in found[0] and "and 7 more" in found[0]


def test_every_reason_comes_in_one_error(tmp_path: Path) -> None:
    weights = tensors() | {
        "stray": torch.ones(2),
        f"{Q}.lora_A.weight": torch.full((2, 16), torch.nan),
    }
    del weights[f"{Q}.lora_B.weight"]
    found = reasons(write_adapter(tmp_path, weights, config(use_dora=True, odd=1)))
    for part in ("DoRA", "`odd` is unknown", "stray", "without lora_B", "NaN"):
        assert any(part in reason for reason in found), part


def test_ten_thousand_faults_make_a_short_message(tmp_path: Path) -> None:
    weights = {f"t{i}": torch.ones(1) for i in range(2000)}
    found = reasons(write_adapter(tmp_path, weights))
    assert sum(map(len, found)) < 2000
    assert any("and 1995 more" in reason for reason in found)


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_its_files_is_refused(tmp_path: Path, missing: str) -> None:
    folder = write_adapter(tmp_path)
    (folder / missing).unlink()
    assert any(missing in reason for reason in reasons(folder))


@pytest.mark.parametrize("num_bytes", [0, 7, 8, 100, 1500, 2839])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, num_bytes: int) -> None:
    folder = write_adapter(tmp_path)
    path = folder / "adapter_model.safetensors"
    content = path.read_bytes()
    assert num_bytes < len(content)
    path.write_bytes(content[:num_bytes])
    assert any("cut" in reason for reason in reasons(folder))


def test_a_thousand_bad_keys_make_a_short_message(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, keys=config() | {f"key{i}": 1 for i in range(1000)})
    found = reasons(folder)
    assert len(found) == 65 and found[-1] == "and 936 reasons more"


def test_the_costliest_config_is_read_in_bounded_time(tmp_path: Path) -> None:
    big = module_table(16, 32, 8, 30, 48)
    names = {f"layers.{i:02}.self_attn.x_proj": 2 for i in range(3500)}
    regexes = {".*a" * 300 + str(i): 2 for i in range(4)}
    keys = config(rank_pattern=names | regexes, alpha_pattern=names | regexes)
    weights = tensors(("q_proj", "v_proj"), modules=big)
    folder = write_adapter(tmp_path, weights, keys)
    start = time.process_time()
    formats.load(folder, big)
    assert time.process_time() - start < 3.0


def test_a_huge_config_is_refused_unread(tmp_path: Path) -> None:
    folder = write_adapter(tmp_path, keys=config(padding="x" * (300 << 10)))
    assert "more than 262144 bytes" in reasons(folder)[0]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 300) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(max_examples=300)
@given(changes=st.dictionaries(st.sampled_from(sorted(config())), JSON, max_size=3))
def test_any_config_is_read_or_refused(changes: dict[str, Any]) -> None:
    parsed, found = parse_config(config(**changes))
    assert all(reason.isprintable() and reason.isascii() for reason in found)
    if parsed is not None:
        for name in TINY:
            parsed.targets.names(name)
            assert 1 <= parsed.rank_of(name) <= 256
            assert abs(parsed.scaling_of(name, parsed.rank_of(name))) <= 1e6


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_a_folder_is_harmless(tmp_path: Path, data: st.DataObject) -> None:
    folder = write_adapter(tmp_path)
    path = folder / data.draw(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        formats.load(folder, TINY)
    except InvalidAdapterError as error:
        assert str(error).isprintable()
