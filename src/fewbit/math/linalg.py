"""Factors of symmetric positive matrices, made so that they cannot fail: a damping ladder and a named refusal at its end.

Error feedback (LDLQ, which is GPTQ written forwards) needs one factor of the input gram H: upper triangular U with H = U U^T. Then

    tr(E H E^T) = sum_j pivot_j^2 |e_j + sum_{k<j} feedback_kj e_k|^2        e = w - w_hat, pivot = diag U, feedback = U / pivot

so column j is rounded with the earlier errors times `feedback` added, and costs pivot_j^2 times what rounding leaves. GPTQ takes
the factor of the inverse instead: two Cholesky factorisations and an inversion for the same numbers (arXiv 2307.13304).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from fewbit.base.errors import InputError

LADDER = (1.0, 10.0, 100.0, 1000.0)  # times the damping asked for
TURNED = 256  # rows that are turned over at once
ROWS = 1024  # right-hand sides that are solved for at once
HALF_TOKENS = 1024  # of bfloat16 whose products are rounded at once
PANELS = (128, 1024)  # fewest and most columns of a gram that are multiplied at once
DOUBLE = 2048  # up to this size factors are computed in float64; a larger one takes float32


@dataclass(frozen=True)
class Feedback:
    """The factor of one gram.

    Attributes:
        upper: float32 [n, n], strictly upper: entry (k, j) is how much of column k's error column j takes over.
        pivot: float32 [n], > 0: weight of the square of what rounding column j leaves is pivot^2.
        dead: bool [n], inputs that were never anything but zero; nothing is fed to or from them.
        damping: the share of the mean diagonal that was added in the end.
        notes: what was out of the ordinary.
    """

    upper: torch.Tensor
    pivot: torch.Tensor
    dead: torch.Tensor
    damping: float
    notes: tuple[str, ...] = ()

    def solve(self, rhs: torch.Tensor) -> torch.Tensor:
        """rhs (H + damping)^-1 by the factor: floating [rows, n], both in visiting order -> the same dtype."""
        upper, pivot = self.upper.to(rhs.dtype), self.pivot.to(rhs.dtype)
        words = {"left": False, "unitriangular": True}  # the diagonal of `upper` counts as ones

        def solved(some: torch.Tensor) -> torch.Tensor:
            found = torch.linalg.solve_triangular(upper.T, some, upper=False, **words)
            return torch.linalg.solve_triangular(upper, found / pivot.square(), upper=True, **words)

        return by_rows(solved, rhs)

    def blockwise(self, width: int) -> Feedback:
        """The same factor for rounding `width` columns at once: no feedback inside a block, pivot^2 the diagonal of each block's metric."""
        full = (self.upper + torch.eye(self.pivot.numel(), device=self.pivot.device)) * self.pivot
        upper, pivot = torch.zeros_like(full), torch.empty_like(self.pivot)
        for j in range(0, pivot.numel(), width):
            cut = slice(j, j + width)
            inner = full[cut, cut]
            upper[:j, cut] = torch.linalg.solve_triangular(inner, full[:j, cut], upper=True, left=False)
            pivot[cut] = inner.square().sum(1).sqrt()
        return Feedback(upper, pivot, self.dead, self.damping, self.notes)


