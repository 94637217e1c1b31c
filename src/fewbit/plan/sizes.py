"""How many bytes a model takes in each scheme, metadata included, tensor by tensor.

A `Storage` is one way to store a whole model: a scheme for the matrices that engines multiply by, and what becomes of the rest. Two
conventions exist: safetensors formats leave embeddings, head, routers and norms as they were; GGUF quantises embeddings and head
too, by llama.cpp's recipes, and keeps vectors and routers in F32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, prod

from fewbit.base.manifest import data_bytes
from fewbit.formats.gguf.types import FLOATS, block_type
from fewbit.formats.table import Format, format_named
from fewbit.num.scheme import Scheme, parse_scheme
from fewbit.plan.shapes import Model, Weight
from fewbit.plan.sizes_gguf import Piece, extra_bytes, gguf_pieces


@dataclass(frozen=True)
class Storage:
    """One way to store a model.

    Attributes:
        label: as people call it.
        spelling: scheme of the matrices.
        target: what `fewbit quantize --to` takes, "" for plain dtypes.
        compute: dtype in which an engine multiplies: bf16 for weight-only schemes.
        container: safetensors or gguf.
    """

    label: str
    spelling: str
    target: str
    compute: str = "bf16"
    container: str = "safetensors"

    @property
    def scheme(self) -> Scheme:
        return parse_scheme(self.spelling)

    @property
    def plain(self) -> bool:
        """Whether this is only a dtype for every tensor."""
        return self.scheme.is_leaf


STORAGES: dict[str, Storage] = {
    row.label: row
    for row in (
        Storage("FP32", "f32", "dense-f32:f32", "fp32"),
        Storage("BF16", "bf16", ""),
        Storage("FP8", "fp8-e4m3-channel", "compressed-tensors:w8a8-fp8", "fp8"),
        Storage("INT8 W8A8", "int8-channel", "compressed-tensors:w8a8", "int8"),
        Storage("Q8_0", "q8_0", "gguf:Q8_0", container="gguf"),
        Storage("Q6_K", "q6_k", "gguf:Q6_K", container="gguf"),
        Storage("Q5_K_M", "q5_k", "gguf:Q5_K_M", container="gguf"),
        Storage("NVFP4", "nvfp4", "compressed-tensors:nvfp4"),
        Storage("NVFP4 W4A4", "nvfp4", "compressed-tensors:nvfp4+nvfp4-static", "fp4"),
        Storage("INT4 g32", "int4-g32", "compressed-tensors:int4-g32"),
        Storage("Q4_K_M", "q4_k", "gguf:Q4_K_M", container="gguf"),
        Storage("IQ4_XS", "iq4_xs", "gguf:IQ4_XS", container="gguf"),
        Storage("MXFP4", "mxfp4", "compressed-tensors:mxfp4"),
        Storage("INT4 g128", "int4-g128", "compressed-tensors:int4-g128"),
        Storage("INT4 g128 asym", "int4-g128-asym", "awq:int4-g128-asym"),
        Storage("NF4", "nf4-flat64-dq", "bitsandbytes:nf4-flat64-dq"),
        Storage("Q3_K_M", "q3_k", "gguf:Q3_K_M", container="gguf"),
        Storage("Q2_K", "q2_k", "gguf:Q2_K", container="gguf"),
        Storage("MLX 8-bit", "uint8-g64-min", "mlx:uint8-g64-min"),
        Storage("MLX 4-bit", "uint4-g64-min", "mlx:uint4-g64-min"),
    )
}


# the storages that `fewbit plan` lists; the others differ from one of these in a detail only
LISTED = (
    "FP32",
    "BF16",
    "FP8",
    "INT8 W8A8",
    "Q8_0",
    "Q6_K",
    "Q5_K_M",
    "NVFP4",
    "Q4_K_M",
    "IQ4_XS",
    "MXFP4",
    "INT4 g128",
    "NF4",
    "Q3_K_M",
    "Q2_K",
)


@dataclass(frozen=True)
class Held:
    """How all tensors of one `Weight` are held: scheme (None for a plain dtype), bytes, and how many of those are scales and shifts."""

    scheme: Scheme | None
    nbytes: int
    metadata: int


@functools.lru_cache(maxsize=256)
def held(model: Model, storage: Storage) -> tuple[Held, ...]:
    """How every row of `model.weights` is held.

    Layers that are alike are computed once.
    """
    if storage.container == "gguf":
        return tuple(map(_in_gguf, gguf_pieces(model, storage.target.removeprefix("gguf:"))))
    known: dict[tuple, Held] = {}
    found = []
    for weight in model.weights:
        key = (weight.shape, weight.matrix, weight.dtype, weight.kept, weight.transposed, weight.count)
        if key not in known:
            known[key] = _in_safetensors(weight, storage)
        found.append(known[key])
    return tuple(found)


def _in_safetensors(weight: Weight, storage: Storage) -> Held:
    """What the format itself would store; kept weights, and those that it cannot hold in this scheme, stay in their own dtype.

    Without a target there is no format: then a weight takes what its scheme needs.
    """
    name, _, spelling = storage.target.partition(":")
    if storage.plain or not name:
        scheme = storage.scheme
        nbytes = -(-scheme.storage_bits(weight.matrix) // 8) * weight.count
        return Held(scheme, nbytes, -(-metadata_bits(scheme, weight.matrix) // 8) * weight.count)
    if weight.kept:
        return Held(None, weight.nbytes, 0)
    form = format_named(name)
    scheme = form.conform(parse_scheme(spelling), weight.dtype)
    if misfit(weight, form, scheme) is not None:
        return Held(None, weight.nbytes, 0)
    parts = form.parts(weight.name.replace("*", "0"), scheme, weight.matrix)
    nbytes = sum(data_bytes(dtype, shape) for dtype, shape in parts.values())
    codes = ceil(prod(weight.matrix) * Fraction(scheme.grid.bits) / scheme.grid.dim / 8)
    return Held(scheme, nbytes * weight.count, (nbytes - codes) * weight.count)


def misfit(weight: Weight, form: Format, scheme: Scheme) -> str | None:
    """Why a format cannot hold a weight in a scheme, or None; the same that `plan.resolve` finds."""
    reason = form.accepts(scheme, weight.matrix)
    if reason is None and weight.transposed and form.name != "dense":
        return f"this layer is stored [in, out] (Conv1D), which loaders of {form.name} do not know"
    return reason


@functools.lru_cache(maxsize=4096)
def _in_gguf(pieces: tuple[Piece, ...]) -> Held:
    nbytes = metadata = 0
    for type_name, shape in pieces:
        columns = shape[-1] if shape else 1
        row = block_type(type_name)
        nbytes += prod(shape) // max(1, columns) * row.row_bytes(columns)
        metadata += metadata_bits(row.scheme, shape) // 8
    first = pieces[0][0]
    return Held(None if first in FLOATS else block_type(first).scheme, nbytes, metadata)


def all_bytes(model: Model, storage: Storage) -> tuple[int, ...]:
    """Bytes of every weight of a model, in the order of `model.weights`."""
    return tuple(row.nbytes for row in held(model, storage))


@dataclass(frozen=True)
class Size:
    """A model in one storage.

    Attributes:
        total: bytes of all weights.
        active: bytes that one token's pass reads: no embedding rows but its own, no expert but the chosen.
        by_kind: bytes by kind of weight.
        quantised: share of the parameters that is stored in the storage's scheme.
        metadata: bytes of scales and shifts.
    """

    storage: Storage
    total: int
    active: int
    by_kind: dict[str, int]
    quantised: float
    metadata: int
    params: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.total / max(1, self.params)


@functools.lru_cache(maxsize=256)
def size_of(model: Model, storage: Storage) -> Size:
    """Bytes of a model in one storage."""
    total = extra_bytes(model) if storage.container == "gguf" else 0
    active = metadata = covered = 0
    by_kind: dict[str, int] = {}
    for weight, row in zip(model.weights, held(model, storage), strict=True):
        nbytes = row.nbytes
        total += nbytes
        metadata += row.metadata
        by_kind[weight.kind] = by_kind.get(weight.kind, 0) + nbytes
        active += active_bytes(model, weight, nbytes)
        if row.scheme is not None:
            covered += weight.numel
    return Size(storage, total, active, by_kind, covered / max(1, model.params), metadata, model.params)


def active_bytes(model: Model, weight: Weight, nbytes: int) -> int:
    """Of a weight's bytes, those that one token's pass reads."""
    if weight.role == "position" or (weight.role == "embed" and not model.tied) or weight.kind == "vision":
        return 0
    return round(nbytes * model.share(weight))


def metadata_bits(scheme: Scheme, shape: tuple[int, ...]) -> int:
    """Bits of scales and shifts of a tensor of this shape."""
    return sum(part.storage_bits(scheme.block_counts(shape)) for _, part in scheme.parts())


def count_by_kind(model: Model) -> dict[str, tuple[int, int, int]]:
    """kind -> (tensors, parameters, bytes in their own dtype), largest first."""
    found: dict[str, tuple[int, int, int]] = {}
    for weight in model.weights:
        tensors, params, nbytes = found.get(weight.kind, (0, 0, 0))
        found[weight.kind] = (tensors + weight.count, params + weight.numel, nbytes + weight.nbytes)
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def predicted_bytes(jobs: Iterable) -> int:
    """Bytes of tensor data that jobs of a plan will write: the sum of what each `writes` promises."""
    return sum(job.nbytes for job in jobs)
