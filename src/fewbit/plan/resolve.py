"""From a recipe and a manifest to a plan: every decision, and every refusal, before any work.

Nothing here opens a file. All reasons to refuse are gathered and raised together, so that a user mends them in one go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fewbit.arch.infer import TensorFacts, facts, family_for, model_type_of
from fewbit.arch.rewrite_table import check as check_rewrites
from fewbit.base.errors import FewbitError, InputError, Refusals
from fewbit.base.manifest import Manifest, TensorInfo
from fewbit.base.names import compile_pattern, matches
from fewbit.formats.kinds import kv_scale
from fewbit.formats.table import Assignment, Format, check_options, format_named
from fewbit.num.blocks import TENSOR
from fewbit.num.scheme import Scheme, parse_scheme
from fewbit.plan.gguf import resolve_gguf
from fewbit.plan.jobs import Job, Output, Plan
from fewbit.plan.recipe import Recipe, Rule, parse_target
from fewbit.solve.table import SOLVERS

KEPT_BECAUSE = {
    "embed": "embeddings stay in high precision",
    "position": "positions stay in high precision",
    "head": "the output head stays in high precision",
    "norm": "norms stay in high precision",
    "bias": "biases stay in high precision",
    "router": "routers stay in high precision",
    "conv": "convolutions stay in high precision",
    "sinks": "attention sinks stay in high precision",
    "vector": "vectors stay in high precision",
    "buffer": "not a weight",
    "tower": "vision and audio towers stay in high precision",
}
KV_SCALE = "kv_scale"
FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})


@dataclass(frozen=True)
class Choice:
    """What was decided for one tensor: a scheme, or None to keep it, and why."""

    scheme: Scheme | None
    reason: str
    solver: str = ""
    asked: bool = False


def choose(name: str, info: TensorInfo, known: TensorFacts, recipe: Recipe, base: Scheme) -> Choice:
    """The scheme of a tensor by the recipe's rules, else by its role."""
    rule = _last_rule(recipe.rules, name)
    if info.dtype not in FLOATS:
        return Choice(None, "not a floating-point tensor")
    if rule is not None:
        if rule.scheme == "keep":
            return Choice(None, f"rule {rule.pattern}")
        return Choice(parse_scheme(rule.scheme), f"rule {rule.pattern}", rule.method or recipe.method, asked=True)
    if base.is_leaf:
        return Choice(base, "stored as it is asked", "rtn")
    if known.kept and known.role not in recipe.include:
        return Choice(None, KEPT_BECAUSE[known.role])
    if len(info.shape) < 2:
        return Choice(None, KEPT_BECAUSE["vector"])
    return Choice(base, "default" if known.known else "a matrix of unknown role", recipe.method)


def _last_rule(rules: tuple[Rule, ...], name: str) -> Rule | None:
    return next((rule for rule in reversed(rules) if matches(rule.pattern, name)), None)


