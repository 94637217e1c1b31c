"""The front door: one row per command, loaded when it is typed.

`fewbit --help` needs nothing but the table below, so it answers at once; each command's module is imported only when that command is
called. Errors become a sentence on stderr (or a JSON document with --json) and an exit status: 0 ok, 1 our fault, 2 bad input,
3 refused for resources, 4 quality gate failed, 130/143 interrupted and resumable.
"""

from __future__ import annotations

import sys

# command -> (module with a function `command`, group, what it does)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "quantize": ("fewbit.cli.quantize", "Make", "turn a checkpoint into fewer bits, in one or many formats"),
    "convert": ("fewbit.cli.convert", "Make", "change the format of a quantised checkpoint, saying what is lost"),
    "train": ("fewbit.cli.train", "Make", "train through the rounding: a float model teaches its quantised self"),
    "run": ("fewbit.cli.run", "Make", "generate text from any checkpoint"),
    "plan": ("fewbit.cli.plan", "Decide", "memory, speed bounds and what fits, from headers alone"),
    "advise": ("fewbit.cli.advise", "Decide", "ranked choices for a device, an engine and a task, with reasons"),
    "explain": (
        "fewbit.cli.explain",
        "Decide",
        "the number lab: formats, numbers and quantisation step by step; error codes",
    ),
    "eval": ("fewbit.cli.eval", "Prove", "perplexity, KL divergence and flips of candidates against a base"),
    "verify": ("fewbit.cli.verify", "Prove", "complete, finite, decodes to the source, loads for real"),
    "compare": ("fewbit.cli.compare", "Prove", "several evaluated runs in one table and report"),
    "inspect": ("fewbit.cli.inspect", "Look", "what a checkpoint holds: schemes, bits, bytes"),
    "formats": ("fewbit.cli.listings:formats", "Look", "formats, schemes and the engines that load them"),
    "methods": ("fewbit.cli.listings:methods", "Look", "solvers and their options"),
    "doctor": ("fewbit.cli.doctor", "Look", "what this machine has and what is missing"),
}


def front_page() -> str:
    """The text of `fewbit --help`."""
    import importlib.util

    lines = [
        "Usage: fewbit COMMAND [OPTIONS]",
        "",
        "Any checkpoint in the fewest bits that keep its answers, and the proof.",
        "",
    ]
    group = ""
    for name, (module, heading, summary) in COMMANDS.items():
        if importlib.util.find_spec(module.partition(":")[0]) is None:
            continue
        if heading != group:
            lines.append(f"{heading}:")
            group = heading
        lines.append(f"  {name:<10} {summary}")
    lines += [
        "",
        "  fewbit COMMAND --help     all options of a command",
        "  fewbit --version",
        "  fewbit --install-completion",
    ]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line and exits with its status."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args in (["--help"], ["-h"]):
        print(front_page())
        sys.exit(0)
    if args == ["--version"]:
        from fewbit import __version__

        print(f"fewbit {__version__}")
        sys.exit(0)
    from fewbit.base.resident import one_heap

    one_heap()  # before anything starts a thread
    from fewbit.cli.app import run

    sys.exit(run(args))


if __name__ == "__main__":
    main()
