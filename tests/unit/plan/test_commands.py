"""`fewbit plan` and `fewbit advise` as people and machines call them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fewbit.cli.app import run

from .models import CONFIGS, PUBLISHED

LLAMA = str(CONFIGS / "llama-3.1-8b.json")


def call(capsys: pytest.CaptureFixture, *args: str) -> tuple[int, str, str]:
    status = run(list(args))
    out, err = capsys.readouterr()
    return status, out, err


def test_plan_as_json(capsys: pytest.CaptureFixture) -> None:
    status, out, _ = call(capsys, "plan", LLAMA, "--device", "RTX 4090", "--context", "8192", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["schema"] == "fewbit.plan/1"
    assert found["model"]["params"] == PUBLISHED["llama-3.1-8b"]
    assert found["kv"]["bytes"] == 1_073_741_824
    rows = {row["label"]: row for row in found["storages"]}
    assert rows["BF16"]["weight_bytes"] == 2 * PUBLISHED["llama-3.1-8b"]
    assert rows["BF16"]["devices"][0]["fits"] is True
    assert rows["FP32"]["devices"][0]["fits"] is False
    assert found["recommendations"]["RTX 4090"]["command"].startswith("fewbit quantize llama-3.1-8b --to ")


def test_plan_as_a_page(capsys: pytest.CaptureFixture) -> None:
    status, out, _ = call(capsys, "plan", LLAMA, "--device", "RTX 4090", "--device", "24GB")
    assert status == 0
    for words in (
        "8,030,261,248 parameters",
        "Recommended for RTX 4090",
        "Memory to run it",
        "Memory to train it",
        "Key-value cache",
        "What this rests on",
    ):
        assert words in out
    assert max(len(line) for line in out.splitlines()) <= 120


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_model_has_a_page(capsys: pytest.CaptureFixture, name: str) -> None:
    status, out, err = call(capsys, "plan", str(CONFIGS / f"{name}.json"))
    assert (status, err) == (0, "")
    assert f"{PUBLISHED[name]:,}" in out


def test_plan_of_a_folder_reads_headers(capsys: pytest.CaptureFixture, tmp_path) -> None:
    import torch
    from safetensors.torch import save_file

    config = {**json.loads((CONFIGS / "qwen3-0.6b.json").read_text()), "hidden_size": 64, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    status, out, _ = call(capsys, "plan", str(tmp_path), "--json")
    assert status == 0
    assert json.loads(out)["model"]["source"] == "config"
    save_file(
        {"model.layers.0.mlp.up_proj.weight": torch.zeros(8, 64, dtype=torch.bfloat16)},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    status, out, _ = call(capsys, "plan", str(tmp_path), "--json")
    found = json.loads(out)["model"]
    assert (status, found["source"], found["params"], found["disk_bytes"]) == (0, "headers", 512, 1024)


def test_the_device_table(capsys: pytest.CaptureFixture) -> None:
    status, out, _ = call(capsys, "plan", "--devices")
    assert status == 0
    assert "RTX 4090" in out
    status, out, _ = call(capsys, "plan", "--devices", "--json")
    assert json.loads(out)["schema"] == "fewbit.devices/1"


def test_advise_as_json_and_as_a_page(capsys: pytest.CaptureFixture) -> None:
    args = ("advise", LLAMA, "--device", "RTX 4090", "--context", "8192", "--engine", "vllm", "--task", "code")
    status, out, _ = call(capsys, *args, "--json")
    found = json.loads(out)
    assert status == 0
    assert found["schema"] == "fewbit.advice/1"
    assert found["options"][0]["refused"] is None
    assert len(found["steps"]) == 8
    status, out, _ = call(capsys, *args)
    assert status == 0
    assert "How this was decided" in out
    assert f"Choose {found['options'][0]['name']}" in out


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("plan", LLAMA, "--device", "RTX 9999"), "FB-E0452"),
        (("plan", LLAMA, "--kv-dtype", "int3"), "FB-E0453"),
        (("plan", "no-such-thing"), "FB-E0120"),
        (("advise", LLAMA, "--device", "RTX 4090", "--engine", "x"), "FB-E0454"),
    ],
)
def test_errors_are_sentences_with_a_code_and_status_2(capsys: pytest.CaptureFixture, args: tuple, code: str) -> None:
    status, _, err = call(capsys, *args)
    assert status == 2
    assert code in err
    assert "Traceback" not in err


def test_planning_wakes_neither_torch_nor_transformers() -> None:
    program = (
        "import sys; from fewbit.cli.app import run\n"
        f"assert run(['plan', {str(CONFIGS / 'llama-3.1-405b.json')!r}, '-d', '8x H100']) == 0\n"
        f"assert run(['advise', {LLAMA!r}, '-d', 'RTX 4090', '-e', 'vllm']) == 0\n"
        "assert run(['explain', 'format', 'nf4']) == 0 and run(['explain', 'FB-E0601']) == 0\n"
        "awake = {'torch', 'transformers', 'numba', 'matplotlib'} & set(sys.modules)\n"
        "assert not awake, awake"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
