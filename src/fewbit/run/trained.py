"""Writing what was trained in PyTorch: codes as they are, into any format that holds them.

    export(qtensors(model), trained_floats(model), source, "compressed-tensors", out)

The plan, the sinks and the audit are those of `quantize`; only the answers come from the model instead of a solver. A format that would have to change a value (a
scale in another dtype, a norm in fewer bits) refuses: the file computes exactly what was trained, or is not written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import fewbit
from fewbit.arch.infer import facts
from fewbit.base.errors import FewbitError, InputError, Refusals
from fewbit.formats.gguf.ops import _batch, _rows, apply_quantised, stack_quantised
from fewbit.formats.gguf.types import type_of
from fewbit.formats.gguf.vocabulary import FILES as VOCABULARY_FILES
from fewbit.num.qtensor import QTensor
from fewbit.num.scheme import Scheme
from fewbit.plan.jobs import Job, Output, Plan
from fewbit.plan.recipe import Recipe, Rule, parse_size
from fewbit.plan.resolve import resolve
from fewbit.run.gguf_source import GgufAsCheckpoint, as_checkpoint
from fewbit.run.hf import Slot, bind, build_model, copies
from fewbit.run.pieces import cat_rows
from fewbit.run.sinks import open_sink
from fewbit.run.source import Source
from fewbit.solve.table import Solved
from fewbit.store.tensors import TORCH_DTYPES


class TrainedSource(Source):
    """A source with some of its float tensors replaced by trained ones, in the dtype that they had.

    Raises:
        InputError: FB-E0917 when a value does not fit that dtype exactly.
    """

    def __init__(self, inner: Source, floats: Mapping[str, torch.Tensor]) -> None:
        super().__init__(inner.checkpoint)
        self.floats = {}
        for name, value in floats.items():
            dtype = TORCH_DTYPES[self.manifest[name].dtype]
            kept = value.detach().cpu().to(dtype)
            if not torch.equal(kept.to(value.dtype), value.cpu()):
                raise InputError("FB-E0917", f"trained values do not fit {self.manifest[name].dtype}", tensor=name)
            self.floats[name] = kept.reshape(self.manifest[name].shape)

    def read(self, name: str) -> torch.Tensor:
        return self.floats[name] if name in self.floats else super().read(name)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.floats[name][start:stop] if name in self.floats else super().read_rows(name, start, stop)


def export(
    weights: Mapping[str, QTensor],
    floats: Mapping[str, torch.Tensor],
    source: Source,
    to: str,
    out: str | Path,
    *,
    overwrite: bool = False,
    training: Mapping[str, Any] | None = None,
) -> Path:
    """Writes trained weights as a checkpoint; everything else is copied from the source.

    Args:
        weights: by parameter name, [.., out, in], all of one scheme: `qtensors(model)`.
        floats: by parameter name: `trained_floats(model)`.
        source: the float checkpoint that the model was made from.
        to: name of a format, or a GGUF type: `compressed-tensors`, `gguf:q4_k`.
        out: folder to write.
        training: how it was trained, plain data for `fewbit-manifest.json`; `curve`, records of points with a `kl`, is what a report draws.

    Returns:
        Where it lies.

    Raises:
        InputError: FB-E0917 when the format cannot hold the values exactly, or a parameter has no stored tensor. Refusals: as `quantize`.
    """
    schemes = {q.scheme for q in weights.values()}
    if len(schemes) != 1:
        raise InputError("FB-E0917", f"{len(weights)} weights of {len(schemes)} schemes; they must share one")
    (scheme,) = schemes
    module = build_model(source.config)
    slots = bind(module, source.manifest)
    answers = {name: (slot, weights[slot.param]) for name, slot in slots.items() if slot.param in weights}
    placed = {slot.param for slot in slots.values()}
    lost = sorted((weights.keys() | floats.keys()) - placed)
    if lost:
        raise InputError("FB-E0917", "no stored tensor belongs to a trained parameter", tensor=lost[0])
    places = {name: slot.param for name, slot in slots.items()} | copies(module, source.manifest, slots)
    trained = TrainedSource(source, {name: floats[param] for name, param in places.items() if param in floats})
    plan = plan_export(trained, scheme, to, set(answers))
    (output,) = plan.outputs
    sink = open_sink(output, trained, Path(out), overwrite, parse_size(plan.recipe["max_shard_size"]))
    try:
        sink.open_journal({"trained": True, "source": source.fingerprint()})
        for job in output.jobs:
            if job.scheme is None:
                sink.copy(job, trained)
            else:
                sink.put(job, _answer(job, answers))
        return sink.finish(_record(plan, source, training))
    finally:
        sink.close()


def plan_export(source: Source, scheme: Scheme, to: str, names: set[str]) -> Plan:
    """The plan under which exactly the named tensors are stored, in exactly this scheme."""
    target = to if ":" in to else f"{to}:{_word_for(to, scheme)}"
    files = {path.name: path.read_bytes() for path in source.checkpoint.aux_files if path.name in VOCABULARY_FILES}

    def made(rules: tuple[Rule, ...]) -> Plan:
        recipe = Recipe(to=(target,), method="rtn", rules=rules)
        return resolve(source.manifest, source.config, recipe, source=str(source.root), files=files)

    try:
        plan = made(())
        rules = _exceptions(plan.outputs[0], names, scheme)
        plan = made(rules) if rules else plan
    except Refusals as refused:
        raise InputError("FB-E0917", "; ".join(error.message for error in refused.errors)) from None
    for job in plan.outputs[0].quantised:
        if job.scheme != scheme or not set(job.reads) <= names:
            what = f"{to} would store it as {job.scheme}, it was trained as {scheme}"
            raise InputError("FB-E0917", what, tensor=job.name)
    return plan


def _word_for(to: str, scheme: Scheme) -> str:
    """How a format spells a scheme: a GGUF has one type for all matrices."""
    kind = type_of(scheme) if to == "gguf" else None
    return str(scheme) if kind is None else f"pure-{kind.name}"


def _exceptions(output: Output, names: set[str], scheme: Scheme) -> tuple[Rule, ...]:
    """Rules for tensors where the plan's own choice is another than what was trained."""
    rules = []
    for job in output.jobs:
        asked = job.name in names
        if asked != (job.scheme is not None):
            rules.append(Rule(pattern=f"re:^{re.escape(job.name)}$", scheme=str(scheme) if asked else "keep"))
    return tuple(rules)


