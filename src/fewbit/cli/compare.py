"""`fewbit compare A B C`: several evaluations in one table and one report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewbit.cli.output import print_json


def command(
    reports: Annotated[
        list[Path], typer.Argument(help="report.json files of `fewbit eval --report`, or the folders that hold them")
    ],
    report: Annotated[Path | None, typer.Option(help="folder for a common report.html and report.json")] = None,
    json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout")] = False,
) -> None:
    """Puts candidates that were evaluated one by one side by side.

    \b
    fewbit eval a --base m --report a.report; fewbit eval b --base m --report b.report
    fewbit compare a.report b.report --report both
    """
    from fewbit.report.files import merged, read_record, write_report
    from fewbit.report.scores import study_page

    record = merged([read_record(path) for path in reports])
    if report is not None:
        write_report(report, record)
    print_json("fewbit.eval/1", record) if json else print(study_page(record))
