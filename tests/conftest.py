"""Every test process takes its share of the cores: pytest-xdist starts several, and threads that wait for each other's cores spin."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_SHARE = str(max(1, (os.cpu_count() or 1) // _WORKERS))
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # before anything imports torch; child processes inherit it
    os.environ.setdefault(_name, _SHARE)


SAMPLE = Path(__file__).parents[1] / "samples" / "sample"


@pytest.fixture(scope="session")
def two_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample's first two blocks, a checkpoint to read."""
    from safetensors.torch import load_file, save_file

    place = tmp_path_factory.mktemp("two-blocks")
    for file in SAMPLE.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            (place / file.name).write_bytes(file.read_bytes())
    config = json.loads((SAMPLE / "config.json").read_text()) | {"num_hidden_layers": 2}
    (place / "config.json").write_text(json.dumps(config))
    tensors = load_file(SAMPLE / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if ".layers." not in name or int(name.split(".")[2]) < 2}
    save_file(kept, place / "model.safetensors", metadata={"format": "pt"})
    return place
