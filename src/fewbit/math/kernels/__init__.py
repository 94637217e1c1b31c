"""Fast kernels, each beside a plain version of the same signature: numba for the CPU, Triton for CUDA."""

from __future__ import annotations

import functools
import importlib.util


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported, which is asked of CUDA tensors only: it is no dependency."""
    return importlib.util.find_spec("triton") is not None
