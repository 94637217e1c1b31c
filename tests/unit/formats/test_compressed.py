"""compressed-tensors as a stranger: its own compressors read and write what ours write and read."""

from __future__ import annotations

import pytest
import torch
from format_cases import as_found, manifest_of, random_qtensor

from fewbit.base.errors import InputError
from fewbit.formats.compressed import FORMAT
from fewbit.formats.compressed_config import targets
from fewbit.formats.table import Assignment
from fewbit.num.scheme import parse_scheme

ct = pytest.importorskip("compressed_tensors")
NAME = "model.layers.0.self_attn.q_proj.weight"
SCHEMES = [
    *(f"int{bits}-{blocks}-f32{zero}" for bits in (2, 3, 4, 5, 6, 7, 8) for blocks in ("channel", "g32") for zero in ("", "-asym")),
    "int4-tensor-f32", "int8-channel-f32+int8-token", "int8-channel-f32-asym+int8-token", "int4-g128-f32+int8-token",
    "fp8-e4m3-tensor", "fp8-e4m3-channel", "fp8-e4m3-block128", "fp8-e4m3-channel+fp8-e4m3-token", "fp8-e4m3-tensor+fp8-e4m3-tensor-static",
    "fp8-e4m3-block128+fp8-e4m3-g128", "mxfp4", "mxfp4+mxfp4", "mxfp6-e2m3", "mxfp8", "mxfp8+mxfp8", "nvfp4", "nvfp4+nvfp4-static",
]  # fmt: skip


def their_scheme(spelling: str):
    """(our scheme, their QuantizationScheme parsed from the config that we write)."""
    from compressed_tensors.quantization import QuantizationConfig

    scheme = parse_scheme(spelling)
    config, _ = FORMAT.config({}, Assignment({NAME: scheme}))
    parsed = QuantizationConfig.model_validate(config["quantization_config"])
    return scheme, parsed.config_groups["group_0"]


@pytest.mark.parametrize("spelling", SCHEMES)
def test_their_decompressor_reads_our_tensors(spelling: str) -> None:
    from compressed_tensors.compressors.base import BaseCompressor

    scheme, theirs = their_scheme(spelling)
    shape = (48, 256)
    assert FORMAT.accepts(scheme, shape) is None
    q = random_qtensor(scheme, shape)
    prefix = NAME.removesuffix("weight")
    state = {name.removeprefix(prefix): tensor for name, tensor in FORMAT.encode(NAME, q).items()}
    compressor = BaseCompressor.get_value_from_registry(theirs.format)
    values = compressor.decompress(state, theirs)["weight"].float()
    exact = q.dequantize()
    packed_float = "nvfp4" in theirs.format or "mxfp" in theirs.format  # they compute these in bfloat16
    torch.testing.assert_close(values, exact, rtol=2**-7 if packed_float else 1e-6, atol=0)


