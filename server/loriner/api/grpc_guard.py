"""In front of every gRPC method: the right it needs, the request's id, errors as statuses.

Asks `access`, as the HTTP guard does. Invariant: a method without a row in `RIGHTS` needs a key and
does not exist then, and a caller is refused before any message of the call is read.
"""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message
from grpc import aio

from loriner.api.access import Access, Caller, Right, bearer
from loriner.api.grpc_errors import REQUEST_ID_KEY, code_of, status_of, trailer_of
from loriner.api.grpc_requests import refuse_unknown
from loriner.api.metrics import Metrics
from loriner.errors import LorinerError

logger = logging.getLogger("loriner.api")

OURS = "/loriner_proto.v1."
RIGHTS = {
    "/grpc.health.v1.Health/Check": Right.OPEN,
    "/grpc.health.v1.Health/Watch": Right.OPEN,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Right.KNOWN,
    f"{OURS}InferenceService/Generate": Right.INFER,
    f"{OURS}InferenceService/Chat": Right.INFER,
    f"{OURS}InferenceService/StreamChat": Right.INFER,
    f"{OURS}InferenceService/Tokenize": Right.INFER,
    f"{OURS}InferenceService/Embed": Right.INFER,
    f"{OURS}AdapterService/Upload": Right.PUBLISH,
    f"{OURS}AdapterService/Get": Right.READ,
    f"{OURS}AdapterService/List": Right.READ,
    f"{OURS}AdapterService/Alias": Right.PUBLISH,
    f"{OURS}AdapterService/Pin": Right.ADMIN,
    f"{OURS}AdapterService/Delete": Right.PUBLISH,
    f"{OURS}AdapterService/Evict": Right.PUBLISH,
    f"{OURS}AdminService/Status": Right.ADMIN,
    f"{OURS}AdminService/Drain": Right.ADMIN,
}

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")

Handler = Any  # grpc.RpcMethodHandler, of any of four shapes
Behaviour = Callable[[Any, Any], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Call:
    """Who asks in this call, and its id."""

    caller: Caller
    request_id: str


_call: ContextVar[Call] = ContextVar("call")


def current_call() -> Call:
    """The call that this task answers."""
    return _call.get()


class Guard(aio.ServerInterceptor):
    """Lets a call through to its method, or answers UNAUTHENTICATED or PERMISSION_DENIED."""

    def __init__(self, access: Access, metrics: Metrics) -> None:
        self._access = access
        self._metrics = metrics

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        method = str(handler_call_details.method)
        metadata = handler_call_details.invocation_metadata or ()
        request_id = _request_id(_values(metadata, REQUEST_ID_KEY))
        right = RIGHTS.get(method, Right.KNOWN)
        try:
            caller = self._access.admit(right, bearer(_values(metadata, "authorization")))
        except LorinerError as error:
            return grpc.stream_stream_rpc_method_handler(self._refusal(method, request_id, error))
        if method not in RIGHTS:
            return None
        handler = await continuation(handler_call_details)
        if handler is None or not method.startswith(OURS):
            return handler
        return self._answered(handler, method, Call(caller, request_id))

    def _answered(self, handler: Handler, method: str, call: Call) -> Handler:
        """The same handler, its errors as statuses and its end counted."""
        kind = (
            f"{'stream' if handler.request_streaming else 'unary'}_"
            f"{'stream' if handler.response_streaming else 'unary'}"
        )
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(
            self._behave(getattr(handler, kind), method, call),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )

    def _behave(self, inner: Behaviour, method: str, call: Call) -> Behaviour:
        async def behave(request: Any, context: aio.ServicerContext[Any, Any]) -> Any:
            _call.set(call)
            code = grpc.StatusCode.CANCELLED
            try:
                if isinstance(request, Message):
                    refuse_unknown(request)
                answer = await inner(request, context)
                code = grpc.StatusCode.OK
                return answer
            except Exception as error:  # noqa: BLE001  every call gets an answer
                code = code_of(error)
                _log(error, call.request_id)
                await _abort(context, error, call.request_id)
            finally:
                self._metrics.count_call(method, code.name)

        return behave

    def _refusal(self, method: str, request_id: str, error: LorinerError) -> Behaviour:
        async def refuse(request: Any, context: aio.ServicerContext[Any, Any]) -> None:
            self._metrics.count_call(method if method in RIGHTS else "", code_of(error).name)
            await _abort(context, error, request_id)

        return refuse


async def _abort(context: aio.ServicerContext[Any, Any], error: Exception, request_id: str) -> None:
    status = status_of(error, request_id)
    await context.abort(code_of(error), status.message, trailer_of(status, request_id))


def _log(error: Exception, request_id: str) -> None:
    code = code_of(error)
    if code is grpc.StatusCode.UNAVAILABLE:
        logger.warning("request %s: %s: %r", request_id, code.name, error)
    elif not isinstance(error, LorinerError):
        logger.error("request %s failed", request_id, exc_info=error)
    elif code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.DATA_LOSS):
        logger.error("request %s: %s: %r", request_id, code.name, error)


def _values(metadata: Sequence[tuple[str, str | bytes]], name: str) -> list[str]:
    return [str(value) for key, value in metadata if key == name]


def _request_id(given: list[str]) -> str:
    """The caller's x-request-id when it is short and plain, else a new one."""
    if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]):
        return given[0]
    return f"req_{uuid.uuid4().hex}"
