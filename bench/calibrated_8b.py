"""GPTQ of two blocks of an 8B Llama-shaped checkpoint under `--ram 6GB`: predicted and measured peak memory, time, and the time of the whole model.

    PYTHONPATH=src python bench/calibrated_8b.py [--model /work/tmp/scale/random-8b] [--folder /work/tmp/cal8b] [--samples 16] [--ram 6GB]

The blocks are cut out of the checkpoint (embedding and head stay), the command line quantises them in a process of its own. Predicted is what the
plan says before the run; the whole model's time is the time per block, times its blocks, plus what was not spent in blocks. JSON on stdout.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from fewbit import api
from fewbit.base.names import layer_index
from fewbit.plan.recipe import parse_size
from fewbit.run.source import open_source

BLOCKS = 2


def cut(model: Path, folder: Path) -> int:
    """Writes a checkpoint of the first blocks into `folder`; -> blocks of the whole."""
    folder.mkdir(parents=True)
    with open_source(model) as source:
        names = [name for name in source.manifest if (layer_index(name) or 0) < BLOCKS]
        save_file(
            {name: source.read(name).contiguous() for name in names}, folder / "model.safetensors", {"format": "pt"}
        )
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": BLOCKS}))
    for file in model.glob("tokenizer*"):
        shutil.copy(file, folder)
    return int(config["num_hidden_layers"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("/work/tmp/scale/random-8b"))
    parser.add_argument("--folder", type=Path, default=Path("/work/tmp/cal8b"))
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--ram", default="6GB")
    parser.add_argument("--set", nargs="*", default=[], help="solver options, name=value")
    given = parser.parse_args()
    shutil.rmtree(given.folder, ignore_errors=True)
    whole = cut(given.model, given.folder / "model")
    base = [sys.executable, "-m", "fewbit.cli.main"]
    flags = ["--to", "compressed-tensors:int4-g128-asym", "--method", "gptq", "--ram", given.ram, "--calib-samples", str(given.samples),
             "--calib-length", str(given.length), *(word for one in given.set for word in ("--set", one))]  # fmt: skip
    options = {name: json.loads(value) for name, value in (one.split("=") for one in given.set)}
    predicted = api.plan_quantize(
        given.folder / "model", to="compressed-tensors:int4-g128-asym", method="gptq", calib_samples=given.samples,
        calib_length=given.length, options=options, ram=parse_size(given.ram),
    ).peak_bytes  # fmt: skip
    started = time.perf_counter()
    made = run(
        [
            *base,
            "quantize",
            str(given.folder / "model"),
            *flags,
            "-o",
            str(given.folder / "out"),
            "--json",
            "--no-verify",
        ]
    )
    wall = time.perf_counter() - started
    measured = made["peak_bytes"]
    print(json.dumps({
        "bench": "calibrated_8b", "ram": given.ram, "samples": given.samples, "length": given.length, "blocks": BLOCKS, "options": given.set,
        "predicted_bytes": predicted, "measured_bytes": measured, "predicted_over_measured": predicted / measured,
        "seconds": wall, "whole_model_hours": wall / BLOCKS * whole / 3600,
    }, indent=1))  # fmt: skip
    shutil.rmtree(given.folder)


def run(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout[re.search(r"^\{", done.stdout, re.M).start() :])


if __name__ == "__main__":
    main()
