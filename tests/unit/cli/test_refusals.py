"""Many errors that say the same are one line to a reader."""

from __future__ import annotations

from fewbit.base.errors import InputError
from fewbit.cli.refusals import lines


def misfit(tensor: str, got: int) -> InputError:
    return InputError(
        "FB-E0602", f"needs a multiple of 100, got {got}", tensor=tensor, remedy=f"--rule '{tensor}=keep'"
    )


def test_layers_fold_into_patterns() -> None:
    names = [f"model.layers.{layer}.mlp.{part}_proj.weight" for layer in range(8) for part in ("up", "gate")]
    found = lines(
        [misfit(name, 256) for name in names] + [misfit("lm_head.weight", 256), misfit("model.layers.3.x", 768)]
    )
    assert [line.message for line in found] == ["needs a multiple of 100, got 256", "needs a multiple of 100, got 768"]
    assert found[0].about == (
        ("tensor", "model.layers.*.mlp.up_proj.weight  (8 tensors)"),
        ("tensor", "model.layers.*.mlp.gate_proj.weight  (8 tensors)"),
        ("tensor", "lm_head.weight"),
        ("hint", "--rule 'model.layers.*.mlp.up_proj.weight=keep' (likewise for the others)"),
    )
    assert found[1].about == (("tensor", "model.layers.3.x"), ("hint", "--rule 'model.layers.3.x=keep'"))


def test_different_files_stay_apart() -> None:
    found = lines([InputError("FB-E0101", "cut short", file=name) for name in ("a", "b")])
    assert [line.about[0] for line in found] == [("file", "a"), ("file", "b")]
