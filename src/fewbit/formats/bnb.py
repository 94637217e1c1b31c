"""bitsandbytes: NF4 and FP4 with or without double quantisation, and LLM.int8.

Four bits. The weight is flattened; blocks ignore rows. Two codes lie in a byte, the first in the *high* nibble:

    x.weight                    uint8 [n / 2, 1]
    x.weight.absmax             float32 [n / block], or uint8 indices into nested_quant_map with double quantisation
    x.weight.quant_map          float32 [16], the levels
    x.weight.nested_absmax      float32 [blocks / 256]; x.weight.nested_quant_map float32 [256]
    x.weight.quant_state.bitsandbytes__nf4    uint8, JSON: block size, shape, dtype, nested_offset (the mean of absmax)

Eight bits: x.weight int8 [out, in]; x.SCB float32 [out], the absolute maximum of each row, w = code * SCB / 127; x.weight_format uint8, 0 for rows.

The JSON is padded with spaces to a length that shapes alone determine. `dtype` in it is the dtype that the loader computes weights in: bfloat16.

Source: bitsandbytes 0.50.2 (`functional.QuantState.as_dict`, `nn.Linear8bitLt`), arXiv 2305.14314, 2208.07339.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from math import ceil, prod
from typing import TYPE_CHECKING, Any

from fewbit.base.errors import InputError
from fewbit.base.manifest import Manifest, TensorInfo
from fewbit.base.names import stem
from fewbit.formats.kinds import Affine, affine_of, misfit, sibling, single_scheme
from fewbit.formats.table import Assignment, Format, Parts, Stored
from fewbit.num.blocks import CHANNEL, flat
from fewbit.num.grid import BNB_DYNAMIC8, BNB_FP4, F32, NF4, Codebook, Grid
from fewbit.num.scheme import Scheme, double_quantised, leaf

if TYPE_CHECKING:
    import torch

    from fewbit.num.qtensor import QTensor

QUANT_TYPES: dict[str, Codebook] = {"nf4": NF4, "fp4": BNB_FP4}
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
INT8 = Affine(8, CHANNEL, "none", F32).scheme
_OFFSET_WIDTH = 26  # characters of the longest float
_STATE = "quant_state.bitsandbytes__"


def accepts(scheme: Scheme, shape: tuple[int, ...]) -> str | None:
    """None, or why bitsandbytes cannot store this scheme for a weight of this shape."""
    if scheme.activation is not None or scheme not in (INT8, *_four_bit(scheme)):
        return f"bitsandbytes stores NF4 and its FP4 in flat blocks (nf4-flat64-dq) and int8-channel-f32, got {scheme}"
    if len(shape) != 2:
        return f"bitsandbytes has no stacked weights, got shape {list(shape)}"
    if prod(shape) % 2:
        return f"bitsandbytes packs pairs of codes, got an odd number of weights in shape {list(shape)}"
    return misfit(shape)


def _four_bit(scheme: Scheme) -> tuple[Scheme, ...]:
    """The four-bit schemes that could be meant, by block size."""
    if scheme.grid not in QUANT_TYPES.values() or not scheme.blocks.flat or scheme.blocks.cols not in BLOCK_SIZES:
        return ()
    return tuple(Scheme(scheme.grid, scheme.blocks, scale) for scale in (leaf(F32), double_quantised()))


def conform(scheme: Scheme, dtype: str) -> Scheme:
    """Groups of a row become flat blocks of the same size, and scales float32, as bitsandbytes has no others."""
    if scheme.grid in QUANT_TYPES.values() and scheme.blocks.rows == 1 and scheme.blocks.cols in BLOCK_SIZES:
        return Scheme(scheme.grid, flat(scheme.blocks.cols), scheme.scale)
    return INT8 if affine_of(scheme) is not None and scheme.with_scale_leaf(F32) == INT8 else scheme


def _quant_type(scheme: Scheme) -> str:
    return next(name for name, grid in QUANT_TYPES.items() if grid == scheme.grid)


def parts(name: str, scheme: Scheme, shape: tuple[int, ...]) -> Parts:
    """Stored tensors of one weight, from its shape alone."""
    if scheme == INT8:
        return {
            name: ("I8", shape),
            sibling(name, "SCB"): ("F32", (shape[0],)),
            sibling(name, "weight_format"): ("U8", ()),
        }
    blocks = scheme.block_counts(shape)[-1]
    nested = not scheme.part("scale").is_leaf
    found: Parts = {
        name: ("U8", (prod(shape) // 2, 1)),
        f"{name}.absmax": ("U8" if nested else "F32", (blocks,)),
        f"{name}.quant_map": ("F32", (16,)),
        f"{name}.{_STATE}{_quant_type(scheme)}": ("U8", (len(_state(scheme, shape, 0.0)),)),
    }
    if nested:
        found[f"{name}.nested_absmax"] = ("F32", (ceil(blocks / scheme.part("scale").blocks.cols),))
        found[f"{name}.nested_quant_map"] = ("F32", (256,))
    return found


def _state(scheme: Scheme, shape: tuple[int, ...], offset: float) -> bytes:
    """The JSON of `quant_state`, in bitsandbytes' order, padded where the offset would change its length."""
    facts: dict[str, Any] = {
        "quant_type": _quant_type(scheme),
        "blocksize": scheme.blocks.cols,
        "dtype": "bfloat16",
        "shape": list(shape),
    }
    if scheme.part("scale").is_leaf:
        return json.dumps(facts).encode()
    facts |= {"nested_blocksize": scheme.part("scale").blocks.cols, "nested_dtype": "float32", "nested_offset": offset}
    text = json.dumps(facts)
    return text.ljust(len(text) - len(json.dumps(offset)) + _OFFSET_WIDTH).encode()


