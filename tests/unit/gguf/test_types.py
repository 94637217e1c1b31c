"""The table of GGUF types agrees with its schemes and with the gguf package."""

from __future__ import annotations

import pytest

from fewbit.base.errors import InputError
from fewbit.formats.gguf.types import TYPES, block_type, type_of
from fewbit.num.scheme import parse_scheme


@pytest.mark.parametrize("name", TYPES)
def test_bytes_follow_from_the_scheme(name: str) -> None:
    row = TYPES[name]
    assert row.scheme.storage_bits((3, 5 * row.block)) == 3 * 5 * row.nbytes * 8
    assert row.row_bytes(5 * row.block) == 5 * row.nbytes
    assert type_of(row.scheme) is row
    assert parse_scheme(str(row.scheme)) == row.scheme


@pytest.mark.parametrize("name", TYPES)
def test_numbers_and_sizes_are_ggmls(name: str) -> None:
    constants = pytest.importorskip("gguf.constants")
    row, number = TYPES[name], constants.GGMLQuantizationType[name]
    assert (row.number, (row.block, row.nbytes)) == (int(number), constants.GGML_QUANT_SIZES[number])
    assert block_type(int(number)) is row and block_type(name.lower()) is row


def test_refusals_name_what_is_there() -> None:
    with pytest.raises(InputError, match=r"FB-E0330.*Q4_K"):
        block_type("Q4_4")
    with pytest.raises(InputError, match="FB-E0330"):
        block_type(4)
    with pytest.raises(InputError, match=r"FB-E0602.*multiple of 256.*300"):
        TYPES["Q4_K"].row_bytes(300)
    assert type_of(parse_scheme("int4-g128")) is None
