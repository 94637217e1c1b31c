"""Quantising by hand: known answers, and every number on the page checked against the equation."""

from __future__ import annotations

import pytest
import torch

from fewbit.base.errors import InputError
from fewbit.eval.lab_bits import bits_lines, bits_sentence
from fewbit.eval.lab_quantize import MOST, compare_blocks, parse_numbers, quantize_numbers, record
from fewbit.num.scheme import parse_scheme, presets

EIGHT = [0.32, -1.54, 0.87, -0.21, 1.23, -0.76, 0.05, -1.91]


def test_int8_symmetric_by_hand() -> None:
    found = quantize_numbers(EIGHT, parse_scheme("int8"))
    block = found.blocks[0]
    assert block.scale == pytest.approx(0.015039, abs=5e-7)
    assert block.zero is None
    assert record(found)["codes"] == [21, -102, 58, -14, 82, -51, 3, -127]
    assert found.max_error == pytest.approx(0.007008, abs=5e-7)
    assert found.mean_error == pytest.approx(0.003514, abs=5e-7)
    assert block.how == ("scale = largest magnitude / largest level = 1.91 / 127 = 0.0150394",)


def test_int4_asymmetric_by_hand() -> None:
    found = quantize_numbers(EIGHT, parse_scheme("int4-g128-asym"))
    block = found.blocks[0]
    assert block.scale == pytest.approx(0.2093, abs=5e-5)
    assert block.zero == 9
    assert record(found)["codes"] == [11, 2, 13, 8, 15, 5, 9, 0]
    assert found.max_error == pytest.approx(0.098667, abs=5e-7)
    assert "(1.23 - -1.91) / 15 = 0.209333" in block.how[0]
    assert block.how[1] == "zero point = round(-smallest / scale) = round(9.124) = 9"


def test_groups_of_four_lower_the_largest_error() -> None:
    rows = compare_blocks(EIGHT, parse_scheme("int4-g128-asym"))
    assert [row.blocks for row in rows] == ["one for all", "groups of 4", "groups of 2"]
    assert rows[0].max_error == pytest.approx(0.098667, abs=5e-7)
    assert rows[1].max_error == pytest.approx(0.0773, abs=5e-5)
    assert [len(row.scales) for row in rows] == [1, 2, 4]
    assert rows[0].bits < rows[1].bits < rows[2].bits


SCHEMES = sorted(name for name, scheme in presets().items() if scheme.grid.dim == 1) + [
    "int3-g4-asym", "uint4-g4-min", "nf4-g4", "fp8-e4m3-block128", "int8-tensor", "int5-g2-asym{f16}", "nf4-flat64-dq", "int2-channel", "fp4-channel",
]  # fmt: skip


@pytest.mark.parametrize("spelling", SCHEMES)
@pytest.mark.parametrize("search", ["absmax", "lsq"])
@pytest.mark.parametrize("exact", [True, False])
def test_every_step_obeys_the_equation(spelling: str, search: str, exact: bool) -> None:
    """(level - zero) x scale + minimum gives what comes back; the code is the nearest; errors are differences."""
    found = quantize_numbers(EIGHT, parse_scheme(spelling), exact=exact, search=search)
    weights = [step for block in found.blocks for step in block.weights]
    assert [step.value for step in weights] == pytest.approx(EIGHT)
    assert [step.index for step in weights] == list(range(8))
    for block in found.blocks:
        for step in block.weights:
            if len(block.how) and "stored as it is" not in block.how[0]:
                again = (step.level - (block.zero or 0)) * block.scale + (block.minimum or 0)
                assert step.recovered == pytest.approx(again, rel=1e-5, abs=1e-7)
            assert step.error == pytest.approx(step.recovered - step.value, abs=1e-6)
    assert found.max_error == pytest.approx(max(abs(step.error) for step in weights), abs=1e-7)


def test_searching_never_makes_the_squared_error_worse() -> None:
    torch.manual_seed(0)
    numbers = torch.randn(64).tolist()
    for spelling in ("int4-g32", "int4-g32-asym", "q4_k", "nf4-g64", "int3-g16"):
        scheme = parse_scheme(spelling)
        assert (
            quantize_numbers(numbers, scheme, search="lsq").rms_error
            <= quantize_numbers(numbers, scheme).rms_error * 1.0001
        )


def test_scales_as_files_store_them_differ_in_the_fourth_figure() -> None:
    exact, stored = (quantize_numbers(EIGHT, parse_scheme("int8"), exact=flag) for flag in (True, False))
    assert exact.exact
    assert not stored.exact
    assert stored.blocks[0].scale != exact.blocks[0].scale
    assert stored.blocks[0].scale == pytest.approx(exact.blocks[0].scale, rel=1e-3)
    assert "rounded to what f16 can hold" in stored.blocks[0].how[0]


def test_nested_scales_are_told() -> None:
    found = quantize_numbers(EIGHT, parse_scheme("q4_k"))
    assert len(found.nested) == 2
    assert "uint6" in found.nested[0]


@pytest.mark.parametrize("numbers", [[0.0] * 8, [1.0], [-2.5, -2.5], [1e-30, 1e30], [5.0, 6.0, 7.0]])
@pytest.mark.parametrize("spelling", ["int8", "int4-g128-asym", "uint4-g4-min", "nf4-g64", "q4_k", "mxfp4", "nvfp4"])
def test_awkward_numbers_have_an_answer(numbers: list[float], spelling: str) -> None:
    found = quantize_numbers(numbers, parse_scheme(spelling))
    assert sum(len(block.weights) for block in found.blocks) == len(numbers)
    assert found.max_error == found.max_error


@pytest.mark.parametrize("text", ["", "1,two,3", "nan", "1,inf", "1e999", ",".join(["1"] * (MOST + 1))])
def test_what_is_no_list_of_numbers_is_refused(text: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_numbers(text)
    assert caught.value.code == "FB-E0607"


def test_numbers_may_be_separated_as_people_do() -> None:
    assert parse_numbers("1, 2;3\n4  5e-1") == [1, 2, 3, 4, 0.5]


@pytest.mark.parametrize(
    "spelling", [*presets(), "int4-g128-asym", "nf4-g64-dq", "nf4-flat64-dq", "fp8-e4m3-block128", "int8-tensor", "f16"]
)
@pytest.mark.parametrize("shape", [(4096, 4096), (3, 512), (2, 64, 256)])
def test_bits_add_up_to_what_storage_takes(spelling: str, shape: tuple[int, ...]) -> None:
    scheme = parse_scheme(spelling).weights_only
    lines = bits_lines(scheme, shape)
    assert sum(line.bits for line in lines) == scheme.storage_bits(shape)
    assert all(line.bits >= 0 for line in lines)


@pytest.mark.parametrize(
    ("spelling", "sentence"),
    [
        ("int4-g128", "4 + 16/128 = 4.125 bits a weight"), ("int4-g128-asym", "4 + 16/128 + 4/128 = 4.15625 bits a weight"),
        ("q4_k", "4 + 6/32 + 16/256 + 6/32 + 16/256 = 4.5 bits a weight"), ("q6_k", "6 + 8/16 + 16/256 = 6.5625 bits a weight"),
        ("mxfp4", "4 + 8/32 = 4.25 bits a weight"), ("nvfp4", "4 + 8/16 = 4.5 bits a weight"),
    ],
)  # fmt: skip
def test_bits_in_a_sentence(spelling: str, sentence: str) -> None:
    assert bits_sentence(parse_scheme(spelling), (4096, 4096)) == sentence
