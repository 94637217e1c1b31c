"""llama.cpp's own quantisers through ctypes: the byte-exact oracle for every GGUF block type.

Needs numpy and the `llamacpp` environment (`python dev/envs.py llamacpp`), no compiler and nothing of fewbit. The library is the one that
real llama.cpp runs on, so bytes made here are what llama-quantize would write and values are what it would read.

    packed = quantize("Q4_K", rows)              # float32 [n, k] -> uint8 [n, bytes per row]
    dequantize("Q4_K", packed, k)                # -> float32 [n, k]
    validate("Q4_K", packed)                     # no NaN or Inf among the block scales
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

TYPE_IDS: dict[str, int] = {
    "F32": 0, "F16": 1, "BF16": 30,
    "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q1_0": 41, "Q2_0": 42,
    "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14,
    "IQ1_S": 19, "IQ1_M": 29, "IQ2_XXS": 16, "IQ2_XS": 17, "IQ2_S": 22, "IQ3_XXS": 18, "IQ3_S": 21, "IQ4_NL": 20, "IQ4_XS": 23,
    "TQ1_0": 34, "TQ2_0": 35, "MXFP4": 39, "NVFP4": 40,
}  # fmt: skip
FLOATS = ("F32", "F16", "BF16")
QUANTISED = tuple(name for name in TYPE_IDS if name not in FLOATS)
ENV_COMMAND = "python dev/envs.py llamacpp"


class Traits(NamedTuple):
    """One block type: values per block and bytes per block."""

    block: int
    size: int

    @property
    def bits(self) -> float:
        return 8 * self.size / self.block


class _TypeTraits(ctypes.Structure):
    """struct ggml_type_traits of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


class _GgufInitParams(ctypes.Structure):
    """struct gguf_init_params of gguf.h."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def library_folder() -> Path:
    """The folder of the prebuilt llama.cpp libraries, whether or not it is there."""
    root = os.environ.get("FEWBIT_ENVS") or Path.home() / ".cache" / "fewbit-envs"
    return Path(root).expanduser() / "llamacpp" / "lib-llama"


def available() -> bool:
    return (library_folder() / "libggml-base.so").exists()


@cache
def library() -> ctypes.CDLL:
    """libggml-base with the prototypes of the functions used here."""
    path = library_folder() / "libggml-base.so"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; build it with: {ENV_COMMAND}")
    lib = ctypes.CDLL(str(path))
    pointer, long = ctypes.c_void_p, ctypes.c_int64
    lib.ggml_quantize_init.argtypes, lib.ggml_quantize_init.restype = [ctypes.c_int], None
    lib.ggml_quantize_requires_imatrix.argtypes, lib.ggml_quantize_requires_imatrix.restype = (
        [ctypes.c_int],
        ctypes.c_bool,
    )
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, long, long, long, pointer]
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_get_type_traits.argtypes, lib.ggml_get_type_traits.restype = [ctypes.c_int], ctypes.POINTER(_TypeTraits)
    lib.ggml_validate_row_data.argtypes, lib.ggml_validate_row_data.restype = (
        [ctypes.c_int, pointer, ctypes.c_size_t],
        ctypes.c_bool,
    )
    lib.gguf_init_from_file.argtypes, lib.gguf_init_from_file.restype = [ctypes.c_char_p, _GgufInitParams], pointer
    lib.gguf_free.argtypes, lib.gguf_free.restype = [pointer], None
    for name, number in TYPE_IDS.items():
        found = lib.ggml_get_type_traits(number).contents.type_name.decode()
        if found.lower() != name.lower():
            raise RuntimeError(
                f"{path}: type {number} is called {found!r} there and {name!r} here; the library is of another version"
            )
    return lib


def traits(type_name: str) -> Traits:
    """Block size and bytes per block of a type, as the library has them."""
    found = library().ggml_get_type_traits(TYPE_IDS[type_name]).contents
    return Traits(found.blck_size, found.type_size)


def row_bytes(type_name: str, k: int) -> int:
    """Bytes of one row of k values."""
    block, size = traits(type_name)
    if k % block:
        raise ValueError(f"{type_name} needs rows divisible by {block}, got {k}")
    return k // block * size


def requires_imatrix(type_name: str) -> bool:
    return bool(library().ggml_quantize_requires_imatrix(TYPE_IDS[type_name]))


def quantize(
    type_name: str, rows: NDArray[np.float32], imatrix: NDArray[np.float32] | None = None, threads: int = 1
) -> NDArray[np.uint8]:
    """Encode float32 rows [n, k] as ggml_quantize_chunk does; uint8 [n, bytes per row]."""
    lib, number = library(), TYPE_IDS[type_name]
    source = np.ascontiguousarray(rows, dtype=np.float32)
    n, k = source.shape
    packed = np.zeros((n, row_bytes(type_name, k)), dtype=np.uint8)
    if not np.isfinite(source).all():
        raise ValueError("ggml aborts the process on values that are not finite")
    weights = None if imatrix is None else np.ascontiguousarray(imatrix, dtype=np.float32)
    if weights is None and requires_imatrix(type_name):
        raise ValueError(f"{type_name} cannot be encoded without an importance matrix")
    if weights is not None and weights.shape != (k,):
        raise ValueError(f"the importance matrix must have shape ({k},), got {weights.shape}")
    lib.ggml_quantize_init(number)

    def encode(part: tuple[int, int]) -> int:
        first, last = part
        return lib.ggml_quantize_chunk(
            number, source[first:].ctypes.data, packed[first:].ctypes.data, 0, last - first, k, None if weights is None else weights.ctypes.data
        )  # fmt: skip

    with ThreadPoolExecutor(max(1, threads)) as pool:
        written = sum(pool.map(encode, _parts(n, threads)))
    if written != packed.nbytes:
        raise RuntimeError(f"ggml wrote {written} bytes of {packed.nbytes} for {type_name}")
    return packed


def dequantize(type_name: str, packed: NDArray[np.uint8], k: int) -> NDArray[np.float32]:
    """Decode rows of k values from their bytes, in any shape; float32 [n, k]."""
    data = np.ascontiguousarray(packed, dtype=np.uint8).reshape(-1, row_bytes(type_name, k))
    if type_name == "F32":
        return data.view(np.float32).copy()
    values = np.empty((len(data), k), dtype=np.float32)
    library().ggml_get_type_traits(TYPE_IDS[type_name]).contents.to_float(
        data.ctypes.data, values.ctypes.data, values.size
    )
    return values


def validate(type_name: str, packed: NDArray[np.uint8]) -> bool:
    """What llama.cpp's --check-tensors says of these blocks: whole blocks, and no scale that is NaN or infinite."""
    data = np.ascontiguousarray(packed, dtype=np.uint8)
    return bool(library().ggml_validate_row_data(TYPE_IDS[type_name], data.ctypes.data, data.nbytes))


def gguf_opens(path: Path) -> bool:
    """Whether llama.cpp's own GGUF reader accepts the header of a file (a file may also crash it: use a subprocess if it is hostile)."""
    lib = library()
    context = lib.gguf_init_from_file(str(path).encode(), _GgufInitParams(True, None))
    if context:
        lib.gguf_free(context)
    return bool(context)


def _parts(n: int, threads: int) -> Iterator[tuple[int, int]]:
    step = max(1, -(-n // max(1, threads)))
    for first in range(0, n, step):
        yield first, min(n, first + step)
