"""Golden files of bitsandbytes, compressed-tensors and MLX, made by their own code. Run in the `hf` environment:

    $FEWBIT_ENVS/hf/bin/python dev/goldens/formats_hf.py tests/golden/formats

Each file holds one weight as the tool stores it, under `model.layers.0.mlp.up_proj`, beside `reference`: what the tool itself decodes it to, float32. The
config that goes with it is in the file's metadata.
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
    w[3, 17], w[5] = 0.9, 0.0  # an outlier, a row of zeros
    w[7, :32] = 0.02  # a constant group
    return w.to(torch.bfloat16)


def keep(name: str, tensors: dict[str, torch.Tensor], reference: torch.Tensor, config: dict) -> None:
    config = {"hidden_size": 128, "intermediate_size": 32, "torch_dtype": "bfloat16", **config}
    stored = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    save_file(
        {**stored, "reference": reference.detach().float().contiguous()},
        OUT / f"{name}.safetensors",
        {"config": json.dumps(config)},
    )


def bitsandbytes_files() -> None:
    import bitsandbytes as bnb
    from bitsandbytes import functional as F

    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            packed, state = F.quantize_4bit(weight(), blocksize=64, quant_type=kind, compress_statistics=nested)
            tensors = {f"{MODULE}.weight": packed} | {
                f"{MODULE}.weight.{key}": value for key, value in state.as_dict(packed=True).items()
            }
            state.dtype = torch.float32
            words = {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "load_in_8bit": False,
                "bnb_4bit_quant_type": kind,
                "bnb_4bit_use_double_quant": nested,
            }
            keep(
                f"bnb-{kind}{'-dq' if nested else ''}",
                tensors,
                F.dequantize_4bit(packed, state),
                {"quantization_config": words},
            )
    codes, scb, _ = F.int8_vectorwise_quant(weight().half())
    tensors = {
        f"{MODULE}.weight": codes,
        f"{MODULE}.SCB": scb,
        f"{MODULE}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }
    reference = codes.float() * (scb.float() / 127.0)[:, None]
    keep(
        "bnb-int8",
        tensors,
        reference,
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}},
    )
    print("bitsandbytes", bnb.__version__)


def compressed_files() -> None:
    import compressed_tensors
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.utils import calculate_qparams

    args = {
        "w4": {"num_bits": 4, "strategy": "group", "group_size": 32}, "w4-asym": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
        "w3": {"num_bits": 3, "strategy": "group", "group_size": 64}, "w8-channel": {"num_bits": 8, "strategy": "channel"},
        "w5-channel-asym": {"num_bits": 5, "strategy": "channel", "symmetric": False}, "fp8-channel": {"num_bits": 8, "type": "float", "strategy": "channel"},
        "fp8-tensor": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    }  # fmt: skip
    for name, words in args.items():
        word = "naive-quantized" if "fp8" in name else "pack-quantized"
        config = {
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": words, "format": word}},
            "format": word,
            "quant_method": "compressed-tensors",
        }
        scheme = QuantizationConfig.model_validate(config).config_groups["group_0"]
        size = words.get("group_size", 128)
        blocks = (
            weight().float().reshape(1, -1)
            if words["strategy"] == "tensor"
            else weight().float().unflatten(-1, (-1, size))
        )
        low, high = (blocks.amin(-1), blocks.amax(-1))
        scale, zero = calculate_qparams(low.to(torch.bfloat16), high.to(torch.bfloat16), scheme.weights)
        state = {"weight": weight(), "weight_scale": scale.reshape(-1) if words["strategy"] == "tensor" else scale}
        if not words.get("symmetric", True):
            state["weight_zero_point"] = zero.to(torch.int8)
        compressor = BaseCompressor.get_value_from_registry(word)
        stored = compressor.compress(state, scheme)
        exact = {key: value.float() if key == "weight_scale" else value for key, value in stored.items()}
        reference = compressor.decompress(exact, scheme)["weight"]
        keep(
            f"ct-{name}",
            {f"{MODULE}.{key}": value for key, value in stored.items()},
            reference,
            {"quantization_config": config},
        )
    compressed_blocks()
    print("compressed-tensors", compressed_tensors.__version__)


def compressed_blocks() -> None:
    """The block formats of compressed-tensors: NVFP4 and MXFP4."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
    from compressed_tensors.quantization.utils import calculate_qparams

    for preset in ("NVFP4A16", "MXFP4A16"):
        scheme = preset_name_to_scheme(preset, ["Linear"])
        word = "nvfp4-pack-quantized" if "NV" in preset else "mxfp4-pack-quantized"
        size = scheme.weights.group_size
        top = weight().float().unflatten(-1, (-1, size)).abs().amax(-1)
        state = {"weight": weight()}
        if "NV" in preset:
            state["weight_global_scale"] = (448.0 * 6.0 / weight().float().abs().max()).reshape(1)
            state["weight_scale"], _ = calculate_qparams(
                -top, top, scheme.weights, global_scale=state["weight_global_scale"]
            )
        else:
            state["weight_scale"], _ = calculate_qparams(-top, top, scheme.weights)
        compressor = BaseCompressor.get_value_from_registry(word)
        stored = compressor.compress(state, scheme)
        reference = compressor.decompress(dict(stored), scheme)["weight"]
        scheme.format = word
        config = {
            "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
            "format": word,
            "quant_method": "compressed-tensors",
        }
        keep(
            f"ct-{preset.lower()}",
            {f"{MODULE}.{key}": value for key, value in stored.items()},
            reference,
            {"quantization_config": config},
        )


def mlx_files() -> None:
    import mlx.core as mx
    import numpy as np

    def torch_of(array: mx.array) -> torch.Tensor:
        if array.dtype == mx.bfloat16:
            return torch.from_numpy(np.array(array.view(mx.uint16))).view(torch.bfloat16)
        return torch.from_numpy(np.array(array))

    w = mx.array(weight().float().numpy()).astype(mx.bfloat16)
    cases = [("affine", bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (64,)] + [
        ("affine", 4, 32),
        ("mxfp4", 4, 32),
        ("mxfp8", 8, 32),
        ("nvfp4", 4, 16),
    ]
    for mode, bits, group in cases:
        parts = mx.quantize(w, group_size=group, bits=bits, mode=mode)
        exact = [parts[0], *(part.astype(mx.float32) if mode == "affine" else part for part in parts[1:])]
        reference = mx.dequantize(*exact, group_size=group, bits=bits, mode=mode)
        tensors = {f"{MODULE}.{key}": torch_of(part) for key, part in zip(("weight", "scales", "biases"), parts)}
        words = {"group_size": group, "bits": bits, "mode": mode}
        keep(
            f"mlx-{mode}{bits}-g{group}",
            tensors,
            torch_of(reference),
            {"quantization": words, "quantization_config": words},
        )
    print("mlx", mx.__version__)


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = sys.argv[2:] or ["bitsandbytes", "compressed", "mlx"]
    for part in chosen:
        {"bitsandbytes": bitsandbytes_files, "compressed": compressed_files, "mlx": mlx_files}[part]()
