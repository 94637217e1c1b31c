"""Every test process takes its share of the cores: pytest-xdist starts several, and threads that wait for each other's cores spin."""

from __future__ import annotations

import os

_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_SHARE = str(max(1, (os.cpu_count() or 1) // _WORKERS))
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # before anything imports torch; child processes inherit it
    os.environ.setdefault(_name, _SHARE)
