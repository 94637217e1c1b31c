"""Transforms between checkpoint and GGUF: known answers, backwards, and the same on quantised tensors."""

from __future__ import annotations

import pytest
import torch

from fewbit.base.errors import InputError
from fewbit.formats.gguf.ops import apply, apply_quantised, restore
from fewbit.formats.gguf.shapes import resolved, shape_after
from fewbit.math.scales import quantize
from fewbit.num.scheme import parse_scheme


def numbered(*shape: int) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


def test_rope_rows_interleave_the_halves_of_each_head() -> None:
    rows = numbered(8, 1)  # two heads of four rows: 0 1 | 2 3 and 4 5 | 6 7
    assert apply(["permute_rope:2"], [rows])[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_slices_cut_and_stack_gathers() -> None:
    w = numbered(2, 4, 3)
    assert torch.equal(apply(["slice:-2:2:4:1"], [w]), w[:, 2:])
    assert torch.equal(apply(["transpose", "slice:-2:1:3:2"], [w]), w.swapaxes(1, 2)[:, 1::2])
    assert torch.equal(apply(["stack"], [w[0], w[1]]), w)
    assert torch.equal(apply(["unfold:2"], [w.reshape(8, 3)]), w)
    assert torch.equal(apply(["add:1"], [w]), w + 1)


@pytest.mark.parametrize(
    ("op", "shape", "expected"),
    [
        ("take:-2:1:2", (3, 8, 5), "slice:-2:4:8:1"),
        ("every:-1:1:2", (3, 8), "slice:-1:1:8:2"),
        ("range:-2:0:n", (3, 8, 5), "slice:-2:0:3:1"),
        ("permute_rope:n", (6, 5), "permute_rope:3"),
    ],
)
def test_short_forms_are_resolved(op: str, shape: tuple[int, ...], expected: str) -> None:
    assert resolved(op, shape, lambda text: 3 if text == "n" else int(text)) == expected


@pytest.mark.parametrize(
    "op", ["slice:-2:0:9:1", "slice:-2:3:3:1", "permute_rope:3", "transpose", "unfold:7", "unknown"]
)
def test_impossible_ops_are_refused(op: str) -> None:
    with pytest.raises(InputError, match="FB-E0323"):
        shape_after(op, (8,) if op == "transpose" else (8, 4))


CHAINS = [
    (["permute_rope:4"], (16, 6)),
    (["transpose"], (16, 6)),
    (["unfold:4"], (16, 6)),
    (["add:1"], (6,)),
    (["permute_rope:2", "unfold:2"], (16, 6)),
]


@pytest.mark.parametrize(("ops", "shape"), CHAINS)
def test_restore_undoes_apply(ops: list[str], shape: tuple[int, ...]) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    there = apply(ops, [w])
    expected = shape
    for op in ops:
        expected = shape_after(op, expected)
    assert tuple(there.shape) == expected
    assert torch.allclose(restore([(ops, there, 0)]), w, atol=1e-6)


def test_restore_joins_what_was_cut() -> None:
    w = numbered(3, 8, 4)
    gate, up = ["transpose", "slice:-2:0:4:2"], ["transpose", "slice:-2:1:4:2"]
    pieces = [(up, apply(up, [w]), 0), (gate, apply(gate, [w]), 0)]
    assert torch.equal(restore(pieces), w)
    with pytest.raises(InputError, match="FB-E0323"):
        restore([(gate, apply(gate, [w]), 0)] * 2)


def test_restore_picks_one_of_a_stack() -> None:
    parts = [numbered(4, 3) + 100 * n for n in range(3)]
    assert torch.equal(restore([(["stack"], apply(["stack"], parts), 2)]), parts[2])


@pytest.mark.parametrize("scheme", ["q4_k", "q6_k", "q8_0", "q4_1", "iq4_xs", "mxfp4", "tq2_0"])
@pytest.mark.parametrize("ops", [["permute_rope:2"], ["unfold:4"], ["slice:-2:2:6:1"]])
def test_quantised_rows_move_with_their_scales(scheme: str, ops: list[str]) -> None:
    w = torch.randn((8, 512), generator=torch.Generator().manual_seed(2))
    q = quantize(parse_scheme(scheme), w)
    moved = apply_quantised(ops, [q])
    assert torch.equal(moved.dequantize(), apply(ops, [q.dequantize()]))


def test_quantised_experts_stack() -> None:
    parts = [
        quantize(parse_scheme("q4_k"), torch.randn((4, 256), generator=torch.Generator().manual_seed(n)))
        for n in range(3)
    ]
    stacked = apply_quantised(["stack"], parts)
    assert stacked.shape == (3, 4, 256)
    assert torch.equal(stacked.dequantize(), torch.stack([part.dequantize() for part in parts]))


@pytest.mark.parametrize("op", ["transpose", "add:1", "slice:-1:0:2:1"])
def test_what_cuts_rows_is_refused_on_quantised_tensors(op: str) -> None:
    q = quantize(parse_scheme("q8_0"), torch.randn(4, 64))
    with pytest.raises(InputError, match="FB-E0603"):
        apply_quantised([op], [q])


def test_rows_that_share_scales_do_not_move() -> None:
    q = quantize(parse_scheme("fp8-e4m3-block128"), torch.randn(256, 256))
    with pytest.raises(InputError, match="FB-E0603"):
        apply_quantised(["permute_rope:2"], [q])
