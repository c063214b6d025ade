"""Seals: quick loads give exactly what slow ones give, and a doubt always means the slow way."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loriner.adapters import seal as sealing
from loriner.adapters.host import HostBuffer
from loriner.adapters.image import ImageLayout, SeatImage
from loriner.adapters.loading import ImageSource
from loriner.adapters.seal import SEAL_NAME, WEIGHTS_NAME, make_seal, read_seal
from loriner.adapters.store import Store
from loriner.errors import AdapterNotFoundError, AdapterQuarantinedError, InvalidAdapterError
from tests.adapters.fake_device import layout_of, tensors
from tests.adapters.samples import PEFT_FOLDERS, SEVEN, TINY, Make, config, write_adapter
from tests.adapters.samples import tensors as random_tensors

LAYOUT = ImageLayout(layout_of(TINY), page_bytes=256, chunk_bytes=2048)
KINDS = [*sorted(f for f in PEFT_FOLDERS.glob("*-*") if "dora" not in f.name)]
KINDS += [PEFT_FOLDERS / "embed"]


class Watched:
    """An image source, and how each generation was loaded."""

    def __init__(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        self.slow: list[str] = []
        self.held = 0
        self.source = ImageSource(store, TINY, LAYOUT, self.allocate)
        load = store.load

        def noted(generation: str) -> object:
            self.slow.append(generation)
            return load(generation)

        monkeypatch.setattr(store, "load", noted)

    def allocate(self, num_bytes: int) -> HostBuffer:
        def freed() -> None:
            self.held -= 1

        self.held += 1
        return HostBuffer(torch.full((num_bytes,), 0xFF, dtype=torch.uint8), freed)

    def __call__(self, generation: str) -> SeatImage:
        return self.source(generation)


@pytest.fixture
def watched(store: Store, monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(store, monkeypatch)


def same(one: SeatImage, two: SeatImage) -> bool:
    pairs = zip(tensors(one), tensors(two), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize("folder", KINDS, ids=lambda f: f.name)
def test_a_sealed_load_gives_the_image_of_the_verified_adapter(
    folder: Path, store: Store, watched: Watched
) -> None:
    generation = store.publish(folder, "default/a").generation
    quick = watched(generation)
    assert watched.slow == [] and watched.held == 1
    (store.path(generation) / SEAL_NAME).unlink()
    slow = watched(generation)
    assert watched.slow == [generation]
    assert same(quick, slow)
    assert quick.plan.places == slow.plan.places and quick.plan.chunks == slow.plan.chunks
    addresses = list(range(0, 4096 * len(quick.plan.chunks), 4096))
    assert (quick.plan.entries(addresses) == slow.plan.entries(addresses)).all()
    watched(generation)
    assert watched.slow == [generation], "the slow load left a seal"


def test_the_wait_for_many_small_and_large_tensors(
    tmp_path: Path, store: Store, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealing, "STRETCH_BYTES", 300)
    monkeypatch.setattr(sealing, "_MAX_MEMBERS", 2)
    weights = random_tensors(SEVEN, 3, dtype=torch.bfloat16)
    keys = config(target_modules=list(SEVEN), r=3)
    generation = store.publish(write_adapter(tmp_path / "x", weights, keys), "a").generation
    seal = read_seal(store.path(generation), generation)
    assert seal is not None and len(seal.digests) > 8
    quick = watched(generation)
    (store.path(generation) / SEAL_NAME).unlink()
    assert same(quick, watched(generation)) and watched.slow == [generation]


def _flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("position", [-1, -100, -1340])
def test_damaged_weights_are_never_served(
    position: int, store: Store, make: Make, watched: Watched
) -> None:
    generation = store.publish(make(1), "default/a").generation
    _flip(store.path(generation) / WEIGHTS_NAME, position)
    with pytest.raises(AdapterQuarantinedError):
        watched(generation)
    assert watched.held == 0


@pytest.mark.parametrize("keep", [0, 100, -1])
def test_cut_weights_are_never_served(
    keep: int, store: Store, make: Make, watched: Watched
) -> None:
    generation = store.publish(make(1), "default/a").generation
    path = store.path(generation) / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(AdapterQuarantinedError):
        watched(generation)
    assert watched.held == 0


def test_any_damage_to_a_seal_means_the_slow_way(
    store: Store, make: Make, watched: Watched
) -> None:
    generation = store.publish(make(1), "default/a").generation
    good = watched(generation)
    path = store.path(generation) / SEAL_NAME
    data = path.read_bytes()
    for position in range(0, len(data), 7):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :])
        assert read_seal(path.parent, generation) is None
        path.write_bytes(data[:position])
        assert read_seal(path.parent, generation) is None
    assert same(good, watched(generation)) and watched.slow == [generation]
    assert path.read_bytes() == data, "it is whole again"


def test_the_seal_and_weights_of_another_generation_are_not_taken(
    store: Store, make: Make, watched: Watched
) -> None:
    one = store.publish(make(1), "default/a").generation
    two = store.publish(make(2), "default/b").generation
    good = watched(one)
    shutil.copy(store.path(two) / SEAL_NAME, store.path(one) / SEAL_NAME)
    assert same(good, watched(one)) and watched.slow == [one]
    shutil.copy(store.path(two) / WEIGHTS_NAME, store.path(one) / WEIGHTS_NAME)
    with pytest.raises(AdapterQuarantinedError):
        watched(one)


def test_an_upload_cannot_bring_a_seal(store: Store, make: Make, watched: Watched) -> None:
    one, two = make(1), make(2)
    generation = store.publish(one, "default/a").generation
    shutil.copy(store.path(generation) / SEAL_NAME, two / SEAL_NAME)
    report = store.publish(two, "default/b")
    assert SEAL_NAME in report.ignored
    seal = read_seal(store.path(report.generation), report.generation)
    assert seal is not None and seal.generation == report.generation != generation


def test_a_seal_is_made_only_of_the_bytes_that_were_verified(store: Store, make: Make) -> None:
    folder = make(1)
    adapter = store.load(store.publish(folder, "default/a").generation)
    assert make_seal(folder, adapter, TINY) is not None
    assert make_seal(make(2), adapter, TINY) is None
    _flip(folder / WEIGHTS_NAME, -1)
    assert make_seal(folder, adapter, TINY) is None


def test_what_may_not_be_served_is_not_read(
    tmp_path: Path, store: Store, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation = store.publish(make(1), "default/a").generation
    with Store(store.root, TINY, "c" * 64) as other, pytest.raises(InvalidAdapterError):
        Watched(other, monkeypatch)(generation)
    with pytest.raises(AdapterNotFoundError):
        Watched(store, monkeypatch)("0" * 64)


def test_adapters_of_one_form_share_their_plan(store: Store, make: Make, watched: Watched) -> None:
    one, two = (watched(store.publish(make(i), f"default/{i}").generation) for i in range(2))
    assert one.plan is two.plan and not same(one, two)


def test_a_folder_that_takes_no_seal_is_served(
    store: Store, make: Make, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation = store.publish(make(1), "default/a").generation
    (store.path(generation) / SEAL_NAME).unlink()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    refuse: Callable[..., None] = full
    monkeypatch.setattr("loriner.adapters.loading.seal_folder", refuse)
    watched(generation)
    watched(generation)
    assert watched.slow == [generation] * 2
