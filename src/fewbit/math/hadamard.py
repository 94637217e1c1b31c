"""Hadamard matrices: H of +1 and -1 with H H^T = n I, and the fast product with one.

Orders. Sylvester doubles any order. Paley I gives q + 1 for a prime power q = 3 mod 4, Paley II gives 2 (q + 1) for q = 1 mod 4. An order n is taken apart
as base * 2^k with the smallest base that Paley reaches, so H = base (x) Sylvester. That covers the widths of nearly all models: 11008 = 344 * 32
from the field of 7^3 elements, 13824 = 108 * 128, 14336 = 28 * 512, 18944 = 148 * 128.

Nothing is stored: a base matrix is six lines of quadratic residues (R. E. A. C. Paley, 1933).
"""

from __future__ import annotations

import functools
from itertools import product
from math import isqrt

import numpy as np
import torch

from fewbit.base.errors import InputError

_LARGEST_BASE = 4096
_FACTOR = 64  # the power of two is applied in dense factors of this order


def order_parts(n: int) -> tuple[int, int] | None:
    """(base, power of two) with base * power == n and base 1 or a Paley order, the base as small as can be; None if there is none."""
    if n < 1:
        return None
    power = n & -n
    while power >= 1:
        base = n // power
        if base == 1 or (base % 4 == 0 and base <= _LARGEST_BASE and _paley_field(base) is not None) or base == 2:
            return base, power
        power //= 2
    return None


def hadamard(n: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> torch.Tensor:
    """A Hadamard matrix of order n with entries +1 and -1, [n, n].

    Raises:
        InputError: FB-E0705 when no construction reaches the order.
    """
    base, power = _parts(n)
    return torch.kron(torch.from_numpy(_base(base)), torch.from_numpy(_sylvester(power))).to(device=device, dtype=dtype)


def rotate(x: torch.Tensor, *, inverse: bool = False) -> torch.Tensor:
    """x times the orthogonal matrix hadamard(n) / sqrt(n) along the last axis, floating [..., n]; `inverse` uses its transpose.

    Works in float32 (float64 for float64 input) in O(n (base + 64 log n)) a row and returns x's dtype.
    """
    n = x.shape[-1]
    base, power = _parts(n)
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = x.to(kind).reshape(-1, base, power)
    if base > 1:
        matrix = torch.from_numpy(_base(base)).to(out)
        out = torch.matmul(matrix if inverse else matrix.T, out)
    left, right = 1, power
    while right > 1:
        step = min(_FACTOR, right)
        right //= step
        matrix = torch.from_numpy(_sylvester(step)).to(out)  # symmetric
        out = torch.matmul(matrix, out.reshape(-1, base * left, step, right))
        left *= step
    return (out.reshape(x.shape) * n**-0.5).to(x.dtype)


def random_signs(n: int, seed: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """float32 [n] of +1 and -1 from a seed, the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 2, (n,), generator=generator) * 2 - 1).float().to(device)


def _parts(n: int) -> tuple[int, int]:
    parts = order_parts(n)
    if parts is None:
        raise InputError(
            "FB-E0705", f"no Hadamard matrix of order {n} can be built: it is not a Paley order times a power of two"
        )
    return parts


@functools.lru_cache(maxsize=8)
def _sylvester(n: int) -> np.ndarray:
    """float64 [n, n] for n a power of two."""
    matrix = np.ones((1, 1))
    while matrix.shape[0] < n:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


@functools.lru_cache(maxsize=4)
def _base(n: int) -> np.ndarray:
    """float64 [n, n] for n 1, 2 or a Paley order."""
    if n <= 2:
        return _sylvester(n)
    field = _paley_field(n)
    if field is None:
        raise InputError("FB-E0705", f"{n} is no Paley order")
    p, k = field
    jacobsthal = _jacobsthal(p, k)  # chi(a_i - a_j)
    q = p**k
    if q % 4 == 3:
        bordered = np.block([[np.zeros((1, 1)), np.ones((1, q))], [-np.ones((q, 1)), jacobsthal]])
        return np.eye(n) + bordered
    bordered = np.block([[np.zeros((1, 1)), np.ones((1, q))], [np.ones((q, 1)), jacobsthal]])
    return np.kron(bordered, [[1.0, 1.0], [1.0, -1.0]]) + np.kron(np.eye(q + 1), [[1.0, -1.0], [-1.0, -1.0]])


@functools.cache
def _paley_field(n: int) -> tuple[int, int] | None:
    """(p, k) of the field whose squares give a Hadamard matrix of order n, or None. Degrees up to 3."""
    candidates = [n - 1] if (n - 1) % 4 == 3 else []
    if n % 2 == 0 and (n // 2 - 1) % 4 == 1:
        candidates.append(n // 2 - 1)
    for q in candidates:
        for k in (1, 2, 3):
            p = round(q ** (1 / k))
            if p**k == q and _prime(p):
                return p, k
    return None


def _prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, isqrt(n) + 1))


def _jacobsthal(p: int, k: int) -> np.ndarray:
    """float64 [p^k, p^k]: +1 where a_i - a_j is a nonzero square of the field, -1 where it is none, 0 on the diagonal."""
    elements = np.array(list(product(range(p), repeat=k)))  # coefficients, highest power first
    places = p ** np.arange(k - 1, -1, -1)
    squares = np.unique(_field_squares(elements, p, k) @ places)
    character = -np.ones(p**k)
    character[squares] = 1.0
    character[0] = 0.0
    difference = (elements[:, None, :] - elements[None, :, :]) % p
    return character[difference @ places]


def _field_squares(elements: np.ndarray, p: int, k: int) -> np.ndarray:
    """The square of every element of the field of p^k, modulo an irreducible polynomial x^k + sum_i modulus_i x^i (k <= 3)."""
    full = np.zeros((len(elements), 2 * k - 1), dtype=np.int64)
    for i in range(k):
        for j in range(k):
            full[:, i + j] += elements[:, i] * elements[:, j]
    if k == 1:
        return full % p
    modulus = next(  # of degree 2 or 3: irreducible exactly when it has no root
        lower
        for lower in product(range(p), repeat=k)
        if all((pow(x, k, p) + sum(c * pow(x, k - 1 - i, p) for i, c in enumerate(lower))) % p for x in range(p))
    )
    for top in range(k - 1):  # x^(2k-2-top) = -modulus * x^(k-2-top)
        for i, c in enumerate(modulus):
            full[:, top + 1 + i] -= full[:, top] * c
    return full[:, k - 1 :] % p
