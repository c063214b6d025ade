"""The admin door: publishing in three ways, and everything that can be done with a name."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from loriner.api import adapters
from loriner.engine.stats import EngineStats
from tests.api.conftest import Client
from tests.api.fake_service import FakeService, resident

CONFIG, WEIGHTS = b'{"r": 8}', b"weights" * 100
FILES = {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS}
PATH = "/admin/adapters"


def parts(**changes: bytes | None) -> dict[str, tuple[str, bytes]]:
    files = {**FILES, **changes}
    return {name: (name, data) for name, data in files.items() if data is not None}


def publish(client: TestClient, name: str = "new", **changes: bytes | None) -> Any:
    return client.post(PATH, data={"name": name}, files=parts(**changes))


def tar(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def left_behind(service: FakeService) -> list[Path]:
    return list(service.store.root.iterdir()) if service.store.root.exists() else []


def test_files_as_parts_are_published(client: TestClient, service: FakeService) -> None:
    response = publish(client, "acme/new")

    assert response.status_code == 201, response.text
    report = response.json()
    assert report["name"] == "acme/new"
    assert report.keys() >= {"generation", "ranks", "targets", "num_bytes", "modules_matched"}
    assert response.headers["etag"] == f'"{report["generation"]}"'
    assert service.store.published == [FILES]
    assert left_behind(service) == []


def test_parts_may_be_named_by_their_file_names(client: TestClient, service: FakeService) -> None:
    files = [("files", (name, data)) for name, data in FILES.items()]

    assert client.post(PATH, data={"name": "new"}, files=files).status_code == 201
    assert service.store.published == [FILES]


@pytest.mark.parametrize("prefix", ["", "my-adapter/"])
@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_an_archive_is_published(
    client: TestClient, service: FakeService, kind: str, prefix: str
) -> None:
    files = {prefix + name: data for name, data in FILES.items()}
    archive = {
        "tar": lambda: tar(files),
        "tar.gz": lambda: tar(files, "w:gz"),
        "zip": lambda: zipped(files),
    }[kind]()
    response = client.post(PATH, data={"name": "new"}, files={"archive": (f"a.{kind}", archive)})

    assert response.status_code == 201, response.text
    assert service.store.published == [FILES]
    assert left_behind(service) == []


def test_a_hostile_archive_is_refused_with_every_reason(
    client: TestClient, service: FakeService
) -> None:
    archive = tar({**FILES, "../evil": b"x", "model.pt": b"x"})
    response = client.post(PATH, data={"name": "new"}, files={"archive": ("a.tar", archive)})

    assert response.status_code == 422
    assert len(response.json()["error"]["reasons"]) == 2
    assert left_behind(service) == []


def test_bad_content_lists_every_reason(client: TestClient, service: FakeService) -> None:
    response = publish(client, **{"adapter_model.safetensors": b"bad"})

    assert response.status_code == 422
    assert len(response.json()["error"]["reasons"]) == 2
    assert client.get(f"{PATH}/new").status_code == 404
    assert left_behind(service) == []


@pytest.mark.parametrize(
    ("data", "files", "param"),
    [
        ({}, parts(), "name"),
        ({"name": ""}, parts(), "name"),
        ({"name": "../x"}, parts(), "name"),
        ({"name": "UPPER"}, parts(), "name"),
        ({"name": "x" * 300}, parts(), "name"),
        ({"name": "a", "mystery": "1"}, parts(), "mystery"),
        ({"name": "a"}, {"adapter_model.bin": ("adapter_model.bin", b"x")}, "adapter_model.bin"),
        ({"name": "a"}, {"../x": ("x", b"x")}, "../x"),
        ({"name": "a"}, [("files", ("/etc/passwd", b"x"))], "/etc/passwd"),
        (
            {"name": "a"},
            [("files", ("adapter_config.json", b"1")), ("adapter_config.json", ("c", b"2"))],
            "adapter_config.json",
        ),
        ({"name": "a"}, {**parts(), "archive": ("a.tar", b"x")}, "archive"),
        ({"name": ["a", "b"]}, parts(), "name"),
    ],
)
def test_a_wrong_part_is_400_and_named(
    client: TestClient, service: FakeService, data: Any, files: Any, param: str
) -> None:
    response = client.post(PATH, data=data, files=files)

    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
    assert service.store.published == []
    assert left_behind(service) == []


def multipart(client: TestClient, body: bytes, boundary: str = "b") -> Any:
    headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
    return client.post(PATH, content=body, headers=headers)


BODY = (
    b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\nnew\r\n'
    b'--b\r\nContent-Disposition: form-data; name="adapter_config.json"; filename="x"\r\n\r\n{}\r\n'
    b'--b\r\nContent-Disposition: form-data; name="adapter_model.safetensors"; filename="x"\r\n\r\n'
    b"weights\r\n--b--\r\n"
)


def test_the_raw_body_is_well_formed(client: TestClient) -> None:
    assert multipart(client, BODY).status_code == 201


@pytest.mark.parametrize("end", range(0, len(BODY) - 4, 9))
def test_a_cut_body_leaves_nothing(client: TestClient, service: FakeService, end: int) -> None:
    response = multipart(client, BODY[:end])

    assert response.status_code == 400
    assert service.store.published == []
    assert left_behind(service) == []


@pytest.mark.parametrize(
    "body",
    [
        b"nonsense",
        b"--b\r\n: x\r\n\r\n",
        b"--b\r\n" + b"X: y\r\n" * 1000,
        b"--b\r\nX: " + b"y" * 100_000,
        b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n",
        b"--b\r\n\r\nx\r\n--b--\r\n",
        b'--b\r\nContent-Disposition: form-data; name="loriner1.json"; filename="x"\r\n\r\n\r\n'
        * 99,
    ],
    ids=lambda body: body[:12].decode(),
)
def test_malformed_multipart_is_400(client: TestClient, service: FakeService, body: bytes) -> None:
    assert multipart(client, body).status_code == 400
    assert left_behind(service) == []


@pytest.mark.parametrize("boundary", ["", "x" * 1000])
def test_a_bad_boundary_is_400(client: TestClient, boundary: str) -> None:
    assert multipart(client, BODY, boundary).status_code == 400


def test_an_upload_over_the_limit_is_413(make_client: Client, service: FakeService) -> None:
    client = make_client(max_upload_bytes=500)

    declared = publish(client)
    chunked = client.post(
        PATH,
        content=iter([BODY[:100], b"x" * 600]),
        headers={"content-type": "multipart/form-data; boundary=b"},
    )

    assert declared.status_code == chunked.status_code == 413
    assert left_behind(service) == []


def test_a_large_text_file_is_413(client: TestClient, service: FakeService) -> None:
    response = publish(client, **{"README.md": b"x" * (4 << 20) + b"x"})

    assert response.status_code == 413
    assert left_behind(service) == []


def test_uploads_in_flight_are_bounded(
    make_client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "MAX_UPLOADS", 0)
    response = publish(make_client())

    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An adapter root with an adapter, an archive, and links that lead out."""
    root = tmp_path / "root"
    for folder in (root / "good", tmp_path / "outside"):
        folder.mkdir(parents=True)
        for name, data in FILES.items():
            (folder / name).write_bytes(data)
    (root / "good.tar").write_bytes(tar(FILES))
    (root / "link").symlink_to(tmp_path / "outside")
    (root / "inner").symlink_to(root / "good")
    return root


