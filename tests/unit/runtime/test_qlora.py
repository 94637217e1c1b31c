"""Adapters on quantised layers: gradients to adapters only, exact against the same adapters on decoded weights, merged with a stated error."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from qat_models import KINDS
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fewbit.base.errors import InputError
from fewbit.nn import QuantLinear, quantize_
from fewbit.runtime.distil import Schedule, train

peft = pytest.importorskip("peft")
from fewbit.runtime.qlora import LoraQuantLinear, adapted, attach, load_adapter, merge, register  # noqa: E402


def make(kind: str = "llama", dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    words = KINDS[kind]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **words)).to(dtype).eval()


def ids(rows: int = 4, length: int = 16) -> torch.Tensor:
    return torch.randint(0, 128, (rows, length), generator=torch.Generator().manual_seed(1))


def decoded(model: nn.Module) -> nn.Module:
    """The same model with plain linear layers that hold the decoded weights."""
    plain = copy.deepcopy(model)
    for name, layer in list(plain.named_modules()):
        if isinstance(layer, QuantLinear):
            linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None).to(layer.dtype)
            linear.weight.data = layer.qtensor().dequantize(layer.dtype)
            if layer.bias is not None:
                linear.bias.data = layer.bias.detach()
            path, _, attribute = name.rpartition(".")
            setattr(plain.get_submodule(path), attribute, linear)
    return plain


def fill(model: nn.Module) -> None:
    """Adapters as after training: B is no longer zero."""
    generator = torch.Generator().manual_seed(2)
    for name, param in model.named_parameters():
        if "lora_B" in name:
            param.data = 0.02 * torch.randn(param.shape, generator=generator)


@pytest.mark.parametrize("kind", ("llama", "gpt2"))
@pytest.mark.parametrize("word", ("nf4-g64-dq", "int4-g32", "int8", "int3-g32-asym"))
def test_adapters_compute_and_learn_as_on_decoded_weights(kind: str, word: str) -> None:
    model = make(kind)
    quantize_(model, word)
    plain = decoded(model)
    names = [name for name, layer in model.named_modules() if isinstance(layer, QuantLinear)]
    tuned = attach(model, r=4)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=names, task_type="CAUSAL_LM")
    other = peft.get_peft_model(plain.requires_grad_(False), config)
    assert len(list(adapted(tuned))) == len(names)
    fill(tuned)
    other.load_state_dict({k: v for k, v in tuned.state_dict().items() if "lora_" in k}, strict=False)
    losses = [one(ids(), labels=ids()).loss for one in (tuned, other)]
    for loss in losses:
        loss.backward()
    assert torch.allclose(*losses, atol=1e-5)
    learnt = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    assert learnt and all("lora_" in name for name in learnt)
    theirs = dict(other.named_parameters())
    for name, param in learnt.items():
        assert torch.allclose(param.grad, theirs[name].grad, atol=1e-5), name
        assert float(param.grad.abs().max()) > 0
    assert all(p.grad is None for p in tuned.parameters() if not p.requires_grad)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    grads = []
    for checkpointing in (False, True):
        model = make()
        quantize_(model, "nf4-g64-dq")
        torch.manual_seed(3)
        tuned = attach(model, r=4, checkpointing=checkpointing).train()
        fill(tuned)
        assert model.is_gradient_checkpointing == checkpointing
        tuned(ids(), labels=ids()).loss.backward()
        grads.append({name: p.grad for name, p in tuned.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 28
    assert all(torch.allclose(grads[0][name], grads[1][name], atol=1e-6) for name in grads[0])


def test_bf16_base_trains_float32_adapters() -> None:
    model = make(dtype=torch.bfloat16)
    quantize_(model, "nf4-g64-dq")
    before = {name: layer.qtensor() for name, layer in model.named_modules() if isinstance(layer, QuantLinear)}
    tuned = attach(model, r=8)
    assert {p.dtype for p in tuned.parameters() if p.requires_grad} == {torch.float32}
    curve = train(tuned, ids(8), Schedule(steps=20, batch=4, every=10, lr=5e-3))
    assert curve[-1].loss < curve[1].loss
    for name, layer in adapted(tuned):
        q = before[name.removeprefix("base_model.model.")]
        assert layer.base_layer.dtype == torch.bfloat16 and torch.equal(layer.base_layer.qtensor().codes, q.codes)


def test_merge_states_its_error() -> None:
    model = make()
    quantize_(model, "int8-g32")
    tuned = attach(model, r=4)
    fill(tuned)
    parts = {name: (one.base_layer.weight, one.get_delta_weight("default").detach()) for name, one in adapted(tuned)}
    with torch.no_grad():
        wanted = tuned(ids()).logits
    merged, rows = merge(tuned)
    assert not any(isinstance(m, LoraQuantLinear) for m in merged.modules()) and len(rows) == 14
    for row, (name, (base, added)) in zip(rows, parts.items(), strict=True):
        off = merged.get_submodule(row.name).qtensor().dequantize() - base - added
        assert name.endswith(row.name) and row.scheme == "int8-g32"
        assert row.error == pytest.approx(float(off.norm() / (base + added).norm()), rel=1e-3)
        assert row.lost == pytest.approx(float(off.norm() / added.norm()), rel=1e-3)
        assert row.update == pytest.approx(float(added.norm() / base.norm()), rel=1e-3)
        assert 0 < row.error < 0.01
    with torch.no_grad():
        assert float((merged(ids()).logits - wanted).norm() / wanted.norm()) < 0.02


def test_merge_into_another_scheme_and_back() -> None:
    model = make()
    quantize_(model, "nf4-g64-dq")
    tuned = attach(model, r=4)
    fill(tuned)
    layer = next(iter(adapted(tuned)))[1]
    codes = layer.base_layer.qtensor().codes.clone()
    layer.merge()
    assert layer.merged and not torch.equal(layer.base_layer.qtensor().codes, codes)
    layer.unmerge()
    assert torch.equal(layer.base_layer.qtensor().codes, codes)
    with pytest.warns(UserWarning, match="unmerged"):
        layer.unmerge()
    fine, rows = merge(tuned, "int8-channel")
    assert {row.scheme for row in rows} == {"int8-channel"}
    assert fine.model.layers[0].mlp.up_proj.scheme.grid.bits == 8
    with pytest.raises(InputError, match="FB-E0922"):
        merge(peft.get_peft_model(make(), peft.LoraConfig(target_modules=["q_proj"])))


def test_saved_adapters_load_and_mix(tmp_path: Path) -> None:
    model = make()
    quantize_(model, "int4-g32")
    fresh = copy.deepcopy(model)
    tuned = attach(model, r=4)
    fill(tuned)
    tuned.save_pretrained(tmp_path)
    again = load_adapter(fresh, tmp_path)
    with torch.no_grad():
        wanted, base = tuned(ids()).logits, None
        assert torch.allclose(again(ids()).logits, wanted, atol=1e-6)
        with again.disable_adapter():
            base = again(ids()).logits
        again.eval()
        mixed = again(ids(), adapter_names=["default", "__base__", "default", "__base__"]).logits
    assert not torch.allclose(base, wanted, atol=1e-3)
    assert torch.allclose(mixed[::2], wanted[::2], atol=1e-5) and torch.allclose(mixed[1::2], base[1::2], atol=1e-5)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="FB-E0922"):
        attach(make())
    model = make()
    quantize_(model, "int4-g32")
    with pytest.raises(InputError, match="FB-E0922"):
        attach(model, targets=("*nothing*",))
    for words in ({"use_dora": True}, {"init_lora_weights": "pissa"}, {"lora_bias": True}):
        with pytest.raises(InputError, match="FB-E0921"):
            attach(copy.deepcopy(model), peft.LoraConfig(r=4, **words))
    config = register(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert sum(1 for _ in adapted(peft.get_peft_model(model, config))) == 2
    with pytest.raises(InputError, match="FB-E0905"):
        merge(attach(_quantised(), r=2), method="gptq")


def _quantised() -> nn.Module:
    model = make()
    quantize_(model, "int4-g32")
    return model
