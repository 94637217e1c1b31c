"""GGUF files written by our layout: the bytes of gguf-py's writer, splits, alignment, resumption, another file of a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fewbit.base.errors import InputError
from fewbit.formats.gguf import metadata as meta
from fewbit.formats.gguf.encode import decoded, tensor_bytes
from fewbit.formats.gguf.plan import PlannedTensor, gguf_plan, requantised
from fewbit.math.scales import quantize
from fewbit.num.scheme import parse_scheme
from fewbit.store.gguf import open_gguf
from fewbit.store.gguf_layout import lay_out_gguf
from fewbit.store.tensors import as_bytes
from fewbit.store.writer import ShardWriter

FACTS = {
    "general.architecture": meta.text("llama"), "llama.block_count": meta.u32(2), "llama.attention.head_count": meta.u32(8),
    "llama.attention.head_count_kv": meta.u32(2), "a.list": meta.array("i32", [1, -2, 3]), "a.float": meta.f32(1e-5),
    "a.flag": meta.boolean(True), "a.name": meta.text("naïve 日本"), "a.raw": meta.text(b"\xff\xfe"), "a.words": meta.texts(["x", "", "ü"]),
    "a.big": meta.Value("u64", 2**63), "a.less": meta.Value("i64", -(2**62)), "a.double": meta.Value("f64", 0.1),
}  # fmt: skip
ROWS = [
    ("token_embd.weight", "F32", (16, 256)),
    ("blk.0.attn_q.weight", "Q8_0", (256, 256)),
    ("blk.1.attn_v.weight", "BF16", (3, 5)),
    ("s", "F16", (1,)),
]


def data_of(layout: object, seed: int = 0) -> dict[str, bytes]:
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, 60, info.nbytes, np.uint8).tobytes() for name, info in layout.tensors.items()}


def write(out: Path, layout: object, data: dict[str, bytes]) -> Path:
    with ShardWriter(out, layout) as writer:
        for name in reversed(list(data)):
            writer.write(name, data[name])
        return writer.finish({})


@pytest.mark.parametrize(("alignment", "limit"), [(32, None), (8, None), (4096, None), (32, 20_000), (64, 1)])
def test_there_and_back(alignment: int, limit: int | None, tmp_path: Path) -> None:
    layout = lay_out_gguf(ROWS, FACTS, "m", limit, alignment)
    data = data_of(layout)
    write(tmp_path / "out", layout, data)
    source = open_gguf(tmp_path / "out")
    assert {key: value for key, value in source.metadata.items() if key != "general.alignment"} == FACTS
    assert [(n, i.dtype, i.shape) for n, i in source.manifest.items()] == [
        (name, kind if kind in ("F32", "F16", "BF16") else f"GGML:{kind}", shape) for name, kind, shape in ROWS
    ]
    assert all(info.offset % alignment == 0 for info in source.manifest.values())
    for name, info in source.manifest.items():
        assert bytes(as_bytes(source.read(info))) == data[name]
    assert (
        bytes(as_bytes(source.read_rows(source.manifest["blk.0.attn_q.weight"], 7, 9)))
        == data["blk.0.attn_q.weight"][7 * 272 : 9 * 272]
    )
    assert len(layout.shards) == {None: 1, 20_000: 3, 1: 4}[limit]
    source.close()


def test_bytes_are_those_of_the_gguf_package(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    layout = lay_out_gguf(
        ROWS[:2],
        {"general.architecture": meta.text("llama"), "llama.block_count": meta.u32(2), "w": meta.texts(["a", "é"])},
        "m",
    )
    data = data_of(layout)
    write(tmp_path / "out", layout, data)
    theirs = gguf.GGUFWriter(tmp_path / "theirs.gguf", "llama")
    theirs.add_block_count(2)
    theirs.add_array("w", ["a", "é"])
    theirs.add_tensor(ROWS[0][0], np.frombuffer(data[ROWS[0][0]], np.float32).reshape(16, 256))
    blocks = np.frombuffer(data[ROWS[1][0]], np.uint8).reshape(256, 272)
    theirs.add_tensor(ROWS[1][0], blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    for step in (theirs.write_header_to_file, theirs.write_kv_data_to_file, theirs.write_tensors_to_file, theirs.close):
        step()
    assert (tmp_path / "out" / "m.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    layout = lay_out_gguf(ROWS, FACTS, "m")
    data = data_of(layout)
    whole = (write(tmp_path / "whole", layout, data) / "m.gguf").read_bytes()
    with ShardWriter(tmp_path / "out", layout) as writer:
        writer.write("s", data["s"])
    assert not (tmp_path / "out").exists()
    with ShardWriter(tmp_path / "out", layout) as writer:
        assert writer.resumed
        for name in data:
            if name != "s":
                writer.write(name, data[name])
        writer.finish({})
    assert (tmp_path / "out" / "m.gguf").read_bytes() == whole


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        ([("a", "F32", (4,)), ("a", "F32", (4,))], "FB-E0308"),
        ([("n" * 64, "F32", (4,))], "FB-E0308"),
        ([("", "F32", (4,))], "FB-E0308"),
        ([("a", "Q9_0", (32,))], "FB-E0310"),
        ([("a", "Q8_0", (48,))], "FB-E0309"),
        ([("a", "F32", (1, 1, 1, 1, 4))], "FB-E0309"),
        ([("a", "F32", (4, 0))], "FB-E0309"),
    ],
)
def test_what_no_reader_takes_is_not_laid_out(rows: list, code: str) -> None:
    with pytest.raises(InputError, match=code):
        lay_out_gguf(rows, {})


def test_bad_metadata_is_not_written() -> None:
    for facts, code in (
        ({"": meta.u32(1)}, "FB-E0305"),
        ({"ü": meta.u32(1)}, "FB-E0305"),
        ({"a": meta.Value("u8", 256)}, "FB-E0306"),
    ):
        with pytest.raises(InputError, match=code):
            lay_out_gguf([], facts)
    with pytest.raises(InputError, match="FB-E0307"):
        lay_out_gguf([], {}, alignment=48)


def planned(kind: str, shape: tuple[int, ...]) -> PlannedTensor:
    from fewbit.formats.gguf.types import block_type

    return PlannedTensor("t", ("t",), (), shape, "F32", kind, block_type(kind).scheme, "")


def test_values_that_do_not_fit_are_refused() -> None:
    for kind, values in (("F16", [1e6, 0.0]), ("BF16", [float("nan"), 0.0]), ("F32", [float("inf"), 1.0])):
        with pytest.raises(InputError, match="FB-E0314"):
            tensor_bytes(planned(kind, (2,)), torch.tensor(values))
    blocks = tensor_bytes(planned("Q8_0", (1, 32)), quantize(parse_scheme("q8_0"), torch.ones(1, 32)))
    assert torch.allclose(decoded("Q8_0", blocks, (1, 32)), torch.ones(1, 32), rtol=2e-3)
    blocks[0, :2] = torch.tensor([0, 0x7C], dtype=torch.uint8)  # an infinite scale
    with pytest.raises(InputError, match="FB-E0314"):
        decoded("Q8_0", blocks, (1, 32), "t")


def test_a_gguf_of_a_gguf(tmp_path: Path) -> None:
    """Any architecture: same tensors and metadata, other types; what is smaller already stays as it is."""
    facts = {
        **FACTS,
        "general.architecture": meta.text("never-heard-of"),
        "never-heard-of.block_count": meta.u32(1),
        "general.file_type": meta.u32(1),
    }
    rows = [
        ("token_embd.weight", "F16", (64, 256)),
        ("blk.0.ffn_down.weight", "F16", (256, 512)),
        ("blk.0.attn_q.weight", "Q4_0", (256, 256)),
        ("blk.0.attn_norm.weight", "F32", (256,)),
    ]
    layout = lay_out_gguf(rows, facts, "m")
    write(tmp_path / "out", layout, data_of(layout))
    source = open_gguf(tmp_path / "out")
    plan = gguf_plan(source.manifest, {}, {}, "Q8_0")
    assert {t.name: t.type for t in plan.tensors} == {
        "token_embd.weight": "Q8_0", "blk.0.ffn_down.weight": "Q8_0", "blk.0.attn_q.weight": "Q4_0", "blk.0.attn_norm.weight": "F32",
    }  # fmt: skip
    kept = next(t for t in plan.tensors if t.type == "Q4_0")
    assert kept.scheme is None and "more bits" in kept.reason and kept.reads == ("blk.0.attn_q.weight",)
    assert plan.metadata["general.file_type"].data == 7 and plan.metadata["a.list"] == FACTS["a.list"]
    forced = requantised(source.manifest, "Q2_K", {"blk.0.attn_q.weight": "Q8_0"})
    assert {t.name: t.type for t in forced.tensors}["blk.0.attn_q.weight"] == "Q8_0"
    source.close()
