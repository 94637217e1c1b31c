"""HQQ: the tensors of `HQQLinear.state_dict`, as transformers saves HQQ models.

Groups of g weights are the *rows* of a matrix [out * in / g, g]; codes of `per` such rows, a whole step apart, share a word, the first in the highest bits:

    x.W_q      uint8 [groups / per, g] (1, 2, 4, 8 bits); 3 bits: int32 [ceil(groups / 10), g], ten to a word
    x.scale, x.zero    float [groups, 1]      w = (code - zero) * scale, the zero a float
    x.nbits, group_size, axis, shape, packing, compute_dtype, …    the layer's settings as small tensors, strings by character

Source: hqq 0.2.8.post1 `core/quantize.py`, `core/bitpack.py`, `core/utils.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

from fewbit.base.errors import InputError
from fewbit.base.manifest import Manifest
from fewbit.base.names import stem
from fewbit.formats.kinds import LEAF_GRID, STORED_DTYPE, Affine, affine_of, as_affine, misfit, sibling, single_scheme
from fewbit.formats.table import Assignment, Format, Parts, Stored
from fewbit.num.blocks import Blocks
from fewbit.num.grid import BF16, F16
from fewbit.num.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from fewbit.num.qtensor import QTensor

PACKING = {1: "1bit_u8", 2: "2bit_u8", 3: "3bit_32", 4: "4bit_u8", 8: "8bit_u8"}
_PER = {1: 8, 2: 4, 3: 10, 4: 2, 8: 1}
_COMPUTE = {"F16": "torch.float16", "BF16": "torch.bfloat16"}


def accepts(scheme: Scheme, shape: tuple[int, ...]) -> str | None:
    """None, or why HQQ cannot store this scheme for a weight of this shape."""
    affine = affine_of(scheme)
    if (
        affine is None
        or affine.zero != "float"
        or affine.bits not in PACKING
        or affine.scale not in (F16, BF16)
        or affine.shift != affine.scale
    ):
        return f"HQQ stores 1, 2, 3, 4 or 8 bits with a float zero point (int4-g64-asym{{f16}}), got {scheme}"
    if affine.blocks.rows != 1 or affine.blocks.cols < 2 or scheme.activation is not None:
        return f"HQQ has groups of columns and quantises weights only, got {scheme}"
    if len(shape) != 2:
        return f"HQQ has no stacked weights, got shape {list(shape)}"
    groups = prod(shape) // affine.blocks.cols
    if affine.bits != 3 and groups % _PER[affine.bits]:
        return f"HQQ packs {_PER[affine.bits]} groups together, got {groups} groups"
    return misfit(shape, columns=affine.blocks.cols)


def conform(scheme: Scheme, dtype: str) -> Scheme:
    """Integer zero points become floats; scales and zeros take the dtype of the model, F16 when that is F32."""
    affine = affine_of(scheme)
    if affine is None or affine.zero not in ("code", "float"):
        return scheme
    grid = BF16 if dtype == "BF16" else F16
    return Affine(affine.bits, affine.blocks, "float", grid, grid).scheme


def _settings(scheme: Scheme, shape: tuple[int, ...]) -> dict[str, Any]:
    """The layer's settings, in the types that HQQ gives them."""
    affine = as_affine(scheme)
    word = PACKING[affine.bits]
    return {
        "nbits": affine.bits,
        "group_size": affine.blocks.cols,
        "shape": shape,
        "axis": 1,
        "packing": word,
        "unpack_view_dtype": "torch.int32" if word == "3bit_32" else "torch.uint8",
        "view_as_float": False,
        "quant_scale": False,
        "quant_zero": False,
        "compute_dtype": _COMPUTE[STORED_DTYPE[affine.scale.name]],
        "offload_meta": False,
        "encoded_state_dict": True,
        "stores_quant_config": True,
        "channel_wise": True,
        "optimize": True,
        "round_zero": affine.bits == 4,
    }


