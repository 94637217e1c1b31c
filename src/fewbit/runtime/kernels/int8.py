"""Symmetric int8 weights with a scale per row: weight-only, and with activations quantised per token.

weight-only     y = s_w (q_w x)              torch._weight_int8pack_mm
W8A8            y = s_w s_x (q_w q_x)        torch._int_mm, sums in int32
LLM.int8()      input columns that reach `threshold` in floating point, the rest as W8A8 (arXiv 2208.07339)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fewbit.base.errors import InputError
from fewbit.num.blocks import CHANNEL, TENSOR
from fewbit.num.grid import IntGrid
from fewbit.num.scheme import Scheme
from fewbit.runtime.kernels import packed

ALIGNMENT = 64  # bytes; what torch's own allocations have
WIDTH = 32  # columns that torch's weight-only product takes at once
FEW = 64  # tokens from which decoding the weight once is no dearer than torch's weight-only product

Held = Mapping[str, torch.Tensor]

to_layout, from_layout = packed.to_layout, packed.from_layout


def _signed8(scheme: Scheme) -> bool:
    return isinstance(scheme.grid, IntGrid) and scheme.grid.bits == 8 and scheme.grid.signed


def _accepts_weight(scheme: Scheme, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"serves the CPU, got {device.type}"
    if not _signed8(scheme) or not scheme.symmetric or scheme.is_leaf:
        return f"needs symmetric int8 weights, got {scheme.weights_only}"
    if scheme.blocks not in (CHANNEL, TENSOR):
        return f"needs one scale per row or tensor, got {scheme.blocks.spelling}"
    return None


def accepts(scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> str | None:
    """Weight-only int8."""
    if scheme.activation is not None:
        return "computes with float activations"
    if shape[-1] % WIDTH:  # torch's product reads whole vectors, beyond the end of shorter rows
        return f"needs rows of a multiple of {WIDTH} columns, got {shape[-1]}"
    return _accepts_weight(scheme, device)


def accepts_dynamic(scheme: Scheme, shape: tuple[int, ...], device: torch.device) -> str | None:
    """int8 weights and int8 activations, a scale per token or for all."""
    inner = scheme.activation
    if inner is None:
        return "needs quantised activations"
    if not _signed8(inner) or not inner.symmetric or inner.blocks not in (CHANNEL, TENSOR):
        return f"needs symmetric int8 activations with a scale per token or tensor, got {inner}"
    return _accepts_weight(scheme, device)


def _row_scale(held: Held, scheme: Scheme, shape: tuple[int, ...]) -> torch.Tensor:
    """float32 [rows]."""
    return packed.block_arrays(scheme, shape, held)["scale"].reshape(-1).expand(shape[0])


def matmul(x: torch.Tensor, held: Held, scheme: Scheme, shape: tuple[int, ...]) -> torch.Tensor:
    """x [tokens, cols] @ w.T -> [tokens, rows] in x's dtype; torch's product is for 16-bit activations."""
    if x.dtype == torch.float32 or x.shape[0] > FEW:
        return packed.matmul(x, held, scheme, shape)
    scale = _row_scale(held, scheme, shape).to(x.dtype).contiguous()
    return torch._weight_int8pack_mm(_aligned(x.contiguous()), _aligned(held["codes"]), scale)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor at an address that torch's product can read: its AVX-512 code takes bfloat16 inputs (32 bytes) and, from four tokens, codes (16 bytes)
    for aligned and ends in a segmentation fault otherwise (torch 2.13). A row cut from a larger tensor, or a file mapped into memory, may lie anywhere."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def quantise_tokens(
    x: torch.Tensor, activation: Scheme, fixed: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes int8 [tokens, cols], scale float32 [tokens, 1]) of activations, nearest, ties to even.

    Args:
        x: [tokens, cols].
        activation: one scale per token, or for the tensor.
        fixed: a scale found by calibration, float32 [1].
    """
    x = x.float()
    if fixed is not None:
        scale = fixed.float().reshape(1, 1).expand(x.shape[0], 1)
    else:
        top = x.abs().amax(dim=-1, keepdim=True) if x.shape[-1] else x.new_zeros(x.shape[0], 1)
        if activation.blocks == TENSOR and top.numel():
            top = top.max().expand_as(top)
        scale = (top / activation.grid.high).clamp_min(torch.finfo(torch.float32).tiny)
    return (x / scale).round_().clamp_(activation.grid.low, activation.grid.high).to(torch.int8), scale


def matmul_dynamic(
    x: torch.Tensor, held: Held, scheme: Scheme, shape: tuple[int, ...], threshold: float = 0.0
) -> torch.Tensor:
    """x [tokens, cols] @ w.T -> [tokens, rows] in x's dtype, both sides in int8, sums in int32.

    Args:
        threshold: inputs of this size or above put their column in floating point; 0 for none.
    """
    if scheme.activation is None:
        raise InputError("FB-E0903", f"{scheme} says nothing of the inputs, this kernel multiplies int8 by int8")
    row_scale = _row_scale(held, scheme, shape)
    extra = None
    if threshold > 0:
        columns = (x.abs() >= threshold).any(dim=0).nonzero()[:, 0]
        if columns.numel():
            extra = x[:, columns].float() @ (held["codes"][:, columns].float() * row_scale[:, None]).T
            x = x.index_fill(1, columns, 0)
    codes, scale = quantise_tokens(x, scheme.activation, held.get("side_input_scale") if scheme.static else None)
    sums = torch._int_mm(codes, held["codes"].T)  # int32 [tokens, rows]
    out = sums.float().mul_(scale).mul_(row_scale)
    return (out if extra is None else out + extra).to(x.dtype)
