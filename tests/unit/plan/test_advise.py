"""The decision procedure: rules that must hold whatever the weights of the ranking."""

from __future__ import annotations

import shlex

import pytest

from fewbit.base.errors import InputError
from fewbit.num.scheme import parse_scheme
from fewbit.plan.advise import PRIORITIES, Advice, Wish, advise, size_factor
from fewbit.plan.advise_engine import USUAL_ENGINE, engine_on, measured
from fewbit.plan.devices import device_named
from fewbit.plan.kv import kv_layers
from fewbit.plan.memory import Use
from fewbit.plan.overview import overview
from fewbit.plan.sizes import STORAGES

from .models import model_of


def ask(name: str, device: str, use: Use = Use(), **wish) -> Advice:  # noqa: B008
    model = model_of(name)
    return advise(model, kv_layers(model.text), device_named(device), Wish(f"org/{name}", use, **wish))


def usable(advice: Advice) -> list[str]:
    return [option.name for option in advice.options if not option.refused]


@pytest.mark.parametrize("engine", measured()["engine"])
def test_an_engine_is_offered_only_what_it_loads(engine: str) -> None:
    device = "Apple M4 Max 128GB" if engine == "mlx" else "RTX 4090"
    formats = engine_on(engine, device_named(device)).formats
    for option in ask("llama-3.1-8b", device, engine=engine).options:
        row = measured()["option"][option.name]
        if row["format"] not in formats:
            assert "does not read" in option.refused or "MLX is made" in option.refused
    assert usable(ask("llama-3.1-8b", device, engine=engine))


def test_engines_that_do_not_run_there_are_refused() -> None:
    assert usable(ask("llama-3.1-8b", "Apple M4 Max 128GB", engine="vllm")) == []
    assert usable(ask("llama-3.1-8b", "RTX 4090", engine="mlx")) == []


def test_without_an_engine_the_usual_one_is_assumed_and_said() -> None:
    for device, kind in (("H100", "datacentre"), ("Apple M4 Max 128GB", "apple"), ("Desktop DDR5 64GB", "cpu")):
        advice = ask("llama-3.1-8b", device)
        assert any(USUAL_ENGINE[kind].lower() in step.answer.lower() for step in advice.steps)
    assert any(option.name == "Q4_K_M" and not option.refused for option in ask("llama-3.1-8b", "RTX 4090").options)


@pytest.mark.parametrize("task", ["code", "math", "agent"])
def test_hard_tasks_want_8_bits_or_the_best_of_4(task: str) -> None:
    best = ask("llama-3.1-8b", "RTX 4090", engine="vllm", task=task).options[0]
    assert best.name in ("FP8", "INT8 W8A8")
    best = ask("llama-3.1-8b", "RTX 4070", engine="llama.cpp", task=task).options[0]
    assert best.kl <= measured()["task"][task]["bears"]


def test_what_fits_comes_before_what_does_not() -> None:
    advice = ask("llama-3.1-70b", "RTX 4090", engine="llama.cpp")
    flags = [option.fits for option in advice.options if not option.refused]
    assert flags == sorted(flags, reverse=True)
    option = next(option for option in advice.options if option.name == "Q4_K_M")
    assert not option.fits
    assert 0 < option.on_device < option.layers


def test_priorities_pull_their_way() -> None:
    def best(priority: str):
        return ask("qwen3-8b", "RTX 4090", engine="llama.cpp", priority=priority).options[0]

    assert best("quality").kl <= best("balanced").kl <= best("size").kl
    assert best("size").size.total <= best("balanced").size.total
    assert best("speed").speedup >= best("quality").speedup


def test_low_bit_is_called_slower_where_compute_limits() -> None:
    """Weight-only 4 bits at a large batch: the widening costs more than the bytes save."""
    small = {option.name: option for option in ask("llama-3.1-8b", "H100", Use(512, 1), engine="vllm").options}
    large = {option.name: option for option in ask("llama-3.1-8b", "H100", Use(512, 1024), engine="vllm").options}
    assert small["INT4 g128 GPTQ"].speedup > 2
    assert large["INT4 g128 GPTQ"].speedup < 1
    assert any("slower than BF16" in warning for warning in large["INT4 g128 GPTQ"].warnings)
    assert large["FP8"].speedup > 1
    ranked = [
        option.name for option in ask("llama-3.1-8b", "H200", Use(512, 1024), engine="vllm", priority="speed").options
    ]
    assert ranked.index("FP8") < ranked.index("BF16") < ranked.index("INT4 g128 GPTQ")


