"""Recipes: sizes, targets, rules, YAML, unknown keys."""

from __future__ import annotations

import pytest

from fewbit.base.errors import InputError
from fewbit.plan.recipe import (
    Recipe,
    parse_option,
    parse_rule,
    parse_size,
    parse_target,
    recipe_from_yaml,
    recipe_to_yaml,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8 * 10**9),
        ("512MiB", 512 << 20),
        ("2.5G", 2_500_000_000),
        ("4096", 4096),
        ("1 kb", 1000),
        ("1TiB", 1 << 40),
        ("3b", 3),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "eight", "-1GB", "0", "1XB", "nan", "inf"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match="FB-E0402"):
        parse_size(text)


def test_targets() -> None:
    assert parse_target("gguf:Q4_K_M") == ("gguf", "Q4_K_M", {})
    assert parse_target("dense") == ("dense", None, {})
    assert parse_target("gptq:int4-g128,version=v2") == ("gptq", "int4-g128", {"version": "v2"})
    for bad in ("", ":int4", "gptq:int4,", "gptq:int4,version", "gptq,=v2"):
        with pytest.raises(InputError, match="FB-E0403"):
            parse_target(bad)


def test_rules_and_options() -> None:
    rule = parse_rule("*.down_proj.weight=int8-channel@hqq")
    assert (rule.pattern, rule.scheme, rule.method) == ("*.down_proj.weight", "int8-channel", "hqq")
    assert parse_rule("re:a=b=keep").pattern == "re:a=b"
    assert parse_option("damp=0.01") == ("damp", 0.01) and parse_option("on=true") == ("on", True)
    for bad in ("nothing", "=int4", "a="):
        with pytest.raises(InputError, match="FB-E0404"):
            parse_rule(bad)


def test_yaml_round_trip() -> None:
    recipe = Recipe(to=("gguf:Q4_K_M",), method="hqq", rules=(parse_rule("a=keep"),), options={"damp": 0.1})
    assert recipe_from_yaml(recipe_to_yaml(recipe)) == recipe


@pytest.mark.parametrize(
    "text",
    ["to: [a]\nbits: 4\n", "- a\n", "to: {", "seed: -1\n", "on_misfit: maybe\n", "rules: [{pattern: a, colour: b}]\n"],
)
def test_bad_recipes_name_what_is_wrong(text: str) -> None:
    with pytest.raises(InputError, match="FB-E0401"):
        recipe_from_yaml(text)
