"""Cases 1-30 of the catalogue of malformed input: every one a typed error that names file, tensor and remedy, in bounded memory."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path

import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors_cases import CASES, Case, entry, file_of, many_tensors, one, write

from fewbit.base.errors import FewbitError, InputError, catalogue
from fewbit.store.checkpoint import open_checkpoint
from fewbit.store.fileio import OpenFile
from fewbit.store.safetensors import MAX_HEADER_BYTES, MAX_TENSORS, read_file_header, read_header

MEMORY_LIMIT = MAX_HEADER_BYTES + (64 << 20)


def library_accepts(path: Path) -> bool:
    try:
        with safetensors.safe_open(path, "np") as file:
            file.keys()
        return True
    except Exception:
        return False


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.number}-{case.id}")
def test_refused_with_code_file_tensor_and_remedy(case: Case, tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", case.build())
    with pytest.raises(InputError) as caught:
        read_file_header(path)
    error = caught.value
    assert error.code == case.code
    assert case.says in error.message
    assert error.tensor == case.tensor
    assert error.file == str(path)
    assert error.remedy
    assert error.code in catalogue()
    assert error.exit_status == 2
    with pytest.raises(FewbitError):  # by the front door too
        open_checkpoint(path)


HOSTILE = {
    "100 MB of nested lists": lambda n: b'{"w":' + b"[" * n,
    "100 MB of empty strings": lambda n: b"{" + b'"":"",' * (n // 6),
    "100 MB of empty objects": lambda n: b'{"a":{' + b'"":{},' * (n // 6),
    "100 MB of metadata": lambda n: (
        b'{"__metadata__":{'
        + b",".join(b'"%07d":""' % i for i in range(70_000))
        + b',"":""' * (n // 6 - 200_000)
        + b"}}"
    ),
    "100 MB of escapes in metadata": lambda n: b'{"__metadata__":{"a":"' + b'\\"' * (n // 2) + b'"}}',
    "100 MB of one name": lambda n: b'{"' + b"x" * n + b'":1}',
    "100 MB of spaces": lambda n: b"{" + b" " * n,
    "100 MB of one shape": lambda n: b'{"w":{"dtype":"F32","shape":[' + b"1," * (n // 2) + b"1]}}",
    "100 MB of one number": lambda n: b'{"w":{"dtype":"F32","shape":[' + b"1" * n + b"]}}",
}


@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_memory_is_bounded_for_the_largest_header(hostile, tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors", file_of(hostile(MAX_HEADER_BYTES - 100)))
    tracemalloc.start()
    try:
        with pytest.raises(InputError):
            read_file_header(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= MEMORY_LIMIT


@pytest.mark.parametrize(
    "order", [("dtype", "shape", "data_offsets"), ("data_offsets", "shape", "dtype")], ids=["usual", "unusual"]
)
def test_memory_is_bounded_for_the_most_tensors(order: tuple[str, ...], tmp_path: Path) -> None:
    sample = MAX_TENSORS // 10
    header = {}
    for i in range(sample):
        full = entry("U8", (1,), (i, i + 1))
        header[f"model.layers.{i // 1000}.mlp.experts.{i % 1000}.down_proj.weight"] = {key: full[key] for key in order}
    path = write(tmp_path / "model.safetensors", file_of(header, bytes(sample)))
    tracemalloc.start()
    try:
        assert len(read_file_header(path).tensors) == sample
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 10 * peak <= MEMORY_LIMIT


def test_28_misaligned_data_is_read_with_a_warning(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    values = torch.tensor([1.5, -2.0])
    data = b"\x07" + values.numpy().tobytes()
    write(tmp_path / "m.safetensors", file_of({"a": entry("U8", (1,), (0, 1)), "w": entry(offsets=(1, 9))}, data))
    with open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
        assert any("aligned" in warning for warning in checkpoint.warnings)
        assert torch.equal(checkpoint.read("w"), values)


class TestCase30FileChanges:
    """A file that is replaced, cut short or rewritten between opening and reading."""

    @pytest.fixture
    def opened(self, tmp_path: Path):
        path = write(tmp_path / "m.safetensors", one())
        checkpoint = open_checkpoint(path)
        yield path, checkpoint
        checkpoint.close()

    def refuses(self, checkpoint) -> None:
        with pytest.raises(InputError) as caught:
            checkpoint.read("w")
        assert (caught.value.code, caught.value.tensor) == ("FB-E0111", "w")
        assert "m.safetensors" in caught.value.file

    def test_sound(self, opened) -> None:
        assert opened[1].read("w").tolist() == [0.0, 0.0]

    def test_cut_short(self, opened) -> None:
        os.truncate(opened[0], 90)
        self.refuses(opened[1])

    def test_replaced(self, opened) -> None:
        os.replace(write(opened[0].with_name("other"), one()), opened[0])
        self.refuses(opened[1])

    def test_rewritten(self, opened) -> None:
        with open(opened[0], "r+b") as file:
            file.seek(-1, 2)
            file.write(b"\x01")
        os.utime(opened[0], ns=(1, 1))
        self.refuses(opened[1])

    def test_deleted(self, opened) -> None:
        opened[0].unlink()
        self.refuses(opened[1])

    def test_fingerprint_notices(self, opened) -> None:
        opened[0].unlink()
        with pytest.raises(InputError, match="FB-E0111"):
            opened[1].fingerprint()

    def test_cut_short_while_the_header_is_read(self, tmp_path: Path) -> None:
        path = write(tmp_path / "m.safetensors", many_tensors(3))
        file = OpenFile(path)
        os.truncate(path, 20)
        with pytest.raises(InputError, match="FB-E0111"):
            read_header(file, "m.safetensors")
        file.close()


SOUND: dict[str, bytes] = {
    "plain": one(),
    "no tensors": file_of({}),
    "padded": file_of(json.dumps({"w": entry()}) + "   ", bytes(8)),
    "spaced": file_of(json.dumps({"w": entry()}, indent=3), bytes(8)),
    "unusual order": file_of({"w": dict(reversed(entry().items()))}, bytes(8)),
    "escaped keys": file_of('{"\\u0077":{"\\u0064type":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
    "metadata last": file_of({"w": entry(), "__metadata__": {"a": 'b"\\\n{}é', "ü": ""}}, bytes(8)),
    "scalar and empty": file_of({"s": entry("F64", (), (0, 8)), "e": entry("F32", (0, 4), (8, 8))}, bytes(8)),
    "unsorted": file_of({"b": entry(offsets=(8, 16)), "a": entry()}, bytes(16)),
    "F4": one(data=bytes(2), dtype="F4", shape=[2, 2], data_offsets=[0, 2]),
    "rank 8": one(shape=[1, 1, 1, 1, 1, 1, 1, 2]),
    "other scripts": file_of({"层.权重 w": entry()}, bytes(8)),
}


@pytest.mark.parametrize("data", SOUND.values(), ids=SOUND)
def test_sound_files_are_read_as_the_library_reads_them(data: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "m.safetensors", data)
    header = read_file_header(path)
    with safetensors.safe_open(path, "np") as file:
        assert sorted(header.tensors) == sorted(file.keys())
        assert header.metadata == (file.metadata() or {})
        for name, info in header.tensors.items():
            assert list(info.shape) == file.get_slice(name).get_shape()
            assert info.dtype == file.get_slice(name).get_dtype()


_INTERESTING = st.sampled_from(
    [b"0", b"-1", b"-0", b"1e0", b"8.0", b"18446744073709551616", b"true", b"null", b'"', b"\\", b"\xff", b"{", b"}"]
)
_INSERTED = st.one_of(_INTERESTING, st.binary(min_size=1, max_size=4))
_MUTATION = st.tuples(
    st.sampled_from(["flip", "cut", "insert", "delete", "repeat", "swap"]), st.integers(0, 1 << 20), _INSERTED
)


def mutate(data: bytes, kind: str, at: int, extra: bytes) -> bytes:
    at %= len(data) + 1
    match kind:
        case "flip":
            return data[:at] + bytes([data[at] ^ (extra[0] or 1)]) + data[at + 1 :] if at < len(data) else data
        case "cut":
            return data[:at]
        case "insert":
            return data[:at] + extra + data[at:]
        case "delete":
            return data[:at] + data[at + len(extra) :]
        case "repeat":
            return data[:at] + data[at : at + 20] + data[at:]
    return data[:at] + extra + data[at + len(extra) :]


@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@given(base=st.sampled_from(sorted(SOUND)), mutations=st.lists(_MUTATION, min_size=1, max_size=3), mend=st.booleans())
def test_never_accepts_what_the_library_rejects(tmp_path_factory, base: str, mutations: list, mend: bool) -> None:
    data = SOUND[base]
    for mutation in mutations:
        data = mutate(data, *mutation)
    if mend and len(data) >= 8:  # let the length be right, so that the header itself is what is wrong
        brace = data.rfind(b"}") + 1
        data = max(brace - 8, 0).to_bytes(8, "little") + data[8:]
    path = write(tmp_path_factory.getbasetemp() / "mutated.safetensors", data)
    try:
        read_file_header(path)
    except InputError as error:
        assert error.file == str(path)
        assert error.remedy
    else:
        assert library_accepts(path)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.number < 29], ids=lambda case: f"{case.number}-{case.id}"
)
def test_scan_and_json_reader_agree(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast path is only faster: with it switched off the verdict is the same."""
    import re

    from fewbit.store import safetensors as store

    monkeypatch.setattr(store, "_ENTRY", re.compile(rb"(?!)"))
    path = write(tmp_path / "m.safetensors", case.build())
    with pytest.raises(InputError) as caught:
        read_file_header(path)
    assert caught.value.code == case.code
