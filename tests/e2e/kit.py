"""A tiny base, eight adapters for it, and what each request answers when it runs alone.

The answers are worked out in the test's own process, one request at a time and without prefix
reuse: an oracle that shares no state with a server.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from loriner.adapters import formats
from loriner.adapters.mixture import combine
from loriner.adapters.pool import SeatWeights, pack
from loriner.engine.cpu_runner import CpuRunner
from loriner.model.config import ModelConfig
from loriner.model.transformer import layout
from tests.adapters.samples import SEVEN, config, tensors, write_adapter
from tests.engines import build_engine, engine_config
from tests.fakes import make_request
from tests.servers import Case
from tests.tiny import IM_END, IM_START, tiny_config, write_tiny_base

MAX_LEN = 8192
RANKS = (1, 2, 4, 8, 16, 3, 5, 24)


class Kit:
    """`kit.base`, `kit.adapters["a3"]` and `kit.alone(prompt, "a3", 16)`."""

    def __init__(self, folder: Path) -> None:
        self.base = write_tiny_base(folder / "tiny", max_position_embeddings=MAX_LEN)
        self.modules = ModelConfig.from_hf(tiny_config(max_position_embeddings=MAX_LEN)).modules()
        self.adapters = {f"a{i}": self._write(folder / f"a{i}", i) for i in range(len(RANKS))}
        self.alone = cache(self._alone)
        self._runner = CpuRunner(engine_config(self.base))

    def mixed(self, prompt: str, parts: Mapping[str, float], max_tokens: int = 16) -> list[int]:
        """What these adapters, each times its scale, answer together."""
        loaded = [formats.load(self.adapters[name], self.modules) for name in parts]
        adapter = combine("mix", list(zip(loaded, parts.values(), strict=True)))
        seat = pack(adapter, layout(self._runner.model_config), self._runner.dtype)
        return self._answer(prompt, "mix", {"mix": seat}, max_tokens)

    def expected(self, cases: Iterable[Case]) -> dict[Case, list[int]]:
        return {case: self.alone(*case) for case in cases}

    def embedding(self, ids: tuple[int, ...], adapter: str | None) -> list[float]:
        """What these tokens become alone, in one step."""
        weights = {adapter: self._seat(adapter)} if adapter else {}
        settings = engine_config(self.base, prefix_cache=False, max_step_tokens=MAX_LEN)
        engine = build_engine(settings, weights, self._runner)
        engine.run_all([make_request(ids, generation=adapter, embeds=True)])
        engine.close()
        return array("f", engine.ends["r", 0].embedding).tolist()

    def _write(self, folder: Path, i: int) -> Path:
        targets = ("q_proj", "v_proj") if i % 2 else SEVEN
        weights = tensors(targets, RANKS[i], modules=self.modules, seed=i)
        return write_adapter(folder, weights, config(target_modules=[*targets], r=RANKS[i]))

    def _alone(self, prompt: str, adapter: str | None, max_tokens: int = 16) -> list[int]:
        weights = {adapter: self._seat(adapter)} if adapter else {}
        return self._answer(prompt, adapter, weights, max_tokens)

    def _answer(
        self, prompt: str, adapter: str | None, weights: Mapping[str, SeatWeights], max_tokens: int
    ) -> list[int]:
        settings = engine_config(self.base, prefix_cache=False)
        engine = build_engine(settings, weights, self._runner)
        request = make_request(
            _rendered(prompt), generation=adapter, max_tokens=max_tokens, ignore_eos=True
        )
        engine.run_all([request])
        engine.close()
        return engine.outputs[request.request_id, 0]

    def _seat(self, adapter: str) -> SeatWeights:
        loaded = formats.load(self.adapters[adapter], self.modules)
        return pack(loaded, layout(self._runner.model_config), self._runner.dtype)


def _rendered(prompt: str) -> list[int]:
    """The tiny base's chat template: each byte is a token."""
    return [
        *(IM_START, *b"user\n", *prompt.encode(), IM_END, *b"\n"),
        *(IM_START, *b"assistant\n"),
    ]
