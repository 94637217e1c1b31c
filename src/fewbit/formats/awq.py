"""AWQ: the layout of AutoAWQ's gemm kernels. Four bits, integer zero points, nothing subtracted from them.

    x.qweight  int32 [in, out / 8]        eight output columns a word, interleaved
    x.qzeros   int32 [in / g, out / 8]    the same
    x.scales   f16 or bf16 [in / g, out]

Nibble i of a word, from the low bits, holds column ORDER[i] of its eight: two halves of even and odd columns, as the kernel reads them.

Source: facts.md B1 (AutoAWQ 0.2, vLLM 0.33).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fewbit.base.errors import InputError
from fewbit.base.manifest import Manifest
from fewbit.base.names import stem
from fewbit.formats.experts import per_expert
from fewbit.formats.gptq import conform
from fewbit.formats.kinds import LEAF_GRID, STORED_DTYPE, Affine, affine_of, as_affine, misfit, sibling, single_scheme
from fewbit.formats.table import Assignment, Format, Parts, Stored
from fewbit.num.blocks import CHANNEL, Blocks
from fewbit.num.grid import BF16, F16
from fewbit.num.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from fewbit.num.qtensor import QTensor

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
INVERSE = tuple(ORDER.index(column) for column in range(8))


def accepts(scheme: Scheme, shape: tuple[int, ...]) -> str | None:
    """None, or why AWQ cannot store this scheme for a weight of this shape."""
    affine = affine_of(scheme)
    if (
        affine is None
        or affine.bits != 4
        or affine.zero != "code"
        or affine.scale not in (F16, BF16)
        or scheme.activation
    ):
        return f"AWQ stores asymmetric 4-bit integers with f16 or bf16 scales (int4-g128-asym), got {scheme}"
    if affine.blocks != CHANNEL and (affine.blocks.rows != 1 or affine.blocks.cols < 2):
        return f"AWQ has groups of columns or whole rows, got {affine.blocks.spelling} blocks"
    if len(shape) != 2:
        return f"AWQ has no stacked weights, got shape {list(shape)}"
    return misfit(shape, columns=affine.blocks.cols or 1, rows=8)


def parts(name: str, scheme: Scheme, shape: tuple[int, ...]) -> Parts:
    """Stored tensors of one weight, from its shape alone."""
    affine = as_affine(scheme)
    (rows, cols), (_, groups) = shape, scheme.block_counts(shape)
    return {
        sibling(name, "qweight"): ("I32", (cols, rows // 8)),
        sibling(name, "qzeros"): ("I32", (groups, rows // 8)),
        sibling(name, "scales"): (STORED_DTYPE[affine.scale.name], (groups, rows)),
    }


def _interleave(codes: torch.Tensor, order: tuple[int, ...]) -> torch.Tensor:
    """uint8 [..., out] with every eight columns put in an order."""
    return codes.unflatten(-1, (-1, 8))[..., list(order)].flatten(-2)


def encode(name: str, q: QTensor) -> dict[str, torch.Tensor]:
    """The stored tensors of a quantised weight.

    Raises:
        InputError: FB-E0620 for sides: AWQ has no place for an order of columns.
    """
    import torch

    from fewbit.formats.words import refuse_sides
    from fewbit.math.bits import pack

    refuse_sides(name, q, "AWQ")
    counts = q.scheme.block_counts(q.shape)
    return {
        sibling(name, "qweight"): pack(_interleave(q.codes.reshape(q.shape).mT, ORDER), 4, word=torch.int32),
        sibling(name, "qzeros"): pack(_interleave(q.leaf("code_shift").reshape(counts).mT, ORDER), 4, word=torch.int32),
        sibling(name, "scales"): q.leaf("scale").reshape(counts).mT.contiguous(),
    }


def decode(name: str, read: Callable[[str], torch.Tensor], stored: Stored) -> QTensor:
    """The quantised weight, code for code."""
    from fewbit.math.bits import unpack
    from fewbit.num.qtensor import QTensor

    rows = stored.shape[0]
    codes, zeros = (
        _interleave(unpack(read(sibling(name, word)), 4, rows), INVERSE).mT.contiguous()
        for word in ("qweight", "qzeros")
    )
    scale = read(sibling(name, "scales")).mT.contiguous()
    return QTensor(stored.scheme, stored.shape, codes, scale, zeros)


def settings(assignment: Assignment) -> dict[str, Any]:
    """The `quantization_config`. AWQ has one scheme for all weights.

    Raises:
        InputError: FB-E0620 when the weights have different schemes.
    """
    scheme = single_scheme(assignment, "AWQ")
    kept = sorted({stem(name) for name in assignment.kept if "embed" not in name and name.endswith(".weight")})
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": scheme.blocks.cols or -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": kept or None,
    }


def config(source: dict[str, Any], assignment: Assignment) -> tuple[dict[str, Any], dict[str, Any]]:
    """The new config.json; AutoAWQ's own quant_config.json says the same in older words."""
    words = settings(assignment)
    older = {"zero_point": True, "q_group_size": words["group_size"], "w_bit": 4, "version": "GEMM"}
    return {**source, "quantization_config": words}, {
        "quant_config.json": {**older, "modules_to_not_convert": words["modules_to_not_convert"]}
    }


