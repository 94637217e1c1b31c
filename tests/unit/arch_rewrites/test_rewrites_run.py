"""Rewrites through the engine: decided, journalled, folded into kept and quantised tensors alike."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from rewrite_families import MODELS, make

from fewbit import api
from fewbit.base.errors import Refusals
from fewbit.plan.recipe import Recipe
from fewbit.run.hf import BlockModel
from fewbit.run.observe import Observer, Use
from fewbit.run.rewrites import RewrittenSource
from fewbit.run.source import Source, open_source

SAMPLE = Path(__file__).parents[3] / "samples" / "sample"
CALIB = {"calib_samples": 4, "calib_length": 48}


def checkpoint(folder: Path, model_type: str = "llama", dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    make(model_type, folder, dtype, vocab_size=8192, **changes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((SAMPLE / name).read_bytes())
    return folder


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def hidden(source: Source, tokens: torch.Tensor) -> torch.Tensor:
    """Logits in float32."""
    model = BlockModel(source.config, source.manifest)

    def read(name: str) -> torch.Tensor:
        return source.read(name)

    with torch.no_grad():
        trunk = model.load_trunk(read)
        entry = model.enter(trunk, tokens)
        state = entry.hidden
        for index in range(len(model)):
            state = model.run_block(index, model.load_block(index, read), state, entry.kwargs[index])
        return model.leave(trunk, tokens, state)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "phi3", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("words", [("rotate",), ("smooth", "awq"), ("rotate", "smooth")])
def test_what_is_written_is_the_same_model(model_type: str, words: tuple[str, ...], tmp_path: Path) -> None:
    """At 8 bits with many scales: what remains is the rounding of weights and of bfloat16, no channel gone astray."""
    model = checkpoint(tmp_path / "model", model_type)
    options = {"awq.steps": 3} if "awq" in words else {}
    result = api.quantize(
        model, to="dense:int8-g16", rewrites=words, options=options, out=tmp_path / "out", verify=False, **CALIB
    )
    tokens = torch.randint(5, 8000, (2, 24), generator=torch.Generator().manual_seed(0))
    with open_source(model) as before, open_source(result.outputs[0]) as after:
        wanted, found = hidden(before, tokens), hidden(after, tokens)
        norm = next(name for name in before.manifest if "norm" in name or "ln_1" in name)
        changed = not torch.equal(before.read(norm).float(), after.read(norm).float())
    assert float((found - wanted).norm() / wanted.norm()) < 0.04
    assert changed or (model_type == "gemma2" and words == ("rotate",))


def test_a_stopped_walk_ends_with_the_same_bytes(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model")
    words: dict[str, Any] = {
        "to": "dense:int4-g16-asym",
        "rewrites": ["rotate", "smooth", "awq"],
        "options": {"awq.steps": 4},
        "verify": False,
        **CALIB,
    }
    api.quantize(model, out=tmp_path / "whole", **words)

    def stop(event: dict[str, Any]) -> None:
        if event.get("text", "").startswith("rewrites: block 1"):
            raise RuntimeError("stopped here")

    with pytest.raises(RuntimeError, match="stopped here"):
        api.quantize(model, out=tmp_path / "cut", on_event=stop, **words)
    api.quantize(model, out=tmp_path / "cut", **words)
    assert hashes(tmp_path / "cut") == hashes(tmp_path / "whole")


def test_rotation_needs_no_calibration_and_unties_the_head(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model")
    plan = api.plan_quantize(model, to="dense:int4-g16-asym", rewrites=["rotate"], method="hqq")
    assert plan.needs == () and any("residual stream of 48" in line for line in plan.rewrites)
    assert any("bytes more" in line for line in plan.rewrites)
    assert "lm_head.weight" in {job.target for job in plan.outputs[0].jobs}
    assert plan.outputs[0].config["tie_word_embeddings"] is False
    kept = api.plan_quantize(model, to="dense:int4-g16-asym", rewrites=["rotate"], options={"rotate.untie": False})
    assert any("untie=false" in line for line in kept.warnings)
    assert "lm_head.weight" not in {job.target for job in kept.outputs[0].jobs}


def test_an_architecture_without_data_is_quantised_without_rewrites(tmp_path: Path) -> None:
    make("gpt_oss", tmp_path / "model")
    result = api.quantize(
        tmp_path / "model", to="dense:int8-channel", rewrites=["rotate", "awq"], out=tmp_path / "out", verify=False
    )
    assert result.plan.rewrites == ()
    assert any("rewrites are off" in line for line in result.warnings)


@pytest.mark.parametrize(
    ("rewrites", "options"),
    [(["nonsense"], {}), (["smooth", "smooth"], {}), ([], {"smooth.alpha": 0.4}), (["smooth"], {"smooth.beta": 1}), (["smooth"], {"smooth.alpha": 2.0}),
     (["smooth"], {"smooth.spaces": "resid"}), (["awq"], {"awq.steps": "many"}), (["rotate"], {"rotate.resid": 1}),
     (["rotate", "spin"], {}), (["spin"], {"spin.rate": 0.0}), (["spin"], {"spin.batch": 0})],
)  # fmt: skip
def test_words_that_make_no_sense_are_refused(rewrites: list[str], options: dict[str, Any], tmp_path: Path) -> None:
    make("llama", tmp_path / "model")
    with pytest.raises(Refusals) as caught:
        api.plan_quantize(tmp_path / "model", to="dense:int8-channel", rewrites=rewrites, options=options)
    assert {error.code for error in caught.value.errors} == {"FB-E0741"}


@pytest.mark.parametrize("model_type", ["llama", "gemma"])
def test_scaled_gains_are_exact_in_the_stored_dtype(model_type: str, tmp_path: Path) -> None:
    """The rewritten norm, rounded to bfloat16 as it is written, is the very number that the readers were multiplied for."""
    model = checkpoint(tmp_path / "model", model_type)
    out = api.quantize(
        model,
        to="dense:int8-channel",
        rewrites=["smooth"],
        options={"search": "absmax"},
        out=tmp_path / "out",
        verify=False,
        **CALIB,
    ).outputs[0]
    with open_source(model) as source, open_source(out) as written:
        offset = 1.0 if model_type == "gemma" else 0.0
        name = "model.layers.0.input_layernorm.weight"
        s = (source.read(name).double() + offset) / (written.read(name).double() + offset)
        w, got = (
            source.read("model.layers.0.self_attn.q_proj.weight").double(),
            written.read("model.layers.0.self_attn.q_proj.weight").double(),
        )
        step = (w * s).abs().amax(1, keepdim=True) / 127
        assert float((s.log().abs()).max()) > 0.1
        assert bool(((got - w * s).abs() <= 0.501 * step + 2**-8 * (w * s).abs()).all())


def test_static_ranges_are_the_largest_inputs(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "model", dtype=torch.float32)
    words = {"calib_samples": 3, "calib_length": 32}
    out = api.quantize(
        model, to="compressed-tensors:int8-tensor+int8-tensor-static", out=tmp_path / "out", verify=False, **words
    ).outputs[0]
    from fewbit.run.calib import calibration

    tokens = calibration("default", model, 3, 32, 0, 8192).tokens
    name = "model.layers.0.self_attn.q_proj.weight"
    with open_source(model) as source, open_source(out) as written, torch.no_grad():
        scale = written.qtensor(name).sides["input_scale"]
        blocks = BlockModel(source.config, source.manifest)
        entry = blocks.enter(blocks.load_trunk(source.read), tokens)
        params = blocks.load_block(0, source.read)
        seen: list[torch.Tensor] = []

        def take(use: Use) -> None:
            seen.append(use.x)

        with Observer({"q": params["self_attn.q_proj.weight"]}, take):
            blocks.run_block(0, params, entry.hidden, entry.kwargs[0])
    assert torch.allclose(scale, seen[0].abs().max().reshape(1) / 127, rtol=1e-5)


def test_rows_equal_the_whole_tensor(tmp_path: Path) -> None:
    make("llama", tmp_path / "model", torch.float32)
    with open_source(tmp_path / "model") as source:
        changed = RewrittenSource(source, Recipe(rewrites=("rotate",)))
        for name in changed.manifest:
            rows = changed.manifest[name].shape[0]
            parts = [changed.read_rows(name, start, min(rows, start + 7)) for start in range(0, rows, 7)]
            assert torch.allclose(torch.cat(parts).float(), changed.read(name).float(), atol=1e-5), name


def test_families_named_here_exist() -> None:
    assert {"llama", "gemma2", "phi3", "gpt2", "qwen3_moe"} <= set(MODELS)


def test_a_rotated_gguf_reads_as_the_same_model(tmp_path: Path) -> None:
    """Rotation unties the head: the file has an output.weight of its own, which evaluation takes."""
    from fewbit.eval.gguf_view import open_candidate

    model = checkpoint(tmp_path / "model", "qwen2", tie_word_embeddings=True)
    out = api.quantize(model, to="gguf:pure-F32", rewrites=["rotate"], out=tmp_path / "out", verify=False).outputs[0]
    tokens = torch.randint(5, 8000, (1, 16), generator=torch.Generator().manual_seed(0))
    with open_source(model) as before, open_candidate(out, before) as after:
        wanted, found = hidden(before, tokens), hidden(after, tokens)  # type: ignore[arg-type]
    assert float((found - wanted).norm() / wanted.norm()) < 0.02
