"""Reading tensors: every dtype, rows, fingerprints, threads, and what may not be imported for headers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fewbit.base.errors import InputError
from fewbit.base.manifest import DTYPE_BITS, data_bytes
from fewbit.store.checkpoint import open_checkpoint
from fewbit.store.tensors import DTYPE_NAMES, TORCH_DTYPES, BufferPool, as_bytes, from_buffer, stored_shape

BYTES = bytes(range(256)) * 3


def write(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], fill: bytes = BYTES) -> Path:
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = data_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + (fill * (at // len(fill) + 1))[:at])
    return path


def test_every_dtype_of_the_manifest_is_known() -> None:
    assert set(TORCH_DTYPES) == set(DTYPE_BITS)
    for name, dtype in TORCH_DTYPES.items():
        assert dtype.itemsize * 8 == max(DTYPE_BITS[name], 8)
    assert DTYPE_NAMES[torch.uint8] == "U8"


@pytest.mark.parametrize("dtype", sorted(set(DTYPE_BITS) - {"BOOL"}))
@pytest.mark.parametrize("shape", [(4, 8), (3, 2, 8), (8,), (0, 8)], ids=str)
def test_bytes_come_through_for_every_dtype(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    with open_checkpoint(write(tmp_path / "m.safetensors", {"w": (dtype, shape)})) as checkpoint:
        got = checkpoint.read("w")
        expected = BYTES[: data_bytes(dtype, shape)]
        assert got.dtype == TORCH_DTYPES[dtype]
        assert tuple(got.shape) == stored_shape(dtype, shape)
        assert bytes(as_bytes(got)) == expected
        if DTYPE_BITS[dtype] >= 8:
            assert tuple(got.shape) == shape


@pytest.mark.parametrize(
    "dtype", ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "C64"]
)
def test_reads_what_the_library_reads(tmp_path: Path, dtype: str) -> None:
    path = write(tmp_path / "m.safetensors", {"w": (dtype, (3, 4)), "v": (dtype, ())})
    theirs = safetensors.torch.load_file(path)
    with open_checkpoint(path) as checkpoint:
        for name, tensor in theirs.items():
            mine = checkpoint.read(name)
            assert (mine.dtype, mine.shape) == (tensor.dtype, tensor.shape)
            assert bytes(as_bytes(mine)) == bytes(as_bytes(tensor))


def test_sub_byte_dtypes_come_as_raw_bytes(tmp_path: Path) -> None:
    shapes = {"even": ("F4", (3, 4)), "flat": ("F6_E2M3", (2, 2, 1)), "six": ("F6_E3M2", (2, 4))}
    with open_checkpoint(write(tmp_path / "m.safetensors", shapes)) as checkpoint:
        assert checkpoint.read("even").tolist() == [[0, 1], [2, 3], [4, 5]]
        assert checkpoint.read("flat").tolist() == [6, 7, 8]
        assert checkpoint.read("six").shape == (2, 3)
        assert checkpoint.read_rows("even", 1, 3).tolist() == [[2, 3], [4, 5]]
        with pytest.raises(InputError, match=r"FB-E0112.*whole bytes"):
            checkpoint.read_rows("flat", 0, 1)


@pytest.mark.parametrize(("dtype", "shape"), [("BF16", (7, 3)), ("I64", (5, 2, 3)), ("U8", (9,)), ("F4", (6, 2, 2))])
def test_rows_are_slices_of_the_whole(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    with open_checkpoint(write(tmp_path / "m.safetensors", {"x": ("U8", (5,)), "w": (dtype, shape)})) as checkpoint:
        whole = checkpoint.read("w")
        for start in range(shape[0] + 1):
            for stop in range(start, shape[0] + 1):
                rows = checkpoint.read_rows("w", start, stop)
                assert rows.shape == whole[start:stop].shape
                assert bytes(as_bytes(rows)) == bytes(as_bytes(whole[start:stop]))
        for start, stop in ((-1, 2), (2, 1), (0, shape[0] + 1)):
            with pytest.raises(InputError, match="FB-E0112"):
                checkpoint.read_rows("w", start, stop)


def test_rows_of_scalars_and_empty_tensors(tmp_path: Path) -> None:
    with open_checkpoint(
        write(tmp_path / "m.safetensors", {"s": ("F32", ()), "e": ("F32", (0, 3)), "n": ("F32", (3, 0))})
    ) as checkpoint:
        assert checkpoint.read("s").shape == ()
        assert checkpoint.read_rows("e", 0, 0).shape == (0, 3)
        assert checkpoint.read_rows("n", 1, 3).shape == (2, 0)
        with pytest.raises(InputError, match="FB-E0112"):
            checkpoint.read_rows("s", 0, 1)
        with pytest.raises(InputError, match="FB-E0112"):
            checkpoint.read("nothing")


def test_booleans_must_be_0_or_1(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", {"good": ("BOOL", (2,)), "bad": ("BOOL", (2,))})
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.read("good").tolist() == [False, True]
        with pytest.raises(InputError) as caught:
            checkpoint.read("bad")
    assert (caught.value.code, caught.value.tensor) == ("FB-E0113", "bad")


def test_tensors_own_their_memory(tmp_path: Path) -> None:
    with open_checkpoint(write(tmp_path / "m.safetensors", {"w": ("F32", (4,))})) as checkpoint:
        first = checkpoint.read("w")
        before = first.clone()
        checkpoint.read("w").zero_()
    assert torch.equal(first.view(torch.int32), before.view(torch.int32))


def test_memory_of_dead_tensors_is_used_again_and_of_live_ones_never() -> None:
    pool = BufferPool(keep=10_000, least=100)
    first = from_buffer(pool.take(4000), "F32", (1000,))
    place = first.data_ptr()
    part = first[5:7]
    view = as_bytes(first)
    first.fill_(3)
    del first
    assert pool.waiting == 0  # a slice still lives
    del part
    assert pool.waiting == 0  # its bytes are still looked at
    other = from_buffer(pool.take(4000), "F32", (1000,))
    assert other.data_ptr() != place
    assert set(view) == {0, 64}  # 3.0 is 0x40400000
    del view
    assert pool.waiting == 4000
    assert from_buffer(pool.take(4000), "F32", (1000,)).data_ptr() == place
    held = [from_buffer(pool.take(size), "U8", (size,)) for size in (4000, 4001, 4002, 99, 5001)]
    assert len({tensor.data_ptr() for tensor in held}) == 5
    del held, other
    assert 0 < pool.waiting <= 10_000
    pool.clear()
    assert pool.waiting == 0


def test_many_threads_read_at_once(tmp_path: Path) -> None:
    shapes = {f"t{i}": ("U8", ((1 << 20) + i // 2,)) for i in range(20)}  # large enough to share buffers
    with open_checkpoint(write(tmp_path / "m.safetensors", shapes)) as checkpoint, ThreadPoolExecutor(8) as pool:
        alone = {name: checkpoint.read(name).clone() for name in shapes}
        for name, tensor in zip([*shapes] * 5, pool.map(checkpoint.read, [*shapes] * 5), strict=True):
            assert torch.equal(tensor, alone[name])


def test_fingerprint(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", {"w": ("U8", (4,))})

    def prints() -> tuple[str, str]:
        with open_checkpoint(path) as checkpoint:
            return checkpoint.fingerprint(), checkpoint.fingerprint(full=True)

    quick, full = prints()
    assert prints() == (quick, full)
    os.utime(path, ns=(5, 5))
    touched = prints()
    assert touched[0] != quick
    assert touched[1] == full
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(5, 5))
    assert prints()[1] != full  # same size and time: only the full one sees it
    write(path, {"v": ("U8", (4,))})
    os.utime(path, ns=(5, 5))
    assert prints()[0] != touched[0]


def test_headers_need_no_torch_and_no_numpy(tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", {"w": ("U8", (4,))})
    script = (
        "import sys\n"
        "from fewbit.store.checkpoint import open_checkpoint\n"
        "import fewbit.store.writer, fewbit.store.template, fewbit.store.tokenizer, fewbit.store.hub\n"
        "checkpoint = open_checkpoint(sys.argv[1])\n"
        "assert len(checkpoint.manifest) == 1 and checkpoint.fingerprint(full=True)\n"
        "print([name for name in ('torch', 'numpy', 'transformers', 'huggingface_hub', 'jinja2', 'safetensors') if name in sys.modules])\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3] / "src")}
    done = subprocess.run([sys.executable, "-c", script, path], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
