"""What a run of `quantize` made, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewbit.base.record import plain
from fewbit.plan.jobs import Plan


@dataclass(frozen=True)
class Result:
    """What `quantize` made.

    Attributes:
        plan: what was decided.
        outputs: final paths, one per target.
        nbytes: bytes of all files of each output.
        seconds, peak_bytes, resumed: of this run.
        losses, notes: per output target and weight, from the solvers.
        verified: per output: findings of `verify`, empty when all is well; None when it did not run.
    """

    plan: Plan
    outputs: tuple[Path, ...]
    nbytes: tuple[int, ...]
    seconds: float
    peak_bytes: int
    resumed: int
    losses: dict[str, dict[str, float]]
    notes: dict[str, tuple[str, ...]]
    verified: tuple[Any, ...] | None = None
    warnings: tuple[str, ...] = field(default_factory=tuple)

    def record(self) -> dict[str, Any]:
        """The result as plain data for `--json`: per output its path, bytes, bits per weight and coverage."""
        outputs = [
            {
                "target": output.target,
                "path": str(path),
                "bytes": nbytes,
                "bits_per_weight": output.bits_per_weight,
                "coverage": output.coverage,
                "tensors": len(output.jobs),
                "quantised": len(output.quantised),
                "losses": self.losses[output.target],
            }
            for output, path, nbytes in zip(self.plan.outputs, self.outputs, self.nbytes, strict=True)
        ]
        return {
            "source": self.plan.source,
            "outputs": outputs,
            "seconds": round(self.seconds, 3),
            "peak_bytes": self.peak_bytes,
            "predicted_peak_bytes": self.plan.peak_bytes,
            "resumed": self.resumed,
            "notes": plain(self.notes),
            "verified": plain(self.verified),
            "warnings": list(self.warnings),
        }
