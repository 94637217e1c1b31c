"""Bytes <-> QTensor: inverse of each other, and equal to gguf-py's decoder on arbitrary bytes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fewbit.base.errors import InputError
from fewbit.formats.gguf.codecs import CODECS, from_blocks, to_blocks
from fewbit.formats.gguf.types import FLOATS, TYPES
from fewbit.math.scales import quantize
from fewbit.num.grid import TERNARY_WIDE
from fewbit.num.scheme import parse_scheme

QUANTISED = tuple(name for name in TYPES if name not in FLOATS)


def random_blocks(name: str, rows: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Random bytes [rows, bytes]."""
    return np.random.default_rng(seed).integers(0, 256, (rows, blocks * TYPES[name].nbytes), dtype=np.uint8)


def sane_blocks(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Bytes that a file could hold: random codes and scale codes, finite float scales."""
    row, count = TYPES[name], int(np.prod(shape)) // TYPES[name].block
    if not count:
        return torch.empty(*shape[:-1], row.row_bytes(shape[-1]), dtype=torch.uint8)
    parts = CODECS[name].unpack(random_blocks(name, count, 1))
    rng = np.random.default_rng(1)
    for key, entries in parts.items():
        if entries.dtype == np.float16:
            parts[key] = rng.standard_normal(entries.shape).astype(np.float16)
        elif key == "scale":
            parts[key] = (entries % 127).astype(np.uint8)
        elif key == "codes" and row.name == "TQ2_0":
            parts[key] = entries % 3
        elif key == "codes" and row.name in ("MXFP4", "NVFP4"):
            parts[key] = np.where(entries == 8, 0, entries).astype(np.uint8)
    return torch.from_numpy(CODECS[name].pack(parts)).reshape(*shape[:-1], row.row_bytes(shape[-1]))


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (2, 3, 2), (0, 2), (1,)], ids=str)
def test_round_trip(name: str, shape: tuple[int, ...]) -> None:
    shape = (*shape[:-1], shape[-1] * TYPES[name].block)
    data = sane_blocks(name, shape)
    q = from_blocks(name, data, shape)
    q.check()
    assert q.scheme == TYPES[name].scheme and q.shape == shape
    assert torch.equal(to_blocks(name, q), data)
    again = from_blocks(name, to_blocks(name, q).flatten(), shape)
    for (key, ours), theirs in zip(q.named_parts().items(), again.named_parts().values(), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours.float(), theirs.float()), key


@pytest.mark.parametrize("name", FLOATS)
def test_floats(name: str) -> None:
    w = torch.randn(5, 3)
    q = quantize(TYPES[name].scheme, w)
    data = to_blocks(name, q)
    native = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]
    assert torch.equal(data.view(native).float(), w.to(native).float())
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), data.flatten()])[1:]  # at an odd address
    assert torch.equal(from_blocks(name, shifted, (5, 3)).dequantize(), w.to(native).float())


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_random_bytes_decode_as_gguf_py_does(name: str) -> None:
    quants = pytest.importorskip("gguf.quants")
    constants = pytest.importorskip("gguf.constants")
    data = random_blocks(name, 33, 3)
    if name in ("MXFP4", "NVFP4"):  # 255 is no scale: see codecs.py
        data[data == 255] = 254
    theirs = quants.dequantize(data, constants.GGMLQuantizationType[name])
    ours = from_blocks(name, torch.from_numpy(data), theirs.shape).dequantize().numpy()
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    assert same.all(), f"first difference at {np.argwhere(~same)[0]}"


def test_the_fourth_code_of_tq2_0_is_two() -> None:
    data = torch.zeros(1, 66, dtype=torch.uint8)
    data[0, 0], data[0, 64:] = (
        0b11100100,
        torch.tensor([0x00, 0x3C], dtype=torch.uint8),
    )  # codes 0 1 2 3 in four runs, d = 1
    q = from_blocks("TQ2_0", data, (1, 256))
    assert q.scheme.grid == TERNARY_WIDE
    assert q.dequantize()[0, [0, 32, 64, 96]].tolist() == [-1.0, 0.0, 1.0, 2.0]
    assert torch.equal(to_blocks("TQ2_0", q), data)


def test_patterns_that_encoders_never_write() -> None:
    data = torch.zeros(1, 36, dtype=torch.uint8)
    data[0, :4] = torch.tensor([0x7F, 0x80 | 0x38, 0x38, 0xFF], dtype=torch.uint8)
    data[0, 4:] = 0x22
    q = from_blocks("NVFP4", data, (1, 64))
    assert q.dequantize()[0, [0, 16, 32]].tolist() == [0.0, 1.0, 1.0]
    with pytest.raises(InputError, match="FB-E0603"):
        q.check()  # 255 is not a number


def test_refusals() -> None:
    q = from_blocks("Q8_0", sane_blocks("Q8_0", (2, 64)), (2, 64))
    with pytest.raises(InputError, match=r"FB-E0332.*cannot be stored as Q4_0"):
        to_blocks("Q4_0", q)
    with pytest.raises(InputError, match=r"FB-E0332.*permutation"):
        to_blocks("Q8_0", replace(q, sides={"permutation": torch.arange(64)}))
    with pytest.raises(InputError, match=r"FB-E0331.*takes 136 bytes, got 135"):
        from_blocks("Q8_0", torch.zeros(135, dtype=torch.uint8), (4, 32))
    with pytest.raises(InputError, match="FB-E0331"):
        from_blocks("Q8_0", torch.zeros(136), (4, 32))
    with pytest.raises(InputError, match="FB-E0602"):
        from_blocks("Q8_0", torch.zeros(68, dtype=torch.uint8), (2, 33))
    high = replace(q, scheme=parse_scheme("q4_0"), codes=torch.full((2, 64), 8, dtype=torch.int8))
    with pytest.raises(InputError, match="FB-E0603"):
        to_blocks("Q4_0", high)
