"""ModelOpt: NVIDIA's checkpoints, read by TensorRT-LLM, vLLM and SGLang; `hf_quant_config.json` beside the weights.

    algorithm                    x.weight                           x.weight_scale                      more
    FP8                          float8_e4m3fn [out, in]            float32 []                          x.input_scale float32 []
    FP8_PER_CHANNEL_PER_TOKEN    float8_e4m3fn [out, in]            float32 [out]
    FP8_PB_WO                    float8_e4m3fn [out, in]            float32 [out/128, 1, in/128, 1]
    MXFP8                        float8_e4m3fn [out, in]            uint8 E8M0 [out, in/32]
    W4A16_NVFP4, NVFP4           uint8 [out, in/2], even columns    float8_e4m3fn [out, in/16]          x.weight_scale_2 float32 [], a *multiplier*;
                                 in the low nibble                                                      NVFP4: x.input_scale float32 []
    W4A16_AWQ, W4A8_AWQ          uint8 [out/2, in], two's complement, float [out, in/g]                 x.pre_quant_scale [in], of the scales' dtype;
                                 even rows in the low nibble                                            W4A8: x.input_scale, x.weight_scale_2 float32 []

A pre_quant_scale multiplies the inputs at run time. Read, it is a side that scales columns, unless all ones; fewbit folds scales into the layer before,
so it writes ones, for TensorRT-LLM does not load a layer without. W4A8 rounds the decoded weights once more, to FP8 under weight_scale_2 (the largest
weight / 448) in the kernel: it is stored for that only, w = code * weight_scale.

Source: facts.md B1; nvidia-modelopt 0.47.0 `export/quant_utils.py`, `export/convert_hf_config.py`; vLLM 0.32 `quantization/modelopt.py`;
TensorRT-LLM 1.x `_torch/modules/linear.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from math import prod
from typing import TYPE_CHECKING, Any

from fewbit.base.errors import InputError
from fewbit.base.manifest import Manifest
from fewbit.base.names import natural_key, stem
from fewbit.formats.experts import per_expert
from fewbit.formats.kinds import LEAF_GRID, STORED_DTYPE, Affine, affine_of, as_affine, misfit, part, sibling
from fewbit.formats.table import Assignment, Format, Parts, Stored
from fewbit.num.blocks import Blocks
from fewbit.num.grid import F32
from fewbit.num.scheme import Scheme, parse_scheme

if TYPE_CHECKING:
    import torch

    from fewbit.num.qtensor import QTensor

ALGORITHMS: dict[str, Scheme] = {
    "FP8": parse_scheme("fp8-e4m3-tensor+fp8-e4m3-tensor-static"),
    "FP8_PER_CHANNEL_PER_TOKEN": parse_scheme("fp8-e4m3-channel+fp8-e4m3-token"),
    "FP8_PB_WO": parse_scheme("fp8-e4m3-block128"),
    "MXFP8": parse_scheme("mxfp8+mxfp8"),
    "NVFP4": parse_scheme("nvfp4+nvfp4-static"),
    "W4A16_NVFP4": parse_scheme("nvfp4"),
}
_NVFP4 = ("NVFP4", "W4A16_NVFP4")
_AWQ = ("W4A16_AWQ", "W4A8_AWQ")
_FP8_INPUTS = parse_scheme("fp8-e4m3-tensor")
_FP8_MAX = 448.0
# words of config_groups for each algorithm, as ModelOpt's own converter writes them
_GROUPS: dict[str, dict[str, Any]] = {
    "FP8": {"input_activations": {"num_bits": 8, "type": "float"}, "weights": {"num_bits": 8, "type": "float"}},
    "FP8_PER_CHANNEL_PER_TOKEN": {
        "input_activations": {"num_bits": 8, "type": "float"},
        "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
    },
    "NVFP4": {"input_activations": {"num_bits": 4, "type": "float", "group_size": 16}, "weights": {"num_bits": 4, "type": "float", "group_size": 16}},
    "W4A16_NVFP4": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}},
    "MXFP8": {"input_activations": {"num_bits": 8, "type": "float", "group_size": 32}, "weights": {"num_bits": 8, "type": "float", "group_size": 32}},
}  # fmt: skip


def algorithm(scheme: Scheme) -> str | None:
    """ModelOpt's name for a scheme, or None when it has none."""
    for name, known in ALGORITHMS.items():
        if scheme == known:
            return name
    affine = affine_of(scheme)
    if (
        affine is not None
        and affine.bits == 4
        and affine.zero == "none"
        and affine.blocks.rows == 1
        and affine.blocks.cols > 1
    ):
        if scheme.activation is None:
            return "W4A16_AWQ"
        return "W4A8_AWQ" if scheme.activation == _FP8_INPUTS and scheme.static else None
    return None


