"""The access matrix: every kind of key x every operation x both doors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from loriner.api.access import Right
from loriner.api.shared import share
from loriner.api.tenants import Tenants
from loriner.config import ServerConfig
from loriner.errors import AuthenticationError
from loriner_proto.v1 import adapters_pb2, admin_pb2
from loriner_proto.v1 import inference_pb2 as pb
from tests.api.fake_service import FakeService
from tests.api.grpc_kit import Door, chat, refusal_of
from tests.api.live import LiveServer

TURNS = [{"role": "user", "content": "hi"}]
OK, UNKNOWN, FORBIDDEN, ABSENT = "ok", "unauthenticated", "forbidden", "absent"
HTTP = {200: OK, 201: OK, 401: UNKNOWN, 403: FORBIDDEN, 404: ABSENT}
GRPC = {"UNAUTHENTICATED": UNKNOWN, "PERMISSION_DENIED": FORBIDDEN, "NOT_FOUND": ABSENT}

# Of acme: each scope alone, the usual two, all; of the operator: the configured keys.
KEYS = ("none", "wrong", "revoked", "infer", "read", "publish", "tenant", "admin", "api", "root")

Grpc = Callable[[Door, Any], object]


@dataclass(frozen=True)
class Operation:
    """One thing to do, through each door that has it, and who may; all others are forbidden."""

    name: str
    method: str
    path: str
    allowed: frozenset[str]
    absent: frozenset[str] = frozenset()  # who may do such things, and is told there is no such
    body: Any = None
    call: Grpc | None = None


def who(*names: str) -> frozenset[str]:
    return frozenset((*names, "admin", "root"))


def ask(
    name: str, allowed: frozenset[str], absent: tuple[str, ...], adapter: str
) -> list[Operation]:
    """The inference operations, for one adapter."""
    gone = frozenset(absent)
    body = {"messages": TURNS, "adapter": adapter}
    text = {"prompt": "x", "model": adapter}
    return [
        Operation(
            f"chat, {name}",
            "POST",
            "/v1/chat/completions",
            allowed,
            gone,
            body,
            lambda d, m: d.inference.Chat(chat(adapter=adapter), metadata=m),
        ),
        Operation(
            f"stream, {name}",
            "POST",
            "/v1/chat/completions",
            allowed,
            gone,
            {**body, "stream": True},
            lambda d, m: list(
                d.inference.StreamChat(pb.StreamChatRequest(chat=chat(adapter=adapter)), metadata=m)
            ),
        ),
        Operation(
            f"response, {name}",
            "POST",
            "/v1/responses",
            allowed,
            gone,
            {"input": "x", "adapter": adapter},
        ),
        Operation(
            f"text, {name}",
            "POST",
            "/v1/completions",
            allowed,
            gone,
            text,
            lambda d, m: list(
                d.inference.Generate(pb.GenerateRequest(text="x", model=adapter), metadata=m)
            ),
        ),
        Operation(
            f"embeddings, {name}",
            "POST",
            "/v1/embeddings",
            allowed,
            gone,
            {"input": "x", "adapter": adapter},
            lambda d, m: d.inference.Embed(
                pb.EmbedRequest(inputs=[pb.EmbedInput(text="x")], adapter=adapter), metadata=m
            ),
        ),
        Operation(
            f"tokens of a chat, {name}",
            "POST",
            "/tokenize",
            allowed,
            gone,
            body,
            lambda d, m: d.inference.Tokenize(
                pb.TokenizeRequest(chat=chat(adapter=adapter)), metadata=m
            ),
        ),
        Operation(f"tokens of a text, {name}", "POST", "/tokenize", allowed, gone, text),
        Operation(
            f"text of tokens, {name}",
            "POST",
            "/detokenize",
            allowed,
            gone,
            {"tokens": [65], "adapter": adapter},
        ),
    ]


INFER = who("infer", "tenant", "api")
READ, PUBLISH, ADMIN = who("read", "tenant"), who("publish"), who()
OPERATORS = who("api")
FOREIGN = ("infer", "tenant")


def on_adapter(
    name: str, adapter: str, reading: frozenset[str], publishing: frozenset[str], absent: bool
) -> list[Operation]:
    """The operations on one adapter."""
    path = f"/admin/adapters/{adapter}"
    read_gone = frozenset({"read", "tenant"} if absent else ())
    publish_gone = frozenset({"publish"} if absent else ())
    a = adapters_pb2
    return [
        Operation(
            f"get {name}",
            "GET",
            path,
            reading,
            read_gone,
            None,
            lambda d, m: d.adapters.Get(a.GetRequest(name=adapter), metadata=m),
        ),
        Operation(
            f"evict {name}",
            "POST",
            f"{path}/evict",
            publishing,
            publish_gone,
            None,
            lambda d, m: d.adapters.Evict(a.EvictRequest(name=adapter), metadata=m),
        ),
        Operation(
            f"pin {name}",
            "POST",
            f"{path}/pin",
            ADMIN,
            frozenset(),
            None,
            lambda d, m: d.adapters.Pin(a.PinRequest(name=adapter, pinned=True), metadata=m),
        ),
        Operation(f"unpin {name}", "POST", f"{path}/unpin", ADMIN),
        Operation(
            f"alias to {name}",
            "PUT",
            "/admin/aliases/acme/new",
            publishing,
            publish_gone,
            {"target": adapter},
            lambda d, m: d.adapters.Alias(
                a.AliasRequest(name="acme/new", target=adapter), metadata=m
            ),
        ),
        Operation(
            f"alias over {name}",
            "PUT",
            f"/admin/aliases/{adapter}",
            publishing,
            publish_gone,
            {"target": "acme/own"},
            lambda d, m: d.adapters.Alias(
                a.AliasRequest(name=adapter, target="acme/own"), metadata=m
            ),
        ),
        Operation(
            f"delete {name}",
            "DELETE",
            path,
            publishing,
            publish_gone,
            None,
            lambda d, m: d.adapters.Delete(a.DeleteRequest(name=adapter), metadata=m),
        ),
    ]


def training() -> list[Operation]:
    """Jobs publish, so all of it is the operator's."""
    gone, job = frozenset({"admin", "root"}), "/v1/fine_tuning/jobs/ftjob-0"
    return [
        Operation("list files", "GET", "/v1/files", ADMIN),
        Operation("list jobs", "GET", "/v1/fine_tuning/jobs", ADMIN),
        Operation("read a file", "GET", "/v1/files/file-0/content", frozenset(), gone),
        Operation("delete a file", "DELETE", "/v1/files/file-0", frozenset(), gone),
        Operation("get a job", "GET", job, frozenset(), gone),
        Operation("cancel a job", "POST", f"{job}/cancel", frozenset(), gone),
        Operation("a job's events", "GET", f"{job}/events", frozenset(), gone),
        Operation(
            "create a job",
            "POST",
            "/v1/fine_tuning/jobs",
            frozenset(),
            gone,
            {"model": "tiny", "training_file": "file-0"},
        ),
    ]


