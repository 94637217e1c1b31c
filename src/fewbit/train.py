"""Training in few bits, for people who stay in PyTorch; see docs/training.md.

from fewbit.train import prepare, train, parameter_groups, freeze, qtensors, trained_floats, export      train through the rounding
from fewbit.train import attach, merge                                                                 adapters on quantised layers; needs peft
"""

from __future__ import annotations

from typing import Any

from fewbit.run.trained import export, start_from
from fewbit.run.training import Trained, train_checkpoint
from fewbit.runtime.distil import Point, Schedule, fidelity, train
from fewbit.runtime.qat import (
    Prepared,
    convert,
    freeze,
    observe,
    parameter_groups,
    prepare,
    qtensors,
    trained_floats,
)

__all__ = [
    "Point",
    "Prepared",
    "Schedule",
    "Trained",
    "convert",
    "export",
    "fidelity",
    "freeze",
    "observe",
    "parameter_groups",
    "prepare",
    "qtensors",
    "start_from",
    "train",
    "train_checkpoint",
    "trained_floats",
]
_WITH_PEFT = ("Merged", "attach", "load_adapter", "merge", "register")


def __getattr__(name: str) -> Any:
    if name in _WITH_PEFT:
        from fewbit.runtime import qlora

        return getattr(qlora, name)
    raise AttributeError(f"module 'fewbit.train' has no attribute {name!r}")
