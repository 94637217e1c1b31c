"""Stacked experts in formats that know single layers only: one quantised layer for each expert, under the names that engines look for.

    model.layers.0.mlp.experts.gate_up_proj  [experts, 2 width, in]  ->  ….experts.0.gate_proj.*, ….experts.0.up_proj.*, ….experts.1.…
    model.layers.0.mlp.experts.down_proj     [experts, out, width]   ->  ….experts.0.down_proj.*, …

The gate is the first half of the rows, the up projection the second, as transformers stacks them; models whose experts lie the other way round (in before
out) or whose halves alternate never get here, for they are refused as turned weights. The config remembers what was stacked, so that a
reader of ours puts it together again; other readers see the single layers that they expect.

`per_expert(format)` adds this to a format whose functions take matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fewbit.base.errors import InputError
from fewbit.base.manifest import Manifest
from fewbit.formats.table import Assignment, Format, Parts, Stored
from fewbit.num.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from fewbit.num.qtensor import QTensor

KEY = "fewbit_stacked"  # in config.json: names of the weights that were stacked
_HALVES = ("gate_proj", "up_proj")


def layers_of(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, int, int, int]]:
    """(layer's weight, expert, first row, last row) of a stack [experts, rows, cols], expert by expert."""
    whole = name.removesuffix(".weight")
    base, _, last = whole.rpartition(".")
    experts, rows = shape[0], shape[-2]
    for expert in range(experts):
        if last == "gate_up_proj":
            for half, word in enumerate(_HALVES):
                yield f"{base}.{expert}.{word}.weight", expert, half * rows // 2, (half + 1) * rows // 2
        else:
            yield f"{base}.{expert}.{last}.weight", expert, 0, rows


def per_expert(form: Format) -> Format:
    """The same format, storing stacks [experts, rows, cols] layer by layer."""

    def accepts(scheme: Scheme, shape: tuple[int, ...]) -> str | None:
        if len(shape) != 3:
            return form.accepts(scheme, shape)
        if 0 in shape:
            return f"needs a stack of matrices, got shape {list(shape)}"
        # a stack may be of gates and ups together: its halves must be whole too
        halves = (shape[-2] // 2, shape[-1]) if shape[-2] % 2 == 0 else shape[1:]
        return form.accepts(scheme, shape[1:]) or form.accepts(scheme, halves) or _torn(scheme, shape)

    def parts(name: str, scheme: Scheme, shape: tuple[int, ...]) -> Parts:
        if len(shape) != 3:
            return form.parts(name, scheme, shape)
        found: Parts = {}
        for layer, _, first, last in layers_of(name, shape):
            found |= form.parts(layer, scheme, (last - first, shape[-1]))
        return found

    def encode(name: str, q: QTensor) -> dict[str, torch.Tensor]:
        if len(q.shape) != 3:
            return form.encode(name, q)
        out: dict[str, torch.Tensor] = {}
        for layer, expert, first, last in layers_of(name, q.shape):
            out |= form.encode(layer, matrix_of(q, expert, first, last))
        return out

    def decode(name: str, read: Callable[[str], torch.Tensor], stored: Stored) -> QTensor:
        if "layers" not in stored.facts:
            return form.decode(name, read, stored)
        layers = [form.decode(layer, read, own) for layer, own in stored.facts["layers"]]
        return stack_of(layers, (*stored.shape[:-1], layers[0].shape[-1]))  # columns may be known from the data only

    def config(source: dict[str, Any], assignment: Assignment) -> tuple[dict[str, Any], dict[str, Any]]:
        shapes = assignment.stacks
        schemes: dict[str, Scheme] = {}
        for name, scheme in assignment.schemes.items():
            names = [layer for layer, *_ in layers_of(name, shapes[name])] if name in shapes else [name]
            schemes |= dict.fromkeys(names, scheme)
        stacked = [name for name in assignment.schemes if name in shapes]
        made, beside = form.config(source, replace(assignment, schemes=schemes))
        return ({**made, KEY: {name: shapes[name][0] for name in stacked}} if stacked else made), beside

    def detect(config: dict[str, Any], manifest: Manifest) -> dict[str, Stored] | None:
        found = form.detect(config, manifest)
        for name, experts in (config.get(KEY) or {}).items() if found else ():
            assert found is not None
            layers = [(layer, found.pop(layer, None)) for layer, *_ in layers_of(name, (int(experts), 2, 1))]
            found[name] = _together(name, int(experts), layers)
        return found

    return replace(form, accepts=accepts, parts=parts, encode=encode, decode=decode, config=config, detect=detect)


def _torn(scheme: Scheme, shape: tuple[int, ...]) -> str | None:
    """Why halves of the rows cannot be cut from a stack, or None: tiles must end where the halves do."""
    rows = scheme.blocks.rows
    if rows > 1 and shape[-2] // 2 % rows:
        return f"needs halves of whole tiles of {rows} rows, got {shape[-2]} rows"
    return "has no flat blocks across experts" if scheme.blocks.flat else None


def _together(name: str, experts: int, layers: list[tuple[str, Stored | None]]) -> Stored:
    """One stack from the layers that were found.

    Raises:
        InputError: FB-E0621 when one is missing, or they differ.
    """
    lost = [layer for layer, own in layers if own is None]
    if lost:
        raise InputError(
            "FB-E0621", f"{len(lost)} layer(s) of the stacked experts {name} are not stored", tensor=lost[0]
        )
    held = [(layer, own) for layer, own in layers if own is not None]
    first = held[0][1]
    odd = [layer for layer, own in held if own.scheme != first.scheme or own.shape != first.shape]
    if odd:
        raise InputError("FB-E0621", f"layers of the stacked experts {name} differ in scheme or shape", tensor=odd[0])
    rows = first.shape[-2] * (len(held) // experts)
    parts = tuple(part for _, own in held for part in own.parts)
    facts = {"layers": tuple(held), "read_shape": any(own.facts.get("read_shape") for _, own in held)}
    return Stored(first.scheme, (experts, rows, first.shape[-1]), parts, facts)


def matrix_of(q: QTensor, expert: int, first: int, last: int) -> QTensor:
    """Rows [first, last) of one expert of a stack, as a quantised matrix."""
    from fewbit.num.qtensor import QTensor

    rows, per = q.shape[-2], q.scheme.blocks.rows
    codes = q.codes.reshape(*q.shape[:-1], -1)[expert, first:last]
    shape = (last - first, q.shape[-1])
    made: dict[str, Any] = {}
    for name, part in q.scheme.parts():
        stored = getattr(q, name)
        counts = q.scheme.block_counts(q.shape)  # [experts, block rows, block cols]
        start, stop = (0, counts[-2]) if per == 0 else (first // per, -(-last // per) if last < rows else counts[-2])
        if isinstance(stored, QTensor):
            made[name] = matrix_of(replace(stored, shape=counts), expert, start, stop)
        else:
            own = part.block_counts(counts)
            cut = stored.reshape(own)[expert]
            made[name] = cut[start:stop] if own[-2] == counts[-2] else cut
    return QTensor(q.scheme, shape, codes.contiguous(), **made, sides=dict(q.sides))


def stack_of(layers: list[QTensor], shape: tuple[int, ...]) -> QTensor:
    """The inverse: layers in the order of `layers_of` as a stack [experts, rows, cols].

    Raises:
        InputError: FB-E0621 when halves of one expert disagree about a scale that they share in the stack.
    """
    import torch

    from fewbit.num.qtensor import QTensor

    experts, first = shape[0], layers[0]
    halves = len(layers) // experts

    def joined(pieces: list[torch.Tensor], counts: tuple[int, ...]) -> torch.Tensor:
        """Parts [rows, cols] of all layers -> [experts, rows, cols]; one that all halves share must be the same in each."""
        stacked = torch.stack([piece.reshape(-1, counts[-1]) for piece in pieces])
        grouped = stacked.reshape(experts, halves, *stacked.shape[1:])
        if counts[-2] == halves * stacked.shape[1]:
            return grouped.reshape(counts)
        if any(not torch.equal(grouped[:, 0], grouped[:, half]) for half in range(1, halves)):
            raise InputError(
                "FB-E0621",
                "gate and up projections of an expert have scales of their own where they were stacked under one",
            )
        return grouped[:, 0].reshape(counts)

    made: dict[str, Any] = {}
    for name, part in first.scheme.parts():
        counts = first.scheme.block_counts(shape)
        held = [getattr(layer, name) for layer in layers]
        if isinstance(held[0], QTensor):
            whole = (experts, counts[-2], counts[-1])
            share = counts[-2] != halves * held[0].shape[-2]
            made[name] = stack_of([held[index] for index in range(0, len(held), halves)] if share else held, whole)
        else:
            made[name] = joined(held, part.block_counts(counts))
    if any(layer.sides for layer in layers):
        made["sides"] = first.sides
    codes = joined(
        [layer.codes.reshape(layer.shape[-2], -1) for layer in layers], (experts, shape[-2], first.codes.shape[-1])
    )
    return QTensor(first.scheme, tuple(shape), codes, **made)
