"""How much of the loss of the best post-training result does training through the rounding recover, on the sample?

    python bench/qat.py [--schemes int4-channel int2-g64] [--recipes scales full] [--steps 320] [--work DIR] [--out bench/results/qat.json]

For each scheme: the engine's GPTQ (whose codes training starts from), the recipe that trains scales and norms only, and the full one. Training text is the bundled
calibration mix; KL is measured on WikiText-2 test, another domain, and on held-out text of the same kinds. `curve` has a dozen points, on 4,096 tokens of
WikiText-2; the final figures are of the exported compressed-tensors files, by `fewbit eval`. `transformers` is the largest difference between the logits of the exported file in transformers
and those of the trained model.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from fewbit import api
from fewbit.eval.fidelity import evaluate
from fewbit.eval.windows import windows
from fewbit.run.calib import calibration
from fewbit.run.source import open_source
from fewbit.run.trained import export
from fewbit.run.training import RATES, take_start
from fewbit.runtime.distil import Point, Schedule, train
from fewbit.runtime.qat import freeze, parameter_groups, prepare, qtensors, trained_floats

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "samples" / "sample"
TEXT = str(ROOT / "samples" / "text" / "wikitext2-test.txt")


def load(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def watcher(base: torch.nn.Module, tokens: torch.Tensor) -> Any:
    """KL(base || model) on fixed windows; the base's distributions are computed once."""
    with torch.no_grad():
        wanted = [torch.log_softmax(base(batch).logits.flatten(0, 1), -1).half() for batch in tokens.split(2)]

    def kl(model: torch.nn.Module) -> dict[str, float]:
        total = 0.0
        for batch, p in zip(tokens.split(2), wanted, strict=True):
            q = torch.log_softmax(model(batch).logits.flatten(0, 1), -1)
            p = p.float()
            total += float((p.exp() * (p - q)).sum())
        return {"kl": total / tokens.numel()}

    return kl


def scores(paths: list[Path], tokens: int) -> list[dict[str, Any]]:
    """KL of checkpoints on both texts, with standard errors."""
    rows: list[dict[str, Any]] = [{} for _ in paths]
    for name, text in (("wikitext2", TEXT), ("heldout", "default")):
        for row, score in zip(rows, evaluate(list(paths), BASE, text=text, tokens=tokens), strict=True):
            row[name] = dict(zip(("kl", "error"), score.measures["kl"], strict=True))
    return rows


def in_transformers(path: Path, model: torch.nn.Module, tokens: torch.Tensor) -> dict[str, float]:
    """The exported file in its engine against the model in hand."""
    loaded = load(path)
    with torch.no_grad():
        mine, theirs = model(tokens).logits, loaded(tokens).logits
    return {"largest_difference": float((mine - theirs).abs().max()), "largest_logit": float(mine.abs().max())}


def known(out: Path) -> dict[str, Any]:
    """Rows of schemes so far."""
    return json.loads(out.read_text())["schemes"] if out.exists() else {}


