"""How numba compiles kernels.

OUTER   what Python calls, and whatever makes arrays
INNER   what kernels call: it borrows its arrays. Elsewhere numba counts references to every array that is handed on, sliced or taken from a
        tuple, by atomic instructions that wait for all stores before them: two thirds of the time of the vector codes went there.
"""

from __future__ import annotations

from numba.core.options import DefaultOptions

OUTER = {"nogil": True, "cache": True, "error_model": "numpy"}
INNER = OUTER | ({"_nrt": False} if hasattr(DefaultOptions, "_nrt") else {})  # not a promised option: without it, slower
