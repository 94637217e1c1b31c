"""The plain range in the weights' own dtype is what compressed-tensors' reference computes, to the bit."""

from __future__ import annotations

import pytest
import torch

from fewbit.base.errors import InputError
from fewbit.math import native
from fewbit.math.scales import Search, quantize
from fewbit.num.scheme import parse_scheme


def weights(dtype: torch.dtype, columns: int) -> torch.Tensor:
    made = torch.Generator().manual_seed(5)
    w = torch.randn(24, columns, generator=made) * torch.rand(24, 1, generator=made)
    w[3, :64], w[4], w[5] = 0.0, w[4].abs(), -w[5].abs()  # a group of zeros, ranges that do not hold zero
    w[6, 2] = 9.0
    return w.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (4, 128), (4, 0), (8, 128)])
def test_bits_of_compressed_tensors(dtype: torch.dtype, symmetric: bool, bits: int, group: int) -> None:
    compressed_tensors = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward_helpers import _quantize
    from compressed_tensors.quantization.utils.helpers import calculate_qparams

    w = weights(dtype, 256)
    grouped = w.reshape(24, -1, group or 256)
    how = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    args = compressed_tensors.QuantizationArgs(num_bits=bits, symmetric=symmetric, **how)
    scale, zero = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    ends = (torch.tensor(-float(1 << bits - 1)), torch.tensor(float((1 << bits - 1) - 1)))
    codes = _quantize(grouped, scale[..., None], None if symmetric else zero[..., None], *ends, args).reshape(w.shape)

    name = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}[dtype]
    scheme = parse_scheme(f"int{bits}-{f'g{group}' if group else 'channel'}{'' if symmetric else '-asym'}-{name}")
    q = native.quantize(scheme, w)
    offset = 0 if symmetric else 1 << bits - 1
    assert q.scale.dtype == dtype
    assert torch.equal(q.scale.reshape(scale.shape), scale)
    assert torch.equal(q.codes.long() - offset, codes.long())
    if not symmetric:
        assert torch.equal(q.code_shift.reshape(zero.shape).long() - offset, zero.long())


def test_ragged_rows_and_stacks() -> None:
    w = torch.stack([weights(torch.float32, 100)] * 3)
    q = native.quantize(parse_scheme("int4-g32-asym-f32"), w)
    plain = quantize(parse_scheme("int4-g32-asym-f32"), w, search=Search("minmax"))
    assert q.codes.shape == w.shape
    assert torch.equal(q.dequantize()[0], q.dequantize()[2])
    near = (q.dequantize() - w).square().sum() / (plain.dequantize() - w).square().sum()
    assert 0.98 < near < 1.02


def test_other_schemes_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="search=native") as caught:
        native.quantize(parse_scheme("nf4-g64"), torch.ones(4, 64))
    assert caught.value.code == "FB-E0601"