def _answer(job: Job, answers: Mapping[str, tuple[Slot, QTensor]]) -> Solved:
    """A job's quantised tensor, cut from stacked ones and its rows moved as the output wants them."""
    try:
        pieces = [cut(q, slot) for slot, q in (answers[name] for name in job.reads)]
        rest = tuple(op for op in job.ops if op != "transpose")
        q = apply_quantised(rest, pieces) if rest else pieces[0]
    except FewbitError as error:
        error.tensor = error.tensor or job.name
        raise
    return Solved(q.to("cpu"), 0.0, ())


def cut(q: QTensor, slot: Slot) -> QTensor:
    """The part of a stacked weight that one stored tensor is: an expert, or some of its rows."""
    if slot.expert is not None:
        q = _batch(q, 0, slice(slot.expert, slot.expert + 1))
        q = _first(q)
    if slot.rows is not None:
        q = _rows(q, torch.arange(*slot.rows))
    return q


def _first(q: Any) -> Any:
    """The only entry of a leading dimension of size 1."""
    if not isinstance(q, QTensor):
        return None if q is None else q[0]
    parts = {name: _first(getattr(q, name)) for name in ("scale", "code_shift", "value_shift")}
    return QTensor(q.scheme, q.shape[1:], q.codes[0], **parts)


def _record(plan: Plan, source: Source, training: Mapping[str, Any] | None) -> dict[str, Any]:
    """What `fewbit-manifest.json` says."""
    return {
        "fewbit": fewbit.__version__,
        "source": plan.source,
        "source_fingerprint": source.fingerprint(),
        "recipe": plan.recipe,
        "trained": True,
        **({"training": dict(training)} if training is not None else {}),
    }


def start_from(source: Source) -> dict[str, QTensor]:
    """The weights of a quantised checkpoint by parameter name: what `prepare(start=…)` takes. Experts stored one by one are stacked.

    Args:
        source: open checkpoint in any format that keeps codes.
    """
    source = as_checkpoint(source)
    known = facts(source.manifest, source.config)
    slots: dict[str, list[tuple[Slot, QTensor]]] = {}
    for name, slot in bind(build_model(source.config), source.manifest).items():
        q = None if known[name].transposed else _codes(source, name)
        if q is not None:
            slots.setdefault(slot.param, []).append((slot, q))
    return {param: _gathered(group) for param, group in slots.items()}


def _codes(source: Source, name: str) -> QTensor | None:
    """A stored tensor's codes; None where it is a float."""
    return source.held(name) if isinstance(source, GgufAsCheckpoint) else source.qtensor(name)


def _has_codes(source: Source, name: str) -> bool:
    """Whether `_codes` gives any; a GGUF's must be read to tell, others say so beforehand."""
    return source.held(name) is not None if isinstance(source, GgufAsCheckpoint) else name in source.stored


def floats_from(source: Source) -> dict[str, torch.Tensor]:
    """What a quantised checkpoint keeps in floating point, by parameter name, float32: where it was trained before, its codes belong to that."""
    source = as_checkpoint(source)
    slots = bind(build_model(source.config), source.manifest)
    return {
        slot.param: source.read(name).float()
        for name, slot in slots.items()
        if not _has_codes(source, name) and slot.expert is None and slot.rows is None
    }


def _gathered(slots: list[tuple[Slot, QTensor]]) -> QTensor:
    """One parameter from the stored tensors that it is made of."""
    experts: dict[int | None, list[tuple[int, QTensor]]] = {}
    for slot, q in slots:
        experts.setdefault(slot.expert, []).append((slot.rows[0] if slot.rows else 0, q))
    whole = []
    for parts in experts.values():
        pieces = [q for _, q in sorted(parts, key=lambda item: item[0])]
        shape = (sum(q.shape[-2] for q in pieces), pieces[0].shape[-1])
        whole.append(pieces[0] if len(pieces) == 1 else cat_rows(pieces[0].scheme, shape, pieces))
    return whole[0] if None in experts else stack_quantised(whole)
