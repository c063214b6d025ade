"""Archives as streams of members: what Python writes is read, tricks are bounded."""

from __future__ import annotations

import gzip
import io
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loriner.adapters.archives import members
from loriner.errors import InvalidAdapterError, PayloadTooLargeError

LONG = "folder/" + "n" * 120 + ".txt"
FILES = {
    "a.txt": b"hello",
    "folder/b": bytes(5000),
    "empty": b"",
    LONG: b"x" * 512,
    "folder/é": b"y",
}

Build = Callable[[dict[str, bytes]], bytes]


def tar(files: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def read(path: Path, max_bytes: int = 1 << 20, max_members: int = 50) -> dict[str, bytes]:
    result = {}
    for member in members(path, max_bytes, max_members):
        if member.kind == "file":
            content = b""
            while data := member.content.read(1000):
                content += data
            result[member.name] = content
        else:
            result[member.name] = member.kind.encode()
    return result


def write(folder: Path, content: bytes) -> Path:
    path = folder / "archive"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "build",
    [
        lambda f: tar(f, tarfile.GNU_FORMAT),
        lambda f: tar(f, tarfile.PAX_FORMAT),
        lambda f: gzip.compress(tar(f, tarfile.GNU_FORMAT)),
        lambda f: zipped(f),
        lambda f: zipped(f, zipfile.ZIP_STORED),
    ],
    ids=["gnu", "pax", "gz", "zip", "stored zip"],
)
def test_what_python_writes_is_read_back(tmp_path: Path, build: Build) -> None:
    assert read(write(tmp_path, build(FILES))) == FILES


def test_plain_ustar_with_a_divided_name_is_read_back(tmp_path: Path) -> None:
    files = {"d" * 60 + "/" + "e" * 60 + "/f": b"x", "short": bytes(512)}
    assert read(write(tmp_path, tar(files, tarfile.USTAR_FORMAT))) == files


def test_a_member_that_is_not_read_is_skipped(tmp_path: Path) -> None:
    path = write(tmp_path, tar(FILES))
    assert [member.name for member in members(path, 1 << 20, 50)] == list(FILES)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (tarfile.SYMTYPE, "a link"),
        (tarfile.LNKTYPE, "a link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.FIFOTYPE, "a pipe"),
        (tarfile.CONTTYPE, "of an unknown type"),
        (tarfile.GNUTYPE_SPARSE, "of an unknown type"),
        (tarfile.DIRTYPE, "folder"),
    ],
)
def test_what_is_not_a_file_is_called_what_it_is(
    tmp_path: Path, kind: bytes, expected: str
) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.linkname = kind, "/etc/passwd"
    content = info.tobuf() + bytes(1024)
    assert list(read(write(tmp_path, content)).values()) == [expected.encode()]


def test_links_and_devices_in_a_zip_are_called_what_they_are(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, mode in (("link", 0o120777), ("device", 0o060600), ("pipe", 0o010600)):
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, "/etc/passwd")
        archive.mkdir("folder")
    assert read(write(tmp_path, buffer.getvalue())) == {
        "link": b"a link",
        "device": b"a device",
        "pipe": b"a device",
        "folder/": b"folder",
    }


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_in_a_zip_are_named(tmp_path: Path, method: int) -> None:
    found = read(write(tmp_path, zipped({"a": b"x"}, method)))
    assert found == {"a": b"compressed in an unknown way"}


def test_an_encrypted_member_is_named(tmp_path: Path) -> None:
    content = bytearray(zipped({"a": b"x"}))
    content[content.index(b"PK\x01\x02") + 8] |= 1
    assert read(write(tmp_path, bytes(content))) == {"a": b"encrypted"}


