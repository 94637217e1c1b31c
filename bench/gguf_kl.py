"""GGUF types on the shipped sample: all block linears in one type, ours against llama.cpp's own quantiser, same importance matrix, same bytes.

    FEWBIT_ENVS=… PYTHONPATH=src python bench/gguf_kl.py [--types Q4_K,IQ2_XXS] [--tokens 12288] [--out FILE.json]

Each type's blocks are made by `ggml_quantize_chunk`, by our encoder from the same importance matrix (`fewbit`: `--method imatrix`), and by our
encoder under error feedback from the grams of the same text (`feedback`: what `--method gptq` does to a matrix, all of them on the float model's inputs), decoded,
and put into the float model in float32; mean KL against the float model on WikiText-2 test and on held-out books, 12,288 tokens each. Ratios are over
llama.cpp's, with the standard error of the paired windows of 512 tokens; `error` is the ratio of the importance-weighted squared errors of
the weights, summed over all matrices, which feedback does not aim at. Statistics are over 128 sequences of the bundled text. --out adds to the rows that
a file has.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fewbit.eval.fidelity import windows
from fewbit.formats.gguf.types import FLOATS, TYPES, block_type
from fewbit.math.scales import quantize
from fewbit.math.stats import Stats
from fewbit.run.calib import calibration
from fewbit.run.hf import BlockModel
from fewbit.run.observe import Observer, Use
from fewbit.run.source import open_source
from fewbit.solve.table import solver_named

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "engines"))
import ggml  # noqa: E402

SAMPLE = ROOT / "samples" / "sample"
TEXTS = {
    "wikitext2-test": ROOT / "samples" / "text" / "wikitext2-test.txt",
    "books-heldout": ROOT.parent / "shared" / "data" / "books-heldout.txt",
}
UNABLE = ("NVFP4",)  # ggml reads it but does not make it
LENGTH, BATCH = 512, 4
Weights = dict[str, torch.Tensor]


def statistics(samples: int = 128) -> dict[str, Stats]:
    """Grams of the inputs of every matrix on the float model, by stored tensor name."""
    found: dict[str, Stats] = {}
    with open_source(SAMPLE) as source, torch.no_grad():
        model = BlockModel(source.config, source.manifest)
        tokens = calibration("default", SAMPLE, samples, LENGTH, 0, 8192).tokens
        trunk = model.load_trunk(source.read)
        for part in tokens.split(8):
            entry = model.enter(trunk, part)
            hidden = entry.hidden
            for index in range(len(model)):
                params = model.load_block(index, source.read)
                names = {
                    model.local(index, slot): slot.name
                    for slot in model.block_slots(index)
                    if params[model.local(index, slot)].dim() == 2
                }

                def add(use: Use, names: dict[str, str] = names) -> None:
                    name = names[use.param]
                    found[name] = found.get(name, Stats()).add(use.x, needs=frozenset({"gram"}))

                with Observer({local: params[local] for local in names}, add):
                    hidden = model.run_block(index, params, hidden, entry.kwargs[index])
    return {name: replace(stats, cross_gram=stats.gram) for name, stats in found.items()}


class Study:
    """The float model, its answers to each text, and KL against them with other weights put in.

    Attributes:
        weights: float32 matrices of the blocks, by stored name.
    """

    def __init__(self, names: list[str], tokens: int) -> None:
        import transformers

        self._model = transformers.AutoModelForCausalLM.from_pretrained(SAMPLE, dtype=torch.float32).eval()
        held = dict(self._model.named_parameters())
        self._held = {name: held[name] for name in names}
        self.weights = {name: held[name].detach().clone() for name in names}
        self._tokens = {
            text: windows(str(path), SAMPLE, LENGTH, tokens, 8192).tokens
            for text, path in TEXTS.items()
            if path.exists()
        }
        self._base = {text: [self._answer(part) for part in x.split(BATCH)] for text, x in self._tokens.items()}

    @torch.inference_mode()
    def _answer(self, part: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(self._model(part).logits, -1)

    @torch.inference_mode()
    def kl(self, weights: Weights) -> dict[str, torch.Tensor]:
        """Mean KL of every window, float64 [windows], by text."""
        for name, value in weights.items():
            self._held[name].data.copy_(value)
        found = {}
        for text, tokens in self._tokens.items():
            parts = []
            for part, base in zip(tokens.split(BATCH), self._base[text], strict=True):
                away = (base - self._answer(part)).mul_(base.exp()).sum(-1)
                parts.append(away.double().mean(-1))
            found[text] = torch.cat(parts)
        return found


def theirs(kind: str, w: torch.Tensor, stats: Stats) -> torch.Tensor:
    data = ggml.quantize(kind, w.numpy(), stats.importance.numpy())
    return torch.from_numpy(ggml.dequantize(kind, data, w.shape[-1]).copy()).reshape(w.shape)


def ours(kind: str, w: torch.Tensor, stats: Stats) -> torch.Tensor:
    return quantize(block_type(kind).scheme, w, stats.importance).dequantize()


def feedback(kind: str, w: torch.Tensor, stats: Stats) -> torch.Tensor:
    return solver_named("gptq")(w, stats, block_type(kind).scheme).q.dequantize()


MAKERS: dict[str, Callable[[str, torch.Tensor, Stats], torch.Tensor]] = {
    "llama.cpp": theirs,
    "fewbit": ours,
    "feedback": feedback,
}


def compare(kl: dict[str, torch.Tensor]) -> dict[str, float]:
    """Means over windows, their ratios to llama.cpp's, and the standard errors of these by the delta method on the pairs."""
    base = kl["llama.cpp"]
    found = {"llama.cpp": float(base.mean())}
    for who in ("fewbit", "feedback"):
        ratio = kl[who].mean() / base.mean()
        spread = (kl[who] - ratio * base).std() / len(base) ** 0.5 / base.mean()
        label = "" if who == "fewbit" else f"{who}_"
        found |= {
            who: float(kl[who].mean()), f"{label}ratio": round(float(ratio), 4), f"{label}ratio_se": round(float(spread), 4)
        }  # fmt: skip
    return found


