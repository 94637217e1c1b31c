"""Memory of a calibrated run, from shapes alone."""

from __future__ import annotations

BATCH_TOKENS = 4096  # tokens that go through a block at once
BIG_MODEL = 2_000_000_000  # parameters from which blocks are computed in bfloat16
SPILL_SHARE = 0.3  # share of the budget that hidden states may take before they go to disk
