"""GPTQ: the layout of AutoGPTQ and GPTQModel, version 1 (`gptq`) and version 2 (`gptq-v2`).

For a linear layer `x` of `out` rows, `in` columns and groups of g columns:

    x.qweight  int32 [in * bits / 32, out]      codes packed along `in`, lowest bits first, densely (3 bits: 32 codes in three words)
    x.qzeros   int32 [in / g, out * bits / 32]  zero points packed along `out`; version 1 stores them minus one, see below
    x.scales   f16 or bf16 [in / g, out]
    x.g_idx    int32 [in]                       group of each column: column // g unless columns were reordered

    w = (code - zero) * scale, with zero = 2^(bits-1) when symmetric

Version 1 is a trap where a zero point is 0. GPTQModel, and so transformers, adds a one to every field of a *word* at once, 0x11111111 for 4 bits; were
each field stored minus one by itself, 0 would become 15 and carry into its neighbour. So the ones are subtracted from whole words here, borrows and all,
which is what that addition undoes (of 3 bits, whose fields straddle words, GPTQModel treats each by itself). Readers that take fields apart first,
such as llama.cpp's converter, misread a zero point of 0 however it is stored: for them `gptq-v2`. Symmetric weights never have it.

Source: facts.md B1 (GPTQModel 7.7, vLLM 0.33, transformers 5.23); GPTQModel 7.4 `utils/model.py`, `utils/model_dequant.py`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fewbit.base.errors import InputError
from fewbit.base.manifest import Manifest
from fewbit.base.names import stem
from fewbit.formats.compressed_config import targets
from fewbit.formats.experts import per_expert
from fewbit.formats.kinds import LEAF_GRID, STORED_DTYPE, Affine, affine_of, as_affine, misfit, sibling
from fewbit.formats.table import Assignment, Format, Parts, Stored
from fewbit.num.blocks import CHANNEL, Blocks
from fewbit.num.grid import BF16, F16
from fewbit.num.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from fewbit.num.qtensor import QTensor

BITS = (2, 3, 4, 8)
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # a one in every field of a word


def affine_misfit(
    scheme: Scheme, shape: tuple[int, ...], format_name: str, zeros: tuple[str, ...] = ("none", "code")
) -> str | None:
    """Why a format of the GPTQ family cannot store a weight, or None."""
    affine = affine_of(scheme)
    if (
        affine is None
        or affine.bits not in BITS
        or affine.scale not in (F16, BF16)
        or affine.zero not in ("none", "code")
    ):
        return f"{format_name} stores integers of 2, 3, 4 or 8 bits with f16 or bf16 scales, got {scheme}"
    if scheme.activation is not None:
        return f"{format_name} quantises weights only, got {scheme}"
    if affine.zero not in zeros:
        return f"{format_name} stores symmetric integers here, got {scheme}"
    if affine.blocks != CHANNEL and (affine.blocks.rows != 1 or affine.blocks.cols < 2):
        return f"{format_name} has groups of columns or whole rows, got {affine.blocks.spelling} blocks"
    if len(shape) != 2:
        return f"{format_name} has no stacked weights, got shape {list(shape)}"
    unit = 32 // affine.bits if affine.bits != 3 else 32
    return misfit(shape, columns=max(unit, affine.blocks.cols), rows=unit) or misfit(shape, columns=unit)


def conform(scheme: Scheme, dtype: str) -> Scheme:
    """Scales in BF16 for BF16 models, else in F16."""
    return scheme.with_scale_leaf(BF16 if dtype == "BF16" else F16) if affine_of(scheme) is not None else scheme


def parts(name: str, scheme: Scheme, shape: tuple[int, ...]) -> Parts:
    """Stored tensors of one weight, from its shape alone."""
    affine = as_affine(scheme)
    (rows, cols), (_, groups) = shape, scheme.block_counts(shape)
    return {
        sibling(name, "qweight"): ("I32", (cols * affine.bits // 32, rows)),
        sibling(name, "qzeros"): ("I32", (groups, rows * affine.bits // 32)),
        sibling(name, "scales"): (STORED_DTYPE[affine.scale.name], (groups, rows)),
        sibling(name, "g_idx"): ("I32", (cols,)),
    }


def encode(name: str, q: QTensor, version: int) -> dict[str, torch.Tensor]:
    """The stored tensors of a quantised weight.

    Raises:
        InputError: FB-E0620 for sides that have no place here.
    """
    import torch

    from fewbit.formats.words import in_file_order, refuse_sides
    from fewbit.math.bits import pack

    refuse_sides(name, q, "GPTQ", allowed=("permutation",))
    bits, counts = int(q.scheme.grid.bits), q.scheme.block_counts(q.shape)
    codes, group_index = in_file_order(q)
    if q.code_shift is None:
        codes = (codes.to(torch.int16) + (1 << (bits - 1))).to(torch.uint8)
        zeros = torch.full(counts, 1 << (bits - 1), dtype=torch.int16, device=codes.device)
    else:
        zeros = q.leaf("code_shift").reshape(counts).to(torch.int16)
    return {
        sibling(name, "qweight"): pack(codes, bits, word=torch.int32).mT.contiguous(),
        sibling(name, "qzeros"): _pack_zeros(zeros.mT.contiguous(), bits, version),
        sibling(name, "scales"): q.leaf("scale").reshape(counts).mT.contiguous(),
        sibling(name, "g_idx"): group_index,
    }


def _pack_zeros(zeros: torch.Tensor, bits: int, version: int) -> torch.Tensor:
    """Zero points int16 [groups, rows] -> int32 [groups, rows * bits / 32], minus one in version 1."""
    import torch

    from fewbit.math.bits import pack

    if version == 2:
        return pack(zeros, bits, word=torch.int32)
    if bits == 3:
        return pack((zeros - 1) & 7, bits, word=torch.int32)
    return pack(zeros, bits, word=torch.int32) - _ONES[bits]


def _unpack_zeros(words: torch.Tensor, bits: int, rows: int, version: int) -> torch.Tensor:
    """The inverse: uint8 [groups, rows]."""
    from fewbit.math.bits import unpack

    if version == 2:
        return unpack(words, bits, rows)
    if bits == 3:
        return (unpack(words, bits, rows) + 1) & 7
    return unpack(words + _ONES[bits], bits, rows)


def decode(name: str, read: Callable[[str], torch.Tensor], stored: Stored) -> QTensor:
    """The quantised weight, code for code.

    Raises:
        InputError: FB-E0603 when the config says symmetric and the zero points say otherwise.
    """

    from fewbit.formats.words import signed_codes, sorted_by_group
    from fewbit.math.bits import unpack
    from fewbit.num.qtensor import QTensor

    affine = as_affine(stored.scheme)
    bits, (rows, cols) = affine.bits, stored.shape
    codes = unpack(read(sibling(name, "qweight")).mT.contiguous(), bits, cols)
    zeros = _unpack_zeros(read(sibling(name, "qzeros")), bits, rows, stored.facts["version"]).mT.contiguous()
    scale = read(sibling(name, "scales")).mT.contiguous()
    if affine.zero == "none":
        if bool((zeros != 1 << (bits - 1)).any()):
            found = sorted(set(zeros.flatten().tolist()))[:4]
            problem = f"the config says symmetric (zero point {1 << (bits - 1)}), the tensor has {found}"
            raise InputError("FB-E0603", f"{problem}: wrong `sym` or wrong version", tensor=sibling(name, "qzeros"))
        q = QTensor(stored.scheme, stored.shape, signed_codes(codes, bits), scale)
    else:
        q = QTensor(stored.scheme, stored.shape, codes, scale, zeros)
    return sorted_by_group(q, read(sibling(name, "g_idx")), name) if stored.facts.get("g_idx", True) else q


def settings(assignment: Assignment, version: int) -> dict[str, Any]:
    """The `quantization_config`: the commonest scheme is the base, others become `dynamic` rules."""
    common = Counter(assignment.schemes.values()).most_common(1)[0][0]
    dynamic: dict[str, dict[str, Any]] = {}
    kept = [stem(name) for name in assignment.kept if ".weight" in name and not _outside(name)]
    quantised = [stem(name) for name in assignment.schemes]
    for target in targets(kept, quantised):
        dynamic[f"-:{_pattern(target)}"] = {}
    for scheme in dict.fromkeys(assignment.schemes.values()):
        if scheme != common:
            mine = [stem(name) for name, given in assignment.schemes.items() if given == scheme]
            others = kept + [stem(name) for name, given in assignment.schemes.items() if given != scheme]
            for target in targets(mine, others):
                dynamic[f"+:{_pattern(target)}"] = _words(scheme)
    return {
        **_words(common),
        "desc_act": bool(assignment.options.get("desc_act", False)),
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "lm_head": "lm_head.weight" in assignment.schemes,
        "pack_dtype": "int32",
        "true_sequential": True,
        "damp_percent": 0.01,
        **({"dynamic": dynamic} if dynamic else {}),
        "meta": {"quantizer": ["fewbit"], "solver": assignment.solver},
    }


def _outside(name: str) -> bool:
    """Whether loaders leave a weight alone without being told: embeddings, the head, what is in no block."""
    return not re.search(r"\.\d+\.", name)


def _pattern(target: str) -> str:
    return target[3:] if target.startswith("re:") else f"^{re.escape(target)}$"


def _words(scheme: Scheme) -> dict[str, Any]:
    affine = as_affine(scheme)
    return {"bits": affine.bits, "group_size": affine.blocks.cols or -1, "sym": affine.zero == "none"}


def find(given: dict[str, Any], manifest: Manifest, version: int) -> dict[str, Stored]:
    """The quantised weights of a checkpoint laid out as GPTQ, `given` being its settings.

    Raises:
        InputError: FB-E0621 naming what is missing or does not fit the settings.
    """
    found: dict[str, Stored] = {}
    bases = dict.fromkeys(base for name in manifest if (base := _base(name)) is not None)
    for base in bases:
        words = {**given, **_dynamic(given.get("dynamic") or {}, base)}
        name = f"{base}.weight"
        needed = tuple(f"{base}.{suffix}" for suffix in ("qweight", "qzeros", "scales"))
        lost = [part for part in needed if part not in manifest]
        if lost:
            raise InputError("FB-E0621", "a part of a quantised weight is not stored", tensor=lost[0])
        reorders = f"{base}.g_idx" in manifest
        if not reorders and words.get("desc_act"):
            raise InputError("FB-E0621", "the config says desc_act and no g_idx is stored", tensor=f"{base}.g_idx")
        scheme, shape = _scheme_and_shape(base, words, manifest)
        found[name] = Stored(
            scheme, shape, needed + ((f"{base}.g_idx",) if reorders else ()), {"version": version, "g_idx": reorders}
        )
    return found


def _base(name: str) -> str | None:
    """Module of a stored part, or None: `.scales` alone also names parts of other layouts, so two suffixes decide."""
    for suffix in (".qweight", ".qzeros"):
        if name.endswith(suffix):
            return name[: -len(suffix)]
    return None


def _dynamic(rules: dict[str, dict[str, Any]], module: str) -> dict[str, Any]:
    for rule, words in rules.items():
        if not rule.startswith("-:") and re.match(rule.removeprefix("+:"), module):
            return words
    return {}


def _scheme_and_shape(base: str, words: dict[str, Any], manifest: Manifest) -> tuple[Scheme, tuple[int, int]]:
    qweight, scales, qzeros = (manifest[f"{base}.{suffix}"] for suffix in ("qweight", "scales", "qzeros"))
    bits, group = int(words.get("bits", 4)), int(words.get("group_size", -1))
    scale = LEAF_GRID.get(scales.dtype)
    if bits not in BITS or scale is None or qweight.dtype != "I32":
        raise InputError(
            "FB-E0620", f"GPTQ with {bits} bits and {scales.dtype} scales is not known", tensor=qweight.name
        )
    cols, rows = qweight.shape[0] * 32 // bits, qweight.shape[1]
    groups = 1 if group <= 0 else -(-cols // group)
    if scales.shape != (groups, rows) or qzeros.shape != (groups, rows * bits // 32):
        shapes = f"qweight {list(qweight.shape)}, scales {list(scales.shape)}, qzeros {list(qzeros.shape)}"
        problem = f"{shapes} are not {bits} bits in groups of {group}"
        raise InputError("FB-E0621", f"{problem}: the config lies about bits or group size", tensor=qweight.name)
    blocks = CHANNEL if group <= 0 else Blocks(1, group)
    return Affine(bits, blocks, "none" if words.get("sym", True) else "code", scale).scheme, (rows, cols)


def _format(name: str, version: int, engines: tuple[str, ...]) -> Format:
    def config(source: dict[str, Any], assignment: Assignment) -> tuple[dict[str, Any], dict[str, Any]]:
        words = settings(assignment, version)
        return {**source, "quantization_config": words}, {"quantize_config.json": words}

    def detect(config: dict[str, Any], manifest: Manifest) -> dict[str, Stored] | None:
        given = config.get("quantization_config") or {}
        if given.get("quant_method") != "gptq" or given.get("checkpoint_format", "gptq") not in ("gptq", "gptq_v2"):
            return None
        stored_version = 2 if given.get("checkpoint_format") == "gptq_v2" else 1
        return find(given, manifest, stored_version) if stored_version == version else None

    return Format(
        name=name,
        summary=f"GPTQModel and AutoGPTQ, version {version}: 2, 3, 4, 8 bits",
        container="safetensors",
        default_scheme="int4-g128" if version == 1 else "int4-g128-asym",
        engines=engines,
        accepts=lambda scheme, shape: affine_misfit(scheme, shape, name),
        parts=parts,
        encode=lambda tensor, q: encode(tensor, q, version),
        decode=decode,
        config=config,
        detect=detect,
        conform=conform,
        ordered=True,
    )


FORMAT = per_expert(_format("gptq", 1, ("transformers", "vllm", "vllm-cpu", "sglang", "gptqmodel", "llama.cpp")))
V2 = per_expert(_format("gptq-v2", 2, ("transformers", "vllm", "vllm-cpu", "gptqmodel", "llama.cpp")))
