"""The safetensors header is checked before anything is allocated by it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from loriner.adapters.header import TensorInfo, header_limit, listing, read_header
from loriner.errors import InvalidAdapterError
from tests.adapters.samples import raw_safetensors


def entry(
    dtype: object = "F32", shape: object = (2, 3), offsets: object = (0, 24)
) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def write(path: Path, header: object, data: bytes = bytes(24)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(raw_safetensors(text, data))
    return path


def test_a_file_of_the_library_is_described_exactly(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(
        {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, path, {"f": "pt"}
    )
    assert read_header(path) == {
        "a": TensorInfo("F32", (2, 3), 0, 24),
        "b": TensorInfo("BF16", (4,), 24, 32),
    }


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ({}, "no tensors"),
        ({"__metadata__": {}}, "no tensors"),
        ({"a": entry(), "__metadata__": {"x": 1}}, "__metadata__"),
        ({"a": entry("F64", (3,))}, "must be F32, F16, BF16, not F64"),
        ({"a": entry("I64", (3,))}, "not I64"),
        ({"a": entry(["F32"])}, "must be F32"),
        ({"a": entry(shape=(6,), offsets=(0, 20))}, "exactly shape x dtype"),
        ({"a": entry(shape=(2, 0), offsets=(0, 0))}, "must not be empty"),
        ({"a": entry(shape=())}, "one or two dimensions"),
        ({"a": entry(shape=(1, 2, 3))}, "one or two dimensions"),
        ({"a": entry(shape=(-2, -3))}, "one or two dimensions"),
        ({"a": entry(shape=(2.0, 3))}, "one or two dimensions"),
        ({"a": entry(shape=(True, 6))}, "one or two dimensions"),
        ({"a": entry(shape=(1 << 62, 6))}, "one or two dimensions"),
        ({"a": entry(offsets=(24, 0))}, "exactly shape x dtype"),
        ({"a": entry(offsets=(-24, 0))}, "two byte positions"),
        ({"a": entry(offsets=(0,))}, "two byte positions"),
        ({"a": entry() | {"extra": 1}}, "exactly dtype, shape and data_offsets"),
        ({"a": None}, "exactly dtype, shape and data_offsets"),
        ({"": entry()}, "printable ASCII"),
        ({"a\0b": entry()}, "printable ASCII"),
        ({"é": entry()}, "printable ASCII"),
        ({"a" * 300: entry()}, "printable ASCII"),
        ({"a": entry(), "b": entry()}, "overlapping"),
        ({"a": entry("F32", (5,), (0, 20))}, "cut, overlong"),
        ({"a": entry("F32", (5,), (4, 24))}, "cut, overlong"),
        ({"a": entry("F32", (7,), (0, 28))}, "cut, overlong"),
        (b'{"a":{"dtype":"F32","shape":[6],"data_offsets":[0,24]},"a":1}', "occurs twice"),
        (b"[]", "not a JSON object"),
        (b"", "not valid JSON"),
    ],
)
def test_a_trick_in_the_header_is_refused(tmp_path: Path, header: object, reason: str) -> None:
    with pytest.raises(InvalidAdapterError, match=reason):
        read_header(write(tmp_path / "x.safetensors", header))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is cut"),
        (b"\x01\x02", "is cut"),
        (raw_safetensors(b"{}")[:9], "cut inside its header"),
        ((1 << 63).to_bytes(8, "little") + b"{}", "at most 1048576"),
        (b"\x80\x02}q\0.", "a pickle"),
        (b"\x80\x04\x95\x10\0\0\0\0", "a pickle"),
        (b"PK\x03\x04 and more", "a zip archive"),
        (b"\x93NUMPY\x01\0", "a NumPy file"),
    ],
)
def test_what_is_no_safetensors_file_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(InvalidAdapterError, match=reason):
        read_header(path)


def test_two_hundred_thousand_tensors_cost_nothing(tmp_path: Path) -> None:
    one = b'"%06d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    path = write(tmp_path / "x", b"{" + b",".join(one % i for i in range(200_000)) + b"}", b"")
    start = time.process_time()
    with pytest.raises(InvalidAdapterError, match="claims [0-9]+ bytes, at most"):
        read_header(path)
    assert time.process_time() - start < 0.1


def test_too_many_tensors_within_a_large_header_are_refused(tmp_path: Path) -> None:
    one = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    path = write(tmp_path / "x.safetensors", {str(i): one for i in range(10_001)}, bytes(4))
    with pytest.raises(InvalidAdapterError, match="10001 tensors, at most 10000"):
        read_header(path)


def test_the_header_limit_grows_with_the_base_only() -> None:
    assert header_limit(0) == header_limit(212) == 1 << 20
    assert header_limit(2000) == 2000 << 10


def test_long_lists_of_names_are_cut() -> None:
    assert listing("abc") == "a, b, c"
    assert listing("abcdefgh") == "a, b, c, d, e and 3 more"


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_file_is_read_as_the_library_reads_it_or_refused(
    tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.float16)}, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[at] = data.draw(st.integers(0, 255))
        else:
            del content[at : at + data.draw(st.integers(1, 40))]
            content += b"\0"
    path.write_bytes(content)
    try:
        header = read_header(path)
    except InvalidAdapterError:
        return
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(header)
        assert all(tuple(file.get_tensor(n).shape) == header[n].shape for n in header)
