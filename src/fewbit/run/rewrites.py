"""A checkpoint seen as an equal float model: the rewrites of a recipe folded in as tensors are read.

    open_source ─> RewrittenSource ─> plan, engine, solvers, GGUF conversion: all read the rewritten model and need not know

Random rotations are known from the start, so they work without calibration; learned ones (`run.spin`) begin with them. Scales (smooth, awq) are
decided before anything is solved, by one walk of the calibration text through the float model; each block's are journalled as they are found,
so a killed run goes on with the same.
Rotations come first, whatever the order in the recipe. A scale that a norm carries is chosen so that the new gain is exact in the
norm's own dtype: the rewritten model is equal to the source as it will be stored, not only in higher precision.
"""

from __future__ import annotations

import base64
import functools
from typing import TYPE_CHECKING, Any

import torch

from fewbit.arch.rewrite import Step, Steps, apply_steps, merge, scale
from fewbit.arch.rewrite_spaces import Space, spaces
from fewbit.arch.rewrite_table import check, describe, options_of, rotates_residual
from fewbit.arch.rotate import Rotation, rotate_residual, rotate_values, rotation, value_rotations
from fewbit.base.manifest import Manifest, TensorInfo
from fewbit.num.qtensor import QTensor
from fewbit.plan.recipe import Recipe
from fewbit.run.source import Source

if TYPE_CHECKING:
    from fewbit.run.engine import _Run

HEAD = "lm_head.weight"
RESIDUAL = "resid"