def resolve(
    manifest: Manifest,
    config: Mapping[str, Any],
    recipe: Recipe,
    *,
    source: str = "",
    files: Mapping[str, bytes] | None = None,
) -> Plan:
    """The plan of a recipe for a checkpoint.

    Args:
        files: contents of the tokenizer's files by name, for outputs that hold the vocabulary themselves (GGUF).

    Raises:
        Refusals: every reason at once: unknown words, rules that match nothing, shapes that do not suit, options that clash.
    """
    errors: list[FewbitError] = []
    warnings: list[str] = []
    for rule in recipe.rules:
        _gather(errors, compile_pattern, rule.pattern)
    if errors:  # nothing can be matched with these
        raise Refusals(errors)
    known = facts(manifest, config)
    if family_for(config) is None:
        warnings.append(
            f"no architecture data for model type {model_type_of(config)!r}: roles come from names and shapes, rewrites are off"
        )
    _check_recipe(manifest, recipe, known, errors)
    warnings += _tower_warning(manifest, known, recipe)
    outputs: list[Output] = []
    for target in recipe.to:
        try:
            output, notes = _resolve_target(target, manifest, config, known, recipe, files or {}, source, errors)
            outputs.append(output)
            warnings += [f"{target}: {note}" for note in notes]
        except Refusals as refused:
            errors += refused.errors
        except FewbitError as error:
            errors.append(error)
    errors += _idle_rules(manifest, recipe, outputs)
    for output in outputs:
        if recipe.kv and format_named(output.format).kv_scale is None:
            warnings.append(f"{output.target}: {output.format} has no place for scales of cached keys and values")
        _check_outliers(output, errors)
        _check_ranges(output, recipe, errors)
        warnings += _unlike_neighbours(output)
    if errors:
        raise Refusals(errors)
    needs = sorted(
        {need for out in outputs for job in out.quantised for need in job.needs} | _range_needs(outputs, recipe)
    )
    return Plan(
        source=source,
        outputs=tuple(outputs),
        warnings=tuple(warnings),
        recipe=recipe.model_dump(mode="json"),
        needs=tuple(needs),
        disk_bytes=sum(out.nbytes for out in outputs),
    )


def _resolve_target(
    target: str,
    manifest: Manifest,
    config: Mapping[str, Any],
    known: Mapping[str, TensorFacts],
    recipe: Recipe,
    files: Mapping[str, bytes],
    source: str,
    errors: list[FewbitError],
) -> tuple[Output, tuple[str, ...]]:
    """One output, and what is worth saying of it."""
    name, spelling, options = parse_target(target)
    form = format_named(name)
    check_options(form, options)
    spelling = spelling or form.default_scheme
    if form.container == "gguf":
        label = source.rstrip("/").rpartition("/")[2] or "model"
        cacheless = replace(manifest, tensors={n: i for n, i in manifest.items() if kv_scale(n) is None})
        return resolve_gguf(target, spelling, options, cacheless, config, known, recipe, files, label)
    base = parse_scheme(spelling)
    return _resolve_output(target, form, base, options, manifest, config, known, recipe, errors), ()


def _tower_warning(manifest: Manifest, known: Mapping[str, TensorFacts], recipe: Recipe) -> list[str]:
    """A sentence about the towers that stay as they are, where the model has some."""
    towers = [manifest[name] for name, item in known.items() if item.role == "tower"]
    if not towers or "tower" in recipe.include:
        return []
    size = sum(info.nbytes for info in towers) / 1e6
    return [
        f"{len(towers)} matrices of the vision or audio tower ({size:,.1f} MB) stay in high precision; --include tower quantises them too"
    ]


def _idle_rules(manifest: Manifest, recipe: Recipe, outputs: Sequence[Output]) -> list[FewbitError]:
    """What is wrong with rules that match no tensor; they may name tensors as the checkpoint or as a GGUF does."""
    names = [*manifest, *(job.target for output in outputs if output.format == "gguf" for job in output.jobs)]
    return [
        InputError(
            "FB-E0407", f"the rule {rule.pattern!r} matches no tensor", remedy="see the names with `fewbit inspect`"
        )
        for rule in recipe.rules
        if not any(matches(rule.pattern, name) for name in names)
    ]


def _check_recipe(
    manifest: Manifest, recipe: Recipe, known: Mapping[str, TensorFacts], errors: list[FewbitError]
) -> None:
    if not recipe.to:
        errors.append(
            InputError(
                "FB-E0403",
                "no output is named",
                remedy="add --to FORMAT:SCHEME, e.g. --to compressed-tensors:int4-g128",
            )
        )
    for method in {recipe.method, *(rule.method for rule in recipe.rules if rule.method)}:
        if method not in SOLVERS:
            errors.append(InputError("FB-E0406", f"no method is called {method!r}; there are {', '.join(SOLVERS)}"))
        else:
            given = {
                name: value for name, value in recipe.options.items() if "." not in name and method == recipe.method
            }
            faults = [SOLVERS[method].fault(name, value) for name, value in given.items()]
            errors += [InputError("FB-E0405", fault) for fault in faults if fault]
    errors += check_rewrites(recipe.rewrites, recipe.options)
    for rule in recipe.rules:
        if rule.scheme != "keep":
            _gather(errors, parse_scheme, rule.scheme)
    roles = {item.role for item in known.values()}
    for role in recipe.include:
        if role not in roles:
            errors.append(
                InputError(
                    "FB-E0408", f"--include {role}: the model has no such role; it has {', '.join(sorted(roles))}"
                )
            )


