"""How an error looks over gRPC: the code of `status.TABLE`, and google.rpc details in a trailer.

Invariant: what may be read is what the HTTP door would say; the reason in ErrorInfo is that door's
`code`, in capitals.
"""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2 as details
from google.rpc import status_pb2

from loriner import errors
from loriner.api.status import message_of, row_of

DOMAIN = "loriner"
DETAILS_KEY = "grpc-status-details-bin"
REQUEST_ID_KEY = "x-request-id"
MAX_MESSAGE_CHARS = 1024  # a trailer above 8 KiB in all is dropped by clients
MAX_VIOLATION_BYTES = 3072
Trailer = tuple[tuple[str, str | bytes], ...]


def code_of(error: BaseException) -> grpc.StatusCode:
    code: grpc.StatusCode = grpc.StatusCode[row_of(error).grpc]
    return code


def status_of(error: BaseException, request_id: str) -> status_pb2.Status:
    """Code, message, and one detail for each thing that a client may act on."""
    number: int = code_of(error).value[0]
    message = message_of(error, request_id)[:MAX_MESSAGE_CHARS]
    status = status_pb2.Status(code=number, message=message)
    for detail in (_info(error, request_id), *_violations(error), *_resource(error)):
        status.details.append(_packed(detail))
    retry_after_s: float | None = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(retry_after_s * 1000))
        status.details.append(_packed(details.RetryInfo(retry_delay=delay)))
    return status


def trailer_of(status: status_pb2.Status, request_id: str) -> Trailer:
    return ((DETAILS_KEY, status.SerializeToString()), (REQUEST_ID_KEY, request_id))


def _info(error: BaseException, request_id: str) -> details.ErrorInfo:
    reason = (row_of(error).code or "invalid_request").upper()
    metadata = {"request_id": request_id}
    param = getattr(error, "param", None)
    if param is not None:
        metadata["param"] = str(param)
    return details.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata)


def _violations(error: BaseException) -> list[details.BadRequest]:
    if isinstance(error, errors.InvalidAdapterError):
        found = [(error.param or "adapter", reason) for reason in error.reasons]
    elif isinstance(error, errors.InvalidRequestError) and error.param is not None:
        found = [(error.param, str(error))]
    else:
        return []
    bad = details.BadRequest()
    for field, text in found:
        bad.field_violations.add(field=field, description=text[:MAX_MESSAGE_CHARS])
        if bad.ByteSize() > MAX_VIOLATION_BYTES:
            del bad.field_violations[-1]
            break
    return [bad]


def _resource(error: BaseException) -> list[details.ResourceInfo]:
    if isinstance(error, errors.AdapterNotFoundError):
        kind, name = "adapter", error.name
    elif isinstance(error, errors.ModelNotFoundError):
        kind, name = "model", error.name
    else:
        return []
    return [
        details.ResourceInfo(resource_type=kind, resource_name=name, description=str(error)),
    ]


def _packed(detail: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
