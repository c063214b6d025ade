"""Checkpoint: our folders, those of transformers and bitsandbytes, bad ones, and the digest."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loriner.errors import CheckpointError
from loriner.kernels import reference
from loriner.kernels.operands import Nf4
from loriner.model.weights import Checkpoint
from tests.tiny import CLASSES, IM_END, write_tiny_base, write_tiny_dense

QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny_base(tmp_path / "base")


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, changes: dict[str, Tensor | None]) -> None:
    """Replace or add tensors; None removes one."""
    path = folder / "model.safetensors"
    tensors = {**load_file(path), **changes}
    kept = {name: tensor.clone() for name, tensor in tensors.items() if tensor is not None}
    path.unlink()
    save_file(kept, path)


def dequantized(checkpoint: Checkpoint, name: str) -> Tensor:
    weight = checkpoint.linear(name)
    return reference.dequantized(weight) if isinstance(weight, Nf4) else weight.float()


def bitsandbytes_weights(model: Any) -> dict[str, Tensor]:
    """What bitsandbytes makes of every linear of a transformers model, f32."""
    functional = pytest.importorskip("bitsandbytes.functional")
    weights = {}
    for name, module in model.named_modules():
        if type(module).__name__ == "Linear4bit":
            state = module.weight.quant_state
            state.dtype = torch.float32
            weights[name] = functional.dequantize_4bit(module.weight.data, state)
    return weights


class TestInterchange:
    """With transformers and bitsandbytes, both ways."""

    pytestmark = pytest.mark.filterwarnings("ignore")

    @pytest.mark.parametrize("double_quant", [False, True])
    @pytest.mark.parametrize("family", sorted(CLASSES))
    def test_transformers_opens_our_folder_unchanged(
        self, family: str, double_quant: bool, tmp_path: Path
    ) -> None:
        transformers = pytest.importorskip("transformers")
        folder = write_tiny_base(tmp_path / "base", family=family, double_quant=double_quant)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        ours = Checkpoint.open(folder)
        theirs = bitsandbytes_weights(model)

        assert set(theirs) == set(ours.config.linears())
        for name, expected in theirs.items():
            assert torch.equal(dequantized(ours, name), expected), name
        norm = model.get_parameter("model.norm.weight")
        assert torch.equal(ours.tensor("model.norm.weight").float(), norm)
        assert torch.isfinite(model(torch.tensor([[72, 105]])).logits).all()

    @pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float32"])
    @pytest.mark.parametrize("double_quant", [False, True])
    def test_ours_opens_what_transformers_wrote(
        self, double_quant: bool, storage: str, tmp_path: Path
    ) -> None:
        folder = quantized_by_transformers(tmp_path, double_quant, storage)
        transformers = pytest.importorskip("transformers")
        theirs = bitsandbytes_weights(
            transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        )
        ours = Checkpoint.open(folder)

        assert ours.is_quantized
        assert set(theirs) == set(ours.config.linears())
        for name, expected in theirs.items():
            assert torch.equal(dequantized(ours, name), expected), name

    def test_storage_dtype_does_not_change_the_digest(self, tmp_path: Path) -> None:
        digests = {
            Checkpoint.open(quantized_by_transformers(tmp_path / s, True, s)).base_digest
            for s in ("uint8", "bfloat16")
        }

        assert len(digests) == 1

    def test_without_nesting_both_ways_of_quantising_have_one_digest(self, tmp_path: Path) -> None:
        theirs = quantized_by_transformers(tmp_path / "theirs", False, "uint8")
        ours = write_tiny_base(tmp_path / "ours", double_quant=False)

        assert Checkpoint.open(ours).base_digest == Checkpoint.open(theirs).base_digest

    def test_tokenizer_and_chat_template_open_with_transformers(self, base: Path) -> None:
        transformers = pytest.importorskip("transformers")
        tokenizer = transformers.AutoTokenizer.from_pretrained(base)
        chat = [{"role": "user", "content": "hi é"}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]

        assert tokenizer.decode(ids) == (
            "<|im_start|>user\nhi é<|im_end|>\n<|im_start|>assistant\n"
        )
        assert tokenizer.encode("a\x00é") == [97, 0, 0xC3, 0xA9]
        assert tokenizer.eos_token_id == IM_END


def quantized_by_transformers(folder: Path, double_quant: bool, storage: str) -> Path:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    dense = write_tiny_dense(folder / "dense")
    recipe = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_storage=storage,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=recipe, dtype=torch.bfloat16
    )
    model.save_pretrained(folder / "nf4")
    return folder / "nf4"


def test_parts_have_the_promised_shapes_and_dtypes(base: Path) -> None:
    weight = Checkpoint.open(base).linear(QUERY)
    assert isinstance(weight, Nf4)

    assert (weight.packed.dtype, weight.packed.shape) == (torch.uint8, (64 * 64 // 2,))
    assert (weight.expanded().dtype, weight.expanded().shape) == (torch.float32, (64,))
    assert (weight.code.dtype, weight.code.shape) == (torch.float32, (16,))
    assert (reference.dequantized(weight).dtype, reference.dequantized(weight).shape) == (
        torch.float32,
        (64, 64),
    )


def test_dense_tensors_come_as_stored(base: Path) -> None:
    checkpoint = Checkpoint.open(base)

    assert checkpoint.tensor("model.embed_tokens.weight").dtype == torch.bfloat16
    assert checkpoint.has("model.norm.weight")
    assert not checkpoint.has("lm_head.weight")
    with pytest.raises(CheckpointError, match="nothing.weight"):
        checkpoint.tensor("nothing.weight")


def test_a_tensor_is_read_from_the_file_once(base: Path) -> None:
    checkpoint = Checkpoint.open(base)
    first = checkpoint.tensor("model.embed_tokens.weight")

    assert checkpoint.tensor("model.embed_tokens.weight").data_ptr() == first.data_ptr()


def test_a_tied_head_is_the_embedding(base: Path) -> None:
    checkpoint = Checkpoint.open(base)
    head = checkpoint.linear("lm_head")
    assert isinstance(head, Tensor)

    assert head.data_ptr() == checkpoint.tensor("model.embed_tokens.weight").data_ptr()


def test_an_untied_head_is_its_own_tensor(tmp_path: Path) -> None:
    folder = write_tiny_base(tmp_path / "base", tie_word_embeddings=False)
    checkpoint = Checkpoint.open(folder)
    head = checkpoint.linear("lm_head")
    assert isinstance(head, Tensor)

    assert not torch.equal(head, checkpoint.tensor("model.embed_tokens.weight"))


def test_a_dense_folder_opens_with_dense_linears(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_tiny_dense(tmp_path / "dense"))

    assert isinstance(checkpoint.linear(QUERY), Tensor)
    assert not checkpoint.is_quantized


def test_size_is_that_of_the_tensors(base: Path) -> None:
    stored = load_file(base / "model.safetensors")

    assert Checkpoint.open(base).num_bytes == sum(tensor.nbytes for tensor in stored.values())


def test_end_tokens_of_the_generation_config_come_first(base: Path) -> None:
    edit_json(base / "generation_config.json", eos_token_id=[300, IM_END])

    assert Checkpoint.open(base).config.eos_token_ids == (300, IM_END)


def test_rotary_tables_and_a_copy_of_the_tied_head_are_no_obstacle(base: Path) -> None:
    digest = Checkpoint.open(base).base_digest
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    tables = torch.ones(8)
    copies = {"lm_head.weight": embedding, "model.layers.0.self_attn.rotary_emb.inv_freq": tables}
    edit_tensors(base, {**copies})

    assert Checkpoint.open(base).base_digest == digest


STATE = f"{QUERY}.weight.quant_state.bitsandbytes__nf4"


def state_json(**changes: Any) -> Tensor:
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [64, 64]}
    state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 1.0, **changes}
    return torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.norm.weight": None}, "model.norm.weight is missing"),
        ({"model.norm.weight": torch.ones(65)}, r"model.norm.weight has shape \[65\]"),
        ({"model.norm.weight": torch.ones(64, dtype=torch.int8)}, "dtype I8"),
        ({"model.extra.bias": torch.ones(1)}, "model.extra.bias has no place"),
        ({f"{QUERY}.weight.absmax": None}, "q_proj.weight.absmax is missing"),
        ({f"{QUERY}.weight.nested_absmax": None}, "nested_absmax is missing"),
        ({f"{QUERY}.weight.absmax": torch.zeros(9, dtype=torch.uint8)}, "absmax has 9 bytes"),
        ({f"{QUERY}.weight": torch.zeros(9, 1, dtype=torch.uint8)}, "has 9 bytes, expected 2048"),
        ({STATE: torch.zeros(3, dtype=torch.uint8)}, "quant_state is malformed"),
        ({STATE: state_json(quant_type="fp4")}, "quant_type 'fp4'"),
        ({STATE: state_json(blocksize=128)}, "in blocks of 128"),
        ({STATE: state_json(nested_blocksize=64)}, "scales in blocks of 64"),
        ({STATE: state_json(shape=[128, 32])}, r"shape \(128, 32\)"),
        ({STATE: state_json(shape=[32, 128])}, r"q_proj.weight has shape \[32, 128\]"),
    ],
)
def test_a_folder_with_wrong_tensors_is_refused_by_name(
    changes: dict[str, Tensor | None], words: str, base: Path
) -> None:
    edit_tensors(base, changes)

    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open(base)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "'gptq'"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "without load_in_4bit"),
        (
            {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "fp4",
            },
            "type nf4",
        ),
    ],
)
def test_other_quantisations_are_refused(recipe: dict[str, Any], words: str, base: Path) -> None:
    edit_json(base / "config.json", quantization_config=recipe)

    with pytest.raises(CheckpointError, match=words):
        Checkpoint.open(base)


def test_missing_and_malformed_files_are_refused(base: Path) -> None:
    weights, config = base / "model.safetensors", base / "config.json"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="model.safetensors"):
        Checkpoint.open(base)
    weights.rename(base / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin is pickled and is not read"):
        Checkpoint.open(base)
    config.write_text("[]")
    with pytest.raises(CheckpointError, match="not a JSON object"):
        Checkpoint.open(base)
    config.unlink()
    with pytest.raises(CheckpointError, match="config.json does not exist"):
        Checkpoint.open(base)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", 3])
def test_an_index_may_only_name_files_of_the_folder(name: object, base: Path) -> None:
    index = {"weight_map": {"model.norm.weight": name}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(CheckpointError, match="not a file of this folder"):
        Checkpoint.open(base)


def expected_record(name: str, stored: dict[str, Tensor]) -> bytes:
    """One record by the text of `loriner.model.digest`, written a second time."""
    if f"{name}.absmax" not in stored:
        head: list[Any] = [name, "bfloat16", list(stored[name].shape)]
        parts = [stored[name]]
    else:
        state = json.loads(bytes(stored[f"{name}.quant_state.bitsandbytes__nf4"].numpy()))
        nested = "nested_offset" in state
        parts = [stored[name], stored[f"{name}.absmax"]]
        if nested:
            parts += [stored[f"{name}.nested_absmax"], stored[f"{name}.nested_quant_map"]]
            parts.append(torch.tensor([state["nested_offset"]], dtype=torch.float32))
        parts.append(stored[f"{name}.quant_map"])
        head = [name, "nf4-nested" if nested else "nf4", state["shape"]]
    record = json.dumps(head).encode() + b"\n"
    for part in parts:
        raw = part.view(torch.uint8).numpy().tobytes()
        record += len(raw).to_bytes(8, "little") + raw
    return record


class TestDigest:
    """base_digest and its cache."""

    def test_is_stable_for_a_given_base(self, tmp_path: Path) -> None:
        first = Checkpoint.open(write_tiny_base(tmp_path / "a")).base_digest

        assert first == Checkpoint.open(write_tiny_base(tmp_path / "b")).base_digest
        assert first != Checkpoint.open(write_tiny_base(tmp_path / "c", seed=1)).base_digest

    @pytest.mark.parametrize("double_quant", [False, True])
    def test_is_what_its_documentation_says(self, double_quant: bool, tmp_path: Path) -> None:
        base = write_tiny_base(tmp_path / "base", double_quant=double_quant)
        stored = load_file(base / "model.safetensors")
        digest = hashlib.sha256()
        for name in sorted(name for name in stored if name.endswith(("weight", "bias"))):
            digest.update(expected_record(name, stored))

        assert Checkpoint.open(base).base_digest == digest.hexdigest()

    @pytest.mark.parametrize("double_quant", [False, True])
    def test_every_stored_byte_that_serves_counts(self, double_quant: bool, tmp_path: Path) -> None:
        base = write_tiny_base(tmp_path / "base", double_quant=double_quant)
        original = Checkpoint.open(base).base_digest
        for name, tensor in load_file(base / "model.safetensors").items():
            if "quant_state" in name:
                continue
            changed = tensor.clone()
            changed.view(-1).view(torch.uint8)[-1] ^= 1
            copy = tmp_path / "copy"
            shutil.copytree(base, copy)
            edit_tensors(copy, {name: changed})
            assert Checkpoint.open(copy).base_digest != original, name
            shutil.rmtree(copy)

    def test_the_nested_offset_counts(self, base: Path) -> None:
        original = Checkpoint.open(base).base_digest
        edit_tensors(base, {STATE: state_json()})

        assert Checkpoint.open(base).base_digest != original

    def test_is_equal_computed_and_cached(self, base: Path) -> None:
        cached = json.loads((base / "loriner.json").read_text())["base_digest"]
        (base / "loriner.json").unlink()
        computed = Checkpoint.open(base).base_digest

        assert computed == cached
        assert json.loads((base / "loriner.json").read_text())["base_digest"] == cached

    def test_a_fresh_cache_is_believed(self, base: Path) -> None:
        edit_json(base / "loriner.json", base_digest="0" * 64)

        assert Checkpoint.open(base).base_digest == "0" * 64

    @pytest.mark.parametrize("damage", ["{", "[]", '{"format": 0}', '{"format": 1}'])
    def test_a_damaged_cache_is_replaced(self, damage: str, base: Path) -> None:
        original = Checkpoint.open(base).base_digest
        (base / "loriner.json").write_text(damage)

        assert Checkpoint.open(base).base_digest == original
        assert original in (base / "loriner.json").read_text()

    def test_a_changed_file_is_noticed_by_its_time(self, base: Path) -> None:
        original = Checkpoint.open(base).base_digest
        path = base / "model.safetensors"
        raw = bytearray(path.read_bytes())
        header = 8 + int.from_bytes(raw[:8], "little")
        start = json.loads(raw[8:header])["model.norm.weight"]["data_offsets"][0]
        raw[header + start] ^= 1
        path.write_bytes(raw)

        assert Checkpoint.open(base).base_digest != original

    def test_a_changed_file_is_noticed_by_its_size(self, base: Path) -> None:
        original = Checkpoint.open(base).base_digest
        path = base / "model.safetensors"
        before = path.stat()
        edit_tensors(base, {"model.norm.weight": torch.ones(64)})
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

        assert Checkpoint.open(base).base_digest != original

    def test_a_folder_that_cannot_be_written_still_has_a_digest(
        self, base: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        original = Checkpoint.open(base).base_digest
        (base / "loriner.json").unlink()

        def refuse(*_: object) -> None:
            raise PermissionError

        monkeypatch.setattr(os, "replace", refuse)
        assert Checkpoint.open(base).base_digest == original