def _check_outliers(output: Output, errors: list[FewbitError]) -> None:
    """Methods that keep some weights beside the codes need a format that has room for them."""
    methods = sorted({job.solver for job in output.quantised if job.solver in SOLVERS and SOLVERS[job.solver].outliers})
    if methods and not output.format.startswith("dense"):
        words = ", ".join(methods)
        what = f"{output.target}: {words} keeps outliers beside the codes, which {output.format} cannot store"
        errors.append(InputError("FB-E0415", what))


def _range_needs(outputs: list[Output], recipe: Recipe) -> set[str]:
    """Statistics that static activation ranges ask for beside the largest input."""
    static = any(job.scheme.static for out in outputs for job in out.quantised if job.scheme is not None)
    return {"histogram"} if static and recipe.activation_range != "absmax" else set()


def _check_ranges(output: Output, recipe: Recipe, errors: list[FewbitError]) -> None:
    """A range of least error needs to know how inputs are rounded under it: one scale for all of them."""
    if recipe.activation_range != "mse":
        return
    inner = {job.scheme.activation for job in output.quantised if job.scheme is not None and job.scheme.static}
    for scheme in inner:
        if scheme is not None and scheme.blocks != TENSOR:
            what = f"{output.target}: --activation-range mse needs one scale for all inputs, {scheme} finds more at run time"
            errors.append(InputError("FB-E0706", what, remedy="use absmax or percentile"))


def _check_one_scheme(form: Format, jobs: list[Job]) -> None:
    """Refuses different schemes in a format whose config has room for one, naming the odd ones out."""
    by_scheme: dict[Scheme, list[str]] = {}
    for job in jobs:
        if job.scheme is not None:
            by_scheme.setdefault(job.scheme, []).append(job.target)
    if not form.one_scheme or len(by_scheme) < 2:
        return
    ranked = sorted(by_scheme.items(), key=lambda item: -len(item[1]))
    listed = ", ".join(f"{scheme} for {len(names)}" for scheme, names in ranked)
    odd = ranked[-1][1]
    raise InputError(
        "FB-E0620",
        f"{form.name} has one scheme for all weights of a model, asked were {listed} (among them {', '.join(odd[:3])})",
        tensor=odd[0],
        remedy="give all weights one scheme, keep the odd ones (--rule 'NAME=keep'), or write compressed-tensors, gptq, modelopt or mlx",
    )


def _unlike_neighbours(output: Output) -> list[str]:
    """A warning where engines that fuse q, k, v or gate, up would find different schemes in one of their matrices."""
    if not {"vllm", "sglang"} & set(format_named(output.format).engines):
        return []
    found: dict[tuple[int | None, str, str], set[str]] = {}
    for job in output.jobs:
        for roles in (("q", "k", "v"), ("gate", "up")):
            if job.role in roles:
                before = job.target.rpartition(f"{job.role}_proj")[0]
                found.setdefault((job.layer, before, ", ".join(roles)), set()).add(str(job.scheme))
    torn = [(place, roles) for (_, place, roles), schemes in found.items() if len(schemes) > 1]
    if not torn:
        return []
    place, fused = torn[0]
    what = f"{fused} of {place.rstrip('.')} have different schemes"
    more = f" (and {len(torn) - 1} more such places)" if len(torn) > 1 else ""
    return [f"{output.target}: {what}{more}: vLLM and SGLang fuse them into one matrix and refuse that"]


