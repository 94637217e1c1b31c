"""`fewbit train`: a checkpoint trained through the rounding, from file to file.

    float checkpoint ──> student: fake-quantised, its codes from --start ──┐
                    └──> teacher                                           ├─ distil ─> the same codes in the format asked for
    text ──> windows to learn from, a few to watch                         ┘

What the format will hold decides what is trained: scales in its dtype, norms in the source's, so nothing is rounded on export. All that can be refused is
refused before the first step, and a run that is stopped or killed is finished by the same command (`run.training_kept`).
"""

from __future__ import annotations

import hashlib
import math
import re
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import nn

import fewbit
from fewbit.base.errors import InputError, Refusals
from fewbit.formats.gguf.vocabulary import FILES as VOCABULARY_FILES
from fewbit.formats.kinds import LEAF_GRID
from fewbit.num.qtensor import QTensor
from fewbit.num.scheme import Scheme, leaf
from fewbit.plan.recipe import Recipe as Wanted
from fewbit.plan.resolve import resolve
from fewbit.plan.shapes import model_from_manifest
from fewbit.plan.training import require_memory
from fewbit.run.calib import calibration
from fewbit.run.hf import bind, build_model
from fewbit.run.settings import Event, chosen_device, default_ram, device_bytes, silent
from fewbit.run.source import Source, open_source
from fewbit.run.stop import Stop
from fewbit.run.trained import export, floats_from, plan_export, start_from
from fewbit.run.training_kept import Kept
from fewbit.runtime.distil import Point, Schedule, State, fidelity, train
from fewbit.runtime.linear import weight_of
from fewbit.runtime.load import fill
from fewbit.runtime.qat import (
    Prepared,
    Recipe,
    find_targets,
    freeze,
    observe,
    parameter_groups,
    prepare,
    qtensors,
    trained_floats,
)
from fewbit.store.writer import check_output

RATES = {
    "full": (1e-2, 1e-2),
    "floats": (0.0, 2e-2),
    "scales": (0.0, 2e-2),
}  # recipe -> peak learning rates of weights and of the rest, in quantisation steps
WATCHED = 8  # windows set aside to measure KL on


@dataclass(frozen=True)
class Trained:
    """What a training run made.

    Attributes:
        out: where it lies. scheme: of the quantised weights. prepared: what learnt and what did not.
        curve: KL(float || student) on windows kept apart, and the loss, over the steps. tokens: trained on, repeats included.
        warnings: sentences.
    """

    out: Path
    scheme: str
    prepared: Prepared
    curve: tuple[Point, ...]
    tokens: int
    warnings: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "scheme": self.scheme,
            "quantised": len(self.prepared.quantised),
            "learning": self.prepared.learning,
            "total": self.prepared.total,
            "tokens": self.tokens,
            "curve": [point.record() for point in self.curve],
            "warnings": list(self.warnings),
        }


def train_checkpoint(
    path: str | Path,
    to: str,
    out: str | Path,
    *,
    start: str | Path | None = None,
    recipe: str = "full",
    schedule: Schedule = Schedule(),  # noqa: B008
    text: str = "default",
    samples: int = 2400,
    length: int = 256,
    rates: tuple[float, float] | None = None,
    overwrite: bool = False,
    device: str = "cpu",
    ram: int | None = None,
    on_point: Callable[[Point], None] | None = None,
    on_event: Callable[[Event], None] = silent,
) -> Trained:
    """Trains a float checkpoint behind the rounding of a format and writes it there. A run that was stopped or killed is finished by the same call.

    Args:
        path: float checkpoint, the teacher too.
        to: FORMAT:SCHEME, as for quantize.
        start: a checkpoint quantised in the same format and scheme (by GPTQ, say) whose codes and scales training starts from; None rounds to nearest.
        recipe: full, floats (all but the codes) or scales (step sizes, norms and biases only).
        text, samples, length: what to learn from, as calibration text.
        rates: peak learning rates of weights and of the rest, instead of the recipe's.
        device: where to train; auto is CUDA where there is one. ram: limit of resident memory, bytes; on CUDA, that of the device is what is free there.
        on_point: called with each point of the curve. on_event: with what a run reports as it goes, as for quantize.

    Raises:
        InputError: FB-E0410 for a quantised source, FB-E0914 for a start that does not fit, FB-E0913, FB-E0916, FB-E0917 as `prepare`, `train`, `export`;
            FB-E0140, FB-E0141, FB-E0142 for the output; FB-E0411, FB-E0919 for the state of an interrupted run that is of another.
        Refusals: as `quantize`. ResourceError: FB-E0514 for memory, FB-E0501, FB-E0502 for the disk. Interrupted: FB-E0511, resumable.
    """
    rates, device = _rates(recipe, rates), chosen_device(device)
    with open_source(path) as source, Stop().listening() as stop:
        aim = _accept(source, to, path)
        check_output(Path(out), [source.root], overwrite)
        _require_memory(source, aim, recipe, schedule.batch * length, device, ram)
        student, teacher = (load_float(source).to(device) for _ in range(2))
        found = calibration(text, source.root, samples + WATCHED, length, schedule.seed, vocabulary(student))
        prepared = _prepare(student, source, aim, cast("Recipe", recipe), start)
        learnt = {"recipe": recipe, "rates": list(rates), **asdict(schedule)}
        settings = {**learnt, "start": None if start is None else str(start)}
        settings |= {"text": text, "samples": samples, "length": length}
        kept = Kept(Path(out), _identity(source, to, learnt, start, found.tokens), stop)
        done = False
        try:
            kept.require_room(prepared.learning)
            report = _Report(schedule, prepared, on_point, on_event)
            curve = _learn(student, teacher, found.tokens, schedule, rates, report, kept)
            facts = _facts(path, to, settings, curve)
            weights = qtensors(student), trained_floats(student)
            place = export(*weights, source, to.partition(":")[0], out, overwrite=overwrite, training=facts)
            done = True
        finally:
            kept.close(done)
    return Trained(place, str(aim.scheme), prepared, tuple(curve), facts["tokens"], found.warnings)


