"""The command line's words in Python.

import fewbit as fb
result = fb.quantize("samples/sample", to="compressed-tensors:int4-g128", out="out")
q = fb.quantize_tensor(w, "int4-g128-asym", method="hqq")
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbit.base.errors import FewbitError, InputError, QualityError, Refusals, ResourceError
from fewbit.formats.gguf.vocabulary import FILES as VOCABULARY_FILES
from fewbit.plan.calibrated import calibrated_budget
from fewbit.plan.jobs import Plan
from fewbit.plan.recipe import Recipe, parse_size, recipe_from
from fewbit.plan.resolve import resolve
from fewbit.plan.resources import budget
from fewbit.run.result import Result

if TYPE_CHECKING:
    import torch

    from fewbit.num.qtensor import QTensor
    from fewbit.run.source import Source

__all__ = ["Recipe", "Result", "evaluate", "inspect", "open", "plan_quantize", "quantize", "quantize_tensor"]

STRICT_SHARE = 0.05  # share of tensors on which a solver may fall back before --strict fails the run


def open(path: str | Path, *, revision: str | None = None) -> Source:
    """Opens a checkpoint of any format we read; headers only. See `run.source.Source`."""
    from fewbit.run.source import open_source

    return open_source(path, revision=revision)


def as_recipe(recipe: Recipe | None, fields: dict[str, Any]) -> Recipe:
    """A recipe given whole, or made from keyword arguments that bear its fields' names."""
    if recipe is not None and fields:
        return recipe_from({**recipe.model_dump(exclude_defaults=True), **fields})
    return recipe if recipe is not None else recipe_from(fields)


def plan_quantize(
    model: str | Path,
    recipe: Recipe | None = None,
    *,
    out: str | Path | None = None,
    ram: int | str | None = None,
    workers: int | None = None,
    vram: int | str = 0,
    device: str = "auto",
    revision: str | None = None,
    **fields: Any,
) -> Plan:
    """What `quantize` would do, or every reason why it would refuse.

    Args:
        model: folder, file or hub id.
        recipe: or its fields as keyword arguments: to="gguf:Q4_K_M", method="gptq" …
        out: output folder, to check disk space.
        ram: hard limit of resident memory, bytes or a size such as 8GB.
        vram, device: the same of device memory, 0 for what is free; and where calibrated methods compute: cpu, cuda, cuda:1 … or auto.

    Raises:
        Refusals: all reasons at once.
    """
    chosen = as_recipe(recipe, fields)
    with open(model, revision=revision) as source:
        limits = Limits(_bytes(ram), workers, _bytes(vram) or 0, device)
        return _decide(_rewritten(source, chosen), str(model), chosen, None if out is None else Path(out), limits)


def _bytes(size: int | str | None) -> int | None:
    """A size as a number of bytes."""
    return parse_size(size) if isinstance(size, str) else size


@dataclass(frozen=True)
class Limits:
    """What the user allows a run; see `plan_quantize`."""

    ram: int | None = None
    workers: int | None = None
    vram: int = 0
    device: str = "auto"


def _rewritten(source: Source, recipe: Recipe) -> Source:
    """The equal float model that the recipe's rewrites make of a source, with scales of its cache where they are asked for."""
    from fewbit.run.gguf_source import for_targets
    from fewbit.run.kv import with_kv
    from fewbit.run.rewrites import rewritten

    return with_kv(rewritten(for_targets(source, recipe.to), recipe), recipe)


def _decide(source: Source, model: str, recipe: Recipe, out: Path | None, limits: Limits) -> Plan:
    if source.quantised and not recipe.requantize:
        assert source.format is not None
        raise Refusals(
            [InputError("FB-E0410", f"the source is already quantised ({source.format.name})", file=source.root)]
        )
    plan = resolve(source.manifest, source.config, recipe, source=model, files=tokenizer_files(source))
    problems: list[Any] = []
    try:
        plan = _with_peaks(plan, source, recipe, limits)
    except FewbitError as error:
        problems.append(error)
    if out is not None:
        problems += _disk_problems(plan, out)
    if problems:
        raise Refusals(problems)
    warnings = (*source.checkpoint.warnings, *plan.warnings, *source.warnings)
    return replace(plan, warnings=warnings, rewrites=tuple(source.does))


def _with_peaks(plan: Plan, source: Source, recipe: Recipe, limits: Limits) -> Plan:
    """The plan with the memory that it will take.

    Raises:
        ResourceError: FB-E0510 or FB-E0512. InputError: FB-E0513.
    """
    from fewbit.run.settings import chosen_device, default_ram, default_workers, device_bytes

    ram, workers = limits.ram or default_ram(), limits.workers or default_workers()
    plan = replace(plan, peak_bytes=budget([job for out in plan.outputs for job in out.jobs], ram, workers).peak)
    device = chosen_device(limits.device)
    if not (plan.needs or recipe.kv or "spin" in recipe.rewrites):
        unused = limits.vram or limits.device not in ("cpu", "auto")
        note = "--device and --vram are for calibrated methods: this one computes on the CPU"
        return replace(plan, warnings=(*plan.warnings, note)) if unused else plan
    vram = device_bytes(device, limits.vram)
    found = calibrated_budget(plan, source.manifest, ram, workers, vram)
    notes = ("--vram has no effect: the run computes on the CPU",) if limits.vram and vram is None else ()
    peak = max(plan.peak_bytes, found.peak)
    return replace(plan, peak_bytes=peak, device_bytes=found.device_peak, warnings=(*plan.warnings, *notes))