def accepts(scheme: Scheme, shape: tuple[int, ...]) -> str | None:
    """None, or why ModelOpt cannot store this scheme for a weight of this shape."""
    name = algorithm(scheme)
    if name is None:
        known = ", ".join(str(scheme) for scheme in ALGORITHMS.values())
        return f"ModelOpt stores {known}, int4-g128 and int4-g128+fp8-e4m3-tensor-static, got {scheme}"
    if len(shape) != 2:
        return f"ModelOpt has no stacked weights here, got shape {list(shape)}"
    return misfit(shape, columns=max(scheme.blocks.cols, 1), rows=2 if name in _AWQ else 1)


def conform(scheme: Scheme, dtype: str) -> Scheme:
    """FP8 scales in float32, those of integers in the model's dtype, and the activation part that the algorithm of these weights implies where it needs no calibration."""
    if (affine := affine_of(scheme)) is not None:
        return scheme.with_scale_leaf(LEAF_GRID.get(dtype, F32)) if affine.bits == 4 else scheme
    if scheme.scale is not None and scheme.scale.is_leaf and scheme.scale.grid.name in ("f16", "bf16"):
        scheme = scheme.with_scale_leaf(F32)
    for implied in ("FP8_PER_CHANNEL_PER_TOKEN", "MXFP8"):
        known = ALGORITHMS[implied]
        if scheme == known.weights_only:
            return known
    return scheme


