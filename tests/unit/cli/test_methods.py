"""Every option of every method and rewrite is described, and nothing else is."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from fewbit.arch.rewrite_table import REWRITES
from fewbit.cli.app import app
from fewbit.cli.listings import _sentences, described
from fewbit.solve.table import SOLVERS

ROWS = [*SOLVERS.values(), *REWRITES.values()]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_option_has_a_sentence(row) -> None:
    assert [option for option in row.options if not described(row.name, option)] == []


def test_no_sentence_is_stale() -> None:
    options = {row.name: set(row.options) for row in ROWS}
    options["common"] = set().union(*options.values())
    assert {
        name: sorted(set(said) - options[name]) for name, said in _sentences().items() if set(said) - options[name]
    } == {}


@pytest.mark.parametrize(("name", "option"), [("gptq", "damping"), ("learned", "sweeps"), ("spin", "rate")])
def test_one_method_on_a_page(name: str, option: str) -> None:
    shown = CliRunner().invoke(app, ["methods", name])
    assert shown.exit_code == 0
    assert described(name, option)[:30] in shown.stdout
