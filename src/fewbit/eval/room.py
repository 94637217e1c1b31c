"""Memory of an evaluation: how much of each thing may be alive at once, and what that comes to at its peak.

    always               both trunks (embeddings and head, shared where equal) + what a cache holds + measures of every position
    while a block runs   one block, read and decoded + hidden states (in files when they exceed their share) + what one batch computes
    while logits last    hidden states + the rows of logits in hand, in float64, some six times over
    while looking        hidden states before every block + a block of both models with gradients
    while generating     one model whole

A limit is held by making the pieces smaller until the sum fits; where even the smallest do not, the evaluation is refused before any work.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fewbit.base.errors import ResourceError

if TYPE_CHECKING:
    from fewbit.eval.stream import Runner

BATCH_TOKENS = 4096
GRADIENT_TOKENS = 1024  # tokens whose gradients are taken at once
ROW_BYTES = 192 << 20  # of logits in hand, where no limit asks for fewer
LOGIT_COPIES = 72  # bytes per logit while two models are compared, or one is packed: float32 and float64, measured
BATCH_COPIES = 96  # bytes per value of the residual stream while a block runs: inner widths, attention, their temporaries; measured
OVERHEAD = 160 << 20  # what libraries and the allocator keep, measured over a dozen candidates
MEASURE_BYTES = 15 * 8  # of one position of one candidate
LEAST = 1 << 20  # pieces are not made smaller than this


@dataclass(frozen=True)
class Room:
    """Limits of the pieces, and a place for what does not fit.

    Attributes:
        hidden: bytes of one model's hidden states that may stay in memory; above that they go to a file. None for no limit.
        row_bytes: bytes of logits in hand. batch_tokens: tokens that pass a block at once.
        scratch: folder for spilled hidden states; None for the system's temporary folder.
    """

    hidden: int | None = None
    row_bytes: int = ROW_BYTES
    batch_tokens: int = BATCH_TOKENS
    scratch: Path | None = None

    def spills(self, nbytes: int) -> bool:
        """Whether hidden states of this size go to a file."""
        return self.hidden is not None and nbytes > self.hidden

    def spill(self, nbytes: int) -> Path | None:
        """A new file for hidden states that may not stay in memory, else None."""
        if not self.spills(nbytes):
            return None
        with tempfile.NamedTemporaryFile(prefix="fewbit-hidden-", dir=self.scratch, delete=False) as made:
            return Path(made.name)

    def rows(self, vocab: int) -> int:
        """Positions whose logits may be in hand at once."""
        return max(1, self.row_bytes // (LOGIT_COPIES * vocab))

    def batch(self, length: int) -> int:
        """Windows per batch of a block pass."""
        return max(1, self.batch_tokens // length)


@dataclass(frozen=True)
class Demand:
    """What an evaluation is to hold besides one model's blocks.

    Attributes:
        windows, length: of the tokens. scored: positions. candidates: how many models are compared with the base.
        cached: whether the base is kept in its compact form. look: whether gradients are taken. resident: whether a model is held whole.
    """

    windows: int
    length: int
    scored: int
    candidates: int
    cached: bool = False
    look: bool = False
    resident: bool = False


def peak_bytes(runner: Runner, demand: Demand, room: Room) -> int:
    """Predicted peak of resident memory of an evaluation, above what the process took before; bytes."""
    item, width, manifest = runner.model.dtype.itemsize, runner.width, runner.source.manifest
    slots = [[slot.name for slot in runner.model.block_slots(index)] for index in range(len(runner.model))]
    block = item * max((sum(manifest[name].numel for name in names) for names in slots), default=0)
    inside = item * sum(manifest[name].numel for names in slots for name in names)
    trunk = item * sum(info.numel for info in manifest.values()) - inside
    largest = max((info.numel for info in manifest.values()), default=0)
    hidden = demand.windows * demand.length * width * item
    held = 0 if room.spills(hidden) else hidden
    batch = BATCH_COPIES * width * demand.length * min(demand.windows, room.batch(demand.length))
    models = 2 if demand.candidates else 1
    phases = [block + 8 * largest + batch, LOGIT_COPIES * runner.vocab * min(room.rows(runner.vocab), demand.length)]
    if demand.look:
        tokens = max(demand.length, GRADIENT_TOKENS)
        phases.append(
            5 * block + 2 * trunk + 8 * largest + tokens * width * (item * (len(slots) + 1) + 2 * BATCH_COPIES)
        )
    if demand.resident:
        phases.append(inside + 8 * largest + block)
    kept = demand.scored * (MEASURE_BYTES * demand.candidates + (2 * width + 16 if demand.cached else 0))
    return OVERHEAD + models * trunk + kept + held * (1 if demand.cached else models) + max(phases)


def fitted(runner: Runner, demand: Demand, ram: int | None, before: int, scratch: Path | None = None) -> Room:
    """The roomiest limits with which an evaluation stays within `ram`, bytes of resident memory, of which the process takes `before` already.

    Raises:
        ResourceError: FB-E0813 when even the smallest pieces do not fit; says how much would.
    """
    room = Room(scratch=scratch)
    if ram is None:
        return room
    share = max(LEAST, ram - before)
    while before + peak_bytes(runner, demand, room) > ram:
        share //= 2
        if share < LEAST:
            needed = before + peak_bytes(runner, demand, room)
            what = f"evaluating takes {needed / 1e9:.2f} GB at its least, --ram allows {ram / 1e9:.2f} GB"
            raise ResourceError("FB-E0813", what)
        tokens = max(1, share // (BATCH_COPIES * runner.width))
        room = replace(room, hidden=share, row_bytes=min(ROW_BYTES, share), batch_tokens=min(BATCH_TOKENS, tokens))
    return room
