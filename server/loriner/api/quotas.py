"""What each tenant may use at once and by the minute, for both doors.

Bounds come from `tenants`, counts live here: one process, one count. Tokens are a bucket of one
minute's worth that may be overdrawn by what a running request still says, so that no answer is cut;
the next request waits for it. Invariant: what was counted is given back however a block ends.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from loriner.adapters.names import DEFAULT_TENANT
from loriner.api.tenants import Quota, Tenants
from loriner.errors import QuotaExceededError

if TYPE_CHECKING:
    from loriner.adapters.records import AdapterRecord

Spend = Callable[[int], None]  # of tokens
RETRY_AFTER_S = 1.0
UPLOADS_EACH = 2  # in flight, of a tenant that has no bound of its own


@dataclass(slots=True)
class Usage:
    """What one tenant uses now."""

    num_sequences: int = 0
    num_uploads: int = 0
    spent: float = 0.0  # tokens; leaks away at the tenant's rate
    leaked_at: float = 0.0


class Quotas:
    """`places`: of all sequences, queued or running. A tenant that has no bound of its own gets
    `share` of those that the others leave, so that several who flood leave room as well; the
    operator's own tenant is exempt. `now` is a monotonic clock in seconds."""

    def __init__(
        self,
        tenants: Tenants,
        places: int | None = None,
        share: float = 1.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tenants = tenants
        self._places, self._share = places, share
        self._num_sequences = 0  # of all tenants
        self._now = now
        self._usage: defaultdict[str, Usage] = defaultdict(Usage)
        self._publishing: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    @contextmanager
    def running(self, tenant: str, num_sequences: int) -> Iterator[Spend]:
        """A request of so many sequences, queued or running; gives what counts its tokens.

        Raises QuotaExceededError.
        """
        quota, usage = self._tenants.quota(tenant), self._usage[tenant]
        self._check_tokens(quota, usage)
        limit = self.max_sequences(tenant)
        if limit is not None and num_sequences > limit:
            raise QuotaExceededError(f"The tenant may run {limit} sequences at once.")
        if limit is not None and usage.num_sequences + num_sequences > limit:
            raise QuotaExceededError(
                f"The tenant has {usage.num_sequences} sequences under way and may have {limit}.",
                RETRY_AFTER_S,
            )
        self._num_sequences += num_sequences
        usage.num_sequences += num_sequences
        try:
            yield _free if quota.tokens_per_minute is None else partial(self._spend, tenant)
        finally:
            usage.num_sequences -= num_sequences
            self._num_sequences -= num_sequences
            self._forget_idle(tenant)

    def max_sequences(self, tenant: str) -> int | None:
        """Most that the tenant may have now; None: no bound."""
        limit = self._tenants.quota(tenant).max_sequences
        if limit is not None or tenant == DEFAULT_TENANT or self._places is None:
            return limit
        others = self._num_sequences - self._usage[tenant].num_sequences
        return max(1, int(self._share * (self._places - others)))

    def _spend(self, tenant: str, num_tokens: int) -> None:
        rate = self._tenants.quota(tenant).tokens_per_minute
        if rate is not None:
            self._leak(rate, self._usage[tenant])
            self._usage[tenant].spent += num_tokens

    def weight(self, tenant: str) -> float:
        """Of the tenant's turns, against the others'."""
        return self._tenants.quota(tenant).weight

    @contextmanager
    def uploading(self, tenant: str) -> Iterator[None]:
        """An upload in flight. Raises QuotaExceededError."""
        limit, usage = self._tenants.quota(tenant).max_uploads, self._usage[tenant]
        if limit is None and tenant != DEFAULT_TENANT:
            limit = UPLOADS_EACH
        if limit is not None and usage.num_uploads >= limit:
            raise QuotaExceededError(
                f"The tenant has {usage.num_uploads} uploads in flight and may have {limit}.",
                RETRY_AFTER_S if limit else None,
            )
        usage.num_uploads += 1
        try:
            yield
        finally:
            usage.num_uploads -= 1
            self._forget_idle(tenant)

    @asynccontextmanager
    async def storing(self, tenant: str) -> AsyncIterator[Quota | None]:
        """One at a time for a tenant whose storage is bounded; None for one whose is not."""
        quota = self._tenants.quota(tenant)
        if quota.max_adapters is None and quota.max_bytes is None:
            yield None
            return
        async with self._publishing[tenant]:
            yield quota

    def _check_tokens(self, quota: Quota, usage: Usage) -> None:
        rate = quota.tokens_per_minute
        if rate is None:
            return
        self._leak(rate, usage)
        if usage.spent >= rate:
            wait_s = 60.0 * (usage.spent - rate) / rate if rate else 60.0
            raise QuotaExceededError(
                f"The tenant has used its {rate} tokens of this minute.", max(wait_s, 0.1)
            )

    def _leak(self, rate: int, usage: Usage) -> None:
        now = self._now()
        usage.spent = max(0.0, usage.spent - (now - usage.leaked_at) * rate / 60.0)
        usage.leaked_at = now

    def _forget_idle(self, tenant: str) -> None:
        usage = self._usage[tenant]
        if not (usage.num_sequences or usage.num_uploads or usage.spent):
            del self._usage[tenant]


def _free(num_tokens: int) -> None:
    """Of a tenant whose tokens nobody counts."""


def check_storage(
    quota: Quota, held: Sequence[AdapterRecord], name: str, num_bytes: int | None
) -> None:
    """Whether `name` may come to stand for `num_bytes` more; None: for what is there already.

    Raises QuotaExceededError. A generation that several names have counts once.
    """
    is_new = all(record.name != name for record in held)
    if quota.max_adapters is not None and is_new and len(held) >= quota.max_adapters:
        raise QuotaExceededError(
            f"The tenant has {len(held)} adapters and may have {quota.max_adapters}."
        )
    if quota.max_bytes is None or num_bytes is None:
        return
    others = {record.generation: record.num_bytes for record in held if record.name != name}
    total = sum(others.values()) + num_bytes
    if total > quota.max_bytes:
        raise QuotaExceededError(
            f"The tenant's adapters would have {total} bytes and may have {quota.max_bytes}."
        )
