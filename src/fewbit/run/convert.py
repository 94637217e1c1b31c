"""Convert: a quantised checkpoint in another format, weight by weight, decode -> (regrid) -> encode, with no float between where the grids permit.

What will happen to each weight is known beforehand from headers alone (`plan_conversion`): exact, re-gridded with a predicted error, lossy, or
impossible. Impossible ones stop the conversion before it writes anything; a lossy one does unless it is allowed.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fewbit
from fewbit.base.errors import InputError, Refusals
from fewbit.base.record import plain, readable_json
from fewbit.formats.exchange import KINDS, Conversion, conversion, out_of_order
from fewbit.formats.gguf.plan import GgufPlan
from fewbit.formats.kinds import kv_scale
from fewbit.formats.regrid import regrid
from fewbit.formats.table import Assignment, Format, format_named
from fewbit.num.scheme import Scheme, parse_scheme
from fewbit.run.source import DTYPE_NAMES, Source, open_source
from fewbit.store.layout import lay_out
from fewbit.store.tensors import as_bytes
from fewbit.store.writer import ShardWriter

SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class ConversionPlan:
    """What becomes of a checkpoint in another format.

    Attributes:
        source, target: format names; the source's is "dense" for plain weights.
        weights: weight name -> what becomes of it.
        kept: tensors that are copied as they are.
        dropped: scales of cached keys and values that the target has no place for: caches of 16 bits need none.
        gguf: the file to write, where the target is one.
    """

    source: str
    target: str
    weights: dict[str, Conversion]
    kept: tuple[str, ...]
    dropped: tuple[str, ...] = ()
    gguf: GgufPlan | None = None

    @property
    def counts(self) -> dict[str, int]:
        """Weights of each kind: exact, re-gridded, lossy, impossible."""
        return dict(Counter(one.kind for one in self.weights.values()))

    def record(self) -> dict[str, Any]:
        """Plain data for `--json`: per weight its kind, schemes, what happens and the predicted error."""
        weights = {
            name: {
                "kind": one.kind,
                "scheme": str(one.scheme) if one.scheme else None,
                "how": one.how,
                "error": one.error,
            }
            for name, one in self.weights.items()
        }
        return {
            "source": self.source,
            "target": self.target,
            "counts": self.counts,
            "weights": weights,
            "kept": list(self.kept),
            "dropped": list(self.dropped),
        }


@dataclass(frozen=True)
class Converted:
    """What a conversion did: the plan, where it lies, and the measured relative error of every weight that moved."""

    plan: ConversionPlan
    out: Path
    errors: dict[str, float]
    nbytes: int

    @property
    def exact(self) -> bool:
        """Whether no value changed."""
        return not self.errors

    def record(self) -> dict[str, Any]:
        return {
            **self.plan.record(),
            "out": str(self.out),
            "errors": self.errors,
            "exact": self.exact,
            "bytes": self.nbytes,
        }


def plan_conversion(source: Source, target: str) -> ConversionPlan:
    """What becomes of each weight, from headers alone.

    Args:
        target: `FORMAT` or `FORMAT:SCHEME`.

    Raises:
        InputError: FB-E0604 or FB-E0601 for unknown words; FB-E0622 for a source with nothing to convert; FB-E0320 to FB-E0330 for a GGUF
            of a model that has no table.
    """
    name, _, spelling = target.partition(":")
    form = format_named(name)
    if not source.quantised:
        raise InputError(
            "FB-E0622", "the checkpoint is not quantised: there are no codes to carry over", file=source.root
        )
    held = source.format.name if source.format else "dense"
    source = convertible(source)
    dtype = model_dtype(source)
    if form.container == "gguf":
        if held == name:
            raise InputError("FB-E0622", "a GGUF becomes another GGUF by `fewbit quantize`", file=source.root)
        from fewbit.run.convert_gguf import plan_to_gguf

        found, planned = plan_to_gguf(source, spelling, dtype)
        if _reordered(source):
            found = {weight: out_of_order(one, name) for weight, one in found.items()}
        return ConversionPlan(held, name, found, *_others(source, form, found), gguf=planned)
    wanted = parse_scheme(spelling) if spelling else None
    weights = {
        weight: conversion(stored.scheme, tuple(stored.shape), name, dtype, wanted)
        for weight, stored in source.stored.items()
    }
    if _reordered(source) and not form.ordered:
        weights = {weight: out_of_order(one, name) for weight, one in weights.items()}
    if form.one_scheme and len({one.scheme for one in weights.values()}) > 1:
        weights = _agreed(source, name, dtype, weights)
    return ConversionPlan(held, name, weights, *_others(source, form, weights))


def _others(source: Source, form: Format, weights: Container[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(tensors to copy, scales of cached keys and values that have no place in a format)."""
    rest = [name for name in source.manifest if name not in weights]
    dropped = [name for name in rest if form.kv_scale is None and kv_scale(name) is not None]
    return tuple(name for name in rest if name not in dropped), tuple(dropped)


