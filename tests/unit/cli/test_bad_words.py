"""Bad words on the command line: a sentence and status 2 before any work, never a traceback, and nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import fewbit as fb
from fewbit.base.errors import InputError
from fewbit.cli.app import run as cli

ROOT = Path(__file__).resolve().parents[3]
SAMPLE = str(ROOT / "samples" / "sample")
CT = "compressed-tensors:int4-g128"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("short.txt").write_text("two words")
    Path("bad.parquet").write_text("12345")
    Path("bad.yaml").write_bytes(b"\xff\xfe")
    return tmp_path


CASES = {
    "gguf rule": (["--to", "gguf:Q4_K_M", "--rule", "blk.*.ffn_dwn*=q6_k"], "FB-E0407"),
    "rule of two outputs": (["--to", "gguf:Q4_K_M", "--to", "awq", "--rule", "nothing*=keep"], "FB-E0407"),
    "expression": (["--to", "awq", "--rule", "re:((=keep"], "FB-E0404"),
    "gguf expression": (["--to", "gguf:Q4_K_M", "--rule", "re:((=keep"], "FB-E0404"),
    "no text": (["--to", CT, "--method", "imatrix", "--calib", "nosuch.txt"], "FB-E0730"),
    "empty text": (["--to", CT, "--method", "imatrix", "--calib", "empty.txt"], "FB-E0730"),
    "folder as text": (["--to", CT, "--method", "imatrix", "--calib", "/"], "FB-E0730"),
    "short text": (["--to", CT, "--method", "imatrix", "--calib", "short.txt"], "FB-E0732"),
    "parquet": (["--to", CT, "--method", "imatrix", "--calib", "bad.parquet"], "FB-E0730"),
    "imatrix": (["--to", "gguf:Q4_K_M", "--method", "imatrix", "--imatrix", "nosuch.dat"], "FB-E0120"),
    "negative": (["--to", CT, "--set", "steps=-5"], "FB-E0405"),
    "above": (["--to", CT, "--set", "search=percentile", "--set", "percentile=500"], "FB-E0405"),
    "endless": (["--to", CT, "--method", "gptq", "--set", "steps=.inf"], "FB-E0405"),
    "damping": (["--to", CT, "--method", "gptq", "--set", "damping=-1"], "FB-E0405"),
    "yaml": (["--to", CT, "--set", "steps=[1"], "FB-E0405"),
    "no value": (["--to", CT, "--set", "steps="], "FB-E0405"),
    "option of a format": (["--to", "gguf:Q4_K_M,splitt=true"], "FB-E0403"),
    "option of a format without": (["--to", "awq,foo=bar"], "FB-E0403"),
    "word of an option": (["--to", "gguf:Q4_K_M,split=True"], "FB-E0403"),
    "no recipe": (["--recipe", "nosuch.yaml"], "FB-E0401"),
    "folder as recipe": (["--recipe", "."], "FB-E0401"),
    "recipe in latin": (["--recipe", "bad.yaml"], "FB-E0401"),
    "place": (["--to", CT, "-o", "empty.txt/x"], "FB-E0144"),
}


@pytest.mark.parametrize("case", CASES)
def test_quantize_refuses(case: str, place: Path, capsys: pytest.CaptureFixture) -> None:
    words, code = CASES[case]
    before = sorted(path.name for path in place.iterdir())
    assert cli(["quantize", SAMPLE, "-o", "out", *words]) == 2
    said = capsys.readouterr().err
    assert f"error {code}: " in said and "Traceback" not in said
    assert sorted(path.name for path in place.iterdir()) == before


def test_a_gguf_rule_may_name_tensors_either_way() -> None:
    for pattern in ("blk.*.ffn_down*", "*.down_proj.weight"):
        plan = fb.plan_quantize(SAMPLE, to="gguf:Q4_K_M", rules=[{"pattern": pattern, "scheme": "q6_k"}])
        changed = [job.target for job in plan.outputs[0].jobs if job.reason == f"rule {pattern}"]
        kinds = {str(job.scheme) for job in plan.outputs[0].jobs if "ffn_down" in job.target}
        assert kinds == {"q6_k"}, changed


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--lr", "nan"], "FB-E0916"),
        (["--scale-lr", "-1"], "FB-E0916"),
        (["--compute", "fp8"], "FB-E0916"),
        (["--text", "nosuch.jsonl"], "FB-E0730"),
        (["-o", "empty.txt/x"], "FB-E0144"),
    ],
)
def test_train_refuses(words: list[str], code: str, place: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli(["train", SAMPLE, "--to", CT, "-o", "out", "--steps", "1", *words]) == 2
    assert code in capsys.readouterr().err
    assert not (place / "out").exists() and not (place / "out.training").exists()


def test_eval_refuses_before_it_runs_and_prints_one_document(place: Path, capsys: pytest.CaptureFixture) -> None:
    few = ["--base", SAMPLE, "--tokens", "128", "--length", "64", "--no-noise"]
    for words, code in (
        (["--device", "gpu"], "FB-E0513"),
        (["--report", "empty.txt"], "FB-E0144"),
        (["--cache", "empty.txt"], "FB-E0144"),
        (["--text", "nosuch.txt"], "FB-E0730"),
    ):
        assert cli(["eval", SAMPLE, *few, *words]) == 2
        assert code in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert cli(["eval", SAMPLE, *few, "--device", "cuda"]) == 2
        assert "FB-E0513" in capsys.readouterr().err
    assert cli(["quantize", SAMPLE, "--to", CT, "-o", "c", "--no-verify", "-q"]) == 0
    assert cli(["eval", "c", *few, "--cache", "off", "--max-kl", "0.0001", "--json"]) == 4
    out, said = capsys.readouterr()
    assert json.loads(out)["schema"] == "fewbit.eval/1" and "FB-E0803" in said


def test_what_is_not_there_is_bad_input(capsys: pytest.CaptureFixture) -> None:
    assert cli(["verify", "nosuch"]) == 2
    assert cli(["run", SAMPLE, "-p", "x", "--tokenizer", "nosuch"]) == 2
    assert "FB-E0731" in capsys.readouterr().err


def test_run_takes_the_tokenizer_of_a_gguf(capsys: pytest.CaptureFixture) -> None:
    assert cli(["quantize", SAMPLE, "--to", "gguf:Q8_0", "-o", "g", "--no-verify", "-q"]) == 0
    said = []
    for words in (["g"], ["g", "--tokenizer", SAMPLE]):
        assert cli(["run", *words, "-p", "She opened the door", "-n", "4", "--engine", "torch"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and said[0].strip()


def test_defaults_stand_in_the_help(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        raise SystemExit(cli(["quantize", "--help"]))
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "(default: 3/4 of what is free)" in said and "(default: 128)" in said


def test_python_says_it_too(place: Path) -> None:
    for weight in (np.ones((4, 4)), torch.empty(0, 4), torch.ones(4, 4, dtype=torch.int8)):
        with pytest.raises(InputError, match="FB-E0707"):
            fb.quantize_tensor(weight, "int4-channel")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="FB-E0814 there is no argument 'tokns'"):
        fb.evaluate(SAMPLE, SAMPLE, tokns=5)
    plan = fb.plan_quantize(SAMPLE, to="awq", out="xx", ram="8GB")
    assert plan.peak_bytes == fb.plan_quantize(SAMPLE, to="awq", ram=8 * 10**9).peak_bytes
