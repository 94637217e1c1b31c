"""What this machine's processor can do, found without loading torch."""

from __future__ import annotations

import functools
import re
from pathlib import Path

_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}  # as Linux names them on x86-64 and ARM


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether it multiplies bfloat16 matrices by instructions of its own; False where the system does not say (there is no /proc/cpuinfo)."""
    facts = Path("/proc/cpuinfo")
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", facts.read_text(), re.MULTILINE) if facts.exists() else None
    return found is not None and bool(_BF16 & set(found[1].split()))
