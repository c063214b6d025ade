"""How a client connects, as values. A key never shows in a repr."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from loriner_client._errors import ConfigError

TIMEOUT_S = 600.0
UPLOAD_TIMEOUT_S = 3600.0
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Retry:
    """Of calls that the server did not begin, or gave up as it stopped; a stream is never tried
    again after its first part.

    Only what is safe to repeat: inference, look-ups, pins, evictions.
    """

    attempts: int = 4  # in all, at most 5
    first_s: float = 0.1  # before the second attempt; doubles from there
    longest_s: float = 2.0

    def __post_init__(self) -> None:
        if not 1 <= self.attempts <= 5:
            raise ConfigError(f"attempts must be in [1, 5], got {self.attempts}.")

    def pauses(self) -> Iterator[float]:
        """Seconds before the second attempt, the third, ..."""
        for i in range(self.attempts - 1):
            yield min(self.first_s * 2**i, self.longest_s)


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files; without `authorities` those of the system are trusted."""

    authorities: Path | None = None
    certificate: Path | None = None  # the client's own, with `private_key` (mTLS)
    private_key: Path | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """One client's connection."""

    addresses: tuple[str, ...]  # `host:port` for gRPC; one `http://` or `https://` URL for HTTP
    key: str = field(default="", repr=False)
    tls: Tls | None = None
    retry: Retry = field(default_factory=Retry)

    def __post_init__(self) -> None:
        if not self.addresses or not all(self.addresses):
            raise ConfigError("address must not be empty.")
        if self.is_http and len(self.addresses) > 1:
            raise ConfigError("address: several are served over gRPC only (`host:port`).")

    @property
    def is_http(self) -> bool:
        return any(address.startswith(("http://", "https://")) for address in self.addresses)

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"} if self.key else {}
