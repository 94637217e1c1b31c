"""The typer application behind the front door, and how errors reach the user."""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from typing import Any

import typer
from typer.core import TyperGroup

from fewbit.base.errors import FewbitError, Interrupted, Refusals
from fewbit.cli.main import COMMANDS, front_page
from fewbit.cli.refusals import SHOWN, lines


class LazyGroup(TyperGroup):
    """Commands from the table of `cli.main`, imported one at a time."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        row = COMMANDS.get(cmd_name)
        if row is None:
            return None
        module, _, function = row[0].partition(":")
        inner = typer.Typer(add_completion=False)
        found = getattr(importlib.import_module(module), function or "command")
        if isinstance(found, typer.Typer):  # a command with commands of its own
            command = typer.main.get_command(found)
        else:
            inner.command()(found)
            command = typer.main.get_command(inner)
        command.name = cmd_name
        return command

    def format_help(self, ctx: Any, formatter: Any) -> None:
        print(front_page())


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def _root() -> None:
    """fewbit"""


def run(args: list[str]) -> int:
    """Runs a command line; returns its exit status."""
    as_json = "--json" in args
    try:
        result = app(args=args, prog_name="fewbit", standalone_mode=False)
        if result == Interrupted.exit_status:  # typer's answer to a Ctrl-C that reached it
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except FewbitError as error:
        _tell(error, as_json, args)
        return error.exit_status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return Interrupted.exit_status
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except Exception as error:
        return _other(error)


def _other(error: Exception) -> int:
    """A usage error of typer's (status 2), or a fault of ours (status 1) with its traceback."""
    show = getattr(error, "show", None)
    if show is not None and hasattr(error, "exit_code"):
        show()
        return 2
    if type(error).__name__ in ("Exit", "Abort"):
        return int(getattr(error, "exit_code", Interrupted.exit_status))
    traceback.print_exception(error)
    print("FB-E0001 this is a fault of fewbit: please report it with the command and the lines above", file=sys.stderr)
    return 1


def _tell(error: FewbitError, as_json: bool, args: list[str]) -> None:
    """One error as people (stderr) or machines (stdout) read it."""
    if as_json:
        print(json.dumps({"schema": "fewbit.error/1", "error": error.record()}, ensure_ascii=False))
        return
    shown = error.errors if isinstance(error, Refusals) else [error]
    bold, dim, off = (
        ("\033[1;31m", "\033[2m", "\033[0m") if sys.stderr.isatty() and "NO_COLOR" not in os.environ else ("", "", "")
    )
    found = lines(shown)
    for line in found[:SHOWN]:
        print(f"{bold}error{off} {line.code}: {line.message}", file=sys.stderr)
        for label, text in line.about:
            print(f"  {dim}{label:>6}:{off} {text}", file=sys.stderr)
    if len(found) > SHOWN:
        print(f"… and {len(found) - SHOWN} more; --json lists all", file=sys.stderr)
    if error.code == "FB-E0511":
        print(f"  resume: fewbit {' '.join(args)}", file=sys.stderr)
