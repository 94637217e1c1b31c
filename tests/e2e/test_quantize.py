"""The main job, through the command line, on the sample model: quantise, be killed, resume, look, measure."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fewbit import api
from fewbit.base.errors import InputError, Refusals
from fewbit.cli import app
from fewbit.run import engine

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "samples" / "sample"
TEXT = ROOT / "samples" / "text" / "wikitext2-test.txt"


def fewbit(*args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "fewbit.cli.main", *args], capture_output=True, text=True, cwd=ROOT, timeout=280
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("int4") / "out"
    fewbit(
        "quantize",
        str(SAMPLE),
        "--to",
        "compressed-tensors:int4-g128",
        "--set",
        "search=absmax",
        "--no-verify",
        "-o",
        str(out),
    )
    return out


def test_what_was_written_is_whole(int4: Path) -> None:
    listing = json.loads((int4 / "fewbit-manifest.json").read_text())
    for name, facts in listing["files"].items():
        data = (int4 / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (facts["bytes"], facts["sha256"])
    assert not (int4 / ".fewbit").exists() and not int4.with_name("out.partial").exists()
    assert (int4 / "tokenizer.json").read_bytes() == (SAMPLE / "tokenizer.json").read_bytes()


def test_inspect_sees_what_was_planned(int4: Path) -> None:
    found = json.loads(fewbit("inspect", str(int4), "--json").stdout)
    assert found["schema"] == "fewbit.inspect/1" and found["format"] == "compressed-tensors"
    stored = {row["role"]: row["stored"] for row in found["groups"]}
    assert stored["q"].startswith("int4-g128") and stored["embed"] == "BF16"


def test_eval_measures_it(int4: Path) -> None:
    done = fewbit("eval", str(int4), "--base", str(SAMPLE), "--text", str(TEXT), "--tokens", "2048", "--json")
    score = json.loads(done.stdout)["scores"][0]
    assert 0.01 < score["kl"]["value"] < 0.08 and score["kl"]["stderr"] > 0
    assert (
        fewbit(
            "eval",
            str(int4),
            "--base",
            str(SAMPLE),
            "--text",
            str(TEXT),
            "--tokens",
            "512",
            "--max-kl",
            "1e-6",
            check=False,
        ).returncode
        == 4
    )


def test_a_dense_copy_is_exact(tmp_path: Path) -> None:
    result = api.quantize(SAMPLE, to="dense:bf16", out=tmp_path / "copy", verify=False)
    score = api.evaluate(result.outputs[0], SAMPLE, text=str(TEXT), tokens=512)[0]
    assert score.measures["kl"][0] == 0.0


def test_many_outputs_from_one_run(tmp_path: Path) -> None:
    targets = ("compressed-tensors:int8-channel", "compressed-tensors:fp8", "dense:nf4-g64")
    result = api.quantize(SAMPLE, to=targets, out=tmp_path / "out", verify=False)
    assert [path.name for path in result.outputs] == [
        "compressed-tensors-int8-channel",
        "compressed-tensors-fp8",
        "dense-nf4-g64",
    ]
    assert all((path / "config.json").exists() for path in result.outputs)


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    done = fewbit(
        "quantize",
        str(SAMPLE),
        "--to",
        "compressed-tensors:int4-g128",
        "--dry-run",
        "--json",
        "-o",
        str(tmp_path / "out"),
    )
    plan = json.loads(done.stdout)
    assert plan["schema"] == "fewbit.dry-run/1" and len(plan["outputs"][0]["jobs"]) == 74
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "status", "word"),
    [
        (["--to", "nonsense"], 2, "FB-E0604"),
        (["--to", "compressed-tensors:int4-g96"], 2, "FB-E0602"),
        (["--to", "compressed-tensors:int4-g128", "--ram", "10MB"], 3, "FB-E0510"),
        (["--to", "compressed-tensors:int4-g128", "--method", "magic"], 2, "FB-E0406"),
        ([], 2, "FB-E0403"),
        (["--to", "compressed-tensors:int9"], 2, "FB-E0601"),
    ],
)
def test_refusals_come_first_with_a_status_and_a_hint(tmp_path: Path, args: list[str], status: int, word: str) -> None:
    done = fewbit("quantize", str(SAMPLE), *args, "-o", str(tmp_path / "out"), check=False)
    assert (done.returncode, word in done.stderr, "hint" in done.stderr) == (status, True, True), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_input_and_output_may_not_be_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="FB-E0140"):
        api.quantize(SAMPLE, to="dense:bf16", out=SAMPLE, overwrite=True)
    assert (SAMPLE / "model.safetensors").stat().st_size == 16793976


def test_a_quantised_source_is_refused_unless_asked(int4: Path, tmp_path: Path) -> None:
    with pytest.raises(Refusals, match="FB-E0410"):
        api.quantize(int4, to="dense:bf16", out=tmp_path / "x")
    result = api.quantize(int4, to="dense:f32", requantize=True, out=tmp_path / "y", verify=False)
    score = api.evaluate(result.outputs[0], int4, text=str(TEXT), tokens=512)[0]
    assert score.measures["kl"][0] < 1e-9


KILL = ["--to", "compressed-tensors:int4-g64-asym", "--to", "dense:nf4-g64", "--set", "search=absmax", "--no-verify"]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_kill_9_and_the_same_command_give_the_same_bytes(tmp_path: Path, seed: int) -> None:
    whole = tmp_path / "whole"
    fewbit("quantize", str(SAMPLE), *KILL, "-o", str(whole))
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "fewbit.cli.main", "quantize", str(SAMPLE), *KILL, "-o", str(out)]
    delay = random.Random(seed)
    for _ in range(3):
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ
        )
        _wait_for_work(out, process)
        time.sleep(delay.uniform(0.0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.wait()
    fewbit("quantize", str(SAMPLE), *KILL, "-o", str(out), *(["--overwrite"] if out.exists() else []))
    assert hashes(out) == hashes(whole)


def _wait_for_work(out: Path, process: subprocess.Popen) -> None:
    """Until the run has begun to write, or is over."""
    while process.poll() is None and not any(out.parent.glob(f"{out.name}*/**/journal.jsonl")):
        time.sleep(0.02)


def long_search(out: Path, steps: int) -> list[str]:
    """A command that takes long enough to be stopped in the middle."""
    command = [sys.executable, "-m", "fewbit.cli.main", "quantize", str(SAMPLE), "--to", "dense:nf4-g64"]
    return [*command, "--set", f"steps={steps}", "--no-verify", "-o", str(out)]


def test_ctrl_c_leaves_a_resumable_folder_and_says_how(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = long_search(out, 4000)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    _wait_for_work(out, process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130 and "resume: fewbit quantize" in stderr, stderr
    assert out.with_name("out.partial").exists() and not out.exists()


@pytest.mark.parametrize("where", ["_open_sinks", "_record"])
def test_a_signal_at_either_end_of_a_run_is_answered(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first tensor the run says how to go on; once the outputs get their names it ends them first."""
    before = getattr(engine, where)

    def signalled(*args: Any, **kwargs: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return before(*args, **kwargs)

    monkeypatch.setattr(engine, where, signalled)
    out = tmp_path / "out"
    status = app.run(["quantize", str(SAMPLE), "--to", "dense:bf16", "--no-verify", "-o", str(out)])
    said = capsys.readouterr().err
    assert status == 130
    if where == "_open_sinks":
        assert "resume: fewbit quantize" in said and not out.exists()
        monkeypatch.undo()
        assert app.run(["quantize", str(SAMPLE), "--to", "dense:bf16", "--no-verify", "-o", str(out)]) == 0
    else:
        assert "interrupted" in said
    assert (out / "fewbit-manifest.json").exists()


def test_changed_options_are_refused_by_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = long_search(out, 200)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _wait_for_work(out, process)
    process.kill()
    process.wait()
    with pytest.raises(InputError, match=r"recipe\.options"):
        api.quantize(SAMPLE, to="dense:nf4-g64", options={"steps": 100}, out=out, verify=False)
