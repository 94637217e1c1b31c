"""`fewbit inspect`: a tree with scheme, bits, bytes, method and effective bits per weight, of every format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_verify import FORMATS, quantised, write
from typer.testing import CliRunner

from fewbit import api
from fewbit.cli.app import app
from fewbit.report.tree import survey_page
from fewbit.run.convert import convert
from fewbit.run.survey import ranges

UP = "model.layers.0-1.mlp.experts.0-3.up_proj.weight"


@pytest.mark.parametrize(("form", "spelling"), FORMATS)
def test_the_tree_of_every_format(form: str, spelling: str, tmp_path: Path) -> None:
    found = api.inspect(write(tmp_path, *quantised(form, spelling)))
    assert found["format"] == form
    branch = next(item for item in found["tree"] if item["path"] == UP)
    each = [item for item in found["list"] if item["name"].endswith("up_proj.weight")]
    assert branch["tensors"] == 8 == len(each) and branch["bytes"] == sum(item["bytes"] for item in each)
    assert branch["weights"] == 8 * 64 * 128 and branch["bits_per_weight"] == 8 * branch["bytes"] / branch["weights"]
    assert (
        branch["bits"] == {"fp8": 8, "gptq-v2": 3}.get(form, 8 if "fp8" in spelling else 4) < branch["bits_per_weight"]
    )
    assert branch["method"] and form.split("-")[0] in branch["method"].replace("compressed-tensors", "compressed")
    assert sum(item["bytes"] for item in found["tree"]) == found["bytes"]
    page = survey_page(found)
    assert "up_proj.weight" in page and "experts.0-3" in page and f"{branch['bits_per_weight']:.3f}" in page
    assert len(survey_page(found, tensors=True).splitlines()) > len(page.splitlines())


def test_branches_part_where_schemes_do(tmp_path: Path) -> None:
    skip = "model.layers.1.mlp.experts.2.up_proj.weight"
    found = api.inspect(write(tmp_path, *quantised("gptq", "int4-g32", skip=(skip,))))
    paths = {item["path"]: item["stored"] for item in found["tree"] if item["path"].endswith("up_proj.weight")}
    assert set(paths.values()) == {"int4-g32-bf16", "BF16"} and paths[skip] == "BF16"


def test_converted_and_quantised_say_how(tmp_path: Path) -> None:
    place = write(tmp_path / "a", *quantised("gptq", "int4-g32"))
    out = convert(place, "awq", tmp_path / "b").out
    assert {item["method"] for item in api.inspect(out)["tree"]} == {None, "converted from gptq"}
    said = CliRunner().invoke(app, ["inspect", str(out), "--json"])
    assert said.exit_code == 0 and json.loads(said.stdout)["tree"] == api.inspect(out)["tree"]
    (out / "fewbit-manifest.json").write_text(
        json.dumps({"recipe": {"method": "hqq", "rules": [{"pattern": "*up_proj*", "method": "gptq"}]}})
    )
    assert {item["method"] for item in api.inspect(out)["tree"]} == {None, "hqq", "gptq"}


def test_ranges() -> None:
    assert ranges([3, 1, 2, 7, 0]) == "0-3,7" and ranges([5]) == "5"
