"""Every error code that the source raises has a row in errors.toml, and every row is raised somewhere."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest

from fewbit.base import errors

SOURCE = Path(errors.__file__).parents[1]
RAISED = {code for path in SOURCE.rglob("*.py") for code in re.findall(r"FB-E\d{4}", path.read_text())}


def test_codes_and_rows_agree() -> None:
    assert set(errors.catalogue()) == RAISED


@pytest.mark.parametrize("code", sorted(errors.catalogue()))
def test_rows_are_whole(code: str) -> None:
    row = errors.catalogue()[code]
    assert set(row) == {"title", "explain", "remedy"} and all(text.strip() for text in row.values())


def test_an_error_carries_everything_and_survives_pickling() -> None:
    error = errors.InputError("FB-E0602", "needs 128, got 96", tensor="a.weight", file="x.safetensors", remedy="use 32")
    copy = pickle.loads(pickle.dumps(error))
    assert copy.record() == error.record()
    assert all(part in str(error) for part in ("FB-E0602", "needs 128, got 96", "a.weight", "x.safetensors", "use 32"))


def test_refusals_about_resources_alone_are_resource_refusals() -> None:
    disk = errors.ResourceError("FB-E0501", "no room")
    word = errors.InputError("FB-E0406", "no such method")
    assert errors.Refusals([disk]).exit_status == 3
    assert errors.Refusals([disk, word]).exit_status == 2
    assert len(pickle.loads(pickle.dumps(errors.Refusals([disk, word]))).errors) == 2