@pytest.mark.parametrize("build", [tar, lambda f: gzip.compress(tar(f), mtime=0), zipped])
def test_an_archive_cut_anywhere_is_refused(tmp_path: Path, build: Build) -> None:
    content = build(FILES)
    whole = len(content.rstrip(b"\0")) if build is tar else len(content)
    for end in {0, 1, 100, 511, 512, 600, whole // 2, whole - 1}:
        with pytest.raises(InvalidAdapterError):
            read(write(tmp_path, content[: max(0, min(end, whole - 1))]))


def test_a_tar_cut_between_members_is_refused(tmp_path: Path) -> None:
    content = tar({"a": b"x" * 512, "b": b"y" * 512}, tarfile.USTAR_FORMAT)
    with pytest.raises(InvalidAdapterError, match="cut or damaged"):
        read(write(tmp_path, content[:1024]))


@pytest.mark.parametrize(
    "content", [b"hello" * 200, b"BZh9" + bytes(600), b"\x28\xb5\x2f\xfd" * 200]
)
def test_other_kinds_of_file_are_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(InvalidAdapterError, match=r"not .tar, .tar.gz or .zip"):
        read(write(tmp_path, content))


def test_a_bomb_is_stopped_at_the_limit(tmp_path: Path) -> None:
    zeros = bytes(1 << 20)
    info = tarfile.TarInfo("zeros")
    info.size = 200 << 20
    with gzip.open(tmp_path / "archive", "wb", 1) as file:
        file.write(info.tobuf())
        for _ in range(200):
            file.write(zeros)
    tracemalloc.start()
    start = time.process_time()
    with pytest.raises(PayloadTooLargeError, match="more than 1048576 bytes"):
        read(tmp_path / "archive")
    assert time.process_time() - start < 1.0
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()


def test_a_zip_bomb_is_refused_by_its_directory(tmp_path: Path) -> None:
    with pytest.raises(PayloadTooLargeError):
        read(write(tmp_path, zipped({"a": bytes(3 << 20)})))


def test_a_zip_that_lies_about_sizes_gives_no_more_than_it_says(tmp_path: Path) -> None:
    content = bytearray(zipped({"a": bytes(3 << 20)}))
    at = content.index(b"PK\x01\x02")
    content[at + 24 : at + 28] = (100).to_bytes(4, "little")
    with pytest.raises(InvalidAdapterError):
        read(write(tmp_path, bytes(content)))


def test_a_vast_zip_directory_is_refused_unread(tmp_path: Path) -> None:
    content = bytearray(zipped({"a": b"x"}))
    content[-10:-6] = (1 << 30).to_bytes(4, "little")
    with pytest.raises(InvalidAdapterError, match="directory is too large"):
        read(write(tmp_path, bytes(content)))


def test_zip64_is_refused(tmp_path: Path) -> None:
    content = zipped({"a": b"x"})
    locator = b"PK\x06\x07" + bytes(16)
    with pytest.raises(InvalidAdapterError, match="zip64"):
        read(write(tmp_path, content[:-22] + locator + content[-22:]))


@pytest.mark.parametrize("build", [tar, zipped])
def test_too_many_members_are_refused(tmp_path: Path, build: Build) -> None:
    path = write(tmp_path, build({str(i): b"" for i in range(300)}))
    with pytest.raises(InvalidAdapterError, match="more than 50 members"):
        read(path)


def pax(*records: tuple[str, str], kind: bytes = tarfile.XHDTYPE, size: int | None = None) -> bytes:
    data = b""
    for key, value in records:
        body = f" {key}={value}\n".encode()
        length = len(body) + len(str(len(body) + 2))
        data += str(length).encode() + body
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, len(data) if size is None else size
    return info.tobuf() + data.ljust(-(-len(data) // 512) * 512, b"\0")


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (pax(("GNU.sparse.major", "1")), "sparse"),
        (pax(("path", "evil"), kind=tarfile.XGLTYPE), "globally"),
        (pax(("size", "-5")), "damaged extension"),
        (pax(("size", "9" * 30)), "damaged extension"),
        (pax(size=1 << 30), "oversized extension"),
        (pax(("path", "a"), kind=tarfile.GNUTYPE_LONGNAME, size=5000), "oversized extension"),
        (pax(("a", "b"))[:512] + b"99999 a=b\n".ljust(512, b"\0"), "damaged extension"),
        (pax(("a", "b"))[:512] + b"0 a=b\n".ljust(512, b"\0"), "damaged extension"),
        (pax(("a", "b"))[:512] + b"junk".ljust(512, b"\0"), "damaged extension"),
    ],
)
def test_tricks_in_extension_headers_are_refused(
    tmp_path: Path, header: bytes, reason: str
) -> None:
    with pytest.raises(InvalidAdapterError, match=reason):
        read(write(tmp_path, header + tar({"a": b"x"})))


def test_data_after_the_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidAdapterError, match="data after its end"):
        read(write(tmp_path, tar({"a": b"x"}) + b"more"))


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_ends_in_members_or_a_refusal(tmp_path: Path, data: st.DataObject) -> None:
    build = data.draw(st.sampled_from([tar, zipped, lambda f: gzip.compress(tar(f), mtime=0)]))
    content = bytearray(build({"a.txt": b"hello", "b": bytes(600)}))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    try:
        read(write(tmp_path, bytes(content)))
    except (InvalidAdapterError, PayloadTooLargeError) as error:
        assert str(error).isprintable()
