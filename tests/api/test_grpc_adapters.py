"""Adapters over gRPC into the real store: what is good is published, what is bad leaves nothing."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loriner.adapters.store import Store
from loriner.api import adapters as operations
from loriner_proto.v1 import adapters_pb2 as pb
from tests.adapters.samples import BASE, TINY, config, leftovers, tensors, write_adapter
from tests.api.fake_service import FakeService
from tests.api.grpc_kit import Door, refused
from tests.api.live import wait_until

CHUNK = 1 << 10
Part = pb.UploadRequest


@pytest.fixture
def store(service: FakeService, tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "real", TINY, BASE) as store:
        service.store = store  # type: ignore[assignment]
        yield store


@pytest.fixture
def door(store: Store, make_door: Callable[..., Door]) -> Door:
    return make_door(max_upload_bytes=1 << 20)


def header(name: str = "new", **fields: Any) -> Part:
    return Part(header=pb.UploadHeader(name=name, **fields))


def file(name: str, data: bytes) -> list[Part]:
    chunks = [Part(chunk=data[i : i + CHUNK]) for i in range(0, len(data), CHUNK)]
    end = Part(file_end=pb.UploadFileEnd(sha256=hashlib.sha256(data).digest()))
    return [Part(file=pb.UploadFile(name=name, num_bytes=len(data))), *chunks, end]


def files(folder: Path) -> list[Part]:
    return [
        part for path in sorted(folder.iterdir()) for part in file(path.name, path.read_bytes())
    ]


def upload(door: Door, parts: list[Part]) -> pb.UploadResponse:
    return door.adapters.Upload(iter(parts))


def assert_empty(store: Store) -> None:
    assert store.list(all_states=True) == []
    assert leftovers(store) == []


def num_leftovers(store: Store) -> int:
    """-1 while a folder goes away under the eyes."""
    try:
        return len(leftovers(store))
    except FileNotFoundError:
        return -1


def test_a_good_upload_is_published_as_over_http(door: Door, store: Store, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "a")
    report = upload(door, [header("acme/new"), *files(folder)])
    record = store.get("acme/new")

    assert report.name == "acme/new" and report.generation == record.generation
    assert tuple(report.ranks) == record.ranks and tuple(report.targets) == record.targets
    assert 0 < report.modules_matched <= report.modules_total and not report.existed
    assert upload(door, [header("acme/again"), *files(folder)]).existed


def test_an_archive_is_unpacked(door: Door, store: Store, tmp_path: Path) -> None:
    folder, packed = write_adapter(tmp_path / "a"), io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.add(folder, "adapter")
    upload(door, [header(), *file("archive", packed.getvalue())])

    assert store.get("new").short_name == "new"


A = b"{}"
BAD_STREAMS: list[tuple[list[Part], str]] = [
    ([], "file_end"),
    ([*file("README.md", A)], "header"),
    ([header(), header()], "header"),
    ([header(), Part()], "part"),
    ([header(), Part(chunk=b"x")], "chunk"),
    ([header(), Part(file_end=pb.UploadFileEnd())], "file_end"),
    ([header(), *file("README.md", A)[:-1]], "file_end"),
    ([header(), *file("README.md", A)[:-1], *file("loriner.json", A)], "file"),
    ([header(), *file("README.md", A), *file("README.md", A)], "README.md"),
    ([header(), *file("../x", A)], "../x"),
    ([header(), *file("model.bin", A)], "model.bin"),
    (
        [header(), Part(file=pb.UploadFile(name="README.md", num_bytes=1)), Part(chunk=b"xy")],
        "file.num_bytes",
    ),
    (
        [
            header(),
            Part(file=pb.UploadFile(name="README.md", num_bytes=3)),
            Part(chunk=b"xy"),
            Part(file_end=pb.UploadFileEnd(sha256=hashlib.sha256(b"xy").digest())),
        ],
        "file.num_bytes",
    ),
    (
        [header(), *file("README.md", A)[:-1], Part(file_end=pb.UploadFileEnd(sha256=b"no"))],
        "file_end.sha256",
    ),
    ([header(""), *file("README.md", A)], "header.name"),
]


@pytest.mark.parametrize(("parts", "field"), BAD_STREAMS)
def test_a_stream_out_of_order_or_damaged_is_refused_by_name(
    door: Door, store: Store, parts: list[Part], field: str
) -> None:
    found = refused(lambda: upload(door, parts))

    assert (found.code, found.fields) == ("INVALID_ARGUMENT", [field])
    assert_empty(store)


def test_a_flipped_bit_on_the_way_is_refused(door: Door, store: Store, tmp_path: Path) -> None:
    parts = files(write_adapter(tmp_path / "a"))
    chunk = next(part for part in parts if len(part.chunk) == CHUNK)
    chunk.chunk = bytes([chunk.chunk[0] ^ 1]) + chunk.chunk[1:]

    assert refused(lambda: upload(door, [header(), *parts])).fields == ["file_end.sha256"]
    assert_empty(store)


def test_what_is_too_large_is_refused_before_it_is_sent(door: Door, store: Store) -> None:
    sent = []

    def parts() -> Iterator[Part]:
        yield header()
        yield Part(file=pb.UploadFile(name="adapter_model.safetensors", num_bytes=1 << 40))
        for _ in range(200):
            sent.append(1)
            yield Part(chunk=bytes(CHUNK))

    found = refused(lambda: door.adapters.Upload(parts()))
    assert (found.code, found.reason) == ("INVALID_ARGUMENT", "PAYLOAD_TOO_LARGE")
    assert "adapter_model.safetensors" in found.message and str(1 << 20) in found.message
    assert_empty(store)


def test_files_that_are_too_large_together_are_refused(door: Door, store: Store) -> None:
    data = bytes(900 << 10)
    parts = [header(), *file("adapter_model.safetensors", data), *file("loriner.json", data)]
    found = refused(lambda: upload(door, parts))

    assert found.reason == "PAYLOAD_TOO_LARGE"
    assert_empty(store)


def test_a_chunk_above_a_mebibyte_is_refused(door: Door, store: Store) -> None:
    size = (1 << 20) + 1
    begin = Part(file=pb.UploadFile(name="archive", num_bytes=1 << 20))
    found = refused(lambda: upload(door, [header(), begin, Part(chunk=bytes(size))]))

    assert found.fields == ["chunk"]
    assert_empty(store)


def test_a_refused_adapter_lists_every_reason(door: Door, store: Store, tmp_path: Path) -> None:
    settings = config(use_dora=True, lora_dropout="x")
    folder = write_adapter(tmp_path / "a", tensors(), settings)
    found = refused(lambda: upload(door, [header(), *files(folder)]))

    assert (found.code, found.reason) == ("INVALID_ARGUMENT", "INVALID_ADAPTER")
    assert found.fields and set(found.fields) == {"adapter"}
    assert_empty(store)


def test_an_uploader_who_leaves_leaves_nothing(door: Door, store: Store) -> None:
    over = threading.Event()

    def parts() -> Iterator[Part]:
        yield header()
        yield from file("README.md", A)[:-1]
        over.wait(10)

    call = door.adapters.Upload.future(parts())
    wait_until(lambda: num_leftovers(store) == 1)
    call.cancel()
    wait_until(lambda: num_leftovers(store) == 0)
    over.set()
    assert_empty(store)


def test_too_many_uploads_at_once_are_told_to_wait(
    make_door: Callable[..., Door], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "MAX_UPLOADS", 0)
    door = make_door()
    found = refused(lambda: upload(door, [header()]))

    assert found.code == "RESOURCE_EXHAUSTED" and "RetryInfo" in found.details


def test_a_name_moves_only_from_the_generation_it_is_expected_at(
    door: Door, store: Store, tmp_path: Path
) -> None:
    first, second = (write_adapter(tmp_path / str(seed), seed=seed) for seed in (1, 2))
    report = upload(door, [header(expected_generation=""), *files(first)])
    again = [header(expected_generation=""), *files(second)]
    assert refused(lambda: upload(door, again)).code == "ABORTED"

    expected = report.generation[:12]
    moved = upload(door, [header(expected_generation=expected), *files(second)])
    assert store.get("new").generation == moved.generation != report.generation
    stale = pb.DeleteRequest(name="new", expected_generation=expected)
    assert refused(lambda: door.adapters.Delete(stale)).reason == "ADAPTER_CONFLICT"
    got = door.adapters.Get(pb.GetRequest(name="new"))
    assert [entry.generation for entry in got.history] == [moved.generation, report.generation]


def test_an_adapter_lives_through_all_operations(door: Door, tmp_path: Path) -> None:
    report = upload(door, [header("a"), *files(write_adapter(tmp_path / "a"))])
    alias = door.adapters.Alias(pb.AliasRequest(name="b", target="a")).adapter
    assert alias.generation == report.generation and alias.alias_of == "default/a"
    assert alias.state == pb.ADAPTER_STATE_READY and alias.tier == pb.TIER_DISK

    deleted = door.adapters.Delete(pb.DeleteRequest(name="a")).adapter
    assert deleted.name == "default/a"
    names = [entry.name for entry in door.adapters.List(pb.ListRequest()).adapters]
    assert names == ["default/b"]


def test_pins_and_evictions_reach_the_service(
    make_door: Callable[..., Door], service: FakeService
) -> None:
    door = make_door()
    pinned = door.adapters.Pin(pb.PinRequest(name="pirate", pinned=True)).adapter
    unpinned = door.adapters.Pin(pb.PinRequest(name="pirate")).adapter
    evicted = door.adapters.Evict(pb.EvictRequest(name="pirate")).adapter

    assert pinned.pinned and not unpinned.pinned
    assert service.evicted == [evicted.generation]


def test_a_long_list_comes_in_pages(make_door: Callable[..., Door], service: FakeService) -> None:
    for i in range(5):
        service.store.add(f"z{i}")
    door, seen, token = make_door(), [], ""
    while True:
        page = door.adapters.List(pb.ListRequest(page_size=3, page_token=token))
        assert len(page.adapters) <= 3
        seen += [entry.name for entry in page.adapters]
        token = page.next_page_token
        if not token:
            break

    assert seen == sorted(service.store.records)
    for size in (-1, 1001):
        assert refused(
            lambda size=size: door.adapters.List(pb.ListRequest(page_size=size))
        ).fields == ["page_size"]


def test_an_unknown_name_is_named_as_it_was_asked_for(door: Door) -> None:
    calls: list[Callable[[], object]] = [
        lambda: door.adapters.Get(pb.GetRequest(name="no/such")),
        lambda: door.adapters.Pin(pb.PinRequest(name="no/such")),
        lambda: door.adapters.Evict(pb.EvictRequest(name="no/such")),
        lambda: door.adapters.Delete(pb.DeleteRequest(name="no/such")),
        lambda: door.adapters.Alias(pb.AliasRequest(name="no/x", target="no/such")),
    ]
    for call in calls:
        found = refused(call)
        assert (found.code, found.reason) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")
        assert found.details["ResourceInfo"].resource_name == "no/such"
