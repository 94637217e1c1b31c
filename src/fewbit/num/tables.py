"""Magnitude tables of the vector grids, taken at run time from the `gguf` package (llama.cpp's own Python constants).

ggml writes the magnitudes of its i-quants as bytes 8, 25, 43 (2-bit types) and 4, 12 ... 62 (3-bit xxs) and halves the scale three or two
times; dividing the table by 8 or 4 instead gives the same products and one rule for all scales: an odd number times the f16 super-scale.

    iq2*    1, 3.125, 5.375            [256 | 512 | 1024, 8]
    iq3xxs  1, 3, 5 ... 13, 15.5       [256, 4]
    iq3s    1, 3, 5 ... 15             [512, 4]
    iq1     -1, 0, 1                   [2048, 8]
    iq1m    iq1 + 1/8 (first half), iq1 - 1/8 (second half)     [4096, 8]
"""

from __future__ import annotations

from types import ModuleType

import numpy as np

from fewbit.base.errors import InputError

# name -> class in gguf.quants, unit of its table
_SOURCES: dict[str, tuple[str, float]] = {
    "iq2xxs": ("IQ2_XXS", 8.0),
    "iq2xs": ("IQ2_XS", 8.0),
    "iq2s": ("IQ2_S", 8.0),
    "iq3xxs": ("IQ3_XXS", 4.0),
    "iq3s": ("IQ3_S", 1.0),
    "iq1": ("IQ1_S", 1.0),
}
IQ1_DELTA = 0.125


def magnitude_table(name: str) -> np.ndarray:
    """float64 [entries, width], read-only: the table of a vector grid.

    Raises:
        InputError: FB-E0601 for an unknown name, FB-E0610 when the `gguf` package is missing.
    """
    if name == "iq1m":
        signed = magnitude_table("iq1")
        table = np.concatenate([signed + IQ1_DELTA, signed - IQ1_DELTA])
    elif name in _SOURCES:
        source, unit = _SOURCES[name]
        holder = getattr(_gguf_quants(name), source)
        holder.init_grid()
        table = np.array(holder.grid, dtype=np.float64).reshape(holder.grid_shape) / unit
    else:
        raise InputError("FB-E0601", f"no vector table is called {name!r}")
    table.setflags(write=False)
    return table


def _gguf_quants(name: str) -> ModuleType:
    try:
        from gguf import quants
    except ImportError as error:
        raise InputError(
            "FB-E0610", f"the codebook {name} comes from the gguf package, which is not installed"
        ) from error
    return quants
