"""Conversion to GGUF and from it: codes move whole rows at a time (rotary order, stacked experts, cut or joined qkv), so no float comes between.

    to GGUF     every planned tensor takes the block type that holds its sources' codes; where none does, the type of their width, rounded anew
    from GGUF   a weight of the checkpoint is made of the rows of one or several GGUF tensors: which, is found by sending row numbers the same way

NVFP4's scale over a whole tensor lies in a GGUF beside the blocks: `blk.0.attn_q.weight` and `blk.0.attn_q.scale`, one number per expert.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch

from fewbit.base.errors import InputError
from fewbit.formats.exchange import KINDS, Conversion, predicted_error, to_scheme
from fewbit.formats.gguf import ops
from fewbit.formats.gguf.codecs import from_blocks
from fewbit.formats.gguf.encode import checkpoint_tensor, source_values, tensor_bytes
from fewbit.formats.gguf.plan import GgufPlan, PlannedTensor, gguf_plan
from fewbit.formats.gguf.recipes import FALLBACKS, quantisable, recipe_names
from fewbit.formats.gguf.shapes import parse
from fewbit.formats.gguf.types import FLOATS, TYPES, BlockType, block_type
from fewbit.formats.gguf.vocabulary import FILES
from fewbit.formats.kinds import is_nvfp4
from fewbit.formats.regrid import regrid
from fewbit.formats.table import Stored
from fewbit.math.metrics import relative_error
from fewbit.math.scales import Search, quantize
from fewbit.num.grid import F32, VectorGrid
from fewbit.num.qtensor import QTensor, code_dtype
from fewbit.num.scheme import Scheme, leaf, parse_scheme
from fewbit.run.gguf_source import GLOBAL_SCALE, GgufAsCheckpoint
from fewbit.run.source import Source

NVFP4 = parse_scheme("nvfp4")
BY_WIDTH = {1: "Q2_K", 2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K"}  # wider ones take Q8_0


def plan_to_gguf(source: Source, spelling: str, dtype: str) -> tuple[dict[str, Conversion], GgufPlan]:
    """What becomes of each quantised weight in a GGUF, and the file.

    Args:
        spelling: a recipe or type, for the weights that are quantised; "" takes for each the type that holds its codes.
        dtype: of the model (F32, F16, BF16), for what is not quantised.

    Raises:
        InputError: as `gguf_plan`.
    """
    files = {path.name: path.read_bytes() for path in source.checkpoint.aux_files if path.name in FILES}
    words: dict[str, Any] = {"name": source.root.name}

    def planned(recipe: str, overrides: dict[str, str] | None = None) -> GgufPlan:
        return gguf_plan(source.manifest, source.config, files, recipe, overrides, **words)

    upper = spelling.upper().replace("-", "_")
    asked = spelling and (f"pure-{upper}" if upper in TYPES and upper not in recipe_names() else spelling)
    first = planned(asked or f"pure-{dtype}")
    types = {}  # what is not quantised stays as it is, whatever a recipe would do to it
    for tensor in first.tensors:
        if quantisable(tensor.name, tensor.shape):
            schemes = _schemes(tensor, source)
            types[tensor.name] = (tensor.type if asked else _best_type(schemes, tensor).name) if schemes else dtype
    common = Counter(kind for kind in types.values() if kind not in FLOATS).most_common(1)
    plan = planned(asked or f"pure-{common[0][0] if common else dtype}", types)
    found: dict[str, Conversion] = {}
    for tensor in plan.tensors:
        for name in tensor.reads:
            if name in source.stored:
                done = _fate(source.stored[name], tensor)
                worse = found.get(name)
                found[name] = done if worse is None or _rank(done) > _rank(worse) else worse
    return found, _with_global_scales(plan, source)


def _rank(one: Conversion) -> tuple[int, float]:
    return KINDS[one.kind], one.error


def _schemes(tensor: PlannedTensor, source: Source) -> list[Scheme]:
    """The schemes of a planned tensor's sources, empty unless all are quantised."""
    if not tensor.reads or any(name not in source.stored for name in tensor.reads):
        return []
    return list(dict.fromkeys(source.stored[name].scheme for name in tensor.reads))


def _moves_rows(steps: Sequence[str]) -> bool:
    """Whether ops leave rows whole, so that codes can follow them."""
    words = [parse(step) for step in steps]
    return all(
        word in ("stack", "permute_rope", "unfold") or (word == "slice" and numbers[0] < -1) for word, numbers in words
    )


def _target(row: BlockType, schemes: Sequence[Scheme]) -> Scheme:
    """The scheme of a type; NVFP4 keeps the scale over the tensor where the sources have one."""
    held = row.name == "NVFP4" and all(is_nvfp4(scheme.weights_only) for scheme in schemes)
    return NVFP4 if held else row.scheme