class RewrittenSource(Source):
    """A source whose tensors are those of an equal float model.

    Attributes:
        inner: the source as it lies on disk.
        spaces: of the model as it is rewritten (head untied where the residual stream is rotated).
        does, warnings: what is rewritten and what is not, in sentences.
        scaled: names of the rewrites whose scales `decide` must find first.
    """

    def __init__(self, inner: Source, recipe: Recipe) -> None:
        self.inner, self.checkpoint, self.format, self.stored = inner, inner.checkpoint, inner.format, inner.stored
        self.manifest, self.config, self.small_files = inner.manifest, inner.config, inner.small_files
        self.options = recipe.options
        self.spaces = spaces(inner.manifest, inner.config)
        self.does, self.warnings = describe(recipe.rewrites, recipe.options, self.spaces)
        self._untied = ""
        self._base: Steps = {}
        self._scales: Steps = {}
        on = not self.spaces.off
        self.scaled = tuple(name for name in ("smooth", "awq") if on and name in recipe.rewrites)
        self.rotates = next((name for name in ("rotate", "spin") if on and name in recipe.rewrites), "")
        self._start: dict[str, Rotation] = {}
        if self.rotates:
            self._start = self._rotations(recipe.seed)
            self._base = self.rotated(self._start)

    # ---- reading

    def read(self, name: str) -> torch.Tensor:
        """The rewritten tensor: float32 (float64 for F64) where a rewrite touches it, else as the source gives it."""
        return self._read(name, (*self._base.get(name, ()), *self._scales.get(name, ())))

    def read_rotated(self, name: str) -> torch.Tensor:
        """The tensor as rotations leave it, before scales."""
        return self._read(name, self._base.get(name, ()))

    def read_stored(self, name: str) -> torch.Tensor:
        """The tensor before any rewrite; the embedding for a head that was given a tensor of its own."""
        return self.inner.read(self._stored_name(name))

    def _read(self, name: str, steps: tuple[Step, ...]) -> torch.Tensor:
        tensor = self.read_stored(name)
        return apply_steps(tensor, steps) if steps else tensor

    def _stored_name(self, name: str) -> str:
        return self.spaces.embed if name == self._untied else name

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        steps = (*self._base.get(name, ()), *self._scales.get(name, ()))
        if steps and (len(self.manifest[name].shape) != 2 or any(step.axis != -1 for step in steps)):
            return self.read(name)[start:stop]
        tensor = self.inner.read_rows(self._stored_name(name), start, stop)
        return apply_steps(tensor, steps) if steps else tensor

    def qtensor(self, name: str) -> QTensor | None:
        """What a quantised source stores, unless a rewrite changes it."""
        return None if name == self._untied or name in self._base or name in self._scales else self.inner.qtensor(name)

    # ---- rotation

    def _rotations(self, seed: int) -> dict[str, Rotation]:
        """The rotations that need no data, by the key of their space; unties the head where the residual stream is turned."""
        options = options_of(self.rotates, self.options)
        found: dict[str, Rotation] = {}
        if rotates_residual(options, self.spaces):
            if self.spaces.tied:
                self._untie()
            found[RESIDUAL] = self._residual_rotation(seed)
        return {**found, **(value_rotations(self.spaces, seed) if options["values"] else {})}

    def rotated(self, rotations: dict[str, Rotation]) -> Steps:
        """The steps that fold rotations into the model."""
        steps: Steps = {}
        if RESIDUAL in rotations:
            steps = rotate_residual(self.spaces, rotations[RESIDUAL], self._norms)
        return merge(steps, rotate_values(self.spaces, rotations))

    def _residual_rotation(self, seed: int) -> Rotation:
        resid, family = self.spaces.one("resid"), self.spaces.family
        assert resid is not None and family is not None
        return rotation(resid.size, seed, keep_mean=family.norm == "layer")

    def _untie(self) -> None:
        """Gives the head a tensor of its own: it takes the final norm's gain, which the embedding does not."""
        embed = self.inner.manifest[self.spaces.embed]
        self._untied = HEAD
        self.manifest, self.config = untied(self.inner.manifest, self.inner.config, self.spaces.embed)
        what = f"the head gets a tensor of its own, {embed.nbytes:,} bytes more before it is quantised"
        self.does = [*self.does, f"{self.rotates}: {what}"]
        self.spaces = spaces(self.manifest, self.config)

    @functools.cached_property
    def _norms(self) -> dict[str, torch.Tensor]:
        names = [name for space in self.spaces.all for name in (*space.gains, *space.shifts)]
        return {name: self.inner.read(name).double() for name in names}

    # ---- scales

    def decide(self, run: _Run) -> None:
        """Learns rotations and finds the scales of smooth and awq, or takes them from an interrupted run's journal; then `read` applies them."""
        if self.rotates == "spin" and self._start:
            from fewbit.run.spin import learned

            self._base = self.rotated(learned(self, run, self._start))
        if not self.scaled:
            return
        from fewbit.run.scales import Walk

        sink = run.sinks[0]
        done = {int(key.partition(".")[2]) for key in sink.notes if key.startswith("scales.")}
        for layer, found in Walk(self, run, done):
            sink.note(f"scales.{layer}", {"scales": {key: _pack(s) for key, s in found.items()}})
        by_key = {space.key: space for space in self.spaces.all}
        parts = []
        for key, note in sink.notes.items():
            if key.startswith("scales."):
                parts += [
                    scale(by_key[name], _unpack(text, by_key[name]), self.offset)
                    for name, text in note["scales"].items()
                ]
        self._scales = merge(*parts)

    @property
    def offset(self) -> float:
        """What norms add to their stored weights."""
        return self.spaces.family.norm_offset if self.spaces.family else 0.0


def rewritten(source: Source, recipe: Recipe) -> Source:
    """The source under a recipe's rewrites; the source itself when there are none."""
    sound = recipe.rewrites and not check(
        recipe.rewrites, recipe.options
    )  # what is wrong with them, the plan's checks say
    return RewrittenSource(source, recipe) if sound else source


def untied(manifest: Manifest, config: dict[str, Any], embed: str) -> tuple[Manifest, dict[str, Any]]:
    """Manifest and config of a model whose head has a tensor of its own, of the embedding's shape."""
    like = manifest[embed]
    head = TensorInfo(HEAD, like.dtype, like.shape, like.nbytes, like.file)
    return Manifest({**manifest.tensors, HEAD: head}, manifest.metadata), {**config, "tie_word_embeddings": False}


def _pack(s: torch.Tensor) -> str:
    return base64.b64encode(s.double().contiguous().numpy().tobytes()).decode()


def _unpack(text: str, space: Space) -> torch.Tensor:
    flat = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.float64)
    return flat.reshape(space.stack, space.size) if space.stack else flat
