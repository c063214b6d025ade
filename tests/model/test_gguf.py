"""GGUF in: weights, config and tokenizer are what the file means; what is not known is refused."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import regex  # type: ignore[import-untyped]
import torch
from torch import Tensor

from loriner.errors import CheckpointError
from loriner.model.config import ModelConfig
from loriner.model.gguf import GgufSource
from loriner.model.quantize import quantize
from loriner.model.weights import Checkpoint
from tests.tiny import IM_END, IM_START, byte_alphabet, tiny_config, tiny_tensors
from tests.tiny_gguf import write_tiny_gguf

FAMILIES = ("llama", "qwen2", "qwen3")

pytestmark = pytest.mark.filterwarnings("ignore")


def open_tokenizer(folder: Path) -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_those_that_were_written(family: str, tmp_path: Path) -> None:
    source = GgufSource(write_tiny_gguf(tmp_path / "m.gguf", architecture=family))
    written = tiny_tensors(tiny_config(family))
    read = dict(source.tensors())

    assert set(read) == set(written)
    for name, tensor in read.items():
        expected = written[name].float()
        span = expected.abs().max().item()
        assert torch.allclose(tensor, expected, atol=span / 15), name  # Q4_1 is the coarsest


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_equal_those_of_transformers(family: str, tied: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    # transformers takes a Qwen3 head to be 128 wide whatever the file says.
    head_dim = 128 if family == "qwen3" else 16
    path = tmp_path / "m.gguf"
    write_tiny_gguf(path, architecture=family, tie_word_embeddings=tied, head_dim=head_dim)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32
    )
    theirs = model.state_dict()
    source = GgufSource(path)

    assert source.model.tie_word_embeddings is tied
    for name, tensor in source.tensors():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_config_is_the_one_that_was_written(family: str, tmp_path: Path) -> None:
    source = GgufSource(write_tiny_gguf(tmp_path / "m.gguf", architecture=family))

    assert source.model == ModelConfig.from_hf(tiny_config(family))


def test_the_quantised_folder_holds_the_files_values_in_bf16(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf")
    digest = quantize(path, tmp_path / "nf4", double_quant=True)
    checkpoint = Checkpoint.open(tmp_path / "nf4")
    dense = {name: tensor.bfloat16() for name, tensor in GgufSource(path).tensors()}

    assert checkpoint.base_digest == digest
    assert checkpoint.config.eos_token_ids == (IM_END,)
    for name in ("model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"):
        assert torch.equal(checkpoint.tensor(name), dense[name])


def test_the_quantised_folder_needs_no_gguf(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf")
    quantize(path, tmp_path / "nf4", double_quant=True)
    path.unlink()
    tokenizer = open_tokenizer(tmp_path / "nf4")
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    settings = json.loads((tmp_path / "nf4" / "tokenizer_config.json").read_text())

    assert chat == "<|im_start|>user\nhi<|im_end|>\n"
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id) == (IM_END, IM_START)
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["model_max_length"] == 512


def test_an_end_of_turn_token_is_an_end_token(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", keys={"tokenizer.ggml.eot_token_id": 258})
    quantize(path, tmp_path / "nf4", double_quant=True)

    assert Checkpoint.open(tmp_path / "nf4").config.eos_token_ids == (IM_END, 258)


@pytest.mark.parametrize(
    ("pre", "text", "tokens"),
    [
        ("smollm", "hi  1", ["hi", "ĠĠ", "1"]),  # digits are cut off before spaces are
        ("smollm", "12", ["1", "2"]),
        ("gpt-2", "hi  1", ["hi", "Ġ", "Ġ", "1"]),
        ("gpt-2", "12", ["12"]),
        ("llama-bpe", "12", ["12"]),
    ],
)
def test_text_is_cut_as_the_file_says(
    pre: str, text: str, tokens: list[str], tmp_path: Path
) -> None:
    quantize(write_tiny_gguf(tmp_path / "m.gguf", pre=pre), tmp_path / "nf4", double_quant=True)
    tokenizer = open_tokenizer(tmp_path / "nf4")
    ids = tokenizer.encode(text, add_special_tokens=False)

    assert tokenizer.convert_ids_to_tokens(ids) == tokens
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    ("pre", "keys", "begins"),
    [
        ("smollm", {}, False),
        ("smollm", {"tokenizer.ggml.add_bos_token": True}, True),
        ("llama-bpe", {}, True),
        ("llama-bpe", {"tokenizer.ggml.add_bos_token": False}, False),
    ],
)
def test_text_begins_with_bos_when_the_file_says_so(
    pre: str, keys: dict[str, Any], begins: bool, tmp_path: Path
) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", pre=pre, keys=keys)
    quantize(path, tmp_path / "nf4", double_quant=True)
    tokenizer = open_tokenizer(tmp_path / "nf4")

    assert tokenizer.encode("a") == ([IM_START] if begins else []) + [ord("a")]
    assert tokenizer.encode("a", add_special_tokens=False) == [ord("a")]


def llama3_divisors(factor: float) -> Tensor:
    """rope_freqs as llama.cpp's converter computes them, for theta 500000 and head size 16."""
    divisors = []
    for i in range(0, 16, 2):
        wavelength = 2 * math.pi * 500000.0 ** (i / 16)
        smooth = (8192 / wavelength - 1) / 3
        middle = 1 / ((1 - smooth) / factor + smooth)
        divisors.append(1.0 if wavelength < 2048 else factor if wavelength > 8192 else middle)
    return torch.tensor(divisors)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recognised_in_its_tensor(factor: float, tmp_path: Path) -> None:
    tensors = {"rope_freqs.weight": llama3_divisors(factor)}
    path = write_tiny_gguf(tmp_path / "m.gguf", tensors=tensors, rope_theta=500000.0)
    scaling = GgufSource(path).model.rope_scaling

    assert (scaling.kind, scaling.factor) == ("llama3", factor)
    assert scaling.original_max_position_embeddings == 8192


