"""Memory of a calibrated run, from shapes alone: the largest of its phases, and how to stay within a limit.

    text     embeddings and head, hidden states of one batch, the stores being filled
    loss     the same with the logits of some sequences; then one block, its graph for one batch, and the grams of its outputs' gradients
    blocks   one block, for each stage its grams, and what the solver makes of them; hidden states, and what is kept between passes
    together one block, and for each of its weights a master weight, values, gradient and its averages; the block's graph
    rotate   the whole model, several times over, and its graph: where rotations are learned

On CUDA the weights, the tokens on their way through them, statistics and solvers lie on the device; hidden states, what is kept between passes and
the tensors being read or written stay in host memory. Then there are two limits, and both must hold.

Hidden states go to disk when they do not fit beside the largest phase; fewer weights are solved at a time when they do not. What then
still does not fit is refused before any work. Which of these is chosen changes no byte of the output.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from fewbit.arch.rewrite_table import options_of as rewrite_options
from fewbit.base.cpu import multiplies_bfloat16
from fewbit.base.errors import ResourceError
from fewbit.base.manifest import Manifest
from fewbit.base.names import layer_index
from fewbit.plan.jobs import Job, Plan
from fewbit.plan.resources import BASE_BYTES, MARGIN
from fewbit.solve.table import SOLVERS

BATCH_TOKENS = 4096  # tokens that go through a block at once
BIG_BLOCK = 64_000_000  # parameters of a block from which weights and hidden states are bfloat16
SPILL_SHARE = 0.3  # share of the budget that hidden states of rewrites may take before they go to disk
WIDE = 2  # inputs so many times as wide as those of the stage before are made again instead of kept
LOGITS = 1 << 22  # logits at once in the backward pass, at least those of one sequence
LOGIT_COPIES = 8  # of float32 logits alive at once there, measured
MOST_OUTPUTS = 8192  # a gram of more outputs would outweigh everything else in memory
MODEL_BYTES = 230 << 20  # transformers, its model without weights, compiled kernels; measured (dev/LOG.md)
LARGE = 2048  # channels up to which grams are factored in float64
FACTOR_BYTES = 4 + 8 + 8  # of an entry of a gram that is factored in float64, beside gram and cross-gram
LARGE_FACTOR_BYTES = 4  # of an entry of a large one: its factor, made in place
# float32 copies of a weight alive at once, measured: in the loop beside the factor, in the sweeps without it
LOOP_COPIES = 3.5
SWEEP_COPIES = 6  # K-quants 5.6, groups of 128 4.7: candidates of the parameters included
# CUDA's context, libraries' kernels and workspaces, gaps between tensors; by public figures, not measured
CONTEXT_BYTES = 700 << 20
STAGING_BYTES = 8  # of a weight on its way between disk and device: as stored, and as float32 or as codes being encoded
# copies of all weights while rotations are learned: true, scaled, turned, rounded, their gradients and temporaries
ROTATED_COPIES = 8
ROTATED_LOGITS = 8  # float32 copies of a step's logits: both models', their logarithms and gradients
LEARNED_COPIES = 10  # the same for learned rounding: master weight, values, gradient, averages, temporaries
# weights of these roles read the same inputs and are solved at the same time
STAGES = (("q", "k", "v", "qkv"), ("gate", "up", "gate_up", "fc1"))
LAST = ("down", "fc2")  # the stage that ends a block
_EXPERT = re.compile(r"experts?\.\d+\.")


@dataclass(frozen=True)
class CalibratedBudget:
    """How a calibrated run uses its memory.

    Attributes:
        workers: weights of a stage solved at once. spill: whether hidden states lie on disk.
        kept: bytes that may stay in memory of what is kept between the passes through a block.
        again: whether wide inputs (what gate and up make) are made again instead of kept: less memory, one product more.
        peak: bytes of resident memory. phases: name -> its peak; the largest is `peak`.
        device_peak, device_phases: the same of device memory; 0 and none where everything is computed on the CPU.
    """

    workers: int
    spill: bool
    kept: int
    again: bool
    peak: int
    phases: Mapping[str, int] = field(default_factory=dict)
    device_peak: int = 0
    device_phases: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Shapes:
    """What the memory of a calibrated run depends on.

    Attributes:
        itemsize: of weights and hidden states as they are run.
        trunk: parameters outside the blocks. vocab, hidden: of the embedding.
        blocks: the jobs of each block.
        samples, length: of the calibration text; drift, loss: sequences of the float stream and of the backward pass.
    """

    itemsize: int
    trunk: int
    vocab: int
    hidden: int
    blocks: tuple[tuple[Job, ...], ...]
    samples: int
    length: int
    drift: int
    loss: int

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return min(self.samples, max(1, BATCH_TOKENS // self.length)) * self.length

    def states(self, sequences: int) -> int:
        """Bytes of the hidden states of some sequences."""
        return sequences * self.length * self.hidden * self.itemsize


def is_big(manifest: Manifest) -> bool:
    """Whether a model's blocks are so large that they are run in bfloat16."""
    sizes: dict[int, int] = {}
    for name, info in manifest.items():
        layer = layer_index(name)
        if layer is not None:
            sizes[layer] = sizes.get(layer, 0) + prod(info.shape)
    return max(sizes.values(), default=0) >= BIG_BLOCK


