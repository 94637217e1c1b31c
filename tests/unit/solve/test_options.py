"""Options of solvers are refused before work starts, with the values they may have."""

from __future__ import annotations

import pytest

from fewbit.solve.table import SOLVERS


@pytest.mark.parametrize("name", list(SOLVERS))
def test_every_default_is_allowed(name: str) -> None:
    solver = SOLVERS[name]
    assert [fault for option, value in solver.options.items() if (fault := solver.fault(option, value))] == []


@pytest.mark.parametrize(
    ("method", "option", "value", "says"),
    [
        ("rtn", "search", "foo", "absmax, minmax, percentile, mse, lsq, native"),
        ("imatrix", "search", "native", "one of absmax"),
        ("rtn", "steps", "many", "a whole number"),
        ("rtn", "steps", 2.5, "a whole number"),
        ("rtn", "steps", True, "a whole number"),
        ("hqq", "p", "0.7x", "a number"),
        ("gptq", "drift", "maybe", "true or false"),
        ("gptq", "speed", 1, "has no option 'speed'"),
    ],
)
def test_unsuitable_values_are_named(method: str, option: str, value: object, says: str) -> None:
    assert says in str(SOLVERS[method].fault(option, value))
