"""Fixtures for tests that need a stranger's environment; a missing one skips the test with the command that builds it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import ggml as ggml_binding
import harness


@pytest.fixture
def engine() -> Callable[..., dict[str, Any]]:
    """engine(env, driver, job) -> result; see harness.run_driver."""
    return harness.run_driver


@pytest.fixture(scope="session")
def ggml() -> ModuleType:
    """llama.cpp's quantisers."""
    harness.require_env("llamacpp")
    return ggml_binding


@pytest.fixture(scope="session")
def sample() -> Path:
    """The sample model's directory."""
    return harness.sample_model()


@pytest.fixture(scope="session")
def sample_gguf(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample model as F32 GGUF, made by llama.cpp's own converter."""
    harness.require_env("llamacpp")
    out = tmp_path_factory.mktemp("gguf") / "sample-f32.gguf"
    harness.run_driver("hf", "convert", {"model": sample, "out": out, "outtype": "f32", "pre": "gpt-2"})
    return out
