"""Fit and snap: known answers, a slow float64 oracle, degenerate blocks, nested scales, and the kernels against plain torch."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fewbit.base.errors import InputError
from fewbit.math import fast
from fewbit.math.metrics import weighted_error
from fewbit.math.scales import Params, Search, assemble, effective, fit, fit_plain, quantize, snap
from fewbit.num.grid import FloatGrid, IntGrid
from fewbit.num.qtensor import QTensor, decode_codes
from fewbit.num.scheme import parse_scheme

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "bitsandbytes.json").read_text())
EIGHT = torch.tensor([[0.32, -1.54, 0.87, -0.21, 1.23, -0.76, 0.05, -1.91]])
PLAIN = Search("absmax")


@pytest.mark.parametrize(
    "spelling, scale, zero, codes, worst, mean",
    [
        ("int8-channel-f32", [0.015039], None, [21, -102, 58, -14, 82, -51, 3, -127], 0.007008, 0.003514),
        ("int4-channel-f32-asym", [0.209333], [9], [11, 2, 13, 8, 15, 5, 9, 0], 0.098667, None),
        ("int4-g4-f32-asym", [0.160667, 0.209333], None, None, 0.0773, None),
    ],
)
def test_known_answers(spelling, scale, zero, codes, worst, mean) -> None:
    q = quantize(parse_scheme(spelling), EIGHT, search=PLAIN)
    miss = (q.dequantize() - EIGHT).abs()
    assert q.scale.flatten().tolist() == pytest.approx(scale, abs=1e-6)
    assert zero is None or q.code_shift.flatten().tolist() == zero
    assert codes is None or q.codes.flatten().tolist() == codes
    assert miss.max().item() == pytest.approx(worst, abs=5e-5)
    assert mean is None or miss.mean().item() == pytest.approx(mean, abs=1e-6)


def slow_plain(w: np.ndarray, size: int, bits: int, kind: str) -> np.ndarray:
    """Round to nearest in groups, the slow obvious way in float64, with f16 scales and shifts: the values that come back."""
    out = np.empty_like(w)
    for r in range(w.shape[0]):
        for c in range(0, w.shape[1], size):
            block = w[r, c : c + size]
            low, high = block.min(), block.max()
            zero = shift = 0.0
            first, last = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if kind == "sym" else (0, 2**bits - 1)
            if kind == "sym":
                scale = float(np.float16(max(abs(low), abs(high)) / last))
            elif kind == "asym":
                low, high = min(low, 0.0), max(high, 0.0)
                scale = float(np.float16((high - low) / last))
                zero = float(np.clip(np.rint(-low / scale), 0, last))
            else:
                scale, shift = float(np.float16((high - low) / last)), float(np.float16(low))
            codes = np.clip(np.rint((block - shift) / scale + zero), first, last)
            out[r, c : c + size] = (codes - zero) * scale + shift
    return out


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(
    "kind, spelling", [("sym", "int{}-g48"), ("asym", "int{}-g48-asym"), ("min", "uint{}-g48-min")]
)
@pytest.mark.parametrize("rows", [3, 400])  # plain torch, and the kernels
def test_plain_range_against_a_float64_oracle(bits: int, kind: str, spelling: str, rows: int) -> None:
    w = torch.randn(rows, 100, generator=torch.Generator().manual_seed(bits))
    q = quantize(parse_scheme(spelling.format(bits)), w, search=PLAIN)
    q.check()
    want = slow_plain(w.double().numpy(), 48, bits, kind)
    step = q.scale.float().repeat_interleave(48, 1)[:, :100].numpy()
    difference = np.abs(q.dequantize().numpy() - want)
    assert (difference <= 1.01 * step).all()  # a tie may fall to the other side in float32 …
    assert (difference > 1e-5 * step).mean() < 2e-3  # … but hardly ever does


ALL = [
    "int1-g16", "int2-g16", "int3-g33", "int4-g48", "int8-channel", "int4-tensor", "int4-column", "int2-g48-asym",
    "int8-channel-asym", "int4-block10x48-asym", "uint4-g48-min", "uint4-g48-min{bf16}", "uint4-g48-asym{f16}", "fp8",
    "fp8-e5m2-g48", "fp8-e4m3-block16x48", "mxfp4", "mxfp6-e3m2", "mxfp6-e2m3", "mxfp8", "nvfp4", "nf4-g48-bf16",
    "nf4-flat64-dq", "bnbfp4-flat64", "iq4-g48", "ternary-g48", "int6-g48-{int8-g11-f16}",
    "uint4-g24-{uint6-g11-f16}-min{uint6-g11-f16}", "int4-g48-e8m0", "int4-g48-e4m3",
]  # fmt: skip


@pytest.mark.parametrize("spelling", ALL)
@pytest.mark.parametrize("method", ["absmax", "percentile", "mse", "lsq"])
def test_degenerate_blocks_stay_finite_and_exact(spelling: str, method: str) -> None:
    scheme = parse_scheme(spelling)
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(20, 528, generator=generator)
    w[3] = 0.0
    w[5] = 2.5
    w[6, :] = -0.0
    w[7, 100] = 3e4
    w[8] *= 1e-30
    w[9] *= 1e-42  # subnormal
    q = quantize(scheme, w, search=Search(method, steps=6))
    q.check()
    back = q.dequantize()
    assert torch.isfinite(back).all()
    own_rows = scheme.blocks.rows == 1 or scheme.blocks.flat
    assert not own_rows or (back[[3, 6]] == 0).all()
    zero = quantize(scheme, torch.zeros(4, 528), search=Search(method, steps=6))
    zero.check()
    assert (zero.dequantize() == 0).all()


@pytest.mark.parametrize(
    "spelling",
    ["int4-g16", "int8-channel", "int4-g16-asym", "uint4-g16-min", "uint4-g16-asym{f16}", "fp8", "nf4-g16", "int2-g16"],
)
@pytest.mark.parametrize("value", [2.5, -2.5, 1e-3, -7e4, 5e-6])
@pytest.mark.parametrize("method", ["absmax", "lsq"])
def test_constant_blocks_come_back_within_one_step_of_the_scale(spelling: str, value: float, method: str) -> None:
    scheme = parse_scheme(spelling)
    back = quantize(scheme, torch.full((2, 32), value), search=Search(method)).dequantize()
    grid = scheme.value_shift.grid if scheme.value_shift is not None else scheme.scale.grid
    step = max(
        abs(value) * grid.epsilon, 16 * 8 * grid.smallest
    )  # one unit in the last place of the scale, times a level
    if abs(value) > 65504 and spelling in ("uint4-g16-min", "int2-g16"):  # beyond what one f16 can say
        step = abs(value) - 65504 + 32
    assert (back - value).abs().max() <= step


def test_scales_beyond_f16_are_clamped_not_infinite() -> None:
    q = quantize(parse_scheme("int4-g16"), torch.full((1, 16), 1e7), search=PLAIN)
    assert q.scale.item() == 65504.0
    tiny = quantize(parse_scheme("int4-g16"), torch.full((1, 16), 1e-9), search=PLAIN)
    assert 0 < tiny.scale.item() <= 6.0e-8
    assert quantize(parse_scheme("int4-g16-f32"), torch.full((1, 16), 3e38), search=PLAIN).dequantize().isfinite().all()
    wide = torch.tensor([[3e38, -3e38] * 8])
    assert quantize(parse_scheme("int4-g16-f32-asym"), wide, search=PLAIN).dequantize().isfinite().all()


@pytest.mark.parametrize("shape, where", [((4, 32), (2, 5)), ((300, 128), (299, 127)), ((2, 40, 256), (1, 3, 0))])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_non_finite_weights_are_named(shape, where, bad: float, dtype: torch.dtype) -> None:
    w = torch.randn(shape).to(dtype)
    w[where] = bad
    w.view(-1)[-1] = bad
    many = int((~torch.isfinite(w)).sum())
    for spelling in ("int4-g32", "fp8-e4m3-block16", "nf4-flat64-dq", "nvfp4", "int4-tensor"):
        with pytest.raises(InputError) as caught:
            fit(parse_scheme(spelling), w, search=PLAIN)
        assert caught.value.code == "FB-E0702"
        assert f"{many} of {w.numel()}" in str(caught.value) and str(where) in str(caught.value)


@pytest.mark.parametrize(
    "importance", [torch.ones(5), torch.tensor([1.0] * 31 + [-1.0]), torch.full((32,), float("nan"))]
)
def test_unsuitable_importance_is_refused(importance: torch.Tensor) -> None:
    with pytest.raises(InputError) as caught:
        fit(parse_scheme("int4-g16"), torch.randn(4, 32), importance)
    assert caught.value.code == "FB-E0701"


@pytest.mark.parametrize(
    "spelling", [s for s in ALL if s not in ("int4-tensor", "int4-column", "int4-block10x48-asym")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_equal_plain_torch(spelling: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = parse_scheme(spelling)
    generator = torch.Generator().manual_seed(1)
    w = (torch.randn(40, 528, generator=generator) * torch.rand(40, 1, generator=generator)).to(dtype)
    w[3], w[5], w[7, 5] = 0.0, 2.5, 60.0
    h = torch.rand(528, generator=generator) if dtype == torch.float32 else None
    found = {}
    for method in ("absmax", "lsq"):
        search = Search(method, steps=8)
        params = fit_plain(scheme, w, h, search)
        codes = snap(scheme, w, params)
        with monkeypatch.context() as patch:
            patch.setattr(fast, "MIN_BLOCK", 1 << 60)
            slow = fit_plain(scheme, w, h, search)
            assert torch.equal(codes.view(torch.uint8), snap(scheme, w, params).view(torch.uint8))
            q, slow_q = (assemble(scheme, tuple(w.shape), snap(scheme, w, p), p) for p in (params, slow))
        if method == "absmax":
            for name, part in q.named_parts().items():
                assert torch.equal(part.float(), slow_q.named_parts()[name].float()), name
        found[method], slow_error = weighted_error(w, q.dequantize(), h), weighted_error(w, slow_q.dequantize(), h)
        assert found[method] <= 1.02 * slow_error
    assert found["lsq"] <= found["absmax"]


def test_result_does_not_depend_on_threads_or_on_how_rows_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(257, 512, generator=torch.Generator().manual_seed(2))
    for spelling in ("int4-g64", "int3-g64-asym", "nf4-g64", "nvfp4"):
        scheme = parse_scheme(spelling)
        whole = quantize(scheme, w).named_parts()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        alone = quantize(scheme, w).named_parts()
        torch.set_num_threads(threads)
        assert all(torch.equal(whole[name].view(torch.uint8), alone[name].view(torch.uint8)) for name in whole)
        monkeypatch.setattr("fewbit.math.tiles.CHUNK", 40000)
        pieces = quantize(scheme, w).named_parts()
        monkeypatch.undo()
        assert all(torch.equal(whole[name].view(torch.uint8), pieces[name].view(torch.uint8)) for name in whole)


@pytest.mark.parametrize(
    "spelling", ["int4-g16-asym", "fp8-e4m3-block16", "nvfp4", "nf4-g16", "int8-channel", "int4-tensor"]
)
def test_stacked_experts_are_separate(spelling: str) -> None:
    w = (
        torch.randn(3, 20, 48, generator=torch.Generator().manual_seed(3))
        * torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    )
    scheme = parse_scheme(spelling)
    whole = quantize(scheme, w, torch.rand(48, generator=torch.Generator().manual_seed(4)))
    whole.check()
    for i in range(3):
        alone = quantize(scheme, w[i], torch.rand(48, generator=torch.Generator().manual_seed(4)))
        assert torch.equal(whole.dequantize()[i], alone.dequantize())


@pytest.mark.parametrize("shape", [(1, 1), (7, 130), (130, 7), (1, 300), (300, 1), (129, 257)])
def test_ragged_tiles_equal_the_blocks_done_one_by_one(shape: tuple[int, int]) -> None:
    w = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    scheme, whole = parse_scheme("fp8-e4m3-block128"), parse_scheme("fp8-e4m3-tensor")
    back = quantize(scheme, w, search=PLAIN).dequantize()
    for r in range(0, shape[0], 128):
        for c in range(0, shape[1], 128):
            block = w[r : r + 128, c : c + 128].contiguous()
            assert torch.equal(back[r : r + 128, c : c + 128], quantize(whole, block, search=PLAIN).dequantize())


def test_effective_reproduces_dequantize() -> None:
    w = torch.randn(2, 10, 96, generator=torch.Generator().manual_seed(6))
    for spelling in (
        "int4-g32-asym",
        "uint4-g32-{uint6-g3-f16}-min{uint6-g3-f16}",
        "nvfp4",
        "nf4-flat32-dq",
        "fp8-e4m3-block7x50",
    ):
        scheme = parse_scheme(spelling)
        q = quantize(scheme, w)
        scale, zero, shift = effective(scheme, Params(q.scale, q.code_shift, q.value_shift), (2, 10, 96))
        levels = decode_codes(scheme.grid, q.codes).reshape(w.shape)
        values = (levels - (0 if zero is None else zero)) * scale + (0 if shift is None else shift)
        assert torch.allclose(values, q.dequantize(), rtol=1e-6, atol=1e-7)


def test_nvfp4_scales_fill_e4m3_to_its_end() -> None:
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(7))
    q = quantize(parse_scheme("nvfp4"), w, search=PLAIN)
    assert isinstance(q.scale, QTensor)
    assert q.scale.scale.item() == pytest.approx(w.abs().max().item() / 6 / 448, rel=1e-6)
    assert decode_codes(q.scale.scheme.grid, q.scale.codes).max() == 448.0


def test_double_quantisation_is_that_of_bitsandbytes() -> None:
    golden = GOLDEN["double"]
    q = quantize(parse_scheme("nf4-flat64-dq").scale, torch.tensor(golden["absmax"])[None], search=PLAIN)
    assert q.codes.flatten().tolist() == golden["codes"]
    assert q.value_shift.item() == golden["offset"]
    assert q.scale.flatten().tolist() == golden["nested_absmax"]


@pytest.mark.parametrize("name, spelling", [("nf4", "nf4-flat64"), ("fp4", "bnbfp4-flat64")])
def test_blocks_are_those_of_bitsandbytes(name: str, spelling: str) -> None:
    golden, w = GOLDEN[f"{name}_blocks"], torch.tensor(GOLDEN["weights"]).view(8, 64)
    q = quantize(parse_scheme(spelling), w, search=PLAIN)
    packed = torch.tensor(golden["packed"])
    assert torch.equal(q.codes.flatten().long(), torch.stack([packed >> 4, packed & 15], -1).flatten())
    assert q.scale.flatten().tolist() == golden["absmax"]
    assert q.dequantize().flatten().tolist() == golden["dequantized"]


@pytest.mark.parametrize("name, spelling", [("nf4", "nf4-flat64-dq"), ("fp4", "bnbfp4-flat64-dq")])
def test_nested_blocks_of_bitsandbytes_decode_alike_and_ours_are_nearer(name: str, spelling: str) -> None:
    golden, w = GOLDEN[f"{name}_nested_blocks"], torch.tensor(GOLDEN["weights"]).view(8, 64)
    scheme = parse_scheme(spelling)
    q = quantize(scheme, w, search=PLAIN)
    assert q.scale.codes.flatten().tolist() == golden["absmax_codes"]
    assert q.scale.value_shift.item() == golden["offset"]
    packed = torch.tensor(golden["packed"])
    codes = torch.stack([packed >> 4, packed & 15], -1).to(torch.uint8).view(8, 64)
    theirs = assemble(scheme, (8, 64), codes, Params(q.scale)).dequantize()
    assert torch.allclose(theirs.flatten(), torch.tensor(golden["dequantized"]), rtol=1e-6, atol=1e-9)
    # bitsandbytes rounds against the scale before it was itself quantised; we round against the stored one
    assert weighted_error(w, q.dequantize()) < weighted_error(w, theirs)


def test_importance_moves_the_scale_towards_what_matters() -> None:
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(8))
    h = torch.where(torch.arange(64) < 8, 100.0, 0.01)
    for spelling in ("int3-g64", "int3-g64-asym", "uint3-g64-min", "fp4-g64-f16"):
        scheme = parse_scheme(spelling)
        plain, weighted = quantize(scheme, w), quantize(scheme, w, h)
        assert weighted_error(w, weighted.dequantize(), h) < 0.8 * weighted_error(w, plain.dequantize(), h)


def test_lopsided_grids_use_their_longer_side() -> None:
    w = torch.tensor([[8.0, 7.0, -6.0, 1.0] * 4])
    q = quantize(parse_scheme("int4-g16"), w)
    assert q.scale.item() == -1.0 and torch.equal(q.dequantize(), w)
    assert isinstance(q.scheme.grid, IntGrid) and isinstance(q.scheme.scale.grid, FloatGrid)


def test_leaves_store_levels_directly() -> None:
    w = torch.randn(5, 7, generator=torch.Generator().manual_seed(9))
    for name, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        assert torch.equal(quantize(parse_scheme(name), w).dequantize(), w.to(dtype).float())
