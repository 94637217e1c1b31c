"""A stream that remembers products gives what running the block from its start gives, to the bit, in every family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from fewbit.run.acts import ActStore
from fewbit.run.collect import collect
from fewbit.run.drift import DAMPINGS
from fewbit.run.hf import BlockModel
from fewbit.run.keeping import kept_bytes, survey
from fewbit.run.needless import Recorder, needless
from fewbit.run.observe import Observer
from fewbit.run.passes import Stream
from fewbit.run.source import open_source
from fewbit.run.stages import Block, find_stages

SMALL = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
MODELS = {
    "llama": SMALL,
    "qwen3": {**SMALL, "intermediate_size": 96, "head_dim": 8},  # wide: what gate and up make may be made again
    "gemma2": {**SMALL, "head_dim": 8, "sliding_window": 8},
    "olmo2": SMALL,
    "phi": {**SMALL, "num_key_value_heads": 4},
    "gpt2": {"vocab_size": 99, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64},
    "granite": {**SMALL, "residual_multiplier": 0.25},
    "gpt_neox": {**SMALL, "num_key_value_heads": None, "tie_word_embeddings": True},
    "mixtral": {**SMALL, "num_local_experts": 3, "num_experts_per_tok": 2},
}
# others put a norm behind their last product
ADDS = {"llama": 1.0, "qwen3": 1.0, "phi": 1.0, "gpt2": 1.0, "gpt_neox": 1.0, "granite": 0.25}
NEEDS = frozenset({"gram", "cross_gram", "absmax"})


def block_of(model_type: str, folder: Path) -> tuple[Block, dict[str, torch.Tensor], torch.Tensor, list[str]]:
    """A random block, its parameters, hidden states [5, 16, 32], and the names of its matrices."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{k: v for k, v in MODELS[model_type].items() if v is not None})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    model.save_pretrained(folder)
    folder.mkdir(exist_ok=True)
    with open_source(folder) as source, torch.no_grad():
        blocks = BlockModel(source.config, source.manifest)
        entry = blocks.enter(blocks.load_trunk(source.read), torch.randint(0, 99, (2, 16)))
        params = blocks.load_block(0, source.read)
    params = {name: value + 0.1 * torch.randn_like(value) for name, value in params.items()}
    matrices = [name for name, value in params.items() if value.dim() > 1]
    return Block(blocks, 0, entry.kwargs[0], 2), params, torch.randn(5, 16, 32), matrices


