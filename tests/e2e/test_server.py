"""One real server under steady traffic: bad uploads, a killed engine, adapters that come, move and
go. Every good answer has the tokens it has alone."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.e2e.bad_uploads import BadUpload, bad_uploads
from tests.e2e.kit import Kit
from tests.servers import Case, ServerProcess, Traffic, wait_until

pytestmark = [pytest.mark.timeout(120)]

ADMIN = "/admin/adapters"
HI = "hello there"
STORY = "Tell me a story that is longer than a block of the cache."
LONG = 3000  # tokens; seconds of streaming
CASES: list[Case] = [(p, a) for p in (HI, STORY) for a in (None, "a0", "a1", "a2", "a3")]


@pytest.fixture(scope="module")
def server(kit: Kit, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    store = tmp_path_factory.mktemp("server") / "store"
    with ServerProcess(kit.base, store, "--max-upload-bytes", "32M") as server:
        for name in ("a0", "a1", "a2", "a3"):
            server.publish(kit.adapters[name], name)
        yield server


def generation_of(server: ServerProcess, name: str) -> str | None:
    """What the server says `name` stands for; None when there is no such name."""
    response = server.http.get(f"{ADMIN}/{name}")
    return response.json()["generation"] if response.status_code == 200 else None


def on_disk(server: ServerProcess) -> set[str]:
    return {folder.name for folder in (server.store / "generations").iterdir()}


def uploads_in_progress(server: ServerProcess) -> list[Path]:
    return list((server.store / "incoming").glob("*/*"))


def assert_refused(server: ServerProcess, kind: str, bad: BadUpload) -> None:
    response = server.http.post(ADMIN, **bad.request)
    assert response.status_code == bad.status, f"{kind}: {response.text}"
    error = response.json()["error"]
    assert re.search(bad.reason, error["message"]), f"{kind}: {error['message']}"
    assert bool(error.get("reasons")) == (bad.status == 422), kind


def hang_up(server: ServerProcess, upload: BadUpload) -> None:
    """Send half of an upload and close the connection."""
    request = httpx.Request("POST", f"{server.url}{ADMIN}", **upload.request)
    body = request.read()
    head = "".join(f"{key}: {value}\r\n" for key, value in request.headers.items())
    with socket.create_connection((request.url.host, request.url.port or 80)) as connection:
        connection.sendall(f"POST {ADMIN} HTTP/1.1\r\n{head}\r\n".encode() + body[: len(body) // 2])


def test_a_small_answer_is_not_held_back(server: ServerProcess) -> None:
    times = []
    for _ in range(20):
        start = time.monotonic()
        assert server.http.get("/health").status_code == 200
        times.append(time.monotonic() - start)

    assert min(times) < 0.03, "the socket waits for more to send (TCP_NODELAY is off)"


def test_traffic_beside_uploads_is_answered_as_alone(server: ServerProcess, kit: Kit) -> None:
    expected = kit.expected(CASES)
    idle = {case: server.ask(*case).token_ids for case in CASES}

    assert idle == expected
    assert len({tuple(ids) for ids in expected.values()}) == len(CASES)
    with Traffic(server, expected) as traffic:
        for name in ("a4", "a5"):
            traffic.wait_for_more()
            server.publish(kit.adapters[name], name)
            assert server.ask(HI, name).token_ids == kit.alone(HI, name)
            assert server.read(STORY, name).token_ids == kit.alone(STORY, name)
        traffic.wait_for_more()
        assert server.http.post(f"{ADMIN}/a4/evict").status_code == 200
        assert server.ask(HI, "a4").token_ids == kit.alone(HI, "a4")


def test_adapters_of_one_request_add_up_beside_others(server: ServerProcess, kit: Kit) -> None:
    parts = {"a1": 0.5, "a2": 1.5}
    for name in parts:
        server.publish(kit.adapters[name], name)
    asked = [{"name": name, "scale": scale} for name, scale in parts.items()]
    expected = kit.mixed(HI, parts)

    assert expected not in (kit.alone(HI, "a1"), kit.alone(HI, "a2"), kit.alone(HI, None))
    with Traffic(server, kit.expected(CASES)) as traffic:
        traffic.wait_for_more()
        for order in (asked, asked[::-1]):
            assert server.ask(HI, adapter=order).token_ids == expected  # type: ignore[arg-type]
        traffic.wait_for_more()
    for name in parts:
        assert server.ask(HI, name).token_ids == kit.alone(HI, name)


def test_bad_uploads_beside_traffic_are_refused_and_leave_nothing(
    server: ServerProcess, kit: Kit
) -> None:
    new = bad_uploads(kit.adapters["a4"], "bad")
    taken = bad_uploads(kit.adapters["a4"], "a0")
    before, disk, models = generation_of(server, "a0"), on_disk(server), server.models()
    jobs = [(kind, bad) for group in (new, taken, new) for kind, bad in group.items()]

    with Traffic(server, kit.expected(CASES)) as traffic, ThreadPoolExecutor(3) as threads:
        traffic.wait_for_more(5)
        for refused in [threads.submit(assert_refused, server, *job) for job in jobs]:
            refused.result()
        for _ in range(3):
            hang_up(server, new["DoRA"])
        traffic.wait_for_more()

    assert len(new) >= 15
    assert server.models() == models
    assert generation_of(server, "bad") is None and generation_of(server, "a0") == before
    assert server.ask(HI, "bad").status == server.ask(HI, None, model="bad").status == 404
    wait_until(lambda: not uploads_in_progress(server))
    assert on_disk(server) == disk


def test_a_killed_engine_ends_requests_and_comes_back(server: ServerProcess, kit: Kit) -> None:
    models, engine = server.models(), server.engine
    asked = [server.later(server.ask, HI, name, max_tokens=6000) for name in ("a1", None)]
    streams = [server.stream(HI, name, max_tokens=6000) for name in (None, "a0", "a1", "a1")]
    for stream in streams:
        stream.wait_begun()
    engine.kill()
    killed_at = time.monotonic()

    server.wait_for("/health", 503, 5)
    assert server.http.get("/ready").status_code == server.ask(HI).status == 503
    for answer in [stream.result() for stream in streams]:
        assert answer.status == 200 and answer.error and not answer.is_done
        assert answer.error["code"] == "engine_failed"
        assert answer.ended_at - killed_at < 5
    for answer in [answer.result(10) for answer in asked]:
        assert answer.status == 500 and answer.error
        assert answer.ended_at - killed_at < 5

    server.wait_for("/ready", 200)
    health = server.http.get("/health")
    assert health.status_code == 200 and health.json()["restarts"] >= 1
    assert server.engine.pid != engine.pid
    assert server.models() == models
    for case in CASES:
        assert server.ask(*case).token_ids == kit.alone(*case)


def test_a_stream_finishes_with_the_generation_it_began_with(
    server: ServerProcess, kit: Kit
) -> None:
    old, new = generation_of(server, "a0"), generation_of(server, "a1")
    alias = "/admin/aliases/prod"
    assert server.http.put(alias, json={"target": "a0"}).json()["generation"] == old
    with Traffic(server, kit.expected(CASES)) as traffic:
        stream = server.stream(HI, "prod", max_tokens=LONG).wait_begun()
        assert server.http.put(alias, json={"target": "a1"}).json()["generation"] == new
        moved_at = time.monotonic()
        after = server.read(HI, "prod")
        answer = stream.result()
        traffic.wait_for_more(5)

    assert answer.ended_at > moved_at, "the stream was over before the alias moved"
    assert answer.generation == old and answer.is_done
    assert answer.token_ids == kit.alone(HI, "a0", LONG)
    assert after.generation == new and after.token_ids == kit.alone(HI, "a1")


def test_a_deleted_adapter_finishes_its_streams_and_is_gone(
    server: ServerProcess, kit: Kit
) -> None:
    generation = server.publish(kit.adapters["a6"], "gone")
    stream = server.stream(HI, "gone", max_tokens=LONG).wait_begun()
    assert server.http.delete(f"{ADMIN}/gone").status_code == 200
    deleted_at = time.monotonic()
    after = server.ask(HI, "gone")
    answer = stream.result()

    assert after.status == 404 and after.error and after.error["param"] == "adapter"
    assert "gone" not in server.models()
    assert answer.ended_at > deleted_at, "the stream was over before the adapter was deleted"
    assert answer.generation == generation and answer.is_done
    assert answer.token_ids == kit.alone(HI, "a6", LONG)
    wait_until(lambda: generation not in on_disk(server))


def test_other_weights_under_a_name_never_use_its_old_prefix(
    server: ServerProcess, kit: Kit
) -> None:
    old = server.publish(kit.adapters["a6"], "again")
    first, second = server.ask(STORY, "again"), server.ask(STORY, "again")
    assert first.num_cached == 0 < second.num_cached
    assert first.token_ids == second.token_ids == kit.alone(STORY, "a6")

    new = server.publish(kit.adapters["a7"], "again")
    changed = server.ask(STORY, "again")
    assert changed.generation == new != old and changed.num_cached == 0
    assert changed.token_ids == kit.alone(STORY, "a7") != first.token_ids

    assert server.http.put("/admin/aliases/again", json={"target": old}).status_code == 200
    assert server.ask(STORY, "again").token_ids == first.token_ids


def test_a_name_that_flips_always_answers_as_the_generation_it_tells(
    server: ServerProcess, kit: Kit
) -> None:
    folders = [kit.adapters["a6"], kit.adapters["a7"]]
    made = [server.publish(folder, "flip") for folder in folders]
    alone = dict(zip(made, [kit.alone(STORY, "a6"), kit.alone(STORY, "a7")], strict=True))
    over = threading.Event()

    def watch() -> list[str]:
        seen = []
        while not over.is_set():
            answer = server.read(STORY, "flip")
            assert answer.generation and answer.token_ids == alone[answer.generation]
            seen.append(answer.generation)
        return seen

    with ThreadPoolExecutor(3) as threads:
        watching = [threads.submit(watch) for _ in range(3)]
        for turn in range(20):
            server.publish(folders[turn % 2], "flip")
            time.sleep(0.03)
        over.set()
        seen = {generation for watch in watching for generation in watch.result(20)}
    assert seen == set(made)


PUBLISHER = """
import sys
from pathlib import Path
from loriner.adapters.store import Store
from loriner.model.weights import Checkpoint
base = Checkpoint.open(Path(sys.argv[1]))
with Store(Path(sys.argv[2]), base.config.modules(), base.base_digest) as store:
    store.publish(Path(sys.argv[3]), sys.argv[4])
