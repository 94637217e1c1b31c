"""How numba compiles kernels.

OUTER   what Python calls, whatever makes arrays, and small functions that are inlined anyway
INNER   what kernels call: it borrows its arrays. Elsewhere numba counts references to every array that is handed on, sliced or taken from a
        tuple, by atomic instructions that wait for all stores before them: two thirds of the time of the vector codes went there.
"""

from __future__ import annotations

from numba.core.options import DefaultOptions

OUTER = {"nogil": True, "cache": True, "error_model": "numpy"}
# not an option that numba promises: without it, slower
INNER = OUTER | ({"_nrt": False} if hasattr(DefaultOptions, "_nrt") else {})
