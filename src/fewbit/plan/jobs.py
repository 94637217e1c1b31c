"""The plan as data: one job per output tensor, and what each will read and write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from fewbit.base.errors import InputError
from fewbit.base.manifest import data_bytes
from fewbit.base.record import plain
from fewbit.num.scheme import Scheme, parse_scheme
from fewbit.solve.table import SOLVERS

Parts = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Job:
    """One weight of one output.

    Attributes:
        name: source tensor; the first of `reads`.
        target: name of the weight in the output.
        reads: source tensors that it is made of.
        ops: named transforms of what was read, applied in order (see `arch.ops`): "transpose", "stack", …
        shape: shape after the transforms, [..., out, in] for matrices.
        source_dtype: safetensors dtype of what is read.
        role, layer: from `arch.infer`.
        scheme: how it will be stored, or None when it is kept.
        solver: name of the solver, "" when it is kept.
        reason: why, in words that stand in the plan's table.
        writes: stored tensors: name -> (dtype, shape).
        by_rows: whether rows may be written as they are solved: each is stored apart from the others.
    """

    name: str
    target: str
    reads: tuple[str, ...]
    ops: tuple[str, ...]
    shape: tuple[int, ...]
    source_dtype: str
    role: str
    layer: int | None
    scheme: Scheme | None
    solver: str
    reason: str
    writes: Parts = field(default_factory=dict)
    by_rows: bool = False

    @property
    def numel(self) -> int:
        total = 1
        for size in self.shape:
            total *= size
        return total

    @property
    def wanted(self) -> Scheme:
        """The scheme of a job that quantises.

        Raises:
            InputError: FB-E0603 for a tensor that is kept as it is.
        """
        if self.scheme is None:
            raise InputError("FB-E0603", "the tensor is kept as it is, it has no scheme", tensor=self.name)
        return self.scheme

    @property
    def needs(self) -> frozenset[str]:
        """Calibration statistics: of the solver, and for a static activation range."""
        asked = SOLVERS[self.solver].needs if self.scheme is not None else frozenset()
        return asked | {"absmax"} if self.scheme is not None and self.scheme.static else asked

    @property
    def nbytes(self) -> int:
        """Bytes that the stored tensors take."""
        return sum(data_bytes(dtype, shape) for dtype, shape in self.writes.values())

    def record(self) -> dict[str, Any]:
        """The job as plain data; `job_from_record` is the inverse."""
        return {**plain(self), "scheme": str(self.scheme) if self.scheme else None}


def job_from_record(data: dict[str, Any]) -> Job:
    """A job from the plain data that `Job.record` made."""
    return Job(
        **{
            **data,
            "reads": tuple(data["reads"]),
            "ops": tuple(data["ops"]),
            "shape": tuple(data["shape"]),
            "scheme": parse_scheme(data["scheme"]) if data["scheme"] else None,
            "writes": {name: (dtype, tuple(shape)) for name, (dtype, shape) in data["writes"].items()},
        }
    )


@dataclass(frozen=True)
class Output:
    """One thing to write: a directory of safetensors or a GGUF file.

    Attributes:
        target: as the user gave it, e.g. "gguf:Q4_K_M".
        format: name of the format.
        options: format options.
        jobs: in the order in which tensors lie in the output.
        config: the new config.json (safetensors outputs) or metadata (GGUF).
        small_files: JSON files written beside it, by name.
        carry: what the sink of the container needs besides; no part of the record.
    """

    target: str
    format: str
    options: dict[str, str]
    jobs: tuple[Job, ...]
    config: dict[str, Any] = field(default_factory=dict)
    small_files: dict[str, Any] = field(default_factory=dict)
    carry: Any = None

    @property
    def nbytes(self) -> int:
        return sum(job.nbytes for job in self.jobs)

    @property
    def quantised(self) -> tuple[Job, ...]:
        return tuple(job for job in self.jobs if job.scheme is not None)

    @property
    def coverage(self) -> float:
        """Share of the parameters that is quantised."""
        return sum(job.numel for job in self.quantised) / max(1, sum(job.numel for job in self.jobs))

    @property
    def bits_per_weight(self) -> float:
        """Bits per parameter of the whole output, kept tensors included."""
        return 8 * self.nbytes / max(1, sum(job.numel for job in self.jobs))

    def record(self) -> dict[str, Any]:
        """The output as plain data."""
        return {**plain(replace(self, jobs=(), carry=None)), "jobs": [job.record() for job in self.jobs]}

    def groups(self) -> Iterator[tuple[tuple[str, str, str], int, int, int]]:
        """The table of what happens: ((role, scheme or dtype, reason), tensors, parameters, bytes) in order of first appearance."""
        count: Counter[tuple[str, str, str]] = Counter()
        numel, nbytes = count.copy(), count.copy()
        for job in self.jobs:
            stored = (
                str(job.scheme) if job.scheme else "/".join(dict.fromkeys(dtype for dtype, _ in job.writes.values()))
            )
            key = (job.role, stored, job.reason)
            count[key] += 1
            numel[key] += job.numel
            nbytes[key] += job.nbytes
        for key in count:
            yield key, count[key], numel[key], nbytes[key]


@dataclass(frozen=True)
class Plan:
    """Everything that a run will do, decided.

    Attributes:
        source: path or id of the checkpoint.
        outputs: one per `--to`.
        warnings: what the user should know, not errors.
        recipe: the recipe as plain data.
        needs: statistics that the solvers ask for; empty for a data-free run.
        peak_bytes: predicted peak of resident memory above the interpreter's own.
        disk_bytes: bytes that the outputs take, while being written.
        device_bytes: predicted peak of device memory of a calibrated run on CUDA; 0 where all is computed on the CPU.
        rewrites: what the recipe's rewrites do to the float model first, in sentences.
    """

    source: str
    outputs: tuple[Output, ...]
    warnings: tuple[str, ...]
    recipe: dict[str, Any]
    needs: tuple[str, ...] = ()
    peak_bytes: int = 0
    disk_bytes: int = 0
    rewrites: tuple[str, ...] = ()
    device_bytes: int = 0

    def record(self) -> dict[str, Any]:
        """The plan as plain data, for `--json` and the journal."""
        outputs = [out.record() for out in self.outputs]
        return {**plain(replace(self, outputs=())), "outputs": outputs}