def _name_in(form: Format, name: str) -> str:
    """Name of a copied tensor in a format: scales of cached keys and values have one in each."""
    place = kv_scale(name)
    return form.kv_scale(*place) if place is not None and form.kv_scale is not None else name


def convertible(source: Source) -> Source:
    """The source under its checkpoint's names, weights still quantised: a GGUF has names and layouts of its own."""
    if source.format is None or source.format.container != "gguf":
        return source
    from fewbit.run.convert_gguf import GgufQuantised

    return source if isinstance(source, GgufQuantised) else GgufQuantised(source)


def _reordered(source: Source) -> bool:
    """Whether columns may lie in an order of their own (GPTQ's `desc_act`); the data would say, the config says so beforehand."""
    settings = source.checkpoint.config.get("quantization_config") or {}
    return bool(settings.get("desc_act")) and any(stored.facts.get("g_idx") for stored in source.stored.values())


def _agreed(source: Source, target: str, dtype: str, weights: dict[str, Conversion]) -> dict[str, Conversion]:
    """One scheme for all weights: of those chosen one by one, that with which the worst weight fares best."""
    plans = [
        {
            name: conversion(source.stored[name].scheme, tuple(source.stored[name].shape), target, dtype, wanted)
            for name in weights
        }
        for wanted in dict.fromkeys(one.scheme for one in weights.values() if one.scheme is not None)
    ]
    return min(plans, key=lambda plan: max((KINDS[one.kind], one.error) for one in plan.values()))


def model_dtype(source: Source) -> str:
    """Safetensors word for the dtype that the model computes in."""
    return DTYPE_NAMES.get(str(source.config.get("torch_dtype") or source.config.get("dtype") or "bfloat16"), "BF16")


def convert(
    path: str | Path | Source,
    to: str,
    out: str | Path,
    *,
    allow_lossy: bool = False,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    on_weight: Callable[[str, Conversion, float], None] | None = None,
) -> Converted:
    """Writes a quantised checkpoint in another format.

    Args:
        path: the checkpoint, as a path or open.
        to: `FORMAT` or `FORMAT:SCHEME`.
        out: folder to write; it appears when it is whole.
        allow_lossy: whether weights may lose bits.
        on_weight: told after each weight: its name, what was planned, the measured relative error.

    Raises:
        Refusals: before anything is written, with every weight that cannot be converted as asked. InputError: as `plan_conversion`.
    """
    opened = path if isinstance(path, Source) else open_source(path)
    try:
        plan = plan_conversion(opened, to)
        source = convertible(opened)
        _refuse(plan, source, allow_lossy)
        if plan.gguf is not None:
            return _write_gguf(plan, plan.gguf, source, Path(out), overwrite, on_weight)
        return _write(plan, source, Path(out), overwrite, shard_bytes, on_weight)
    finally:
        if opened is not path:
            opened.close()


def _refuse(plan: ConversionPlan, source: Source, allow_lossy: bool) -> None:
    errors = [
        InputError("FB-E0620", one.how, tensor=name) for name, one in plan.weights.items() if one.kind == "impossible"
    ]
    if not allow_lossy:
        errors += [
            InputError("FB-E0623", f"{source.stored[name].scheme} would become {one.scheme}: {one.how}", tensor=name)
            for name, one in plan.weights.items()
            if one.kind == "lossy"
        ]
    if errors:
        raise Refusals(list(errors))


