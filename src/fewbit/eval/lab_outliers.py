"""The number lab: one 127.4 among 0.1s, and what LLM.int8(), SmoothQuant and AWQ do about it, in numbers.

A layer computes y = X W. X has a few tokens and eight channels, one of which carries a value a thousand times larger than the rest, as
real transformers do. Everything here is small enough to check by hand.

Sources: LLM.int8(), arXiv 2208.07339; SmoothQuant, arXiv 2211.10438; AWQ, arXiv 2306.00978.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewbit.math.scales import Search, quantize
from fewbit.num.grid import F32
from fewbit.num.scheme import Scheme, parse_scheme

OUTLIER, CHANNEL, THRESHOLD = 127.4, 5, 6.0


@dataclass(frozen=True)
class Remedy:
    """One way to compute the product.

    Attributes:
        name, idea: what it is, in a sentence.
        scale: quantisation step of the first token's activations (or of the weights' group).
        survivors: ordinary activations (or salient weights) that are not rounded to zero, of how many.
        relative_error: ||y' - y|| / ||y|| over the outputs, and the same with the outlier channel's part taken out of both.
        detail: numbers worth seeing.
    """

    name: str
    idea: str
    scale: float
    survivors: tuple[int, int]
    relative_error: float
    ordinary_error: float
    detail: tuple[str, ...]


@dataclass(frozen=True)
class OutlierDemo:
    """Activations, weights, and the remedies in two families: activations in 8 bits, weights in 4."""

    activations: tuple[tuple[float, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    act_remedies: tuple[Remedy, ...]
    weight_remedies: tuple[Remedy, ...]


def example() -> tuple[torch.Tensor, torch.Tensor]:
    """X float32 [4, 8] (about 0.1, channel 5 about 127.4) and W float32 [6, 8] = [out, in] (about 0.3)."""
    token, channel = torch.meshgrid(torch.arange(4), torch.arange(8), indexing="ij")
    x = 0.1 * torch.where((token + channel) % 2 == 0, 1.0, -1.0) * (1 + 0.1 * ((3 * token + 5 * channel) % 7 - 3) / 3)
    x[:, CHANNEL] = OUTLIER * torch.tensor([1.0, 0.93, 1.0, 0.88])
    out, channel = torch.meshgrid(torch.arange(6), torch.arange(8), indexing="ij")
    w = 0.3 * torch.cos(1.7 * out + 2.3 * channel + 0.4 * out * channel)
    return x.float(), w.float()


def outlier_demo() -> OutlierDemo:
    """All remedies on the example."""
    x, w = example()
    return OutlierDemo(
        tuple(map(tuple, x.tolist())), tuple(map(tuple, w.tolist())),
        (_per_tensor(x, w), _per_token(x, w), _llm_int8(x, w), _smoothquant(x, w)),
        (_rtn(x, w), _awq(x, w)),
    )  # fmt: skip


def _quantized(x: torch.Tensor, spelling: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(what comes back, scales) of absmax quantisation with float32 scales."""
    scheme: Scheme = parse_scheme(spelling).with_scale_leaf(F32)
    q = quantize(scheme, x, None, Search(method="absmax"))
    return q.dequantize(), q.leaf("scale").float()


def _errors(x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, outlier_part: torch.Tensor) -> tuple[float, float]:
    """(over the whole output, over what the ordinary channels contribute)."""
    exact = x @ w.T
    ordinary = exact - x[:, [CHANNEL]] @ w[:, [CHANNEL]].T
    whole = float((y - exact).norm() / exact.norm())
    return whole, float(((y - outlier_part) - ordinary).norm() / ordinary.norm())


def _ordinary(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[:, :CHANNEL], x[:, CHANNEL + 1 :]], dim=1)


def _survivors(back: torch.Tensor) -> tuple[int, int]:
    part = _ordinary(back)
    return int((part != 0).sum()), part.numel()


def _product(name: str, idea: str, x: torch.Tensor, w: torch.Tensor, spelling: str) -> Remedy:
    x_hat, scale = _quantized(x, spelling)
    w_hat, _ = _quantized(w, "int8-channel")
    whole, ordinary = _errors(x, w, x_hat @ w_hat.T, x_hat[:, [CHANNEL]] @ w_hat[:, [CHANNEL]].T)
    step = float(scale.flatten()[0])
    detail = (
        f"step = {OUTLIER:g} / 127 = {step:.4f}",
        f"0.1 / {step:.4f} = {0.1 / step:.3f}, which rounds to {round(0.1 / step)}",
    )
    return Remedy(name, idea, step, _survivors(x_hat), whole, ordinary, detail)


def _per_tensor(x: torch.Tensor, w: torch.Tensor) -> Remedy:
    return _product("INT8, one scale", "the largest value sets the step for all of them", x, w, "int8-tensor")


def _per_token(x: torch.Tensor, w: torch.Tensor) -> Remedy:
    return _product("INT8, a scale a token", "no help: every token has the outlier channel", x, w, "int8-channel")