def study_type(kind: str, study: Study, known: dict[str, Stats]) -> dict[str, Any]:
    """The row of one type."""
    kl: dict[str, dict[str, torch.Tensor]] = {}
    lost = {}
    for who, make in MAKERS.items():
        made = {name: make(kind, w, known[name]) for name, w in study.weights.items()}
        lost[who] = sum(
            float((known[name].importance.double() * (made[name] - w).double() ** 2).sum())
            for name, w in study.weights.items()
        )
        kl[who] = study.kl(made)
    row: dict[str, Any] = {
        "type": kind,
        "bits": block_type(kind).bits,
        "error": round(lost["fewbit"] / lost["llama.cpp"], 4),
        "feedback_error": round(lost["feedback"] / lost["llama.cpp"], 4),
    }
    return row | {text: compare({who: kl[who][text] for who in kl}) for text in kl["fewbit"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", default=",".join(name for name in TYPES if name not in (*FLOATS, *UNABLE)))
    parser.add_argument("--tokens", type=int, default=12288)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    if given.out and given.out.exists():
        held = json.loads(given.out.read_text())
        rows = {row["type"]: row for row in held["rows"]} if held["tokens"] == given.tokens else {}
    known = statistics()
    study = Study(list(known), given.tokens)
    text = ""
    for kind in given.types.split(","):
        rows[kind] = study_type(kind, study, known)
        print(json.dumps(rows[kind]), file=sys.stderr, flush=True)
        text = json.dumps({"bench": "gguf_kl", "tokens": given.tokens, "rows": list(rows.values())}, indent=1) + "\n"
        if given.out:  # as far as it has come
            given.out.write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