def _rates(recipe: str, rates: tuple[float, float] | None) -> tuple[float, float]:
    """The learning rates that are asked for, or the recipe's own."""
    if recipe not in RATES:
        raise InputError("FB-E0913", f"recipes are {', '.join(RATES)}, got {recipe!r}")
    rates = rates or RATES[recipe]
    if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
        raise InputError("FB-E0916", f"learning rates are numbers of 0 or more, got {rates[0]} and {rates[1]}")
    return rates


def _prepare(student: nn.Module, source: Source, aim: Aim, recipe: Recipe, start: str | Path | None) -> Prepared:
    """Puts the aim's rounding on a student, from where an earlier result left it."""
    return prepare(
        student,
        aim.scheme,
        recipe=recipe,
        start=None if start is None else take_start(student, start),
        skip=[f"re:^{re.escape(t.name)}$" for t in find_targets(student) if t.name not in aim.params],
        floats=_float_grids(source, student),
    )


@dataclass(frozen=True)
class Aim:
    """What is to be made: the weights' scheme, the parameters that get it, the stored tensors these are made of, and how many numbers they hold."""

    scheme: Scheme
    params: set[str]
    stored: set[str]
    quantised: int


def _accept(source: Source, to: str, path: str | Path) -> Aim:
    """The aim of a run, once the target is known to hold what will be trained."""
    if source.quantised:
        raise InputError("FB-E0410", "training starts from the float model; give the quantised one as start", file=path)
    aim = decided(source, to)
    plan_export(source, aim.scheme, to.partition(":")[0], aim.stored)
    return aim


def _require_memory(source: Source, aim: Aim, recipe: str, tokens: int, device: str, ram: int | None) -> None:
    """Refuses what will not fit where it is computed: main memory, or the device's."""
    limit = device_bytes(device)
    model = model_from_manifest(str(source.root), source.manifest, source.config)
    require_memory(model, recipe, tokens, aim.quantised, ram or default_ram() if limit is None else limit, device)


def _identity(
    source: Source, to: str, learnt: dict[str, Any], start: str | Path | None, tokens: torch.Tensor
) -> dict[str, Any]:
    """What must be equal for an interrupted run to be gone on with; `learnt`: recipe, rates and schedule."""
    begun = None
    if start is not None:
        with open_source(start) as opened:
            begun = opened.fingerprint()
    return {
        "fewbit": fewbit.__version__,
        "torch": torch.__version__.split("+")[0],
        "source": source.fingerprint(),
        "to": to,
        "start": begun,
        "tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        **learnt,
    }


@dataclass(frozen=True)
class _Report:
    """What is said of a run as it goes."""

    schedule: Schedule
    prepared: Prepared
    on_point: Callable[[Point], None] | None
    on_event: Callable[[Event], None]

    def begins(self, state: State | None, tokens: int) -> None:
        done = state.step if state else 0
        begun = f", {done:,} done before" if done else ""
        what = f"{self.schedule.steps:,} steps of {self.schedule.batch * tokens:,} tokens, {self.prepared.learning / 1e6:.1f} million numbers learn{begun}"
        self.on_event({"event": "start", "total": self.schedule.steps, "done": done, "resumed": done, "text": what})

    def point(self, point: Point) -> None:
        loss = "" if point.step == 0 else f"  loss {point.loss:.4f}"
        what = f"step {point.step:>6}  KL {point.measures['kl']:.5f}{loss}  {point.seconds:.0f} s"
        self.on_event({"event": "note", "text": what})
        if self.on_point is not None:
            self.on_point(point)

    def step(self, step: int, loss: float) -> None:
        self.on_event(
            {"event": "job", "name": f"step {step}, loss {loss:.4f}", "done": step, "total": self.schedule.steps}
        )


