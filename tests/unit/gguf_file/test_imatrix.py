"""Importance matrices: both formats there and back, gaps filled, lies refused."""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fewbit.base.errors import InputError
from fewbit.formats.gguf.metadata import text
from fewbit.math.stats import Stats
from fewbit.run.imatrix import (
    Entry,
    ImportanceMatrix,
    imatrix_from_stats,
    importance_of,
    read_imatrix,
    write_binary,
    write_imatrix,
)
from fewbit.store.gguf_write import write_file


def matrix() -> ImportanceMatrix:
    rng = np.random.default_rng(0)
    plain = Entry(rng.random((1, 64), np.float32), np.array([40], np.float32))
    experts = Entry(
        np.vstack([rng.random((2, 32), np.float32), np.zeros((1, 32), np.float32)]), np.array([10, 30, 0], np.float32)
    )
    return ImportanceMatrix({"blk.0.attn_q.weight": plain, "blk.0.ffn_up_exps.weight": experts}, ("texts.txt",), 4, 128)


def test_gguf_there_and_back(tmp_path: Path) -> None:
    path, held = tmp_path / "m.gguf", matrix()
    write_imatrix(path, held)
    found = read_imatrix(path)
    assert (found.datasets, found.chunks, found.chunk_size) == (("texts.txt",), 4, 128)
    for name, entry in held.entries.items():
        assert np.array_equal(found.entries[name].sums, entry.sums) and np.array_equal(
            found.entries[name].counts, entry.counts
        )
    assert list(tmp_path.iterdir()) == [path]


def test_binary_there_and_back(tmp_path: Path) -> None:
    write_binary(tmp_path / "m.dat", matrix())
    found = read_imatrix(tmp_path / "m.dat")
    assert found.datasets == ("texts.txt",) and found.chunks == 4
    for name, entry in matrix().entries.items():
        assert np.allclose(found.entries[name].importance().ravel(), entry.importance().ravel(), rtol=1e-6)
    assert importance_of(found, "blk.0.ffn_up_exps.weight", (3, 8, 32)).shape == (3, 32)


def test_experts_that_saw_nothing_take_the_mean_of_the_others() -> None:
    entry = matrix().entries["blk.0.ffn_up_exps.weight"]
    importance = entry.importance()
    assert entry.unseen == 1 and np.allclose(importance[2], importance[:2].mean(0)) and (importance[2] > 0).all()
    nobody = Entry(np.zeros((2, 4), np.float32), np.zeros(2, np.float32))
    assert np.array_equal(nobody.importance(), np.ones((2, 4)))


def test_what_solvers_get() -> None:
    held = matrix()
    assert importance_of(held, "blk.0.attn_q.weight", (8, 64)).shape == (64,)
    assert importance_of(held, "blk.9.attn_q.weight", (8, 64)) is None
    with pytest.raises(InputError, match="FB-E0326"):
        importance_of(held, "blk.0.attn_q.weight", (8, 128))


def test_from_calibration_counts_experts_apart() -> None:
    tensors = [
        SimpleNamespace(name="blk.0.ffn_up_exps.weight", reads=("e.0", "e.1"), shape=(2, 8, 4), scheme="x"),
        SimpleNamespace(
            name="blk.0.attn_k_b.weight", reads=("kv",), shape=(2, 16, 8), scheme="x"
        ),  # columns are no inputs
        SimpleNamespace(name="output_norm.weight", reads=("norm",), shape=(4,), scheme=None),
    ]
    stats = {
        "e.0": Stats(5, sumsq=torch.full((4,), 10.0)),
        "kv": Stats(5, gram=torch.eye(4)),
        "norm": Stats(5, sumsq=torch.ones(4)),
    }
    found = imatrix_from_stats(stats, tensors)
    assert set(found.entries) == {"blk.0.ffn_up_exps.weight"}
    assert found.entries["blk.0.ffn_up_exps.weight"].counts.tolist() == [5, 0]
    assert found.entries["blk.0.ffn_up_exps.weight"].importance()[0].tolist() == [2.0] * 4


def binary(entries: int, name: bytes, size: int, values: list[float], count: int | None = None) -> bytes:
    head = struct.pack("<ii", entries, size) + name
    return (
        head + struct.pack("<ii", 3, len(values) if count is None else count) + struct.pack(f"<{len(values)}f", *values)
    )


LIES = {
    "empty": b"",
    "short": b"\x01",
    "no entries": struct.pack("<i", 0),
    "negative entries": struct.pack("<i", -5) + bytes(40),
    "2^31 entries": struct.pack("<i", 2**31 - 1) + bytes(40),
    "name of 2^30": binary(1, b"abc", 2**30, [1.0]),
    "negative name": binary(1, b"abc", -3, [1.0]),
    "2^30 values": binary(1, b"abc", 3, [1.0], 2**30),
    "negative values": binary(1, b"abc", 3, [1.0], -1),
    "not a number": binary(1, b"abc", 3, [float("nan")]),
    "below zero": binary(1, b"abc", 3, [-1.0]),
    "two entries promised": binary(2, b"abc", 3, [1.0]),
}


@pytest.mark.parametrize("case", LIES)
def test_lies_are_refused(case: str, tmp_path: Path) -> None:
    (tmp_path / "m.dat").write_bytes(LIES[case])
    with pytest.raises(InputError, match="FB-E0326"):
        read_imatrix(tmp_path / "m.dat")


def test_another_gguf_is_refused(tmp_path: Path) -> None:
    write_file(tmp_path / "m.gguf", {"general.type": text("model")}, {"a": ("F32", (4,), np.zeros(4, np.float32))})
    with pytest.raises(InputError, match="FB-E0326"):
        read_imatrix(tmp_path / "m.gguf")
    lone = {"general.type": text("imatrix")}
    write_file(tmp_path / "n.gguf", lone, {"a.in_sum2": ("F32", (1, 4), np.zeros(4, np.float32))})
    with pytest.raises(InputError, match="counts"):
        read_imatrix(tmp_path / "n.gguf")
