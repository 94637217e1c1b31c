"""The vocabulary of numbers: spellings, exact bits, tables."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.base.errors import InputError
from fewbit.num.blocks import Blocks, flat, group
from fewbit.num.grid import BNB_DYNAMIC8, BNB_FP4, E4M3, E5M2, E8M0, NAMED_GRIDS, NF4, Codebook, FloatGrid, IntGrid
from fewbit.num.scheme import Scheme, double_quantised, leaf, parse_scheme, presets, spell

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "bitsandbytes.json").read_text())


@pytest.mark.parametrize("grid, key", [(NF4, "nf4"), (BNB_FP4, "fp4"), (BNB_DYNAMIC8, "dynamic8")])
def test_tables_are_those_of_bitsandbytes(grid: Codebook, key: str) -> None:
    assert grid.levels().astype(np.float32).tolist() == np.array(GOLDEN[key], np.float32).tolist()


@pytest.mark.parametrize(
    "grid, dtype", [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2), (E8M0, torch.float8_e8m0fnu)]
)
def test_float_levels_are_those_of_torch(grid: FloatGrid, dtype: torch.dtype) -> None:
    theirs = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).double().numpy()
    ours = grid.levels()
    assert np.array_equal(ours, theirs, equal_nan=True)


def test_float_grid_facts_follow_from_the_fields() -> None:
    assert (E4M3.high, E4M3.smallest, E4M3.smallest_normal) == (448.0, 2.0**-9, 2.0**-6)
    assert (E5M2.high, E5M2.smallest) == (57344.0, 2.0**-16)
    assert NAMED_GRIDS["fp4"].levels().tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
    assert (NAMED_GRIDS["f16"].high, NAMED_GRIDS["f32"].high) == (65504.0, float(torch.finfo(torch.float32).max))
    assert (IntGrid(4).low, IntGrid(4).high, IntGrid(4, signed=False).high) == (-8, 7, 15)


# by hand, for a 256 x 1024 matrix: codes + scales + shifts
BITS = {
    "int4-g128": 4 * 262144 + 16 * 2048,
    "int4-g128-asym": 4 * 262144 + (16 + 4) * 2048,
    "uint4-g32-min": 4 * 262144 + (16 + 16) * 8192,
    "int8-channel": 8 * 262144 + 16 * 256,
    "fp8-e4m3-block128": 8 * 262144 + 32 * (2 * 8),
    "nf4-g64": 4 * 262144 + 32 * 4096,
    "nf4-flat64-dq": 4 * 262144 + 8 * 4096 + 32 * 16 + 32,
    "mxfp4": 4 * 262144 + 8 * 8192,
    "nvfp4": 4 * 262144 + 8 * 16384 + 32,
    "q4_k": 4 * 262144 + (6 + 6) * 8192 + (16 + 16) * 1024,
    "q6_k": 6 * 262144 + 8 * 16384 + 16 * 1024,
    "tq1_0": 262144 * 13 // 8 + 16 * 1024,
    "bf16": 16 * 262144,
}


@pytest.mark.parametrize("spelling, bits", BITS.items())
def test_storage_bits_are_exact(spelling: str, bits: int) -> None:
    scheme = parse_scheme(spelling)
    assert scheme.storage_bits((256, 1024)) == bits
    assert scheme.bits_per_weight((256, 1024)) == bits / 262144


def test_known_bits_per_weight() -> None:
    shape = (4096, 4096)
    for name, bpw in {
        "q4_0": 4.5,
        "q4_1": 5,
        "q8_0": 8.5,
        "q2_k": 2.625,
        "q3_k": 3.4375,
        "q4_k": 4.5,
        "q5_k": 5.5,
        "q6_k": 6.5625,
    }.items():
        assert parse_scheme(name).bits_per_weight(shape) == bpw
    assert (
        parse_scheme("nvfp4").storage_bits((8, 16, 64)) == 8 * 16 * 64 * 4 + 8 * 16 * 4 * 8 + 8 * 32
    )  # one f32 per expert


def test_ragged_blocks_count_their_scales() -> None:
    assert parse_scheme("int4-g128").storage_bits((3, 300)) == 4 * 900 + 16 * 9
    assert parse_scheme("fp8-e4m3-block128").storage_bits((130, 130)) == 8 * 16900 + 32 * 4


float_leaves = st.sampled_from([leaf(NAMED_GRIDS[name]) for name in ("f32", "f16", "bf16")])
blocks = st.one_of(
    st.sampled_from([Blocks(0, 0), Blocks(1, 0), Blocks(0, 1)]),
    st.integers(2, 512).map(group),
    st.integers(2, 4096).map(flat),
    st.tuples(st.integers(2, 256), st.integers(2, 256)).map(lambda rc: Blocks(*rc)),
)
codes = st.one_of(
    st.builds(IntGrid, st.integers(1, 8), st.booleans()),
    st.sampled_from(
        [NAMED_GRIDS[name] for name in ("fp8-e4m3", "fp8-e5m2", "fp4", "fp6-e3m2", "nf4", "iq4", "ternary")]
    ),
)
nested = st.builds(
    lambda bits, signed, size, scale: Scheme(IntGrid(bits, signed), group(size), scale),
    st.integers(2, 8), st.booleans(), st.integers(2, 32), float_leaves,
)  # fmt: skip
scales = st.one_of(float_leaves, st.just(leaf(E8M0)), st.just(leaf(E4M3)), nested, st.just(double_quantised()))


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    grid = draw(codes)
    shift, value = None, None
    match draw(st.sampled_from(["none", "zero", "float zero", "min", "nested min"])):
        case "zero" if isinstance(grid, IntGrid):
            grid = IntGrid(grid.bits, signed=False)
            shift = leaf(grid)
        case "float zero" if isinstance(grid, IntGrid) and not grid.signed:
            shift = draw(float_leaves)
        case "min":
            value = draw(float_leaves)
        case "nested min":
            value = draw(nested)
    scheme = Scheme(grid, draw(blocks), draw(scales), shift, value)
    if draw(st.booleans()):
        activation = Scheme(draw(codes), Blocks(1, 0), leaf(NAMED_GRIDS["f32"]))
        scheme = Scheme(scheme.grid, scheme.blocks, scheme.scale, shift, value, activation, draw(st.booleans()))
    return scheme


@settings(max_examples=300, deadline=None)
@given(schemes())
def test_spelling_parses_back(scheme: Scheme) -> None:
    assert parse_scheme(spell(scheme)) == scheme
    assert parse_scheme(str(scheme).upper()) == scheme


def test_presets_parse_back() -> None:
    for name, scheme in presets().items():
        assert parse_scheme(name) == scheme
        assert parse_scheme(str(scheme)) == scheme


@pytest.mark.parametrize(
    "text", ["", "int9-g128", "int4-g0", "int4-g", "hello", "int4-g128-what", "int4-g128+", "nf4-block0x2"]
)
def test_unknown_spelling_is_refused_with_a_code(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_scheme(text)
    assert caught.value.code == "FB-E0601"


def test_fractional_widths_count() -> None:
    assert Codebook("t", (-1.0, 0.0, 1.0), Fraction(13, 8)).bits == Fraction(13, 8)
