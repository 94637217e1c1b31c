"""GGUF types through error feedback: KL of the sample against llama.cpp's quantiser with an importance matrix at the same bytes, and the file in llama.cpp.

    FEWBIT_ENVS=… PYTHONPATH=src python bench/gguf_calibrated.py [--types Q4_K Q3_K Q2_K IQ4_XS] [--method gptq] [--out FILE.json]

All linears of all blocks take the type, the rest stays as it is, on both sides; llama.cpp's figures are those of `bench/gguf_kl.py` (results/gguf_kl.json:
blocks made by ggml itself, the same importance text, WikiText-2 test). With FEWBIT_ENVS, a GGUF made the same way (`gguf:pure-TYPE`: embeddings too) is
loaded by stock llama.cpp, which continues a prompt. JSON on stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fewbit import api

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "samples" / "sample"
TEXT = ROOT / "samples" / "text" / "wikitext2-test.txt"
sys.path.insert(0, str(ROOT / "tests" / "engines"))
from harness import is_built, run_driver  # noqa: E402

PROMPT = "The city of Rome was founded"


def loaded(kind: str, method: str, folder: Path) -> dict[str, Any] | str:
    """What llama.cpp makes of a GGUF of the type; calibrated on a little text, for this is about the file."""
    if not is_built("llamacpp"):
        return "no llama.cpp at hand"
    out = folder / f"{kind}-file"
    api.quantize(SAMPLE, to=f"gguf:pure-{kind.lower()}", method=method, calib_samples=16, out=out, verify=False)
    file = next(out.rglob("*.gguf")) if out.is_dir() else out
    ids = run_driver("llamacpp", "llamacpp", {"model": str(file), "texts": [PROMPT]})["tokens"][0]
    done = run_driver("llamacpp", "llamacpp", {"model": str(file), "prompts": [ids], "generate": 16})
    return {"description": done["description"], "bytes": file.stat().st_size, "generated": done["generated_text"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", nargs="+", default=["Q4_K", "Q3_K", "Q2_K", "IQ4_XS"])
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--tokens", type=int, default=12288)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    held = json.loads((ROOT / "bench" / "results" / "gguf_kl.json").read_text())["rows"]
    theirs = {row["type"]: row["wikitext2-test"]["llama.cpp"] for row in held}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind in given.types:
            started, cpu = time.perf_counter(), time.process_time()
            api.quantize(SAMPLE, to=f"dense:{kind.lower()}", method=given.method, out=folder / kind, verify=False)
            spent = {"wall": time.perf_counter() - started, "cpu": time.process_time() - cpu}
            kl, error = api.evaluate([folder / kind], SAMPLE, text=str(TEXT), tokens=given.tokens)[0].measures["kl"][:2]
            row = {
                "type": kind,
                "method": given.method,
                "kl": kl,
                "stderr": error,
                "llama.cpp": theirs[kind],
                "ratio": kl / theirs[kind],
                **spent,
            }
            rows.append({**row, "loaded": loaded(kind, given.method, folder)})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            if given.out:  # as far as it has come
                given.out.write_text(
                    json.dumps({"bench": "gguf_calibrated", "tokens": given.tokens, "rows": rows}, indent=1) + "\n"
                )
    print(json.dumps({"bench": "gguf_calibrated", "tokens": given.tokens, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
