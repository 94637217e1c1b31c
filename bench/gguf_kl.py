"""GGUF types on the shipped sample: all block linears in one type, ours against llama.cpp's own quantiser, same importance matrix, same bytes.

    FEWBIT_ENVS=… python bench/gguf_kl.py --types Q6_K Q4_K IQ4_XS Q3_K IQ3_XXS Q2_K IQ2_XXS

Each type's blocks are made by `ggml_quantize_chunk` and by our encoder, decoded, and put into the float model; KL against the float model on
WikiText-2 test and held-out books, 12,288 tokens each. JSON on stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from fewbit.eval.fidelity import windows
from fewbit.eval.stream import Runner
from fewbit.formats.gguf.types import block_type
from fewbit.math.metrics import kl_from_logits
from fewbit.math.scales import quantize
from fewbit.math.stats import Stats
from fewbit.run.calib import calibration
from fewbit.run.hf import BlockModel
from fewbit.run.observe import Observer, Use
from fewbit.run.source import open_source

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "engines"))
import ggml  # noqa: E402

SAMPLE = ROOT / "samples" / "sample"
TEXTS = {
    "wikitext2-test": ROOT / "samples" / "text" / "wikitext2-test.txt",
    "books-heldout": ROOT.parent / "shared" / "data" / "books-heldout.txt",
}


def importance(samples: int = 128) -> dict[str, torch.Tensor]:
    """Mean square of the input that meets each weight column, on the float model: stored tensor name -> float32 [in]."""
    found: dict[str, Stats] = {}
    with open_source(SAMPLE) as source, torch.no_grad():
        model = BlockModel(source.config, source.manifest)
        tokens = calibration("default", SAMPLE, samples, 512, 0, 8192).tokens
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
                    found[name] = found.get(name, Stats()).add(use.x, needs=frozenset({"importance"}))

                with Observer({local: params[local] for local in names}, add):
                    hidden = model.run_block(index, params, hidden, entry.kwargs[index])
    return {name: stats.importance for name, stats in found.items() if stats.importance is not None}


def logits_of(read_over: Callable[[str, torch.Tensor], torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """Logits [windows, length, vocab] of the sample with its weights passed through `read_over`."""
    with open_source(SAMPLE) as source:
        plain = source.read
        source.read = lambda name: read_over(name, plain(name))  # type: ignore[method-assign]
        runner = Runner(source)
        store = runner.hidden(tokens)
        hidden = torch.cat([store.get(index) for index in range(len(store))])
        return torch.stack([runner.logits(row[None], state[None]) for row, state in zip(tokens, hidden, strict=True)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", nargs="+", default=["Q6_K", "Q4_K", "IQ4_XS", "Q3_K", "IQ3_XXS", "Q2_K", "IQ2_XXS"])
    parser.add_argument("--tokens", type=int, default=12288)
    given = parser.parse_args()
    weights = importance()
    chosen = {
        name: windows(str(path), SAMPLE, 512, given.tokens, 8192).tokens
        for name, path in TEXTS.items()
        if path.exists()
    }
    base = {name: logits_of(lambda _n, w: w, tokens) for name, tokens in chosen.items()}
    rows = []
    for kind in given.types:
        scheme = block_type(kind).scheme

        def theirs(name: str, w: torch.Tensor, kind: str = kind) -> torch.Tensor:
            if name not in weights:
                return w
            data = ggml.quantize(kind, w.float().numpy(), weights[name].numpy())
            return torch.from_numpy(ggml.dequantize(kind, data, w.shape[-1])).reshape(w.shape)

        def ours(name: str, w: torch.Tensor, scheme=scheme) -> torch.Tensor:
            return quantize(scheme, w, weights[name]).dequantize() if name in weights else w

        row: dict[str, object] = {"type": kind, "bits": block_type(kind).bits}
        for text, tokens in chosen.items():
            kl = {
                who: float(kl_from_logits(base[text], logits_of(call, tokens)).mean())
                for who, call in (("llama.cpp", theirs), ("fewbit", ours))
            }
            row[text] = {**kl, "ratio": kl["fewbit"] / kl["llama.cpp"]}
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    print(json.dumps({"bench": "gguf_kl", "tokens": given.tokens, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