def test_yarn_scaling_is_read(tmp_path: Path) -> None:
    keys = {
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 128,
    }
    path = write_tiny_gguf(tmp_path / "m.gguf", architecture="qwen2", keys=keys)
    scaling = GgufSource(path).model.rope_scaling

    assert (scaling.kind, scaling.factor) == ("yarn", 4.0)
    assert scaling.original_max_position_embeddings == 128


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keys": {"llama.attention.scale": 0.1}}, "llama.attention.scale is not supported"),
        ({"keys": {"llama.expert_count": 8}}, "expert_count"),
        ({"keys": {"llama.attention.value_length": 32}}, "attention.value_length 32"),
        ({"keys": {"llama.rope.scaling.type": "longrope"}}, "rope type 'longrope'"),
        ({"tensors": {"blk.0.attn_sinks.weight": torch.ones(4)}}, "blk.0.attn_sinks.weight"),
        ({"tensors": {"blk.7.attn_q.weight": torch.ones(4, 4)}}, "layers.7.self_attn.q_proj"),
        ({"tensors": {"rope_freqs.weight": torch.full((8,), 3.0)}}, "not Llama 3's"),
    ],
)
def test_what_would_change_the_maths_is_refused_by_name(
    options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=words):
        GgufSource(write_tiny_gguf(tmp_path / "m.gguf", **options))


def test_another_architecture_is_refused_by_name(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()

    with pytest.raises(CheckpointError, match="architecture 'mamba'"):
        GgufSource(tmp_path / "m.gguf")


def test_an_unknown_way_of_cutting_text_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", pre="viking")

    with pytest.raises(CheckpointError, match=r"tokenizer.ggml.pre 'viking'"):
        quantize(path, tmp_path / "nf4", double_quant=True)

    assert [entry.name for entry in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("keep", [0, 3, 100, -200])
def test_a_damaged_file_is_refused(keep: int, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:keep])

    with pytest.raises(CheckpointError, match=r"m\.gguf"):
        GgufSource(path)


class TestSmolLm2:
    """The tokenizer of the real base against llama.cpp's algorithm, written out."""

    # llama.cpp splits by each of these in turn; what none matches stays a word of its own.
    SPLITS = (
        r"\p{N}",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    )
    TEXTS = (
        "Hello 12345 world  \n\n x=10  y's",
        "a  12   3\n 7\t8",
        "def f(x):\n    return x**2 # 3.14\n\tif y:\n\t\t 42\n",
        "émile Ünïcödé 日本語 テスト 123 ٣٤ ½ Ⅳ",
        "🎉👩‍👩‍👧 emoji 7 \u00a0x\u200bz\r\n\r\n1",
        "I'll they've DON'T 'S it's ...!!!???###",
        "<|im_start|>user\nhi 5<|im_end|>\n",
    )

    def test_tokens_are_those_of_llama_cpp(self, smollm2: Path) -> None:
        tokenizer = open_tokenizer(smollm2)
        model = json.loads((smollm2 / "tokenizer.json").read_text())
        rng = random.Random(0)
        pieces = [*"abXY 012\n\t.,'\"(){}é日½٣🎉\u00a0", "<|im_end|>", "'s", "  "]
        noise = ["".join(rng.choices(pieces, k=rng.randint(1, 40))) for _ in range(150)]
        for text in (*self.TEXTS, *noise):
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert ids == self.llama_cpp(text, model), text
            assert tokenizer.decode(ids) == text

    def test_chat_has_the_default_system_prompt(self, smollm2: Path) -> None:
        tokenizer = open_tokenizer(smollm2)
        chat = [{"role": "user", "content": "hi"}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)

        assert tokenizer.eos_token == "<|im_end|>"
        assert text == (
            "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
            "Face<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        )

    def llama_cpp(self, text: str, model: dict[str, Any]) -> list[int]:
        vocab = model["model"]["vocab"]
        ranks = {tuple(pair): rank for rank, pair in enumerate(model["model"]["merges"])}
        specials = {token["content"] for token in model["added_tokens"]}
        ids: list[int] = []
        for part in regex.split("(" + "|".join(map(regex.escape, sorted(specials))) + ")", text):
            words = [part]
            if part not in specials:
                for pattern in self.SPLITS:
                    words = [piece for word in words for piece in self.cut(pattern, word)]
            for word in words:
                ids += [vocab[token] for token in self.merge(word, ranks, part in specials)]
        return ids

    def cut(self, pattern: str, word: str) -> list[str]:
        return [piece for piece in regex.split(f"({pattern})", word) if piece]

    def merge(self, word: str, ranks: dict[tuple[str, ...], int], is_special: bool) -> list[str]:
        if is_special:
            return [word]
        tokens = [byte_alphabet()[byte] for byte in word.encode()]
        while len(tokens) > 1:
            pairs = list(zip(tokens, tokens[1:], strict=False))
            best = min(range(len(pairs)), key=lambda i: (ranks.get(pairs[i], math.inf), i))
            if pairs[best] not in ranks:
                break
            tokens[best : best + 2] = ["".join(pairs[best])]
        return tokens
