"""quantize: a dense folder in, an NF4 folder out, whole or not at all, one shard at a time."""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loriner.errors import CheckpointError
from loriner.kernels.operands import Nf4
from loriner.model import quantize as module
from loriner.model.nf4 import quantize_nf4
from loriner.model.quantize import quantize
from loriner.model.shards import Shards
from loriner.model.weights import Checkpoint
from tests.tiny import tiny_config, tiny_tensors, write_tiny_dense

QUERY = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return write_tiny_dense(tmp_path / "dense", tie_word_embeddings=False)


def split(folder: Path, num_shards: int) -> Path:
    """Turn a folder with one file into one with `num_shards`."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-{i % num_shards}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        part = {name: tensors[name].clone() for name in tensors if files[name] == file}
        save_file(part, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def rewrite(folder: Path, **changes: Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = {k: v.clone() for k, v in load_file(path).items()} | changes
    path.unlink()
    save_file({k: v for k, v in tensors.items() if v is not None}, path)


def siblings(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.iterdir() if entry.name != "dense")


@pytest.mark.parametrize("double_quant", [False, True])
def test_linears_are_quantised_and_all_else_is_bf16(
    double_quant: bool, dense: Path, tmp_path: Path
) -> None:
    digest = quantize(dense, tmp_path / "nf4", double_quant=double_quant)
    checkpoint, source = Checkpoint.open(tmp_path / "nf4"), load_file(dense / "model.safetensors")

    assert checkpoint.base_digest == digest
    for name in checkpoint.config.linears():
        weight = checkpoint.linear(name)
        assert isinstance(weight, Nf4)
        expected = quantize_nf4(source[f"{name}.weight"], double_quant=double_quant)
        assert torch.equal(weight.packed, expected.packed)
        assert torch.equal(weight.expanded(), expected.expanded())
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(checkpoint.tensor(name), source[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_are_rounded_to_bf16_first(
    dtype: torch.dtype, dense: Path, tmp_path: Path
) -> None:
    source = {k: torch.randn(v.shape) for k, v in load_file(dense / "model.safetensors").items()}
    rewrite(dense, **{k: v.to(dtype) for k, v in source.items()})
    first = quantize(dense, tmp_path / "a", double_quant=True)
    rewrite(dense, **{k: v.to(dtype).bfloat16() for k, v in source.items()})

    assert quantize(dense, tmp_path / "b", double_quant=True) == first


def test_tokenizer_and_licence_travel_and_code_does_not(dense: Path, tmp_path: Path) -> None:
    for name in ("LICENSE", "modeling_x.py", "pytorch_model.bin", "chat_template.jinja"):
        (dense / name).write_text(name)
    config = json.loads((dense / "config.json").read_text())
    strange = {"auto_map": {"AutoModel": "modeling_x.X"}, "_name_or_path": "/somewhere"}
    (dense / "config.json").write_text(json.dumps(config | strange))
    quantize(dense, tmp_path / "nf4", double_quant=True)

    assert sorted(path.name for path in (tmp_path / "nf4").iterdir()) == [
        "LICENSE",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "loriner.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    written = json.loads((tmp_path / "nf4" / "config.json").read_text())
    assert not {"auto_map", "_name_or_path"} & set(written)
    assert written["quantization_config"]["bnb_4bit_use_double_quant"] is True


def test_shards_of_source_and_target_do_not_change_the_base(dense: Path, tmp_path: Path) -> None:
    whole = quantize(dense, tmp_path / "whole", double_quant=True)
    split(dense, 3)
    parts = quantize(dense, tmp_path / "parts", double_quant=True, max_shard_bytes=30_000)
    files = sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors"))

    assert parts == whole
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert len(Checkpoint.open(tmp_path / "parts")._shards.files) == len(files)


def test_a_sharded_target_opens_with_transformers(dense: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    quantize(dense, tmp_path / "whole", double_quant=True)
    quantize(dense, tmp_path / "parts", double_quant=True, max_shard_bytes=30_000)
    one, many = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        for name in ("whole", "parts")
    )
    ids = torch.tensor([[1, 2, 3]])

    assert torch.equal(one(ids).logits, many(ids).logits)


def test_no_more_than_one_shard_of_the_source_is_alive(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors are dropped one by one, and each file is closed before the next opens."""
    split(dense, 4)
    alive: list[weakref.ref[Tensor]] = []
    most, handles = [0], set()
    get = Shards.get

    def tracked(shards: Shards, name: str) -> Tensor:
        tensor = get(shards, name)
        if shards.folder == dense:
            alive.append(weakref.ref(tensor))
            most[0] = max(most[0], sum(ref() is not None for ref in alive))
            handles.add(len(shards._open))
        return tensor

    monkeypatch.setattr(Shards, "get", tracked)
    quantize(dense, tmp_path / "nf4", double_quant=True)

    assert len(alive) == len(tiny_tensors(tiny_config(tie_word_embeddings=False)))
    assert most[0] <= 2  # the one at hand and the one before it
    assert handles == {1}