OPERATIONS = [
    *training(),
    *ask("own", INFER, (), "acme/own"),
    *ask("other's", OPERATORS, FOREIGN, "umbrella/secret"),
    *ask("nobody's", frozenset(), ("infer", "tenant", "api", "admin", "root"), "acme/none"),
    *on_adapter("own", "acme/own", READ, PUBLISH, absent=False),
    *on_adapter("other's", "umbrella/secret", ADMIN, ADMIN, absent=True),
    Operation("models", "GET", "/v1/models", INFER),
    Operation("own model", "GET", "/v1/models/acme/own", INFER),
    Operation("other's model", "GET", "/v1/models/umbrella/secret", OPERATORS, frozenset(FOREIGN)),
    Operation("tokenize", "POST", "/tokenize", INFER, frozenset(), {"prompt": "x"},
              lambda d, m: d.inference.Tokenize(pb.TokenizeRequest(text="x"), metadata=m)),
    Operation("detokenize", "POST", "/v1/detokenize", INFER, frozenset(), {"tokens": [65]}),
    Operation("list", "GET", "/admin/adapters", READ, frozenset(), None,
              lambda d, m: d.adapters.List(adapters_pb2.ListRequest(), metadata=m)),
    Operation("metrics", "GET", "/metrics", OPERATORS),
    Operation("status", "GET", "/admin/status", ADMIN, frozenset(), None,
              lambda d, m: d.admin.Status(admin_pb2.StatusRequest(), metadata=m)),
    Operation("keys", "GET", "/admin/keys", ADMIN),
    Operation("new key", "POST", "/admin/keys", ADMIN, frozenset(),
              {"tenant": "umbrella", "scopes": ["admin"]}),
    Operation("quota", "GET", "/admin/tenants/acme/quota", ADMIN),
    Operation("new quota", "PUT", "/admin/tenants/acme/quota", ADMIN, frozenset(), {}),
    Operation("nowhere", "GET", "/nope", frozenset(), frozenset(KEYS[3:])),
    Operation("drain", "POST", "/admin/drain", ADMIN, frozenset(), None,
              lambda d, m: d.admin.Drain(admin_pb2.DrainRequest(), metadata=m)),
]  # fmt: skip


