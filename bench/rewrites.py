"""What rewrites are for: KL against the float model on a sample with outlier channels, with and without each.

    python bench/rewrites.py [--tokens 4096] [--work DIR] [--only NAME ...] [--into bench/results/rewrites.json]

Each row is one question; `claims` says which hold. With --into, rows join those of an earlier run in the file. The variant with outliers is the same function as the sample (`make_outlier_sample`).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fewbit import api
from fewbit.eval.fidelity import Options, Reference, evaluate, measure, stored_logits
from fewbit.eval.stream import Runner
from fewbit.math.scales import Search, quantize
from fewbit.num.scheme import parse_scheme
from fewbit.run.observe import Observer, Use
from fewbit.run.source import open_source
from make_outlier_sample import ROOT, make

W8, W8A8, W4A8 = (
    "compressed-tensors:int8-channel",
    "compressed-tensors:int8-channel+int8-token",
    "compressed-tensors:int4-g128+int8-token",
)
STATIC = "compressed-tensors:int8-tensor+int8-tensor-static"
SMOOTH, AWQ, ROTATE = {"rewrites": ["smooth"]}, {"rewrites": ["awq"]}, {"rewrites": ["rotate"]}
SPIN = {"rewrites": ["spin"], "options": {"spin.steps": 40, "spin.batch": 2, "spin.rate": 0.1}}
# name -> (target, recipe)
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "W8A16": (W8, {}),
    "W8A16 smooth": (W8, SMOOTH),
    "W8A8 token": (W8A8, {}),
    "W8A8 token smooth": (W8A8, SMOOTH),
    "W8A8 token rotate": (W8A8, ROTATE),
    "W8A8 token int8-split": ("dense:int8-channel", {"method": "int8-split"}),
    "W8A8 static": (STATIC, {}),
    "W8A8 static smooth": (STATIC, SMOOTH),
    "W8A8 static percentile": (STATIC, {"activation_range": "percentile"}),
    "W8A8 static mse": (STATIC, {"activation_range": "mse"}),
    "W8A8 static smooth percentile": (STATIC, {**SMOOTH, "activation_range": "percentile"}),
    "W8A8 static smooth mse": (STATIC, {**SMOOTH, "activation_range": "mse"}),
    "W4A8": (W4A8, {}),
    "W4A8 rotate": (W4A8, ROTATE),
    "W4A8 smooth awq": (W4A8, {"rewrites": ["smooth", "awq"]}),
    "int4 g128": ("dense:int4-g128-asym", {}),
    "int4 g128 awq": ("dense:int4-g128-asym", AWQ),
    "int4 g128 clip": ("dense:int4-g128-asym", {"method": "clip"}),
    "int4 g128 awq clip": ("dense:int4-g128-asym", {**AWQ, "method": "clip"}),
    "int3 g128 clip": ("dense:int3-g128-asym", {"method": "clip"}),
    "int3 g128 awq clip": ("dense:int3-g128-asym", {**AWQ, "method": "clip"}),
    "int3 channel rotate": ("dense:int3-channel", ROTATE),
    "int3 channel spin": ("dense:int3-channel", SPIN),
    "int4 channel spin": ("dense:int4-channel", SPIN),
    "W4A4 rotate": ("compressed-tensors:int4-channel+int4-token", ROTATE),
    "W4A4 spin": ("compressed-tensors:int4-channel+int4-token", SPIN),
    "int3 g128": ("dense:int3-g128-asym", {}),
    "int3 g128 awq": ("dense:int3-g128-asym", AWQ),
    "int4 channel": ("dense:int4-channel", {}),
    "int4 channel rotate": ("dense:int4-channel", ROTATE),
    "int4 channel awq": ("dense:int4-channel", AWQ),
    "int4 channel rotate gptq": ("dense:int4-channel", {**ROTATE, "method": "gptq"}),
}


class MixedRunner(Runner):
    """LLM.int8() as its engine computes it: inputs in int8 per token, except the columns that int8-split kept apart.

    As in the paper, an input column is outlying when it reaches the threshold in the batch at hand.
    """

    threshold = 6.0

    def pass_block(self, index: int, store: Any, kwargs: dict[str, Any], params: Any = None) -> None:
        params = params if params is not None else self.model.load_block(index, self.source.read)
        scheme = parse_scheme("int8-channel+int8-token").activation
        assert scheme is not None
        slots = {
            self.model.local(index, slot)
            for slot in self.model.block_slots(index)
            if len(self.source.manifest[slot.name].shape) == 2
        }

        def mixed(use: Use) -> torch.Tensor:
            flat = use.x.reshape(-1, use.x.shape[-1]).float()
            apart = flat.abs().amax(0) >= self.threshold
            rest = quantize(scheme, torch.where(apart, 0.0, flat), None, Search(method="absmax")).dequantize()
            return torch.where(apart, flat, rest).to(use.x.dtype).reshape(use.x.shape)

        with torch.no_grad(), Observer({name: params[name] for name in slots}, mixed):
            for batch in range(len(store)):
                hidden = store.get(batch).to(self.model.device)
                arguments = self.model.arguments(kwargs, min(store.batch, store.shape[0]), hidden.shape[0])
                store.put(batch, self.model.run_block(index, params, hidden, arguments))


def mixed_kl(candidate: Path, base: Path, tokens: int) -> tuple[float, int]:
    """Mean KL and tokens of a candidate under `MixedRunner`."""
    with open_source(base) as source, open_source(candidate) as split:
        reference = Reference(source, Options(tokens=tokens), lambda _line: None)
        reference.run()
        runner = MixedRunner(split, room=reference.room)
        hidden = runner.hidden(reference.windows.tokens)
        found = measure(reference, [stored_logits(runner, reference.windows.tokens, hidden)], str(candidate))[0]
        hidden.close()
        reference.close()
    return float(found["kl"].mean()), found["kl"].numel()


def run(base: Path, work: Path, names: list[str], tokens: int, samples: int) -> dict[str, Any]:
    """KL and seconds of each run against the base; what failed says why."""
    rows: dict[str, Any] = {}
    made: list[tuple[str, Path]] = []
    for name in names:
        target, words = RUNS[name]
        started = time.perf_counter()
        out = work / name.replace(" ", "-")
        try:
            result = api.quantize(
                base, to=target, out=out, overwrite=True, verify=False, calib_samples=samples, calib_length=256, **words
            )
        except Exception as error:  # one row that fails must not hide the others
            rows[name] = {"error": f"{type(error).__name__}: {error}"[:400]}
            continue
        made.append((name, result.outputs[0]))
        rows[name] = {
            "target": target,
            **words,
            "seconds": time.perf_counter() - started,
            "warnings": list(result.warnings),
            "notes": list(result.notes.get("rotations", ())),
        }
        print(name, f"{rows[name]['seconds']:.1f} s", file=sys.stderr, flush=True)
    for (name, _), score in zip(made, evaluate([path for _, path in made], base, tokens=tokens), strict=True):
        value, error = score.measures["kl"]
        rows[name] |= {"kl": value, "kl_error": error, "tokens": score.tokens}
        if "int8-split" in name:  # the dense output holds weights only; its activations are rounded here
            rows[name]["kl"], rows[name]["tokens"] = mixed_kl(dict(made)[name], base, tokens)
            rows[name]["weights_only_kl"] = value
    return rows


def claims(rows: dict[str, Any]) -> dict[str, Any]:
    """Ratios of KLs that the issue asks for; None where a run is missing."""

    def ratio(a: str, b: str) -> float | None:
        top, bottom = rows.get(a, {}).get("kl"), rows.get(b, {}).get("kl")
        return top / bottom if top is not None and bottom else None

    return {
        "plain W8A8 over W8A16": ratio("W8A8 token", "W8A16"),
        "smoothed W8A8 over W8A16 (at most 2)": ratio("W8A8 token smooth", "W8A16"),
        "smoothed W8A8 over smoothed W8A16 (at most 2)": ratio("W8A8 token smooth", "W8A16 smooth"),
        "rotated W8A8 over W8A16": ratio("W8A8 token rotate", "W8A16"),
        "LLM.int8() over plain W8A8": ratio("W8A8 token int8-split", "W8A8 token"),
        "static smoothed over static plain": ratio("W8A8 static smooth", "W8A8 static"),
        "static mse over static absmax": ratio("W8A8 static mse", "W8A8 static"),
        "static percentile over static absmax": ratio("W8A8 static percentile", "W8A8 static"),
        "static smoothed mse over static smoothed absmax": ratio("W8A8 static smooth mse", "W8A8 static smooth"),
        "int4 g128, clips over plain": ratio("int4 g128 clip", "int4 g128"),
        "int4 g128, AWQ with clips over AWQ": ratio("int4 g128 awq clip", "int4 g128 awq"),
        "int3 g128, AWQ with clips over AWQ": ratio("int3 g128 awq clip", "int3 g128 awq"),
        "int3 channel, learned over random rotation": ratio("int3 channel spin", "int3 channel rotate"),
        "int4 channel, learned over random rotation": ratio("int4 channel spin", "int4 channel rotate"),
        "W4A4, learned over random rotation": ratio("W4A4 spin", "W4A4 rotate"),
        "int4 g128, AWQ over plain": ratio("int4 g128 awq", "int4 g128"),
        "int3 g128, AWQ over plain": ratio("int3 g128 awq", "int3 g128"),
        "int4 channel, rotated over plain": ratio("int4 channel rotate", "int4 channel"),
        "int4 channel, AWQ over plain": ratio("int4 channel awq", "int4 channel"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "samples" / "sample")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=16, help="calibration sequences of 256 tokens")
    parser.add_argument("--work", type=Path, help="folder for what is made; a temporary one that goes by default")
    parser.add_argument("--into", type=Path, help="file that the rows join; printed by default")
    parser.add_argument("--only", nargs="*", choices=list(RUNS), default=list(RUNS))
    words = parser.parse_args()
    torch.set_num_threads(1)
    work = words.work or Path(tempfile.mkdtemp(prefix="fewbit-rewrites-"))
    try:
        outlier = work / "outlier"
        channels = make(words.model, outlier)
        rows = run(outlier, work, words.only, words.tokens, words.samples)
        if words.into and words.into.exists():
            rows = {**json.loads(words.into.read_text())["runs"], **rows}
        record = {"model": str(words.model), "outlier_channels": channels, "runs": rows, "claims": claims(rows)}
        text = json.dumps(record, indent=1, default=str)
        words.into.write_text(text + "\n") if words.into else print(text)
    finally:
        if words.work is None:
            shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
