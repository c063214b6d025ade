"""An upload becomes a clean folder, or is refused with every reason and leaves nothing."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from loriner.adapters.intake import Collected, Limits, collect, is_kept, member_path, unpack
from loriner.errors import InvalidAdapterError, PayloadTooLargeError
from tests.adapters.samples import write_adapter
from tests.adapters.test_archives import tar, zipped

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PLAIN = {CONFIG: b"{}", WEIGHTS: bytes(100)}


def reasons(call: Callable[[], object]) -> list[str]:
    with pytest.raises(InvalidAdapterError) as caught:
        call()
    return list(caught.value.reasons)


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def archive(folder: Path, content: bytes) -> Path:
    path = folder / "upload"
    path.write_bytes(content)
    return path


def test_only_the_files_of_an_adapter_are_taken(tmp_path: Path) -> None:
    extra = {"README.md": b"#", "loriner.json": b"{}", "loriner_eval.json": b"{}"}
    extra |= {"chat_template.jinja": b"{{", "tokenizer_config.json": b"{}"}
    strangers = {"tokenizer.json": b"{}", ".DS_Store": b"x", "template": b"{{"}
    source = fill(tmp_path / "in", PLAIN | extra | strangers)
    (source / "checkpoints").mkdir()
    (tmp_path / "out").mkdir()
    found = collect(source, tmp_path / "out")
    assert set(found.kept) == set(PLAIN | extra)
    assert set(found.ignored) == {*strangers, "checkpoints/"}
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == PLAIN | extra


def test_without_a_target_it_only_checks(tmp_path: Path) -> None:
    source = write_adapter(tmp_path)
    assert collect(source) == Collected((CONFIG, WEIGHTS), ())
    assert len(list(tmp_path.iterdir())) == 2


def test_links_pipes_and_pickles_are_refused_together(tmp_path: Path) -> None:
    source = fill(
        tmp_path,
        {
            CONFIG: b"{}",
            WEIGHTS: b"\x80\x04\x95rest",
            "optimizer.pt": b"x",
            "training_args.BIN": b"x",
            "notes.txt": b"PK\x03\x04",
        },
    )
    (source / "README.md").symlink_to("/etc/passwd")
    (source / "folder-link").symlink_to("/etc")
    os.mkfifo(source / "loriner.json")
    found = " | ".join(reasons(lambda: collect(source)))
    for part in (
        "`README.md` is a link",
        "`folder-link` is a link",
        "`loriner.json` is not a plain file",
        "`adapter_model.safetensors` is a pickle",
        "`optimizer.pt` may hold a pickle",
        "`training_args.BIN` may hold a pickle",
        "`notes.txt` is a zip archive",
    ):
        assert part in found


def test_both_files_must_be_there(tmp_path: Path) -> None:
    assert reasons(lambda: collect(tmp_path)) == [f"there is no {CONFIG}", f"there is no {WEIGHTS}"]


def test_size_limits_hold_while_copying(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", PLAIN | {"README.md": bytes(2000)})
    for i, (limits, error) in enumerate(
        (
            (Limits(max_bytes=1000), PayloadTooLargeError),
            (Limits(max_text_bytes=1000), InvalidAdapterError),
            (Limits(max_members=2), InvalidAdapterError),
        )
    ):
        target = tmp_path / str(i)
        target.mkdir()
        with pytest.raises(error):
            collect(source, target, limits)


@pytest.mark.parametrize(
    "name", ["../a", "a/../b", "/a", "a\\b", "C:a", "a\0b", "a\nb", "x" * 200, "d/" * 17 + "f"]
)
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(InvalidAdapterError, match="the name"):
        member_path(name)


def test_a_plain_member_path_is_normalised() -> None:
    assert str(member_path("./my adapter//adapter_config.json")) == f"my adapter/{CONFIG}"
    assert is_kept(CONFIG) and is_kept("loriner.json") and not is_kept("tokenizer.json")


@pytest.mark.parametrize("build", [tar, zipped, lambda f: gzip.compress(tar(f))])
@pytest.mark.parametrize("top", ["", "my-adapter/"])
def test_an_archive_is_unpacked_from_its_top_or_one_folder(
    tmp_path: Path, build: Callable[[dict[str, bytes]], bytes], top: str
) -> None:
    inside = PLAIN | {"tokenizer.json": b"{}", "checkpoint-1/" + WEIGHTS: b"old"}
    path = archive(tmp_path, build({top + name: content for name, content in inside.items()}))
    target = tmp_path / "out"
    target.mkdir()
    found = unpack(path, target)
    assert set(found.kept) == set(PLAIN)
    assert top + "tokenizer.json" in found.ignored
    assert {p.name: p.read_bytes() for p in target.iterdir()} == PLAIN


def test_folders_in_a_tar_are_no_members_of_an_adapter(tmp_path: Path) -> None:
    source = write_adapter(tmp_path / "pirate")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        file.add(source, "./pirate")
    target = tmp_path / "out"
    target.mkdir()
    assert unpack(archive(tmp_path, buffer.getvalue()), target).kept == (CONFIG, WEIGHTS)


def link(name: str) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return info.tobuf()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (tar(PLAIN | {"../evil": b"x"}), ["leads out of the folder"]),
        (tar(PLAIN | {"/etc/evil": b"x"}), ["leads out of the folder"]),
        (zipped(PLAIN | {"a/../../evil": b"x"}), ["leads out of the folder"]),
        (zipped(PLAIN | {"a\\evil": b"x"}), ["not a plain file name"]),
        (link("README.md") + tar(PLAIN), ["`README.md` is a link"]),
        (tar(PLAIN | {"adapter_model.bin": b"x"}), ["`adapter_model.bin` may hold a pickle"]),
        (tar({CONFIG: b"{}", WEIGHTS: b"\x80\x02}"}), [f"`{WEIGHTS}` is a pickle"]),
        (tar({CONFIG: b"{}"}), [f"there is no {WEIGHTS}"]),
        (tar({"a": b""}), ["there is no"]),
        (
            tar({f"{d}/{n}": c for d in "ab" for n, c in PLAIN.items()}),
            ["more than one adapter: a, b"],
        ),
        (tar({CONFIG: b"{}"})[:1024] + tar(PLAIN), [f"`{CONFIG}` occurs twice"]),
        (tar({CONFIG: b"{}"})[:1024] + tar({f"{CONFIG}/{CONFIG}": b"{}"}), ["a file and a folder"]),
        (tar({f"{CONFIG}/{CONFIG}": b"{}"})[:1024] + tar(PLAIN), ["a file and a folder"]),
        (tar(PLAIN)[:1500], ["cut or damaged"]),
        (b"not an archive" * 100, ["not .tar, .tar.gz or .zip"]),
        (
            link("a") + link("b") + tar(PLAIN | {"x.pkl": b"", "../y": b""}),
            ["`a` is a link", "`b` is a link", "`x.pkl` may hold", "leads out"],
        ),
    ],
)
def test_a_trick_in_an_archive_is_refused_and_leaves_nothing(
    tmp_path: Path, content: bytes, parts: list[str]
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    found = " | ".join(reasons(lambda: unpack(archive(tmp_path, content), target)))
    assert all(part in found for part in parts)
    assert list(target.iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "upload"]


def test_a_bomb_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    content = gzip.compress(tar({CONFIG: b"{}", WEIGHTS: bytes(4 << 20)}))
    with pytest.raises(PayloadTooLargeError):
        unpack(archive(tmp_path, content), target, Limits(max_bytes=1 << 20))
    assert list(target.iterdir()) == []
