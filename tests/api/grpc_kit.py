"""What a gRPC test needs: a live server's door, and refusals taken apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details
from google.rpc import status_pb2

from loriner_proto.v1 import adapters_pb2_grpc, admin_pb2_grpc, inference_pb2_grpc
from loriner_proto.v1 import inference_pb2 as pb

Metadata = Sequence[tuple[str, str]]
_DETAILS = (details.ErrorInfo, details.BadRequest, details.RetryInfo, details.ResourceInfo)


@dataclass(frozen=True)
class Refusal:
    """One refused call: its code as text, and the details by their class's name."""

    code: str
    message: str
    request_id: str
    details: dict[str, Any]

    @property
    def reason(self) -> str:
        return str(self.details["ErrorInfo"].reason)

    @property
    def fields(self) -> list[str]:
        bad = self.details.get("BadRequest")
        return [] if bad is None else [violation.field for violation in bad.field_violations]


def refusal_of(error: grpc.RpcError) -> Refusal:
    trailer = dict(error.trailing_metadata() or ())  # type: ignore[attr-defined]
    status = status_pb2.Status.FromString(trailer["grpc-status-details-bin"])
    found: dict[str, Message] = {}
    for packed in status.details:
        for kind in _DETAILS:
            if packed.Is(kind.DESCRIPTOR):
                found[kind.__name__] = kind.FromString(packed.value)
    code = error.code().name  # type: ignore[attr-defined]
    return Refusal(code, status.message, str(trailer["x-request-id"]), found)


def refused(call: Callable[[], object]) -> Refusal:
    """`call` is refused, with details."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return refusal_of(caught.value)


class Door:
    """The stubs of one channel."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.inference = inference_pb2_grpc.InferenceServiceStub(channel)
        self.adapters = adapters_pb2_grpc.AdapterServiceStub(channel)
        self.admin = admin_pb2_grpc.AdminServiceStub(channel)


@contextmanager
def open_door(address: str, **options: Any) -> Iterator[Door]:
    with grpc.insecure_channel(address, **options) as channel:
        yield Door(channel)


def user(text: str) -> pb.Message:
    return pb.Message(role=pb.ROLE_USER, content=text)


def chat(text: str = "hi", **fields: Any) -> pb.ChatRequest:
    return pb.ChatRequest(messages=[user(text)], **fields)
