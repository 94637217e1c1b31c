"""The hash of a file that is written in pieces, in any order."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
from pathlib import Path

from fewbit.store.running_hash import RunningHash


def test_the_running_hash_is_the_files_whatever_the_order(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(300_000)
    cuts = [0, *sorted(random.Random(2).sample(range(1, len(data)), 40)), len(data)]
    pieces = list(itertools.pairwise(cuts))
    for seed, left_out, twice in [(0, 0, False), (1, 0, False), (2, 3, False), (3, 0, True)]:
        path = tmp_path / f"{seed}"
        path.write_bytes(data)  # what is left out was written by an earlier process
        fd = os.open(path, os.O_RDWR)
        running = RunningHash(fd)
        order = random.Random(seed).sample(pieces, len(pieces)) if seed else pieces
        for a, b in order[left_out:]:
            running.wrote(a, memoryview(data)[a:b])
        if twice:
            os.pwrite(fd, b"changed", 10)
            running.wrote(10, memoryview(b"changed"))
        assert running.finish(len(data)) == hashlib.sha256(path.read_bytes()).hexdigest()
        os.close(fd)