def _best_type(schemes: list[Scheme], tensor: PlannedTensor) -> BlockType:
    """The type that does least harm to a tensor, in the fewest bits among equals."""
    judged: list[tuple[tuple[int, float], float, BlockType]] = []
    for row in TYPES.values() if _moves_rows(tensor.ops) else ():
        searched = (
            isinstance(row.scheme.grid, VectorGrid) and row.scheme not in schemes
        )  # i-quants are searched, not moved to
        if row.name in FLOATS or searched or row.accepts(tensor.shape) is not None:
            continue
        fates = [to_scheme(scheme, _target(row, schemes), tensor.shape) for scheme in schemes]
        if all(one.by_codes for one in fates):
            judged.append((max(_rank(one) for one in fates), row.bits, row))
    if judged:
        return min(judged, key=lambda item: item[:2])[2]
    width = max(round(float(scheme.grid.bits) / scheme.grid.dim) for scheme in schemes)
    row = block_type(BY_WIDTH.get(width, "Q8_0"))
    while row.accepts(tensor.shape) is not None:
        row = block_type(FALLBACKS.get(row.name, "F16"))
    return row


def _fate(stored: Stored, tensor: PlannedTensor) -> Conversion:
    """What becomes of one weight in a planned tensor."""
    row = block_type(tensor.type)
    if row.name == "F32":
        return Conversion("exact", row.scheme, "values as F32")
    if row.name in FLOATS:
        return Conversion("re-gridded", row.scheme, f"values rounded to {row.name}", predicted_error(row.scheme))
    target = _target(row, [stored.scheme])
    moved = to_scheme(stored.scheme, target, stored.shape)
    if _moves_rows(tensor.ops) or not moved.by_codes:
        return moved
    error = predicted_error(target.weights_only)
    return Conversion("re-gridded", target, f"stored the other way round: values rounded anew to {target}", error)


def _with_global_scales(plan: GgufPlan, source: Source) -> GgufPlan:
    """The plan with a tensor of scales beside every NVFP4 tensor whose sources have one over all their blocks."""
    made: list[PlannedTensor] = []
    for tensor in plan.tensors:
        made.append(tensor)
        schemes = _schemes(tensor, source)
        if tensor.type == "NVFP4" and schemes and _target(block_type("NVFP4"), schemes) == NVFP4:
            count = prod(tensor.shape[:-2])
            beside = tensor.name.removesuffix("weight") + GLOBAL_SCALE
            made.append(PlannedTensor(beside, (), (), (count,), "F32", "F32", None, "scale over the whole tensor"))
    return replace(plan, tensors=tuple(made))


def gguf_tensors(
    plan: GgufPlan, source: Source, errors: dict[str, float]
) -> Iterator[tuple[str, torch.Tensor, tuple[str, ...]]]:
    """(name, bytes, source weights) of every tensor of the file, in its order; `errors` gets the relative error of what moved.

    Raises:
        InputError: from decoding; FB-E0314 for values that do not fit.
    """
    scales: dict[str, torch.Tensor] = {}
    for tensor in plan.tensors:
        if tensor.name in scales:
            yield tensor.name, scales.pop(tensor.name).view(torch.uint8), ()
            continue
        if tensor.type in FLOATS:
            yield tensor.name, tensor_bytes(tensor, source_values(tensor, source.read)), tensor.reads
            _note_cast(tensor, source, errors)
            continue
        q = _quantised(tensor, source, errors)
        if is_nvfp4(q.scheme):
            q, over = _apart(q)
            scales[tensor.name.removesuffix("weight") + GLOBAL_SCALE] = over
        yield tensor.name, tensor_bytes(tensor, q), tensor.reads


def _note_cast(tensor: PlannedTensor, source: Source, errors: dict[str, float]) -> None:
    """What a quantised weight loses as plain floats."""
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[tensor.type]
    for name in tensor.reads:
        if name in source.stored:
            values = source.read(name).float()
            if not torch.equal(values, values.to(dtype).float()):
                errors[name] = relative_error(values, values.to(dtype).float())


def _quantised(tensor: PlannedTensor, source: Source, errors: dict[str, float]) -> QTensor:
    """A planned tensor from the codes of its sources, or from their values where codes cannot follow."""
    assert tensor.scheme is not None
    held = [source.qtensor(name) for name in tensor.reads]
    qs = [q for q in held if q is not None]
    if len(qs) == len(held) and _moves_rows(tensor.ops):
        target = _target(block_type(tensor.type), [q.scheme for q in qs])
        moved = [regrid(q, target) for q in qs]
        for name, (_, error) in zip(tensor.reads, moved, strict=True):
            if error:
                errors[name] = max(error, errors.get(name, 0.0))
        parts = [_bare(q) for q, _ in moved]
        if target != NVFP4:
            return ops.apply_quantised(tensor.ops, parts)
        blocks = ops.apply_quantised(tensor.ops, [_apart(q)[0] for q in parts])
        return _together(blocks, torch.cat([_apart(q)[1] for q in parts]))
    values = source_values(tensor, source.read)
    q = quantize(tensor.scheme, values, search=Search())
    error = relative_error(values, q.dequantize())
    errors.update({name: error for name in tensor.reads if name in source.stored and error})
    return q


def _bare(q: QTensor) -> QTensor:
    """Without an activation scale or other notes of where it came from: a GGUF has no place for them."""
    return replace(q, scheme=q.scheme.weights_only, sides={})


