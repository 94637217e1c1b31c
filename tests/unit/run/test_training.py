"""fewbit train: from a float checkpoint to a trained, quantised one, exactly as the student computed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import write_llama, write_text

from fewbit import api
from fewbit.base.errors import FewbitError, InputError
from fewbit.cli.app import run as cli
from fewbit.eval.provenance import about
from fewbit.run.gguf_source import open_gguf_as_checkpoint
from fewbit.run.source import open_source
from fewbit.run.training import load_float, train_checkpoint
from fewbit.runtime.distil import Schedule


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_text(tmp_path_factory.mktemp("text"))


def test_train_lowers_kl_and_writes_codes(base: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = [
        "--samples",
        "24",
        "--length",
        "16",
        "--steps",
        "8",
        "--batch",
        "4",
        "--text",
        text,
        "--lr",
        "2e-2",
        "--scale-lr",
        "1e-2",
        "--json",
    ]
    first = ["train", str(base), "--to", "compressed-tensors:int2-g32", "-o", str(tmp_path / "a"), *words]
    assert cli(first) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["scheme"] == "int2-g32-bf16" and said["quantised"] == 14 and said["tokens"] == 8 * 4 * 16
    assert said["curve"][-1]["kl"] < said["curve"][0]["kl"]
    with open_source(tmp_path / "a") as written:  # what `fewbit eval --report` draws
        facts = about(written)
    assert facts["training"]["curve"] == said["curve"] and facts["training"]["tokens"] == said["tokens"]
    assert facts["command"].startswith(f"fewbit train {base} --to compressed-tensors:int2-g32 --recipe full --steps 8")
    again = ["train", str(base), "--to", "compressed-tensors:int2-g32", "-o", str(tmp_path / "b"), *words]
    assert cli([*again, "--start", str(tmp_path / "a"), "--recipe", "scales"]) == 0
    on = json.loads(capsys.readouterr().out)
    # codes, scales, norms and the embedding begin where the first run ended
    assert (
        on["curve"][0]["kl"] == pytest.approx(said["curve"][-1]["kl"], rel=1e-6) and on["learning"] < said["learning"]
    )
    with open_source(tmp_path / "a") as a, open_source(tmp_path / "b") as b:
        for name in a.stored:
            assert torch.equal(a.qtensor(name).codes, b.qtensor(name).codes)  # type: ignore[union-attr]
        assert not any(torch.equal(a.read(name), b.read(name)) for name in list(a.stored)[:2])


def test_the_written_model_is_the_last_point_of_the_curve(base: Path, text: str, tmp_path: Path) -> None:
    from fewbit.run.calib import calibration
    from fewbit.runtime.distil import fidelity

    schedule = Schedule(steps=4, batch=2, every=4)
    done = train_checkpoint(
        base, "compressed-tensors:int3-channel", tmp_path / "out", schedule=schedule, text=text, samples=16, length=16
    )
    tokens = calibration(text, base, 24, 16, 0, 8192).tokens[:8]
    with open_source(base) as source, open_source(done.out) as written:
        found = fidelity(load_float(written), load_float(source), tokens.split(4))
    assert found["kl"] == pytest.approx(done.curve[-1].measures["kl"], rel=1e-9)


def test_a_gguf_serves_as_start(base: Path, text: str, tmp_path: Path) -> None:
    """Its codes, row by row as the checkpoint has them, although the file keeps the rows of q and k in another order."""
    api.quantize(base, to="gguf:pure-q4_0", out=tmp_path / "start", verify=False)
    schedule = Schedule(steps=1, batch=2, every=1)
    words = {"text": text, "samples": 16, "length": 16, "schedule": schedule, "rates": (0.0, 0.0)}
    done = train_checkpoint(
        base, "gguf:pure-q4_0", tmp_path / "out", start=tmp_path / "start", recipe="scales", **words
    )
    (begun,), (ended,) = ([*place.glob("*.gguf")] for place in (tmp_path / "start", done.out))
    with open_gguf_as_checkpoint(begun) as a, open_gguf_as_checkpoint(ended) as b:
        for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
            ours, theirs = b.held(name), a.held(name)  # type: ignore[attr-defined]
            assert torch.equal(ours.codes, theirs.codes) and torch.equal(ours.scale, theirs.scale), name


def test_bad_words_are_refused(base: Path, text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="FB-E0913"):
        train_checkpoint(base, "dense:int4-g32", tmp_path / "x", recipe="half")
    with pytest.raises(FewbitError, match="FB-E06"):
        train_checkpoint(base, "compressed-tensors:nf4-g32", tmp_path / "x")
    words = {"text": text, "samples": 16, "length": 16, "schedule": Schedule(steps=1, batch=2)}
    train_checkpoint(base, "compressed-tensors:int4-g32", tmp_path / "four", **words)
    with pytest.raises(InputError, match="FB-E0914"):
        train_checkpoint(base, "compressed-tensors:int3-g32", tmp_path / "x", start=tmp_path / "four", **words)
    with pytest.raises(InputError, match="FB-E0914"):
        train_checkpoint(base, "compressed-tensors:int4-g32", tmp_path / "x", start=base, **words)
    with pytest.raises(InputError, match="FB-E0410"):
        train_checkpoint(tmp_path / "four", "compressed-tensors:int4-g32", tmp_path / "x", **words)
    assert not (tmp_path / "x").exists()


def test_floats_keep_the_dtype_in_which_each_is_stored(base: Path, text: str, tmp_path: Path) -> None:
    """Norms in float32 beside an embedding in BF16, as some checkpoints have them: refusing after the training would lose it."""
    mixed = tmp_path / "mixed"
    shutil.copytree(base, mixed)
    tensors = load_file(mixed / "model.safetensors")
    save_file({n: t.float() if t.ndim == 1 else t for n, t in tensors.items()}, mixed / "model.safetensors")
    words = {"text": text, "samples": 16, "length": 16, "schedule": Schedule(steps=2, batch=2)}
    done = train_checkpoint(mixed, "compressed-tensors:int4-g32", tmp_path / "out", recipe="floats", **words)
    with open_source(mixed) as source, open_source(done.out) as written:
        for name in ("model.norm.weight", "model.embed_tokens.weight"):
            assert written.manifest[name].dtype == source.manifest[name].dtype
            assert not torch.equal(written.read(name), source.read(name)), name
        norm = written.read("model.norm.weight")
    assert not torch.equal(norm, norm.bfloat16().float()), "rounded to the other's dtype"
