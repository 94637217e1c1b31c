"""GPTQ and AWQ against slow oracles written from the description of the layouts, and what must be refused."""

from __future__ import annotations

import pytest
import torch
from format_cases import as_found, differences, manifest_of, random_qtensor

from fewbit.base.errors import InputError
from fewbit.formats import autoround, awq, gptq
from fewbit.formats.table import Assignment, detect
from fewbit.num.scheme import parse_scheme

NAME = "model.layers.0.self_attn.q_proj.weight"


def bits_along(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """One long integer per row, cut into codes from the low end: the slow obvious way."""
    rows = []
    for row in words.tolist():
        number = sum((word & 0xFFFFFFFF) << (32 * index) for index, word in enumerate(row))
        rows.append([(number >> (bits * index)) & ((1 << bits) - 1) for index in range(count)])
    return torch.tensor(rows)


@pytest.mark.parametrize("bits", gptq.BITS)
@pytest.mark.parametrize("version", [1, 2])
def test_gptq_layout(bits: int, version: int) -> None:
    row = gptq.FORMAT if version == 1 else gptq.V2
    scheme = parse_scheme(f"int{bits}-g32" if version == 1 else f"int{bits}-g32-asym")
    q = random_qtensor(scheme, (32, 64))
    tensors = row.encode(NAME, q)
    prefix = NAME.removesuffix("weight")
    codes = bits_along(tensors[f"{prefix}qweight"].T, bits, 64)
    zeros = bits_along(tensors[f"{prefix}qzeros"], bits, 32).T + (1 if version == 1 else 0)
    scales = tensors[f"{prefix}scales"].T.float()
    group = tensors[f"{prefix}g_idx"].long()
    values = (codes - zeros[:, group]) * scales[:, group]
    assert torch.equal(values.float(), q.dequantize())


def test_awq_layout() -> None:
    q = random_qtensor(parse_scheme("int4-g32-asym"), (24, 64))
    tensors = awq.FORMAT.encode(NAME, q)
    prefix = NAME.removesuffix("weight")

    def columns(words: torch.Tensor) -> torch.Tensor:
        flat = bits_along(words, 4, words.shape[1] * 8)
        return torch.stack(
            [flat[:, col // 8 * 8 + [0, 4, 1, 5, 2, 6, 3, 7][col % 8]] for col in range(flat.shape[1])], dim=1
        )

    codes, zeros = columns(tensors[f"{prefix}qweight"]).T, columns(tensors[f"{prefix}qzeros"]).T
    group = torch.arange(64) // 32
    values = (codes - zeros[:, group]) * tensors[f"{prefix}scales"].T.float()[:, group]
    assert torch.equal(values.float(), q.dequantize())


def as_gptqmodel_reads(words: torch.Tensor, bits: int, rows: int) -> torch.Tensor:
    """Zero points of version 1: a one is added to every field of a word at once, carries and all; of 3 bits to each field by itself."""
    if bits == 3:
        return (bits_along(words, bits, rows) + 1) % 8
    ones = sum(1 << (bits * field) for field in range(32 // bits))
    whole = [[(word + ones) & 0xFFFFFFFF for word in row] for row in words.tolist()]
    return bits_along(torch.tensor(whole), bits, rows)


@pytest.mark.parametrize("bits", gptq.BITS)
def test_version_1_asymmetric_zero_points(bits: int) -> None:
    """Zero points of 0 beside others are what GPTQModel takes them for, and what we read back; without any, the fields are zero - 1."""
    scheme = parse_scheme(f"int{bits}-g32-asym")
    q = random_qtensor(scheme, (32, 64))
    q.code_shift.view(-1)[::3] = 0
    q.code_shift.view(-1)[1::3] = (1 << bits) - 1
    tensors, stored = as_found(gptq.FORMAT, q, NAME)
    words = tensors[NAME.removesuffix("weight") + "qzeros"]
    assert torch.equal(as_gptqmodel_reads(words, bits, 32).T, q.code_shift.long())
    assert not differences(q, gptq.FORMAT.decode(NAME, tensors.__getitem__, stored))
    q.code_shift.clamp_(min=1)
    words = gptq.FORMAT.encode(NAME, q)[NAME.removesuffix("weight") + "qzeros"]
    assert torch.equal(bits_along(words, bits, 32).T + 1, q.code_shift.long())


def test_order_of_columns_survives() -> None:
    scheme = parse_scheme("int4-g32-asym")
    q = random_qtensor(scheme, (32, 128))
    order = torch.randperm(128, generator=torch.Generator().manual_seed(0))
    order = torch.cat([part.sort().values for part in order.split(32)])  # within a group the order says nothing
    permuted = type(q)(scheme, q.shape, q.codes, q.scale, q.code_shift, sides={"permutation": order})
    tensors, stored = as_found(gptq.V2, permuted, NAME)
    assert tensors[NAME.removesuffix("weight") + "g_idx"].tolist() != [column // 32 for column in range(128)]
    again = gptq.V2.decode(NAME, tensors.__getitem__, stored)
    assert not differences(permuted, again)
    assert torch.equal(permuted.dequantize(), again.dequantize())


def test_symmetric_read_as_the_wrong_version_is_refused() -> None:
    q = random_qtensor(parse_scheme("int4-g32"), (32, 64))
    tensors, _ = as_found(gptq.FORMAT, q, NAME)
    config, _ = gptq.V2.config({}, Assignment({NAME: q.scheme}))
    found = gptq.V2.detect(config, manifest_of(tensors))
    assert found is not None
    with pytest.raises(InputError, match="wrong version"):
        gptq.V2.decode(NAME, tensors.__getitem__, found[NAME])


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_autorounds_plain_packing_has_zero_points_as_they_are(bits: int) -> None:
    """AutoRound writes asymmetric weights of other than 4 bits so; read as `auto_round:auto_gptq` they are off by a step."""
    q = random_qtensor(parse_scheme(f"int{bits}-g32-asym"), (32, 64))
    tensors = {name: t for name, t in gptq.V2.encode(NAME, q).items() if not name.endswith("g_idx")}
    words = {"quant_method": "auto-round", "bits": bits, "group_size": 32, "sym": False, "data_type": "int"}
    for packing, same in (("auto_round", True), ("auto_round:gptqmodel", True), ("auto_round:auto_gptq", False)):
        config = {"quantization_config": {**words, "packing_format": packing}}
        found = autoround.FORMAT.detect(config, manifest_of(tensors))
        assert found is not None
        again = autoround.FORMAT.decode(NAME, tensors.__getitem__, found[NAME])
        assert torch.equal(again.dequantize(), q.dequantize()) is same


@pytest.mark.parametrize("lie", [{"bits": 8}, {"group_size": 64}, {"group_size": -1}])
def test_lying_configs_are_refused(lie: dict) -> None:
    for row, spelling in ((gptq.FORMAT, "int4-g32"), (awq.FORMAT, "int4-g32-asym")):
        q = random_qtensor(parse_scheme(spelling), (32, 64))
        tensors = row.encode(NAME, q)
        config, _ = row.config({}, Assignment({NAME: q.scheme}))
        config["quantization_config"] |= lie
        with pytest.raises(InputError, match="FB-E062"):
            row.detect(config, manifest_of(tensors))


def test_mixed_widths_become_dynamic_rules() -> None:
    names = [f"model.layers.{i}.mlp.{part}.weight" for i in range(4) for part in ("up_proj", "down_proj", "gate_proj")]
    schemes = {
        name: parse_scheme("int8-g32") if "down" in name else parse_scheme("int4-g32")
        for name in names
        if "gate" not in name
    }
    kept = tuple(name for name in names if "gate" in name)
    config, beside = gptq.FORMAT.config({}, Assignment(schemes, (*kept, "lm_head.weight")))
    words = config["quantization_config"]
    assert beside["quantize_config.json"] == words and words["bits"] in (4, 8)
    assert len(words["dynamic"]) == 2 and sum(rule.startswith("-:") for rule in words["dynamic"]) == 1
    tensors = {}
    for name, scheme in schemes.items():
        tensors |= gptq.FORMAT.encode(name, random_qtensor(scheme, (32, 64)))
    found = detect(config, manifest_of(tensors))
    assert found is not None and {name: stored.scheme for name, stored in found[1].items()} == schemes


def test_awq_has_one_scheme() -> None:
    with pytest.raises(InputError, match="one scheme"):
        awq.FORMAT.config(
            {}, Assignment({"a.weight": parse_scheme("int4-g32-asym"), "b.weight": parse_scheme("int4-g64-asym")})
        )
