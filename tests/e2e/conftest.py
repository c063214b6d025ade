"""Fixtures of the tests that start real servers or ask transformers what is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.kit import Kit


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return Kit(tmp_path_factory.mktemp("kit"))


@pytest.fixture(scope="module")
def oracle(smollm2: Path) -> Any:
    """The base as transformers opens it, its 4-bit linears decoded to fp32 by bitsandbytes itself:
    its own CPU forward rounds to bf16 on some machines."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2)
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear4bit):
            module.weight.quant_state.dtype = torch.float32
            dense = torch.nn.Linear(module.in_features, module.out_features, bias=False)
            dense.weight.data = dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert dense.weight.dtype == torch.float32
            model.set_submodule(name, dense)
    return torch.nn.Module.float(model).eval()  # its own float() refuses: it thinks it is 4-bit
