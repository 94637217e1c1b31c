"""W4A8 from the recipe to the logits: weights of four bits in groups, inputs of eight bits per token wherever the file is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fewbit import api
from fewbit.eval.stream import Runner
from fewbit.num.qtensor import QTensor
from fewbit.run.hf import BlockModel
from fewbit.run.observe import Observer, Use
from fewbit.run.source import open_source
from fewbit.runtime.linear import QuantLinear

SAMPLE = Path(__file__).parents[3] / "samples" / "sample"
TOKENS = torch.randint(5, 8000, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return api.quantize(SAMPLE, to="compressed-tensors:w4a8", out=tmp_path_factory.mktemp("w4a8") / "out").outputs[0]


def by_token(x: torch.Tensor) -> torch.Tensor:
    """Eight bits per token, written out."""
    scale = (x.abs().amax(-1, keepdim=True) / 127).half().float()  # scales of integer activations are f16 here
    return (x / scale).round().clamp(-128, 127) * scale


def test_the_words_of_compressed_tensors(made: Path) -> None:
    words = json.loads((made / "config.json").read_text())["quantization_config"]
    (group,) = words["config_groups"].values()
    weights, inputs = group["weights"], group["input_activations"]
    assert words["format"] == group["format"] == "int-quantized"
    assert (weights["num_bits"], weights["type"], weights["strategy"], weights["group_size"]) == (
        4,
        "int",
        "group",
        128,
    )
    assert weights["symmetric"] and inputs["symmetric"]
    assert (inputs["num_bits"], inputs["type"], inputs["strategy"], inputs["dynamic"]) == (8, "int", "token", True)
    from compressed_tensors.quantization import QuantizationConfig

    known = QuantizationConfig.model_validate({k: v for k, v in words.items() if k != "quant_method"})
    assert next(iter(known.config_groups.values())).weights.num_bits == 4
    with open_source(made) as source:
        codes = source.checkpoint.read("model.layers.0.mlp.down_proj.weight")
        assert (
            codes.dtype == torch.int8
            and int(codes.min()) >= -8
            and int(codes.max()) <= 7
            and codes.unique().numel() > 12
        )


def test_evaluation_rounds_the_inputs_of_every_layer(made: Path) -> None:
    with open_source(made) as source:
        runner = Runner(source)
        store = runner.hidden(TOKENS)
        found = torch.cat([store.get(i) for i in range(len(store))])
        model = BlockModel(source.config, source.manifest)
        with torch.no_grad():
            trunk = model.load_trunk(source.read)
            entry = model.enter(trunk, TOKENS)
            plain = state = entry.hidden
            for index in range(len(model)):
                params = model.load_block(index, source.read)
                tracked = {name: value for name, value in params.items() if value.dim() == 2}

                def rounded(use: Use) -> torch.Tensor:
                    return by_token(use.x)

                with Observer(tracked, rounded):
                    state = model.run_block(index, params, state, entry.kwargs[index])
                plain = model.run_block(index, params, plain, entry.kwargs[index])
    assert float((found - state).norm() / state.norm()) < 2e-3, (
        "a code flips here and there on the way through eight blocks"
    )
    assert float((found - plain).norm() / plain.norm()) > 4 * float((found - state).norm() / state.norm())


def test_the_layer_in_torch_rounds_them_too(made: Path) -> None:
    with open_source(made) as source:
        q = source.qtensor("model.layers.3.mlp.up_proj.weight")
    assert isinstance(q, QTensor) and str(q.scheme).endswith("+int8-token")
    layer = QuantLinear(q, dtype=torch.float32)
    x = torch.randn(7, q.shape[1], generator=torch.Generator().manual_seed(1))
    x[:, 5] *= 30
    wanted = by_token(x) @ q.dequantize().T
    assert float((layer(x) - wanted).norm() / wanted.norm()) < 1e-3
    assert float((layer(x) - x @ q.dequantize().T).norm() / wanted.norm()) > 5e-3
