"""Writes a small GGUF file whole, beside its place and renamed: importance matrices, adapters, test files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fewbit.base.errors import InputError
from fewbit.formats.gguf.metadata import Value
from fewbit.store.gguf_layout import lay_out_gguf

Tensors = Mapping[str, tuple[str, tuple[int, ...], np.ndarray]]
"""name -> (GGML type, row-major shape, its bytes in any numpy dtype)"""


def file_bytes(stem: str, metadata: Mapping[str, Value], tensors: Tensors) -> bytes:
    """A whole file in memory.

    Args:
        stem: its name without .gguf.
        metadata: typed values by key.

    Raises:
        InputError FB-E0309: an array whose bytes are not those of its type and shape.
    """
    rows = [(name, kind, shape) for name, (kind, shape, _) in tensors.items()]
    shard = lay_out_gguf(rows, metadata, stem=stem).shards[0]
    image = bytearray(shard.size)
    image[: len(shard.head)] = shard.head
    for info in shard.tensors:
        data = np.ascontiguousarray(tensors[info.name][2]).view(np.uint8).reshape(-1)
        if data.nbytes != info.nbytes:
            raise InputError("FB-E0309", f"{data.nbytes:,} bytes for {info.dtype} {list(info.shape)}", tensor=info.name)
        image[info.offset : info.offset + info.nbytes] = data.tobytes()
    return bytes(image)


def write_file(path: Path, metadata: Mapping[str, Value], tensors: Tensors) -> None:
    """Writes one file atomically; what is there is replaced. Arguments and errors as for `file_bytes`."""
    image = file_bytes(path.name.removesuffix(".gguf"), metadata, tensors)
    beside = path.with_name(path.name + ".new")
    with open(beside, "wb") as file:
        file.write(image)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
