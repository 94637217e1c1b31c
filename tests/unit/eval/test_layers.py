"""Shares of the loss: they add up to it, and each agrees with putting that tensor alone in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fewbit.eval.fidelity import Options, study
from fewbit.eval.layers import layer_report
from fewbit.eval.stream import Runner
from fewbit.eval.windows import Windows, windows
from fewbit.math.scales import quantize
from fewbit.num.scheme import parse_scheme
from fewbit.run.source import Source, open_source

ROOT = Path(__file__).parents[3]
SAMPLE = ROOT / "samples" / "sample"
TEXT = str(ROOT / "samples" / "text" / "wikitext2-test.txt")


class Changed:
    """The sample with some tensors replaced."""

    def __init__(self, base: Source, tensors: dict[str, torch.Tensor]) -> None:
        self.base, self.tensors = base, tensors
        self.config, self.manifest, self.stored = base.config, base.manifest, {}

    def read(self, name: str) -> torch.Tensor:
        return self.tensors[name] if name in self.tensors else self.base.read(name)


def coarse(base: Source, names: list[str], scheme: str) -> dict[str, torch.Tensor]:
    return {name: quantize(parse_scheme(scheme), base.read(name).float()).dequantize() for name in names}


@pytest.fixture(scope="module")
def chosen() -> Windows:
    return windows(TEXT, SAMPLE, 64, 128, 8192)


def test_shares_add_up_and_name_the_culprits(tiny: Path, chosen: Windows) -> None:
    with open_source(tiny) as base:
        names = [
            f"model.layers.{i}.{part}.weight"
            for i, part in ((0, "self_attn.v_proj"), (1, "mlp.up_proj"), (2, "mlp.down_proj"))
        ]
        tensors = coarse(base, names, "int4-g32") | coarse(base, ["model.embed_tokens.weight"], "int6-channel")
        found = layer_report(Runner(base), Runner(Changed(base, tensors)), chosen)
        shares = {item.name: item.share for item in found.tensors if item.share}
        assert set(shares) == set(tensors)
        assert found.explained == pytest.approx(found.kl, rel=0.01)
        alone = {
            name: layer_report(Runner(base), Runner(Changed(base, {name: w})), chosen).kl for name, w in tensors.items()
        }
        for name, kl in alone.items():
            assert shares[name] == pytest.approx(kl, rel=0.25, abs=0.02 * found.kl)
        assert max(shares, key=lambda name: shares[name]) == max(alone, key=lambda name: alone[name])
        assert 0 < found.blocks[0].own < found.blocks[0].drift  # the drift has the embeddings' error too
        assert all(item.sqnr_db is not None for item in found.tensors if item.name in tensors)


def test_an_equal_model_has_no_loss_anywhere(tiny: Path, chosen: Windows) -> None:
    with open_source(tiny) as base:
        found = layer_report(Runner(base), Runner(base), chosen)
        assert found.kl == pytest.approx(0.0, abs=1e-9) and all(block.drift == 0.0 for block in found.blocks)
        assert all(item.sqnr_db is None for item in found.tensors) and found.notes == ()


def test_rewritten_weights_are_said_to_be(tiny: Path, chosen: Windows) -> None:
    with open_source(tiny) as base:
        norm = "model.layers.2.input_layernorm.weight"
        found = layer_report(Runner(base), Runner(Changed(base, {norm: base.read(norm) * 2})), chosen, gradients=False)
        assert "rewritten" in found.notes[0]


def test_damaged_tokens_are_shown_in_context(tiny: Path) -> None:
    found = study([tiny], tiny, Options(text=TEXT, tokens=256, length=128, look=1))
    worst = found.extras["damaged"][str(tiny)]
    assert len(worst) == 12 and all(item["context"] and item["base_says"] == item["says"] for item in worst)
