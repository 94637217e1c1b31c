"""What the quantised model got wrong so far, as far as the present inputs tell it: a regression that knows how far to trust itself.

    Y = B X        X [channels, tokens] inputs of a stage as the quantised model makes them
                   Y [outputs, tokens]  what should be added: to the inputs themselves, or to what comes out of the block
    B = Y X^T (X X^T + damping)^-1

Few tokens against many channels make B follow noise: then the correction does harm. So a few sequences are left out of the sums, the damping that
foretells these best is taken, none at all where nothing does, and the sequences are put back for the answer.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fewbit.base.errors import InputError
from fewbit.math.linalg import DOUBLE, add_gram, solve_damped

# shares of the mean diagonal that are tried; every second for large grams
DAMPINGS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
CAUTIOUS = 1.0  # where there is nothing to judge by
TRIED = 512  # rows of B by which they are judged
HELD = 4  # of so many batches one gives its first sequence to judge by
HELD_TOKENS = 2048  # about so many altogether, for they are kept as they are


def held_batches(batches: int, length: int) -> frozenset[int]:
    """The batches whose first sequence is left out of the sums; none where there is but one."""
    step = max(HELD, -(-batches // max(1, HELD_TOKENS // length)))
    return frozenset(range(0, batches, step)) if batches > 1 else frozenset()


class Drift:
    """The sums of the regression, and the tokens left out of them.

    Attributes:
        moved: float32 [outputs, channels], sum of y x^T; gram: [channels, channels], sum of x x^T over the same tokens, or None when the
            statistics' own is over the same tokens. Those left out are in `gram` and not in `moved`.
        held: (x, y) left out.
    """

    def __init__(self) -> None:
        self.moved: torch.Tensor | None = None
        self.gram: torch.Tensor | None = None
        self.held: list[tuple[torch.Tensor, torch.Tensor]] = []

    @classmethod
    def together(cls, parts: Iterable[Drift]) -> Drift:
        """The sums of several, which are used up."""
        whole = cls()
        for part in parts:
            if part.moved is not None:
                whole.moved = part.moved if whole.moved is None else whole.moved.add_(part.moved)
            if part.gram is not None:
                whole.gram = part.gram if whole.gram is None else whole.gram.add_(part.gram)
            whole.held += part.held
        return whole

    def add(self, x: torch.Tensor, y: torch.Tensor, length: int, hold: bool) -> None:
        """Adds tokens x [tokens, channels], y [tokens, outputs]; with `hold` the first `length` of them are left out."""
        if hold:
            self.held.append((x[:length].clone(), y[:length].clone()))
            x, y = x[length:], y[length:]
        x, y = x.float(), y.float()
        self.moved = y.T @ x if self.moved is None else self.moved.addmm_(y.T, x)

    def end(self, gram: torch.Tensor, later: torch.Tensor) -> None:
        """Notes the gram of the tokens so far: that of the statistics, less tokens [n, channels] in it that are not in these sums."""
        self.gram = gram.clone()
        if len(later):
            add_gram(self.gram, later.float(), alpha=-1)

    def solve(self, gram: torch.Tensor) -> torch.Tensor | None:
        """B float32 [outputs, channels], or None where nothing is better. The sums are used up.

        Args:
            gram: that of the statistics, used where `self.gram` is None; left as it is, but for rounding.
        """
        (moved, self.moved), (own, self.gram) = (self.moved, None), (self.gram, None)
        if moved is None:
            return None
        gram = gram if own is None else own
        try:
            damping = self._damping(gram, moved)
            if damping is None:
                return None
            for x, y in self.held:
                moved.addmm_(y.float().T, x.float())
            found, _ = solve_damped(gram, moved, damping, inplace=True)
        except InputError:  # a gram that cannot be factored: nothing to regress on
            return None
        return found

    def _damping(self, gram: torch.Tensor, moved: torch.Tensor) -> float | None:
        """The damping that foretells the tokens left out best, None where zero does."""
        if not self.held:
            return CAUTIOUS
        large = len(gram) > DOUBLE
        some = gram if large else gram.clone()  # a large one is not held twice: what is taken out is put back
        self._put_held(some, -1)
        try:
            return self._least(some, moved, DAMPINGS[1::2] if large else DAMPINGS)
        finally:
            if large:
                self._put_held(some, 1)

    def _put_held(self, gram: torch.Tensor, sign: float) -> None:
        for x, _ in self.held:
            add_gram(gram, x.float(), alpha=sign)

    def _least(self, gram: torch.Tensor, moved: torch.Tensor, dampings: tuple[float, ...]) -> float | None:
        rows = slice(None, None, -(-len(moved) // TRIED))
        best: float | None = None
        least = self._left(None, rows)
        for damping in dampings:
            found, _ = solve_damped(gram, moved[rows], damping)
            left = self._left(found, rows)
            if left < least:
                best, least = damping, left
        return best

    def _left(self, found: torch.Tensor | None, rows: slice) -> float:
        """Squared error of the tokens left out."""
        total = 0.0
        for x, y in self.held:
            wanted = y[:, rows].float()
            total += float(
                (wanted if found is None else wanted - x.float() @ found.T).square().sum(dtype=torch.float64)
            )
        return total
