"""The `quantization_config` of compressed-tensors: schemes to its arguments and back, targets, and recognising a checkpoint.

Its pydantic classes refuse unknown keys, so only keys that they know are written. A scheme is a pair (weights, input_activations) of
argument dictionaries; `config_groups` holds one pair per distinct scheme with the modules it is for.

Facts from compressed-tensors 0.20.0 (`quantization/quant_args.py`, `quant_scheme.py`, `quant_config.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from fewbit.base.errors import InputError
from fewbit.base.names import natural_key, stem
from fewbit.formats.kinds import LEAF_GRID, NVFP4_SCALE, Affine, affine_of, fp8_scale, is_nvfp4, mx_element
from fewbit.num.blocks import CHANNEL, TENSOR, Blocks
from fewbit.num.grid import BF16, E2M1, E2M3, E4M3, E8M0, F16, F32, FloatGrid
from fewbit.num.scheme import Scheme, leaf

MX_WORDS = {E2M1: "mxfp4-pack-quantized", E2M3: "mxfp6-pack-quantized", E4M3: "mxfp8-quantized"}
Args = dict[str, Any]


def word_of(scheme: Scheme) -> str | None:
    """The compressed-tensors format that stores a scheme, or None when none does."""
    if (affine := affine_of(scheme)) is not None:
        if affine.zero not in ("none", "code") or affine.bits < 2:
            return None
        return "int-quantized" if scheme.activation is not None else "pack-quantized"
    if is_nvfp4(scheme):
        return "nvfp4-pack-quantized"
    if (element := mx_element(scheme)) is not None:
        return MX_WORDS.get(element)
    if fp8_scale(scheme) is not None:
        return "naive-quantized" if scheme.activation is None else "float-quantized"
    return None


def strategy(blocks: Blocks) -> Args | None:
    """The words for a granularity, or None when compressed-tensors has none."""
    if blocks.flat:
        return None
    if blocks == TENSOR:
        return {"strategy": "tensor"}
    if blocks == CHANNEL:
        return {"strategy": "channel"}
    if blocks.rows == 1 and blocks.cols > 1:
        return {"strategy": "group", "group_size": blocks.cols}
    if blocks.rows > 1 and blocks.cols > 1:
        return {"strategy": "block", "block_structure": [blocks.rows, blocks.cols]}
    return None


def weight_args(scheme: Scheme) -> Args:
    """`weights` of a config group for a scheme that `word_of` knows."""
    common = {"symmetric": True, "dynamic": False, "observer": "minmax"}
    if (affine := affine_of(scheme)) is not None:
        signs = {"symmetric": False, "zp_dtype": "torch.int8"} if affine.zero == "code" else {}
        return {"num_bits": affine.bits, "type": "int", **common, **(strategy(scheme.blocks) or {}), **signs}
    grid = scheme.grid
    assert isinstance(grid, FloatGrid)
    words = {"num_bits": grid.bits, "type": "float", **common}
    if is_nvfp4(scheme):
        return {**words, "strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
    if mx_element(scheme) is not None:
        return {**words, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    return {**words, **(strategy(scheme.blocks) or {})}


def activation_args(scheme: Scheme) -> Args | str | None:
    """`input_activations` of a config group; None when activations stay in floating point; a `str` is the reason of a refusal."""
    inputs = scheme.activation
    if inputs is None:
        return None
    common = {"symmetric": True, "dynamic": not scheme.static, "observer": None}
    if is_nvfp4(inputs):
        if not scheme.static:
            return "NVFP4 activations need a calibrated global scale: spell them `+nvfp4-static`"
        words = {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
        return {
            "num_bits": 4,
            "type": "float",
            "symmetric": True,
            "dynamic": "local",
            "observer": "static_minmax",
            **words,
        }
    if (element := mx_element(inputs)) in (E2M1, E2M3, E4M3):
        words = {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
        return {"num_bits": element.bits, "type": "float", **common, **words}
    affine = affine_of(inputs)
    if affine is not None and affine.zero in ("none", "code"):
        kind, bits = "int", affine.bits
        common["symmetric"] = affine.zero == "none"
    elif fp8_scale(inputs) is not None:
        kind, bits = "float", 8
    else:
        return f"activations can be integers, FP8, MX or NVFP4, got {inputs}"
    if bits not in (4, 8):
        return f"activations have 4 or 8 bits, got {bits}"
    if scheme.static and inputs.blocks != TENSOR:
        return f"static activation scales are one per tensor, got {inputs.blocks.spelling}"
    if inputs.blocks == CHANNEL:
        return {"num_bits": bits, "type": kind, **common, "strategy": "token"}
    place = strategy(inputs.blocks)
    if place is None or place["strategy"] == "block":
        return f"activations are quantised per tensor, token or group, got {inputs.blocks.spelling}"
    return {"num_bits": bits, "type": kind, **common, **place}


def scheme_of(weights: Args, inputs: Args | None, scale_dtype: str | None, word: str) -> Scheme:
    """The scheme that a config group names, with the scale dtype that is really stored.

    Raises:
        InputError: FB-E0620 for arguments that no scheme of ours says.
    """
    scheme = _scheme_of_args(weights, LEAF_GRID.get(scale_dtype or "", BF16), word)
    if inputs is None:
        return scheme
    dynamic = inputs.get("dynamic") is True
    scale = (
        F16 if inputs.get("type", "int") == "int" else F32
    )  # of activations: found at run time, nothing is stored in it
    return replace(scheme, activation=_scheme_of_args(inputs, scale, word), static=not dynamic)


def _scheme_of_args(args: Args, scale: FloatGrid, word: str) -> Scheme:
    bits, kind, group = args.get("num_bits", 8), args.get("type", "int"), args.get("group_size")
    name = args.get("strategy") or ("tensor" if group is None else "channel" if group == -1 else "group")
    block = args.get("block_structure") or [128, 128]
    if isinstance(block, str):
        block = [int(size) for size in block.split("x")]
    blocks = {"tensor": TENSOR, "channel": CHANNEL, "token": CHANNEL, "block": Blocks(*block)}.get(
        name, Blocks(1, group or 0)
    )
    if kind == "int" and 1 <= bits <= 8:
        return Affine(bits, blocks, "none" if args.get("symmetric", True) else "code", scale).scheme
    if kind == "float" and name == "tensor_group" and bits == 4 and group in (None, 16):
        return Scheme(E2M1, Blocks(1, 16), NVFP4_SCALE)
    mx = group == 32 and (args.get("scale_dtype") == "torch.uint8" or word.startswith("mx"))
    element = {4: E2M1, 6: E2M3, 8: E4M3}.get(bits) if kind == "float" else None
    if element is not None and mx:
        return Scheme(element, Blocks(1, 32), leaf(E8M0))
    if element is E4M3:
        return Scheme(E4M3, blocks, leaf(scale))
    raise InputError("FB-E0620", f"compressed-tensors arguments {args!r} name no scheme that fewbit knows")


def quantization_config(schemes: Mapping[str, Scheme], kept: Iterable[str]) -> Args:
    """The whole `quantization_config` for an assignment of schemes to weight names."""
    distinct = list(
        dict.fromkeys(scheme for _, scheme in sorted(schemes.items(), key=lambda item: natural_key(item[0])))
    )
    kept_modules = sorted({stem(name) for name in kept}, key=natural_key)
    uniform = len(distinct) == 1 and not any(_is_embedding(name) for name in schemes)
    groups = {}
    for index, scheme in enumerate(distinct):
        modules = [stem(name) for name, given in schemes.items() if given == scheme]
        others = kept_modules + [stem(name) for name, given in schemes.items() if given != scheme]
        groups[f"group_{index}"] = {
            "targets": ["Linear"] if uniform else targets(modules, others),
            "weights": weight_args(scheme),
            "input_activations": activation_args(scheme),
            "output_activations": None,
            "format": word_of(scheme),
        }
    words = {group["format"] for group in groups.values()}
    ignore = [name for name in kept_modules if not _is_embedding(name)]
    if uniform and "lm_head.weight" not in schemes and "lm_head" not in ignore:
        ignore.append("lm_head")  # a tied head is no stored tensor, but it is a Linear
    return {
        "config_groups": groups,
        "format": words.pop() if len(words) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        **({"dequantize": True} if _needs_dequantising(distinct) else {}),
    }


def _needs_dequantising(schemes: list[Scheme]) -> bool:
    """Whether transformers must be told to decode at loading.

    With compressed-tensors 0.19 and 0.20 it lays out packed zero points unpacked and refuses the checkpoint's, whoever wrote it (`pack_quantized/base.py`,
    `compress` on the meta device). Decoding at loading goes another way, which knows one scheme only; vLLM and SGLang do not read this key.
    """
    packed = [affine_of(scheme) for scheme in schemes if word_of(scheme) == "pack-quantized"]
    return len(schemes) == 1 and any(affine is not None and affine.zero == "code" for affine in packed)


def _is_embedding(name: str) -> bool:
    return any(word in name for word in ("embed", "wte", "wpe"))


def targets(modules: list[str], others: list[str]) -> list[str]:
    """Shortest exact list of targets: modules that differ from each other in their numbers only become one expression,
    unless it would also match a module of `others`."""
    taken = {_template(name) for name in others}
    found: dict[str, None] = {}
    for name in sorted(modules, key=natural_key):
        template = _template(name)
        found[name if template in taken or template == re.escape(name) else f"re:^{template}$"] = None
    return list(found)


def _template(name: str) -> str:
    return re.sub(r"\d+", r"\\d+", re.escape(name))


def group_for(config: Args, module: str) -> tuple[Args, Args | None, str] | None:
    """(weights, input activations, format word) of the group that a module belongs to: named targets win over class names."""
    by_class = None
    for group in (config.get("config_groups") or {}).values():
        if not isinstance(group, dict) or not group.get("weights"):
            continue
        found = group["weights"], group.get("input_activations"), group.get("format") or config.get("format") or ""
        for target in group.get("targets") or ():
            if target.startswith("re:"):
                if re.match(target[3:], module):
                    return found
            elif target == module:
                return found
            elif "." not in target and target[:1].isupper():
                by_class = by_class or found
    return by_class
