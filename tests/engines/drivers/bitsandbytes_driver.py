"""Quantises one weight with bitsandbytes and decodes it again, on the CPU. Env: hf.

Job:  weight        .npy, float32 [out, in]
      kind          "nf4" | "fp4" | "int8"
      dtype         the weight's dtype before quantising: "float32" (default) | "bfloat16" | "float16"
      blocksize     4-bit only (default 64);  double: true for double quantisation of absmax
      out           .npz to write. 4-bit: codes (uint8, as stored, [n / 2, 1]), absmax (float32, or uint8 if double), code (the 16 levels),
                    with double also nested_absmax, nested_code, offset;  int8: codes (int8 [out, in]), scb (float32 [out]);
                    both: dequantised (float32 [out, in])
      state         4-bit: {"codes", "absmax", ...} .npz with the same names, to decode instead of quantising (shape: [out, in])
Result: quant_state (the JSON stored in a checkpoint), seconds
"""

from __future__ import annotations

import time

import bitsandbytes.functional as bnb
import numpy as np
import torch
from _wire import Job, Result, serve


def handle(job: Job) -> Result:
    start = time.monotonic()
    dtype = getattr(torch, job.get("dtype", "float32"))
    if job.get("state"):
        arrays, state = decode(job, dtype), None
    else:
        weight = torch.from_numpy(np.load(job["weight"])).to(dtype)
        arrays, state = int8(weight) if job["kind"] == "int8" else four_bit(weight, job)
    np.savez(job["out"], **{name: array.cpu().numpy() for name, array in arrays.items()})
    return {"quant_state": state, "seconds": round(time.monotonic() - start, 3)}


def int8(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], None]:
    codes, scb, _ = bnb.int8_vectorwise_quant(weight.to(torch.float16))
    return {"codes": codes, "scb": scb, "dequantised": bnb.int8_vectorwise_dequant(codes, scb).float()}, None


def four_bit(weight: torch.Tensor, job: Job) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    codes, state = bnb.quantize_4bit(
        weight, blocksize=job.get("blocksize", 64), compress_statistics=job.get("double", False), quant_type=job["kind"]
    )
    arrays = {
        "codes": codes,
        "absmax": state.absmax,
        "code": state.code,
        "dequantised": bnb.dequantize_4bit(codes, state).float(),
    }
    if state.nested:
        arrays |= {"nested_absmax": state.state2.absmax, "nested_code": state.state2.code, "offset": state.offset}
    stored = {key: value for key, value in state.as_dict(packed=False).items() if not isinstance(value, torch.Tensor)}
    return arrays, {
        key: list(value) if isinstance(value, tuple | torch.Size) else value for key, value in stored.items()
    }


def decode(job: Job, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The values of 4-bit codes that someone else made."""
    given = {name: torch.from_numpy(array) for name, array in np.load(job["state"]).items()}
    common = {"code": given["code"], "blocksize": job.get("blocksize", 64), "quant_type": job["kind"], "dtype": dtype}
    common |= {"shape": torch.Size(job["shape"]), "absmax": given["absmax"]}
    if job.get("double"):
        inner = bnb.QuantState(
            absmax=given["nested_absmax"], code=given["nested_code"], blocksize=256, dtype=torch.float32
        )
        common |= {"offset": given["offset"], "state2": inner}
    return {"dequantised": bnb.dequantize_4bit(given["codes"], bnb.QuantState(**common)).float()}


if __name__ == "__main__":
    serve(handle, ("bitsandbytes", "torch"))