class World:
    """One server with two tenants, and a key of each kind."""

    def __init__(self, root: Path) -> None:
        self.service = FakeService(root / "store")
        tenants = Tenants(root / "store")
        made = {
            name: tenants.create_key("acme", scopes)
            for name, scopes in {
                "infer": ["infer"],
                "read": ["read"],
                "publish": ["publish"],
                "tenant": ["infer", "read"],
                "admin": ["admin"],
                "revoked": ["admin"],
            }.items()
        }
        tenants.revoke_key(made["revoked"][0].id)
        self.tokens = {name: token for name, (_, token) in made.items()}
        self.tokens |= {"api": "user-key", "root": "admin-key", "wrong": "lor_000000000000_x"}
        keys = {"api_key": "user-key", "admin_key": "admin-key"}
        ports = {"port": 0, "grpc_port": 0}
        self.config = ServerConfig(
            store=root / "store", training=root / "training", **ports, **keys
        )

    def reset(self) -> None:
        self.service.state = "ready"
        self.service.store.records.clear()
        for name in ("acme/own", "umbrella/secret", "plain"):
            self.service.store.add(name)

    def wanted(self, operation: Operation, key: str) -> str:
        if key in ("none", "wrong", "revoked"):
            return UNKNOWN
        if key in operation.allowed:
            return OK
        return ABSENT if key in operation.absent else FORBIDDEN


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def live(world: World) -> Iterator[LiveServer]:
    with LiveServer(world.service, world.config) as live:
        yield live


@pytest.fixture(scope="module")
def http(live: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live.url, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def door(live: LiveServer) -> Iterator[Door]:
    assert live.server.grpc is not None
    with grpc.insecure_channel(live.server.grpc.address) as channel:
        yield Door(channel)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_over_http_each_key_does_what_it_may(
    world: World, http: httpx.Client, operation: Operation
) -> None:
    for key in KEYS:
        world.reset()
        token = world.tokens.get(key)
        response = http.request(
            operation.method,
            operation.path,
            json=operation.body,
            headers={"authorization": f"Bearer {token}"} if token else {},
        )
        assert HTTP[response.status_code] == world.wanted(operation, key), (key, response.text)


@pytest.mark.parametrize(
    "operation", [one for one in OPERATIONS if one.call], ids=lambda operation: operation.name
)
def test_over_grpc_each_key_does_what_it_may(
    world: World, door: Door, operation: Operation
) -> None:
    assert operation.call is not None
    for key in KEYS:
        world.reset()
        token = world.tokens.get(key)
        metadata = (("authorization", f"Bearer {token}"),) if token else ()
        try:
            operation.call(door, metadata)
            found = OK
        except grpc.RpcError as error:
            found = GRPC[refusal_of(error).code]
        assert found == world.wanted(operation, key), key


def test_nothing_is_listed_that_is_not_the_tenants(world: World, http: httpx.Client) -> None:
    world.reset()

    def names(key: str, path: str, field: str, name: str) -> list[str]:
        headers = {"authorization": f"Bearer {world.tokens[key]}"}
        return [entry[name] for entry in http.get(path, headers=headers).json()[field]]

    assert names("tenant", "/admin/adapters", "adapters", "name") == ["acme/own"]
    assert names("tenant", "/v1/models", "data", "id") == ["tiny", "acme/own"]
    assert len(names("root", "/admin/adapters", "adapters", "name")) == 3


def test_a_bare_name_is_of_the_keys_own_tenant(world: World, http: httpx.Client) -> None:
    world.reset()
    headers = {"authorization": f"Bearer {world.tokens['tenant']}"}

    def asked(name: str) -> httpx.Response:
        body = {"messages": TURNS, "adapter": name}
        return http.post("/v1/chat/completions", json=body, headers=headers)

    assert asked("own").json()["loriner"]["adapter"] == "acme/own"
    assert world.service.calls[-1]["tenant"] == "acme", "the KV cache is salted by tenant"
    assert asked("plain").status_code == asked("default/plain").status_code == 404
    secret, none = asked("umbrella/secret").json(), asked("umbrella/none").json()
    assert secret["error"]["message"].replace("secret", "none") == none["error"]["message"]


def test_a_revoked_key_is_refused_at_its_next_request(world: World, http: httpx.Client) -> None:
    world.reset()
    root = {"authorization": f"Bearer {world.tokens['root']}"}
    made = http.post(
        "/admin/keys", json={"tenant": "acme", "scopes": ["infer"], "note": "ci"}, headers=root
    ).json()
    headers = {"authorization": f"Bearer {made['key']}"}
    assert http.get("/v1/models", headers=headers).status_code == 200

    listed = http.get("/admin/keys", headers=root).text
    assert made["id"] in listed and made["key"] not in listed and "digest" not in listed
    assert http.delete(f"/admin/keys/{made['id']}", headers=root).json()["revoked_at"]
    assert http.get("/v1/models", headers=headers).status_code == 401
    gone = http.delete("/admin/keys/nope", headers=root)
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "key_not_found")


def test_the_servers_own_processes_have_a_key_of_their_own(world: World) -> None:
    shared = share(world.service, world.config)
    caller = shared.access.admit(Right.PUBLISH, shared.access.own_key)
    assert (caller.name, caller.is_operator) == ("server", True)
    with pytest.raises(AuthenticationError):
        share(world.service, world.config).access.admit(Right.PUBLISH, shared.access.own_key)