"""


def test_what_another_process_publishes_is_served_on_first_use(
    server: ServerProcess, kit: Kit
) -> None:
    arguments = [str(kit.base), str(server.store), str(kit.adapters["a7"]), "late"]
    assert server.ask(HI, "late").status == 404
    subprocess.run([sys.executable, "-c", PUBLISHER, *arguments], check=True, timeout=60)

    assert server.ask(HI, "late").token_ids == kit.alone(HI, "a7")
    assert "late" in server.models()


def test_an_adapter_speaks_by_the_template_it_brought(
    server: ServerProcess, kit: Kit, tmp_path: Path
) -> None:
    own = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    folder = tmp_path / "own"
    folder.mkdir()
    for file in kit.adapters["a2"].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "chat_template.jinja").write_text(own)
    server.publish(folder, "own")
    greedy = {"temperature": 0, "max_tokens": 12, "ignore_eos": True, "return_token_ids": True}

    def ask(path: str, **fields: object) -> list[int]:
        answer = server.http.post(path, json={**greedy, **fields})
        assert answer.status_code == 200, answer.text
        ids: list[int] = answer.json()["choices"][0]["token_ids"]
        return ids

    turns = [{"role": "user", "content": HI}]
    written = f"user: {HI}\nassistant:"
    expected = ask("/v1/completions", prompt=written, model="a2", add_special_tokens=False)
    assert ask("/v1/chat/completions", messages=turns, model="own") == expected
    assert ask("/v1/chat/completions", messages=turns, model="a2") == kit.alone(HI, "a2", 12)
    assert generation_of(server, "own") != generation_of(server, "a2")

    (folder / "chat_template.jinja").write_text("{% for %}")
    with (folder / "chat_template.jinja").open("rb") as template:
        files = {
            name: (folder / name).open("rb")
            for name in ("adapter_config.json", "adapter_model.safetensors")
        }
        refused = server.http.post(
            ADMIN, data={"name": "bad"}, files={**files, "chat_template.jinja": template}
        )
    for file in files.values():
        file.close()
    assert refused.status_code == 422 and "does not compile" in refused.text
