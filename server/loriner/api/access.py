"""Who may do what, for both doors: rights, callers, and the check of a key.

Knows no HTTP and no gRPC: a door brings the right that its matched route or method needs, and the
key it was given. Invariant: a caller comes from here or not at all.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import ipaddress
from dataclasses import dataclass

from loriner.adapters.names import DEFAULT_TENANT, is_digest, show
from loriner.config import ServerConfig
from loriner.errors import (
    AdapterNotFoundError,
    AuthenticationError,
    ConfigError,
    PermissionDeniedError,
)


class Right(enum.Enum):
    """What a caller must be allowed to do."""

    OPEN = "open"  # probes
    INFER = "infer"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, as everything below the doors sees them."""

    name: str  # of the key, for logs
    tenant: str
    is_operator: bool  # reaches every tenant's adapters

    @property
    def own_tenant(self) -> str | None:
        """Whose adapters the caller sees; None: everybody's."""
        return None if self.is_operator else self.tenant

    def reach(self, name: str, param: str = "adapter") -> str:
        """`name` as the store knows it: a bare one is of the caller's own tenant.

        Raises AdapterNotFoundError for what only another tenant may see.
        """
        tenant, slash, _ = name.partition("/")
        if not slash and not is_digest(name):
            return name if self.tenant == DEFAULT_TENANT else f"{self.tenant}/{name}"
        if slash and not self.is_operator and tenant != self.tenant:
            raise AdapterNotFoundError(show(name), param)
        return name


LOCAL = Caller("local", DEFAULT_TENANT, is_operator=True)


class Access:
    """The configured keys, as digests. `admin_key` defaults to `api_key`."""

    def __init__(self, api_key: str, admin_key: str) -> None:
        self._infer = _digest(api_key) if api_key else None
        self._admin = _digest(admin_key or api_key) if admin_key or api_key else None

    def needs_key(self, right: Right) -> bool:
        configured = {Right.OPEN: None, Right.INFER: self._infer, Right.ADMIN: self._admin}
        return configured[right] is not None

    def admit(self, right: Right, token: str | None) -> Caller:
        """Raises AuthenticationError or PermissionDeniedError. Compares every key, always."""
        if not self.needs_key(right):
            return LOCAL
        if token is None:
            raise AuthenticationError(
                "You didn't provide an API key. Send it in an Authorization header: "
                "`Authorization: Bearer YOUR_KEY`."
            )
        given = _digest(token)
        is_infer = hmac.compare_digest(given, self._infer or b"")
        is_admin = hmac.compare_digest(given, self._admin or b"")
        if not (is_infer or is_admin):
            raise AuthenticationError("Incorrect API key provided.")
        if right is Right.ADMIN and not is_admin:
            raise PermissionDeniedError("This API key may not use the admin endpoints.")
        return Caller("admin_key" if is_admin else "api_key", DEFAULT_TENANT, is_operator=True)


def bearer(values: list[str]) -> str | None:
    """The key in the `authorization` headers; two of them are none."""
    scheme, _, token = values[0].partition(" ") if len(values) == 1 else ("", "", "")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None


def check_binding(config: ServerConfig) -> None:
    """Raises ConfigError when the server would listen to the network without a key."""
    if not config.api_key and not is_loopback(config.host):
        raise ConfigError(
            f"host {config.host!r} can be reached by others and no key is configured: set api_key "
            "(LORINER_API_KEY), or listen on 127.0.0.1."
        )


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