def _facts(path: str | Path, to: str, settings: dict[str, Any], curve: list[Point]) -> dict[str, Any]:
    """What the manifest says of the training."""
    return {
        **settings,
        "tokens": settings["steps"] * settings["batch"] * settings["length"],
        "command": _command(path, to, settings),
        "curve": [point.record() for point in curve],
    }


def _command(path: str | Path, to: str, settings: dict[str, Any]) -> str:
    """The command line that trains so again."""
    flags = {key: settings[key] for key in ("start", "recipe", "steps", "batch", "seed", "compute", "noise")}
    flags |= {"lr": settings["rates"][0], "scale-lr": settings["rates"][1]}
    flags |= {key: settings[key] for key in ("text", "samples", "length")}
    words = [f"--{key} {shlex.quote(str(value))}" for key, value in flags.items() if value is not None]
    return " ".join(["fewbit train", shlex.quote(str(path)), "--to", shlex.quote(to), *words, "-o OUT"])


def _learn(
    student: nn.Module,
    teacher: nn.Module,
    tokens: torch.Tensor,
    schedule: Schedule,
    rates: tuple[float, float],
    report: _Report,
    kept: Kept,
) -> list[Point]:
    """Trains on all but the first sequences, which are watched; afterwards the student stays as it is. -> the curve."""
    watched = tokens[:WATCHED].to(next(student.parameters()).device).split(4)
    observe(student, watched)
    state = kept.load()
    report.begins(state, tokens.shape[1])

    def after_step(step: int, loss: float, take: Callable[[], State]) -> None:
        report.step(step, loss)
        kept.after_step(take)

    curve = train(
        student,
        tokens[WATCHED:],
        schedule,
        teacher=teacher,
        groups=parameter_groups(student, *rates),
        evaluate=lambda model: fidelity(model, teacher, watched),
        on_point=report.point,
        state=state,
        after_step=after_step,
    )
    freeze(student)
    return curve


def decided(source: Source, to: str) -> Aim:
    """The scheme that a target gives the weights, and the parameters that it quantises by default.

    Embedding and head stay in floating point, where they learn as they are; a GGUF recipe would give them a type of their own.

    Raises:
        Refusals: as `quantize`. InputError: FB-E0917 for a target of several schemes.
    """
    files = {path.name: path.read_bytes() for path in source.checkpoint.aux_files if path.name in VOCABULARY_FILES}
    plan = resolve(source.manifest, source.config, Wanted(to=(to,)), source=str(source.root), files=files)
    jobs = [job for job in plan.outputs[0].quantised if job.role not in ("embed", "head")]
    schemes = {job.scheme for job in jobs}
    if len(schemes) != 1:
        words = ", ".join(sorted(map(str, schemes)))
        raise Refusals([InputError("FB-E0917", f"{to} uses several schemes ({words}); training takes one")])
    slots = bind(build_model(source.config), source.manifest)
    params = {slots[name].param for job in jobs for name in job.reads if name in slots}
    (scheme,) = schemes
    assert scheme is not None
    stored = {name for name, slot in slots.items() if slot.param in params}
    return Aim(scheme, params, stored, sum(job.numel for job in jobs))


def load_float(source: Source) -> nn.Module:
    """The model of a float checkpoint in float32, in evaluation mode."""
    module = build_model(source.config)
    fill(module, bind(module, source.manifest).values(), source.read, torch.float32)
    return module.eval()


class _Embedding(Protocol):
    """A transformers model."""

    def get_input_embeddings(self) -> nn.Module: ...


def vocabulary(model: nn.Module) -> int:
    """Rows of the input embedding."""
    return weight_of(cast("_Embedding", model).get_input_embeddings()).shape[0]


def take_start(student: nn.Module, path: str | Path) -> dict[str, QTensor]:
    """The codes of a quantised checkpoint, for `prepare`; what it keeps in floating point is put into the student, for it may have been trained with that.

    Raises:
        InputError: FB-E0914 when it holds no quantised weights, or floats of another shape.
    """
    with open_source(path) as source:
        found, floats = start_from(source), floats_from(source)
    if not found:
        raise InputError("FB-E0914", "the start holds no quantised weights", file=path)
    params = dict(student.named_parameters())
    with torch.no_grad():
        for name, value in floats.items():
            if name in params and params[name].shape != value.shape:
                what = f"the start holds {tuple(value.shape)}, the model {tuple(params[name].shape)}"
                raise InputError("FB-E0914", what, tensor=name)
            if name in params:
                params[name].copy_(value)
    return found


def _float_grids(source: Source, module: nn.Module) -> dict[str, str]:
    """The grid in which the source stores each parameter, and so a trained one too."""
    kinds = {slot.param: source.manifest[name].dtype for name, slot in bind(module, source.manifest).items()}
    return {param: str(leaf(LEAF_GRID[kind])) for param, kind in kinds.items() if kind in LEAF_GRID}
