"""What all doors of one server share: who may come in, what runs, what is counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loriner.api.access import Access, check_binding
from loriner.api.adapters import Adapters
from loriner.api.metrics import Metrics
from loriner.api.quotas import Quotas
from loriner.api.running import Runner
from loriner.api.tenants import Tenants
from loriner.config import ServerConfig

if TYPE_CHECKING:
    from loriner.engine.service import Service


@dataclass(frozen=True, slots=True)
class JobSettings:
    """What `loriner train` says of a job's settings; who wires the server knows it."""

    names: frozenset[str]
    check: Callable[[Mapping[str, object]], None]  # raises ConfigError naming the setting


@dataclass(frozen=True, slots=True)
class Shared:
    """One for each server, built before its doors."""

    service: Service
    config: ServerConfig
    metrics: Metrics
    access: Access
    tenants: Tenants
    adapters: Adapters
    runner: Runner
    job_settings: JobSettings | None  # None where no job is ever made


def share(
    service: Service, config: ServerConfig, job_settings: JobSettings | None = None
) -> Shared:
    """Raises ConfigError when `config` would serve a network without a key."""
    check_binding(config)
    metrics, tenants = Metrics(service), Tenants(config.store)
    engine = service.engine_config
    places = engine.max_waiting + engine.max_sequences
    quotas = Quotas(tenants, places, config.tenant_share)
    return Shared(
        service,
        config,
        metrics,
        Access(config, tenants),
        tenants,
        Adapters(service, metrics, config, quotas),
        Runner(service, metrics, quotas),
        job_settings,
    )