def test_devices_without_fp8_say_so() -> None:
    ampere = {option.name: option for option in ask("llama-3.1-8b", "A100 80GB", engine="vllm").options}
    hopper = {option.name: option for option in ask("llama-3.1-8b", "H100", engine="vllm").options}
    assert any("FP8" in warning and "natively" in warning for warning in ampere["FP8"].warnings)
    assert not any("natively" in warning for warning in hopper["FP8"].warnings)
    assert hopper["FP8"].prefill_ratio == pytest.approx(2, rel=0.01)
    assert any("natively" in warning for warning in hopper["NVFP4 W4A4"].warnings)


def test_small_models_suffer_more() -> None:
    assert (
        size_factor(600_000_000) > size_factor(3_000_000_000) > size_factor(8_000_000_000) > size_factor(70_000_000_000)
    )
    small, large = (
        next(o for o in ask(name, "H100", engine="llama.cpp").options if o.name == "Q4_K_M")
        for name in ("qwen3-0.6b", "llama-3.1-70b")
    )
    assert small.kl > large.kl


def test_without_calibration_text_only_data_free_methods_remain() -> None:
    advice = ask("llama-3.1-8b", "RTX 4090", calibration=False)
    for option in advice.options:
        if not option.refused:
            assert "--calib" not in option.command
            assert "--method gptq" not in option.command
            assert "--rewrites awq" not in option.command
    q4 = next(option for option in advice.options if option.name == "Q4_K_M")
    assert q4.kl == pytest.approx(0.03127)


def test_a_model_that_will_be_trained_is_told_of_qlora() -> None:
    assert any("QLoRA" in step.therefore for step in ask("llama-3.1-8b", "RTX 4090", finetune=True).steps)


def test_every_command_is_one_that_quantize_understands() -> None:
    """Parsed by the recipe's own functions; the format accepts the scheme on an ordinary matrix."""
    from fewbit.formats.table import format_named, format_names
    from fewbit.plan.recipe import Recipe, parse_target, recipe_from

    for option in ask("llama-3.1-8b", "RTX 4090").options:
        words = shlex.split(option.command)
        if not words:
            assert option.name == "BF16"
            continue
        assert words[:3] == ["fewbit", "quantize", "org/llama-3.1-8b"]
        words = [word for word in words if word]
        flags = dict(zip(words[3::2], words[4::2], strict=True))
        assert flags.pop("-o")
        fields = {name.removeprefix("--").replace("-", "_"): value for name, value in flags.items()}
        assert set(fields) <= set(Recipe.model_fields)
        fields["to"] = (fields["to"],)
        if "rewrites" in fields:
            fields["rewrites"] = (fields["rewrites"],)
        recipe = recipe_from(fields)
        name, spelling, _ = parse_target(recipe.to[0])
        if name in format_names() and name != "gguf":
            form = format_named(name)
            scheme = form.conform(parse_scheme(spelling or form.default_scheme), "BF16")
            assert form.accepts(scheme, (4096, 4096)) is None, option.name


def test_every_option_names_a_storage_with_a_source() -> None:
    for name, row in measured()["option"].items():
        assert row["storage"] in STORAGES, name
        assert row["basis"] in ("measured", "perplexity", "error")
        assert row["source"]
        assert row["kl"] >= 0


def test_a_known_choice() -> None:
    """On a 24 GB card with llama.cpp, a 30B mixture is run at 4 bits, whole."""
    best = ask("qwen3-30b-a3b", "RTX 4090", engine="llama.cpp").best
    assert best is not None
    assert best.name in ("Q4_K_M", "IQ4_XS", "Q5_K_M")
    assert best.fits


@pytest.mark.parametrize(
    ("wish", "code"), [({"engine": "tgi9"}, "FB-E0454"), ({"task": "poetry"}, "FB-E0455"), ({"priority": "beauty"}, "FB-E0456")]
)  # fmt: skip
def test_unknown_words_are_refused(wish: dict, code: str) -> None:
    with pytest.raises(InputError) as caught:
        ask("llama-3.1-8b", "RTX 4090", **wish)
    assert caught.value.code == code


def test_every_priority_weighs_something() -> None:
    for weights in PRIORITIES.values():
        assert all(weight > 0 for weight in weights)


def test_recommendations_by_memory_get_better_with_memory() -> None:
    made = overview(model_of("llama-3.1-8b"), Use())
    losses = [option.kl for _, option in made.by_memory if option is not None]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0
    for size, option in made.by_memory:
        assert option is None or option.needed.total <= size * (1 << 30)


def test_layers_in_main_memory_set_the_pace() -> None:
    asked = ask("llama-3.1-70b", "RTX 4090", engine="llama.cpp", task="code", priority="quality")
    best = asked.options[0]
    assert not best.fits and best.kl < 0.01
    left = best.size.total * (1 - best.on_device / best.layers)
    assert best.speed.decode == pytest.approx(1 / (left / 64e9 + (best.size.total - left) / 1.008e12), rel=0.15)
    assert best.speed.bound == "main memory"