def _apart(q: QTensor) -> tuple[QTensor, torch.Tensor]:
    """NVFP4 as ggml has it: blocks under their E4M3 scales, and the scales over whole matrices float32 [matrices]."""
    scale = q.nested("scale")
    row = block_type("NVFP4")
    blocks = QTensor(row.scheme, q.shape, q.codes, scale.codes.view(torch.float8_e4m3fn))
    return blocks, scale.leaf("scale").float().reshape(-1)


def _together(blocks: QTensor, over: torch.Tensor) -> QTensor:
    """The inverse of `_apart`; one number serves all matrices where there is only one."""
    batch = blocks.shape[:-2]
    over = over.reshape(-1).expand(prod(batch)).reshape((*batch, 1, 1)).contiguous()
    counts = NVFP4.block_counts(blocks.shape)
    scale = QTensor(NVFP4.part("scale"), counts, blocks.leaf("scale").view(torch.uint8), over)
    return QTensor(NVFP4, blocks.shape, blocks.codes, scale)


class GgufQuantised(GgufAsCheckpoint):
    """A GGUF under its checkpoint's names with its weights left quantised, so that their codes can go to another format.

    Raises:
        InputError: FB-E0320 for an architecture without a way back.
    """

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        found = {name: self._found(name) for name in self.manifest}
        self.stored = {name: stored for name, stored in found.items() if stored is not None}
        if not self.config.get("torch_dtype") and not self.config.get("dtype"):
            self.config = {**self.config, "torch_dtype": "float16"}  # what the scales of blocks are

    def _found(self, name: str) -> Stored | None:
        """How a weight is stored; a leaf of float32 stands for one whose rows are not whole in the GGUF."""
        targets = [target for target, _ in self._readers[name]]
        held = self.checkpoint.manifest
        kinds = {held[target.name].dtype.removeprefix("GGML:") for target in targets}
        if kinds <= set(FLOATS) or len(self.manifest[name].shape) < 2:
            return None
        parts = tuple(dict.fromkeys(target.name for target in targets))
        shape = tuple(self.manifest[name].shape)
        if len(kinds) > 1 or not all(_moves_rows(target.ops) for target in targets):
            return Stored(leaf(F32), shape, parts)
        row = block_type(kinds.pop())
        over = row.name == "NVFP4" and len(parts) == 1 and self.global_scale(parts[0]) is not None
        return Stored(NVFP4 if over else row.scheme, shape, parts, {"type": row.name})

    def qtensor(self, name: str) -> QTensor | None:
        """The weight with the codes of its rows, in the checkpoint's order."""
        stored = self.stored.get(name)
        if stored is None:
            return None
        if stored.scheme.is_leaf:
            values = checkpoint_tensor(name, self._readers, self._values).float().contiguous()
            return QTensor(stored.scheme, stored.shape, values.view(code_dtype(F32)))
        kind, held = stored.facts["type"], self.checkpoint.manifest
        start, pieces, tables = 0, [], []
        for target, index in self._readers[name]:
            shape = held[target.name].shape
            count = prod(shape[:-1])
            pieces.append(from_blocks(kind, self.checkpoint.read(target.name), shape))
            rows = torch.arange(start, start + count).reshape(*shape[:-1], 1)
            tables.append((target.ops, rows, index))
            start += count
        order = ops.restore(tables).reshape(-1)
        q = gather_rows(pieces, order, stored.shape)
        if stored.scheme == NVFP4:
            over = self.global_scale(stored.parts[0])
            assert over is not None
            index = self._readers[name][0][1]
            return _together(q, over if prod(q.shape[:-2]) > 1 or over.numel() == 1 else over[index : index + 1])
        return q

    def read(self, name: str) -> torch.Tensor:
        """The values: of a quantised weight decoded, in float32."""
        q = self.qtensor(name)
        return q.dequantize() if q is not None else super().read(name)


def gather_rows(pieces: Sequence[QTensor], order: torch.Tensor, shape: tuple[int, ...]) -> QTensor:
    """Rows of quantised tensors of one scheme, counted through all of them, as a tensor of `shape`.

    Raises:
        InputError: FB-E0603 when a part is not stored row by row.
    """
    first = pieces[0]
    rows = sum(prod(piece.shape[:-1]) for piece in pieces)

    def picked(parts: Sequence[torch.Tensor], last: int) -> torch.Tensor:
        flat = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
        if flat.shape[0] != rows:
            raise InputError("FB-E0603", f"{first.scheme} is not stored row by row")
        return flat[order].reshape(*shape[:-1], last)

    made: dict[str, Any] = {}
    for name, part in first.scheme.parts():
        held = [getattr(piece, name) for piece in pieces]
        if isinstance(held[0], QTensor):
            counts = (*shape[:-1], held[0].shape[-1])
            made[name] = gather_rows(held, order, counts)
        else:
            entries = part.block_counts(first.scheme.block_counts(first.shape))
            made[name] = picked([one.reshape(-1, entries[-1]) for one in held], entries[-1])
    codes = picked([piece.codes for piece in pieces], first.codes.shape[-1])
    return QTensor(first.scheme, tuple(shape), codes, **made)
