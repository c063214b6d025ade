"""`loriner bench base SHAPE DIR`: a random base as a folder that `loriner serve` opens.

Its tokenizer gives text to every id, so that each token of a stream shows. Bytes of UTF-8 are the
ids below 256.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loriner.bench.shapes import BOS, END_OF_TEXT, EOS, SHAPES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from loriner.bench.random_base import RandomBase

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = {BOS: "<|im_start|>", EOS: "<|im_end|>", END_OF_TEXT: "<|endoftext|>"}
SPACE = "\u0120"  # how byte-level BPE spells a space


def add_command(subparsers: argparse._SubParsersAction[Any]) -> None:
    parser = subparsers.add_parser(
        "base",
        help="write a random NF4 base of a named shape as a folder that can be served",
        description="Writes random weights directly in quantised form (bitsandbytes' layout, double"
        " quantisation), a config.json and a tokenizer. Nothing is downloaded.",
    )
    parser.add_argument("shape", choices=list(SHAPES), metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("target", type=Path, metavar="DIR", help="new folder")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="draws")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import torch

    from loriner.bench.random_base import RandomBase

    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    start = time.perf_counter()
    base = RandomBase(args.shape, device, seed=args.seed)
    write_base(base, args.target)
    seconds = time.perf_counter() - start
    sys.stdout.write(f"{args.target}: {base.num_bytes / 1e9:.2f} GB in {seconds:.1f} s\n")
    return 0


def write_base(base: RandomBase, target: Path) -> None:
    """Write `base` to the new folder `target`. Raises CheckpointError when it exists."""
    from loriner.model.quantize import MAX_SHARD_BYTES, ShardWriter, staged, write_config
    from loriner.model.storage import to_tensors

    with staged(target) as folder:
        writer = ShardWriter(folder, MAX_SHARD_BYTES)
        for name, state in base.records():
            stored = {name: base.tensor(name)}
            if state is not None:
                stored = to_tensors(name, base.quantized(name))
            writer.add({key: tensor.cpu() for key, tensor in stored.items()})
        writer.finish()
        write_config(folder, base.raw, base.double_quant)
        write_tokenizer(folder, base.config.vocab_size, base.config.max_position_embeddings)


def write_tokenizer(folder: Path, vocab_size: int, max_len: int) -> None:
    """tokenizer.json, tokenizer_config.json with a ChatML template, generation_config.json."""
    make_tokenizer(vocab_size).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIALS[BOS],
        "eos_token": SPECIALS[EOS],
        "pad_token": SPECIALS[EOS],
        "unk_token": SPECIALS[END_OF_TEXT],
        "model_max_length": max_len,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    generation = {"bos_token_id": BOS, "eos_token_id": [EOS], "pad_token_id": EOS}
    (folder / "generation_config.json").write_text(json.dumps(generation))


def make_tokenizer(vocab_size: int) -> Tokenizer:
    """Byte-level BPE without merges: texts become bytes, and each further id is a word of its
    own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    assert vocab_size > END_OF_TEXT
    vocab = {char: byte for byte, char in _byte_alphabet().items()}
    vocab |= {text: token for token, text in SPECIALS.items()}
    vocab |= {f"{SPACE}w{token}": token for token in range(END_OF_TEXT + 1, vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIALS.values()])
    return tokenizer


def _byte_alphabet() -> dict[int, str]:
    """GPT-2's spelling of the 256 bytes: printable ones as they are, the others from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    spelled = {byte: chr(byte) for byte in printable}
    return spelled | {byte: chr(256 + i) for i, byte in enumerate(others)}
