"""The peak of this process's resident memory."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def peak_resident() -> int:
    """Bytes of main memory that this process held at its most.

    Linux's own mark (VmHWM) begins with the program. What `getrusage` tells begins with the parent that started it: a small program
    started by a large one would be charged with the parent's memory. It serves where there is no /proc.
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if found:
        return int(found[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
