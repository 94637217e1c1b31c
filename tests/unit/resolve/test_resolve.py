"""Resolving: every tensor is decided, all refusals come at once, plans survive JSON."""

from __future__ import annotations

import json

import pytest

from fewbit.base.errors import Refusals, ResourceError
from fewbit.base.manifest import Manifest, TensorInfo, data_bytes
from fewbit.num.scheme import parse_scheme
from fewbit.plan.jobs import job_from_record
from fewbit.plan.recipe import Recipe, parse_rule
from fewbit.plan.resolve import resolve
from fewbit.plan.resources import BASE_BYTES, MARGIN, budget, job_bytes, row_separable, tile_rows

CONFIG = {"model_type": "llama", "hidden_size": 256, "torch_dtype": "bfloat16"}


def manifest(shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> Manifest:
    return Manifest(
        {
            name: TensorInfo(name, dtype, shape, data_bytes(dtype, shape), "model.safetensors")
            for name, shape in shapes.items()
        }
    )


LLAMA = {
    "model.embed_tokens.weight": (1000, 256),
    "model.layers.0.self_attn.q_proj.weight": (256, 256),
    "model.layers.0.mlp.down_proj.weight": (256, 768),
    "model.layers.0.input_layernorm.weight": (256,),
    "lm_head.weight": (1000, 256),
}


def by_name(recipe: Recipe, shapes: dict[str, tuple[int, ...]] = LLAMA, config: dict = CONFIG) -> dict:
    return {job.name: job for job in resolve(manifest(shapes), config, recipe).outputs[0].jobs}


def test_defaults_keep_what_hurts_and_say_so() -> None:
    jobs = by_name(Recipe(to=("compressed-tensors:int4-g128",)))
    assert set(jobs) == set(LLAMA)
    kept = {name: job.reason for name, job in jobs.items() if job.scheme is None}
    assert set(kept) == {"model.embed_tokens.weight", "model.layers.0.input_layernorm.weight", "lm_head.weight"}
    assert "high precision" in kept["lm_head.weight"]


def test_vision_towers_stay_and_the_plan_says_so() -> None:
    shapes = {**LLAMA, "vision_tower.blocks.0.mlp.fc1.weight": (256, 128)}
    plan = resolve(manifest(shapes), CONFIG, Recipe(to=("compressed-tensors:int4-g128",)))
    job = next(job for job in plan.outputs[0].jobs if job.name.startswith("vision_tower"))
    assert job.scheme is None and "towers stay" in job.reason
    assert any("--include tower" in line for line in plan.warnings)
    plan = resolve(manifest(shapes), CONFIG, Recipe(to=("compressed-tensors:int4-g128",), include=("tower",)))
    assert len(plan.outputs[0].quantised) == 3 and plan.warnings == ()


def test_rules_win_and_the_last_match_counts() -> None:
    rules = (
        parse_rule("*.mlp.*=keep"),
        parse_rule("*down_proj*=int8-channel"),
        parse_rule("lm_head.weight=int8-channel"),
    )
    jobs = by_name(Recipe(to=("dense:int4-g128",), rules=rules))
    assert str(jobs["model.layers.0.mlp.down_proj.weight"].scheme) == "int8-channel"
    assert str(jobs["lm_head.weight"].scheme) == "int8-channel"


def test_all_refusals_come_at_once() -> None:
    shapes = {
        **LLAMA,
        "model.layers.1.mlp.down_proj.weight": (256, 96),
        "model.layers.1.mlp.up_proj.weight": (256, 100),
    }
    recipe = Recipe(
        to=("compressed-tensors:int4-g128", "nonsense"),
        method="magic",
        rules=(parse_rule("nothing.*=keep"),),
        include=("router",),
    )
    with pytest.raises(Refusals) as caught:
        resolve(manifest(shapes), CONFIG, recipe)
    codes = [error.code for error in caught.value.errors]
    assert {"FB-E0602", "FB-E0604", "FB-E0406", "FB-E0407", "FB-E0408"} <= set(codes)
    assert codes.count("FB-E0602") == 2
    assert {error.tensor for error in caught.value.errors if error.code == "FB-E0602"} == {
        n for n in shapes if "layers.1" in n
    }


def test_misfits_can_be_kept() -> None:
    shapes = {**LLAMA, "model.layers.1.mlp.down_proj.weight": (256, 96)}
    jobs = by_name(Recipe(to=("compressed-tensors:int4-g128",), on_misfit="keep"), shapes)
    assert jobs["model.layers.1.mlp.down_proj.weight"].scheme is None
    assert "kept" in jobs["model.layers.1.mlp.down_proj.weight"].reason


def test_conv1d_is_solved_the_right_way_round() -> None:
    jobs = by_name(Recipe(to=("dense:int4-g128",)), {"h.0.attn.c_attn.weight": (256, 768)}, {"model_type": "gpt2"})
    assert jobs["h.0.attn.c_attn.weight"].ops == ("transpose",) and jobs["h.0.attn.c_attn.weight"].shape == (768, 256)


def test_unknown_families_are_quantised_with_a_warning() -> None:
    plan = resolve(
        manifest({"model.layers.0.mixer.in_proj.weight": (256, 256)}),
        {"model_type": "new"},
        Recipe(to=("dense:int4-g128",)),
    )
    assert plan.outputs[0].coverage == 1.0 and any("new" in text for text in plan.warnings)


def test_a_plan_is_plain_data() -> None:
    plan = resolve(manifest(LLAMA), CONFIG, Recipe(to=("compressed-tensors:nvfp4",)))
    record = json.loads(json.dumps(plan.record()))
    assert [job_from_record(job) for job in record["outputs"][0]["jobs"]] == list(plan.outputs[0].jobs)


@pytest.mark.parametrize(
    ("spelling", "separable"),
    [
        ("int4-g128-asym", True),
        ("q4_k", True),
        ("fp8-e4m3-block128", True),
        ("int8-tensor", False),
        ("nvfp4", False),
        ("nf4-g64-dq", False),
        ("bf16", True),
    ],
)
def test_which_schemes_can_be_cut_into_rows(spelling: str, separable: bool) -> None:
    assert row_separable(parse_scheme(spelling)) is separable


def test_tiles_hold_whole_blocks() -> None:
    scheme = parse_scheme("fp8-e4m3-block128")
    rows = tile_rows(scheme, (100_000, 8192))
    assert rows % 128 == 0 and rows < 100_000
    assert tile_rows(parse_scheme("int8-tensor"), (100_000, 8192)) == 100_000


def test_a_budget_is_kept_or_refused_by_name() -> None:
    jobs = list(
        by_name(
            Recipe(to=("compressed-tensors:int4-g128",)), {"model.layers.0.mlp.up_proj.weight": (16384, 16384)}
        ).values()
    )
    one = job_bytes(jobs[0])
    enough = BASE_BYTES + int(3 * MARGIN * one) + 1  # a limit holds where every estimate is exceeded by the margin
    found = budget(jobs * 8, enough, workers=8)
    assert found.workers == 3 and found.peak == BASE_BYTES + 3 * one and one <= found.bytes < enough
    assert budget(jobs * 8, enough - 8, workers=8).workers == 2
    with pytest.raises(ResourceError, match="up_proj"):
        budget(jobs, BASE_BYTES + int(MARGIN * one) - 1, workers=1)


def test_methods_with_outliers_need_a_format_that_holds_them() -> None:
    with pytest.raises(Refusals, match="FB-E0415"):
        resolve(manifest(LLAMA), CONFIG, Recipe(to=("compressed-tensors:int4-g128",), method="spqr"))
    assert resolve(manifest(LLAMA), CONFIG, Recipe(to=("dense:int4-g128",), method="spqr")).outputs[0].quantised


def test_one_scheme_formats_refuse_several_before_any_work() -> None:
    for target in ("awq:int4-g128-asym", "fp8:fp8-e4m3-block128", "bitsandbytes:nf4-flat64"):
        other = {"a": "int4-g64-asym", "f": "fp8-e4m3-tensor", "b": "bnbfp4-flat64"}[target[0]]
        recipe = Recipe(to=(target,), rules=(parse_rule(f"*down_proj*={other}"),))
        with pytest.raises(Refusals, match=r"one scheme.*down_proj") as caught:
            resolve(manifest(LLAMA), CONFIG, recipe)
        assert [error.code for error in caught.value.errors] == ["FB-E0620"]


def test_schemes_that_differ_inside_a_fused_matrix_are_warned_of() -> None:
    shapes = LLAMA | {f"model.layers.0.self_attn.{part}_proj.weight": (256, 256) for part in "kv"}
    rules = (parse_rule("*k_proj*=int8-g128"),)
    found = resolve(manifest(shapes), CONFIG, Recipe(to=("gptq:int4-g128", "mlx:uint4-g64-min"), rules=rules[:0]))
    assert not [text for text in found.warnings if "fuse" in text]
    found = resolve(manifest(shapes), CONFIG, Recipe(to=("gptq:int4-g128",), rules=rules))
    assert [text for text in found.warnings if "q, k, v of model.layers.0.self_attn" in text and "fuse" in text]
    down = (parse_rule("*down_proj*=int8-g128"),)
    assert not [
        text
        for text in resolve(manifest(shapes), CONFIG, Recipe(to=("gptq:int4-g128",), rules=down)).warnings
        if "fuse" in text
    ]
