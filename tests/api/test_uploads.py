"""Uploads through the door into the real store: bad ones are a clear 4xx and leave nothing."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from loriner.adapters.store import Store
from loriner.api.app import build_app
from loriner.config import ServerConfig
from tests.adapters.samples import (
    BASE,
    TINY,
    config,
    raw_safetensors,
    tensors,
    write_adapter,
)
from tests.api.fake_service import FakeService

Door = tuple[TestClient, Store]
PATH = "/admin/adapters"


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    service: Any = FakeService(tmp_path)
    with Store(tmp_path / "store", TINY, BASE) as store:
        service.store = store
        settings = ServerConfig(store=store.root, adapter_root=tmp_path, max_upload_bytes=1 << 22)
        app = build_app(service, settings)
        yield TestClient(app, base_url="http://localhost", raise_server_exceptions=False), store


def send(door: Door, folder: Path, name: str = "new", **fields: str) -> Any:
    files = {path.name: (path.name, path.read_bytes()) for path in folder.iterdir()}
    return door[0].post(PATH, data={"name": name, **fields}, files=files)


def assert_empty(door: Door) -> None:
    client, store = door
    assert store.list(all_states=True) == []
    assert list((store.root / "generations").iterdir()) == []
    assert [path for path in (store.root / "incoming").rglob("*") if path.is_file()] == []
    assert client.get(PATH).json() == {"adapters": []}


def test_a_good_upload_is_reported_listed_and_served(door: Door, tmp_path: Path) -> None:
    client, store = door
    response = send(door, write_adapter(tmp_path / "a"), "acme/new")

    assert response.status_code == 201, response.text
    report = response.json()
    assert report["ranks"] == [2]
    assert report["targets"] == ["q_proj", "v_proj"]
    assert (report["modules_matched"], report["modules_total"]) == (6, len(TINY))
    assert report["existed"] is False
    assert client.get(f"{PATH}/acme/new").json()["generation"] == report["generation"]
    assert client.get("/v1/models/acme/new").json()["root"] == report["generation"]
    assert store.resolve("acme/new").generation == report["generation"]


def test_the_same_weights_are_known_again(door: Door, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    first, second = send(door, folder), send(door, folder, "other")

    assert second.json()["existed"] is True
    assert second.json()["generation"] == first.json()["generation"]


def test_a_path_inside_the_root_is_published_and_left_alone(door: Door, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    response = door[0].post(PATH, json={"name": "new", "path": "a"})

    assert response.status_code == 201
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_republishing_history_and_preconditions(door: Door, tmp_path: Path) -> None:
    client, _ = door
    old = send(door, write_adapter(tmp_path / "a")).json()["generation"]
    stale = send(door, write_adapter(tmp_path / "b", seed=1), expected_generation="0" * 64)
    new = send(door, write_adapter(tmp_path / "b", seed=1), expected_generation=old)

    assert stale.status_code == 409
    assert new.status_code == 201
    past = [entry["generation"] for entry in client.get(f"{PATH}/new").json()["history"]]
    assert past == [new.json()["generation"], old]
    assert client.delete(f"{PATH}/new", headers={"if-match": f'"{old}"'}).status_code == 409
    rolled_back = client.put("/admin/aliases/new", json={"target": old})
    assert rolled_back.json()["generation"] == old
    assert client.delete(f"{PATH}/new", headers={"if-match": f'"{old}"'}).status_code == 200
    assert client.get(f"{PATH}/new").status_code == 404


def cut_weights(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def nan_weights(folder: Path) -> None:
    weights = tensors()
    next(iter(weights.values()))[0, 0] = torch.nan
    write_adapter(folder, weights)


def huge_header(folder: Path) -> None:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"t{i}": empty for i in range(20_000)}).encode()
    (folder / "adapter_model.safetensors").write_bytes(raw_safetensors(header))


@pytest.mark.parametrize(
    "spoil",
    [
        cut_weights,
        nan_weights,
        huge_header,
        lambda folder: write_adapter(folder, tensors(rank=3)),
        lambda folder: write_adapter(folder, keys=config(use_dora=True, bias="all")),
        lambda folder: write_adapter(folder, keys=config(no_such_key=1)),
        lambda folder: write_adapter(folder, {**tensors(), "stranger": torch.zeros(2, 2)}),
        lambda folder: (folder / "adapter_config.json").write_bytes(b"[" * 100_000),
        lambda folder: (folder / "adapter_config.json").unlink(),
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x80\x04pickle"),
    ],
    ids=["cut", "nan", "header", "rank", "dora", "key", "tensor", "depth", "missing", "pickle"],
)
def test_bad_content_is_422_with_reasons_and_leaves_nothing(
    door: Door, tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    folder = write_adapter(tmp_path / "a")
    spoil(folder)
    response = send(door, folder)

    assert response.status_code == 422, response.text
    assert response.json()["error"]["reasons"]
    assert_empty(door)


def tar_of(folder: Path, **extra: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(folder, ".")
        for info in extra.values():
            archive.addfile(info, io.BytesIO(b"x" * info.size))
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    info.size = 1 if kind == tarfile.REGTYPE else 0
    return info


@pytest.mark.parametrize(
    "extra",
    [
        member("../escape"),
        member("/etc/absolute"),
        member("link", tarfile.SYMTYPE, "/etc/passwd"),
        member("hard", tarfile.LNKTYPE, "adapter_config.json"),
        member("pipe", tarfile.FIFOTYPE),
        member("device", tarfile.CHRTYPE),
        member("adapter_model.bin"),
        member("./adapter_config.json"),
    ],
    ids=lambda info: info.name,
)
def test_a_tricky_archive_is_422_and_leaves_nothing(
    door: Door, tmp_path: Path, extra: tarfile.TarInfo
) -> None:
    archive = tar_of(write_adapter(tmp_path / "a"), extra=extra)
    response = door[0].post(PATH, data={"name": "new"}, files={"archive": ("a.tar", archive)})

    assert response.status_code == 422, response.text
    assert not (tmp_path / "escape").exists()
    assert_empty(door)


def test_a_compressed_bomb_is_413_and_leaves_nothing(door: Door) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("adapter_config.json", b"{}")
        archive.writestr("adapter_model.safetensors", bytes(1 << 23))
    files = {"archive": ("a.zip", buffer.getvalue())}
    response = door[0].post(PATH, data={"name": "new"}, files=files)

    assert len(buffer.getvalue()) < 20_000
    assert response.status_code == 413
    assert_empty(door)