def _llm_int8(x: torch.Tensor, w: torch.Tensor) -> Remedy:
    """Channels with a value beyond the threshold are multiplied in 16 bits, the rest in 8."""
    large = x.abs().amax(0) >= THRESHOLD
    rest, scale = _quantized(x[:, ~large], "int8-channel")
    w_hat, _ = _quantized(w[:, ~large], "int8-channel")
    half = x[:, large].half().float() @ w[:, large].half().float().T
    whole, ordinary = _errors(x, w, rest @ w_hat.T + half, half)
    step = float(scale.flatten()[0])
    kept = int(large.sum())
    return Remedy(
        "LLM.int8()", f"channels with a value of {THRESHOLD:g} or more are multiplied in 16 bits, the rest in 8", step, (int((rest != 0).sum()), rest.numel()),
        whole, ordinary, (f"{kept} of {x.shape[1]} channels in FP16", f"step of the rest = {step:.6f}: 0.1 becomes {round(0.1 / step)} steps"),
    )  # fmt: skip


def _smoothquant(x: torch.Tensor, w: torch.Tensor, alpha: float = 0.5) -> Remedy:
    """Divide each channel of X, multiply that of W: the product is the same, the range is shared out."""
    factor = x.abs().amax(0) ** alpha / w.abs().amax(0) ** (1 - alpha)
    smooth, wide = x / factor, w * factor
    x_hat, scale = _quantized(smooth, "int8-channel")
    w_hat, _ = _quantized(wide, "int8-channel")
    whole, ordinary = _errors(x, w, x_hat @ w_hat.T, x_hat[:, [CHANNEL]] @ w_hat[:, [CHANNEL]].T)
    step = float(scale.flatten()[0])
    detail = (
        f"s = max|X|^{alpha:g} / max|W|^{1 - alpha:g}: {float(factor[CHANNEL]):.2f} for the outlier channel, {float(_ordinary(factor[None]).mean()):.2f} elsewhere",
        f"largest activation {float(x.abs().max()):.1f} -> {float(smooth.abs().max()):.2f}, largest weight {float(w.abs().max()):.2f} -> {float(wide.abs().max()):.2f}",
    )
    return Remedy(
        "SmoothQuant",
        "divide each channel of X by s and multiply that of W: Y = (X / s)(s W)",
        step,
        _survivors(x_hat),
        whole,
        ordinary,
        detail,
    )


def _weight_error(x: torch.Tensor, w: torch.Tensor, w_hat: torch.Tensor) -> tuple[float, float]:
    return _errors(x, w, x @ w_hat.T, x[:, [CHANNEL]] @ w_hat[:, [CHANNEL]].T)


def _rtn(x: torch.Tensor, w: torch.Tensor) -> Remedy:
    w_hat, scale = _quantized(w, "int4-channel")
    whole, ordinary = _weight_error(x, w, w_hat)
    salient = w[:, CHANNEL]
    error = float((w_hat[:, CHANNEL] - salient).abs().max())
    return Remedy(
        "INT4 weights, rounded to nearest", "all weights count alike, although one channel's inputs are a thousand times larger", float(scale.flatten()[0]),
        (int((w_hat[:, CHANNEL] != 0).sum()), len(salient)), whole, ordinary, (f"largest error of a weight that meets the outlier: {error:.2g}",),
    )  # fmt: skip


def _awq(x: torch.Tensor, w: torch.Tensor) -> Remedy:
    """Scale salient input channels of W up before rounding and undo it afterwards; the exponent is searched on the output error."""
    size = x.abs().mean(0)
    exact = x @ w.T
    found: list[tuple[float, float, torch.Tensor, torch.Tensor, float]] = []
    for step in range(20):
        alpha = step / 20
        factor = (size / size.log().mean().exp()) ** alpha
        factor = factor / (factor.max() * factor.min()).sqrt()
        wide, scale = _quantized(w * factor, "int4-channel")
        w_hat = wide / factor
        loss = float((x @ w_hat.T - exact).square().mean())
        found.append((loss, alpha, w_hat, factor, float(scale.flatten()[0])))
    _, alpha, w_hat, factor, step_size = min(found, key=lambda tried: tried[0])
    whole, ordinary = _weight_error(x, w, w_hat)
    error = float((w_hat[:, CHANNEL] - w[:, CHANNEL]).abs().max())
    detail = (
        f"s = mean|X|^{alpha:g}, searched over 20 exponents: {float(factor[CHANNEL]):.2f} for the outlier channel, {float(_ordinary(factor[None]).mean()):.2f} elsewhere",
        f"largest error of a weight that meets the outlier: {error:.2g}",
    )
    return Remedy(
        "AWQ", "weights that meet large inputs are scaled up before rounding, so that they are rounded more finely", step_size,
        (int((w_hat[:, CHANNEL] != 0).sum()), w.shape[0]), whole, ordinary, detail,
    )  # fmt: skip
