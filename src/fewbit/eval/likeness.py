"""Weights held against their source: signal to noise over a whole tensor, and block by block.

Two nets. Over a whole tensor, noise may exceed that of plain rounding by MARGIN_DB. Within it, each block of columns of a row is held against
the same noise, which finds a few swapped or damaged scales that the whole would hide.

Error feedback moves the error of a weight into directions that the calibration text does not use. A text of fewer tokens than a few times a
matrix's inputs leaves most directions unused, so the noise can be far above plain rounding's although every number is as it was solved: that is
told as a warning, with the count of tokens, as long as the signal is STARVED_DB above the noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fewbit.base.errors import FewbitError
from fewbit.eval.findings import Compared, Findings
from fewbit.math.metrics import sqnr_db
from fewbit.math.scales import Search, quantize
from fewbit.num.scheme import Scheme

MARGIN_DB = 6.0  # calibrated rounding trades some of a weight's own error for that of the outputs
STARVED_DB = 3.0  # less signal than twice the noise is a fault, whatever it was calibrated on
KEPT_DB = 40.0  # a tensor that was kept is at most cast to a 16-bit dtype
FEW = 4  # tokens per input of a matrix below which the directions of its inputs are not known
SAMPLE_ROWS = 64


def calibrated_tokens(written: Mapping[str, Any]) -> int | None:
    """Tokens that error feedback had to go by, from what fewbit recorded at writing; None where there was no feedback."""
    from fewbit.solve.table import solver_named

    recipe = written.get("recipe") or {}
    try:
        methods = [recipe["method"], *(rule["method"] for rule in recipe.get("rules") or () if rule.get("method"))]
        fed = any("gram" in solver_named(method).needs for method in methods)
        return int(recipe["calib_samples"]) * int(recipe["calib_length"]) if fed else None
    except (KeyError, TypeError, ValueError, AttributeError, FewbitError):  # another version's record, or a damaged one
        return None


class Likeness:
    """Holds weights against their source, one after another.

    Attributes:
        found: where what is wrong goes.
        compared: every weight held so far.
        noisy: those that are noisier than plain rounding for want of calibration text.
    """

    def __init__(self, found: Findings, tokens: int | None = None) -> None:
        self.found, self.tokens = found, tokens
        self.compared: list[Compared] = []
        self.noisy: list[Compared] = []

    def starved(self, cols: int) -> bool:
        """Whether feedback on matrices of this many inputs had too few tokens to go by."""
        return self.tokens is not None and self.tokens < FEW * cols

    def hold(self, name: str, scheme: Scheme, values: torch.Tensor, original: torch.Tensor) -> None:
        """One weight, whole."""
        one = self._tile(name, scheme, values, original)
        self._judge(one, original.shape[-1])
        self.compared.append(one)

    def hold_tiles(self, name: str, scheme: Scheme, tiles: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """One weight in tiles of rows, (values, original) each: signal and noise add up over them."""
        signal = noise = 0.0
        expected, cols = [], 1
        for values, original in tiles:
            one = self._tile(name, scheme, values, original)
            energy, cols = float(original.double().square().sum()), original.shape[-1]
            signal, noise = signal + energy, noise + energy * 10 ** (-one.sqnr_db / 10)
            expected.append(one.expected_db)
        ratio = 10 * math.log10(signal / noise) if signal and noise else math.inf
        whole = Compared(name, str(scheme), ratio, sum(expected) / len(expected))
        self._judge(whole, cols)
        self.compared.append(whole)

    def hold_kept(self, name: str, tensor: torch.Tensor, original: torch.Tensor) -> None:
        """A tensor that was not quantised."""
        if tensor.shape != original.shape or not tensor.dtype.is_floating_point:
            return
        ratio = sqnr_db(original.float(), tensor.float())
        if not ratio >= KEPT_DB and bool((original != 0).any()):
            what = f"was kept and differs from the base by {ratio:.1f} dB (a cast leaves {KEPT_DB:.0f})"
            self.found.add("source", name, what)

    def warnings(self) -> tuple[str, ...]:
        """What is true of the weights and should not please anyone."""
        if not self.noisy:
            return ()
        worst = min(self.noisy, key=lambda one: one.sqnr_db - one.expected_db)
        return (
            f"{len(self.noisy)} of {len(self.compared)} weights are over {MARGIN_DB:.0f} dB noisier than plain rounding leaves them "
            f"({worst.tensor}: {worst.sqnr_db:.1f} dB, {worst.scheme} gives about {worst.expected_db:.1f}): {self.tokens:,} tokens of calibration "
            f"text are fewer than {FEW} for each input of a matrix, and what they do not show is free to go wrong; "
            "calibrate on more (--calib-samples), or use a method without error feedback",
        )

    def _judge(self, one: Compared, cols: int) -> None:
        """Noise over the whole tensor (an expected NaN: of another shape, already found)."""
        if not one.sqnr_db < one.expected_db - MARGIN_DB:
            return
        if self.starved(cols) and one.sqnr_db >= STARVED_DB:
            self.noisy.append(one)
            return
        what = f"has {one.sqnr_db:.1f} dB signal to noise, {one.scheme} gives about {one.expected_db:.1f}"
        self.found.add("source", one.tensor, what)

    def _tile(self, name: str, scheme: Scheme, values: torch.Tensor, original: torch.Tensor) -> Compared:
        """Signal to noise of some rows, and their blocks one by one."""
        original = original.float()
        if values.shape != original.shape:
            self.found.add("source", name, f"has shape {list(values.shape)}, the base {list(original.shape)}")
            return Compared(name, str(scheme), -math.inf, math.nan)
        rows = original.reshape(-1, original.shape[-1])
        chosen = torch.linspace(0, rows.shape[0] - 1, min(SAMPLE_ROWS, rows.shape[0])).round().long()
        expected = expected_db(scheme, rows[chosen])
        ratio = sqnr_db(original, values)
        level = min(expected, ratio) if self.starved(rows.shape[-1]) else expected
        if ratio >= level - MARGIN_DB and math.isfinite(level):
            bad, (row, column) = _bad_blocks(rows, values.reshape(rows.shape), level)
            if bad:
                where = f"the worst in row {row}, columns {column} on"
                self.found.add("source", name, f"{bad} block(s) are far off, {where}: damaged or swapped scales")
        return Compared(name, str(scheme), ratio, expected)


def expected_db(scheme: Scheme, rows: torch.Tensor) -> float:
    """Signal to noise in dB that plain rounding with this scheme gives for some rows of a weight, float32 [n, cols]."""
    try:
        return sqnr_db(rows, quantize(scheme.weights_only, rows, search=Search(method="absmax")).dequantize())
    except FewbitError:  # no plain rounding is known for this grid: a bit is worth four to six decibels
        return 4.0 * float(scheme.grid.bits) / scheme.grid.dim


def _bad_blocks(rows: torch.Tensor, values: torch.Tensor, expected: float) -> tuple[int, tuple[int, int]]:
    """Blocks [row, 32 columns] whose error is both far above rounding noise and as large as their content: (count, worst position)."""
    width = 32 if rows.shape[-1] % 32 == 0 else rows.shape[-1]
    content = rows.unflatten(-1, (-1, width)).square().mean(-1)
    error = (rows - values).unflatten(-1, (-1, width)).square().mean(-1)
    noise = rows.square().mean() * 10 ** (-expected / 10)
    bad = (error > 64 * noise) & (error > content)
    position = int(torch.where(bad, error, torch.zeros_like(error)).argmax())
    return int(bad.sum()), (position // error.shape[-1], position % error.shape[-1] * width)