def walk(block, params, floats, hidden, stages, kept, files=None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """All statistics and both outputs of a walk that changes each stage's weights once they were seen."""
    params, seen = {name: value.clone() for name, value in params.items()}, []
    stores = []
    for count in (5, 3):
        stores.append(ActStore((count, 16, 32), torch.float32, 2))
        for batch in range(len(stores[-1])):
            stores[-1].put(batch, hidden[slice(*stores[-1].span(batch))])
    first = Stream(block, params, stores[0], stages, kept, files)
    second = Stream(block, floats, stores[1], stages, kept, files and files.with_name("other"))
    for number, stage in enumerate(stages):
        stats = collect(first, second, number, NEEDS, lambda: None)
        for expert in sorted(stats, key=str):
            found = stats[expert]
            seen += [part for part in (found.gram, found.cross_gram, found.absmax) if part is not None]
        for name in stage.params:
            params[name].mul_(0.9)
    first.finish()
    second.finish()
    return seen, [torch.cat([store.get(i) for i in range(len(store))]) for store in stores]


@pytest.mark.parametrize("model_type", MODELS)
def test_remembering_changes_nothing(model_type: str, tmp_path: Path) -> None:
    block, params, hidden, matrices = block_of(model_type, tmp_path)
    with torch.no_grad():
        stages = find_stages(block, params, matrices, hidden[:1])
        kept = survey(block, params, stages, hidden[:1])
        assert (kept is None) == (model_type == "mixtral")
        floats = {name: value + 0.01 * torch.randn_like(value) for name, value in params.items()}
        plain = walk(block, params, floats, hidden, stages, None)
        if kept is not None:
            assert kept[-1].adds == pytest.approx(ADDS.get(model_type, 0.0), abs=1e-4)
            made_up = walk(block, params, floats, hidden, stages, kept)
            assert all(torch.equal(a, b) for a, b in zip(plain[1], made_up[1], strict=True))
            kept = [replace(one, adds=0.0) for one in kept]
        whole = survey(block, params, stages, hidden[:1], again=False)
        assert model_type not in ("qwen3", "gpt2") or any(k.again for k in kept)
        assert whole is None or not any(k.again for k in whole)
        for held in (kept, whole and [replace(one, adds=0.0) for one in whole]):
            for files in (None, tmp_path / "kept"):
                found = walk(block, params, floats, hidden, stages, held, files)
                for a, b in zip(plain, found, strict=True):
                    assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert not list(tmp_path.glob("*.live"))


@pytest.mark.parametrize("model_type", ADDS)
def test_the_last_product_makes_up_for_what_leaves_the_block(model_type: str, tmp_path: Path) -> None:
    """The correction is the regression of the block's whole error on the inputs of its last product."""
    block, params, _, matrices = block_of(model_type, tmp_path)
    hidden = torch.randn(8, 16, 32)
    with torch.no_grad():
        stages = find_stages(block, params, matrices, hidden[:1])
        kept = survey(block, params, stages, hidden[:1])
        last = stages[-1].params[0]
        floats = {name: value.clone() for name, value in params.items()}
        offset = 0.3 * torch.randn(32)  # what earlier blocks got wrong
        stores = [ActStore((8, 16, 32), torch.float32, 2) for _ in range(2)]
        for batch in range(4):
            cut = slice(*stores[0].span(batch))
            stores[0].put(batch, hidden[cut] + offset)
            stores[1].put(batch, hidden[cut])
        seen: list[torch.Tensor] = []
        with Observer({last: params[last]}, lambda use: seen.append(use.x.reshape(-1, use.x.shape[-1]))):
            out = block.run(params, hidden + offset)
        error = (block.run(floats, hidden) - out).flatten(0, 1) / ADDS[model_type]
        first, second = (Stream(block, p, s, stages, kept) for p, s in zip((params, floats), stores, strict=True))
        for number in range(len(stages)):
            stats = collect(first, second, number, NEEDS, lambda: None)[None]
    x, found = torch.cat(seen), stats.correction
    assert found is not None and found.shape == (32, x.shape[-1])
    answers = []
    for damping in DAMPINGS:
        gram = x.T @ x
        gram.diagonal().add_(damping * gram.diagonal().mean())
        answers.append(torch.linalg.solve(gram, x.T @ error).T)
    assert min(float((found - answer).abs().max()) for answer in answers) < 1e-3
    assert float((error - x @ found.T).square().sum()) < float(error.square().sum())


def test_attention_and_projections_are_not_repeated(tmp_path: Path) -> None:
    block, params, hidden, matrices = block_of("llama", tmp_path)
    with torch.no_grad():
        stages = find_stages(block, params, matrices, hidden[:1])
        kept = survey(block, params, stages, hidden[:1])
    assert [stage.params[0].split(".")[1] for stage in stages] == ["q_proj", "o_proj", "gate_proj", "down_proj"]
    assert [(k.outputs, k.inputs) for k in kept] == [(False, False), (True, True), (False, False), (True, True)]
    assert kept_bytes(kept, 10, 4) == 10 * 4 * (48 + 32)


def test_norms_that_nobody_reads_are_not_computed(tmp_path: Path) -> None:
    """Five passes of one batch: either norm is wanted for its own stage's inputs and once more for the products of that stage."""
    block, params, hidden, matrices = block_of("llama", tmp_path)
    counts = []

    class Count(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            counts[-1] += func is torch.rsqrt
            return func(*args, **(kwargs or {}))

    with torch.no_grad():
        stages = find_stages(block, params, matrices, hidden[:1])
        kept = survey(block, params, stages, hidden[:1])
        for less in (kept, [replace(one, needless={}) for one in kept]):
            store = ActStore((2, 16, 32), torch.float32, 2)
            store.put(0, hidden[:2])
            stream = Stream(block, params, store, stages, less)
            for number in range(len(stages)):
                counts.append(0)
                with Count():
                    stream.inputs(number, 0)
            counts.append(0)
            with Count():
                stream.finish()
    assert counts[:5] == [1, 1, 1, 1, 0] and sum(counts[5:]) > 4


def test_calls_that_nothing_depends_on() -> None:
    weight = torch.randn(4, 4)

    def block(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        normed = torch.rsqrt(x)  # 0: read by the product only
        product = torch.nn.functional.linear(normed, weight)  # 1
        other = torch.exp(x)  # 2
        other.add_(product)  # 3: changes what 2 made
        unread = torch.sin(other)  # 4
        return other, unread

    recorder, x = Recorder({"w": weight}, None), torch.rand(3, 4)
    with recorder:
        other, unread = block(x)
    address = other.untyped_storage().data_ptr()
    assert needless(recorder.calls, [address], set()) == {4: torch.sin}
    assert needless(recorder.calls, [address], {"w"}) == {0: torch.rsqrt, 4: torch.sin}
    assert needless(recorder.calls, [unread.untyped_storage().data_ptr()], set()) == {}
