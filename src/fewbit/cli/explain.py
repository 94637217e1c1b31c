"""`fewbit explain`: the number lab and the error codes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fewbit.base.errors import InputError, catalogue
from fewbit.cli.output import print_json

Html = Annotated[Path | None, typer.Option("--html", help="write the page, with plots, to this file")]
NEGATIVE = {"ignore_unknown_options": True}  # -3.5 is a number, not an option
Json = Annotated[bool, typer.Option("--json", help="one JSON document on stdout")]


class _Explain(TyperGroup):
    """Lets an error code stand where a subcommand would: `fewbit explain FB-E0601`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and re.fullmatch(r"(?:FB-)?E?\d{4}", args[0], re.IGNORECASE):
            args = ["code", *args]
        return super().resolve_command(ctx, args)


command = typer.Typer(
    cls=_Explain,
    no_args_is_help=True,
    add_completion=False,
    help="The number lab: formats, numbers and quantisation step by step; error codes.",
)


def _show(make: Callable[[], Any], schema: str, html: Path | None, json: bool) -> None:
    """Makes a page and shows it: text, JSON, or a file."""
    from fewbit.report.lab.sections import as_html, as_text

    page = make()
    if html is not None:
        html.write_text(as_html(page), encoding="utf-8")
    if json:
        print_json(schema, page.data)
    elif html is None:
        print(as_text(page))
    else:
        print(f"written: {html}")


@command.command("format")
def format_(
    names: Annotated[
        list[str],
        typer.Argument(help="number formats, e.g. fp8-e4m3 bf16; the first is drawn, the others are set beside it"),
    ],
    at: Annotated[
        list[float] | None, typer.Option("--at", help="show the spacing at this value; may be repeated")
    ] = None,
    html: Html = None,
    json: Json = False,
) -> None:
    """Bit fields, range, epsilon, spacing and all values of a format, beside others."""
    from fewbit.eval.lab_numbers import format_facts, spacing
    from fewbit.report.lab.pages import format_page

    def make() -> Any:
        facts = [format_facts(name) for name in names]
        return format_page(
            facts,
            {
                fact.name: {value: spacing(fact.name, value) for value in at or (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)}
                for fact in facts
            },
        )

    _show(make, "fewbit.explain.format/1", html, json)


@command.command(context_settings=NEGATIVE)
def number(
    value: Annotated[float, typer.Argument(help="a number")],
    formats: Annotated[
        list[str] | None, typer.Argument(help="formats (default: the usual ones)", show_default=False)
    ] = None,
    html: Html = None,
    json: Json = False,
) -> None:
    """What becomes of one number in each format: nearest value, bit pattern, error."""
    from fewbit.eval.lab_numbers import USUAL, neighbours, number_in
    from fewbit.report.lab.pages import number_page

    def make() -> Any:
        found = [number_in(value, name) for name in formats or USUAL]
        return number_page(value, found, {item.format: neighbours(item.format, value) for item in found})

    _show(make, "fewbit.explain.number/1", html, json)


@command.command(context_settings=NEGATIVE)
def quantize(
    numbers: Annotated[str, typer.Argument(help="numbers separated by commas, or a file of numbers")],
    scheme: Annotated[
        str, typer.Option("--scheme", "-s", help="any scheme: int8, int4-g4-asym, nf4-g64, q4_k, nvfp4 …")
    ] = "int8",
    groups: Annotated[list[int] | None, typer.Option("--group", help="group sizes to compare; may be repeated")] = None,
    stored: Annotated[bool, typer.Option("--stored", help="store 16-bit scales in 16 bits, as files do")] = False,
    html: Html = None,
    json: Json = False,
) -> None:
    """Quantise a few numbers and show every step: scale, zero point, codes, what comes back, errors."""
    from fewbit.eval.lab_quantize import compare_blocks, parse_numbers, quantize_numbers, record
    from fewbit.num.scheme import parse_scheme
    from fewbit.report.lab.pages import quantize_page

    def make() -> Any:
        path = Path(numbers)
        values = parse_numbers(path.read_text(encoding="utf-8") if len(numbers) < 256 and path.is_file() else numbers)
        used = parse_scheme(scheme)
        found = quantize_numbers(values, used, scheme, exact=not stored)
        searched = quantize_numbers(values, used, scheme, exact=not stored, search="lsq")
        as_files = quantize_numbers(values, used, scheme, exact=False) if found.exact else None
        return quantize_page(
            found, compare_blocks(values, used, groups and [len(values), *groups]), searched, as_files, record(found)
        )

    _show(make, "fewbit.explain.quantize/1", html, json)


@command.command()
def outliers(html: Html = None, json: Json = False) -> None:
    """One 127.4 among 0.1s: what it breaks, and what LLM.int8(), SmoothQuant and AWQ do about it."""
    from fewbit.eval.lab_outliers import outlier_demo
    from fewbit.report.lab.pages import outlier_page

    _show(lambda: outlier_page(outlier_demo()), "fewbit.explain.outliers/1", html, json)


@command.command()
def bits(
    scheme: Annotated[str, typer.Argument(help="any scheme: int4-g128-asym, q4_k, nf4-g64-dq …")],
    shape: Annotated[str, typer.Option(help="shape of the weight")] = "4096x4096",
    html: Html = None,
    json: Json = False,
) -> None:
    """Where the bits of a scheme go: codes, scales, zero points, scales of scales."""
    from fewbit.eval.lab_bits import bits_lines, bits_sentence
    from fewbit.num.scheme import parse_scheme
    from fewbit.report.lab.pages import bits_page

    def make() -> Any:
        sizes = tuple(int(word) for word in re.split(r"[x×,]", shape) if word.isdigit())
        if not sizes or 0 in sizes:
            raise InputError("FB-E0607", f"{shape!r} is not a shape", remedy="give --shape such as 4096x4096")
        used = parse_scheme(scheme).weights_only
        return bits_page(
            scheme, str(used), sizes, bits_lines(used, sizes), bits_sentence(used, sizes), used.storage_bits(sizes)
        )

    _show(make, "fewbit.explain.bits/1", html, json)


@command.command()
def code(
    name: Annotated[str, typer.Argument(help="an error code, e.g. FB-E0601; `all` lists them")],
    html: Html = None,
    json: Json = False,
) -> None:
    """What an error code means and what to do. `fewbit explain FB-E0601` is the same."""
    from fewbit.report.lab.pages import code_page, codes_page

    def make() -> Any:
        if name.lower() == "all":
            return codes_page(catalogue())
        wanted = f"FB-E{name.upper().removeprefix('FB-').removeprefix('E')}"
        if wanted not in catalogue():
            raise InputError("FB-E0608", f"there is no error code {name!r}")
        return code_page(wanted, catalogue()[wanted])

    _show(make, "fewbit.explain.code/1", html, json)
