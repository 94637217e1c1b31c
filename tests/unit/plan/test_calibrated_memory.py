"""Memory of calibrated runs, planned: more room is used, less room spills and solves fewer weights at once, too little is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewbit import api
from fewbit.base.errors import ResourceError
from fewbit.plan.calibrated import calibrated_budget

SAMPLE = Path(__file__).parents[3] / "samples" / "sample"
LIMIT = 1_500_000_000


def test_less_memory_spills_then_is_refused() -> None:
    plan = api.plan_quantize(SAMPLE, to="compressed-tensors:int4-g128-asym", method="gptq", calib_samples=2048)
    with api.open(SAMPLE) as source:
        plenty, little = (calibrated_budget(plan, source.manifest, ram, 2) for ram in (32 << 30, LIMIT))
        assert not plenty.spill and plenty.kept > 0
        assert little.spill and little.kept == 0
        assert little.peak <= LIMIT < plenty.peak
        with pytest.raises(ResourceError, match="calibration needs") as error:
            calibrated_budget(plan, source.manifest, 500_000_000, 2)
    assert error.value.code == "FB-E0510"
