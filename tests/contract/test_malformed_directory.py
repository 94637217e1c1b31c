"""Cases 31-42 and 53 of the catalogue: indexes, folders and files that are something else."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors_cases import entry, file_of

from fewbit.base.errors import InputError
from fewbit.store.checkpoint import open_checkpoint

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def shard(*names: str, fill: int = 0) -> bytes:
    header = {name: entry(offsets=(8 * i, 8 * i + 8)) for i, name in enumerate(names)}
    text = json.dumps(header)
    return file_of(text + " " * (-len(text) % 8), bytes([fill]) * (8 * len(names)))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A sound checkpoint of two shards: a and b in the first, c in the second."""
    root = tmp_path / "checkpoint"
    root.mkdir()
    (root / "config.json").write_text('{"model_type": "none"}')
    (root / FIRST).write_bytes(shard("a", "b"))
    (root / SECOND).write_bytes(shard("c"))
    index(root, {"a": FIRST, "b": FIRST, "c": SECOND})
    return root


def index(root: Path, weight_map: Any, **metadata: Any) -> None:
    (root / INDEX).write_text(json.dumps({"metadata": {"total_size": 24, **metadata}, "weight_map": weight_map}))


def refused(path: Path, code: str, says: str = "", tensor: str | None = None, file: str | None = None) -> InputError:
    with pytest.raises(InputError) as caught:
        open_checkpoint(path)
    error = caught.value
    assert error.code == code
    assert says in error.message
    assert error.tensor == tensor
    assert error.remedy
    assert error.file
    if file:
        assert Path(error.file).name == file
    return error


def test_sound(sharded: Path) -> None:
    for path in (sharded, sharded / INDEX):
        with open_checkpoint(path) as checkpoint:
            assert sorted(checkpoint.manifest) == ["a", "b", "c"]
            assert checkpoint.manifest["c"].file == SECOND
            assert checkpoint.warnings == ()
            assert checkpoint.manifest.files == (FIRST, SECOND)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"metadata": {}}', "weight_map must be an object"),
        ('{"weight_map": []}', "weight_map must be an object"),
        ('{"weight_map": {}}', "weight_map must be an object"),
        ('{"weight_map": "x"}', "weight_map must be an object"),
        ("[]", "an object is needed"),
        ("", "empty"),
        ('{"weight_map": {"a": "x"', "not JSON"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "twice"),
        ("[" * 100_000, "nested"),
        ("\ufeff{}", "byte-order mark"),
    ],
)
def test_31_index_malformed(sharded: Path, text: str, says: str) -> None:
    (sharded / INDEX).write_text(text)
    refused(sharded, "FB-E0121", says, file=INDEX)


@pytest.mark.parametrize("value", [1, None, ["x"], {}])
def test_31_file_name_not_text(sharded: Path, value: Any) -> None:
    index(sharded, {"a": FIRST, "b": value})
    refused(sharded, "FB-E0121", "instead of a file name", "b", INDEX)


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "C:x.safetensors", "C:\\x.safetensors", "..\\x.safetensors",
     "\\\\host\\x.safetensors", "x\0.safetensors", "x.bin", "", "//x.safetensors"],
)  # fmt: skip
def test_32_path_leads_out(sharded: Path, name: str) -> None:
    (sharded.parent / "x.safetensors").write_bytes(shard("a"))
    index(sharded, {"a": name})
    refused(sharded, "FB-E0122", "plain name", file=INDEX)


def test_33_link_leads_out(sharded: Path) -> None:
    outside = sharded.parent / "secret.safetensors"
    shutil.move(sharded / FIRST, outside)
    (sharded / FIRST).symlink_to(outside)
    refused(sharded, "FB-E0122", "outside the checkpoint", file=FIRST)


def test_33_link_inside_and_hub_cache_are_fine(sharded: Path, tmp_path: Path) -> None:
    (sharded / "deep").mkdir()
    shutil.move(sharded / FIRST, sharded / "deep" / "blob")
    (sharded / FIRST).symlink_to("deep/blob")
    open_checkpoint(sharded).close()
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name in ("config.json", FIRST, SECOND, INDEX):
        shutil.copy(sharded / name, blobs / name[::-1])
        (snapshot / name).symlink_to(Path("../../blobs") / name[::-1])
    open_checkpoint(snapshot).close()


def test_33_dangling_link(sharded: Path) -> None:
    (sharded / FIRST).unlink()
    (sharded / FIRST).symlink_to("nowhere")
    refused(sharded, "FB-E0120", file=FIRST)


