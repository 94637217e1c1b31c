"""Stacked experts in formats of single layers: names that engines look for, and back without a change."""

from __future__ import annotations

import pytest
import torch
from format_cases import as_found, differences, manifest_of, random_qtensor

from fewbit.base.errors import InputError
from fewbit.formats.table import Assignment, format_named
from fewbit.num.scheme import parse_scheme

GATE_UP = "model.layers.3.mlp.experts.gate_up_proj"
CASES = [
    ("gptq", "int4-g32"), ("gptq", "int4-g32-asym"), ("gptq-v2", "int8-channel"), ("awq", "int4-g64-asym"), ("fp8", "fp8-e4m3-block128+fp8-e4m3-g128"),
    ("modelopt", "nvfp4"), ("modelopt", "fp8-e4m3-tensor+fp8-e4m3-tensor-static"), ("modelopt", "int4-g128"), ("auto-round", "int4-g32"), ("auto-round", "int4-g32-asym"),
    ("compressed-tensors", "int4-g32-asym"), ("compressed-tensors", "int3-channel"), ("compressed-tensors", "nvfp4"), ("compressed-tensors", "fp8-e4m3-block128"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "spelling"), CASES)
def test_gates_and_ups_come_apart_and_together(name: str, spelling: str) -> None:
    target = format_named(name)
    q = random_qtensor(parse_scheme(spelling), (3, 256, 128))
    assert target.accepts(q.scheme, q.shape) is None
    tensors, stored = as_found(target, q, GATE_UP)
    layers = {part.rpartition(".")[0] for part in tensors}
    assert layers == {f"model.layers.3.mlp.experts.{e}.{word}" for e in range(3) for word in ("gate_proj", "up_proj")}
    again = target.decode(GATE_UP, tensors.__getitem__, stored)
    again.check()
    assert not differences(q, again)
    single, _ = target.config({}, Assignment({f"{layer}.weight": q.scheme for layer in layers}))
    found = target.detect(single, manifest_of(tensors))  # as a stranger reads it: single layers
    assert found is not None and len(found) == 6
    halves = [target.decode(n, tensors.__getitem__, found[n]).dequantize() for n in sorted(found)]
    assert torch.equal(torch.stack([torch.cat(halves[2 * e : 2 * e + 2]) for e in range(3)]), q.dequantize())


def test_a_lost_expert_is_noticed() -> None:
    target = format_named("gptq")
    q = random_qtensor(parse_scheme("int4-g32"), (2, 64, 64))
    tensors = target.encode(GATE_UP, q)
    config, _ = target.config({}, Assignment({GATE_UP: q.scheme}, stacks={GATE_UP: q.shape}))
    rest = {name: t for name, t in tensors.items() if ".experts.1.up_proj" not in name}
    with pytest.raises(InputError, match=r"FB-E0621.*stacked experts"):
        target.detect(config, manifest_of(rest))


def test_halves_must_be_whole() -> None:
    tiles = parse_scheme("fp8-e4m3-block128+fp8-e4m3-g128")
    assert "halves" in (format_named("fp8").accepts(tiles, (2, 384, 128)) or "")
    assert format_named("awq").accepts(parse_scheme("int4-g32-asym"), (2, 24, 64)) is not None  # halves of 12 rows


def test_scales_shared_by_both_halves_must_agree() -> None:
    target, scheme = format_named("fp8"), parse_scheme("fp8-e4m3-tensor+fp8-e4m3-tensor")
    q = random_qtensor(scheme, (2, 32, 32))
    tensors, stored = as_found(target, q, GATE_UP)
    part = "model.layers.3.mlp.experts.0.up_proj.weight_scale"
    tensors[part] = tensors[part] * 2
    with pytest.raises(InputError, match="scales of their own"):
        target.decode(GATE_UP, tensors.__getitem__, stored)
