"""Imports point down the floors only, those inside functions too; `import fewbit` and the front page stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "src" / "fewbit"
FLOORS = [
    ("base",),
    ("num",),
    ("math",),
    ("solve", "formats", "arch"),
    ("plan", "store", "runtime"),
    ("run",),
    ("eval", "report"),
    ("api",),
    ("cli",),
]
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}
FILES = sorted(ROOT.rglob("*.py"))
TRANSFORMERS_HOMES = ("run/hf.py", "run/calib.py", "runtime/")


def package_of(path: Path) -> str | None:
    relative = path.relative_to(ROOT)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem if relative.stem in LEVEL else None


def imported(tree: ast.AST) -> list[str]:
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def wrong_imports(home: str, names: list[str]) -> list[str]:
    """Imports of ours that point sideways or up from a package."""
    wrong = []
    for name in names:
        parts = name.split(".")
        if (
            parts[0] == "fewbit"
            and len(parts) > 1
            and parts[1] in LEVEL
            and parts[1] != home
            and LEVEL[parts[1]] >= LEVEL[home]
        ):
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    home = package_of(path)
    if home is None:
        pytest.skip("the package's own front")
    assert wrong_imports(home, imported(ast.parse(path.read_text()))) == []


def test_the_check_can_fail() -> None:
    tree = ast.parse("def f():\n    from fewbit.run.engine import run_plan\n")
    assert wrong_imports("math", imported(tree)) == ["fewbit.run.engine.run_plan"]
    assert wrong_imports("formats", ["fewbit.solve.table"]) == ["fewbit.solve.table"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_transformers_is_imported_in_its_homes_only(path: Path) -> None:
    names = [name for name in imported(ast.parse(path.read_text())) if name.split(".")[0] == "transformers"]
    assert not names or str(path.relative_to(ROOT)).startswith(TRANSFORMERS_HOMES)


@pytest.mark.parametrize(
    ("code", "banned"),
    [
        ("import fewbit", ("torch", "numpy", "typer")),
        ("import fewbit.cli.main as m; m.front_page()", ("torch", "numpy", "typer", "rich")),
        ("import fewbit.plan.recipe, fewbit.plan.jobs, fewbit.num.scheme", ("torch", "transformers")),
        ("import fewbit.store.checkpoint as c; c.open_checkpoint('samples/sample')", ("torch", "transformers")),
    ],
)
def test_light_imports(code: str, banned: tuple[str, ...]) -> None:
    check = f"{code}\nimport sys; print([name for name in {banned!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT.parents[1], timeout=120
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
