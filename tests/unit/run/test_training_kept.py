"""A training run that is stopped or killed ends, after the same call again, in the very same files; what cannot end well is refused before the first step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import write_llama, write_text

from fewbit.base.errors import InputError, Interrupted, ResourceError
from fewbit.cli.app import run as cli
from fewbit.run import training_kept
from fewbit.run.training import train_checkpoint
from fewbit.run.training_kept import training_path
from fewbit.runtime.distil import Schedule, train

TO = "compressed-tensors:int2-g32"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With dropout, so that random numbers matter."""
    return write_llama(tmp_path_factory.mktemp("base"), attention_dropout=0.1)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    text = write_text(tmp_path_factory.mktemp("text"))
    schedule = Schedule(steps=7, batch=4, every=3, noise=0.2, seed=1)
    return {"schedule": schedule, "text": text, "samples": 12, "length": 16, "rates": (2e-2, 1e-2)}


def files(place: Path) -> dict[str, bytes]:
    """All but the clock's readings."""
    found = {path.name: path.read_bytes() for path in place.iterdir()}
    manifest = json.loads(found.pop("fewbit-manifest.json"))
    for point in manifest["training"]["curve"]:
        point.pop("seconds")
    return found | {"curve": json.dumps(manifest["training"]["curve"]).encode()}


def stop_at(step: int) -> Any:
    """Asks for a stop, as Ctrl-C does, when so many steps are done."""

    def take(event: dict[str, Any]) -> None:
        if event["event"] == "job" and event["done"] == step:
            os.kill(os.getpid(), signal.SIGINT)

    return take


