"""Turns a Hugging Face directory into GGUF with llama.cpp's own converter: an independent decoder of gptq, fp8, compressed-tensors, ...

Env: hf, with the converter from the llamacpp environment beside it.

Job:  model         directory
      out           .gguf to write
      outtype       "f32" (default) | "f16" | "bf16" | "q8_0"
      pre           name of the BPE pre-tokeniser ("gpt-2" for the sample); default: let the converter recognise it by hash
Result: bytes
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from _wire import Job, Result, serve

CONVERTER = Path(sys.prefix).parent / "llamacpp" / "convert"


def handle(job: Job) -> Result:
    sys.path[:0] = [str(CONVERTER), str(CONVERTER / "gguf-py")]
    import conversion.base

    if job.get("pre"):
        conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: job["pre"]
    sys.argv = [
        "convert_hf_to_gguf.py",
        str(job["model"]),
        "--outfile",
        str(job["out"]),
        "--outtype",
        job.get("outtype", "f32"),
    ]
    runpy.run_path(str(CONVERTER / "convert_hf_to_gguf.py"), run_name="__main__")
    return {"bytes": Path(job["out"]).stat().st_size}


if __name__ == "__main__":
    serve(handle, ("transformers", "torch"))