def encode(name: str, q: QTensor) -> dict[str, torch.Tensor]:
    """The stored tensors of a quantised weight.

    Raises:
        InputError: FB-E0620 for sides that have no place here.
    """
    import torch

    from fewbit.formats.words import multiple_of, refuse_sides
    from fewbit.math.bits import pack

    scheme = q.scheme
    refuse_sides(name, q, "bitsandbytes", allowed=("multiple",))
    if scheme == INT8:
        row_max = q.sides.get("multiple", multiple_of(q.leaf("scale"), 127.0)).reshape(-1)
        zero = torch.zeros((), dtype=torch.uint8)
        return {
            name: q.codes.reshape(q.shape).contiguous(),
            sibling(name, "SCB"): row_max,
            sibling(name, "weight_format"): zero,
        }
    out = {
        name: pack(q.codes.reshape(-1), 4, order="msb").reshape(-1, 1),
        f"{name}.quant_map": torch.tensor(scheme.grid.levels(), dtype=torch.float32) + 0.0,  # no negative zero
    }
    offset = 0.0
    if scheme.part("scale").is_leaf:
        out[f"{name}.absmax"] = q.leaf("scale").reshape(-1)
    else:
        nested = q.nested("scale")
        offset = float(nested.leaf("value_shift").reshape(()))
        out[f"{name}.absmax"] = nested.codes.reshape(-1)
        out[f"{name}.nested_absmax"] = nested.leaf("scale").reshape(-1)
        out[f"{name}.nested_quant_map"] = torch.tensor(BNB_DYNAMIC8.levels(), dtype=torch.float32)
    state = torch.tensor(list(_state(scheme, q.shape, offset)), dtype=torch.uint8)
    return out | {f"{name}.{_STATE}{_quant_type(scheme)}": state}


def decode(name: str, read: Callable[[str], torch.Tensor], stored: Stored) -> QTensor:
    """The quantised weight, code for code; its shape comes from the stored state.

    Raises:
        InputError: FB-E0621 when the stored state is damaged; FB-E0620 for a table of levels that is not bitsandbytes' own.
    """
    import torch

    from fewbit.formats.words import multiple_of
    from fewbit.math.bits import unpack
    from fewbit.num.qtensor import QTensor

    scheme = stored.scheme
    if scheme == INT8:
        row_max = read(sibling(name, "SCB")).float().reshape(-1, 1)
        scale = row_max / 127.0
        sides = {} if torch.equal(multiple_of(scale, 127.0), row_max) else {"multiple": row_max}
        return QTensor(scheme, stored.shape, read(name), scale, sides=sides)
    facts = _read_state(name, read, scheme)
    shape = tuple(facts["shape"])
    _check_levels(f"{name}.quant_map", read, scheme.grid)
    codes = unpack(read(name).reshape(-1), 4, prod(shape), order="msb").reshape(shape)
    absmax, counts = read(f"{name}.absmax"), scheme.block_counts(shape)
    if scheme.part("scale").is_leaf:
        return QTensor(scheme, shape, codes, absmax.reshape(counts))
    _check_levels(f"{name}.nested_quant_map", read, BNB_DYNAMIC8)
    inner = scheme.part("scale").block_counts(counts)
    mean = torch.tensor(facts["nested_offset"], dtype=torch.float32).reshape(1, 1)
    outer = read(f"{name}.nested_absmax").reshape(inner)
    nested = QTensor(scheme.part("scale"), counts, absmax.reshape(counts), outer, None, mean)
    return QTensor(scheme, shape, codes, nested)


def _read_state(name: str, read: Callable[[str], torch.Tensor], scheme: Scheme) -> dict[str, Any]:
    part = f"{name}.{_STATE}{_quant_type(scheme)}"
    try:
        facts = json.loads(bytes(read(part).tolist()))
        shape, offset = facts["shape"], facts.get("nested_offset", 0.0)
        sound = (
            facts["blocksize"] == scheme.blocks.cols
            and all(type(size) is int and size > 0 for size in shape)
            and float(offset) == offset
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            "FB-E0621", f"the stored state is no JSON that bitsandbytes writes: {error!r}", tensor=part
        ) from error
    if not sound:
        raise InputError("FB-E0621", f"the stored state does not fit the tensors beside it: {facts}", tensor=part)
    return facts