@pytest.mark.parametrize("spelling", SCHEMES)
def test_they_would_choose_the_same_format(spelling: str) -> None:
    from compressed_tensors.compressors.format import infer_module_format

    _, theirs = their_scheme(spelling)
    chosen = theirs.format
    theirs.format = None
    assert infer_module_format(torch.nn.Linear, theirs).value == chosen


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_our_words_are_their_words(bits: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    q = random_qtensor(parse_scheme(f"int{bits}-channel"), (7, 100))
    assert torch.equal(FORMAT.encode(NAME, q)[f"{NAME}_packed"], pack_to_int32(q.codes, bits))
    asym = random_qtensor(parse_scheme(f"int{bits}-g32-asym"), (13, 96))
    shifted = (asym.code_shift.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    assert torch.equal(FORMAT.encode(NAME, asym)[f"{NAME}_zero_point"], pack_to_int32(shifted, bits, packed_dim=0))


def old_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """compressed-tensors before 0.20: floor(32 / bits) codes in every word."""
    per = 32 // bits
    rows, cols = codes.shape
    wide = torch.nn.functional.pad(codes.long() + (1 << (bits - 1)), (0, -cols % per)).reshape(rows, -1, per)
    words = (wide << (torch.arange(per) * bits)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize("blocks", ["channel", "g128"])
def test_packing_before_0_20_is_read(bits: int, blocks: str) -> None:
    q = random_qtensor(parse_scheme(f"int{bits}-{blocks}"), (5, 256))
    tensors, _ = as_found(FORMAT, q, NAME)
    tensors[f"{NAME}_packed"] = old_words(q.codes, bits)
    config, _ = FORMAT.config({"hidden_size": 256}, Assignment({NAME: q.scheme}))
    found = FORMAT.detect(config, manifest_of(tensors))
    assert found is not None
    assert torch.equal(FORMAT.decode(NAME, tensors.__getitem__, found[NAME]).codes, q.codes)


def test_lengths_that_the_config_does_not_know_come_from_weight_shape() -> None:
    q = random_qtensor(parse_scheme("int4-channel"), (3, 101))
    tensors = FORMAT.encode(NAME, q)
    config, _ = FORMAT.config({}, Assignment({NAME: q.scheme}))
    found = FORMAT.detect(config, manifest_of(tensors))
    assert found is not None and found[NAME].shape == (3, 104)
    assert FORMAT.decode(NAME, tensors.__getitem__, found[NAME]).shape == (3, 101)


def test_activation_order_of_old_checkpoints() -> None:
    scheme = parse_scheme("int4-g32")
    q = random_qtensor(scheme, (4, 128))
    order = torch.randperm(128, generator=torch.Generator().manual_seed(1))
    group_of = torch.empty(128, dtype=torch.int32)
    group_of[order] = torch.arange(128, dtype=torch.int32) // 32
    tensors, _ = as_found(FORMAT, q, NAME)
    tensors[f"{NAME}_g_idx"] = group_of
    config, _ = FORMAT.config({}, Assignment({NAME: scheme}))
    found = FORMAT.detect(config, manifest_of(tensors))
    assert found is not None
    again = FORMAT.decode(NAME, tensors.__getitem__, found[NAME]).dequantize()
    expected = q.codes.float() * q.scale.float()[:, group_of.long()]
    assert torch.equal(again, expected)


def test_a_config_that_lies_about_bits_is_refused() -> None:
    q = random_qtensor(parse_scheme("int4-g32"), (4, 128))
    tensors = FORMAT.encode(NAME, q)
    config, _ = FORMAT.config({}, Assignment({NAME: parse_scheme("int8-g32")}))
    with pytest.raises(InputError, match="FB-E0621"):
        FORMAT.detect(config, manifest_of(tensors))


def test_mixed_schemes_get_exact_targets() -> None:
    from compressed_tensors.quantization import QuantizationConfig

    names = [f"model.layers.{i}.mlp.{part}_proj.weight" for i in range(12) for part in ("up", "down")]
    four, eight = parse_scheme("int4-g32"), parse_scheme("int8-channel")
    schemes = {name: eight if "down" in name or ".3." in name else four for name in names}
    config, _ = FORMAT.config({}, Assignment(schemes, kept=("lm_head.weight", "model.embed_tokens.weight")))
    parsed = QuantizationConfig.model_validate(config["quantization_config"])
    assert parsed.format == "pack-quantized" and parsed.ignore == ["lm_head"]
    tensors = {}
    for name, scheme in schemes.items():
        tensors |= FORMAT.encode(name, random_qtensor(scheme, (32, 128)))
    found = FORMAT.detect(config, manifest_of(tensors))
    assert found is not None
    assert {name: stored.scheme for name, stored in found.items()} == schemes
    assert sum(len(group.targets) for group in parsed.config_groups.values()) < 16


def test_targets_are_short_where_they_can_be() -> None:
    modules = [f"layers.{i}.q" for i in range(4)]
    assert targets(modules, ["layers.0.k"]) == [r"re:^layers\.\d+\.q$"]
    assert targets(modules[:3], ["layers.3.q"]) == modules[:3]


def test_scales_take_the_dtype_of_the_model() -> None:
    assert str(FORMAT.conform(parse_scheme("int4-g128"), "BF16")) == "int4-g128-bf16"
    assert str(FORMAT.conform(parse_scheme("fp8-e4m3-channel"), "BF16")) == "fp8-e4m3-channel-bf16"
    assert str(FORMAT.conform(parse_scheme("fp8-e4m3-channel"), "F16")) == "fp8-e4m3-channel"
    assert str(FORMAT.conform(parse_scheme("nvfp4"), "BF16")) == "nvfp4"