def _write(
    plan: ConversionPlan,
    source: Source,
    out: Path,
    overwrite: bool,
    shard_bytes: int,
    on_weight: Callable[[str, Conversion, float], None] | None,
) -> Converted:
    form = format_named(plan.target)
    shapes = _true_shapes(plan, source)
    entries: list[tuple[str, str, tuple[int, ...]]] = []
    for name, info in source.manifest.items():
        one = plan.weights.get(name)
        if name in plan.dropped:
            continue
        if one is None:
            entries.append((_name_in(form, name), info.dtype, info.shape))
        else:
            assert one.scheme is not None
            entries += [(part, *spec) for part, spec in form.parts(name, one.scheme, shapes[name]).items()]
    schemes: dict[str, Scheme] = {name: one.scheme for name, one in plan.weights.items() if one.scheme is not None}
    matrices = tuple(name for name in plan.kept if len(source.manifest[name].shape) > 1)
    options = {"desc_act": _reordered(source) and form.ordered}
    stacks = {name: shape for name, shape in shapes.items() if len(shape) > 2}
    kv = any(kv_scale(name) is not None for name in plan.kept)
    assigned = Assignment(schemes, matrices, solver="convert", options=options, stacks=stacks, kv=kv)
    config, beside = form.config(source.config, assigned)
    errors: dict[str, float] = {}
    state = hashlib.sha256()
    with ShardWriter(
        out, lay_out(entries, max_shard_bytes=shard_bytes), overwrite=overwrite, sources=[source.root]
    ) as writer:
        for name in source.manifest:
            one = plan.weights.get(name)
            if name in plan.dropped:
                continue
            if one is None:
                writer.write(_name_in(form, name), source.read(name))
                continue
            q = source.qtensor(name)
            assert q is not None and one.scheme is not None
            new, error = regrid(q, one.scheme, ordered=form.ordered)
            if error:
                errors[name] = error
            for part, tensor in form.encode(name, new).items():
                writer.write(part, tensor)
                state.update(as_bytes(tensor.contiguous()))
            if on_weight is not None:
                on_weight(name, one, error)
        small = {"config.json": readable_json(config).encode()}
        beside = {**source.small_files, **beside}  # the tokenizer that a GGUF carries
        small |= {name: readable_json(data).encode() for name, data in beside.items()}
        copies = [file for file in source.checkpoint.aux_files if file.name not in small]
        stored_as = {
            name: str(source.stored[name].scheme if scheme.is_leaf else scheme) for name, scheme in schemes.items()
        }
        place = writer.finish(small, copies, _facts(plan, source, stored_as, errors, state.hexdigest()))
    return Converted(plan, place, errors, _size(place))


def _facts(
    plan: ConversionPlan, source: Source, schemes: dict[str, str], errors: dict[str, float], codes: str
) -> dict[str, Any]:
    """What `fewbit-manifest.json` says of a conversion."""
    return {
        "fewbit": fewbit.__version__,
        "source": str(source.root),
        "converted": {"from": plan.source, "to": plan.target, "counts": plan.counts, "errors": plain(errors)},
        "format": plan.target,
        "schemes": schemes,
        "codes_sha256": codes,
    }


def _size(place: Path) -> int:
    return sum(file.stat().st_size for file in place.rglob("*") if file.is_file())


def _write_gguf(
    plan: ConversionPlan,
    planned: GgufPlan,
    source: Source,
    out: Path,
    overwrite: bool,
    on_weight: Callable[[str, Conversion, float], None] | None,
) -> Converted:
    from fewbit.formats.gguf.card import modelfile
    from fewbit.run.convert_gguf import gguf_tensors
    from fewbit.store.gguf_layout import lay_out_gguf

    errors: dict[str, float] = {}
    state = hashlib.sha256()
    layout = lay_out_gguf(planned.layout_rows(), planned.metadata, stem=f"{source.root.name}-{planned.recipe.name}")
    with ShardWriter(out, layout, overwrite=overwrite, sources=[source.root]) as writer:
        for name, data, reads in gguf_tensors(planned, source, errors):
            writer.write_at(name, 0, as_bytes(data.contiguous()))
            state.update(as_bytes(data.contiguous()))
            for weight in reads if on_weight is not None else ():
                if weight in plan.weights and on_weight is not None:
                    on_weight(weight, plan.weights[weight], errors.get(weight, 0.0))
        small = {"Modelfile": modelfile([shard.name for shard in layout.shards], planned).encode()}
        schemes = {tensor.name: str(tensor.scheme) for tensor in planned.tensors if tensor.scheme is not None}
        place = writer.finish(small, [], _facts(plan, source, schemes, errors, state.hexdigest()))
    return Converted(plan, place, errors, _size(place))


def _true_shapes(plan: ConversionPlan, source: Source) -> dict[str, tuple[int, ...]]:
    """Exact shapes of the weights: formats that keep the shape in a tensor are asked for it, the rest have it in their headers."""
    shapes = {name: tuple(source.stored[name].shape) for name in plan.weights}
    if plan.source in ("bitsandbytes", "hqq") or any(
        stored.facts.get("read_shape") for stored in source.stored.values()
    ):
        for name in shapes:
            q = source.qtensor(name)
            assert q is not None
            shapes[name] = tuple(q.shape)
    return shapes
