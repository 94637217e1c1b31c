"""From the command line to llama.cpp and back, for every architecture: quantise, load, decode to a dense checkpoint, load that in transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_models import MODELS, build
from harness import require_env
from test_gguf_models import PROMPTS, SPM, in_llamacpp
from typer.testing import CliRunner

from fewbit.cli.app import app

pytestmark = pytest.mark.engines
FEW = ("--calib-samples", "4", "--calib-length", "64")
TEXT = "The quick brown fox's 123 jumps,  over\n\tcafé 日本語: def f(x): return x_1"


def fewbit(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, f"{words}: {done.output}\n{done.exception!r}"
    return done.output


def dense_logits(folder: Path) -> list[np.ndarray]:
    import transformers

    options = {"dtype": torch.float32, "attn_implementation": "eager", "local_files_only": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.inference_mode():
        return [model(torch.tensor([prompt])).logits[0].float().numpy() for prompt in PROMPTS]


def ids_of(folder: Path) -> list[int]:
    """Token ids of the text by the files themselves: transformers 5 puts Qwen2's own cutting of words in the place of what tokenizer.json says."""
    import tokenizers
    import transformers

    if (folder / "tokenizer.json").exists():
        return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(TEXT, add_special_tokens=False).ids
    return transformers.AutoTokenizer.from_pretrained(folder)(TEXT, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", MODELS)
def test_quantise_load_decode(name: str, tmp_path: Path) -> None:
    require_env("llamacpp")
    from gguf_models import spm_tokenizer

    folder = build(name, tmp_path / "model")
    if name in SPM:
        spm_tokenizer(folder)
    fewbit("quantize", folder, "--to", "gguf:Q4_K_M", "--method", "imatrix", *FEW, "-o", tmp_path / "out")
    file = next((tmp_path / "out").glob("*.gguf"))
    assert {"README.md", "Modelfile"} <= {path.name for path in file.parent.iterdir()}
    found, result = in_llamacpp(file, tmp_path / "logits.npz", texts=[TEXT])
    fewbit("quantize", file, "--to", "dense:f32", "--requantize", "-o", tmp_path / "dense")
    expected = dense_logits(tmp_path / "dense")
    # llama.cpp rounds activations to 8 bits; a router near a tie then takes another expert
    gap = float(np.sqrt(np.mean(np.square(expected[0] - found[0]))) / np.std(expected[0]))
    assert gap < (0.3 if "moe" in name or name in ("mixtral", "deepseek2", "deepseek3", "gpt-oss") else 0.06), gap
    assert ids_of(tmp_path / "dense") == result["tokens"][0]