def parts(name: str, scheme: Scheme, shape: tuple[int, ...]) -> Parts:
    """Stored tensors of one weight, from its shape alone."""
    word, (rows, cols), counts = algorithm(scheme), shape, scheme.block_counts(shape)
    found: Parts = {name: ("F8_E4M3", shape)}
    scale = part(name, "scale")
    if word in _AWQ:
        affine = as_affine(scheme)
        dtype = STORED_DTYPE[affine.scale.name]
        found = {
            name: ("U8", (rows // 2, cols)),
            scale: (dtype, counts),
            sibling(name, "pre_quant_scale"): (dtype, (cols,)),
        }
        if word == "W4A8_AWQ":
            found[part(name, "scale_2")] = ("F32", ())
    elif word in _NVFP4:
        found = {name: ("U8", (rows, cols // 2)), scale: ("F8_E4M3", counts), part(name, "scale_2"): ("F32", ())}
    elif word == "MXFP8":
        found[scale] = ("U8", counts)
    else:
        found[scale] = ("F32", _scale_shape(word, counts))
    return found | ({sibling(name, "input_scale"): ("F32", ())} if scheme.static else {})


def _scale_shape(word: str | None, counts: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the float32 scales of an FP8 algorithm for (block rows, block columns)."""
    return {"FP8": (), "FP8_PER_CHANNEL_PER_TOKEN": counts[:1], "FP8_PB_WO": (counts[0], 1, counts[1], 1)}[word or ""]


def encode(name: str, q: QTensor) -> dict[str, torch.Tensor]:
    """The stored tensors of a quantised weight.

    Raises:
        InputError: FB-E0620 for sides that have no place here, or a static activation scale that is missing.
    """
    import torch

    from fewbit.formats.words import input_scale, refuse_sides
    from fewbit.math.bits import pack

    awq = algorithm(q.scheme) in _AWQ
    refuse_sides(
        name, q, "ModelOpt", allowed=("input_scale", "column_scale", "weight_scale_2") if awq else ("input_scale",)
    )
    scheme, word, counts = q.scheme, algorithm(q.scheme), q.scheme.block_counts(q.shape)
    codes, scale = q.codes.reshape(q.shape), part(name, "scale")
    if awq:
        packed = pack(codes.mT.contiguous(), 4, word=torch.uint8).mT.contiguous()
        out = {
            name: packed,
            scale: q.leaf("scale").reshape(counts),
            sibling(name, "pre_quant_scale"): _pre_quant_scale(name, q),
        }
        if word == "W4A8_AWQ":
            out[part(name, "scale_2")] = _second_scale(q)
    elif word in _NVFP4:
        out = {
            name: pack(codes, 4, word=torch.uint8),
            scale: q.nested("scale").codes.reshape(counts).view(torch.float8_e4m3fn),
            part(name, "scale_2"): q.nested("scale").leaf("scale").reshape(()),
        }
    elif word == "MXFP8":
        exponents = q.leaf("scale").reshape(counts).view(torch.uint8)
        out = {name: codes.contiguous().view(torch.float8_e4m3fn), scale: exponents}
    else:
        levels = q.leaf("scale").reshape(_scale_shape(word, counts))
        out = {name: codes.contiguous().view(torch.float8_e4m3fn), scale: levels}
    return out | ({sibling(name, "input_scale"): input_scale(name, q).reshape(())} if scheme.static else {})


def _pre_quant_scale(name: str, q: QTensor) -> torch.Tensor:
    """What inputs are multiplied by, in the dtype of the scales [cols]: ones unless the tensor was read with others."""
    import torch

    columns, dtype = q.sides.get("column_scale"), q.leaf("scale").dtype
    if columns is None:
        return torch.ones(q.shape[-1], dtype=dtype)
    stored = columns.to(dtype)
    if not torch.equal(stored.float(), columns.float()):
        raise InputError("FB-E0620", f"its scales of columns do not fit {dtype}", tensor=name)
    return stored


def _second_scale(q: QTensor) -> torch.Tensor:
    """The scale under which the kernel rounds decoded weights to FP8, float32 []: as read, else the largest weight / 448."""
    import torch

    if "weight_scale_2" in q.sides:
        return q.sides["weight_scale_2"].float().reshape(())
    largest = replace(q, sides={}).dequantize().abs().amax()
    return torch.clamp_min(largest / _FP8_MAX, torch.finfo(torch.float32).tiny)


def decode(name: str, read: Callable[[str], torch.Tensor], stored: Stored) -> QTensor:
    """The quantised weight, code for code."""
    import torch

    from fewbit.math.bits import unpack
    from fewbit.num.qtensor import QTensor

    scheme, shape = stored.scheme, stored.shape
    word, counts = algorithm(scheme), scheme.block_counts(shape)
    weight, scale = read(name), read(part(name, "scale"))
    sides = {"input_scale": read(sibling(name, "input_scale")).float().reshape(1)} if scheme.static else {}
    if word in _AWQ:
        codes = unpack(weight.mT.contiguous(), 4, shape[0], signed=True).mT.contiguous()
        if stored.facts.get("pre_quant_scale"):
            columns = read(sibling(name, "pre_quant_scale")).float().reshape(-1)
            sides |= {} if bool((columns == 1).all()) else {"column_scale": columns}
        if word == "W4A8_AWQ":
            held = QTensor(scheme, shape, codes, scale.reshape(counts))
            second = read(part(name, "scale_2")).float().reshape(())
            sides |= {} if torch.equal(second, _second_scale(held)) else {"weight_scale_2": second}
        return QTensor(scheme, shape, codes, scale.reshape(counts), sides=sides)
    if word in _NVFP4:
        over = read(part(name, "scale_2")).float().reshape(1, 1)
        nested = QTensor(scheme.part("scale"), counts, scale.reshape(counts).view(torch.uint8), over)
        return QTensor(scheme, shape, unpack(weight, 4, shape[1]), nested, sides=sides)
    scale = scale.view(torch.float8_e8m0fnu) if word == "MXFP8" else scale.float()
    return QTensor(scheme, shape, weight.view(torch.uint8), scale.reshape(counts), sides=sides)


def _layer_words(scheme: Scheme) -> dict[str, Any]:
    """What `quantization` or one of `quantized_layers` says of a scheme."""
    name = algorithm(scheme)
    if name in _AWQ:
        return {"quant_algo": name, "group_size": scheme.blocks.cols, "has_zero_point": False, "pre_quant_scale": True}
    return {"quant_algo": name, **({"group_size": scheme.blocks.cols} if name in (*_NVFP4, "MXFP8") else {})}


def _group_words(words: dict[str, Any], targets: list[str]) -> dict[str, Any]:
    group = _GROUPS.get(words["quant_algo"]) or {
        "weights": {"num_bits": 4, "type": "int", "group_size": words.get("group_size")}
    }
    if words["quant_algo"] == "W4A8_AWQ":
        group = {"input_activations": {"num_bits": 8, "type": "float"}, **group}
    if words["quant_algo"] == "FP8_PB_WO":
        group = {"weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}}
    return {**{key: {"dynamic": False, **value} for key, value in group.items()}, "targets": targets}


def config(source: dict[str, Any], assignment: Assignment) -> tuple[dict[str, Any], dict[str, Any]]:
    """The new config.json and hf_quant_config.json, which says the same in ModelOpt's own words."""
    layers = {
        stem(name): _layer_words(assignment.schemes[name]) for name in sorted(assignment.schemes, key=natural_key)
    }
    distinct = list({str(words): words for words in layers.values()}.values())
    kept = sorted({stem(name) for name in assignment.kept if "embed" not in name}, key=natural_key)
    if "lm_head" not in layers and "lm_head" not in kept:
        kept.append("lm_head")
    # loaders look for this producer's name before they read the rest
    producer = {"name": "modelopt", "version": "0.47.0", "written_by": "fewbit"}
    own: dict[str, Any] = {"kv_cache_quant_algo": "FP8" if assignment.kv else None, "exclude_modules": kept}
    if len(distinct) == 1:
        own = {**distinct[0], **own}
        groups = {"group_0": _group_words(distinct[0], ["Linear"])}
    else:
        own = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers, **own}
        groups = {
            f"group_{index}": _group_words(words, [name for name, given in layers.items() if given == words])
            for index, words in enumerate(distinct)
        }
    words = {
        "config_groups": groups,
        "ignore": kept,
        **{key: value for key, value in own.items() if key not in ("kv_cache_quant_algo", "exclude_modules")},
        **({"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}} if assignment.kv else {}),
        "producer": producer,
        "quant_method": "modelopt",
    }
    return {**source, "quantization_config": words}, {
        "hf_quant_config.json": {"producer": producer, "quantization": own}
    }


def detect(config: dict[str, Any], manifest: Manifest) -> dict[str, Stored] | None:
    """The quantised weights of a ModelOpt checkpoint, or None when the config names another format.

    Raises:
        InputError: FB-E0621 for missing or misshapen parts; FB-E0620 for algorithms that are not known.
    """
    given = config.get("quantization_config") or {}
    if "quantization" in given and "producer" in given:  # hf_quant_config.json itself
        given = {**given["quantization"], "quant_method": "modelopt"}
    if not str(given.get("quant_method", "")).startswith("modelopt"):
        return None
    groups = [group for group in (given.get("config_groups") or {}).values() if isinstance(group, dict)]
    quantises_inputs = not groups or any(group.get("input_activations") for group in groups)
    found: dict[str, Stored] = {}
    for name, info in manifest.items():
        if not name.endswith(".weight") or info.dtype not in ("F8_E4M3", "U8"):
            continue
        words = _words_for(stem(name), given)
        if str(words.get("quant_algo", "")).upper() == "NVFP4" and not quantises_inputs:
            words = {**words, "quant_algo": "W4A16_NVFP4"}  # some say NVFP4 and have groups of weights only
        found[name] = _stored(name, words, manifest)
    orphans = [name for name in manifest if name.endswith(".weight_scale") and name.removesuffix("_scale") not in found]
    if orphans:
        raise InputError("FB-E0621", "scales without their weight", tensor=orphans[0])
    return found


def _words_for(module: str, given: dict[str, Any]) -> dict[str, Any]:
    layers = given.get("quantized_layers") or {}
    own = layers.get(module) or next((words for pattern, words in layers.items() if fnmatch(module, pattern)), None)
    if own is not None:
        return own
    groups = [group.get("weights", {}) for group in (given.get("config_groups") or {}).values()]
    size = next((group["group_size"] for group in groups if group.get("group_size")), None)
    return {"group_size": size, **{key: value for key, value in given.items() if value is not None}}


def _stored(name: str, words: dict[str, Any], manifest: Manifest) -> Stored:
    word = str(words.get("quant_algo", "")).upper()
    info, scale = manifest[name], manifest.get(part(name, "scale"))
    shape: tuple[int, ...]
    if scale is None:
        raise InputError("FB-E0621", "a quantised weight without its scales", tensor=part(name, "scale"))
    if word in _AWQ:
        grid = LEAF_GRID.get(scale.dtype, F32)
        scheme = Affine(4, Blocks(1, int(words.get("group_size") or 128)), "none", grid).scheme
        if word == "W4A8_AWQ":
            scheme = replace(scheme, activation=_FP8_INPUTS, static=True)
        shape = (info.shape[0] * 2, info.shape[1])
    elif word in ALGORITHMS:
        scheme = ALGORITHMS[word]
        shape = (info.shape[0], info.shape[1] * 2) if word in _NVFP4 else info.shape
    else:
        raise InputError("FB-E0620", f"ModelOpt algorithm {word or 'none'} is not known", tensor=name)
    said = int(words.get("group_size") or 0)
    if word in (*_NVFP4, "MXFP8") and said not in (0, scheme.blocks.cols):
        problem = f"{word} has groups of {scheme.blocks.cols}, the config says {said}"
        raise InputError("FB-E0621", f"{problem}: the config lies about the group size", tensor=name)
    promised = parts(name, scheme, shape)
    facts: dict[str, Any] = {}
    inputs = sibling(name, "pre_quant_scale")
    if word in _AWQ:
        facts["pre_quant_scale"] = inputs in manifest
        if inputs not in manifest:
            if words.get("pre_quant_scale"):
                raise InputError("FB-E0621", "the config says pre_quant_scale and none is stored", tensor=inputs)
            del promised[inputs]
    for stored, (_, size) in promised.items():
        if stored not in manifest:
            raise InputError("FB-E0621", "a part of a quantised weight is not stored", tensor=stored)
        if manifest[stored].numel != prod(size):
            problem = f"{list(manifest[stored].shape)} where {word} of a weight {list(shape)} has {list(size)}"
            raise InputError("FB-E0621", f"{problem}: the config lies about the algorithm or group size", tensor=stored)
    return Stored(scheme, shape, tuple(promised), facts)


FORMAT = per_expert(
    Format(
        name="modelopt",
        summary="NVIDIA ModelOpt: FP8, MXFP8, NVFP4, int4; TensorRT-LLM, vLLM, SGLang",
        container="safetensors",
        default_scheme="nvfp4",
        engines=("tensorrt-llm", "vllm", "sglang"),
        accepts=accepts,
        parts=parts,
        encode=encode,
        decode=decode,
        config=config,
        detect=detect,
        conform=conform,
        kv_scale=lambda attention, which: f"{attention}.{which}_proj.{which}_scale",
    )
)
