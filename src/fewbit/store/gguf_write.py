"""Writes a small GGUF file whole, beside its place and renamed: importance matrices, adapters, test files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fewbit.base.errors import InputError
from fewbit.formats.gguf.metadata import Value
from fewbit.store.gguf_layout import lay_out_gguf


def write_file(
    path: Path, metadata: Mapping[str, Value], tensors: Mapping[str, tuple[str, tuple[int, ...], np.ndarray]]
) -> None:
    """Writes one file atomically.

    Args:
        path: final place; what is there is replaced.
        metadata: typed values by key.
        tensors: name -> (GGML type, row-major shape, its bytes in any numpy dtype).

    Raises:
        InputError FB-E0309: an array whose bytes are not those of its type and shape.
    """
    rows = [(name, kind, shape) for name, (kind, shape, _) in tensors.items()]
    shard = lay_out_gguf(rows, metadata, stem=path.name.removesuffix(".gguf")).shards[0]
    image = bytearray(shard.size)
    image[: len(shard.head)] = shard.head
    for info in shard.tensors:
        data = np.ascontiguousarray(tensors[info.name][2]).view(np.uint8).reshape(-1)
        if data.nbytes != info.nbytes:
            raise InputError("FB-E0309", f"{data.nbytes:,} bytes for {info.dtype} {list(info.shape)}", tensor=info.name)
        image[info.offset : info.offset + info.nbytes] = data.tobytes()
    beside = path.with_name(path.name + ".new")
    with open(beside, "wb") as file:
        file.write(image)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
