"""What engines load: sentences for every refusal, and the facts that were seen on real loaders."""

from __future__ import annotations

import subprocess
import sys

import pytest
from format_cases import SCHEMES

from fewbit.formats.engines import ENGINES, engine_accepts
from fewbit.formats.table import format_named, format_names
from fewbit.num.scheme import parse_scheme

FORMATS = [name for name in format_names() if format_named(name).container == "safetensors"]
SHAPES = [(256, 512), (96, 320), (4, 256, 512)]


@pytest.mark.parametrize("name", FORMATS)
def test_every_answer_is_none_or_a_sentence(name: str) -> None:
    accepted = 0
    for engine in ENGINES:
        for scheme in SCHEMES:
            for shape in SHAPES:
                answer = engine_accepts(name, scheme, shape, engine)
                assert answer is None or len(answer.split()) > 3, (engine, str(scheme), answer)
                accepted += answer is None
    assert accepted > 0


def test_engines_of_a_row_are_known() -> None:
    for name in FORMATS:
        assert set(format_named(name).engines) <= set(ENGINES), name


SEEN = [  # (format, scheme, engine, loads): facts.md B2 and tests/engines
    ("gptq", "int4-g128", "vllm-cpu", True), ("gptq", "int8-g128", "vllm-cpu", False), ("gptq-v2", "int4-g128-asym", "vllm-cpu", False),
    ("gptq-v2", "int4-g128-asym", "gptqmodel", True), ("awq", "int4-g128-asym", "vllm-cpu", True), ("compressed-tensors", "int4-g128", "vllm-cpu", True),
    ("compressed-tensors", "int4-g128-asym", "vllm-cpu", True), ("compressed-tensors", "int3-g128", "vllm-cpu", False),
    ("compressed-tensors", "int8-channel", "vllm-cpu", False), ("compressed-tensors", "w8a8", "vllm-cpu", True), ("compressed-tensors", "nvfp4", "vllm-cpu", False),
    ("compressed-tensors", "int4-g128-asym", "transformers", True), ("compressed-tensors", "int5-g128", "transformers", True),
    ("bitsandbytes", "nf4-flat64-dq", "transformers", True), ("bitsandbytes", "nf4-flat64-dq", "vllm", False), ("gptq", "int3-g128", "vllm", False),
    ("gptq", "int3-g128", "llama.cpp", False), ("gptq", "int8-g128", "llama.cpp", True), ("fp8", "fp8-e4m3-block128+fp8-e4m3-g128", "vllm-cpu", False), ("fp8", "fp8-e4m3-block128+fp8-e4m3-g128", "vllm", True),
    ("fp8", "fp8-e4m3-tensor+fp8-e4m3-tensor", "vllm-cpu", False), ("compressed-tensors", "fp8-e4m3-channel+fp8-e4m3-token", "vllm-cpu", True),
    ("mlx", "mxfp4", "mlx", True), ("mlx", "mxfp4", "vllm", False),
]  # fmt: skip


@pytest.mark.parametrize(("name", "spelling", "engine", "loads"), SEEN)
def test_what_was_seen(name: str, spelling: str, engine: str, loads: bool) -> None:
    answer = engine_accepts(name, parse_scheme(spelling), (512, 512), engine)
    assert (answer is None) is loads, answer


def test_planning_needs_no_torch() -> None:
    code = (
        "import sys; from fewbit.formats.table import format_named, format_names; from fewbit.formats.engines import engine_accepts\n"
        "from fewbit.formats.exchange import conversion; from fewbit.num.scheme import parse_scheme\n"
        "s = parse_scheme('int4-g128-asym')\n"
        "for name in format_names():\n"
        "    f = format_named(name); s2 = f.conform(s, 'BF16')\n"
        "    if f.accepts(s2, (256, 256)) is None: f.parts('x.weight', s2, (256, 256))\n"
        "conversion(s, (256, 256), 'mlx'); engine_accepts('awq', s, (256, 256), 'vllm')\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
