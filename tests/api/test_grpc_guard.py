"""Keys and rights over gRPC: every method there is, every kind of caller."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from loriner.api.access import Right
from loriner.api.grpc_guard import RIGHTS
from loriner_proto.v1 import adapters_pb2, admin_pb2, inference_pb2
from tests.api.fake_service import FakeService
from tests.api.grpc_kit import Door, chat, refusal_of, refused

FILES = (
    inference_pb2.DESCRIPTOR,
    adapters_pb2.DESCRIPTOR,
    admin_pb2.DESCRIPTOR,
    health_pb2.DESCRIPTOR,
    reflection_pb2.DESCRIPTOR,
)
METHODS = [
    f"/{service.full_name}/{method.name}"
    for file in FILES
    for service in file.services_by_name.values()
    for method in service.methods
    if method.full_name != "grpc.health.v1.Health.List"
]
NOWHERE = ("/loriner_proto.v1.AdminService/Nope", "/x.Y/Z", "/grpc.health.v1.Health/List")
CLOSED = [method for method in METHODS if RIGHTS[method] is not Right.OPEN]
ADMIN = [method for method in METHODS if RIGHTS[method] is Right.ADMIN]


@pytest.fixture
def keyed(make_door: Callable[..., Door]) -> Door:
    return make_door(api_key="user-key", admin_key="admin-key")


def ends(door: Door, method: str, *headers: tuple[str, str]) -> grpc.RpcError:
    """How a call without any message ends; every method can be called as a stream of streams."""
    call = door.channel.stream_stream(method)(iter(()), timeout=5, metadata=headers)
    with pytest.raises(grpc.RpcError) as caught:
        for _ in call:
            pass
    return caught.value


def bearer(key: str) -> tuple[str, str]:
    return ("authorization", f"Bearer {key}")


def test_each_method_of_each_service_has_a_right() -> None:
    assert set(METHODS) == set(RIGHTS)


@pytest.mark.parametrize("method", [*CLOSED, *NOWHERE])
def test_without_a_known_key_every_method_is_unauthenticated(keyed: Door, method: str) -> None:
    headers: tuple[tuple[tuple[str, str], ...], ...] = (
        (),
        (bearer("wrong"),),
        (bearer("Admin-key"),),
        (("authorization", "admin-key"),),
        (bearer("admin-key"), bearer("admin-key")),
        (("x-api-key", "admin-key"),),
    )
    for given in headers:
        found = refusal_of(ends(keyed, method, *given))
        assert (found.code, found.reason) == ("UNAUTHENTICATED", "INVALID_API_KEY"), given


@pytest.mark.parametrize("method", ADMIN)
def test_the_user_key_may_not_administer(keyed: Door, service: FakeService, method: str) -> None:
    before = dict(service.store.records)
    found = refusal_of(ends(keyed, method, bearer("user-key")))

    assert (found.code, found.reason) == ("PERMISSION_DENIED", "PERMISSION_DENIED")
    assert service.store.records == before and service.state == "ready"


@pytest.mark.parametrize("method", NOWHERE)
def test_a_method_that_is_not_there_is_told_to_those_with_a_key(keyed: Door, method: str) -> None:
    error = ends(keyed, method, bearer("user-key"))

    assert error.code() is grpc.StatusCode.UNIMPLEMENTED  # type: ignore[attr-defined]


def test_each_key_does_what_it_may(keyed: Door) -> None:
    for key in ("user-key", "admin-key"):
        answer = keyed.inference.Chat(chat(), metadata=(bearer(key),))
        assert answer.choices[0].text
    assert keyed.adapters.List(adapters_pb2.ListRequest(), metadata=(bearer("admin-key"),)).adapters


def test_a_refused_call_is_not_read(keyed: Door) -> None:
    """A stranger's upload ends before any of it is taken."""
    sent = []

    def endless() -> Iterator[adapters_pb2.UploadRequest]:
        while True:
            sent.append(1)
            yield adapters_pb2.UploadRequest(chunk=bytes(1 << 20))

    assert refused(lambda: keyed.adapters.Upload(endless())).code == "UNAUTHENTICATED"
    assert len(sent) < 64


def test_a_wild_request_id_is_replaced(door: Door) -> None:
    request = chat(adapter="nope")
    for given in ("a b", "x" * 65, ""):
        found = refused(
            lambda given=given: door.inference.Chat(request, metadata=(("x-request-id", given),))
        )
        assert found.request_id.startswith("req_")
