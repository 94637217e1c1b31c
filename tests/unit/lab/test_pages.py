"""`fewbit explain` as text, JSON and a page that stands by itself."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fewbit.base.errors import catalogue
from fewbit.cli.app import run

COMMANDS = {
    "format": ("format", "fp8-e4m3", "bf16", "nf4"),
    "number": ("number", "-3.14159"),
    "quantize": ("quantize", "-0.32,-1.54,0.87,-0.21,1.23,-0.76,0.05,-1.91", "--scheme", "q4_k"),
    "outliers": ("outliers",),
    "bits": ("bits", "nf4-g64-dq", "--shape", "1024x4096"),
    "code": ("code", "FB-E0601"),
}


def call(capsys: pytest.CaptureFixture, *args: str) -> tuple[int, str, str]:
    status = run(["explain", *args])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize("name", COMMANDS)
def test_as_text(capsys: pytest.CaptureFixture, name: str) -> None:
    status, out, err = call(capsys, *COMMANDS[name])
    assert (status, err) == (0, "")
    assert len(out) > 80
    assert max(len(line) for line in out.splitlines()) <= 120


@pytest.mark.parametrize("name", COMMANDS)
def test_as_json(capsys: pytest.CaptureFixture, name: str) -> None:
    status, out, _ = call(capsys, *COMMANDS[name], "--json")
    assert status == 0
    assert json.loads(out)["schema"] == f"fewbit.explain.{name}/1"


class _Page(HTMLParser):
    """Opened and closed tags, and everything that a browser would fetch."""

    VOID = frozenset({"meta", "line", "rect", "circle", "path"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.add(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href", "data", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.mark.parametrize("name", COMMANDS)
def test_as_a_page_that_needs_no_network(capsys: pytest.CaptureFixture, tmp_path: Path, name: str) -> None:
    path = tmp_path / "page.html"
    status, _, _ = call(capsys, *COMMANDS[name], "--html", str(path))
    text = path.read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert status == 0
    assert page.open == []
    assert page.fetched == []
    assert "script" not in page.seen
    assert not re.search(r"https?://|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text
    assert ("svg" in page.seen) == (name != "code")
    assert "nan" not in re.sub(r"[a-z]+", lambda found: found[0] if found[0] == "nan" else "", text)


def test_known_answers_reach_the_terminal(capsys: pytest.CaptureFixture) -> None:
    _, out, _ = call(capsys, "quantize", "0.32,-1.54,0.87,-0.21,1.23,-0.76,0.05,-1.91", "--scheme", "int4-g128-asym")
    assert "= 0.209333" in out
    assert "= 9" in out
    assert "largest error 0.098667" in out
    assert "0.077333" in out


@pytest.mark.parametrize("spelling", ["FB-E0601", "fb-e0601", "E0601", "0601"])
def test_a_code_may_stand_alone(capsys: pytest.CaptureFixture, spelling: str) -> None:
    status, out, _ = call(capsys, spelling)
    assert status == 0
    assert "Unknown spelling of a scheme" in out


@pytest.mark.parametrize("code", sorted(catalogue()))
def test_every_code_is_explained(capsys: pytest.CaptureFixture, code: str) -> None:
    status, out, _ = call(capsys, code)
    assert status == 0
    assert catalogue()[code]["title"] in out


def test_all_codes_are_listed(capsys: pytest.CaptureFixture) -> None:
    _, out, _ = call(capsys, "code", "all", "--json")
    assert set(json.loads(out)["codes"]) == set(catalogue())


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("format", "f13"), "FB-E0605"),
        (("number", "nan"), "FB-E0607"),
        (("quantize", "1,x"), "FB-E0607"),
        (("quantize", "1,2", "--scheme", "int9-g1"), "FB-E0601"),
        (("bits", "int4-g128", "--shape", "big"), "FB-E0607"),
        (("FB-E9999",), "FB-E0608"),
    ],
)
def test_errors_are_sentences(capsys: pytest.CaptureFixture, args: tuple, code: str) -> None:
    status, _, err = call(capsys, *args)
    assert status == 2
    assert code in err


def test_names_from_the_user_are_escaped(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    from fewbit.report.lab.sections import Page, Section, as_html

    made = as_html(Page("<b>x</b>", "a & b", (Section("<i>", ("<script>alert(1)</script>",)),), {}))
    assert "<script>" not in made
    assert "&lt;script&gt;" in made
