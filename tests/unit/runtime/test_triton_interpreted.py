"""The Triton kernels run on the CPU by Triton's interpreter: the same tests as on CUDA, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fewbit.math.kernels import has_triton
from fewbit.num.scheme import parse_scheme
from fewbit.runtime.kernels import gpu
from fewbit.runtime.layouts import choose

ROOT = Path(__file__).parents[3]
PICKED = "(equals_the_plain_one and not iq4 and not fp4 and not int2) or (equals_that_of and not dtype2) or no_tokens"  # it takes its time


@pytest.mark.timeout(900)
@pytest.mark.skipif(not has_triton(), reason="NOT TESTED: Triton is not installed")
def test_the_kernels_interpreted() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "src"), "CUDA_VISIBLE_DEVICES": ""}
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "tests/gpu/test_triton_kernels.py",
        "-k",
        PICKED,
        "-p",
        "no:xdist",
    ]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-500:]


def test_nothing_of_triton_is_imported_for_the_cpu() -> None:
    words = "import sys, fewbit.nn, fewbit.solve.gptq, fewbit.runtime.layouts; assert 'triton' not in sys.modules or not hasattr(sys.modules['triton'], 'fewbit')"
    code = (
        words
        + "; assert 'fewbit.math.kernels.gptq_triton' not in sys.modules and 'fewbit.runtime.kernels.gpu_triton' not in sys.modules"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-1000:]


@pytest.mark.parametrize(
    ("spelling", "shape", "word"),
    [("int4-g32", (8, 64), "CUDA"), ("int3-g32", (8, 64), "4 or 8 bits"), ("int4-g16", (8, 64), "multiple of 32"), ("w8a8", (8, 64), "float activations"),
     ("int4-g64", (8, 96), "divide"), ("int4-g32", (2, 8, 64), "matrix"), ("iq2_xxs", (8, 256), "4 or 8 bits")],
)  # fmt: skip
def test_what_the_product_refuses(spelling: str, shape: tuple[int, ...], word: str) -> None:
    scheme = parse_scheme(spelling)
    reason = gpu.accepts(scheme, shape, torch.device("cpu")) if word == "CUDA" else gpu.misfit(scheme, shape)
    assert reason is not None and word in reason
    if len(shape) == 2:
        assert choose(scheme, shape, torch.device("cpu")).name != "triton"