def run(scheme: str, args: argparse.Namespace, data: dict[str, torch.Tensor]) -> dict[str, Any]:
    started = time.perf_counter()
    best = args.work / f"gptq-{scheme}"
    if not best.exists():
        api.quantize(BASE, to=f"compressed-tensors:{scheme}", method="gptq", out=best, verify=False)
    row: dict[str, Any] = {"gptq": {"seconds": time.perf_counter() - started}}
    if args.only_start:
        return row
    teacher = load(BASE)
    watch = watcher(teacher, data["eval"])
    made = {"gptq": best}
    for recipe in args.recipes:
        steps = args.steps if recipe == "full" else args.steps // 4
        model, earlier = load(BASE), args.work / f"{recipe}-{scheme}"
        before = known(args.out).get(scheme, {}).get(recipe) if args.go_on and earlier.exists() else None
        start = take_start(model, earlier if before else best)
        rates = tuple(args.rates or RATES[recipe])
        done = prepare(model, next(iter(start.values())).scheme, recipe=recipe, start=start, floats="bf16")
        schedule = Schedule(steps, args.batch, every=max(1, steps // 12), seed=int(bool(before)), **args.words)
        say = lambda point, tag=f"{scheme} {recipe}": print(tag, point.record(), file=sys.stderr, flush=True)  # noqa: E731
        curve: list[Point] = train(
            model,
            data["train"],
            schedule,
            teacher=teacher,
            groups=parameter_groups(model, *rates),
            evaluate=watch,
            on_point=say,
        )
        freeze(model)
        with open_source(BASE) as source:
            place = export(
                qtensors(model),
                trained_floats(model),
                source,
                "compressed-tensors",
                args.work / f"{recipe}-{scheme}",
                overwrite=True,
                training={"recipe": recipe, "rates": rates, "steps": steps, "curve": [p.record() for p in curve]},
            )
        made[recipe] = place
        row[recipe] = {
            "steps": steps,
            "tokens": steps * schedule.batch * data["train"].shape[1],
            "learning": done.learning,
            "seconds": curve[-1].seconds,
            "rates": rates,
            **args.words,
            "curve": [point.record() for point in curve],
            "before": before
            and {key: before.get(key) for key in ("steps", "tokens", "rates", "curve", "wikitext2", "heldout")},
            "transformers": in_transformers(place, model, data["eval"][:1]),
        }
    for (name, _), score in zip(made.items(), scores(list(made.values()), args.tokens), strict=True):
        row[name] |= score
    for recipe in args.recipes:
        row[recipe]["recovered"] = {
            text: 1 - row[recipe][text]["kl"] / row["gptq"][text]["kl"] for text in ("wikitext2", "heldout")
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--schemes", nargs="+", default=["int4-channel", "int2-g64"])
    parser.add_argument("--recipes", nargs="+", default=["scales", "floats", "full"], help="rows of others stay")
    parser.add_argument("--steps", type=int, default=320, help="of the full recipe; the others take a quarter")
    parser.add_argument("--batch", type=int, default=8, help="windows of 256 tokens in a step")
    parser.add_argument(
        "--rates", nargs=2, type=float, help="peak rates of weights and of the rest, in steps, instead of the recipe's"
    )
    parser.add_argument("--compute", default="float32", help="or bfloat16: dtype of the products")
    parser.add_argument("--noise", type=float, default=0.0, help="share of tokens replaced in every second window")
    parser.add_argument("--threads", type=int, help="of torch; all cores if not given")
    parser.add_argument("--go-on", action="store_true", help="start where an earlier run in --work ended")
    parser.add_argument("--only-start", action="store_true", help="quantise the starts in --work, and stop")
    parser.add_argument("--tokens", type=int, default=12_288)
    parser.add_argument("--work", type=Path, default=Path("/tmp/fewbit-qat"))
    parser.add_argument(
        "--out", type=Path, default=ROOT / "bench" / "results" / "qat.json", help="rows of other schemes stay"
    )
    args = parser.parse_args()
    args.words = {"compute": args.compute, "noise": args.noise}
    torch.set_num_threads(args.threads or torch.get_num_threads())
    args.work.mkdir(parents=True, exist_ok=True)
    data = {
        "train": calibration("default", BASE, min(args.steps * args.batch, 3000), 256, int(args.go_on), 8192).tokens,
        "eval": windows(TEXT, BASE, 512, 4096, 8192).tokens,
    }
    for scheme in args.schemes:
        if args.only_start:
            print(scheme, run(scheme, args, data), file=sys.stderr)
            continue
        found = run(scheme, args, data)
        rows = known(args.out)  # now: another process may have written
        rows[scheme] = {**rows.get(scheme, {}), **found}
        facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "train_windows": len(data["train"])}
        args.out.write_text(json.dumps({"schemes": rows, **facts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
