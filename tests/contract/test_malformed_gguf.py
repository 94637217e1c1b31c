"""No GGUF file, however it lies, does more than raise a typed error: no traceback, no hang, no memory."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from gguf_cases import CASES, File, pair
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fewbit.base.errors import InputError, catalogue
from fewbit.store.gguf import open_gguf


def _open(path: Path) -> object:
    source = open_gguf(path)
    source.close()
    return source


def test_the_honest_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "honest.gguf"
    path.write_bytes(File().bytes())
    source = open_gguf(path)
    assert [(info.name, info.dtype, info.shape, info.nbytes) for info in source.manifest.values()] == [
        ("token_embd.weight", "F32", (2, 64), 512),
        ("w", "GGML:Q8_0", (3, 32), 102),
    ]
    assert source.metadata["llama.block_count"].data == 2
    assert list(source.metadata["tokenizer.ggml.tokens"].data) == ["a", "b"]
    assert source.metadata["general.flag"].data is True
    assert tuple(source.read(source.manifest["w"]).shape) == (3, 34)
    assert tuple(source.read_rows(source.manifest["w"], 1, 3).shape) == (2, 34)
    source.close()


@pytest.mark.parametrize("case", CASES)
def test_lies_are_refused(case: str, tmp_path: Path) -> None:
    build, code = CASES[case]
    path = tmp_path / "lie.gguf"
    path.write_bytes(build())
    with pytest.raises(InputError) as caught:
        _open(path)
    error = caught.value
    assert error.code == code if code else error.code.startswith("FB-E03")
    assert error.code in catalogue() and error.remedy and error.file and len(str(error)) < 1500


_BOUNDED = """
import resource, sys, json, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from fewbit.base.errors import InputError
from fewbit.store.gguf import open_gguf
used = int([line for line in open("/proc/self/status") if line.startswith("VmSize")][0].split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), used + (64 << 20)))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
out = {}
for path in sorted(Path(sys.argv[2]).iterdir()):
    try:
        open_gguf(path).close(); out[path.name] = "accepted"
    except InputError as error:
        out[path.name] = error.code
print(json.dumps(out))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_lies_cost_no_memory(tmp_path: Path) -> None:
    """All cases in one process that may take no more than 64 MiB beyond what it has at the start."""
    for number, (build, _) in enumerate(CASES.values()):
        (tmp_path / f"{number:03d}.gguf").write_bytes(build())
    source = str(Path(__file__).parents[2] / "src")
    run = subprocess.run(
        [sys.executable, "-c", _BOUNDED, source, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert "accepted" not in json.loads(run.stdout).values()


def test_parts_must_belong_together(tmp_path: Path) -> None:
    def part(number: int, count: int, total: int, tensors: list[bytes], data: bytes) -> bytes:
        split = [
            pair("split.no", "u16", number),
            pair("split.count", "u16", count),
            pair("split.tensors.count", "i32", total),
        ]
        return File(pairs=split, tensors=tensors, data=data).bytes()

    def put(first: bytes, second: bytes | None) -> Path:
        for old in tmp_path.iterdir():
            old.unlink()
        (tmp_path / "m-00001-of-00002.gguf").write_bytes(first)
        if second is not None:
            (tmp_path / "m-00002-of-00002.gguf").write_bytes(second)
        return tmp_path / "m-00001-of-00002.gguf"

    from gguf_cases import tensor

    a, b = [tensor("a", (8,), 0, 0)], [tensor("b", (8,), 0, 0)]
    first, second = part(0, 2, 2, a, bytes(32)), part(1, 2, 2, b, bytes(32))
    source = open_gguf(put(first, second))
    assert set(source.manifest) == {"a", "b"} and not any(key.startswith("split.") for key in source.metadata)
    source.close()
    source = open_gguf(tmp_path)  # the folder, and any part, stand for the whole
    assert len(source.manifest) == 2
    source.close()
    lies = {
        "missing": (first, None),
        "same part twice": (first, part(0, 2, 2, b, bytes(32))),
        "other count": (first, part(1, 3, 2, b, bytes(32))),
        "same tensor twice": (first, part(1, 2, 2, a, bytes(32))),
        "wrong total": (part(0, 2, 3, a, bytes(32)), second),
    }
    for what, files in lies.items():
        with pytest.raises(InputError) as caught:
            _open(put(*files))
        assert caught.value.code == "FB-E0313", what


_BOUNDARIES = [
    0,
    1,
    2,
    31,
    33,
    63,
    64,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63 - 1,
    2**63,
    2**64 - 1,
    2**64 - 64,
]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """An honest file after a few flips, cuts, splices and boundary numbers."""
    raw = bytearray(File().bytes())
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(raw) - 9, 0)))
        match draw(st.sampled_from(["flip", "cut", "splice", "u64", "u32"])):
            case "flip":
                raw[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "cut":
                del raw[at:]
            case "splice":
                raw[at:at] = draw(st.binary(max_size=40))
            case "u64":
                raw[at : at + 8] = struct.pack("<Q", draw(st.sampled_from(_BOUNDARIES)))
            case "u32":
                raw[at : at + 4] = struct.pack("<I", draw(st.sampled_from(_BOUNDARIES)) & 0xFFFFFFFF)
    return bytes(raw)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=mutated())
def test_mutations_raise_typed_errors_only(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mutated.gguf"
    path.write_bytes(raw)
    try:
        source = open_gguf(path)
        for info in source.manifest.values():
            assert source.read(info).numel() * source.read(info).element_size() == info.nbytes
        source.close()
    except InputError as error:
        assert error.code.startswith(("FB-E03", "FB-E01"))
