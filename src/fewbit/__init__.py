"""fewbit: any transformer checkpoint in the fewest bits that keep its answers, in the format your engine loads, with proof.

`import fewbit as fb` is the Python face of the command line; its functions live in `fewbit.api` and are loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name.startswith("_") or name == "api":
        raise AttributeError(f"module 'fewbit' has no attribute {name!r}")
    api = importlib.import_module("fewbit.api")
    if name in api.__all__:
        return getattr(api, name)
    raise AttributeError(f"module 'fewbit' has no attribute {name!r}")


def __dir__() -> list[str]:
    api = importlib.import_module("fewbit.api")
    return sorted([*api.__all__, "__version__"])
