"""The surface of the device code: `select(device)` returns the module whose functions the model
calls.

Every backend module has the names in `reference.py`, which defines what they mean. Nothing here or
below imports the rest of Loriner.
"""

from __future__ import annotations

import logging
from types import ModuleType

logger = logging.getLogger(__name__)


def select(device: str) -> ModuleType:
    """The kernels for `device`. Raises ValueError for one that has none."""
    if device != "cpu":
        raise ValueError(f"no kernels for device {device!r}")
    from loriner.kernels import native, reference

    if native.library() is None:
        logger.warning("no C compiler: the CPU runs the plain torch kernels, several times slower")
        return reference
    from loriner.kernels import cpu

    return cpu
