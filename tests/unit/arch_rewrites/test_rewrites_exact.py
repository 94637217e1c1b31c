"""Rewritten float models equal their sources: logits in float64, every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rewrite_families import MODELS, NO_DATA, NORMED_RESIDUAL, logits, make

from fewbit.arch.rewrite import merge, scale
from fewbit.arch.rewrite_spaces import SCALABLE
from fewbit.arch.rotate import Dense, KeepsMean, dense
from fewbit.arch.spin import Turner
from fewbit.plan.recipe import Recipe
from fewbit.run.rewrites import RewrittenSource
from fewbit.run.source import open_source

TOKENS = torch.randint(1, 95, (2, 20), generator=torch.Generator().manual_seed(1))
KNOWN = [name for name in MODELS if name not in NO_DATA]


def random_scales(source: RewrittenSource) -> None:
    """Scales from 1/8 to 8 on every space that bears one."""
    generator = torch.Generator().manual_seed(5)
    parts = []
    for space in source.spaces.scalable():
        shape = (space.stack, space.size) if space.stack else (space.size,)
        s = 2 ** (6 * torch.rand(shape, dtype=torch.float64, generator=generator) - 3)
        parts.append(scale(space, s, source.offset))
    source._scales = merge(*parts)


@pytest.mark.parametrize("model_type", KNOWN)
def test_logits_are_unchanged(model_type: str, tmp_path: Path) -> None:
    make(model_type, tmp_path)
    with open_source(tmp_path) as source:
        wanted = logits(source, TOKENS)
        for words in (("rotate",), ("smooth",), ("rotate", "smooth")):
            changed = RewrittenSource(source, Recipe(rewrites=words))
            if "smooth" in words:
                random_scales(changed)
                touched = {source.manifest[name].shape for name in changed._scales}
                assert touched
            found = logits(changed, TOKENS)
            worst = float((found - wanted).abs().max() / wanted.abs().max())
            assert worst < 1e-9, (words, worst)
            assert worst > 0, "nothing was rewritten"


def turned(source: RewrittenSource) -> None:
    """Rotations as learning leaves them: each some Cayley steps away from its start."""
    generator = torch.Generator().manual_seed(7)
    found = {}
    for key, start in source._start.items():
        one = Turner(dense(start).matrix)
        for step in range(5):
            one.step(torch.randn(one.matrix.shape, dtype=torch.float64, generator=generator), 1.0 / (step + 1))
        found[key] = KeepsMean(Dense(one.matrix)) if isinstance(start, KeepsMean) else Dense(one.matrix)
    source._base = source.rotated(found)


@pytest.mark.parametrize("model_type", KNOWN)
def test_learned_rotations_leave_logits_unchanged(model_type: str, tmp_path: Path) -> None:
    make(model_type, tmp_path)
    with open_source(tmp_path) as source:
        wanted = logits(source, TOKENS)
        changed = RewrittenSource(source, Recipe(rewrites=("spin",)))
        before = changed._base
        turned(changed)
        found = logits(changed, TOKENS)
        worst = float((found - wanted).abs().max() / wanted.abs().max())
        assert worst < 1e-9
        name = next(iter(before))
        first = RewrittenSource(source, Recipe(rewrites=("spin",))).read(name)
        assert (changed.read(name) - first).abs().max() > 1e-3, "nothing was turned"


@pytest.mark.parametrize("model_type", KNOWN)
def test_the_spaces_that_a_family_bears(model_type: str, tmp_path: Path) -> None:
    make(model_type, tmp_path)
    with open_source(tmp_path) as source:
        found = RewrittenSource(source, Recipe(rewrites=("rotate",)))
    kinds = {space.kind for space in found.spaces.scalable()}
    wanted = (
        set(SCALABLE)
        - ({"ffn"} if model_type in ("gpt2",) else set())
        - ({"attn_in", "mlp_in"} if model_type == "olmo2" else set())
    )
    assert kinds == wanted
    assert bool(found.spaces.no_rotation) == (model_type in NORMED_RESIDUAL)
