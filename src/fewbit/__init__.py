"""fewbit: any transformer checkpoint in the fewest bits that keep its answers, in the format your engine loads, with proof.

`import fewbit as fb` is the Python face of the command line; its functions live in `fewbit.api` and are loaded on first use.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    from fewbit import api

    if name in api.__all__:
        return getattr(api, name)
    raise AttributeError(f"module 'fewbit' has no attribute {name!r}")


def __dir__() -> list[str]:
    from fewbit import api

    return sorted([*api.__all__, "__version__"])
