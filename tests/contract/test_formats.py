"""The contract that every safetensors format goes through, on every scheme that it accepts and on awkward shapes."""

from __future__ import annotations

import functools
import json

import pytest
import torch
from format_cases import SCHEMES, SHAPES, as_found, differences, manifest_of, random_qtensor

from fewbit.formats.table import Assignment, Format, detect, format_named, format_names
from fewbit.num.qtensor import QTensor
from fewbit.num.scheme import Scheme

FORMATS = [name for name in format_names() if format_named(name).container == "safetensors"]
DENSE = [name for name in FORMATS if name.startswith("dense")]
LOSSLESS = [name for name in FORMATS if name not in DENSE]  # dense keeps values, not codes: see its module's text


# scales that a format stores times or over a constant: a few float32 values cannot come back, and move by one ulp at the first writing
ROUNDED = {"bitsandbytes": ("int8-channel-f32",)}


def trip(target: Format, q: QTensor) -> QTensor:
    """Write, recognise and read back."""
    name = weight_name(q.shape)
    tensors, stored = as_found(target, q, name)
    assert sorted(stored.parts) == sorted(tensors), (str(q.scheme), q.shape)
    return target.decode(name, tensors.__getitem__, stored)


def weight_name(shape: tuple[int, ...]) -> str:
    return "model.layers.0.mlp.experts.down_proj" if len(shape) == 3 else "model.layers.3.self_attn.q_proj.weight"


@functools.cache
def accepted(name: str) -> list[tuple[Scheme, tuple[int, ...]]]:
    target = format_named(name)
    schemes = SCHEMES[::5] if name in DENSE else SCHEMES  # dense takes everything: a sample will do
    return [(scheme, shape) for scheme in schemes for shape in SHAPES if target.accepts(scheme, shape) is None]


@pytest.mark.parametrize("name", FORMATS)
def test_accepts_says_why(name: str) -> None:
    target = format_named(name)
    for scheme in SCHEMES:
        for shape in [*SHAPES, (128,), (4, 0)]:
            reason = target.accepts(scheme, shape)
            assert reason is None or (isinstance(reason, str) and len(reason.split()) > 3), (scheme, shape, reason)
    assert accepted(name), f"{name} accepts nothing"


@pytest.mark.parametrize("name", FORMATS)
def test_parts_are_what_encode_gives(name: str) -> None:
    target = format_named(name)
    for scheme, shape in accepted(name):
        q = random_qtensor(scheme, shape)
        tensors = target.encode(weight_name(shape), q)
        infos = manifest_of(tensors)
        promised = target.parts(weight_name(shape), scheme, shape)
        assert promised == {key: (info.dtype, info.shape) for key, info in infos.items()}, (scheme, shape)
        assert all(tensor.is_contiguous() for tensor in tensors.values()), (scheme, shape)


@pytest.mark.parametrize("name", LOSSLESS)
def test_decode_of_encode_is_the_same(name: str) -> None:
    target = format_named(name)
    for seed, (scheme, shape) in enumerate(accepted(name)):
        q = random_qtensor(scheme, shape, seed)
        q.check()
        if str(scheme) in ROUNDED.get(name, ()):
            first = trip(target, q)
            torch.testing.assert_close(first.dequantize(), q.dequantize(), rtol=3e-7, atol=0)
            q = first
        again = trip(target, q)
        again.check()
        assert not differences(q, again), (scheme, shape)


@pytest.mark.parametrize("name", LOSSLESS)
def test_lost_parts_are_noticed(name: str) -> None:
    """A checkpoint that lacks any one part must not be read as if nothing were wrong."""
    from fewbit.base.errors import InputError

    target = format_named(name)
    shapes = {scheme: shape for scheme, shape in reversed(accepted(name)) if len(shape) == 2}
    for scheme, shape in shapes.items():
        q, weight = random_qtensor(scheme, shape), weight_name(shape)
        tensors, _ = as_found(target, q, weight)
        written, _ = target.config({}, Assignment({weight: scheme}))
        for lost in tensors:
            rest = {key: tensor for key, tensor in tensors.items() if key != lost}
            if not rest:
                continue
            try:
                found = target.detect(written, manifest_of(rest))
                assert found is not None
                again = target.decode(weight, read_strictly(rest), found[weight])
            except InputError:
                continue
            if str(scheme) not in ROUNDED.get(name, ()):  # whatever can be spared may be missing, nothing else
                assert not differences(q, again), f"{name} read {scheme} without {lost} as something else"


def read_strictly(tensors: dict[str, torch.Tensor]):
    from fewbit.base.errors import InputError

    def read(name: str) -> torch.Tensor:
        if name not in tensors:
            raise InputError("FB-E0621", "not stored", tensor=name)
        return tensors[name]

    return read


@pytest.mark.parametrize("name", DENSE)
def test_dense_keeps_values(name: str) -> None:
    target = format_named(name)
    for scheme, shape in accepted(name):
        q = random_qtensor(scheme, shape)
        (values,) = target.encode("x", q).values()
        assert torch.equal(values, q.dequantize(values.dtype)) or scheme.is_leaf, (scheme, shape)


@pytest.mark.parametrize("name", FORMATS)
def test_config_is_json_and_only_this_format_claims_it(name: str) -> None:
    target: Format = format_named(name)
    scheme, shape = accepted(name)[0]
    weight = weight_name(shape)
    written, beside = target.config({"model_type": "llama"}, Assignment({weight: scheme}, kept=("lm_head.weight",)))
    assert json.loads(json.dumps(written))["model_type"] == "llama"
    json.dumps(beside)
    if name in LOSSLESS:
        found = detect(written, manifest_of(target.encode(weight, random_qtensor(scheme, shape))))
        assert found is not None and found[1].keys() == {weight}


@pytest.mark.parametrize("name", LOSSLESS)
def test_unknown_sides_are_refused(name: str) -> None:
    from dataclasses import replace

    from fewbit.base.errors import InputError

    scheme, shape = accepted(name)[0]
    q = replace(random_qtensor(scheme, shape), sides={"outliers": torch.zeros(shape).to_sparse()})
    with pytest.raises(InputError, match="outliers"):
        format_named(name).encode(weight_name(shape), q)
