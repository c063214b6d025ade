"""How the server stands, as both doors tell its admins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from loriner import __version__

if TYPE_CHECKING:
    from loriner.engine.service import Service


@dataclass(frozen=True, slots=True)
class Standing:
    """Names are those of the proto's StatusResponse."""

    state: str
    num_restarts: int
    model: str
    base_digest: str
    version: str
    max_model_len: int
    num_running: int
    num_waiting: int
    num_blocks: int
    num_free_blocks: int
    pool_bytes: int
    pool_used_bytes: int
    host_bytes: int
    host_used_bytes: int


def status_of(service: Service) -> Standing:
    stats = service.stats()
    return Standing(
        service.state,
        service.num_restarts,
        service.model_name,
        service.base_digest,
        __version__,
        service.max_model_len,
        stats.num_running,
        stats.num_waiting,
        stats.num_blocks,
        stats.num_free_blocks,
        stats.pool_bytes,
        stats.pool_used_bytes,
        stats.host_bytes,
        stats.host_used_bytes,
    )
