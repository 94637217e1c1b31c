"""The number lab's formats and numbers against textbook values and numpy's own rounding."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbit.base.errors import InputError
from fewbit.eval.lab_numbers import USUAL, format_facts, grid_of, neighbours, number_in, spacing
from fewbit.num.grid import NAMED_GRIDS


@pytest.mark.parametrize(
    ("name", "epsilon", "high", "smallest", "count"),
    [
        ("f32", 1.1920928955078125e-07, 3.4028234663852886e38, 1.401298464324817e-45, 2 * 255 * 2**23 - 1),
        ("f16", 9.765625e-04, 65504.0, 2.0**-24, 63487),
        ("bf16", 7.8125e-03, 3.3895313892515355e38, 2.0**-133, 65279),
        ("fp8-e4m3", 0.125, 448.0, 2.0**-9, 253),
        ("fp8-e5m2", 0.25, 57344.0, 2.0**-16, 247),
        ("fp4", 0.5, 6.0, 0.5, 15),
        ("fp6-e2m3", 0.125, 7.5, 0.125, 63),
        ("fp6-e3m2", 0.25, 28.0, 0.0625, 63),
    ],
)
def test_float_formats(name: str, epsilon: float, high: float, smallest: float, count: int) -> None:
    facts = format_facts(name)
    assert (facts.epsilon, facts.high, facts.smallest, facts.count) == (epsilon, high, smallest, count)
    assert spacing(name, 1.0) == epsilon
    assert facts.low == -high


def test_the_three_epsilons_everybody_quotes() -> None:
    assert [f"{format_facts(name).epsilon:.2e}" for name in ("f32", "f16", "bf16")] == [
        "1.19e-07",
        "9.77e-04",
        "7.81e-03",
    ]


@pytest.mark.parametrize("name", NAMED_GRIDS)
def test_every_grid_has_facts(name: str) -> None:
    facts = format_facts(name)
    assert facts.low < facts.high
    assert facts.smallest > 0
    if facts.values:
        assert list(facts.values) == sorted(set(facts.values))
        assert facts.count == len(facts.values)
        assert (facts.values[0], facts.values[-1]) == (facts.low, facts.high)


def test_all_values_of_fp4() -> None:
    assert format_facts("fp4").values == (-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6)


@pytest.mark.parametrize("name", ["f16", "f32"])
@given(st.floats(allow_nan=False, allow_infinity=False, width=64))
@settings(max_examples=150, deadline=None)
def test_numbers_round_as_numpy_rounds_them(name: str, number: float) -> None:
    dtype = {"f16": np.float16, "f32": np.float32}[name]
    with np.errstate(over="ignore"):
        expected = dtype(number)
    found = number_in(number, name)
    assert found.value == float(expected)
    bits = expected.view({"f16": np.uint16, "f32": np.uint32}[name])
    assert int(found.pattern.replace(" ", ""), 2) == int(bits)


@pytest.mark.parametrize(
    "name", [name for name, grid in NAMED_GRIDS.items() if name != "f32" and float(grid.bits) <= 8]
)
@given(st.floats(-500, 500))
@settings(max_examples=25, deadline=None)
def test_the_nearest_value_is_nearest(name: str, number: float) -> None:
    values = [value for value in np.unique(grid_of(name).levels()) if math.isfinite(value)]
    found = number_in(number, name)
    if math.isfinite(found.value):
        assert abs(found.value - number) == min(abs(value - number) for value in values)
        assert found.error == found.value - number
    else:  # beyond half a step past the greatest value, IEEE formats have infinity
        assert name == "fp8-e5m2"
        assert abs(number) > 57344


def test_pi() -> None:
    by_format = {name: number_in(3.14159, name) for name in USUAL}
    assert by_format["f16"].value == by_format["bf16"].value == 3.140625
    assert by_format["f16"].pattern == "0 10000 1001001000"
    assert by_format["bf16"].pattern == "0 10000000 1001001"
    assert by_format["f16"].words == "2^1 x 1.5703125"
    assert by_format["fp8-e4m3"].value == 3.25
    assert by_format["fp8-e5m2"].value == 3.0
    assert by_format["int4"].value == 3
    assert "scale" in by_format["nf4"].note


def test_ties_go_to_the_even_pattern() -> None:
    assert number_in(2049.0, "f16").value == 2048.0
    assert number_in(2051.0, "f16").value == 2052.0
    assert [number_in(value, "int8").value for value in (0.5, 1.5, 2.5, -0.5, -3.5)] == [0, 2, 2, 0, -4]
    assert [number_in(value, "fp4").value for value in (2.5, 5.0, 0.25)] == [2.0, 4.0, 0.0]


def test_overflow_saturation_and_underflow_are_said() -> None:
    assert number_in(1e6, "f16").value == math.inf
    assert "infinity" in number_in(1e6, "f16").note
    assert number_in(1e6, "fp8-e4m3").value == 448.0
    assert "out of range" in number_in(1e6, "fp8-e4m3").note
    assert "becomes 0" in number_in(1e-9, "f16").note
    assert number_in(-1.0, "e8m0").value > 0
    assert "no negative" in number_in(-1.0, "e8m0").note
    assert number_in(1e-40, "f32").words.endswith("subnormal")
    assert number_in(0.0, "f16").words == "0"


def test_spacing_follows_the_exponent() -> None:
    assert [spacing("fp8-e4m3", value) for value in (1.0, 2.0, 256.0, 0.001, 500.0)] == [
        0.125,
        0.25,
        32.0,
        2.0**-9,
        0.0,
    ]
    assert spacing("nf4", 0.1) == pytest.approx(0.16093020141124725 - 0.07958029955625534)
    assert spacing("int4", 3.2) == 1.0
    assert spacing("int4", 99) == 0.0


@pytest.mark.parametrize("name", USUAL)
def test_neighbours_stand_in_order_round_the_number(name: str) -> None:
    near = neighbours(name, 0.3)
    assert near == sorted(near)
    assert any(value <= 0.3 for value in near)
    assert any(value >= 0.3 for value in near)
    assert number_in(0.3, name).value in near


def test_unknown_formats_and_odd_numbers_are_refused() -> None:
    for call, code in (
        (lambda: format_facts("f13"), "FB-E0605"),
        (lambda: number_in(math.nan, "f16"), "FB-E0607"),
        (lambda: number_in(1.0, "iq2xxs"), "FB-E0605"),
    ):
        with pytest.raises(InputError) as caught:
            call()
        assert caught.value.code == code


def test_vector_codebooks_have_facts() -> None:
    facts = format_facts("iq2xxs")
    assert facts.kind == "vectors"
    assert facts.bits == 15 / 8
