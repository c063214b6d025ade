"""Which gRPC method answers which query. Knows no channel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loriner_client import _answers as a
from loriner_client import _protos
from loriner_client import _queries as q
from loriner_client._errors import InvalidRequestError
from loriner_proto.v1 import adapters_pb2 as ad
from loriner_proto.v1 import admin_pb2 as adm
from loriner_proto.v1 import inference_pb2 as inf

PACKAGE = "loriner_proto.v1"


@dataclass(frozen=True, slots=True)
class Rpc:
    """One method: a query in, an answer out, both as protos on the way."""

    service: str
    method: str
    encode: Callable[[Any], Any]
    response: Any  # the message class that answers
    decode: Callable[[Any], Any]
    is_retryable: bool = True

    def message(self, query: Any) -> Any:
        """Raises InvalidRequestError for what a proto cannot say."""
        try:
            return self.encode(query)
        except (TypeError, ValueError) as error:
            raise InvalidRequestError(f"The request cannot be written: {error}.") from error

    @property
    def path(self) -> str:
        return f"/{PACKAGE}.{self.service}/{self.method}"


def _alias(query: q.SetAlias) -> ad.AliasRequest:
    return ad.AliasRequest(
        name=query.name, target=query.target, expected_generation=query.expected_generation
    )


def _delete(query: q.DeleteAdapter) -> ad.DeleteRequest:
    return ad.DeleteRequest(name=query.name, expected_generation=query.expected_generation)


def _get(query: q.GetAdapter) -> ad.GetRequest:
    return ad.GetRequest(name=query.name)


def _list(query: q.ListAdapters) -> ad.ListRequest:
    return ad.ListRequest(page_token=query.page)


def _pin(query: q.PinAdapter) -> ad.PinRequest:
    return ad.PinRequest(name=query.name, pinned=query.pinned)


def _evict(query: q.EvictAdapter) -> ad.EvictRequest:
    return ad.EvictRequest(name=query.name)


def _adapter_of(answer: Any) -> a.Adapter:
    return _protos.adapter(answer.adapter)


_I, _A, _S = "InferenceService", "AdapterService", "AdminService"
STREAMS: dict[type, Rpc] = {
    q.Generate: Rpc(_I, "Generate", _protos.generate, inf.GenerateResponse, _protos.part),
    q.Chat: Rpc(
        _I,
        "StreamChat",
        lambda query: inf.StreamChatRequest(chat=_protos.chat(query)),
        inf.StreamChatResponse,
        _protos.part,
    ),
}
UPLOAD = Rpc(
    _A, "Upload", _protos.upload_parts, ad.UploadResponse, _protos.report, is_retryable=False
)
CALLS: dict[type, Rpc] = {
    q.Chat: Rpc(_I, "Chat", _protos.chat, inf.ChatResponse, _protos.completion),
    q.Tokenize: Rpc(
        _I,
        "Tokenize",
        _protos.tokenize,
        inf.TokenizeResponse,
        lambda answer: tuple(answer.token_ids),
    ),
    q.Embed: Rpc(_I, "Embed", _protos.embed, inf.EmbedResponse, _protos.embeddings),
    q.GetAdapter: Rpc(_A, "Get", _get, ad.GetResponse, _protos.detail),
    q.ListAdapters: Rpc(_A, "List", _list, ad.ListResponse, _protos.page),
    q.SetAlias: Rpc(_A, "Alias", _alias, ad.AliasResponse, _adapter_of, is_retryable=False),
    q.PinAdapter: Rpc(_A, "Pin", _pin, ad.PinResponse, _adapter_of),
    q.DeleteAdapter: Rpc(_A, "Delete", _delete, ad.DeleteResponse, _adapter_of, is_retryable=False),
    q.EvictAdapter: Rpc(_A, "Evict", _evict, ad.EvictResponse, _adapter_of),
    q.GetStatus: Rpc(
        _S, "Status", lambda query: adm.StatusRequest(), adm.StatusResponse, _protos.status
    ),
    q.Drain: Rpc(
        _S,
        "Drain",
        lambda query: adm.DrainRequest(),
        adm.DrainResponse,
        lambda answer: answer.num_open,
        is_retryable=False,
    ),
}