def detect(config: dict[str, Any], manifest: Manifest) -> dict[str, Stored] | None:
    """The quantised weights of an AWQ checkpoint in gemm order, or None when the config names another format.

    Raises:
        InputError: FB-E0621 for missing or misshapen parts; FB-E0620 for another kernel order.
    """
    given = config.get("quantization_config") or {}
    if given.get("quant_method") != "awq":
        return None
    if str(given.get("version", given.get("format", "gemm"))).lower() != "gemm":
        raise InputError("FB-E0620", f"AWQ in {given.get('version')} order is not known, only gemm")
    return find(given, manifest)


def find(given: dict[str, Any], manifest: Manifest) -> dict[str, Stored]:
    """The quantised weights of a checkpoint laid out as AWQ, `given` being its settings."""
    bits, group = (
        int(given.get("bits", given.get("w_bit", 4))),
        int(given.get("group_size", given.get("q_group_size", 128))),
    )
    found = {}
    for base in dict.fromkeys(name.rpartition(".")[0] for name in manifest if name.endswith((".qweight", ".qzeros"))):
        needed = tuple(f"{base}.{suffix}" for suffix in ("qweight", "qzeros", "scales"))
        lost = [part for part in needed if part not in manifest]
        if lost:
            raise InputError("FB-E0621", "a part of a quantised weight is not stored", tensor=lost[0])
        qweight, qzeros, scales = (manifest[part] for part in needed)
        cols, rows = qweight.shape[0], qweight.shape[1] * 8
        groups = 1 if group <= 0 else -(-cols // group)
        scale = LEAF_GRID.get(scales.dtype)
        if bits != 4 or scale is None:
            raise InputError(
                "FB-E0620", f"AWQ with {bits} bits and {scales.dtype} scales is not known", tensor=qweight.name
            )
        if scales.shape != (groups, rows) or qzeros.shape != (groups, rows // 8):
            shapes = f"qweight {list(qweight.shape)}, scales {list(scales.shape)}, qzeros {list(qzeros.shape)}"
            problem = f"{shapes} are not 4 bits in groups of {group}: the config lies about the group size"
            raise InputError("FB-E0621", problem, tensor=qweight.name)
        blocks = CHANNEL if group <= 0 else Blocks(1, group)
        found[f"{base}.weight"] = Stored(Affine(4, blocks, "code", scale).scheme, (rows, cols), needed)
    return found


FORMAT = per_expert(
    Format(
        name="awq",
        summary="AutoAWQ's gemm layout: asymmetric 4 bits; vLLM, SGLang, transformers",
        container="safetensors",
        default_scheme="int4-g128-asym",
        engines=("transformers", "vllm", "vllm-cpu", "sglang", "gptqmodel"),
        accepts=accepts,
        parts=parts,
        encode=encode,
        decode=decode,
        config=config,
        detect=detect,
        conform=conform,
        one_scheme=True,
    )
)
