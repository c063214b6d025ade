"""The surface of the device code: `select(device)` gives the object whose methods the model calls.

`HostKernels` (host.py) says what each method means, `reference.py` what it computes. Nothing here
or below imports the rest of Loriner.
"""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)


def select(device: str) -> Any:
    """The kernels for `device`: cpu or cuda. Raises ValueError for one that has none."""
    if device == "cuda":
        from loriner.kernels.cuda.backend import CudaKernels

        return CudaKernels()
    if device != "cpu":
        raise ValueError(f"no kernels for device {device!r}")
    from loriner.kernels import native, reference
    from loriner.kernels.host import HostKernels

    if native.library() is None:
        logger.warning("no C compiler: the CPU runs the plain torch kernels, several times slower")
        return HostKernels(reference)
    from loriner.kernels import cpu

    return HostKernels(cpu)
