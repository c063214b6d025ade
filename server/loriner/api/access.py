"""Who may do what, for both doors: rights, callers, and the check of a key.

Knows no HTTP and no gRPC: a door brings the right that its matched route or method needs, and the
key it was given. Invariant: a caller comes from here or not at all.
"""

from __future__ import annotations

import enum
import hmac
import ipaddress
import secrets
from dataclasses import dataclass

from loriner.adapters.names import DEFAULT_TENANT, is_digest, show
from loriner.api.tenants import Key, Tenants, digest_of
from loriner.config import ServerConfig
from loriner.errors import (
    AdapterNotFoundError,
    AuthenticationError,
    ConfigError,
    PermissionDeniedError,
)


class Right(enum.Enum):
    """What a caller must be allowed to do; INFER to ADMIN are the scopes of a key."""

    OPEN = "open"  # probes: nobody is asked
    KNOWN = "known"  # any key
    METRICS = "metrics"
    INFER = "infer"
    READ = "read"  # look at adapters
    PUBLISH = "publish"  # upload, alias, delete, evict
    ADMIN = "admin"  # everything, and every tenant's adapters


EVERY = frozenset(Right)
USER = frozenset((Right.OPEN, Right.KNOWN, Right.METRICS, Right.INFER))


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, as everything below the doors sees them."""

    name: str  # of the key, for logs
    tenant: str
    rights: frozenset[Right]
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


LOCAL = Caller("local", DEFAULT_TENANT, EVERY, is_operator=True)


class Access:
    """The configured keys, as digests, and the tenants'. `admin_key` defaults to `api_key`."""

    def __init__(self, config: ServerConfig, tenants: Tenants) -> None:
        admin = config.admin_key or config.api_key
        self._user = digest_of(config.api_key) if config.api_key else None
        self._admin = digest_of(admin) if admin else None
        self._tenants = tenants
        self.own_key = secrets.token_urlsafe(32)  # for processes of this server that call it
        self._own = digest_of(self.own_key)

    def needs_key(self, right: Right) -> bool:
        """False in local mode: no key is configured for this right, and no tenant has any."""
        if right is Right.OPEN:
            return False
        configured = self._user if right in USER else self._admin
        return configured is not None or self._tenants.has_keys

    def admit(self, right: Right, token: str | None) -> Caller:
        """Raises AuthenticationError or PermissionDeniedError. Compares every key, always."""
        if not self.needs_key(right):
            return LOCAL
        if token is None:
            raise AuthenticationError(
                "You didn't provide an API key. Send it in an Authorization header: "
                "`Authorization: Bearer YOUR_KEY`."
            )
        caller = self._identify(token)
        if caller is None:
            raise AuthenticationError("Incorrect API key provided.")
        if right not in caller.rights:
            raise PermissionDeniedError(f"This API key lacks the right `{right.value}`.")
        return caller

    def _identify(self, token: str) -> Caller | None:
        given = digest_of(token)
        is_user = hmac.compare_digest(given, self._user or "")
        is_admin = hmac.compare_digest(given, self._admin or "")
        is_own = hmac.compare_digest(given, self._own)
        key = self._tenants.find(token)
        if is_own:
            return Caller("server", DEFAULT_TENANT, EVERY, is_operator=True)
        if is_admin:
            return Caller("admin_key", DEFAULT_TENANT, EVERY, is_operator=True)
        if is_user:
            return Caller("api_key", DEFAULT_TENANT, USER, is_operator=True)
        return None if key is None else caller_of(key)


def caller_of(key: Key) -> Caller:
    """A tenant's key: the rights that its scopes name; all of them with `admin`."""
    scopes = frozenset(Right(scope) for scope in key.scopes)
    is_operator = Right.ADMIN in scopes
    rights = EVERY if is_operator else scopes | {Right.OPEN, Right.KNOWN}
    return Caller(key.id, key.tenant, rights, is_operator)


def bearer(values: list[str]) -> str | None:
    """The key in the `authorization` headers; two of them are none."""
    scheme, _, token = values[0].partition(" ") if len(values) == 1 else ("", "", "")
    return token.strip() if scheme.lower() == "bearer" and token.strip() else None


def check_binding(config: ServerConfig) -> None:
    """Raises ConfigError when the server would listen to the network without a key."""
    has_keys = config.api_key or Tenants(config.store).has_keys
    if not has_keys and not is_loopback(config.host):
        raise ConfigError(
            f"host {config.host!r} can be reached by others and no key is configured: set api_key "
            "(LORINER_API_KEY), make one with `loriner keys create`, or listen on 127.0.0.1."
        )


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