@pytest.fixture(scope="module")
def whole(base: Path, words: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted run writes."""
    return files(train_checkpoint(base, TO, tmp_path_factory.mktemp("whole") / "out", **words).out)


def test_stopped_twice_ends_as_one_run(
    base: Path, words: dict[str, Any], whole: dict[str, bytes], tmp_path: Path
) -> None:
    for step in (2, 5):  # between points of the curve, and after one
        with pytest.raises(Interrupted, match="FB-E0511"):
            train_checkpoint(base, TO, tmp_path / "parts", on_event=stop_at(step), **words)
        assert not (tmp_path / "parts").exists() and (training_path(tmp_path / "parts") / "state.safetensors").exists()
    begun: list[dict[str, Any]] = []
    parts = train_checkpoint(base, TO, tmp_path / "parts", on_event=begun.append, **words)
    assert begun[0]["resumed"] == 5 and "5 done before" in begun[0]["text"]
    assert whole == files(parts.out)
    assert [point.step for point in parts.curve] == [0, 3, 6, 7]
    seconds = [point.seconds for point in parts.curve]
    assert seconds == sorted(seconds) and not training_path(parts.out).exists()


def test_other_settings_are_not_mixed_in(base: Path, words: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Interrupted):
        train_checkpoint(base, TO, out, on_event=stop_at(2), **words)
    for changed in ({"rates": (1e-2, 1e-2)}, {"samples": 13}, {"recipe": "floats"}):
        with pytest.raises(InputError, match=r"FB-E0411 .* delete out.training"):
            train_checkpoint(base, TO, out, **(words | changed))
    state = training_path(out) / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-9])
    with pytest.raises(InputError, match="FB-E0919"):
        train_checkpoint(base, TO, out, **words)


def test_killed_and_finished_by_the_same_command(
    base: Path, words: dict[str, Any], whole: dict[str, bytes], tmp_path: Path
) -> None:
    """SIGKILL in a process of its own, which keeps its state after every step."""
    out = tmp_path / "out"
    script = f"""
from fewbit.run import training_kept
from fewbit.run.training import train_checkpoint
from fewbit.runtime.distil import Schedule
import time
training_kept.EVERY, training_kept.SHARE = 0.0, 1e9
def slow(event):
    time.sleep(0.2 if event["event"] == "job" else 0)
words = {words!r}
train_checkpoint({str(base)!r}, {TO!r}, {str(out)!r}, on_event=slow, **words)
"""
    child = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"OMP_NUM_THREADS": "1"})
    state, patience = training_path(out) / "state.safetensors", time.monotonic() + 120
    while not state.exists() and child.poll() is None and time.monotonic() < patience:
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert state.exists() and not out.exists()
    begun: list[dict[str, Any]] = []
    done = train_checkpoint(base, TO, out, on_event=begun.append, **words)
    assert 1 <= begun[0]["resumed"] < 7
    assert files(done.out) == whole


def test_two_runs_do_not_share_an_output(base: Path, words: dict[str, Any], tmp_path: Path) -> None:
    refused: list[str] = []

    def again(event: dict[str, Any]) -> None:
        if event["event"] == "start":
            with pytest.raises(InputError) as caught:
                train_checkpoint(base, TO, tmp_path / "out", **words)
            refused.append(caught.value.code)

    train_checkpoint(base, TO, tmp_path / "out", on_event=again, **words)
    assert refused == ["FB-E0142"]


def test_refused_before_the_first_step(base: Path, words: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    def no_step(event: dict[str, Any]) -> None:
        raise AssertionError(f"a run began: {event}")

    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("x")
    with pytest.raises(InputError, match="FB-E0141"):
        train_checkpoint(base, TO, taken, on_event=no_step, **words)
    with pytest.raises(InputError, match="FB-E0140"):
        train_checkpoint(base, TO, base / "inside", on_event=no_step, **words)
    with pytest.raises(
        ResourceError, match=r"FB-E0514 recipe full with 64 tokens a step takes .* --ram allows 0.10 GB"
    ):
        train_checkpoint(base, TO, tmp_path / "x", on_event=no_step, ram=100_000_000, **words)
    with pytest.raises(InputError, match="FB-E0513"):
        train_checkpoint(base, TO, tmp_path / "x", on_event=no_step, device="tpu", **words)
    monkeypatch.setattr(training_kept, "free_bytes", lambda path: 1000)
    with pytest.raises(ResourceError, match="FB-E0501"):
        train_checkpoint(base, TO, tmp_path / "x", on_event=no_step, **words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]


def test_a_disk_that_fills_up_leaves_the_last_state(
    base: Path, words: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    with pytest.raises(Interrupted):
        train_checkpoint(base, TO, tmp_path / "out", on_event=stop_at(2), **words)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(ResourceError, match="FB-E0502"):
        patch.setattr(training_kept, "save_file", full)
        train_checkpoint(base, TO, tmp_path / "out", on_event=stop_at(4), **words)
    begun: list[dict[str, Any]] = []
    train_checkpoint(base, TO, tmp_path / "out", on_event=begun.append, **words)
    assert begun[0]["resumed"] == 2


def test_the_command_line_ends_with_130_and_says_how_long(
    base: Path, words: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: Any
) -> None:
    monkeypatch.setattr("fewbit.cli.output.EVERY", 0.0)
    flags = ["--text", words["text"], "--samples", "12", "--length", "16", "--steps", "3", "--batch", "4"]
    command = ["train", str(base), "--to", TO, "-o", str(tmp_path / "out"), *flags]
    real = train_checkpoint

    def stopping(*args: Any, on_event: Any, **kwargs: Any) -> Any:
        def both(event: dict[str, Any]) -> None:
            on_event(event)
            stop_at(1)(event)

        return real(*args, on_event=both, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("fewbit.run.training.train_checkpoint", stopping)
        assert cli(command) == 130
    said = capsys.readouterr().err
    assert "3 steps of 64 tokens" in said and " left  step 1, loss " in said and "FB-E0511" in said
    assert cli(command) == 0
    out, said = capsys.readouterr()
    assert "1 done before" in said and "KL" in out
    assert cli(command) == 2 and "FB-E0141" in capsys.readouterr().err


def test_dropout_follows_from_the_seed_and_nothing_else_is_touched() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(16, 8)
            self.drop = torch.nn.Dropout(0.5)
            self.head = torch.nn.Linear(8, 16)

        def forward(self, tokens: torch.Tensor, use_cache: bool = False) -> Any:
            return type("Out", (), {"logits": self.head(self.drop(self.table(tokens)))})

    def trained() -> torch.Tensor:
        torch.manual_seed(3)
        net = Net()
        before = torch.get_rng_state()
        train(net, torch.arange(64).remainder(16).view(8, 8), Schedule(steps=3, batch=2, lr=1e-2))
        assert torch.equal(before, torch.get_rng_state())
        return net.head.weight.detach()

    assert torch.equal(trained(), trained())
