"""`fewbit run` on the sample: a JSON document, text, and errors with their exit status."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from fewbit.cli.app import run
from fewbit.run.calib import Tokens
from fewbit.run.gguf_source import GgufAsCheckpoint, open_gguf_as_checkpoint

SAMPLE = str(Path(__file__).parents[3] / "samples" / "sample")


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["run", SAMPLE, "-p", "The history of", "-n", "4", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["schema"] == "fewbit.run/1" and record["tokens"] == 4 and record["text"].strip()
    assert record["weight_bytes"] > 16_000_000
    assert record["quantised_layers"] == 0 and record["tokens_per_second"] > 0


def test_text_goes_to_stdout_and_figures_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["run", SAMPLE, "-p", "The history of", "-n", "3", "--temperature", "0.8", "--dtype", "float32"]) == 0
    shown = capsys.readouterr()
    assert shown.out.strip() and "tokens/s" in shown.err and "tokens/s" not in shown.out


@pytest.mark.parametrize("options", (["--dtype", "int7"], ["--top-p", "0"], ["-p", ""]))
def test_refusals(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["run", SAMPLE, "-p", "x", *options]) == 2
    assert "FB-E0907" in capsys.readouterr().err


def test_texts_end_where_the_generation_config_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "sample"
    shutil.copytree(SAMPLE, place)
    words = ["run", str(place), "-p", "The history of", "-n", "6", "--json"]
    assert run(words) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    ids = Tokens(place).inner(text, add_special_tokens=False)["input_ids"]
    (place / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, ids[2]]}))
    assert run(words) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == ids.index(ids[2])


def test_chat_needs_a_template(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["run", SAMPLE, "-p", "x", "--chat"]) == 2
    assert "no chat template" in capsys.readouterr().err


def test_no_model(tmp_path: Path) -> None:
    assert run(["run", str(tmp_path / "none"), "-p", "x"]) == 2


@pytest.mark.parametrize("kind", ("Q4_0", "Q4_K_M"))
def test_gguf_stays_in_its_blocks(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", SAMPLE, "--to", f"gguf:{kind}", "-o", str(tmp_path)]) == 0
    file = next(tmp_path.rglob("*.gguf"))
    capsys.readouterr()
    with open_gguf_as_checkpoint(file) as source:
        assert isinstance(source, GgufAsCheckpoint)
        for name in ("model.layers.3.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"):
            held = source.held(name)
            assert held is not None and torch.allclose(
                held.dequantize(), source.read(name).float(), rtol=2**-8, atol=1e-6
            )
        assert source.held("model.norm.weight") is None
    words = ["run", str(file), "-p", "The history of", "-n", "4", "--tokenizer", SAMPLE, "--json", "--dtype", "float32"]
    assert run(words) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["quantised_layers"] == 56 and record["tokens"] == 4
    assert record["weight_bytes"] < 16_000_000


def test_llama_cpp_is_named_when_it_cannot_serve(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["run", SAMPLE, "-p", "x", "--engine", "llama.cpp"]) == 2
    assert "FB-E0918" in capsys.readouterr().err
    assert run(["run", SAMPLE, "-p", "x", "--engine", "onnx"]) == 2
    assert "FB-E0907" in capsys.readouterr().err
