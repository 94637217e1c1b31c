"""What a solver is, and the hand-written table of all of them.

A solver chooses the codes of one weight under a scheme. It says beforehand which calibration statistics it needs, and
gives back a `QTensor` with its loss, never floats to be rounded again. It is written against `fit` and `snap`, so it serves every scheme
alike. Adding one is a file with a `SOLVER` and one row here (see docs/adding_a_solver.md).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from fewbit.base.errors import InputError

if TYPE_CHECKING:
    import torch

    from fewbit.math.stats import Stats
    from fewbit.num.qtensor import QTensor
    from fewbit.num.scheme import Scheme

# options whose value is one of a few words, in whichever solver
WORDS: dict[str, tuple[str, ...]] = {
    "search": ("absmax", "minmax", "percentile", "mse", "lsq"),
    "order": ("given", "importance"),
}

Need = Literal["importance", "gram", "cross_gram", "absmax", "absmean", "histogram"]


@dataclass(frozen=True)
class Solved:
    """A solved weight.

    Attributes:
        q: the quantised tensor.
        loss: what the solver minimised, summed over the weights: weighted squared error or output error.
        notes: what was out of the ordinary (damping raised, fallbacks, dead columns), one sentence each.
    """

    q: QTensor
    loss: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Solver:
    """One way to choose codes.

    Attributes:
        name: as the user types it after `--method`.
        needs: statistics of the weight's input space that must have been collected.
        solve: (w [*batch, rows, cols], stats or None, scheme, *, seed, options) -> Solved.
        options: every option with its default; unknown options are errors.
        words: the words that an option may be, where they differ from `WORDS`.
        summary: one line for `fewbit methods`.
        outliers: whether its answers hold weights beside the codes, which only dense outputs can store.
        together: (loss, batches, start, wanted, *, seed, options, check_stop) -> {name: Solved}, called for all weights of a block once each is
            solved, to improve them together; see `solve.learned`. None for solvers of single weights.
    """

    name: str
    needs: frozenset[str]
    solve: Callable[..., Solved]
    options: Mapping[str, Any] = field(default_factory=dict)
    words: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    summary: str = ""
    outliers: bool = False
    together: Callable[..., dict[str, Solved]] | None = None

    def __call__(
        self,
        w: torch.Tensor,
        stats: Stats | None,
        scheme: Scheme,
        *,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
    ) -> Solved:
        """Solve with the given options over the defaults.

        Raises:
            InputError: FB-E0704 for an unknown option, an unsuitable value or missing statistics.
        """
        return self.solve(w, stats, scheme, seed=seed, options=self.check(stats, options or {}))

    def check(self, stats: Stats | None, options: Mapping[str, Any]) -> dict[str, Any]:
        """All options, defaults filled in, after checking them and that the statistics needed are there."""
        unknown_first = sorted(options, key=self.options.__contains__)
        faults = [fault for name in unknown_first if (fault := self.fault(name, options[name]))]
        if faults:
            raise InputError("FB-E0704", faults[0])
        missing = [need for need in sorted(self.needs) if stats is None or getattr(stats, need) is None]
        if missing:
            raise InputError("FB-E0704", f"{self.name} needs calibration statistics: {', '.join(missing)}")
        return {**self.options, **options}

    def fault(self, option: str, value: Any) -> str | None:
        """Why an option cannot have this value, or None; the kind of value is that of its default, and no number is negative or without end."""
        if option not in self.options:
            return f"method {self.name} has no option {option!r}; it has {', '.join(self.options) or 'none'}"
        default = self.options[option]
        if isinstance(default, bool):
            wanted, right = "true or false", isinstance(value, bool)
        elif isinstance(default, int | float):
            whole = isinstance(default, int)
            least, most = RANGES.get(option, (0, math.inf))
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            wanted = "a whole number" if whole else "a number"
            wanted += f" of {least} or more" if most == math.inf else f" from {least} to {most}"
            right = number and not (whole and value != int(value)) and least <= value <= most
        elif isinstance(default, str):
            words = {**WORDS, **self.words}.get(option, (value,))
            wanted, right = f"one of {', '.join(map(str, words))}", value in words
        else:
            return None
        return None if right else f"option {option} of method {self.name} must be {wanted}, got {value!r}"


# option of any solver -> its least and largest value; others are not negative
RANGES: Mapping[str, tuple[float, float]] = {
    "steps": (1, math.inf),
    "percentile": (0, 100),
    "tightest": (0, 1),
    "outliers": (0, 1),
    "most": (0, 1),
    "growth": (1, math.inf),
}


def collected(stats: Stats | None) -> Stats:
    """Statistics that a solver's `needs` asked for.

    Raises:
        InputError: FB-E0704 when there are none.
    """
    if stats is None:
        raise InputError("FB-E0704", "calibration statistics are needed")
    return stats


class _Table(Mapping[str, Solver]):
    """Name -> Solver; a row's module is imported when it is asked for."""

    def __init__(self, rows: Mapping[str, str]) -> None:
        self._rows = rows

    def __getitem__(self, name: str) -> Solver:
        module, _, attribute = self._rows[name].partition(":")
        return getattr(importlib.import_module(module), attribute or "SOLVER")

    def __contains__(self, name: object) -> bool:
        return name in self._rows  # without importing the row's module

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


# name -> module (or module:attribute) that defines the Solver
SOLVERS: Mapping[str, Solver] = _Table(
    {
        "rtn": "fewbit.solve.rtn",
        "hqq": "fewbit.solve.hqq",
        "clip": "fewbit.solve.clip",
        "gptq": "fewbit.solve.gptq",
        "learned": "fewbit.solve.learned",
        "spqr": "fewbit.solve.spqr",
        "int8-split": "fewbit.solve.int8_split",
        "imatrix": "fewbit.solve.rtn:WEIGHTED",
    }
)


def solver_named(name: str) -> Solver:
    """A solver by name.

    Raises:
        InputError: FB-E0704 with the names that exist.
    """
    if name not in SOLVERS:
        raise InputError("FB-E0704", f"no method is called {name!r}; there are {', '.join(SOLVERS)}")
    return SOLVERS[name]
