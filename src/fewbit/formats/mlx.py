"""MLX: Apple's layout, `mlx_lm.convert -q`.

    x.weight   uint32 [out, in * bits / 32]    codes packed along the row, lowest bits first, densely
    x.scales   float [out, in / g] (affine); uint8 [out, in / g] bit patterns of E8M0 (mxfp4, mxfp8) or E4M3 (nvfp4)
    x.biases   float [out, in / g] (affine): w = code * scale + bias

Every weight may be quantised, embeddings and stacked experts too. The config lists weights that differ from the rest under their paths, and
stands twice, as `quantization` and as `quantization_config`.

Source: facts.md B1; mlx-lm 0.32.2 `utils.quantize_model`; mlx 0.32.4.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fewbit.base.errors import InputError
from fewbit.base.manifest import Manifest
from fewbit.base.names import stem
from fewbit.formats.kinds import LEAF_GRID, STORED_DTYPE, Affine, affine_of, misfit, mx_element, sibling
from fewbit.formats.table import Assignment, Format, Parts, Stored
from fewbit.num.blocks import Blocks
from fewbit.num.grid import E2M1, E4M3, E8M0, F16
from fewbit.num.scheme import Scheme, leaf

if TYPE_CHECKING:
    import torch

    from fewbit.num.qtensor import QTensor

BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
MODES: dict[str, Scheme] = {
    "mxfp4": Scheme(E2M1, Blocks(1, 32), leaf(E8M0)),
    "mxfp8": Scheme(E4M3, Blocks(1, 32), leaf(E8M0)),
    "nvfp4": Scheme(E2M1, Blocks(1, 16), leaf(E4M3)),
}


def accepts(scheme: Scheme, shape: tuple[int, ...]) -> str | None:
    """None, or why MLX cannot store this scheme for a weight of this shape."""
    if scheme.activation is not None:
        return f"MLX quantises weights only, got {scheme}"
    affine = affine_of(scheme)
    if affine is not None and affine.zero == "value":
        if (
            affine.bits not in BITS
            or affine.blocks.rows != 1
            or affine.blocks.cols not in GROUPS
            or affine.shift != affine.scale
        ):
            return (
                f"MLX has 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128, scale and bias of one dtype, got {scheme}"
            )
    elif scheme not in MODES.values():
        return f"MLX stores uint4-g64-min and its like, mxfp4, mxfp8 and fp4-g16-fp8-e4m3 (nvfp4 without a global scale), got {scheme}"
    return misfit(shape, columns=scheme.blocks.cols)


def conform(scheme: Scheme, dtype: str) -> Scheme:
    """Integer zero points become biases; scales take the dtype of the model; NVFP4 loses its global scale, for MLX has none."""
    if scheme.grid == E2M1 and scheme.blocks == Blocks(1, 16) and mx_element(scheme) is None:
        return MODES["nvfp4"]
    affine = affine_of(scheme)
    if affine is None or affine.zero not in ("code", "value"):
        return scheme
    grid = LEAF_GRID.get(dtype, F16)
    return Affine(affine.bits, affine.blocks, "value", grid, grid).scheme


def parts(name: str, scheme: Scheme, shape: tuple[int, ...]) -> Parts:
    """Stored tensors of one weight, from its shape alone."""
    counts, bits = scheme.block_counts(shape), int(scheme.grid.bits)
    found: Parts = {name: ("U32", (*shape[:-1], shape[-1] * bits // 32))}
    affine = affine_of(scheme)
    dtype = STORED_DTYPE[affine.scale.name] if affine is not None else "U8"
    found[sibling(name, "scales")] = (dtype, counts)
    return found | ({sibling(name, "biases"): (dtype, counts)} if affine is not None else {})


def encode(name: str, q: QTensor) -> dict[str, torch.Tensor]:
    """The stored tensors of a quantised weight.

    Raises:
        InputError: FB-E0620 for sides: MLX has no place for any.
    """
    import torch

    from fewbit.formats.words import refuse_sides
    from fewbit.math.bits import pack

    refuse_sides(name, q, "MLX")
    counts = q.scheme.block_counts(q.shape)
    words = pack(q.codes.reshape(q.shape), int(q.scheme.grid.bits), word=torch.int32).view(torch.uint32)
    scale = q.leaf("scale").reshape(counts)
    if q.value_shift is None:
        return {name: words, sibling(name, "scales"): scale.view(torch.uint8)}
    return {name: words, sibling(name, "scales"): scale, sibling(name, "biases"): q.leaf("value_shift").reshape(counts)}


def decode(name: str, read: Callable[[str], torch.Tensor], stored: Stored) -> QTensor:
    """The quantised weight, code for code."""
    import torch

    from fewbit.math.bits import unpack
    from fewbit.num.qtensor import QTensor, native_dtype

    scheme, shape = stored.scheme, stored.shape
    codes = unpack(read(name).view(torch.int32), int(scheme.grid.bits), shape[-1])
    scale = read(sibling(name, "scales"))
    if scheme.value_shift is not None:
        return QTensor(scheme, shape, codes, scale, None, read(sibling(name, "biases")))
    native = native_dtype(scheme.part("scale").grid)
    return QTensor(scheme, shape, codes, scale if native is None else scale.view(native))


def _words(scheme: Scheme) -> dict[str, Any]:
    mode = next((mode for mode, known in MODES.items() if known == scheme), "affine")
    return {"group_size": scheme.blocks.cols, "bits": int(scheme.grid.bits), "mode": mode}


def config(source: dict[str, Any], assignment: Assignment) -> tuple[dict[str, Any], dict[str, Any]]:
    """The new config.json: the commonest scheme, then the paths that differ from it."""
    common = Counter(assignment.schemes.values()).most_common(1)[0][0]
    words: dict[str, Any] = _words(common)
    words |= {
        stem(name): _words(scheme) for name, scheme in assignment.schemes.items() if _words(scheme) != _words(common)
    }
    words |= {stem(name): False for name in assignment.kept}
    return {**source, "quantization": words, "quantization_config": words}, {}


def detect(config: dict[str, Any], manifest: Manifest) -> dict[str, Stored] | None:
    """The quantised weights of an MLX checkpoint, or None when the config names another format.

    Raises:
        InputError: FB-E0621 for missing or misshapen parts; FB-E0620 for modes that are not known.
    """
    given = config.get("quantization")
    if not isinstance(given, dict) or "group_size" not in given:
        return None
    found: dict[str, Stored] = {}
    for name, info in manifest.items():
        if info.dtype != "U32":
            continue
        own = given.get(stem(name))
        found[name] = _stored(name, own if isinstance(own, dict) else given, manifest)
    named = [
        name
        for name in manifest
        if name.endswith((".scales", ".biases")) and f"{name.rpartition('.')[0]}.weight" not in found
    ]
    if named:
        raise InputError("FB-E0621", "scales or biases without their weight", tensor=named[0])
    return found


def _stored(name: str, words: dict[str, Any], manifest: Manifest) -> Stored:
    bits, group, mode = int(words.get("bits", 4)), int(words.get("group_size", 64)), words.get("mode", "affine")
    scales = manifest.get(sibling(name, "scales"))
    if scales is None:
        raise InputError("FB-E0621", "a quantised weight without its scales", tensor=sibling(name, "scales"))
    needed = [name, scales.name]
    if mode == "affine":
        biases, grid = manifest.get(sibling(name, "biases")), LEAF_GRID.get(scales.dtype)
        if biases is None or biases.dtype != scales.dtype or grid is None:
            raise InputError(
                "FB-E0621", "an affine weight needs biases of its scales' dtype", tensor=sibling(name, "biases")
            )
        scheme = Affine(bits, Blocks(1, group), "value", grid, grid).scheme
        needed.append(biases.name)
    elif mode in MODES and not words.get("global_scale"):
        scheme = MODES[mode]
    else:
        raise InputError(
            "FB-E0620",
            f"MLX mode {mode!r}{' with a global scale' if words.get('global_scale') else ''} is not known",
            tensor=name,
        )
    words_a_row = manifest[name].shape[-1]
    shape = (*manifest[name].shape[:-1], words_a_row * 32 // bits)
    if scales.shape != scheme.block_counts(shape) or shape[-1] % group:
        shapes = f"weight {list(manifest[name].shape)} and scales {list(scales.shape)}"
        raise InputError("FB-E0621", f"{shapes} are not {bits} bits in groups of {group}: the config lies", tensor=name)
    return Stored(scheme, shape, tuple(needed))


FORMAT = Format(
    name="mlx",
    summary="Apple MLX: affine integers of 2 to 8 bits, mxfp4, mxfp8, nvfp4",
    container="safetensors",
    default_scheme="uint4-g64-min",
    engines=("mlx",),
    accepts=accepts,
    parts=parts,
    encode=encode,
    decode=decode,
    config=config,
    detect=detect,
    conform=conform,
)
