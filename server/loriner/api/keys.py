"""The admin door to tenants over HTTP: make, list and revoke keys, set quotas.

Invariant: a key's token is in the answer that made it and nowhere else, log included.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Annotated, Any

import msgspec
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from loriner.api import body
from loriner.api.access import Right
from loriner.api.auth import GuardedRoute, Told
from loriner.api.responses import json_response
from loriner.api.schema_base import MAX_NAME_CHARS, Body
from loriner.api.shared import Shared
from loriner.api.tenants import Key, Quota

logger = logging.getLogger("loriner.admin")

Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]


class KeyBody(Body):
    """POST /admin/keys."""

    tenant: Name
    scopes: Annotated[list[str], Field(min_length=1, max_length=8)]
    note: str = ""


class QuotaBody(Body):
    """PUT /admin/tenants/{tenant}/quota: replaces it; what is left out is unbounded."""

    max_adapters: int | None = None
    max_bytes: int | None = None
    max_uploads: int | None = None
    max_sequences: int | None = None
    tokens_per_minute: int | None = None
    weight: float = 1.0


class KeyDoor:
    """Handlers and routes; all need the right `admin`."""

    def __init__(self, shared: Shared) -> None:
        self._tenants = shared.tenants
        self._max_body_bytes = shared.config.max_body_bytes

    def routes(self) -> list[GuardedRoute]:
        admin, quota = Right.ADMIN, "/admin/tenants/{tenant}/quota"
        return [
            GuardedRoute(
                "/admin/keys",
                self.create,
                right=admin,
                methods=["POST"],
                told=Told(body=KeyBody, statuses=(201,)),
            ),
            GuardedRoute("/admin/keys", self.list_keys, right=admin, methods=["GET"]),
            GuardedRoute("/admin/keys/{id}", self.revoke, right=admin, methods=["DELETE"]),
            GuardedRoute(
                quota, self.get_quota, right=admin, methods=["GET"], told=Told(answer=Quota)
            ),
            GuardedRoute(
                quota,
                self.set_quota,
                right=admin,
                methods=["PUT"],
                told=Told(body=QuotaBody, answer=Quota),
            ),
        ]

    async def create(self, request: Request) -> Response:
        asked = await body.parse(request, KeyBody, self._max_body_bytes)
        key, token = await asyncio.to_thread(
            self._tenants.create_key, asked.tenant, asked.scopes, asked.note
        )
        logger.info("key %s made for %s (%s)", key.id, key.tenant, ", ".join(key.scopes))
        return json_response({**shown(key), "key": token}, 201)

    async def list_keys(self, request: Request) -> Response:
        return json_response({"keys": [shown(key) for key in self._tenants.all_keys()]})

    async def revoke(self, request: Request) -> Response:
        key = await asyncio.to_thread(self._tenants.revoke_key, request.path_params["id"])
        logger.info("key %s of %s revoked", key.id, key.tenant)
        return json_response(shown(key))

    async def get_quota(self, request: Request) -> Response:
        return json_response(self._tenants.quota(request.path_params["tenant"]))

    async def set_quota(self, request: Request) -> Response:
        asked = await body.parse(request, QuotaBody, self._max_body_bytes)
        quota = Quota(**{name: getattr(asked, name) for name in Quota.__struct_fields__})
        tenant = request.path_params["tenant"]
        return json_response(await asyncio.to_thread(self._tenants.set_quota, tenant, quota))


def shown(key: Key) -> dict[str, Any]:
    """A key as its admins may see it: without the digest."""
    told: dict[str, Any] = msgspec.to_builtins(key)
    del told["digest"]
    return told
