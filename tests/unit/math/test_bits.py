"""Packing against bits laid out one by one."""

import pytest
import torch

from fewbit.base.errors import InputError
from fewbit.math.bits import pack, pack_offset, packed_length, unpack

WORDS = {torch.uint8: 8, torch.int16: 16, torch.int32: 32}


def slow_pack(codes: list[int], bits: int, order: str, size: int, dense: bool) -> list[int]:
    """Words as a list of bits, the first code's first bit first ("lsb": its lowest, "msb": its highest)."""
    per = size // bits
    stream: list[int] = []
    for i, code in enumerate(codes):
        places = [code >> b & 1 for b in range(bits)]
        stream += places if order == "lsb" else places[::-1]
        if not dense and i % per == per - 1:
            stream += [0] * (size - per * bits)
    stream += [0] * (-len(stream) % size)
    words = [stream[i : i + size] for i in range(0, len(stream), size)]
    return [sum(bit << i for i, bit in enumerate(word if order == "lsb" else word[::-1])) for word in words]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("order", ["lsb", "msb"])
@pytest.mark.parametrize("dense", [True, False])
def test_pack_against_single_bits(bits: int, word: torch.dtype, order: str, dense: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    for count in (1, 7, 33, 100):
        codes = torch.randint(0, 1 << bits, (3, count), generator=generator).to(torch.uint8)
        words = pack(codes, bits, order=order, word=word, dense=dense)
        assert words.dtype == word and words.shape[-1] == packed_length(count, bits, word=word, dense=dense)
        mask = (1 << WORDS[word]) - 1
        assert (words.long() & mask).tolist() == [
            slow_pack(row, bits, order, WORDS[word], dense) for row in codes.tolist()
        ]
        assert torch.equal(unpack(words, bits, count, order=order, dense=dense), codes)
        signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
        again = pack(signed, bits, order=order, word=word, dense=dense)
        assert torch.equal(unpack(again, bits, count, order=order, dense=dense, signed=True), signed)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_large_rows_take_the_fast_path_to_the_same_words(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (40, 2080), generator=generator).to(torch.uint8)
    whole = pack(codes, bits, word=torch.int32)
    rows = torch.stack([pack(row, bits, word=torch.int32) for row in codes])
    assert torch.equal(whole, rows)
    assert torch.equal(unpack(whole, bits, 2080), codes)
    assert torch.equal(unpack(pack(codes, bits), bits, 2080), codes)
    signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    again = pack(signed, bits, word=torch.int32)
    assert torch.equal(again, torch.stack([pack(row, bits, word=torch.int32) for row in signed]))
    assert torch.equal(unpack(again, bits, 2080, signed=True), signed)


def test_refusals() -> None:
    codes = torch.zeros(8, dtype=torch.uint8)
    for call in (
        lambda: pack(codes, 9),
        lambda: pack(codes, 4, word=torch.int64),
        lambda: pack(codes, 4, order="up"),
        lambda: unpack(codes, 4, 17),
    ):
        with pytest.raises(InputError) as caught:
            call()
        assert caught.value.code == "FB-E0606"


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(3, 5), (4, 32), (256, 512)])
@pytest.mark.parametrize("word", [torch.uint8, torch.int32])
def test_signed_codes_are_packed_from_their_lowest_level(bits: int, shape: tuple[int, int], word: torch.dtype) -> None:
    low = -(1 << bits - 1)
    codes = torch.randint(low, -low, shape, generator=torch.Generator().manual_seed(bits)).to(torch.int8)
    words = pack_offset(codes, bits, word=word)
    assert torch.equal(words, pack((codes.int() - low).to(torch.uint8), bits, word=word))
    assert torch.equal(unpack(words, bits, shape[1]).int() + low, codes.int())
