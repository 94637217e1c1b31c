"""The slow, obvious feedback loop in float64: after each rounding, all weights still free are re-solved by least squares."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Nearest = Callable[[int, int, float], tuple[int, float]]  # (row, column, wanted) -> (code, value)


def one_sided(w: np.ndarray, gram: np.ndarray, nearest: Nearest) -> np.ndarray:
    """Codes [rows, cols] for min tr(E gram E^T): columns in order, rows apart."""
    codes = np.zeros(w.shape, dtype=np.int64)
    for i in range(w.shape[0]):
        codes[i] = _sequential(w[i], gram, lambda j, x, i=i: nearest(i, j, x))
    return codes


def two_sided(w: np.ndarray, gram: np.ndarray, outer: np.ndarray, nearest: Nearest, width: int) -> np.ndarray:
    """Codes for min tr(outer E gram E^T): blocks of `width` columns, in each row after row, as one long vector under kron(outer, gram)."""
    rows, cols = w.shape
    order = [(i, j) for a in range(0, cols, width) for i in range(rows) for j in range(a, min(a + width, cols))]
    flat = np.array([i * cols + j for i, j in order])
    metric = np.kron(outer, gram)[np.ix_(flat, flat)]
    found = _sequential(w.reshape(-1)[flat], metric, lambda n, x: nearest(*order[n], x))
    codes = np.zeros(rows * cols, dtype=np.int64)
    codes[flat] = found
    return codes.reshape(rows, cols)


def _sequential(w: np.ndarray, metric: np.ndarray, nearest: Callable[[int, float], tuple[int, float]]) -> np.ndarray:
    codes = np.zeros(len(w), dtype=np.int64)
    error = np.zeros(len(w))  # w - value of what is fixed
    for j in range(len(w)):
        # free variables r = j …: minimise over them with error[:j] given  =>  error_r = -error_f M_fr M_rr^-1
        best = np.linalg.solve(metric[j:, j:], metric[j:, :j] @ error[:j])
        codes[j], value = nearest(j, w[j] + best[0])
        error[j] = w[j] - value
    return codes
