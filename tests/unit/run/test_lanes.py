"""Batches side by side: each once, in its lane, errors and the gradient mode carried over; a model's blocks give in a lane what they give outside."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from test_calibrated import make

from fewbit.run.hf import BlockModel
from fewbit.run.lanes import in_lanes, lane
from fewbit.run.source import open_source


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_every_batch_is_run_once_in_the_order_of_its_lane(lanes: int) -> None:
    seen: list[list[int]] = [[] for _ in range(lanes)]
    threads = torch.get_num_threads()
    with torch.no_grad():
        in_lanes(7, lanes, lambda batch: seen[lane()].append(batch) if not torch.is_grad_enabled() else None)
    assert seen == [list(range(k, 7, lanes)) for k in range(lanes)]
    assert torch.get_num_threads() == threads and lane() == 0


def test_an_error_of_one_lane_stops_the_others() -> None:
    others = threading.Event()
    done: list[int] = []

    def work(batch: int) -> None:
        if batch == 1:
            others.set()
            raise ValueError("no")
        others.wait(10)
        done.append(batch)

    with pytest.raises(ValueError, match="no"):
        in_lanes(100, 2, work)
    assert len(done) < 50


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_a_block_gives_the_same_in_every_lane(model_type: str, tmp_path: Path) -> None:
    make(model_type, tmp_path)
    tokens = torch.randint(5, 8000, (6, 24))
    with open_source(tmp_path) as source, torch.no_grad():
        model = BlockModel(source.config, source.manifest)
        entry = model.enter(model.load_trunk(source.read), tokens[:1])
        params = model.load_block(1, source.read)
        hidden = torch.randn(6, 1, 24, entry.hidden.shape[-1])
        wanted = [model.run_block(1, params, one, entry.kwargs[1]) for one in hidden]
        found: dict[int, torch.Tensor] = {}
        model.prepare(1, 2)
        in_lanes(6, 2, lambda k: found.__setitem__(k, model.run_block(1, params, hidden[k], entry.kwargs[1])))
    assert all(torch.allclose(found[k], wanted[k], atol=1e-5) for k in range(6))


def test_blocks_of_a_kind(tmp_path: Path) -> None:
    make("gemma2", tmp_path)
    with open_source(tmp_path) as source:
        model = BlockModel(source.config, source.manifest)
    assert model.kind(0) != model.kind(1)  # one sees a window only