def _gather(errors: list[FewbitError], call: Any, *args: Any) -> Any:
    try:
        return call(*args)
    except FewbitError as error:
        errors.append(error)
        return None


def _resolve_output(
    target: str,
    form: Format,
    base: Scheme,
    options: dict[str, str],
    manifest: Manifest,
    config: Mapping[str, Any],
    known: Mapping[str, TensorFacts],
    recipe: Recipe,
    errors: list[FewbitError],
) -> Output:
    jobs = []
    for tensor, info in manifest.items():
        place = kv_scale(tensor)
        if place is not None:
            jobs += [_kv_job(tensor, info, known[tensor], form.kv_scale(*place))] if form.kv_scale else []
            continue
        try:
            choice = choose(tensor, info, known[tensor], recipe, base)
        except FewbitError:  # a rule's scheme that cannot be parsed was gathered already
            continue
        jobs.append(_job(tensor, info, known[tensor], choice, form, recipe, errors))
    assignment = Assignment(
        schemes={job.target: job.scheme for job in jobs if job.scheme is not None},
        kept=tuple(job.target for job in jobs if job.scheme is None and len(job.shape) >= 2),
        solver=recipe.method,
        options=options,
        stacks={job.target: job.shape for job in jobs if job.scheme is not None and len(job.shape) > 2},
        kv=any(job.role == KV_SCALE for job in jobs),
    )
    if not assignment.schemes and not errors:
        raise InputError("FB-E0409", f"{target}: no tensor would be quantised", remedy="check the rules and --include")
    _check_one_scheme(form, jobs)
    made = (
        form.config(dict(config), assignment) if assignment.schemes else (dict(config), {})
    )  # nothing left: refused above
    new_config, small_files = made
    return Output(target, form.name, options, tuple(jobs), new_config, small_files)


def _kv_job(tensor: str, info: TensorInfo, known: TensorFacts, stored: str) -> Job:
    """Carries a scale of cached keys or values over, under the name that a format has for it."""
    reason = "range of cached keys or values"
    words = (info.dtype, KV_SCALE, known.layer, None, "", reason, {stored: (info.dtype, info.shape)})
    return Job(tensor, stored, (tensor,), (), info.shape, *words)


def _job(
    tensor: str,
    info: TensorInfo,
    known: TensorFacts,
    choice: Choice,
    form: Format,
    recipe: Recipe,
    errors: list[FewbitError],
) -> Job:
    scheme, reason, solver = choice.scheme, choice.reason, choice.solver
    ops: tuple[str, ...] = ()
    shape = info.shape
    if scheme is not None:
        if known.transposed and not scheme.is_leaf:
            ops, shape = ("transpose",), known.matrix_shape(info.shape)
        scheme = form.conform(scheme, info.dtype)
        misfit = form.accepts(scheme, shape)
        if misfit is None and ops and not form.name.startswith("dense"):
            misfit = f"this layer is stored [in, out] (Conv1D), which loaders of {form.name} do not know"
        if misfit is not None and recipe.on_misfit == "refuse":
            errors.append(
                InputError(
                    "FB-E0602",
                    f"{form.name} {scheme}: {misfit}",
                    tensor=tensor,
                    remedy=f"--rule '{tensor}=keep', --on-misfit keep, or another scheme",
                )
            )
        if misfit is not None:
            scheme, ops, shape, solver, reason = None, (), info.shape, "", f"kept: {misfit}"
    writes = form.parts(tensor, scheme, shape) if scheme is not None else {tensor: (info.dtype, info.shape)}
    if ops:  # solved [out, in], written the way round that it was
        writes = {name: (dtype, (*sizes[:-2], sizes[-1], sizes[-2])) for name, (dtype, sizes) in writes.items()}
    return Job(
        tensor, tensor, (tensor,), ops, shape, info.dtype, known.role, known.layer, scheme, solver, reason, writes
    )
