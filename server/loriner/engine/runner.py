"""What the engine asks of a device: take a step, give its tokens. Chooses the device, once.

Knows no requests. Two runners keep this contract: `cpu_runner.py`, which has ended a step when
`launch` returns, and `cuda_runner.py`, which has only begun it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import torch

from loriner.adapters.adapter import Adapter
from loriner.adapters.memory import Weights
from loriner.adapters.pool import Pool
from loriner.adapters.store import Store
from loriner.config import EngineConfig
from loriner.core import SamplingParams
from loriner.engine.readings import Read
from loriner.engine.sampler import Sampled
from loriner.engine.step_input import StepInput
from loriner.errors import ConfigError
from loriner.model.config import ModelConfig
from loriner.model.weights import Checkpoint

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # (layers done, layers)
OLDEST = (8, 0)  # compute capability


class Pending(Protocol):
    """A step that was launched."""

    def choose(self) -> None:
        """Choose the tokens of guided rows, whose masks have been begun: once, before `result` and
        the next launch. Only asked of an asynchronous runner's steps that have such rows."""

    def result(self) -> list[Sampled]:
        """Its B tokens, in order, once it has ended. Raises what went wrong in it."""

    def read(self) -> list[Read]:
        """What it told of each of `step.readings`; after `result`."""


class Runner(Protocol):
    """The resident base and its KV cache on one device. One thread calls it."""

    checkpoint: Checkpoint
    model_config: ModelConfig
    max_len: int  # tokens of the longest context
    is_async: bool  # whether a step can be launched while the one before it runs
    usual_step_tokens: int  # token budget of a step: more would save little
    shared_step_tokens: int  # and while several tenants ask: who comes waits for the step under way

    @property
    def num_blocks(self) -> int:
        """Blocks of the KV cache."""

    @property
    def operand_bytes(self) -> int:
        """Of the base's weights as the kernels keep them resident."""

    def make_pool(self, max_seats: int, on_copied: Callable[[], None]) -> Pool:
        """The adapter memory that every step launched from now on reads. `on_copied` is called,
        on any thread, when a seat is ready."""

    def pack(self, adapter: Adapter) -> Weights:
        """Lay out an adapter for a seat."""

    def source(self, store: Store) -> Callable[[str], Weights]:
        """How generations come from `store`, ready for a seat. Called on loader threads."""

    def needs_host(self, params: SamplingParams) -> bool:
        """Whether a sequence's next step can be launched only when its last token is known."""

    def launch(self, step: StepInput) -> Pending:
        """Begin a step. Steps run in the order of their launch; `step.token_source` is about the
        launch before this one."""

    def check(self) -> None:
        """After a failed step: raises if no later step can succeed."""


def open_runner(config: EngineConfig, progress: Progress | None = None) -> Runner:
    """Load the base on the device that `config` names. Raises ConfigError, CheckpointError."""
    if choose_device(config.device) == "cpu":
        from loriner.engine.cpu_runner import CpuRunner

        return CpuRunner(config, progress)
    from loriner.engine.cuda_runner import CudaRunner

    return CudaRunner(config, progress)


def choose_device(wanted: str, cuda: Any = torch.cuda) -> str:
    """cpu or cuda. `auto` takes a GPU that can run the kernels. Raises ConfigError when `cuda` is
    asked for and there is none."""
    if wanted == "cpu":
        return "cpu"
    problem = _why_not(cuda)
    if problem is None:
        return "cuda"
    if wanted == "cuda":
        raise ConfigError(f"device: {problem}")
    if cuda.is_available():
        logger.warning("running on the CPU: %s", problem)
    return "cpu"


def _why_not(cuda: Any) -> str | None:
    if not cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return "torch finds no CUDA device." if built else "this torch is built without CUDA."
    major, minor = cuda.get_device_capability()
    if (major, minor) < OLDEST:
        return (
            f"this GPU has compute capability {major}.{minor}; the kernels need "
            f"{OLDEST[0]}.{OLDEST[1]} (Ampere) or newer."
        )
    return None


def longest_context(config: EngineConfig, model: ModelConfig, cache_tokens: int) -> int:
    """Tokens that both model and cache can hold. Raises ConfigError when `config` asks for more."""
    trained = model.max_context
    if config.max_model_len > trained:
        raise ConfigError(f"max_model_len: the model's context is {trained} tokens.")
    wanted = config.max_model_len or trained
    if cache_tokens < min(wanted, 2 * config.block_size):
        raise ConfigError(f"kv_bytes: holds only {cache_tokens} tokens.")
    if config.max_model_len > cache_tokens:
        raise ConfigError(f"kv_bytes: holds {cache_tokens} tokens, less than max_model_len.")
    return min(wanted, cache_tokens)
