"""Calibration statistics of one space: mergeable sums, so that shards, ranks and resumed runs add up to the same thing."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from fewbit.base.cpu import multiplies_bfloat16
from fewbit.base.errors import InputError
from fewbit.math.linalg import add_gram
from fewbit.math.ranges import magnitudes
from fewbit.num.qtensor import all_finite

_SUMS = ("absmean", "sumsq", "gram", "cross_gram", "out_gram", "histogram")
_BY_CHANNEL = ("absmax", "absmean", "sumsq", "gram", "cross_gram")


@dataclass(frozen=True)
class Stats:
    """Sums over the calibration tokens x [count, channels] that reached one space. What was not asked for is None.

    Attributes:
        count: tokens seen.
        absmax: float32 [channels], largest |x|.
        absmean: float64 [channels], sum of |x| (divide by count for the mean; see `mean_abs`).
        sumsq: float64 [channels], sum of x^2.
        gram: float32 or float64 [channels, channels], sum of x x^T, with x the inputs as the quantised model sees them.
        cross_gram: the same shape, sum of x_float x^T, with x_float the inputs of the float model.
        out_gram: float32 or float64 [outputs, outputs], sum of g g^T with g the gradient of the loss at the outputs of one weight. Unlike the
            rest it belongs to a weight, not to the space, so it is put in (`dataclasses.replace`) when that weight is solved.
        correction: float32 [outputs, channels], what to add to one weight so that its outputs make up for what the quantised model got wrong
            before it; like `out_gram` it belongs to a weight.
        histogram: float64 [math.ranges.BINS], how many inputs of all channels fall into each bin of magnitude.
    """

    count: int = 0
    absmax: torch.Tensor | None = None
    absmean: torch.Tensor | None = None
    sumsq: torch.Tensor | None = None
    gram: torch.Tensor | None = None
    cross_gram: torch.Tensor | None = None
    out_gram: torch.Tensor | None = None
    correction: torch.Tensor | None = None
    histogram: torch.Tensor | None = None

    @property
    def channels(self) -> int | None:
        for name in _BY_CHANNEL:
            held = getattr(self, name)
            if held is not None:
                return held.shape[-1]
        return None

    @property
    def importance(self) -> torch.Tensor | None:
        """float32 [channels]: mean x^2, from `sumsq` or the gram's diagonal; None without either or without tokens."""
        total = self.sumsq if self.sumsq is not None else None if self.gram is None else self.gram.diagonal()
        return None if total is None or not self.count else (total.double() / self.count).float()

    @property
    def mean_abs(self) -> torch.Tensor | None:
        """float32 [channels]: mean |x|."""
        return None if self.absmean is None or not self.count else (self.absmean / self.count).float()

    def held(self, name: str) -> torch.Tensor:
        """One of the attributes, which must have been collected.

        Raises:
            InputError: FB-E0704 when it was not.
        """
        found: torch.Tensor | None = getattr(self, name)
        if found is None:
            raise InputError("FB-E0704", f"the calibration statistics have no {name}")
        return found

    def add(self, x: torch.Tensor, x_float: torch.Tensor | None = None, *, needs: frozenset[str]) -> Stats:
        """These statistics with more tokens.

        Args:
            x: floating [..., channels].
            x_float: the float model's inputs of the same tokens, for `cross_gram`.
            needs: which attributes to keep ("importance" keeps `sumsq`).

        Raises:
            InputError: FB-E0703 when x holds non-finite numbers or has other channels than before.
        """
        flat = x.reshape(-1, x.shape[-1])
        if not all_finite(flat):
            bad = int((~torch.isfinite(flat)).sum())
            raise InputError("FB-E0703", f"{bad} of {flat.numel()} calibration inputs are NaN or infinite")
        flat = flat.float() if needs else flat  # a copy that plain error feedback has no use for
        new: dict[str, torch.Tensor] = {}
        if "absmax" in needs and flat.shape[0]:
            new["absmax"] = flat.abs().amax(0)
        if "absmean" in needs:
            new["absmean"] = flat.abs().sum(0, dtype=torch.float64)
        if needs & {"sumsq", "importance"}:
            new["sumsq"] = flat.square().sum(0, dtype=torch.float64)
        if "histogram" in needs:
            new["histogram"] = magnitudes(flat)
        if "gram" in needs:
            new["gram"] = add_gram(None, flat)
        if "cross_gram" in needs:
            if x_float is None:
                raise InputError("FB-E0703", "cross_gram needs the float model's inputs of the same tokens")
            new["cross_gram"] = x_float.reshape(flat.shape).float().T @ flat
        return self.merge(Stats(flat.shape[0], **new))

    def take(
        self,
        x: torch.Tensor,
        x_float: torch.Tensor | None = None,
        *,
        needs: frozenset[str],
        root: torch.Tensor | None = None,
    ) -> Stats:
        """As `add`, but the grams are summed in place: large ones are then held once, not three times. This one must not be used again.

        Args:
            root: floating [tokens, 1], square roots of what the tokens count in the grams; None: all alike. Other sums count them alike.
        """
        large = needs & {"gram", "cross_gram"}
        found = replace(self, gram=None, cross_gram=None).add(x, x_float, needs=needs - large)
        flat = x.reshape(-1, x.shape[-1])
        half = flat.dtype == torch.bfloat16 and (flat.device.type != "cpu" or multiplies_bfloat16())
        flat = flat if half and large == {"gram"} else flat.float()
        flat = flat if root is None else flat * root.to(flat.dtype)
        grams: dict[str, torch.Tensor] = {}
        if "gram" in large:
            grams["gram"] = add_gram(self.gram, flat)
        if "cross_gram" in large:
            if x_float is None:
                raise InputError("FB-E0703", "cross_gram needs the float model's inputs of the same tokens")
            other = x_float.reshape(flat.shape).float()
            other = other if root is None else other * root
            grams["cross_gram"] = other.T @ flat if self.cross_gram is None else self.cross_gram.addmm_(other.T, flat)
        return replace(found, gram=grams.get("gram"), cross_gram=grams.get("cross_gram"))

    def scaled(self, factor: float, count: int) -> Stats:
        """These tokens counted as `count`, every sum times `factor`; largest values stay."""
        sums = {name: getattr(self, name) * factor for name in _SUMS if getattr(self, name) is not None}
        return replace(self, count=count, **sums)

    def merge(self, other: Stats) -> Stats:
        """Statistics of both sets of tokens together."""
        mine, theirs = self.channels, other.channels
        if mine is not None and theirs is not None and mine != theirs:
            raise InputError("FB-E0703", f"statistics of {mine} and of {theirs} channels cannot be merged")
        sums = {name: _plus(getattr(self, name), getattr(other, name)) for name in _SUMS}
        a, b = self.absmax, other.absmax
        absmax = b if a is None else a if b is None else torch.maximum(a, b)
        return replace(self, count=self.count + other.count, absmax=absmax, **sums)

    def to(self, device: torch.device | str) -> Stats:
        """The same statistics on a device."""
        moved = {
            f.name: getattr(self, f.name).to(device) for f in fields(self)[1:] if getattr(self, f.name) is not None
        }
        return replace(self, **moved)


def _plus(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return b if a is None else a if b is None else a + b
