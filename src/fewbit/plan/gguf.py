"""A GGUF output as a plan: the file that `formats.gguf.plan` describes, turned into jobs.

The recipe after the colon is llama-quantize's (`gguf:Q4_K_M`) or a type for all matrices (`gguf:pure-Q4_K`, or just `gguf:q4_k`).
Rules select tensors by their name in the checkpoint or in the GGUF.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fewbit.arch.infer import TensorFacts
from fewbit.base.errors import FewbitError, InputError, Refusals
from fewbit.base.manifest import Manifest
from fewbit.base.names import matches
from fewbit.formats.gguf.plan import GgufPlan, PlannedTensor, gguf_plan, global_scale_name
from fewbit.formats.gguf.recipes import recipe_names
from fewbit.formats.gguf.types import FLOATS, TYPES, block_type
from fewbit.plan.jobs import Job, Output
from fewbit.plan.recipe import Recipe
from fewbit.solve.table import SOLVERS

_KEEP = {"F64": "F32", "F32": "F32", "F16": "F16", "BF16": "BF16"}


def resolve_gguf(
    target: str,
    spelling: str,
    options: dict[str, str],
    manifest: Manifest,
    config: Mapping[str, Any],
    known: Mapping[str, TensorFacts],
    recipe: Recipe,
    files: Mapping[str, bytes],
    name: str,
) -> tuple[Output, tuple[str, ...]]:
    """The output and what is worth saying.

    Raises:
        FewbitError: from `gguf_plan`; FB-E0602 for a type that does not suit where --on-misfit is refuse.
    """
    chosen = _recipe_word(spelling)
    solver = SOLVERS.get(recipe.method)
    imatrix = recipe.imatrix is not None or bool(solver and solver.needs)
    arguments: dict[str, Any] = {"imatrix": imatrix, "name": name, "pre": options.get("pre"), "global_scales": True}
    planned = gguf_plan(manifest, config, files, chosen, None, **arguments)
    overrides = _overrides(planned, recipe)
    if overrides:
        planned = gguf_plan(manifest, config, files, chosen, overrides, **arguments)
    weak = [tensor.name for tensor in planned.tensors if tensor.needs_imatrix]
    notes = list(planned.notes)
    if weak:
        notes.append(
            f"{len(weak)} tensors take types that are poor without an importance matrix: use --method imatrix or gptq"
        )
    scales = {tensor.name: tensor for tensor in planned.tensors if not tensor.reads and not tensor.values}
    jobs = tuple(_job(tensor, known, recipe, scales) for tensor in planned.tensors if tensor.name not in scales)
    output = Output(target, "gguf", options, jobs, {"recipe": planned.recipe.name}, {}, carry=planned)
    return output, tuple(notes)


def _recipe_word(spelling: str) -> str:
    """A recipe as it is; a bare block type that is no recipe means that type for all matrices."""
    upper = spelling.upper().replace("-", "_")
    return f"pure-{upper}" if upper in TYPES and upper not in recipe_names() else spelling


def _overrides(planned: GgufPlan, recipe: Recipe) -> dict[str, str]:
    """GGUF name -> type for the tensors that rules select; the last rule that matches counts."""
    found: dict[str, str] = {}
    problems: list[FewbitError] = []
    for rule in recipe.rules:
        for tensor in planned.tensors:
            if any(matches(rule.pattern, name) for name in (tensor.name, *tensor.reads)):
                try:
                    found[tensor.name] = (
                        _KEEP.get(tensor.dtype, "F16") if rule.scheme == "keep" else block_type(rule.scheme).name
                    )
                except InputError as error:
                    problems.append(error)
                    break
    if problems:
        raise Refusals(problems)
    return found


def _job(
    tensor: PlannedTensor, known: Mapping[str, TensorFacts], recipe: Recipe, scales: Mapping[str, PlannedTensor]
) -> Job:
    """The job of one tensor; the scale over an NVFP4 tensor (in `scales`) is written with it."""
    first = known.get(tensor.reads[0]) if tensor.reads else None
    quantised = tensor.type not in FLOATS
    rule = next(
        (r for r in reversed(recipe.rules) if any(matches(r.pattern, n) for n in (tensor.name, *tensor.reads))), None
    )
    method, reason = (rule.method if rule else None) or recipe.method, tensor.reason
    turned = "transpose" in tensor.ops and not (first and first.transposed)
    if turned and quantised and recipe.imatrix is None and method in SOLVERS and SOLVERS[method].needs:
        method = "rtn"  # its columns are rows of the layer: calibration has seen nothing of what they will be multiplied with
        reason = f"{reason}; by its weights alone, as it is stored turned round"
    stored = ("U8", (*tensor.shape[:-1], block_type(tensor.type).row_bytes(tensor.shape[-1])))
    beside = scales.get(global_scale_name(tensor.name)) if tensor.type == "NVFP4" else None
    more = {beside.name: ("F32", beside.shape)} if beside is not None else {}
    return Job(
        name=tensor.reads[0] if tensor.reads else tensor.name,
        target=tensor.name,
        reads=tensor.reads,
        ops=tensor.ops,
        shape=tensor.shape,
        source_dtype=tensor.dtype,
        role=first.role if first else "buffer",
        layer=first.layer if first else None,
        scheme=tensor.scheme if quantised else None,
        solver=method if quantised else "",
        reason=reason,
        writes={tensor.name: stored if quantised else (tensor.type, tensor.shape), **more},
        by_rows=quantised and not more and len(tensor.shape) == 2,
    )
