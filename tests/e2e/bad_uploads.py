"""Uploads that must be refused: for each kind its request, and what the refusal has to say.

Made from one good adapter folder, so that the fault is the only reason.
"""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from tests.adapters.samples import raw_safetensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
NUM_TENSORS = 200_000
BOMB_BYTES = 48 << 20
Files = dict[str, bytes]  # name -> content


@dataclass(frozen=True)
class BadUpload:
    """`request` are arguments of httpx.post; `reason` is a pattern of the refusal's message."""

    reason: str
    request: Mapping[str, Any]
    status: int = 422


def bad_uploads(folder: Path, name: str) -> dict[str, BadUpload]:
    """Every kind, each asking to publish as `name`; `folder` holds a good adapter."""
    good = {path.name: path.read_bytes() for path in folder.iterdir()}
    weights = load(good[WEIGHTS])

    def parts(reason: str, **changed: bytes) -> BadUpload:
        renamed = {CONFIG: changed.get("config"), WEIGHTS: changed.get("weights")}
        files = good | {key: value for key, value in renamed.items() if value is not None}
        files |= {"loriner.json": changed["note"]} if "note" in changed else {}
        return BadUpload(reason, _form(name, files))

    def archive(reason: str, content: bytes, status: int = 422) -> BadUpload:
        return BadUpload(reason, _form(name, {"archive": content}), status)

    def keys(**changes: Any) -> bytes:
        return json.dumps({**json.loads(good[CONFIG]), **changes}).encode()

    twice = good[WEIGHTS].replace(b".1.self_attn", b".0.self_attn")  # of the header alone
    return {
        "cut multipart": BadUpload("closing boundary", _cut(name, good), 400),
        "pickle as a part": BadUpload(
            "adapter_model.bin", _form(name, {**good, PICKLE: b"x"}), 400
        ),
        "truncated weights": parts("it is cut", weights=good[WEIGHTS][:-10]),
        "wrong rank": parts("another rank", weights=save(_each(weights, _add_rank))),
        "not finite": parts("NaN", weights=save(_each(weights, _spoil))),
        "unmatched tensor": parts("stranger", weights=save({**weights, "stranger": torch.ones(2)})),
        "other base's shapes": parts("made for another base", weights=save(_each(weights, _widen))),
        "other base's digest": parts(
            "trained on another base", note=json.dumps({"base_digest": "0" * 64}).encode()
        ),
        "many tensors": parts("header of .* claims", weights=_many_tensors()),
        "duplicate tensors": parts("occurs twice", weights=twice),
        "pickle as weights": parts("pickle", weights=pickle.dumps({"a": 1}, 4)),
        "DoRA": parts("DoRA", config=keys(use_dora=True)),
        "unknown key": parts("magic_factor", config=keys(magic_factor=2)),
        "duplicate keys": parts("occurs twice", config=good[CONFIG].replace(b"{", b'{"r": 9, ', 1)),
        "pickle in a tar": archive("may hold a pickle", _tar({**good, PICKLE: b"x"})),
        "parent name in a tar": archive("leads out", _tar({**good, "../adapter.json": b"{}"})),
        "parent name in a zip": archive("leads out", _zip({**good, "../adapter.json": b"{}"})),
        "link in a tar": archive("link", _tar(good, _link(CONFIG))),
        "name twice in a zip": archive("twice", _zip(good, {"./" + CONFIG: good[CONFIG]})),
        "bomb in a zip": archive("bytes", _zip({CONFIG: b"{}", WEIGHTS: bytes(BOMB_BYTES)}), 413),
        "bomb in a tar.gz": archive(
            "bytes", _tar({CONFIG: b"{}", WEIGHTS: bytes(BOMB_BYTES)}, mode="w:gz"), 413
        ),
    }


def _form(name: str, files: Files) -> dict[str, Any]:
    return {"data": {"name": name}, "files": {k: (k, v) for k, v in files.items()}}


def _cut(name: str, files: Files) -> dict[str, Any]:
    """A body of the announced length that ends in the middle of the weights."""
    lines = []
    for field, value in {"name": name.encode(), **files}.items():
        where = f'filename="{field}"; ' if field in files else ""
        lines.append(f'--cut\r\ncontent-disposition: form-data; {where}name="{field}"\r\n\r\n')
        lines.append(value.decode("latin-1") + "\r\n")
    body = "".join(lines).encode("latin-1")
    return {
        "content": body[: len(body) // 2],
        "headers": {"content-type": "multipart/form-data; boundary=cut"},
    }


def _each(
    weights: Mapping[str, Tensor], change: Callable[[str, Tensor], Tensor]
) -> dict[str, Tensor]:
    return {name: change(name, tensor).contiguous() for name, tensor in weights.items()}


def _add_rank(name: str, tensor: Tensor) -> Tensor:
    """One more than the config says."""
    row = ".lora_A." in name
    more = tensor[:1] if row else tensor[:, :1]
    return torch.cat([tensor, more], dim=0 if row else 1)


def _widen(name: str, tensor: Tensor) -> Tensor:
    """As if the base were twice as wide."""
    return tensor.repeat((1, 2) if ".lora_A." in name else (2, 1))


def _spoil(name: str, tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor[0, 0] = torch.nan
    return tensor


def _many_tensors() -> bytes:
    empty = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    entries = ",".join(f'"t{i}":{empty}' for i in range(NUM_TENSORS))
    return raw_safetensors(f"{{{entries}}}".encode())


def _link(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(f"folder/{name}")
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return info


def _tar(files: Files, *more: tarfile.TarInfo, mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in more:
            archive.addfile(info)
    return buffer.getvalue()


def _zip(*groups: Files) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for files in groups:
            for name, content in files.items():
                archive.writestr(name, content)
    return buffer.getvalue()