def tokenizer_files(source: Source) -> dict[str, bytes]:
    """Contents of the tokenizer's files by name."""
    return {path.name: path.read_bytes() for path in source.checkpoint.aux_files if path.name in VOCABULARY_FILES}


def _disk_problems(plan: Plan, out: Path) -> list[ResourceError]:
    from fewbit.run.settings import room_for

    missing = room_for(out, plan.disk_bytes)
    if missing <= 0:
        return []
    message = (
        f"the outputs take {plan.disk_bytes / 1e9:.2f} GB, {missing / 1e9:.2f} GB more than the disk of {out} has free"
    )
    return [ResourceError("FB-E0501", message, file=out)]


def quantize(
    model: str | Path,
    recipe: Recipe | None = None,
    *,
    out: str | Path,
    ram: int | str | None = None,
    vram: int | str = 0,
    device: str = "auto",
    workers: int | None = None,
    overwrite: bool = False,
    verify: bool = True,
    strict: bool = False,
    revision: str | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    **fields: Any,
) -> Result:
    """Quantises a checkpoint into one or more formats. Arguments as the flags of `fewbit quantize`.

    Raises:
        Refusals: before any work. ResourceError, Interrupted: resumable by the same call. QualityError: the audit or --strict failed.
    """
    from fewbit.run.engine import run_plan
    from fewbit.run.limits import device_memory
    from fewbit.run.settings import folder_bytes, require_device, settings
    from fewbit.run.start import check_inputs

    out, ram, vram = Path(out), _bytes(ram), _bytes(vram) or 0
    chosen = as_recipe(recipe, fields)
    with open(model, revision=revision) as stored:
        source = _rewritten(stored, chosen)
        plan = _decide(source, str(model), chosen, out, Limits(ram, workers, vram, device))
        how = settings(ram, workers, device, overwrite, **({"on_event": on_event} if on_event else {}), vram=vram)
        require_device(how.device)
        check_inputs(plan, source)
        by_blocks = None
        if plan.needs:
            from fewbit.run.block import calibrated

            by_blocks = calibrated
        with device_memory(how.device, how.vram):
            outcome = run_plan(plan, source, out, how, by_blocks)
        if strict:
            _check_strict(plan, outcome.notes)
        verified = _verify(outcome.outputs, source) if verify else None
    return Result(
        plan=plan,
        outputs=outcome.outputs,
        nbytes=tuple(folder_bytes(path) for path in outcome.outputs),
        seconds=outcome.seconds,
        peak_bytes=outcome.peak_bytes,
        resumed=outcome.resumed,
        losses=outcome.losses,
        notes=outcome.notes,
        verified=verified,
        warnings=plan.warnings,
    )


def _check_strict(plan: Plan, notes: dict[str, tuple[str, ...]]) -> None:
    fallen = [name for name, lines in notes.items() if any("fallback" in line for line in lines)]
    total = sum(len(output.quantised) for output in plan.outputs)
    if len(fallen) > STRICT_SHARE * max(1, total):
        raise QualityError("FB-E0710", f"solvers fell back on {len(fallen)} of {total} tensors", tensor=fallen[0])


def _verify(outputs: Iterable[Path], source: Source) -> tuple[Any, ...]:
    """Decodes every output again and holds it against the source; raises FB-E0820 when something is wrong."""
    from fewbit.eval.verify import verify

    found = tuple(verify(path, base=source) for path in outputs)
    for item in found:
        item.require()
    return found


def quantize_tensor(
    w: torch.Tensor, scheme: str, *, method: str = "rtn", stats: Any = None, seed: int = 0, **options: Any
) -> QTensor:
    """One tensor, quantised in memory: `fb.quantize_tensor(w, "int4-g128-asym", method="hqq").dequantize()`.

    Args:
        w: floating [..., out, in].
        scheme: spelling or preset.
        method: solver; `stats` are its calibration statistics where it needs some; `options` are its options.

    Raises:
        InputError: FB-E0707 when `w` is no floating tensor with numbers in it; FB-E06 and FB-E0704 for the words.
    """
    import torch

    from fewbit.num.scheme import parse_scheme
    from fewbit.solve.table import solver_named

    if not isinstance(w, torch.Tensor) or not w.is_floating_point() or not w.numel():
        given = f"{w.dtype} of {tuple(w.shape)}" if isinstance(w, torch.Tensor) else f"a {type(w).__name__}"
        raise InputError("FB-E0707", f"a floating tensor with numbers in it is needed, got {given}")
    return solver_named(method)(w, stats, parse_scheme(scheme), seed=seed, options=options).q


def evaluate(candidates: str | Path | list[str | Path], base: str | Path, **options: Any) -> Any:
    """Fidelity of candidates against a base on a text; arguments as the fields of `eval.fidelity.Options`."""
    from fewbit.eval.fidelity import evaluate as run

    return run([candidates] if isinstance(candidates, (str, Path)) else candidates, base, **options)


def inspect(path: str | Path, *, revision: str | None = None) -> dict[str, Any]:
    """What a checkpoint holds, from headers alone: per tensor its scheme, shape and bytes, and totals."""
    from fewbit.run.survey import survey

    with open(path, revision=revision) as source:
        return survey(source)
