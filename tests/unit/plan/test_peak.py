"""The peak memory that a plan foretells, against what the system counted of real runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """bench/plan_peak.py, which does the same for more formats and larger matrices."""
    spec = importlib.util.spec_from_file_location("plan_peak", ROOT / "bench" / "plan_peak.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(bench: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Matrices of 11.5 million weights: their work outweighs the program's own memory."""
    return bench.write_model(tmp_path_factory.mktemp("peak") / "model", 2048, 5632, 1)


# a GGUF job takes some 150 MB less where numba's kernels lie compiled on the disk than where it compiles them: the plan allows for the latter
TARGETS = [("compressed-tensors:int4-g128", 0.15), ("compressed-tensors:w8a8", 0.15), ("gguf:Q4_K_M", 0.35)]


@pytest.mark.parametrize(("target", "within"), TARGETS)
def test_the_peak_is_foretold(
    bench: ModuleType, model: Path, target: str, within: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = bench.measure(model, target, tmp_path / "out", "--workers", "2")
    assert found["ratio"] == pytest.approx(1.0, abs=within), found