def _check_levels(part: str, read: Callable[[str], torch.Tensor], grid: Grid) -> None:
    import torch

    levels = torch.tensor(grid.levels(), dtype=torch.float32)
    if not torch.equal(read(part).float().reshape(-1), levels):
        raise InputError("FB-E0620", f"the levels are not those of {grid.name}", tensor=part)


def config(source: dict[str, Any], assignment: Assignment) -> tuple[dict[str, Any], dict[str, Any]]:
    """The new config.json, with the words of transformers' BitsAndBytesConfig.

    Raises:
        InputError: FB-E0620 when the weights have different schemes.
    """
    scheme = single_scheme(assignment, "bitsandbytes")
    four = scheme != INT8
    kept = [stem(name) for name in assignment.kept if "embed" not in name]
    words = {
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": _quant_type(scheme) if four else "fp4",
        "bnb_4bit_use_double_quant": four and not scheme.part("scale").is_leaf,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(
            dict.fromkeys([*kept, *([] if "lm_head.weight" in assignment.schemes else ["lm_head"])])
        ),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "quant_method": "bitsandbytes",
    }
    return {**source, "quantization_config": words}, {}


def detect(config: dict[str, Any], manifest: Manifest) -> dict[str, Stored] | None:
    """The quantised weights of a bitsandbytes checkpoint, or None when the config names another format.

    The exact shape of a 4-bit weight stands in its stored state; here it is guessed from the config, with the right number of weights.

    Raises:
        InputError: FB-E0621 for missing or misshapen parts.
    """
    given = config.get("quantization_config") or {}
    if given.get("quant_method") != "bitsandbytes":
        return None
    found: dict[str, Stored] = {}
    for name in manifest:
        for suffix in (".absmax", ".quant_map"):
            base = name.removesuffix(suffix)
            if base != name and not base.endswith((".nested_absmax", ".nested_quant_map")):
                found[base] = _stored_4bit(base, manifest, config)
        if name.endswith(".SCB"):
            base = f"{name.removesuffix('SCB')}weight"
            _demand(manifest, base)
            needed = tuple(part for part in (base, name, f"{base}_format") if part in manifest)
            found[base] = Stored(INT8, manifest[base].shape, needed)
    orphans = [
        n for n, info in manifest.items() if n.endswith(".weight") and info.dtype in ("U8", "I8") and n not in found
    ]
    if orphans:
        raise InputError("FB-E0621", "a quantised weight without its scales", tensor=orphans[0])
    for name, stored in found.items():
        flag, other = ("load_in_8bit", "load_in_4bit") if stored.scheme == INT8 else ("load_in_4bit", "load_in_8bit")
        if given.get(other) and not given.get(flag):
            raise InputError("FB-E0621", f"the config says {other}, the tensors are of {flag}", tensor=name)
    return found


def _demand(manifest: Manifest, name: str) -> TensorInfo:
    if name not in manifest:
        raise InputError("FB-E0621", "a part of a quantised weight is not stored", tensor=name)
    return manifest[name]


def _stored_4bit(name: str, manifest: Manifest, config: dict[str, Any]) -> Stored:
    states = [part for part in manifest if part.startswith(f"{name}.{_STATE}")]
    if not states:
        raise InputError("FB-E0621", "a 4-bit weight without its quant_state", tensor=name)
    quant_type = states[0].rpartition("__")[2]
    if quant_type not in QUANT_TYPES:
        raise InputError("FB-E0620", f"bitsandbytes {quant_type} is not known", tensor=states[0])
    count = _demand(manifest, name).numel * 2
    absmax = _demand(manifest, f"{name}.absmax")
    nested = absmax.dtype == "U8"
    extra = ("nested_absmax", "nested_quant_map") if nested else ()
    needed = [name, *(f"{name}.{word}" for word in ("absmax", "quant_map", *extra)), states[0]]
    for part in needed:
        _demand(manifest, part)
    size = next((size for size in reversed(BLOCK_SIZES) if ceil(count / size) == absmax.numel), None)
    if size is None:
        raise InputError(
            "FB-E0621", f"{absmax.numel} scales for {count} weights are no whole number of blocks", tensor=absmax.name
        )
    nested_size = 256 if not nested else ceil(absmax.numel / manifest[f"{name}.nested_absmax"].numel)
    if nested and ceil(absmax.numel / 256) != manifest[f"{name}.nested_absmax"].numel:
        raise InputError(
            "FB-E0620", f"nested blocks of about {nested_size} scales are not known, only 256", tensor=absmax.name
        )
    scheme = Scheme(QUANT_TYPES[quant_type], flat(size), double_quantised() if nested else leaf(F32))
    width = config.get("intermediate_size" if "down" in name else "hidden_size")
    cols = width if type(width) is int and width > 0 and count % width == 0 else count
    return Stored(scheme, (count // cols, cols), tuple(needed))


FORMAT = Format(
    name="bitsandbytes",
    summary="NF4, FP4 with or without double quantisation, LLM.int8; transformers",
    container="safetensors",
    default_scheme="nf4-flat64-dq",
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