def parts(name: str, scheme: Scheme, shape: tuple[int, ...]) -> Parts:
    """Stored tensors of one weight, from its shape alone."""
    affine = as_affine(scheme)
    size, per = affine.blocks.cols, _PER[affine.bits]
    groups, dtype = prod(shape) // size, STORED_DTYPE[affine.scale.name]
    found: Parts = {
        sibling(name, "W_q"): ("I32" if affine.bits == 3 else "U8", (-(-groups // per), size)),
        sibling(name, "scale"): (dtype, (groups, 1)),
        sibling(name, "zero"): (dtype, (groups, 1)),
    }
    for key, value in _settings(scheme, shape).items():
        kind = {bool: ("U8", ()), int: ("I32", ()), str: ("U8", (len(str(value)),)), tuple: ("I64", (len(shape),))}
        found[sibling(name, key)] = kind[type(value)]
    return found


def encode(name: str, q: QTensor) -> dict[str, torch.Tensor]:
    """The stored tensors of a quantised weight.

    Raises:
        InputError: FB-E0620 for sides that have no place here.
    """
    import torch

    from fewbit.formats.words import refuse_sides
    from fewbit.math.bits import pack

    refuse_sides(name, q, "HQQ")
    bits, size = int(q.scheme.grid.bits), q.scheme.group_size
    rows = q.codes.reshape(-1, size)  # [groups, g]
    groups, per = rows.shape[0], _PER[bits]
    step = -(-groups // per)
    padded = torch.nn.functional.pad(rows, (0, 0, 0, step * per - groups))
    apart = padded.reshape(per, step, size).permute(1, 2, 0)  # [step, g, per]: what shares a word, first code highest
    word = torch.int32 if bits == 3 else torch.uint8
    # ten 3-bit codes lie in the low 30 bits of their word, so the lowest code is the last one
    packed = pack(apart.flip(-1), bits, word=word, dense=False).squeeze(-1)
    out = {
        sibling(name, "W_q"): packed.contiguous(),
        sibling(name, "scale"): q.leaf("scale").reshape(-1, 1),
        sibling(name, "zero"): q.leaf("code_shift").reshape(-1, 1),
    }
    for key, value in _settings(q.scheme, q.shape).items():
        out[sibling(name, key)] = _as_tensor(value)
    return out


def _as_tensor(value: Any) -> torch.Tensor:
    """A setting as HQQ's safetensors encoding has it."""
    import torch

    if isinstance(value, bool):
        return torch.tensor(int(value), dtype=torch.uint8)
    if isinstance(value, int):
        return torch.tensor(value, dtype=torch.int32)
    if isinstance(value, str):
        return torch.tensor([ord(char) for char in value], dtype=torch.uint8)
    return torch.tensor(value, dtype=torch.int64)


def decode(name: str, read: Callable[[str], torch.Tensor], stored: Stored) -> QTensor:
    """The quantised weight, code for code; its shape comes from the stored one.

    Raises:
        InputError: FB-E0620 for groups along rows (axis 0); FB-E0621 when stored settings do not fit.
    """
    from fewbit.math.bits import unpack
    from fewbit.num.qtensor import QTensor

    scheme = stored.scheme
    bits, size, per = int(scheme.grid.bits), scheme.group_size, _PER[int(scheme.grid.bits)]
    shape = tuple(read(sibling(name, "shape")).tolist())
    if int(read(sibling(name, "axis"))) != 1:
        raise InputError("FB-E0620", "HQQ groups along axis 0 are not known, only axis 1", tensor=sibling(name, "axis"))
    if (
        int(read(sibling(name, "nbits"))) != bits
        or int(read(sibling(name, "group_size"))) != size
        or prod(shape) != prod(stored.shape)
    ):
        raise InputError(
            "FB-E0621", "the layer's own settings say otherwise than the config", tensor=sibling(name, "nbits")
        )
    packed = read(sibling(name, "W_q"))
    apart = unpack(packed.unsqueeze(-1), bits, per, dense=False).flip(-1)  # [step, g, per]
    groups = prod(shape) // size
    codes = apart.permute(2, 0, 1).reshape(-1, size)[:groups].reshape(shape)
    counts = scheme.block_counts(shape)
    scale, zero = (read(sibling(name, word)).reshape(counts) for word in ("scale", "zero"))
    return QTensor(scheme, shape, codes, scale, zero)


def config(source: dict[str, Any], assignment: Assignment) -> tuple[dict[str, Any], dict[str, Any]]:
    """The new config.json, with the words of transformers' HqqConfig.

    Raises:
        InputError: FB-E0620 when the weights have different schemes.
    """
    scheme = single_scheme(assignment, "HQQ")
    affine = as_affine(scheme)
    weights = {
        "nbits": affine.bits,
        "group_size": affine.blocks.cols,
        "channel_wise": True,
        "optimize": True,
        "round_zero": affine.bits == 4,
        "axis": 1,
        "view_as_float": False,
    }
    kept = [stem(name) for name in assignment.kept if "embed" not in name]
    words = {
        "quant_config": {
            "weight_quant_params": weights,
            "scale_quant_params": None,
            "zero_quant_params": None,
            "offload_meta": False,
        },
        "quant_method": "hqq",
        "skip_modules": list(dict.fromkeys(["lm_head", *kept])),
    }
    return {**source, "quantization_config": words}, {}


def detect(config: dict[str, Any], manifest: Manifest) -> dict[str, Stored] | None:
    """The quantised weights of an HQQ checkpoint, or None when the config names another format.

    Raises:
        InputError: FB-E0621 for missing or misshapen parts.
    """
    given = config.get("quantization_config") or {}
    if given.get("quant_method") != "hqq":
        return None
    words = (given.get("quant_config") or {}).get("weight_quant_params") or {}
    bits, group = words.get("nbits", 4), words.get("group_size")
    if bits not in PACKING or words.get("axis", 1) != 1 or not group:
        raise InputError("FB-E0620", f"HQQ with {bits} bits, group_size {group}, axis {words.get('axis')} is not known")
    found: dict[str, Stored] = {}
    for stored, info in manifest.items():
        if not stored.endswith((".W_q", ".zero")):
            continue
        base = stored.rpartition(".")[0]
        name = f"{base}.weight"
        scale = manifest.get(f"{base}.scale")
        if scale is None or scale.dtype not in LEAF_GRID:
            raise InputError("FB-E0621", "a quantised weight without its scales", tensor=f"{base}.scale")
        count = scale.numel * group
        width = config.get("intermediate_size" if "down" in name else "hidden_size")
        cols = width if type(width) is int and width > 0 and count % width == 0 else count
        shape = (count // cols, cols)
        grid = LEAF_GRID[scale.dtype]
        scheme = Affine(bits, Blocks(1, group), "float", grid, grid).scheme
        needed = tuple(parts(name, scheme, shape))
        lost = [part for part in needed[:3] if part not in manifest] + [
            part for part in needed[3:8] if part not in manifest
        ]
        if lost:
            raise InputError("FB-E0621", "a part of a quantised weight is not stored", tensor=lost[0])
        if manifest[needed[0]].shape != parts(name, scheme, shape)[needed[0]][1]:
            raise InputError(
                "FB-E0621", f"{list(info.shape)} words are not {bits} bits in groups of {group}", tensor=stored
            )
        found[name] = Stored(scheme, shape, tuple(part for part in needed if part in manifest))
    return found


FORMAT = Format(
    name="hqq",
    summary="Half-quadratic quantisation: 1, 2, 3, 4, 8 bits with float zero points; transformers with hqq",
    container="safetensors",
    default_scheme="int4-g64-asym{f16}",
    engines=("transformers",),
    accepts=accepts,
    parts=parts,
    encode=encode,
    decode=decode,
    config=config,
    detect=detect,
    conform=conform,
    one_scheme=True,
)