def in_bfloat16(manifest: Manifest, compute: str, device: str = "cpu") -> bool:
    """Whether calibration text is run through the blocks in bfloat16, products and hidden states; statistics are summed in float32 all the same.

    Weights stored in bfloat16 lose nothing by it, and what the products lose is the noise that the model was trained with and is run with.

    Args:
        compute: as the recipe has it.
    """
    if compute != "auto":
        return compute == "bfloat16"
    stored = {info.dtype for name, info in manifest.items() if layer_index(name) is not None and len(info.shape) > 1}
    native = device != "cpu" or multiplies_bfloat16()
    return is_big(manifest) or (native and stored == {"BF16"})


def options_of(job: Job, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """All options of a job's solver, those of the recipe over the defaults."""
    known = SOLVERS[job.solver].options
    return {**known, **{name: value for name, value in recipe["options"].items() if name in known}}


def shapes_of(plan: Plan, manifest: Manifest, device: str = "cpu") -> Shapes:
    """The shapes of a plan that needs calibration."""
    by_layer: dict[int, list[Job]] = {}
    outside = 0
    for job in plan.outputs[0].jobs:
        if job.layer is None:
            outside += job.numel
        else:
            by_layer.setdefault(job.layer, []).append(job)
    embeds = [job for job in plan.outputs[0].jobs if job.role == "embed" and len(job.shape) == 2]
    vocab, hidden = max((job.shape for job in embeds), default=(0, _widest(by_layer.values())))
    samples = plan.recipe["calib_samples"]
    options = [options_of(job, plan.recipe) for out in plan.outputs for job in out.quantised if job.needs]
    drifts = any("cross_gram" in job.needs for out in plan.outputs for job in out.quantised)
    return Shapes(
        itemsize=2 if in_bfloat16(manifest, plan.recipe["compute"], device) else 4,
        trunk=outside,
        vocab=vocab,
        hidden=hidden,
        blocks=tuple(tuple(jobs) for _, jobs in sorted(by_layer.items())),
        samples=samples,
        length=plan.recipe["calib_length"],
        drift=_most(options, "drift_samples", samples) if drifts else 0,
        loss=_most(options, "loss_samples", samples) if any(one.get("loss_weighting") for one in options) else 0,
    )


def _most(options: list[dict[str, Any]], name: str, every: int) -> int:
    return min(every, max((one.get(name, every) for one in options), default=every))


def _widest(blocks: Iterable[list[Job]]) -> int:
    return max((job.shape[-1] for jobs in blocks for job in jobs if len(job.shape) > 1), default=1)


def calibrated_budget(
    plan: Plan, manifest: Manifest, ram: int, workers: int, vram: int | None = None
) -> CalibratedBudget:
    """How a calibrated run stays within a limit of resident memory, with a margin over the estimate, and on CUDA within one of device memory.

    Args:
        vram: limit of device memory, bytes; None where everything is computed on the CPU.

    Raises:
        ResourceError: FB-E0510 when it does not fit --ram, FB-E0512 when it does not fit --vram, naming the phase.
    """
    shapes = shapes_of(plan, manifest, "cpu" if vram is None else "cuda")
    solved = {name for out in plan.outputs for job in out.quantised if job.needs for name in job.reads}
    for keep, again, spill in ((True, False, False), (True, True, False), (False, True, False), (False, True, True)):
        for count in range(workers, 0, -1):
            found = _budget(shapes, plan, solved, count, keep, again, spill, vram is not None)
            if MARGIN * found.peak <= ram and found.device_peak <= (vram or 0):
                return found
    if vram is not None and found.device_peak > vram:
        raise _too_much("FB-E0512", "of device memory ", "--vram", found.device_phases, vram)
    raise _too_much("FB-E0510", "", "--ram", {name: int(MARGIN * size) for name, size in found.phases.items()}, ram)


def _too_much(code: str, what: str, flag: str, phases: Mapping[str, int], limit: int) -> ResourceError:
    worst = max(phases, key=lambda name: phases[name])
    return ResourceError(
        code,
        f"calibration needs {phases[worst] / 1e9:.2f} GB {what}at its peak ({worst}), {flag} allows {limit / 1e9:.2f} GB",
        remedy=f"more {flag}, fewer or shorter sequences (--calib-samples, --calib-length), or --set loss_weighting=false",
    )


def _budget(
    shapes: Shapes,
    plan: Plan,
    solved: set[str],
    workers: int,
    keep: bool,
    again: bool,
    spill: bool,
    device: bool = False,
) -> CalibratedBudget:
    kept = 0
    if keep:
        # the widest inputs that are not made again (where those are kept, the outputs lie beside them), and the outputs that join the residual stream (in
        # their place if as wide), of both streams
        widths = [job.shape[-1] for jobs in shapes.blocks for job in jobs if len(job.shape) > 1]
        widest = max((width for width in widths if not again or width < WIDE * shapes.hidden), default=0)
        width = shapes.hidden + (widest if widest != shapes.hidden else 0)
        kept = (shapes.samples + shapes.drift) * shapes.length * width * shapes.itemsize
    phases = _phases(shapes, plan, solved, workers, kept, spill)
    base = BASE_BYTES + MODEL_BYTES
    if not device:
        sums = {name: base + host + computing for name, (host, computing) in phases.items()}
        return CalibratedBudget(workers, spill, kept, again, max(sums.values()), sums)
    largest = max((job.numel for out in plan.outputs for job in out.jobs), default=0)
    hosts = {name: base + host + workers * largest * STAGING_BYTES for name, (host, _) in phases.items()}
    devices = {name: CONTEXT_BYTES + computing for name, (_, computing) in phases.items()}
    return CalibratedBudget(
        workers,
        spill,
        kept,
        again,
        max(hosts.values()),
        hosts,
        device_peak=max(devices.values()),
        device_phases=devices,
    )


def _phases(
    shapes: Shapes, plan: Plan, solved: set[str], workers: int, kept: int, spill: bool
) -> dict[str, tuple[int, int]]:
    """(what waits in host memory, what is being computed with) of each phase, bytes."""
    streams = 0 if spill else shapes.states(shapes.samples) + shapes.states(shapes.drift)
    trunk = shapes.trunk * shapes.itemsize
    batch = shapes.tokens * shapes.hidden * 4
    phases = {"text": (streams, trunk + 3 * batch)}
    if shapes.loss:
        inputs = 0 if spill else shapes.states(shapes.loss) * (len(shapes.blocks) + 2)
        logits = max(shapes.length * shapes.vocab, min(LOGITS, shapes.tokens * shapes.vocab))
        block = max(map(partial_backward(shapes), shapes.blocks))
        phases["loss"] = (inputs, trunk + max(LOGIT_COPIES * 4 * logits + batch, block))
    for jobs in shapes.blocks:
        for name, taken in _block_phases(shapes, plan, jobs, solved, workers).items():
            wanted = 0 if spill else shapes.states(shapes.samples)
            host = streams + {"blocks": kept, "together": wanted}[name]
            phases[name] = (host, max(phases.get(name, (0, 0))[1], taken))
    if "spin" in plan.recipe["rewrites"]:
        phases["rotate"] = (0, _rotation_bytes(shapes, plan))
    return phases


def _rotation_bytes(shapes: Shapes, plan: Plan) -> int:
    """Bytes of learning rotations: all weights in float32 some times over, and the graph of one step."""
    batch = int(rewrite_options("spin", plan.recipe["options"])["batch"])
    weights = shapes.trunk + sum(job.numel for jobs in shapes.blocks for job in jobs)
    step = replace(shapes, itemsize=4, samples=batch)
    tokens = batch * shapes.length
    graph = sum(graph_bytes(step, jobs) * tokens // max(1, step.tokens) for jobs in shapes.blocks)
    return weights * 4 * ROTATED_COPIES + graph + ROTATED_LOGITS * 4 * tokens * shapes.vocab


def partial_backward(shapes: Shapes) -> Any:
    """Bytes of one block in the backward pass, as a function of its jobs."""

    def taken(jobs: tuple[Job, ...]) -> int:
        grams = sum(4 * job.shape[-2] ** 2 for job in jobs if len(job.shape) == 2 and job.shape[-2] <= MOST_OUTPUTS)
        return sum(job.numel for job in jobs) * shapes.itemsize + graph_bytes(shapes, jobs) + grams

    return taken


def graph_bytes(shapes: Shapes, jobs: tuple[Job, ...]) -> int:
    """What autograd keeps of one batch: inputs and outputs of every product, norms in float32."""
    widths = sum(job.shape[-1] + job.shape[-2] for job in jobs if len(job.shape) == 2)
    return shapes.tokens * (widths * shapes.itemsize + 6 * shapes.hidden * 4)


def _block_phases(shapes: Shapes, plan: Plan, jobs: tuple[Job, ...], solved: set[str], workers: int) -> dict[str, int]:
    """Bytes of one block's phases, beside what is there all the time."""
    one = sum(job.numel for job in jobs) * shapes.itemsize
    own = one * (2 if shapes.drift else 1)
    widest = max((size for job in jobs for size in job.shape[-2:] if len(job.shape) > 1), default=1)
    passing = shapes.tokens * (3 * widest + 4 * shapes.hidden) * shapes.itemsize
    mine = [job for job in jobs if job.scheme is not None and solved & set(job.reads)]
    grams = shapes.loss and sum(4 * job.shape[-2] ** 2 for job in mine if job.shape[-2] <= MOST_OUTPUTS)
    found = {"blocks": own + passing + grams}
    for stage in _stages(mine):
        channels = stage[0].shape[-1]
        experts = _grams(stage)
        gram, ends = 4 * channels**2, stage[0].role in LAST and experts == 1
        paired = int(shapes.drift > 0 and experts == 1)
        held = experts * gram + paired * (4 * prod(stage[0].shape[-2:]) if ends else gram)
        # the regression of the drift: a factor, a small gram without the tokens it is judged by, and the paired tokens' own gram
        factor = 1 if channels > LARGE else 3
        apart = paired * gram * (factor + (shapes.drift < shapes.samples))
        flat = shapes.tokens * channels * 4 * 3
        solving = sum(sorted((_solver_bytes(job) for job in stage), reverse=True)[:workers])
        if ends:  # the float block is gone by then
            solving -= own - one
        found["blocks"] = max(found["blocks"], own + grams + held + max(passing + flat, apart, solving))
    learned = [job for job in mine if SOLVERS[job.solver].together is not None]
    if learned:
        copies = sum(job.numel for job in learned) * 4 * LEARNED_COPIES
        found["together"] = own + grams + copies + graph_bytes(shapes, jobs)
    return found


def _stages(jobs: list[Job]) -> list[list[Job]]:
    """Jobs that are solved at the same time: those of one role, or of roles that read the same inputs."""
    found: dict[Any, list[Job]] = {}
    for job in jobs:
        together = next((roles for roles in STAGES if job.role in roles), job.role)
        found.setdefault((together, job.shape[-1]), []).append(job)
    return list(found.values())


def _grams(stage: list[Job]) -> int:
    """Grams of a stage: one, or one per expert."""
    stacked = max((prod(job.shape[:-2]) for job in stage), default=1)
    single = len({match.group(0) for job in stage if (match := _EXPERT.search(job.name))})
    return max(1, stacked, single)


def _solver_bytes(job: Job) -> int:
    """What solving one weight (one expert of a stack) takes beside its statistics."""
    rows, channels = job.shape[-2:]
    weight = rows * channels * 4
    if "gram" not in SOLVERS[job.solver].needs:
        return weight * SWEEP_COPIES
    across = rows**2 * (FACTOR_BYTES if rows <= LARGE else 2 * LARGE_FACTOR_BYTES) if rows <= MOST_OUTPUTS else 0
    factoring = weight + channels**2 * (FACTOR_BYTES if channels <= LARGE else LARGE_FACTOR_BYTES)
    looping = int(weight * LOOP_COPIES) + channels**2 * LARGE_FACTOR_BYTES
    return across + max(factoring, looping, weight * SWEEP_COPIES)