def add_gram(gram: torch.Tensor | None, x: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
    """gram [n, n] + alpha * x^T x for x [tokens, n], in place; None stands for zeros.

    The products below the diagonal are written to both sides: a little more than half of the work, for the same numbers.

    Where x is bfloat16 it is multiplied so, a thousand tokens at a time, for products come out rounded to bfloat16 and their errors (2^-9 at the most) are to
    average out in the float32 sum: of 65,536 tokens an entry is off by 1.4e-4 of itself, little beside the usual damping.
    """
    n = x.shape[1]
    if gram is None:
        gram = torch.zeros(n, n, dtype=torch.float32 if x.dtype == torch.bfloat16 else x.dtype, device=x.device)
    if x.dtype == torch.bfloat16 and len(x) > HALF_TOKENS:
        for some in x.split(HALF_TOKENS):
            add_gram(gram, some, alpha)
        return gram
    width = min(PANELS[1], max(PANELS[0], n // 6 // PANELS[0] * PANELS[0]))
    for a in range(0, n, width):
        b = min(a + width, n)
        part = x[:, a:].T @ x[:, a:b]  # [n - a, b - a]
        gram[a:, a:b].add_(part, alpha=alpha)
        gram[a:b, b:].add_(part[b - a :].T, alpha=alpha)
    return gram


def damped(gram: torch.Tensor, damping: float, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(gram + damping * mean diagonal * identity with dead columns made independent, dead), in `dtype` or the gram's; always a copy.

    Raises:
        InputError: FB-E0705 when the gram holds NaN or infinity, or has no positive entry on its diagonal.
    """
    diagonal = gram.diagonal()
    if not bool(torch.isfinite(gram.sum(0)).all()):  # sums carry every NaN and infinity, and are cheaper to test
        raise InputError("FB-E0705", "the gram of the inputs holds NaN or infinity")
    dead = diagonal <= 0
    if bool(dead.all()):
        raise InputError("FB-E0705", "the inputs were all zero")
    out = gram.to(dtype or gram.dtype, copy=True)
    mean = out.diagonal()[~dead].mean()
    if bool(dead.any()):
        out[dead], out[:, dead] = 0, 0
    out.diagonal().add_(damping * mean)
    return out, dead


def cholesky_(matrix: torch.Tensor) -> torch.Tensor | None:
    """The lower factor L of a symmetric contiguous matrix = L L^T, written over it (large ones are not held twice); None if there is none."""
    lower = matrix.mT  # LAPACK's order, in which it works in place
    info = torch.empty(0, dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    return lower if int(info) == 0 and bool(torch.isfinite(lower.sum(0)).all()) else None


def turn_(matrix: torch.Tensor) -> torch.Tensor:
    """Rows and columns in reverse order, in place: [n, n]."""
    n = len(matrix)
    for a in range(0, n // 2, TURNED):
        b = min(a + TURNED, n // 2)
        top = matrix[a:b].flip(0, 1)
        matrix[a:b] = matrix[n - b : n - a].flip(0, 1)
        matrix[n - b : n - a] = top
    if n % 2:
        matrix[n // 2] = matrix[n // 2].flip(0)
    return matrix


def feedback_factor(gram: torch.Tensor, damping: float = 0.01, *, permutation: torch.Tensor | None = None) -> Feedback:
    """Factor a gram for error feedback, raising the damping until it succeeds.

    Args:
        gram: floating [n, n], symmetric, positive semi-definite up to rounding; any scale.
        damping: share of the mean diagonal to add.
        permutation: int64 [n]: visit column permutation[j] as the j-th.

    Raises:
        InputError: FB-E0705 when the gram is not finite, all zero, or cannot be factored with any damping of the ladder.
    """
    dtype = torch.float64 if gram.shape[0] <= DOUBLE else torch.float32
    if permutation is not None:
        gram = gram[permutation[:, None], permutation]
    notes: list[str] = []
    for step in LADDER:
        matrix, dead = damped(gram, damping * step, dtype)
        lower = cholesky_(turn_(matrix))  # J H J = L L^T  =>  H = (J L J)(J L J)^T, J L J upper
        if lower is not None:
            upper = turn_(lower)
            pivot = upper.diagonal().clone()
            upper = upper.div_(pivot).triu_(1)
            return Feedback(upper.float(), pivot.float(), dead, damping * step, tuple(notes))
        del matrix  # the next step makes another
        notes.append(f"damping of {damping * step:g} did not make the gram positive definite")
    raise InputError("FB-E0705", f"the gram cannot be factored even with damping of {damping * LADDER[-1]:g}")


def by_rows(
    solve: Callable[[torch.Tensor], torch.Tensor], rhs: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`solve` of some rows at a time, so that what it makes on the way stays small: [rows, n] -> `out`, or a new tensor like `rhs`."""
    out = torch.empty(rhs.shape, dtype=rhs.dtype, device=rhs.device) if out is None else out
    for a in range(0, len(rhs), ROWS):
        out[a : a + ROWS] = solve(rhs[a : a + ROWS])
    return out


def _solved(lower: torch.Tensor, rhs: torch.Tensor) -> torch.Tensor:
    """rhs (L L^T)^-1 in the factor's dtype."""
    found = torch.linalg.solve_triangular(lower.mT, rhs.to(lower.dtype), upper=True, left=False)
    return torch.linalg.solve_triangular(lower, found, upper=False, left=False)


def solve_damped(
    gram: torch.Tensor, rhs: torch.Tensor, damping: float = 0.01, *, inplace: bool = False
) -> tuple[torch.Tensor, tuple[str, ...]]:
    """rhs (gram + damping)^-1 by Cholesky: rhs [rows, n] -> float32 [rows, n] and notes; dead columns give rhs / damping as is.

    Args:
        inplace: write the answer over `rhs` (float32), which a failure leaves useless.

    Raises:
        InputError: FB-E0705 as for `feedback_factor`.
    """
    dtype = torch.float64 if gram.shape[0] <= DOUBLE else torch.float32
    notes: list[str] = []
    for step in LADDER:
        matrix, _ = damped(gram, damping * step, dtype)
        lower = cholesky_(matrix)
        if lower is not None:
            found = by_rows(partial(_solved, lower), rhs, rhs if inplace else None)
            if bool(torch.isfinite(found.sum(0)).all()):
                return found.float(), tuple(notes)
            if inplace:
                break
        del matrix, lower
        notes.append(f"damping of {damping * step:g} did not make the gram positive definite")
    raise InputError("FB-E0705", f"the gram cannot be factored even with damping of {damping * LADDER[-1]:g}")
