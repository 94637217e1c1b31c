"""A page of the lab as plain pieces, and its two renderings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from fewbit.report.text import render, table


@dataclass(frozen=True)
class Table:
    """Columns as (heading, "left" | "right") and rows of cells."""

    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Plot:
    """An SVG and what it shows; text renderings leave it out."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading with sentences, tables and plots below it."""

    title: str
    words: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    mono: bool = False


@dataclass(frozen=True)
class Page:
    """A page: its title, a sentence below it, sections, and the same results as plain data for `--json`."""

    title: str
    lead: str
    sections: tuple[Section, ...]
    data: dict[str, Any]


def as_text(page: Page) -> str:
    """The page for a terminal."""
    from rich.text import Text

    parts: list[Any] = [Text(page.title, style="bold"), Text(page.lead, style="dim")]
    for section in page.sections:
        if not section.words and not section.tables:  # plots only
            continue
        parts.append(Text("\n" + section.title, style="bold cyan"))
        parts += [Text(line) for line in section.words]
        parts += [table(part.columns, part.rows) for part in section.tables]
    return render(*parts)


def as_html(page: Page) -> str:
    """The page as one HTML file that loads nothing from elsewhere; all text is escaped."""
    from jinja2 import Environment

    source = resources.files(__package__).joinpath("page.html.j2").read_text(encoding="utf-8")
    return (
        Environment(autoescape=True)
        .from_string(source)
        .render(title=page.title, lead=page.lead, sections=page.sections)
    )


def columns(*names: str) -> tuple[tuple[str, str], ...]:
    """Columns; a name that ends in `>` is right-aligned."""
    return tuple((name.removesuffix(">"), "right" if name.endswith(">") else "left") for name in names)


def number(value: float | None, digits: int = 6) -> str:
    """A number for a table."""
    return "-" if value is None else f"{value:.{digits}g}"


def listed(values: Sequence[float], most: int = 300) -> str:
    """Values side by side."""
    shown = "  ".join(f"{value:g}" for value in values[:most])
    return shown + (f"  … ({len(values)} in all)" if len(values) > most else "")