def test_34_shard_missing(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    refused(sharded, "FB-E0123", SECOND, "c", SECOND)


def test_34_shard_missing_without_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    with open_checkpoint(sharded) as checkpoint:
        assert "no index" in checkpoint.warnings[0]
        assert len(checkpoint.manifest) == 3
    (sharded / SECOND).unlink()
    refused(sharded, "FB-E0123", "1 of 2", file=SECOND)


def test_35_shard_not_listed(sharded: Path) -> None:
    index(sharded, {"a": FIRST, "b": FIRST})
    refused(sharded, "FB-E0124", "does not list it", file=SECOND)


def test_35_other_file_not_listed_is_a_warning(sharded: Path) -> None:
    (sharded / "consolidated.safetensors").write_bytes(shard("z"))
    with open_checkpoint(sharded) as checkpoint:
        assert any("consolidated" in warning for warning in checkpoint.warnings)
        assert "z" not in checkpoint.manifest


def test_36_tensor_absent_from_its_shard(sharded: Path) -> None:
    index(sharded, {"a": FIRST, "b": FIRST, "c": SECOND, "d": SECOND})
    refused(sharded, "FB-E0124", "does not hold it", "d", SECOND)


def test_37_tensor_not_in_the_map(sharded: Path) -> None:
    index(sharded, {"a": FIRST, "c": SECOND})
    refused(sharded, "FB-E0124", "not in the weight_map", "b", FIRST)


def test_38_tensor_twice_with_other_bytes(sharded: Path) -> None:
    (sharded / SECOND).write_bytes(shard("a", "c", fill=1))
    refused(sharded, "FB-E0125", "different content", "a", SECOND)
    (sharded / INDEX).unlink()
    refused(sharded, "FB-E0125", "different content", "a", SECOND)


def test_38_tensor_twice_with_equal_bytes_is_a_warning(sharded: Path) -> None:
    (sharded / SECOND).write_bytes(shard("a", "c"))
    index(sharded, {"a": SECOND, "b": FIRST, "c": SECOND})
    with open_checkpoint(sharded) as checkpoint:
        assert any("stored twice" in warning for warning in checkpoint.warnings)
        assert checkpoint.manifest["a"].file == SECOND


@pytest.mark.parametrize("size", [23, 1e30, -1])
def test_39_total_size_is_a_warning(sharded: Path, size: float) -> None:
    index(sharded, {"a": FIRST, "b": FIRST, "c": SECOND}, total_size=size)
    with open_checkpoint(sharded) as checkpoint:
        assert any("24" in warning for warning in checkpoint.warnings)


def test_40_single_file_and_index(sharded: Path) -> None:
    (sharded / "model.safetensors").write_bytes(shard("a"))
    refused(sharded, "FB-E0126", "both model.safetensors")
    for chosen, count in ((INDEX, 3), ("model.safetensors", 1)):
        with open_checkpoint(sharded / chosen) as checkpoint:
            assert len(checkpoint.manifest) == count


def test_40_two_indexes_or_unrelated_files(sharded: Path) -> None:
    shutil.copy(sharded / INDEX, sharded / "other.safetensors.index.json")
    refused(sharded, "FB-E0126", "2 indexes")
    for name in (INDEX, "other.safetensors.index.json", SECOND):
        (sharded / name).unlink()
    (sharded / "x.safetensors").write_bytes(shard("x"))
    refused(sharded, "FB-E0126", "belong together")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
DISGUISES: dict[str, tuple[bytes, str, str]] = {
    "lfs": (LFS, "FB-E0101", "Git LFS"),
    "html": (b"\n<!DOCTYPE html><html>", "FB-E0101", "web page"),
    "html-small": (b"<html><head>", "FB-E0101", "web page"),
    "gguf": (b"GGUF\3\0\0\0" + bytes(64), "FB-E0101", "GGUF"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(64), "FB-E0101", "HDF5"),
    "gzip": (b"\x1f\x8b\x08" + bytes(64), "FB-E0101", "gzip"),
    "zip": (b"PK\x03\x04" + bytes(64), "FB-E0127", "zip"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(64), "FB-E0127", "7z"),
    "pickle": (pickle.dumps({"a": 1}), "FB-E0127", "pickle"),
}


@pytest.mark.parametrize("name", DISGUISES)
def test_41_53_something_else_in_place_of_a_shard(sharded: Path, name: str) -> None:
    data, code, says = DISGUISES[name]
    (sharded / SECOND).write_bytes(data)
    refused(sharded, code, says, file=SECOND)


def test_41_pointer_in_place_of_the_index(sharded: Path) -> None:
    (sharded / INDEX).write_bytes(LFS)
    assert "git lfs pull" in refused(sharded, "FB-E0101", "Git LFS", file=INDEX).remedy


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
@pytest.mark.parametrize("name", [FIRST, INDEX, "config.json"])
def test_42_not_an_ordinary_file(sharded: Path, name: str, make: Callable[[Path], None]) -> None:
    (sharded / name).unlink()
    make(sharded / name)
    refused(sharded, "FB-E0128", file=name)


def test_42_device(sharded: Path) -> None:
    with pytest.raises(InputError, match="FB-E0128"):
        open_checkpoint("/dev/zero")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_53_folder_with_only_a_pickle(sharded: Path, name: str) -> None:
    for child in sharded.iterdir():
        child.unlink()
    (sharded / name).write_bytes(pickle.dumps({"a": 1}))
    assert "never opens one" in refused(sharded, "FB-E0127", "pickle", file=name).remedy
    refused(sharded / name, "FB-E0127", "pickle", file=name)


def test_53_zip_by_the_name_of_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 1}))
    refused(path, "FB-E0127", "zip", file="model.safetensors")


def test_nothing_is_unpickled(sharded: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(sharded / "harm"),)

    (sharded / SECOND).write_bytes(pickle.dumps(Bomb()))
    refused(sharded, "FB-E0127")
    assert not (sharded / "harm").exists()


def test_path_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "FB-E0120")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "FB-E0120", "no safetensors")


def test_files_are_closed_when_opening_fails(sharded: Path) -> None:
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    index(sharded, {"a": FIRST, "b": FIRST, "c": SECOND, "d": SECOND})
    for _ in range(5):
        refused(sharded, "FB-E0124", tensor="d")
    if before is not None:
        assert len(os.listdir("/proc/self/fd")) == before
