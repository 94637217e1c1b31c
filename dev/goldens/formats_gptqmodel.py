"""Golden files of GPTQModel's own packers: GPTQ versions 1 and 2, with and without activation order, and AWQ. Run in the `gptqmodel` environment:

    $FEWBIT_ENVS/gptqmodel/bin/python dev/goldens/formats_gptqmodel.py tests/golden/formats

Layout of the files as in formats_hf.py. `reference` is float32: (code - zero) * scale of the codes and zero points that went in, checked against GPTQModel's
own `dequantize_weight` (which computes in float16).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.quantization.config import QuantizeConfig
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from safetensors.torch import save_file

MODULE = "model.layers.0.mlp.up_proj"
OUT = Path(sys.argv[1])
ROWS, COLS, GROUP = 64, 128, 32


def parameters(bits: int, sym: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes [out, in], scales f16 and zero points [out, groups]."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (ROWS, COLS), generator=generator)
    scales = (torch.rand(ROWS, COLS // GROUP, generator=generator) * 0.01 + 0.001).half()
    zeros = torch.randint(1, 1 << bits, (ROWS, COLS // GROUP), generator=generator)
    return codes, scales, torch.full_like(zeros, 1 << (bits - 1)) if sym else zeros


def linear_of(values: torch.Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(COLS, ROWS, bias=False)
    layer.weight.data = values.clone()
    return layer


def keep(name: str, module: torch.nn.Module, names: tuple[str, ...], reference: torch.Tensor, config: dict) -> None:
    tensors = {f"{MODULE}.{key}": getattr(module, key).detach().cpu().contiguous().clone() for key in names}
    save_file(
        {**tensors, "reference": reference.contiguous()},
        OUT / f"{name}.safetensors",
        {"config": json.dumps({"quantization_config": config})},
    )


def gptq(bits: int, sym: bool, version: int, ordered: bool) -> None:
    codes, scales, zeros = parameters(bits, sym)
    group = torch.arange(COLS) // GROUP
    if ordered:
        group = group[torch.randperm(COLS, generator=torch.Generator().manual_seed(0))]
    reference = (codes - zeros[:, group]).float() * scales.float()[:, group]
    module = TorchLinear(
        bits=bits,
        group_size=GROUP,
        sym=sym,
        desc_act=ordered,
        in_features=COLS,
        out_features=ROWS,
        register_buffers=True,
    )
    module.pack_original(linear_of(reference), scales.float(), zeros.float(), group.to(torch.int32))
    module.post_init()
    assert (module.dequantize_weight().T.float() - reference).abs().max() < 1e-3
    if version == 1:
        convert_gptq_v2_to_v1_format_module(module, QuantizeConfig(bits=bits, group_size=GROUP, sym=sym))
    words = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": GROUP,
        "desc_act": ordered,
        "sym": sym,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }
    name = f"gptq-{bits}bit-{'sym' if sym else 'asym'}-v{version}{'-order' if ordered else ''}"
    keep(name, module, ("qweight", "qzeros", "scales", "g_idx"), reference, words)


def awq() -> None:
    codes, scales, zeros = parameters(4, False)
    group = torch.arange(COLS) // GROUP
    reference = (codes - zeros[:, group]).float() * scales.float()[:, group]
    module = AwqTorchLinear(bits=4, group_size=GROUP, sym=False, desc_act=False, in_features=COLS, out_features=ROWS)
    module.pack(linear_of(reference), scales, zeros.half())
    theirs = dequantize_gemm(module.qweight, module.qzeros, module.scales, 4, GROUP).T.float()
    assert (theirs - reference).abs().max() < 1e-3
    words = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
    keep("awq-gemm", module, ("qweight", "qzeros", "scales"), reference, words)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for bits in (2, 3, 4, 8):
        gptq(bits, True, 1, False)
        gptq(bits, False, 2, False)
    gptq(4, False, 1, False)
    gptq(4, True, 2, True)
    awq()
