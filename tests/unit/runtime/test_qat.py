"""prepare, train, freeze, convert: every number is the same from the fake-quantised model to the file in its engine."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from qat_models import ids, make, step
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fewbit.base.errors import FewbitError, InputError
from fewbit.math.scales import quantize
from fewbit.nn import QuantLinear
from fewbit.num.scheme import parse_scheme
from fewbit.runtime.distil import Schedule, batches, disturbed, divergence, fidelity, train
from fewbit.runtime.fake import FakeQuantise
from fewbit.runtime.qat import (
    convert,
    fakes,
    freeze,
    observe,
    original,
    parameter_groups,
    prepare,
    qtensors,
    trained_floats,
)


@pytest.mark.parametrize(
    ("kind", "word", "recipe"),
    [
        ("llama", "int4-channel-bf16", "full"),
        ("llama", "int2-g32-asym", "scales"),
        ("llama", "nf4-g64-dq", "full"),
        ("llama", "nvfp4", "scales"),
        ("llama", "uint4-g32-{uint6-g2-f16}-min{uint6-g2-f16}", "full"),
        ("llama", "fp8-e4m3-block32", "full"),
        ("llama", "int8-channel+int8-token", "full"),
        ("llama", "int8-channel+int8-tensor-static", "full"),
        ("mixtral", "int4-g32", "full"),
        ("llama", "int3-g32", "floats"),
        ("mixtral", "int3-g32-asym", "scales"),
        ("gpt2", "int4-g32", "floats"),
        ("gpt2", "int4-g32-asym", "full"),
    ],
)
def test_logits_stay_the_same_bit_for_bit(kind: str, word: str, recipe: str) -> None:
    model, tokens = make(kind), ids()
    done = prepare(model, word, recipe=recipe, floats="bf16")
    assert set(done.quantised.values()) == {str(parse_scheme(word))}
    found = observe(model, [tokens])
    assert found == (len(done.quantised) if "static" in word else 0)
    before = {name: fake.qtensor(original(module, key)) for name, module, key, fake in fakes(model)}
    step(model, tokens)
    with torch.no_grad():
        wanted = model(tokens).logits
    moved = [n for n, q in qtensors(model).items() if not torch.equal(q.dequantize(), before[n].dequantize())]
    assert moved, "nothing was learnt"
    if recipe != "full":
        assert all(torch.equal(q.codes, before[name].codes) for name, q in qtensors(model).items())
    codes = qtensors(model)
    frozen = copy.deepcopy(model)
    freeze(frozen)
    assert not any(p.requires_grad for p in frozen.parameters())
    dense = copy.deepcopy(model)
    found = convert(dense, dense=True)
    assert {name: q.scheme for name, q in found.items()} == {name: parse_scheme(word) for name in codes}
    with torch.no_grad():
        assert torch.equal(frozen(tokens).logits, wanted) and torch.equal(dense(tokens).logits, wanted)
    for name, q in codes.items():
        weight = dense.get_parameter(name)
        assert torch.equal(weight, q.dequantize() if kind != "gpt2" else q.dequantize().T)
    if "+" not in word:
        few = copy.deepcopy(model)
        convert(few, kernel="packed")
        layers = [m for m in few.modules() if isinstance(m, QuantLinear)]
        assert len(layers) == sum(len(q.shape) == 2 for q in codes.values())
        with torch.no_grad():
            found = few(tokens).logits
        # Conv1D multiplies by the weight the other way round, which some BLAS sum in another order
        assert torch.equal(found, wanted) or (kind == "gpt2" and torch.allclose(found, wanted, rtol=1e-5, atol=1e-6))
    with torch.no_grad():
        quick = copy.deepcopy(model)
        convert(quick)
        off = float((quick(tokens).logits - wanted).norm() / wanted.norm())
        assert off < (0.05 if "+" in word else 1e-4)


def test_what_stays_floating_and_what_of_it_learns() -> None:
    model = make()
    done = prepare(model, "int4-g32", recipe="scales", skip=("*down_proj*",), also=("*q_proj.bias",))
    assert done.kept["lm_head.weight"].startswith("tied")
    assert done.kept["model.layers.0.mlp.down_proj.weight"] == "skipped"
    assert len(done.quantised) == 12 and set(done.trained) >= {"model.norm.weight"}
    assert done.learning < done.total and "model.embed_tokens.weight" not in done.trained
    before = model.lm_head.weight.clone()
    step(model, ids())
    assert torch.equal(model.lm_head.weight, before) and model.lm_head.weight is model.model.embed_tokens.weight
    asked = prepare(make(), "int4-g32", recipe="scales", also=("*down_proj*",), skip=("*down_proj*",))
    assert "model.layers.1.mlp.down_proj.weight" in asked.trained


@pytest.mark.parametrize("recipe", ["full", "floats"])
def test_a_tied_embedding_learns_in_both_its_places(recipe: Any) -> None:
    model, tokens = make(), ids()
    done = prepare(model, "int4-g32", recipe=recipe, floats="bf16")
    assert done.trained.count("model.embed_tokens.weight") == 1 and "lm_head.weight" not in done.trained
    embed, head = model.model.embed_tokens, model.lm_head
    assert original(embed, "weight") is original(head, "weight")
    one = make()  # the same gradients as without any of this, were its weights what this model computes with
    with torch.no_grad():
        for name, param in one.named_parameters():
            module, _, key = name.rpartition(".")
            param.copy_(getattr(model.get_submodule(module), key))
    for net in (model, one):
        nn.functional.cross_entropy(net(tokens).logits.flatten(0, 1), tokens.flatten()).backward()
    assert torch.allclose(original(embed, "weight").grad, one.lm_head.weight.grad, rtol=1e-4, atol=1e-7)
    before = embed.weight.clone()
    step(model, tokens)
    assert torch.equal(embed.weight, head.weight) and not torch.equal(embed.weight, before)
    assert torch.equal(embed.weight, embed.weight.bfloat16().float())
    with torch.no_grad():
        wanted = model(tokens).logits
    assert list(trained_floats(model)).count("model.embed_tokens.weight") == 1
    convert(model, dense=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, wanted)


def test_untied_heads_are_skipped_unless_asked_for() -> None:
    done = prepare(make(tie_word_embeddings=False), "int4-g32")
    assert "lm_head.weight" in done.kept and {"lm_head.weight", "model.embed_tokens.weight"} <= set(done.trained)
    done = prepare(make(tie_word_embeddings=False), "int4-g32", skip=())
    assert "lm_head.weight" in done.quantised and "lm_head.weight" not in done.trained
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & set(
        prepare(make(tie_word_embeddings=False), "int4-g32", recipe="scales").trained
    )


def test_scales_recipe_holds_codes_and_no_weights() -> None:
    model = make()
    total = sum(p.numel() for p in model.parameters())
    done = prepare(model, "int4-g32", recipe="scales")
    assert done.total < 0.35 * total  # embeddings, norms and scales; the linear weights are codes now
    assert done.learning < 0.1 * total
    state = model.state_dict()
    fresh = make()
    prepare(fresh, "int4-g32", recipe="scales")
    step(model, ids())
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(ids()).logits, model(ids()).logits)
    assert any(name.endswith(".codes") and tensor.dtype == torch.int8 for name, tensor in state.items())


def test_a_start_is_kept_and_checked() -> None:
    model = make()
    plain = {name: p.detach() for name, p in model.named_parameters() if name.endswith("q_proj.weight")}
    scheme = parse_scheme("int3-g32")
    start = {name: quantize(scheme, w + 0.2 * w.abs().mean() * torch.randn_like(w)) for name, w in plain.items()}
    prepare(model, scheme, start=start)
    found = qtensors(model)
    for name, q in start.items():
        assert torch.equal(found[name].dequantize(), q.dequantize())
    with pytest.raises(InputError, match="FB-E0914"):
        prepare(make(), "int4-g32", start=start)


def test_experts_are_rounded_once_in_a_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("mixtral")
    model.config._experts_implementation = "eager"  # a product for each expert, each of which asks for the whole stack
    prepare(model, "int4-g32")
    calls = []
    real = FakeQuantise.quantise
    monkeypatch.setattr(FakeQuantise, "quantise", lambda self, w: (calls.append(w.ndim), real(self, w))[1])
    for _ in range(2):  # gradients of two passes add up: no graph is used twice
        model(ids()).logits.sum().backward()
    assert calls.count(3) == 4


def test_bad_input_is_refused() -> None:
    prepared = make()
    prepare(prepared, "int4-g32")
    cases = [
        lambda: prepare(prepared, "int4-g32"),
        lambda: prepare(make(), "bf16"),
        lambda: prepare(make(), "int4-g32", recipe="half"),
        lambda: prepare(make(), "int4-g32", floats="int4-g32"),
        lambda: prepare(make(), "int4-g32", skip=("*",)),
        lambda: prepare(nn.ReLU(), "int4-g32"),
        lambda: prepare(make().to("meta"), "int4-g32"),
    ]
    for case in cases:
        with pytest.raises(InputError, match="FB-E0913"):
            case()
    for scheme in ("int8-channel+int8-token-static", "int8-channel+int8-tensor-asym-static", "nvfp4+nvfp4-static"):
        model = make()
        with pytest.raises(InputError, match=r"FB-E09|FB-E06"):
            prepare(model, scheme)
        assert not list(fakes(model)) and all(p.requires_grad for p in model.parameters())  # left as it was
    with pytest.raises(InputError, match="FB-E0911"):
        prepare(make("mixtral"), "int8-channel+int8-token")
    with pytest.raises(InputError, match="FB-E0905"):
        prepare(make(), "int4-g32", method="gptq")
    with pytest.raises(InputError, match="FB-E0602"):
        prepare(make(), "iq2_xs")
    with pytest.raises(InputError, match="FB-E0915"):
        qtensors(make())
    static = make()
    prepare(static, "int8-channel+int8-tensor-static")
    with pytest.raises(InputError, match="FB-E0912"):
        freeze(static)


@pytest.mark.parametrize("words", [{}, {"compute": "bfloat16"}, {"noise": 0.3}])
def test_training_follows_a_teacher(words: dict[str, Any]) -> None:
    teacher, student, tokens = make(), make(), ids(8)
    prepare(student, "int2-g32")
    watch = lambda model: fidelity(model, teacher, [tokens])  # noqa: E731
    seen = []
    curve = train(
        student,
        tokens,
        Schedule(steps=30, batch=4, every=15, **words),
        teacher=teacher,
        groups=parameter_groups(student, 5e-2, 2e-2),
        evaluate=watch,
        on_point=seen.append,
    )
    assert [point.step for point in curve] == [0, 15, 30] and seen == curve
    assert curve[-1].measures["kl"] < 0.5 * curve[0].measures["kl"]
    assert fidelity(teacher, teacher, [tokens])["kl"] == 0


def test_rates_are_in_steps() -> None:
    """One update of Adam moves weights, shifts and the outermost level by the rate times a step, whatever the bits."""
    for word, levels in (("int2-g32-asym", 4), ("int4-channel", 16), ("nf4-g64-dq", 16)):
        model = make()
        prepare(model, word)
        groups = parameter_groups(model, 3e-3, 1e-2)
        rate = {id(p): group["lr"] for group in groups for p in group["params"]}
        assert rate.keys() == {id(p) for p in model.parameters() if p.requires_grad}
        for _, module, attribute, fake in fakes(model):
            if fake.scheme.is_leaf:
                floats = original(module, attribute)
                size = 1.0 if floats.ndim == 1 else float(floats.detach().square().mean().sqrt())
                assert rate[id(floats)] == pytest.approx(1e-2 / (levels / 2) * size)
                continue
            step = float(fake.parts["scale"].start.abs().mean())
            assert rate[id(original(module, attribute))] == pytest.approx(3e-3 * step)
            assert rate[id(fake.parts["scale"].delta)] == pytest.approx(1e-2 / (levels / 2))
            if "code_shift" in fake.parts:
                assert rate[id(fake.parts["code_shift"].delta)] == 1e-2


def test_divergence_is_the_mean_kl_and_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, words, temperature in ((1, 7, 1.0), (70, 9001, 2.0), (3, 1 << 20, 0.5)):
        found, wanted = (3 * torch.randn(rows, words, generator=generator) for _ in range(2))
        ours, theirs = (x.clone().requires_grad_() for x in (found, found))
        p = torch.log_softmax(wanted / temperature, -1)
        kl = nn.functional.kl_div(
            torch.log_softmax(theirs / temperature, -1), p, log_target=True, reduction="batchmean"
        )
        mine = divergence(ours, wanted, temperature)
        (2 * mine).backward()
        (2 * kl).backward()
        assert torch.allclose(mine, kl, rtol=1e-5) and torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-9)
        assert float(divergence(wanted, wanted, temperature)) == 0


def test_training_refuses_nonsense() -> None:
    model = make()
    for bad in (
        {"steps": 0},
        {"labels": 2.0},
        {"temperature": 0.0},
        {"warmup": 1.0},
        {"noise": 1.0},
        {"compute": "f8"},
    ):
        with pytest.raises(InputError, match="FB-E0916"):
            Schedule(**bad)
    with pytest.raises(InputError, match="FB-E0916"):
        train(model, ids(2), Schedule(batch=4))
    with pytest.raises(InputError, match="FB-E0916"):
        train(model.requires_grad_(False), ids(8), Schedule())
    prepare(model, "int4-g32")
    with torch.no_grad():
        model.model.norm.parametrizations.weight.original.fill_(float("nan"))
    with pytest.raises(FewbitError):
        train(model, ids(8), Schedule(steps=1))


def test_products_in_bfloat16_leave_weights_and_gradients_in_float32() -> None:
    seen = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.extend(args[0].dtype for _ in [0] if func is torch.ops.aten.mm.default)
            return func(*args, **(kwargs or {}))

    model = make()
    prepare(model, "int4-g32")
    with Products():
        train(model, ids(4), Schedule(steps=1, batch=2, compute="bfloat16"), teacher=make())
    assert seen and set(seen) == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_noise_swaps_a_share_of_every_second_window() -> None:
    text = torch.arange(4000).reshape(8, 500)
    out = disturbed(text, text, 0.2, torch.Generator().manual_seed(0))
    assert torch.equal(out[::2], text[::2]) and disturbed(text, text, 0.0, torch.Generator()) is text
    assert 0.15 < float((out[1::2] != text[1::2]).float().mean()) < 0.25
    again = disturbed(text, text, 0.2, torch.Generator().manual_seed(0))
    assert torch.equal(out, again) and torch.equal(text, torch.arange(4000).reshape(8, 500))


def test_batches_show_every_window_before_any_comes_again() -> None:
    stream = batches(5, 2, seed=1)
    first = torch.cat([next(stream) for _ in range(5)])
    assert sorted(first[:5].tolist()) == list(range(5)) == sorted(first[5:].tolist())
    assert Schedule(steps=100, warmup=0.1).share(0) == 0.1 and Schedule(steps=100).share(99) < 0.06
