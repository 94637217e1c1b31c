"""The importance matrix that a calibrated run leaves beside its GGUF: statistics kept weight by weight in the scratch folder, joined at the end.

Kept on disk as they come, so that a killed run, which begins again with the block it was in, ends with the whole matrix.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fewbit.formats.gguf.plan import PlannedTensor
from fewbit.math.stats import Stats
from fewbit.run.imatrix import Entry, ImportanceMatrix


def _place(folder: Path, name: str) -> Path:
    return folder / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.npz"


def keep_stats(folder: Path, name: str, stats: Mapping[int | None, Stats]) -> None:
    """Keeps sums of squared inputs and counts of one stored weight; of a stack, per expert.

    Args:
        folder: in the scratch folder of the run.
        stats: by expert, or under None.
    """
    seen = {
        expert or 0: (own.importance.double().cpu().numpy() * own.count, own.count)
        for expert, own in stats.items()
        if own.importance is not None and own.count > 0
    }
    if not seen:
        return
    count, columns = max(seen) + 1, len(next(iter(seen.values()))[0])
    sums, counts = np.zeros((count, columns), np.float32), np.zeros(count, np.float32)
    for expert, (total, tokens) in seen.items():
        sums[expert], counts[expert] = total, tokens
    folder.mkdir(parents=True, exist_ok=True)
    beside = _place(folder, name).with_suffix(".new.npz")
    np.savez(beside, sums=sums, counts=counts)
    beside.replace(_place(folder, name))


def kept_matrix(folder: Path, tensors: Iterable[PlannedTensor], recipe: Mapping[str, Any]) -> ImportanceMatrix | None:
    """The importance matrix of all that was kept, under the names of a GGUF; None when no calibration ran.

    Args:
        tensors: of the GGUF's plan. Those whose columns are no inputs of a weight (a matrix that was cut and turned) have no entry.
        recipe: the run's, for the name and size of the calibration text.
    """
    if not folder.is_dir():
        return None
    entries = {}
    for tensor in tensors:
        parts = [_load(_place(folder, name)) for name in tensor.reads]
        columns = tensor.shape[-1] if tensor.shape else 0
        turned = any(op.startswith("unfold") for op in tensor.ops) and "transpose" in tensor.ops
        widths = {part.sums.shape[1] for part in parts if part is not None}
        if tensor.scheme is None or turned or widths != {columns}:
            continue
        experts = tensor.shape[0] if len(tensor.shape) > 2 else 1
        entries[tensor.name] = _joined([part or _nothing(columns) for part in parts], experts)
    datasets = (str(recipe.get("calib") or "default"),)
    return (
        ImportanceMatrix(entries, datasets, int(recipe["calib_samples"]), int(recipe["calib_length"]))
        if entries
        else None
    )


def _load(path: Path) -> Entry | None:
    if not path.exists():
        return None
    with np.load(path) as held:
        return Entry(held["sums"], held["counts"])


def _nothing(columns: int) -> Entry:
    return Entry(np.zeros((1, columns), np.float32), np.zeros(1, np.float32))


def _joined(parts: list[Entry], experts: int) -> Entry:
    """One entry of the parts' rows; experts behind the last that was seen saw nothing."""
    sums, counts = np.concatenate([part.sums for part in parts]), np.concatenate([part.counts for part in parts])
    missing = max(0, (experts if len(parts) == 1 and len(counts) > 1 else len(counts)) - len(counts))
    return Entry(np.pad(sums, ((0, missing), (0, 0))), np.pad(counts, (0, missing)))
