"""Golden files of HQQ, ModelOpt and AutoRound, made by their own code, each where it can be imported:

    PYTHONPATH=<hqq 0.2.8.post1 source> $FEWBIT_ENVS/hf/bin/python dev/goldens/formats_more.py tests/golden/formats hqq
    PYTHONPATH=<nvidia-modelopt 0.47.0 wheel, unpacked> … dev/goldens/formats_more.py tests/golden/formats modelopt
    $FEWBIT_ENVS/autoround/bin/python dev/goldens/formats_more.py tests/golden/formats autoround

Layout of the files as in formats_hf.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

MODULE = "model.layers.0.mlp.up_proj"
OUT = Path(sys.argv[1])


def weight(rows: int = 32, cols: int = 128) -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    w = torch.randn(rows, cols, generator=generator) * 0.05
    w[3, 17], w[7, :32] = 0.9, 0.02
    return w


def keep(name: str, tensors: dict[str, torch.Tensor], reference: torch.Tensor, config: dict) -> None:
    config = {"hidden_size": 128, "intermediate_size": 32, "torch_dtype": "float16", **config}
    stored = {f"{MODULE}.{key}": tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    save_file(
        {**stored, "reference": reference.detach().float().contiguous()},
        OUT / f"{name}.safetensors",
        {"config": json.dumps(config)},
    )


def hqq_files() -> None:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer

    for bits in (1, 2, 3, 4, 8):
        layer = torch.nn.Linear(128, 32, bias=False)
        layer.weight.data = weight()
        config = BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
        made = HQQLinear(layer, config, compute_dtype=torch.float16, device="cpu", del_orig=False)
        state = {key: value for key, value in made.state_dict().items() if value is not None}
        meta = {
            **made.meta,
            "compute_dtype": torch.float32,
            "scale": made.meta["scale"].float(),
            "zero": made.meta["zero"].float(),
        }
        reference = Quantizer.dequantize(made.W_q, meta)
        words = {
            "quant_method": "hqq",
            "quant_config": {"weight_quant_params": config["weight_quant_params"]},
            "skip_modules": ["lm_head"],
        }
        keep(f"hqq-{bits}bit", state, reference, {"quantization_config": words})


def modelopt_files() -> None:
    from modelopt.torch.export.quant_utils import pack_int4_in_uint8
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    w = weight()
    scale = w.unflatten(-1, (-1, 64)).abs().amax(-1) / 7.0
    packed = pack_int4_in_uint8(w, scale, 64)
    codes = (w / scale.repeat_interleave(64, -1)).round().clamp(-8, 7)
    words = {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "group_size": 64}
    keep(
        "modelopt-w4a16-awq",
        {"weight": packed, "weight_scale": scale},
        codes * scale.repeat_interleave(64, -1),
        {"quantization_config": words},
    )
    over = w.abs().max() / (6.0 * 448.0)
    made, block_scale, over = NVFP4QTensor.quantize(w, 16, None, over)
    stored = {
        "weight": made._quantized_data,
        "weight_scale": block_scale.to(torch.float8_e4m3fn),
        "weight_scale_2": over.float().reshape(()),
    }
    reference = made.dequantize(dtype=torch.float32, scale=block_scale, double_scale=over, block_sizes={-1: 16})
    keep(
        "modelopt-w4a16-nvfp4",
        stored,
        reference,
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4", "group_size": 16}},
    )


def autoround_files() -> None:
    import auto_round
    from auto_round_extension.torch.qlinear_torch import QuantLinear
    from auto_round_extension.torch.qlinear_torch_zp import QuantLinear as WithZero

    print(auto_round.__version__)
    for bits in (2, 3, 4, 8):
        w = weight(64)
        scale = (w.unflatten(-1, (-1, 32)).abs().amax(-1) / ((1 << (bits - 1)) - (bits < 3) * 0.5)).half()
        zero = 1 << (bits - 1)
        codes = (w / scale.float().repeat_interleave(32, -1)).round().clamp(-zero, zero - 1)
        reference = codes * scale.float().repeat_interleave(32, -1)
        layer = torch.nn.Linear(128, 64, bias=False)
        layer.weight.data = reference.clone()
        module = WithZero(bits, 32, 128, 64, False)
        module.pack(layer, scale.float(), torch.full(scale.shape, float(zero)), None, device="cpu")
        words = {
            "quant_method": "auto-round",
            "packing_format": "auto_round:auto_gptq",
            "bits": bits,
            "group_size": 32,
            "sym": True,
            "data_type": "int",
        }
        stored = {key: getattr(module, key) for key in ("qweight", "qzeros", "scales")}
        keep(f"autoround-{bits}bit", stored, reference, {"quantization_config": words})
    assert QuantLinear is not None


if __name__ == "__main__":
    torch.set_num_threads(1)
    for part in sys.argv[2:]:
        {"hqq": hqq_files, "modelopt": modelopt_files, "autoround": autoround_files}[part]()