@pytest.mark.parametrize("path", ["good", "good.tar", "./good/../good", "inner"])
def test_a_path_inside_the_root_is_published(
    make_client: Client, service: FakeService, root: Path, path: str
) -> None:
    client = make_client(adapter_root=root)
    response = client.post(PATH, json={"name": "new", "path": path})

    assert response.status_code == 201, response.text
    assert service.store.published == [FILES]
    assert (root / "good" / "adapter_config.json").exists()


def test_an_absolute_path_inside_the_root_is_published(make_client: Client, root: Path) -> None:
    client = make_client(adapter_root=root)

    body = {"name": "new", "path": str(root / "good")}
    assert client.post(PATH, json=body).status_code == 201


@pytest.mark.parametrize("path", ["../outside", "link", "/etc", "nope", "x\0y", "", "a" * 4000])
def test_a_path_outside_the_root_looks_like_one_that_is_not_there(
    make_client: Client, service: FakeService, root: Path, path: str
) -> None:
    client = make_client(adapter_root=root)
    response = client.post(PATH, json={"name": "new", "path": path})

    assert response.status_code == 400
    assert response.json()["error"]["param"] == "path"
    assert str(root.parent) not in response.text
    assert service.store.published == []


def test_paths_are_off_without_a_root(client: TestClient) -> None:
    assert client.post(PATH, json={"name": "new", "path": "good"}).status_code == 403


def test_the_list_says_where_each_adapter_is(client: TestClient, service: FakeService) -> None:
    generation = service.store.resolve("pirate").generation
    service.engine_stats = EngineStats(generations=(resident(generation, "gpu", num_running=2),))
    found = {entry["name"]: entry for entry in client.get(PATH).json()["adapters"]}

    assert found["default/pirate"]["tier"] == "gpu"
    assert found["default/pirate"]["num_running"] == 2
    assert found["default/codeword"]["tier"] == "disk"
    assert found["acme/legal"].keys() >= {"generation", "ranks", "targets", "num_bytes", "pinned"}


