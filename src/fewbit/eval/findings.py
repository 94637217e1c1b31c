"""What `verify` finds: one record for each thing that is wrong, one for each weight held against its source."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewbit.base.errors import QualityError
from fewbit.base.record import plain


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: opens, config, skipped, manifest, finite, codes, source or engine.
        tensor: name of the tensor concerned, "" for the checkpoint as a whole.
        message: what was found and what was expected.
    """

    kind: str
    tensor: str
    message: str


@dataclass(frozen=True)
class Compared:
    """One weight held against its source: signal to quantisation noise in dB, and what plain rounding gives."""

    tensor: str
    scheme: str
    sqnr_db: float
    expected_db: float


@dataclass(frozen=True)
class Verified:
    """What `verify` found.

    Attributes:
        path: the checkpoint.
        format: name of the recognised format, "" for plain weights.
        tensors, weights: stored tensors looked at; quantised weights decoded.
        findings: everything that is wrong; empty when all is well.
        compared: every weight held against its source, worst first; empty without a base.
        notes: what could not be checked and why.
        warnings: what is as it was made, and not as anyone would want it.
    """

    path: Path
    format: str = ""
    tensors: int = 0
    weights: int = 0
    findings: tuple[Finding, ...] = ()
    compared: tuple[Compared, ...] = ()
    notes: tuple[str, ...] = field(default_factory=tuple)
    warnings: tuple[str, ...] = field(default_factory=tuple)

    @property
    def ok(self) -> bool:
        return not self.findings

    def record(self) -> dict[str, Any]:
        """Plain data for `--json`."""
        return {**plain(self), "ok": self.ok}

    @property
    def summary(self) -> str:
        """One line when all is well, one line per finding when not; then the warnings."""
        against = f", {len(self.compared)} held against their source" if self.compared else ""
        lines = [f"{finding.kind}: {finding.tensor} {finding.message}" for finding in self.findings]
        lines = lines or [f"{self.tensors} tensors finite, {self.weights} weights decoded{against}"]
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])

    def require(self) -> None:
        """Raise unless all is well.

        Raises:
            QualityError: FB-E0820 with the first findings.
        """
        if self.findings:
            listed = "; ".join(f"{finding.tensor or finding.kind}: {finding.message}" for finding in self.findings[:3])
            raise QualityError(
                "FB-E0820",
                f"{len(self.findings)} finding(s): {listed}",
                tensor=self.findings[0].tensor or None,
                file=self.path,
            )


class Findings:
    """Collects findings, at most `limit` of a kind."""

    def __init__(self, limit: int) -> None:
        self.items: list[Finding] = []
        self.limit = limit
        self.counts: dict[str, int] = defaultdict(int)

    def add(self, kind: str, tensor: str, message: str) -> None:
        self.counts[kind] += 1
        if self.counts[kind] <= self.limit:
            self.items.append(Finding(kind, tensor, message))
