"""Solvers that improve a block's weights together, through the engine: the loss falls, every output gets its own, stopped runs end with the same bytes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_calibrated import hashes, make

from fewbit import api
from fewbit.base.errors import Interrupted

RUN = {
    "to": ["dense:int2-g32-asym", "gptq:int3-g32"],
    "method": "learned",
    "calib_samples": 12,
    "calib_length": 64,
    "options": {"sweeps": 0, "steps": 3, "start": "rtn", "iterations": 16, "trial": False},
}


def gains(notes: dict[str, tuple[str, ...]]) -> list[float]:
    """Loss after over loss before, of every block and output."""
    found = {
        note
        for lines in notes.values()
        for note in lines
        if note.startswith("learned rounding lowered the block's loss")
    }
    pairs = [re.findall(r"[\d.e+-]+(?= to|$)", note.removesuffix(".")) for note in found]
    return [float(after) / float(before) for before, after in pairs]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_blocks_improve(model_type: str, tmp_path: Path) -> None:
    make(model_type, tmp_path / "model")
    recipe = {**RUN, "to": "dense:int2-g32-asym"}
    result = api.quantize(tmp_path / "model", out=tmp_path / "out", verify=True, **recipe)
    found = gains(result.notes)
    assert len(found) == 2 and max(found) < 0.95
    assert all(any("learned" in note for note in result.notes[job.target]) for job in result.plan.outputs[0].quantised)


def test_a_stopped_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    make("llama", tmp_path / "model")
    whole = api.quantize(tmp_path / "model", out=tmp_path / "whole", verify=False, **RUN)
    assert whole.losses[whole.plan.outputs[0].target] != whole.losses[whole.plan.outputs[1].target]
    seen = 0

    def stop(event: dict) -> None:
        nonlocal seen
        seen += event["event"] == "job" and "layers.1" in event["name"] and "proj" in event["name"]
        if seen >= 3:
            raise Interrupted("FB-E0511", "stopped by the test")

    with pytest.raises(Interrupted):
        api.quantize(tmp_path / "model", out=tmp_path / "stopped", verify=False, on_event=stop, **RUN)
    result = api.quantize(tmp_path / "model", out=tmp_path / "stopped", verify=False, **RUN)
    assert result.resumed > 0
    assert hashes(tmp_path / "stopped") == hashes(tmp_path / "whole")
