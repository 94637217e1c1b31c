"""Ours beside the peers on the shipped sample: the same scheme, the same calibration tokens, KL over the same text, wall time and peak memory.

    FEWBIT_ENVS=… python bench/peers_kl.py --bits 4 3 2 --peers llmcompressor-rtn llmcompressor-gptq autoround --ours rtn:absmax rtn hqq gptq

Peers run in environments of their own (dev/envs.py), llm-compressor in float32 unless `--dtype` says otherwise (a machine without BF16
instructions takes many times as long in BF16); with `--keep`, what they made is kept in the folder and not made again. Scheme: int<bits>, groups of 128, asymmetric, all linears of all blocks. JSON on stdout.
`--ours METHOD[:SEARCH][,option=value…][+RECIPE[,flag=value…]]`: `gptq+scales,steps=48,batch=4` trains step sizes and norms after GPTQ, `gptq,ram=0.85GB` keeps to a limit, `gptq,compute=float32`
runs the text in another dtype than the default.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fewbit import api
from fewbit.run.calib import calibration
from fewbit.run.training import WATCHED

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "engines"))
from harness import run_driver  # noqa: E402

SAMPLE = ROOT / "samples" / "sample"
TEXT = ROOT / "samples" / "text" / "wikitext2-test.txt"
SEQUENCES, LENGTH = 128, 512


def peer(name: str, bits: int, out: Path, tokens: Path, iters: int, dtype: str) -> dict[str, Any]:
    """Runs a peer; its output folder, seconds of quantising and peak memory."""
    common = {"model": str(SAMPLE), "out": str(out), "calibration": str(tokens)}
    if name.startswith("llmcompressor"):
        weights = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": 128}
        job = {**common, "method": name.partition("-")[2], "weights": weights, "dtype": dtype}
        done, cpu = timed(lambda: run_driver("llmcompressor", "llmcompressor", job, timeout=3600))
        return {"out": out, "seconds": done["quantize_seconds"], "cpu": cpu, **costs(done)}
    job = {**common, "bits": bits, "group_size": 128, "sym": False, "iters": iters}
    done, cpu = timed(lambda: run_driver("autoround", "autoround", job, timeout=7200))
    return {
        "out": Path(done["model_dir"]),
        "seconds": done["seconds"],
        "cpu": cpu,
        **costs(done),
    }


def costs(done: dict[str, Any]) -> dict[str, Any]:
    """Wall seconds (without imports) and peak memory of a driver's process."""
    return {"wall": done["wall_seconds"], "peak_mb": done["peak_rss_mb"]}


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What a call that starts processes returns, and the CPU seconds of those processes."""
    before = os.times()
    found = call()
    after = os.times()
    return found, after.children_user + after.children_system - before.children_user - before.children_system


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` returned in an earlier run, or returns now."""
    if path.exists():
        found = json.loads(path.read_text())
        return {**found, "out": Path(found["out"])}
    found = make()
    path.write_text(json.dumps({**found, "out": str(found["out"])}))
    return found


def ours(spec: str, bits: int, out: Path) -> dict[str, Any]:
    """Runs the command line in a process of its own; a part `+scales` trains step sizes and norms afterwards, on the same tokens."""
    first, _, second = spec.partition("+")
    head, *options = first.split(",")
    method, _, search = head.partition(":")
    flags = []
    for option in ([f"search={search}"] if search else []) + options:
        name, _, value = option.partition("=")
        flags += [f"--{name}", value] if name in ("ram", "compute") else ["--set", option]
    target = ["--to", f"compressed-tensors:int{bits}-g128-asym"]
    made = out.with_name(f"{out.name}-start") if second else out
    shutil.rmtree(made, ignore_errors=True)
    done = [command(["quantize", str(SAMPLE), *target, "--method", method, "-o", str(made), "--no-verify", *flags])]
    if second:
        recipe, *options = second.split(",")
        flags = [word for option in options for word in ("--" + option.partition("=")[0], option.partition("=")[2])]
        tokens = [
            "--samples",
            str(SEQUENCES - WATCHED),
            "--length",
            str(LENGTH),
        ]  # those watched come first, of the same text
        done.append(command(["train", str(SAMPLE), *target, "--start", str(made), "--recipe", recipe, "-o", str(out), *tokens, *flags]))  # fmt: skip
    sums = {name: sum(one[name] for one in done) for name in ("wall", "cpu")}
    return {"out": out, **sums, "peak_mb": max(one["peak_mb"] for one in done)}


def command(words: list[str]) -> dict[str, float]:
    """Runs our command line: wall and CPU seconds, and peak of resident memory."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "fewbit.cli.main", *words, "--json"], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"fewbit {' '.join(words)} ended with status {os.waitstatus_to_exitcode(status)}")
    return {
        "wall": time.perf_counter() - started,
        "cpu": used.ru_utime + used.ru_stime,
        "peak_mb": used.ru_maxrss / 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[4])
    parser.add_argument("--peers", nargs="*", default=["llmcompressor-rtn"])
    parser.add_argument("--ours", nargs="*", default=["rtn:absmax", "rtn", "hqq"])
    parser.add_argument("--tokens", type=int, default=12288)
    parser.add_argument("--iters", type=int, default=200)
    parser.add_argument("--dtype", default="float32", help="that llm-compressor computes in")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/fewbit-peers"))
    parser.add_argument("--keep", action="store_true", help="keep what peers made in the folder, and use what is there")
    given = parser.parse_args()
    if not given.keep:
        shutil.rmtree(given.folder, ignore_errors=True)
    given.folder.mkdir(parents=True, exist_ok=True)
    ids = calibration("default", SAMPLE, SEQUENCES, LENGTH, 0, 8192).tokens
    np.save(given.folder / "calibration.npy", ids.numpy())
    rows = []
    for bits in given.bits:
        made = {}
        for name in given.peers:
            out, tokens = given.folder / f"{name}-{bits}", given.folder / "calibration.npy"
            made[name] = kept(
                out.with_suffix(".json"), partial(peer, name, bits, out, tokens, given.iters, given.dtype)
            )
        for spec in given.ours:
            out = given.folder / f"fewbit-{re.sub('[^a-z0-9.]+', '-', spec)}-{bits}"
            shutil.rmtree(out, ignore_errors=True)
            made[f"fewbit {spec}"] = ours(spec, bits, out)
        scores = api.evaluate([item["out"] for item in made.values()], SAMPLE, text=str(TEXT), tokens=given.tokens)
        for (name, item), score in zip(made.items(), scores, strict=True):
            kl, error = score.measures["kl"][:2]
            rows.append(
                {"bits": bits, "who": name, "kl": kl, "stderr": error, **{k: v for k, v in item.items() if k != "out"}}
            )
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(json.dumps({"bench": "peers_kl", "text": TEXT.name, "tokens": given.tokens, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
