"""`fewbit run` hands a GGUF file to real llama.cpp, through its Python bindings, and the text is what it gives by itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT, envs_root, require_env, run_driver

pytestmark = pytest.mark.engines
# our Python with the bindings of the llamacpp environment, whose library lies apart from them
PROGRAM = """
import sys, pathlib
root = pathlib.Path(sys.argv[1])
sys.path.append(str(next((root / "lib").glob("python3*")) / "site-packages"))
import llamacpp_driver as driver
driver.ENV, driver.LIBRARIES = root, root / "lib-llama"
driver.bindings()
package, api = sys.modules["llama_cpp"], sys.modules["llama_cpp.llama_cpp"]
package.__dict__.update({name: value for name, value in vars(api).items() if not name.startswith("__")})
package.llama_cpp = api
from importlib.machinery import ModuleSpec
package.__spec__ = ModuleSpec("llama_cpp", None)
from llama_cpp.llama import Llama
package.Llama = Llama
from fewbit.cli.app import run
sys.exit(run(sys.argv[2:]))
"""


def fewbit(*words: str) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT / "src"), str(ROOT / "tests" / "engines" / "drivers")]
    command = [sys.executable, "-c", PROGRAM, str(envs_root() / "llamacpp"), *words]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=environment)


def document(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The JSON document that was printed; the driver sends what goes to stdout to stderr."""
    said = done.stdout + done.stderr
    return json.JSONDecoder().raw_decode(said[said.index("{\n") :])[0]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fewbit import api

    require_env("llamacpp")
    out = tmp_path_factory.mktemp("gguf") / "out"
    api.quantize(ROOT / "samples" / "sample", to="gguf:Q8_0", out=out, verify=False)
    return next(out.rglob("*.gguf"))


def test_text_of_llama_cpp(gguf: Path) -> None:
    done = fewbit("run", str(gguf), "-p", "The history of", "-n", "6", "--json")
    assert done.returncode == 0, done.stderr
    record = document(done)
    assert (
        record["kernels"] == {"llama.cpp": 1}
        and record["tokens"] == 6
        and record["weight_bytes"] == gguf.stat().st_size
    )
    ids = run_driver("llamacpp", "llamacpp", {"model": gguf, "texts": ["The history of"], "special": True})["tokens"][0]
    alone = run_driver("llamacpp", "llamacpp", {"model": gguf, "prompts": [ids], "generate": 6})
    assert record["text"].strip() == alone["generated_text"][0].strip() and record["prompt_tokens"] == len(ids)


def test_torch_when_asked(gguf: Path) -> None:
    sample = str(ROOT / "samples" / "sample")
    words = ("run", str(gguf), "-p", "The history of", "-n", "2", "--json", "--engine", "torch", "--tokenizer", sample)
    done = fewbit(*words)
    assert done.returncode == 0 and document(done)["quantised_layers"] > 0, done.stderr


def test_refusals(tmp_path: Path, gguf: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf.read_bytes()[:4096])
    done = fewbit("run", str(broken), "-p", "x", "--engine", "llama.cpp")
    assert done.returncode == 2 and "FB-E0918" in done.stderr, done.stderr
    done = fewbit("run", str(ROOT / "samples" / "sample"), "-p", "x", "--engine", "llama.cpp")
    assert done.returncode == 2 and "FB-E0918" in done.stderr, done.stderr
