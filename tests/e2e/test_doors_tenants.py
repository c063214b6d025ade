"""Both doors of servers of their own: how they stop, and tenants' keys in both."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import loriner_client as lc
from loriner.api.tenants import Tenants
from tests.e2e.kit import Kit
from tests.servers import ServerProcess, wait_until

HI = "hi"
GREEDY: lc.Sampling = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
LONG: lc.Sampling = {"temperature": 0.0, "max_tokens": 1500, "ignore_eos": True}


def test_at_a_signal_streams_finish_whichever_door_they_came_through(
    kit: Kit, tmp_path: Path
) -> None:
    settings: lc.Sampling = {"temperature": 0.0, "max_tokens": 400, "ignore_eos": True}
    with ServerProcess(kit.base, tmp_path / "store", "--grpc-port", "0") as server:
        clients = [lc.Client(address) for address in (server.grpc_address, server.url)]
        with (
            clients[0].stream_chat(HI, **settings) as one,
            clients[1].stream_chat(HI, **settings) as two,
        ):
            next(iter(one))
            next(iter(two))
            ended = server.terminate()
            rests = [one.completion(), two.completion()]
        assert ended.result(30) == 0
        for client in clients:
            client.close()

    assert [rest.usage.completion_tokens for rest in rests] == [400, 400]


def test_a_tenants_key_works_through_both_doors_and_is_revoked_in_both(
    kit: Kit, tmp_path: Path
) -> None:
    tenants = Tenants(tmp_path / "store")
    key, token = tenants.create_key("acme", ["infer", "read", "publish"])
    _, other = tenants.create_key("umbrella", ["infer", "read"])
    with ServerProcess(kit.base, tmp_path / "store", "--grpc-port", "0", key="root") as server:
        for address in (server.grpc_address, server.url):
            with lc.Client(address, key=token) as mine, lc.Client(address, key=other) as theirs:
                check_tenants(mine, theirs, kit)
        tenants.revoke_key(key.id)
        for address in (server.grpc_address, server.url):
            with lc.Client(address, key=token) as mine, pytest.raises(lc.AuthenticationError):
                mine.chat(HI)


def test_a_tenants_flood_neither_refuses_nor_holds_up_another(kit: Kit, tmp_path: Path) -> None:
    tenants = Tenants(tmp_path / "store")
    _, flooding = tenants.create_key("flood", ["infer"])
    _, asking = tenants.create_key("quiet", ["infer"])
    flags = ("--max-sequences", "2", "--max-waiting", "6")
    with (
        ServerProcess(kit.base, tmp_path / "store", *flags, key="root") as server,
        lc.Client(server.url, key=flooding, retry=lc.Retry(attempts=1)) as flood,
        lc.Client(server.url, key=asking, retry=lc.Retry(attempts=1)) as quiet,
        ThreadPoolExecutor(4) as threads,
    ):
        begun = [threads.submit(flood.chat, prompt, **LONG) for prompt in "abcd"]
        wait_until(lambda: metric(server, "sequences_waiting") == 2, server=server)
        with pytest.raises(lc.QuotaExceededError):
            flood.chat("e", **LONG)
        answer = quiet.chat(HI, **GREEDY).choices[0]
        was_first = not any(one.done() for one in begun)
        answers = [one.result(60).choices[0] for one in begun]
        wait_until(lambda: metric(server, "preemptions_total") >= 1, server=server)

    assert was_first and list(answer.token_ids) == kit.alone(HI, None, 12)
    for prompt, whole in zip("abcd", answers, strict=True):
        assert list(whole.token_ids) == kit.alone(prompt, None, LONG["max_tokens"])


def metric(server: ServerProcess, name: str) -> float:
    lines = server.http.get("/metrics").text.splitlines()
    return float(dict(line.rsplit(" ", 1) for line in lines if line[0] != "#")[f"loriner_{name}"])


def check_tenants(mine: lc.Client, theirs: lc.Client, kit: Kit) -> None:
    """Mine may publish and infer; theirs may infer and sees nothing of mine."""
    assert mine.adapters.upload(kit.adapters["a0"], "mine").name == "acme/mine"
    assert list(mine.chat(HI, adapter="mine", **GREEDY).choices[0].token_ids)
    for name in ("mine", "acme/mine"):
        with pytest.raises(lc.AdapterNotFoundError):
            theirs.chat(HI, adapter=name, **GREEDY)
    assert list(theirs.adapters.list()) == []
    with pytest.raises(lc.PermissionDeniedError):
        theirs.adapters.upload(kit.adapters["a0"], "x")
    with pytest.raises(lc.PermissionDeniedError):
        mine.drain()
