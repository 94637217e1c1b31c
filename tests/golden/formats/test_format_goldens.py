"""Files made by the reference tools (dev/goldens/formats_*.py): decoded to the values that the tools decode them to, and written again byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fewbit.base.manifest import Manifest, TensorInfo, data_bytes
from fewbit.formats.table import detect
from fewbit.formats.words import SAFETENSORS_DTYPE

FILES = sorted(Path(__file__).parent.glob("*.safetensors"))
# relative tolerance of the values: tools that decode in 16 bits themselves
COARSE = {
    "ct-nvfp4a16": 2**-7,
    "ct-mxfp4a16": 2**-7,
    "mlx-mxfp4": 2**-7,
    "mlx-mxfp8": 2**-7,
    "mlx-nvfp4": 2**-7,
    "bnb-int8": 1e-6,
}
# parts that differ, with the reason
OTHERWISE = {
    "quant_state.bitsandbytes": "JSON padded with spaces to a length that shapes alone determine",
}


def load(file: Path) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict]:
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        config = json.loads(opened.metadata()["config"])
    return tensors, tensors.pop("reference"), config


def manifest(tensors: dict[str, torch.Tensor]) -> Manifest:
    return Manifest(
        {
            n: TensorInfo(
                n, SAFETENSORS_DTYPE[t.dtype], tuple(t.shape), data_bytes(SAFETENSORS_DTYPE[t.dtype], tuple(t.shape))
            )
            for n, t in tensors.items()
        }
    )


def test_there_are_goldens() -> None:
    assert len(FILES) >= 20


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_golden(file: Path) -> None:
    tensors, reference, config = load(file)
    found = detect(config, manifest(tensors))
    assert found is not None, config
    form, weights = found
    ((name, stored),) = weights.items()
    q = form.decode(name, tensors.__getitem__, stored)
    q.check()
    rtol = next((tolerance for start, tolerance in COARSE.items() if file.stem.startswith(start)), 0.0)
    torch.testing.assert_close(q.dequantize(), reference, rtol=rtol, atol=0)
    if form.accepts(q.scheme, q.shape) is not None:
        assert "gptq" in file.stem and "asym-v1" in file.stem  # read, never written: zero points minus one
        return
    again = form.encode(name, q)
    if form.name == "modelopt":  # TensorRT-LLM loads no int4 layer without it; ModelOpt leaves ones out
        extra = again.pop(name.removesuffix("weight") + "pre_quant_scale", None) if file.stem.endswith("awq") else None
        assert extra is None or bool((extra == 1).all())
    assert again.keys() == tensors.keys()
    for part, tensor in again.items():
        if any(word in part for word in OTHERWISE):
            assert bytes(tensor.tolist()).rstrip() == bytes(tensors[part].tolist()).rstrip()
            continue
        assert tensor.dtype == tensors[part].dtype and tensor.shape == tensors[part].shape, part
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), tensors[part].reshape(-1).view(torch.uint8)), part