@pytest.mark.parametrize("name", ["pirate", "default/pirate"])
def test_inspect_shows_record_history_and_etag(
    client: TestClient, service: FakeService, name: str
) -> None:
    response = client.get(f"{PATH}/{name}")

    assert response.json()["name"] == "default/pirate"
    assert response.json()["history"][0]["generation"] == response.json()["generation"]
    assert response.headers["etag"] == f'"{response.json()["generation"]}"'


def test_pin_unpin_and_evict(client: TestClient, service: FakeService) -> None:
    assert client.post(f"{PATH}/acme/legal/pin").json()["pinned"] is True
    assert client.post(f"{PATH}/acme/legal/unpin").json()["pinned"] is False
    assert client.post(f"{PATH}/acme/legal/evict").status_code == 200
    assert service.evicted == [service.store.resolve("acme/legal").generation]


def test_delete_forgets_the_name(client: TestClient) -> None:
    assert client.delete(f"{PATH}/pirate").json()["name"] == "default/pirate"
    assert client.delete(f"{PATH}/pirate").status_code == 404


def test_an_alias_points_at_what_its_target_is(client: TestClient, service: FakeService) -> None:
    response = client.put("/admin/aliases/acme/live", json={"target": "acme/legal"})

    assert response.status_code == 200, response.text
    assert response.json()["generation"] == service.store.resolve("acme/legal").generation


@pytest.mark.parametrize(
    ("method", "path", "json"),
    [
        ("GET", f"{PATH}/nope", None),
        ("DELETE", f"{PATH}/nope", None),
        ("POST", f"{PATH}/nope/pin", None),
        ("POST", f"{PATH}/nope/unpin", None),
        ("POST", f"{PATH}/nope/evict", None),
        ("PUT", "/admin/aliases/x", {"target": "nope"}),
        ("GET", f"{PATH}/..%2f..%2fetc", None),
    ],
)
def test_an_unknown_name_is_404(client: TestClient, method: str, path: str, json: Any) -> None:
    response = client.request(method, path, json=json)

    assert response.status_code == 404
    assert response.json()["error"]["code"] == "adapter_not_found"


@pytest.mark.parametrize("header", ['"{}"', "{}", 'W/"{}"'])
def test_if_match_is_the_expected_generation(
    client: TestClient, service: FakeService, header: str
) -> None:
    generation = service.store.resolve("pirate").generation
    wrong = {"if-match": header.format("0" * 64)}
    right = {"if-match": header.format(generation)}

    refused = client.delete(f"{PATH}/pirate", headers=wrong)
    assert refused.status_code == 409
    assert refused.json()["error"]["code"] == "adapter_conflict"
    assert client.delete(f"{PATH}/pirate", headers=right).status_code == 200


def test_expected_generation_holds_for_publish_and_alias(client: TestClient) -> None:
    data = {"name": "pirate", "expected_generation": "0" * 64}
    alias = {"target": "codeword", "expected_generation": "0" * 64}

    assert client.post(PATH, data=data, files=parts()).status_code == 409
    assert client.put("/admin/aliases/pirate", json=alias).status_code == 409
    assert client.get(f"{PATH}/pirate").status_code == 200


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"if-match": "*"}, None),
        ({"if-none-match": "*"}, ""),
        ({"if-match": '"abc"'}, "abc"),
    ],
)
def test_preconditions_reach_the_store(
    client: TestClient,
    service: FakeService,
    monkeypatch: pytest.MonkeyPatch,
    headers: dict[str, str],
    expected: str | None,
) -> None:
    seen = []

    def delete(name: str, *, expected_generation: str | None = None) -> Any:
        seen.append(expected_generation)
        return service.store.resolve(name)

    monkeypatch.setattr(service.store, "delete", delete)
    client.delete(f"{PATH}/pirate", headers=headers)

    assert seen == [expected]


def test_status_tells_how_the_server_stands(client: TestClient) -> None:
    answer = client.get("/admin/status").json()

    assert (answer["state"], answer["model"], answer["max_model_len"]) == ("ready", "tiny", 512)
    assert (answer["num_blocks"], answer["num_free_blocks"]) == (10, 4)


def test_a_drain_refuses_what_is_new(client: TestClient) -> None:
    assert client.post("/admin/drain").json() == {"num_open": 0}
    turn = {"messages": [{"role": "user", "content": "hi"}]}
    assert client.post("/v1/chat/completions", json=turn).status_code == 503
    assert client.get("/ready").status_code == 503
