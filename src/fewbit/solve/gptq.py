"""GPTQ, in any scheme: one feedback loop whose every ingredient is an option.

    w' = w + (w C - w H) (H + damping)^-1     drift: the float model's outputs are the aim, the quantised model's inputs the means
    loop                                      codes, and parameters group by group on the fed weights     (`gptq_loop`)
    sweeps                                    codes and parameters once more against the whole quadratic   (`sweeps`)

H is the gram of the inputs as the quantised model sees them, C the cross-gram with the float model's inputs (arXiv 2504.02692, 2505.11695
go there step by step; the closed form is the same least squares). With the gram of the loss gradients at the outputs the loop is
two-sided: errors are also fed from row to row, so that what is left lies where the loss does not feel it (YAQA, arXiv 2505.22988).

Numerics cannot fail: dead inputs get no feedback, a gram that cannot be factored raises the damping, and at the end of the ladder the
answer is rounding to nearest, weighted by what is known. If the loop's answer has more error than rounding to nearest, the latter is kept.
Each of these is a sentence in the notes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fewbit.base.errors import InputError
from fewbit.math.linalg import DOUBLE, Feedback, damped, feedback_factor
from fewbit.math.scales import assemble, fit, quantize
from fewbit.math.search import Params, Search
from fewbit.math.stats import Stats
from fewbit.math.tiles import require_finite
from fewbit.num.grid import FloatGrid, VectorGrid
from fewbit.num.qtensor import QTensor
from fewbit.num.scheme import Scheme
from fewbit.solve.candidates import Candidates, by_row, join, neighbours, only, separable
from fewbit.solve.gptq_loop import WIDTH, Parameters, run_loop
from fewbit.solve.sweeps import Quadratic, sweep
from fewbit.solve.table import Solved, Solver, collected

MOST_CANDIDATES = 16  # the lanes of the kernel
SAMPLED_ROWS = 64  # rows on which the answer is compared with rounding to nearest


def solve(w: torch.Tensor, stats: Stats | None, scheme: Scheme, *, seed: int, options: Mapping[str, Any]) -> Solved:
    """Quantise `w` [*batch, rows, cols] (a stack shares the statistics); nothing is random, so `seed` is not used.

    Raises:
        InputError: FB-E0702 for non-finite weights, FB-E0703 when the statistics are of other channels, FB-E0704 for unsuitable options.
    """
    require_finite(w)
    scheme = scheme.weights_only
    if w.ndim < 2:
        raise InputError("FB-E0602", f"error feedback needs a matrix, got shape {tuple(w.shape)}")
    stats = collected(stats)
    if stats.channels != w.shape[-1]:
        raise InputError(
            "FB-E0703", f"statistics of {stats.channels} channels do not suit a weight of shape {tuple(w.shape)}"
        )
    if w.ndim == 2:
        return solve_matrix(w, stats, scheme, options)
    solved = [solve_matrix(part, stats, scheme, options) for part in w.reshape(-1, *w.shape[-2:])]
    notes = tuple(dict.fromkeys(note for one in solved for note in one.notes))
    return Solved(stack([one.q for one in solved], tuple(w.shape)), sum(one.loss for one in solved), notes)


def solve_matrix(w: torch.Tensor, stats: Stats, scheme: Scheme, options: Mapping[str, Any]) -> Solved:
    """One matrix [rows, cols]; the steps of this module's text."""
    w = w.float()
    search = Search(method=options["search"], steps=options["steps"])
    if scheme.is_leaf or (isinstance(scheme.grid, FloatGrid) and scheme.grid.bits > 16):
        return _rounded(
            w, stats, scheme, search, f"{scheme} stores numbers directly: rounded to nearest, without feedback"
        )
    try:
        problem = Problem.of(w, stats, options)
    except InputError as error:
        if error.code != "FB-E0705":
            raise
        return _rounded(w, stats, scheme, search, f"fallback to rounding to nearest: {error.message}")
    del w  # large, and what is wanted is another by now
    return solve_wanted(problem, stats, scheme, options)


