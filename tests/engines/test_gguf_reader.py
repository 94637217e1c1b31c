"""Our GGUF reader against llama.cpp's: what `gguf_init_from_file` rejects, we reject, on every case and on mutated files."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "contract")]
import ggml  # noqa: E402
from gguf_cases import CASES, File  # noqa: E402

from fewbit.base.errors import InputError  # noqa: E402
from fewbit.store.gguf import open_gguf  # noqa: E402

pytestmark = pytest.mark.skipif(not ggml.available(), reason=f"needs llama.cpp: {ggml.ENV_COMMAND}")

_ORACLE = """
import sys
sys.path.insert(0, sys.argv[1])
import ggml
for line in sys.stdin:
    print(int(ggml.gguf_opens(line.strip())), flush=True)
"""


class Oracle:
    """llama.cpp's verdict, in a process of its own: a crash there counts as a refusal."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None

    def accepts(self, path: Path) -> bool:
        if self.process is None:
            command = [sys.executable, "-c", _ORACLE, str(Path(__file__).parent)]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        if answer == "":
            self.process.wait()
            self.process = None
        return answer == "1"


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle()


def _we_accept(path: Path) -> bool:
    try:
        open_gguf(path).close()
    except InputError:
        return False
    return True


def test_both_read_the_honest_file(oracle: Oracle, tmp_path: Path) -> None:
    path = tmp_path / "honest.gguf"
    path.write_bytes(File().bytes())
    assert _we_accept(path) and oracle.accepts(path)


@pytest.mark.parametrize("case", CASES)
def test_never_more_lenient_on_the_cases(case: str, oracle: Oracle, tmp_path: Path) -> None:
    path = tmp_path / "lie.gguf"
    path.write_bytes(CASES[case][0]())
    assert oracle.accepts(path) or not _we_accept(path)


def _mutate(raw: bytearray, rng: random.Random) -> bytearray:
    bounds = [0, 1, 3, 64, 255, 2**16, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1, 2**64 - 64]
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(max(len(raw) - 9, 1))
        match rng.randrange(5):
            case 0:
                raw[at] ^= 1 << rng.randrange(8)
            case 1:
                del raw[at : at + rng.choice([1, 8, len(raw)])]
            case 2:
                raw[at:at] = rng.randbytes(rng.choice([1, 4, 8, 32]))
            case 3:
                raw[at : at + 8] = struct.pack("<Q", rng.choice(bounds))
            case 4:
                raw[at : at + 4] = struct.pack("<I", rng.choice(bounds) & 0xFFFFFFFF)
        if not raw:
            break
    return raw


def test_never_more_lenient_on_mutations(oracle: Oracle, tmp_path: Path) -> None:
    rng, path, both = random.Random(7), tmp_path / "mutated.gguf", 0
    honest = File().bytes()
    head = len(honest) - len(File().data)
    for _ in range(4000):
        raw = _mutate(bytearray(honest[:head]), rng) + honest[head:]  # the data is of no interest
        path.write_bytes(raw)
        we, they = _we_accept(path), oracle.accepts(path)
        assert they or not we, f"we accept what llama.cpp rejects: {bytes(raw).hex()}"
        both += we and they
    assert both > 100  # mutations that change nothing that matters: both verdicts occur