def test_no_more_than_one_shard_of_the_target_is_held(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def save(tensors: dict[str, Tensor], path: Path, **options: Any) -> None:
        sizes.append((len(tensors), sum(tensor.nbytes for tensor in tensors.values())))
        save_file(tensors, path, **options)

    monkeypatch.setattr(module, "save_file", save)
    quantize(dense, tmp_path / "nf4", double_quant=True, max_shard_bytes=20_000)

    assert len(sizes) > 3
    assert all(size <= 20_000 or count == 1 for count, size in sizes)


def test_progress_counts_every_tensor(dense: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    quantize(dense, tmp_path / "nf4", double_quant=True, progress=lambda *event: seen.append(event))
    total = len(tiny_tensors(tiny_config(tie_word_embeddings=False)))

    assert seen == [("quantize", done, total) for done in range(total + 1)]


@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError, SystemExit])
def test_an_interrupted_run_leaves_nothing(
    fault: type[BaseException], dense: Path, tmp_path: Path
) -> None:
    def interrupt(_: str, done: int, total: int) -> None:
        if done == total // 2:
            raise fault

    with pytest.raises(fault):
        quantize(dense, tmp_path / "nf4", double_quant=True, progress=interrupt)

    assert siblings(tmp_path / "nf4") == []


def test_a_target_that_appears_meanwhile_is_not_overwritten(dense: Path, tmp_path: Path) -> None:
    target = tmp_path / "nf4"

    def appear(_: str, done: int, total: int) -> None:
        if done == total:
            target.mkdir()
            (target / "mine").write_text("kept")

    with pytest.raises(CheckpointError, match="exists already"):
        quantize(dense, target, double_quant=True, progress=appear)

    assert [path.name for path in target.iterdir()] == ["mine"]
    assert siblings(target) == ["nf4"]


def test_an_existing_target_is_refused_before_any_work(dense: Path, tmp_path: Path) -> None:
    target = tmp_path / "nf4"
    target.mkdir()
    (target / "mine").write_text("kept")

    with pytest.raises(CheckpointError, match="exists already"):
        quantize(dense, target, double_quant=True)

    assert (target / "mine").read_text() == "kept"


def test_an_empty_target_folder_and_missing_parents_are_fine(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    quantize(dense, tmp_path / "empty", double_quant=True)
    quantize(dense, tmp_path / "deep" / "er" / "nf4", double_quant=True)

    assert (tmp_path / "deep" / "er" / "nf4" / "config.json").stat().st_mode & 0o444 == 0o444


def bad_sources(dense: Path) -> Iterator[tuple[str, dict[str, Tensor | None], dict[str, Any]]]:
    weight = f"{QUERY}.weight"
    nan = torch.full((64, 64), float("nan"))
    yield f"{weight} has NaN or infinite values", {weight: nan}, {}
    yield f"{weight} is missing", {weight: None}, {}
    yield "model.layers.0.extra.weight has no place", {"model.layers.0.extra.weight": nan}, {}
    yield f"{weight} has shape", {weight: torch.ones(64, 32)}, {}
    yield f"{weight} has dtype I8", {weight: torch.ones(64, 64, dtype=torch.int8)}, {}
    yield "quantised already", {}, {"quantization_config": {"quant_method": "gptq"}}
    yield "model_type 'mixtral'", {}, {"model_type": "mixtral"}


@pytest.mark.parametrize("case", range(7))
def test_a_bad_source_is_refused_by_name_and_leaves_nothing(
    case: int, dense: Path, tmp_path: Path
) -> None:
    words, tensors, options = list(bad_sources(dense))[case]
    rewrite(dense, **tensors)
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(config | options))

    with pytest.raises(CheckpointError, match=words):
        quantize(dense, tmp_path / "nf4", double_quant=True)

    assert siblings(tmp_path / "nf4") == []


def test_inputs_that_do_not_fill_blocks_are_refused(tmp_path: Path) -> None:
    dense = write_tiny_dense(tmp_path / "dense", intermediate_size=100)

    with pytest.raises(CheckpointError, match="down_proj has 100 inputs"):
        quantize(dense, tmp_path / "nf4", double_quant=True)


@pytest.mark.parametrize("name", ["nothing", "file.txt"])
def test_a_source_that_is_no_model_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("text")

    with pytest.raises(CheckpointError, match=r"neither a Hugging Face folder nor a \.gguf file"):
        quantize(tmp_path / name, tmp_path / "nf4", double_quant=True)
