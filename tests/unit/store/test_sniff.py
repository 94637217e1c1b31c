"""What a file is by its first bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fewbit.store.checkpoint import open_checkpoint
from fewbit.store.sniff import kind_of


@pytest.mark.parametrize("length", [640, 896, 1152, 1408, 0x8B1F, 0x5A4D])
def test_header_lengths_that_look_like_other_files(tmp_path: Path, length: int) -> None:
    """640 is 80 02 in the file, as a pickle begins; 0x8b1f is 1f 8b, as gzip does."""
    header = json.dumps({"a.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + header.ljust(length) + bytes(8))
    assert kind_of(file) == "safetensors"
    (tmp_path / "config.json").write_text("{}")
    with open_checkpoint(tmp_path) as found:
        assert list(found.manifest) == ["a.weight"]


def test_a_pickle_is_still_one(tmp_path: Path) -> None:
    import pickle

    (tmp_path / "x.safetensors").write_bytes(pickle.dumps({"a": 1}))
    assert kind_of(tmp_path / "x.safetensors") == "pickle"
