"""`fewbit eval` and `fewbit compare` through the command line: report, card, cache, gate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "samples" / "sample"
TEXT = ROOT / "samples" / "text" / "wikitext2-test.txt"


def fewbit(tmp: Path, *args: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "FEWBIT_CACHE": str(tmp / "cache")}
    command = [sys.executable, "-m", "fewbit.cli.main", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=280)


def test_eval_reports_and_compare_merges(tmp_path: Path) -> None:
    out = tmp_path / "int4"
    done = fewbit(
        tmp_path,
        "quantize",
        SAMPLE,
        "--to",
        "compressed-tensors:int4-g128",
        "--set",
        "search=absmax",
        "--no-verify",
        "-o",
        out,
    )
    assert done.returncode == 0, done.stderr
    common = ("--base", SAMPLE, "--text", TEXT, "--tokens", 256, "--length", 128)
    first = fewbit(
        tmp_path, "eval", out, *common, "--report", tmp_path / "a", "--look", 0, "--card", "--no-noise", "--generate", 4
    )
    assert first.returncode == 0 and "±" in first.stdout and "same tokens, of 4" in first.stdout, first.stderr
    second = fewbit(tmp_path, "eval", SAMPLE, *common, "--report", tmp_path / "b", "--look", 0, "--no-noise", "--json")
    assert second.returncode == 0 and "from the cache" in second.stderr
    assert json.loads(second.stdout)["schema"] == "fewbit.eval/1"
    assert (out / "README.md").read_text().startswith("---\nbase_model:")
    both = fewbit(tmp_path, "compare", tmp_path / "a", tmp_path / "b", "--report", tmp_path / "both", "--json")
    assert [Path(item["name"]).name for item in json.loads(both.stdout)["scores"]] == ["int4", "sample"]
    assert "int4" in (tmp_path / "both" / "report.html").read_text()
    assert fewbit(tmp_path, "compare", TEXT).returncode == 2
    gate = fewbit(tmp_path, "eval", out, *common, "--no-noise", "--max-kl", "1e-6")
    assert gate.returncode == 4 and "FB-E0803" in gate.stderr
