"""Memory of a run, from shapes alone: what one job needs at its peak, and how many may run at once within a budget.

A data-free job reads its tensor in tiles of rows, solves each tile, keeps only the codes and scales, joins them and encodes them at the end:

    peak  =  tile x (source + TILE_BYTES)  +  the larger of   codes twice (tiles and their join)   and   codes + what encoding takes

Where rows are stored apart (GGUF), each tile is encoded and written at once: then a tile is all that is held. A scheme that needs the whole
tensor at once (one scale for all) has a tile of the whole tensor and nothing to join; a tensor that is kept is copied through a buffer. The constants were fitted to the peaks of real runs: bench/plan_peak.py holds them to 15 %.
"""

from __future__ import annotations

from dataclasses import dataclass

from fewbit.base.errors import ResourceError
from fewbit.base.manifest import DTYPE_BITS, data_bytes
from fewbit.num.grid import Codebook, FloatGrid, VectorGrid
from fewbit.num.scheme import Scheme
from fewbit.plan.jobs import Job

TILE_WEIGHTS = 1 << 23
COPY_BUFFER = 1 << 25
TILE_BYTES = 3.0  # of one weight of a tile while it is solved, beside what is joined later: float32 and the allocator's leftovers
WHOLE_BYTES = 2.8  # the same where all rows are one tile: several jobs rarely stand at their peaks together
# of a job whose scale serves the whole tensor: temporaries of a chunk while its range is searched
SEARCH_BYTES = 128 << 20
ROW_BYTES = 10.0  # the same where tiles are written as they are solved, codes and encoding included
TABLE_BYTES = 13.5  # and where codes are looked for in a table
# bytes of one weight that encoding takes beside the codes, by the dtype of what is stored; U8 (blocks of GGUF and others): the output and .7 more
ENCODE_BYTES = {"I32": 2.0, "U32": 0.5, "I8": 1.0, "F8_E4M3": 0.0, "F8_E5M2": 0.0, "BF16": 6.0, "F16": 6.0, "F32": 8.0}
TURNED_BYTES = 4.0  # where packed words run down the columns (GPTQ): they are packed in a copy that is turned round
BLOCK_BYTES = 0.7
MARGIN = 1.15  # how far above its estimate a job may come: a limit must hold all the same
BASE_BYTES = 420 << 20  # interpreter, torch, numba and their heaps, measured (dev/LOG.md)


def row_separable(scheme: Scheme) -> bool:
    """Whether rows (or rows of blocks) can be solved apart: no scale or shift is shared by all of them."""
    if scheme.is_leaf:
        return scheme.blocks.rows == 1
    if scheme.blocks.flat or scheme.blocks.rows == 0:
        return False
    return all(
        (part.is_leaf and part.blocks.rows == 1) or (not part.is_leaf and row_separable(part))
        for _, part in scheme.parts()
    )


def shares_all(scheme: Scheme) -> bool:
    """Whether some scale or shift serves the whole tensor."""
    whole = scheme.blocks.rows == 0 and not scheme.blocks.flat and not scheme.is_leaf
    return whole or any(not part.is_leaf and shares_all(part) for _, part in scheme.parts())


def tile_rows(scheme: Scheme, shape: tuple[int, ...], ops: tuple[str, ...] = ()) -> int:
    """Rows of a tile: a whole number of blocks, some TILE_WEIGHTS weights; all rows where tiles are impossible."""
    rows = shape[-2] if len(shape) > 1 else 1
    if len(shape) != 2 or ops or not row_separable(scheme):
        return rows
    step = max(1, scheme.blocks.rows)
    wanted = max(step, TILE_WEIGHTS // max(1, shape[-1]))
    return min(rows, -(-wanted // step) * step)


def code_bytes(scheme: Scheme) -> float:
    """Bytes per weight of the codes as the solver holds them."""
    grid = scheme.grid
    if isinstance(grid, VectorGrid):
        return 4 / grid.dim
    return float(int(grid.bits) // 8) if isinstance(grid, FloatGrid) and grid.bits > 8 else 1.0


def encode_bytes(job: Job) -> float:
    """Bytes that encoding a job takes beside its codes."""
    dtype, shape = max(job.writes.values(), key=lambda part: data_bytes(*part), default=("U8", ()))
    if dtype == "I32" and len(shape) > 1 and shape[-1] == job.shape[-2] != shape[-2]:
        return TURNED_BYTES * job.numel
    if dtype == "I32" and len(shape) > 1 and shape[-2] == job.shape[-2]:
        return job.nbytes  # rows are packed where they are
    if dtype in ENCODE_BYTES:
        return ENCODE_BYTES[dtype] * job.numel
    return job.nbytes + BLOCK_BYTES * job.numel


def job_bytes(job: Job) -> int:
    """Peak bytes of one data-free job."""
    source = DTYPE_BITS.get(job.source_dtype, 32) / 8
    if job.scheme is None:
        return min(int(job.numel * source), COPY_BUFFER) if not job.ops else int(2 * job.numel * source)
    rows = job.shape[-2] if len(job.shape) > 1 else 1
    step = tile_rows(job.scheme, job.shape, job.ops)
    codes = job.numel * code_bytes(job.scheme) + metadata_bytes(job)
    if job.by_rows and step < rows:
        looked_up = isinstance(job.scheme.grid, Codebook | VectorGrid)
        return int(step * job.shape[-1] * (source + (TABLE_BYTES if looked_up else ROW_BYTES)))
    if step >= rows:
        search = min(SEARCH_BYTES, 32 * job.numel) if shares_all(job.scheme) else 0
        return int(codes + max(job.numel * (source + WHOLE_BYTES) + search, encode_bytes(job)))
    return int(step * job.shape[-1] * (source + TILE_BYTES) + max(2 * codes, codes + encode_bytes(job)))


def metadata_bytes(job: Job) -> float:
    """Bytes of scales and shifts."""
    scheme = job.wanted
    return sum(part.storage_bits(scheme.block_counts(job.shape)) for _, part in scheme.parts()) / 8


@dataclass(frozen=True)
class Budget:
    """How a run uses its memory: `workers` at once, `bytes` for all jobs in flight."""

    workers: int
    bytes: int
    peak: int


def budget(jobs: list[Job], ram: int, workers: int) -> Budget:
    """Workers that fit a hard limit of resident memory.

    Raises:
        ResourceError: FB-E0510 when even one job at a time does not fit, naming the tensor.
    """
    room = ram - BASE_BYTES
    sizes = sorted(((job_bytes(job), job) for job in jobs), key=lambda pair: -pair[0])
    largest, worst = sizes[0] if sizes else (0, None)
    most = int(MARGIN * largest)
    if worst is not None and most > room:
        raise ResourceError(
            "FB-E0510",
            f"the program takes {BASE_BYTES / 1e9:.2f} GB and its largest tensor up to {most / 1e9:.2f} GB more, --ram allows {ram / 1e9:.2f} GB",
            tensor=worst.name,
            remedy=f"--ram {(most + BASE_BYTES) / 1e9 + 0.01:.2f}GB or more" if most < BASE_BYTES else None,
        )
    fitting = next((n for n in range(workers, 0, -1) if MARGIN * sum(size for size, _ in sizes[:n]) <= room), 1)
    peak = BASE_BYTES + sum(size for size, _ in sizes[:fitting])
    return Budget(workers=fitting, bytes=max(largest, int(room / MARGIN)), peak=peak)
