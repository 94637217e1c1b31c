"""Moving an orthogonal matrix downhill without leaving the orthogonal matrices (SpinQuant's search, Liu et al., 2024).

The gradient G of a loss at Q has one part that turns Q and one that would stretch it; only the first counts:

    A = G Q^T - Q G^T                        skew: a direction of turning
    Q <- (I + r/2 D)^-1 (I - r/2 D) Q        Cayley: exactly orthogonal for any skew D and step r

D is A with Adam's averages, taken entry by entry: the first moment of a skew matrix is skew, the second symmetric, so their quotient is skew. All in
float64, and after every step the matrix is drawn back onto the orthogonal ones, so that rounding errors do not add up.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

FIRST, SECOND, TINY = 0.9, 0.99, 1e-12


@dataclass
class Turner:
    """One orthogonal matrix being learned.

    Attributes:
        matrix: float64 [n, n], the matrix as it stands.
    """

    matrix: torch.Tensor
    _mean: torch.Tensor = field(init=False)
    _square: torch.Tensor = field(init=False)
    _steps: int = 0

    def __post_init__(self) -> None:
        self.matrix = nearest_orthogonal(self.matrix.double())
        self._mean, self._square = torch.zeros_like(self.matrix), torch.zeros_like(self.matrix)

    def step(self, gradient: torch.Tensor, rate: float) -> None:
        """Turns the matrix by about `rate` radians in its fastest plane, against the gradient of the loss with respect to its entries [n, n].

        A gradient that is not finite is left out.
        """
        g = gradient.to(self.matrix)
        if not bool(torch.isfinite(g).all()):
            return
        skew = g @ self.matrix.T
        skew = skew - skew.T
        self._steps += 1
        self._mean = FIRST * self._mean + (1 - FIRST) * skew
        self._square = SECOND * self._square + (1 - SECOND) * skew.square()
        mean, square = self._mean / (1 - FIRST**self._steps), self._square / (1 - SECOND**self._steps)
        direction = mean / (square.sqrt() + TINY)
        # entries of about one: the fastest plane turns by the spectral norm, some 2 sqrt(n) where they are independent
        self.matrix = cayley(direction, rate / (2 * len(direction) ** 0.5), self.matrix)


def cayley(skew: torch.Tensor, rate: float, matrix: torch.Tensor) -> torch.Tensor:
    """(I + r/2 A)^-1 (I - r/2 A) Q for a skew A, float64 [n, n]."""
    eye = torch.eye(len(skew), dtype=skew.dtype, device=skew.device)
    half = skew * (rate / 2)
    return nearest_orthogonal(torch.linalg.solve(eye + half, (eye - half) @ matrix))


def nearest_orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The orthogonal matrix nearest to one that is almost orthogonal: two Newton steps of the polar factor, quadratically convergent."""
    for _ in range(2):
        matrix = 1.5 * matrix - 0.5 * matrix @ (matrix.T @ matrix)
    return matrix
