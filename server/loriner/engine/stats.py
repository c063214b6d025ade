"""What the engine tells of itself: plain numbers, sent across the process boundary.

Knows nothing of the engine. Invariant: frozen, so a snapshot never changes while it is read.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """Where one generation is now, in the engine."""

    generation: str
    tier: str  # disk | host | gpu
    pinned: bool
    num_running: int
    num_waiting: int
    num_bytes: int
    num_loads: int
    last_load_s: float


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot of the engine for /metrics, /health and the admin pages."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    block_size: int = 0
    pool_bytes: int = 0
    pool_used_bytes: int = 0
    host_bytes: int = 0
    host_used_bytes: int = 0
    max_seats: int = 0
    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_evictions: int = 0
    num_loads: int = 0  # of adapters to the host
    num_aborted: int = 0
    base_bytes: int = 0  # of the checkpoint
    operand_bytes: int = 0  # of the base's weights as the kernels keep them resident
    # Of one that was sent: those that changed since the one before.
    generations: tuple[GenerationStats, ...] = field(default=())
