"""Every kernel equals x @ dequantize(q).T; layouts give back what they were made of; state dicts and .to() keep weights exact."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from fewbit.base.errors import InputError
from fewbit.math.scales import Search, quantize
from fewbit.num.qtensor import QTensor
from fewbit.num.scheme import parse_scheme
from fewbit.runtime.kernels import direct, packed
from fewbit.runtime.kernels.int8 import quantise_tokens
from fewbit.runtime.layouts import LAYOUTS, choose
from fewbit.runtime.linear import QuantLinear

CPU = torch.device("cpu")
EPS = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}  # of the largest output
WORDS = (
    "int8", "int8-tensor", "int8-g32", "int4-g32", "int4-g128", "int4-channel", "int4-g64-asym", "uint4-g32-min", "uint4-g64-asym{f16}",
    "int3-g32", "int2-g16-asym", "nf4-g64-dq", "nf4-flat64", "fp8", "fp8-e4m3-block128", "mxfp4", "nvfp4", "q4_k", "q6_k", "iq4_xs", "iq2_xs",
    "int8-g64-asym", "q8_0", "mxfp8", "fp8-e5m2-channel", "nf4-g64", "bnbfp4-g32",
)  # fmt: skip
SHAPES = ((96, 256), (37, 512), (1, 256))
RAGGED = (
    "int8",
    "int4-g128",
    "int4-channel",
    "nf4-g64-dq",
    "nf4-flat64",
    "fp8-e4m3-block128",
    "int3-g32",
    "int5-channel",
)


def made(word: str, shape: tuple[int, int], seed: int = 0) -> QTensor:
    generator = torch.Generator().manual_seed(seed)
    return quantize(parse_scheme(word).weights_only, torch.randn(shape, generator=generator) / shape[1] ** 0.5)


def rel(y: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((y.float() - wanted).abs().max() / wanted.abs().max().clamp_min(1e-6))


def identical(a: QTensor, b: QTensor) -> None:
    left, right = a.named_parts(), b.named_parts()
    assert a.scheme == b.scheme and a.shape == b.shape and left.keys() == right.keys()
    for name, part in left.items():
        assert part.dtype == right[name].dtype and torch.equal(
            part.reshape(-1).view(torch.uint8), right[name].reshape(-1).view(torch.uint8)
        ), name


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_kernel_equals_the_decoded_weight(word: str, shape: tuple[int, int]) -> None:
    q = made(word, shape)
    w = q.dequantize()
    kernels = [row for row in LAYOUTS if row.accepts(q.scheme, shape, CPU) is None]
    assert kernels[-1].name == "packed"
    for layout, dtype, tokens in itertools.product(kernels, EPS, (1, 5, 70)):
        layer = QuantLinear(q, dtype=dtype, kernel=layout.name)
        x = torch.randn(tokens, shape[1], generator=torch.Generator().manual_seed(tokens)).to(dtype)
        y = layer(x)
        assert y.dtype == dtype and y.shape == (tokens, shape[0])
        assert rel(y, x.float() @ w.T) < EPS[dtype], (layout.name, dtype, tokens)
    for layout in kernels:
        identical(layout.from_layout(q.scheme, shape, layout.to_layout(q, torch.float32)), q)


@pytest.mark.parametrize("word", RAGGED)
@pytest.mark.parametrize("shape", ((13, 7), (50, 333), (130, 130)), ids=str)
def test_ragged_shapes(word: str, shape: tuple[int, int]) -> None:
    q = made(word, shape)
    layer = QuantLinear(q, torch.arange(shape[0]).float(), dtype=torch.float32)
    x = torch.randn(2, 3, shape[1])
    wanted = x @ q.dequantize().T + torch.arange(shape[0])
    assert layer(x).shape == (2, 3, shape[0]) and rel(layer(x), wanted) < EPS[torch.float32]
    assert layer(x[:0]).shape == (0, 3, shape[0])
    identical(layer.qtensor(), q)


@pytest.mark.parametrize("word", ("nf4-flat64", "fp8-e4m3-block128", "int4-g32", "q4_k", "nf4-g64-dq"))
def test_chunks_of_rows_make_the_whole(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "CHUNK", 1 << 11)
    cols = 256 if word == "q4_k" else 96 * 3
    q = made(word, (300, cols))
    pieces = list(packed.row_chunks(q.scheme, q.shape, packed.to_layout(q, torch.float32)))
    assert len(pieces) > 2
    assert torch.equal(torch.cat([w for _, w in pieces]), q.dequantize())


@pytest.mark.parametrize(
    ("word", "cols"),
    (("int4-g128", 200), ("q4_k", 96), ("int8-g16", 64), ("int3-g32", 64), ("int4-g64", 96), ("nf4-flat64", 96)),
)
def test_direct_says_what_it_cannot_read(word: str, cols: int) -> None:
    assert direct.accepts(parse_scheme(word), (4, cols), CPU) is not None


def test_a_code_that_is_no_number_is_refused() -> None:
    q = made("fp8", (4, 64))
    q.codes[2, 5] = 0x7F
    with pytest.raises(InputError, match="FB-E0908"):
        QuantLinear(q)


def test_dispatch() -> None:
    wanted = {
        "int8": "direct",
        "w8a8": "w8a8",
        "int4-g128": "int4",
        "q4_k": "int4",
        "int4-g128-asym": "int4",
        "nf4-g64-dq": "direct",
        "fp8": "direct",
        "mxfp4": "direct",
        "q6_k": "packed",
    }
    assert {word: choose(parse_scheme(word), (64, 256), CPU).name for word in wanted} == wanted
    assert choose(parse_scheme("int4-g128"), (64, 200), CPU).name == "packed"  # ragged group
    assert choose(parse_scheme("int4-g128"), (64, 256), CPU, dtype=torch.float32).name == "direct"
    with pytest.raises(InputError, match=r"FB-E0903.*int4 needs 4-bit"):
        choose(parse_scheme("int8"), (64, 256), CPU, "int4")
    with pytest.raises(InputError, match=r"FB-E0903.*no kernel is called"):
        choose(parse_scheme("int8"), (64, 256), CPU, "nope")
    with pytest.raises(InputError, match=r"FB-E0903.*needs a matrix"):
        choose(parse_scheme("nf4-g64"), (2, 64, 256), CPU)


def activated(word: str, shape: tuple[int, int]) -> QTensor:
    q = made(word, shape)
    return QTensor(parse_scheme(word), q.shape, q.codes, q.scale)


@pytest.mark.parametrize("shape", ((96, 256), (13, 7), (50, 333), (1, 33)), ids=str)
@pytest.mark.parametrize("tokens", (1, 5, 40))
def test_w8a8_is_the_product_of_rounded_values(shape: tuple[int, int], tokens: int) -> None:
    q = activated("w8a8", shape)
    x = torch.randn(tokens, shape[1]) * torch.logspace(-3, 3, tokens)[:, None]
    x[0] = 0
    codes, scale = quantise_tokens(x, q.scheme.activation)
    assert bool(((codes * scale - x).abs() <= scale * 0.5001).all())
    y = QuantLinear(q)(x)
    wanted = (codes.double() * scale.double()) @ q.dequantize().double().T
    assert float(((y - wanted).abs() / wanted.abs().amax(-1, keepdim=True).clamp_min(1e-6)).max()) < 1e-6


def test_static_activations_use_the_calibrated_scale() -> None:
    q = activated("int8-channel+int8-tensor-static", (32, 64))
    layer = QuantLinear(QTensor(q.scheme, q.shape, q.codes, q.scale, sides={"input_scale": torch.tensor([0.01])}))
    x = torch.randn(4, 64)
    rounded = (x / 0.01).round().clamp(-128, 127) * 0.01
    assert rel(layer(x), rounded @ q.dequantize().T) < 1e-5
    assert float(rounded.abs().max()) <= 1.28 < float(x.abs().max())  # the range really is fixed


def test_other_activation_schemes_round_inputs() -> None:
    q = activated("w8a8-fp8", (32, 64))
    layer, x = QuantLinear(q), torch.randn(4, 64)
    rounded = quantize(q.scheme.activation, x, search=Search("absmax")).dequantize()
    assert 1e-3 < rel(layer(x), x @ q.dequantize().T) < 0.1
    assert rel(layer(x), rounded @ q.dequantize().T) < 1e-5


def test_llm_int8_restores_what_outliers_break() -> None:
    q = activated("w8a8", (64, 256))
    x = torch.randn(16, 256)
    x[:, 7] = 300.0
    wanted = x @ q.dequantize().T
    plain, split = QuantLinear(q)(x), QuantLinear(q, threshold=6.0)(x)
    error = lambda y: float((y - wanted).norm() / (wanted - x[:, 7:8] @ q.dequantize()[:, 7:8].T).norm())  # noqa: E731
    assert error(plain) > 0.3 and error(split) < 0.02
    for bad in (-1.0, float("nan")):
        with pytest.raises(InputError, match="FB-E0904"):
            QuantLinear(q, threshold=bad)
    with pytest.raises(InputError, match="FB-E0904"):
        QuantLinear(made("int8", (64, 256)), threshold=6.0)


def with_sides(word: str) -> QTensor:
    q = made(word, (48, 256))
    outliers = torch.zeros(48, 256)
    outliers[3, 5], outliers[40, 250] = 2.0, -3.0
    sides = {
        "permutation": torch.randperm(256),
        "column_scale": torch.rand(256) + 0.5,
        "outliers": outliers.to_sparse_coo(),
    }
    return QTensor(q.scheme, q.shape, q.codes, q.scale, q.code_shift, q.value_shift, sides)


@pytest.mark.parametrize("word", ("int4-g64-asym", "int8", "nf4-g64-dq"))
def test_sides_and_gradients(word: str) -> None:
    q = with_sides(word)
    layer = QuantLinear(q, torch.randn(48), dtype=torch.float32)
    x = torch.randn(2, 5, 256, requires_grad=True)
    y = layer(x)
    w = q.dequantize()
    assert rel(y, x @ w.T + layer.bias) < 4e-6
    seed = torch.randn_like(y)
    y.backward(seed)
    assert rel(x.grad, seed @ w) < 4e-6
    back = layer.qtensor()
    assert torch.equal(back.dequantize(), w)


@pytest.mark.parametrize("word", ("int4-g64-asym", "int8", "nf4-g64-dq", "q4_k", "fp8", "w8a8"))
def test_state_dict_round_trip_without_pickle(word: str) -> None:
    q = activated("w8a8", (48, 256)) if word == "w8a8" else made(word, (48, 256))
    threshold = 6.0 if word == "w8a8" else 0.0
    layer = QuantLinear(q, torch.randn(48), dtype=torch.float32, threshold=threshold)
    state = load_safetensors(save_safetensors({k: v.clone() for k, v in layer.state_dict().items()}))
    other = QuantLinear(made("int3-g32", (48, 256), 1), torch.zeros(48), dtype=torch.float32)
    other.load_state_dict(state)
    identical(other.qtensor(), q)
    x = torch.randn(3, 256)
    assert torch.equal(other(x), layer(x)) and other.threshold == threshold
    with pytest.raises(RuntimeError, match=r"weight.about"):
        other.load_state_dict({"bias": torch.zeros(48)})
    del state["weight.codes"]
    with pytest.raises(InputError, match="FB-E0902"):
        other.load_state_dict(state)


def test_casting_changes_what_is_computed_in_and_nothing_stored() -> None:
    q = made("nf4-g64-dq", (48, 256))
    for q in (made("nf4-g64-dq", (48, 256)), made("int4-g64-asym", (48, 256)), made("int8", (48, 256))):
        layer = QuantLinear(q, torch.randn(48), dtype=torch.float32)
        layer.to(torch.bfloat16)
        assert layer.bias.dtype == layer.dtype == torch.bfloat16
        identical(layer.qtensor(), q)
        layer.float()
        x = torch.randn(3, 256)
        assert rel(layer(x), x @ q.dequantize().T + layer.bias) < 4e-6


def test_memory_is_what_arithmetic_says() -> None:
    rows, cols = 512, 1024
    numel = rows * cols
    nf4 = QuantLinear(made("nf4-g64-dq", (rows, cols)))
    assert nf4.nbytes == numel // 2 + numel // 64 + 4 * numel // (64 * 256) + 4
    assert 8 * nf4.nbytes / numel == pytest.approx(4.127, abs=5e-4)
    int8 = QuantLinear(made("int8", (rows, cols)))
    assert int8.nbytes == numel + 2 * rows
    int4 = QuantLinear(
        made("int4-g128", (rows, cols))
    )  # 4 bits, f16 scale as stored, bf16 scale and zero for the kernel
    assert int4.nbytes == numel // 2 + (2 + 4) * numel // 128
    assert "nf4-g64-dq" in repr(nf4) and "kernel=direct" in repr(nf4)


@pytest.mark.parametrize("tokens", (1, 4, 9))
def test_int8_wherever_inputs_and_codes_lie(tokens: int) -> None:
    """torch's product ends in a segmentation fault for inputs that do not lie at 32 bytes, or codes at 16; a crash here is that."""
    q = quantize(parse_scheme("int8-channel"), torch.randn(24, 64))
    layer = QuantLinear(q, kernel="int8")
    wide = torch.randn(tokens * 64 + 1).bfloat16()
    x = wide[1:].view(tokens, 64)
    moved = torch.empty(24 * 64 + 1, dtype=torch.int8)[1:].view(24, 64).copy_(layer.codes)
    assert x.data_ptr() % 32 and moved.data_ptr() % 16
    wanted = layer(x.clone())
    layer.codes = moved
    assert torch.equal(layer(x), wanted)