def solve_wanted(problem: Problem, stats: Stats, scheme: Scheme, options: Mapping[str, Any]) -> Solved:
    """Loop and sweeps for wanted weights, and the comparison with rounding them to nearest."""
    search = Search(method=options["search"], steps=options["steps"])
    codes, params, loss = _loop(problem, scheme, search, options)
    problem.let_go()
    loss /= max(1, stats.count)
    notes, shape = list(problem.notes), tuple(problem.wanted.shape)
    quadratic = replace(problem.quadratic, w=problem.wanted)
    if options["sweeps"] and not isinstance(scheme.grid, VectorGrid):
        codes, params, loss = sweep(
            scheme, codes, params, quadratic, sweeps=options["sweeps"], tune=options["tune"] and by_row(scheme)
        )
    q = assemble(scheme, shape, codes, params)
    values = q.dequantize()
    if not _beats_rounding(problem, scheme, stats, values, search):
        nearest = quantize(scheme, problem.wanted, stats.importance, search)
        found, other = quadratic.loss(values), quadratic.loss(nearest.dequantize())
        if not found <= other:
            q, loss = nearest, other
            notes.append("rounding to nearest had less error than error feedback and was kept")
    return Solved(q, loss, tuple(notes))


def _beats_rounding(problem: Problem, scheme: Scheme, stats: Stats, values: torch.Tensor, search: Search) -> bool:
    """Whether the answer has less output error than rounding to nearest, judged on some rows where rows are apart."""
    step = max(1, values.shape[0] // SAMPLED_ROWS) if separable(scheme) else 1
    wanted = problem.wanted[::step].contiguous()
    nearest = quantize(scheme, wanted, stats.importance, search).dequantize()
    rows = replace(problem.quadratic, w=wanted, outer=None)
    return rows.loss(values[::step]) < rows.loss(nearest)


@dataclass
class Problem:
    """What the loop minimises: the wanted weights and the factors of both metrics.

    Attributes:
        wanted: float32 [rows, cols]; order: int64 [cols], visiting order, or None.
        columns: factor of the inputs' gram in visiting order; rows: factor of the outputs' gram or None.
        quadratic: the same objective in the tensor's own order.
    """

    wanted: torch.Tensor
    order: torch.Tensor | None
    columns: Feedback
    rows: Feedback | None
    quadratic: Quadratic
    notes: list[str] = field(default_factory=list)

    def let_go(self) -> None:
        """Frees the factors once the loop is through; a factor can be as large as the largest gram."""
        self.columns = replace(self.columns, upper=torch.empty(0, 0))
        self.rows = None

    @classmethod
    def of(cls, w: torch.Tensor, stats: Stats, options: Mapping[str, Any]) -> Problem:
        gram = _symmetric(stats.held("gram").to(w.device))
        notes: list[str] = []
        order = None
        if options["order"] == "importance":
            order = torch.argsort(gram.diagonal(), descending=True, stable=True)
        elif options["order"] != "given":
            raise InputError("FB-E0704", f"order is 'given' or 'importance', not {options['order']!r}")
        columns = feedback_factor(gram, options["damping"], permutation=order)
        notes += columns.notes
        if dead := int(columns.dead.sum()):
            notes.append(f"{dead} of {len(gram)} inputs were always zero: their weights are rounded without feedback")
        wanted = w
        if options["drift"] and stats.correction is not None and stats.correction.shape == w.shape:
            wanted = w + stats.correction.to(w.device)
        elif options["drift"] and stats.cross_gram is not None and stats.cross_gram is not stats.gram:
            wanted = drifted(w, gram, stats.cross_gram.to(w.device), columns, order)
        rows = outer = None
        unit = 1.0 / max(1, stats.count)
        if options["loss_weighting"] and stats.out_gram is not None:
            outer = _symmetric(stats.out_gram.to(w.device))
            rows = feedback_factor(outer, options["outer_damping"])
            level = outer.diagonal().double().mean()
            dtype = torch.float64 if len(outer) <= DOUBLE else torch.float32
            outer = damped(outer, rows.damping, dtype)[0].div_(level).float()
            unit *= float(level)
            notes += rows.notes
        diagonal = gram.diagonal().double()
        mean, ridge = float(diagonal.mean()), columns.damping * float(diagonal[diagonal > 0].mean())
        quadratic = Quadratic(wanted, _without_dead(gram), outer, unit * mean, 1 / mean, ridge / mean)
        return cls(wanted, order, columns, rows, quadratic, notes)


def drifted(
    w: torch.Tensor, gram: torch.Tensor, cross: torch.Tensor, columns: Feedback, order: torch.Tensor | None
) -> torch.Tensor:
    """The weights that best turn the quantised model's inputs into the float model's outputs: least squares, drawn towards `w`.

    Args:
        w: float32 [rows, cols]; gram: [cols, cols]; cross: [cols, cols], sum of x_float x^T.
        columns: factor of the gram in the visiting order `order`.

    Raises:
        InputError: FB-E0705 when the cross-gram is not finite.
    """
    if not bool(torch.isfinite(cross.sum(0)).all()):
        raise InputError("FB-E0705", "the cross-gram of the inputs holds NaN or infinity")
    # x_float^T x - x^T x, up to a size in float64 so that a small difference of large sums keeps its digits; piece by piece
    dtype = torch.float64 if len(gram) <= DOUBLE else torch.float32
    missing = torch.zeros_like(w, dtype=dtype)
    for a in range(0, len(gram), DOUBLE):
        cut = slice(a, a + DOUBLE)
        missing.addmm_(w[:, cut].to(dtype), cross[cut].to(dtype) - gram[cut].to(dtype))
    if order is None:
        return w + columns.solve(missing).float()
    found = torch.empty_like(missing)
    found[:, order] = columns.solve(missing[:, order])
    return w + found.float()


def _symmetric(gram: torch.Tensor) -> torch.Tensor:
    return (gram + gram.T) / 2 if len(gram) <= DOUBLE else gram  # factors read one half only; large ones are not copied


def _without_dead(gram: torch.Tensor) -> torch.Tensor:
    """The gram with the rows and columns of inputs that were never anything but zero empty, as sums of products leave them."""
    dead = gram.diagonal() <= 0
    if not bool(gram[dead].any()):
        return gram
    gram = gram.clone()
    gram[dead], gram[:, dead] = 0, 0
    return gram


def _rounded(w: torch.Tensor, stats: Stats, scheme: Scheme, search: Search, note: str) -> Solved:
    importance = stats.importance
    if importance is not None and not bool((torch.isfinite(importance) & (importance >= 0)).all()):
        importance = None
    q = quantize(scheme, w, importance, search)
    return Solved(q, float((w - q.dequantize()).double().square().sum()), (note,))


def _loop(
    problem: Problem, scheme: Scheme, search: Search, options: Mapping[str, Any]
) -> tuple[torch.Tensor, Params, float]:
    """Codes [rows, cols / dim] in the tensor's order, parameters, and the loss, summed over tokens."""
    shape = tuple(problem.wanted.shape)
    refit = options["refit"] and problem.order is None and _refits(scheme, shape)
    source = (
        Refitted(scheme, search, options["trial"])
        if refit
        else Static.fitted(problem, scheme, search, options["trial"])
    )
    w, rows, grid = problem.wanted, problem.rows, scheme.grid
    if isinstance(grid, VectorGrid):
        rows = None
    if problem.order is not None:
        w = w[:, problem.order].contiguous()
    found = run_loop(
        grid, w, problem.columns, source.provide, source.chosen, width=source.width, rows=rows, plain=options["plain"]
    )
    codes = found.codes
    if problem.order is not None:
        codes = torch.empty_like(codes)
        codes[:, problem.order] = found.codes
    return codes, source.params(shape), found.loss


def _refits(scheme: Scheme, shape: tuple[int, ...]) -> bool:
    if not separable(scheme):
        return False
    return shape[1] % scheme.span == 0 or all(part.is_leaf for _, part in scheme.parts())


def _candidates(scheme: Scheme, params: Params, shape: tuple[int, ...], trial: bool) -> Candidates:
    if not trial or not by_row(scheme) or isinstance(scheme.grid, VectorGrid):
        return only(scheme, params, shape)
    found = neighbours(scheme, params, shape)
    return replace(found, combinations=found.combinations[:MOST_CANDIDATES])


class Static:
    """Parameters fitted before the loop, all columns at once; the loop may still choose among neighbours if columns are in order."""

    def __init__(
        self, scheme: Scheme, params: Params, shape: tuple[int, ...], order: torch.Tensor | None, trial: bool
    ) -> None:
        self.candidates = _candidates(scheme, params, shape, trial and order is None)
        self.numbers = self.candidates.numbers()
        gid = self.numbers.gid
        self.gid = gid if order is None else gid[order]
        self.choice = torch.zeros(self.numbers.scale.shape[:2], dtype=torch.int32, device=gid.device)
        size = -(-shape[1] // self.numbers.scale.shape[1])
        self.width = size * max(1, WIDTH // size) if size <= 2 * WIDTH else WIDTH
        if (
            size > 2 * WIDTH and len(self.candidates.combinations) > 1
        ):  # a block would cut a group: no choice inside the loop
            self.candidates = only(scheme, params, shape)
            self.numbers = self.candidates.numbers()

    @classmethod
    def fitted(cls, problem: Problem, scheme: Scheme, search: Search, trial: bool) -> Static:
        weight = problem.columns.pivot.square()
        if problem.order is not None:
            weight = torch.empty_like(weight).index_copy_(0, problem.order, weight)
        params = fit(scheme, problem.wanted, weight, search)
        return cls(scheme, params, tuple(problem.wanted.shape), problem.order, trial)

    def provide(self, start: int, end: int, x: torch.Tensor, weight: torch.Tensor) -> Parameters:
        groups, inverse = torch.unique(self.gid[start:end].long(), return_inverse=True)
        scale, zero, shift = (part[:, groups] for part in (self.numbers.scale, self.numbers.zero, self.numbers.shift))
        self.groups = groups
        return Parameters(scale, zero, shift, inverse.to(torch.int32))

    def chosen(self, start: int, end: int, choice: torch.Tensor) -> None:
        self.choice[:, self.groups] = choice

    def params(self, shape: tuple[int, ...]) -> Params:
        if len(self.candidates.combinations) == 1:
            return Params(**{name: stored[0] for name, stored in self.candidates.stored.items()})
        return self.candidates.pick(self.choice)


class Refitted:
    """Parameters fitted inside the loop, each span on the weights as the earlier columns left them."""

    def __init__(self, scheme: Scheme, search: Search, trial: bool) -> None:
        self.scheme, self.search, self.trial = scheme, search, trial
        self.width = scheme.span * max(1, WIDTH // scheme.span)
        self.pieces: list[Params] = []
        self.waiting: Candidates  # of the columns that `provide` was last asked for

    def provide(self, start: int, end: int, x: torch.Tensor, weight: torch.Tensor) -> Parameters:
        params = fit(self.scheme, x, weight, self.search)
        self.waiting = _candidates(self.scheme, params, tuple(x.shape), self.trial)
        if isinstance(self.scheme.grid, VectorGrid):
            self.pieces.append(params)
        return self.waiting.numbers()

    def chosen(self, start: int, end: int, choice: torch.Tensor) -> None:
        self.pieces.append(self.waiting.pick(choice))

    def params(self, shape: tuple[int, ...]) -> Params:
        return join(self.scheme, self.pieces, shape)


def stack(parts: list[QTensor], shape: tuple[int, ...]) -> QTensor:
    """Quantised matrices of one scheme as one stacked tensor of `shape`."""
    first = parts[0]

    def gathered(name: str) -> torch.Tensor | QTensor | None:
        held = [getattr(part, name) for part in parts]
        if held[0] is None:
            return None
        if isinstance(held[0], QTensor):
            return stack(held, (*shape[:-2], *held[0].shape[-2:]))
        return torch.stack(held).reshape(*shape[:-2], *held[0].shape)

    codes = torch.stack([part.codes for part in parts]).reshape(*shape[:-2], *first.codes.shape[-2:])
    return QTensor(first.scheme, shape, codes, gathered("scale"), gathered("code_shift"), gathered("value_shift"))


SOLVER = Solver(
    name="gptq",
    needs=frozenset({"gram", "cross_gram"}),
    solve=solve,
    options={
        "order": "given",
        "search": "lsq",
        "steps": Search.steps,
        "refit": True,
        "trial": True,
        "sweeps": 2,
        "tune": True,
        "drift": True,
        "drift_samples": 64,
        "loss_weighting": True,
        "loss_samples": 32,
        "damping": 0.01,
        "outer_damping": 0.05,
        "plain": False,
    },
    summary="error feedback (GPTQ, LDLQ) in any scheme, with scale search, drift correction, loss weighting and sweeps",
)
