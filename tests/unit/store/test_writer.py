"""Layout and shard writer: places, resume, refusal, full disks, and the safetensors library as the stranger that reads it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from fewbit.base.errors import InputError, ResourceError
from fewbit.store import writer as writing
from fewbit.store.checkpoint import open_checkpoint
from fewbit.store.layout import lay_out
from fewbit.store.tensors import DTYPE_NAMES
from fewbit.store.writer import MANIFEST_NAME, ShardWriter, check_output, partial_path, scratch_path

CONFIG = {"config.json": b"{}"}


def model(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of every width, awkward shapes among them."""
    make = torch.Generator().manual_seed(seed)
    return {
        "byte": torch.randint(0, 256, (7,), generator=make, dtype=torch.uint8),
        "half": torch.randn(5, 3, generator=make).to(torch.float16),
        "brain": torch.randn(3, 5, 7, generator=make).to(torch.bfloat16),
        "eight": torch.randn(4, 5, generator=make).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "truth": torch.tensor([True, False, True]),
        "int": torch.randint(-9, 9, (3, 3), generator=make),
        "turned": torch.randn(6, 4, generator=make).t(),
    }


def specs(tensors: dict[str, torch.Tensor]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bytes_of(a) == bytes_of(b)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def shas(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("shard_bytes", [10**9, 150, 1], ids=["one", "some", "each"])
def test_round_trip_read_by_the_library_and_by_us(tmp_path: Path, shard_bytes: int) -> None:
    tensors = model()
    layout = lay_out(specs(tensors), shard_bytes, {"format": "pt", "note": 'é "quoted"'})
    extra = tmp_path / "tokenizer.json"
    extra.write_text("{}")
    with ShardWriter(tmp_path / "out", layout) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
            assert bytes(writer.read_back(name)) == bytes_of(tensors[name])
            assert writer.checksum(name, chunk=5) == zlib.crc32(bytes_of(tensors[name]))
        assert writer.finish(CONFIG, [extra], {"made_by": "test"}) == tmp_path / "out"
    found: dict[str, torch.Tensor] = {}
    for shard in layout.shards:
        path = tmp_path / "out" / shard.name
        found |= safetensors.torch.load_file(path)
        with safetensors.safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt", "note": 'é "quoted"'}
        assert path.stat().st_size == shard.size
    assert found.keys() == tensors.keys()
    assert all(same(found[name], tensors[name]) for name in tensors)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert checkpoint.warnings == ()  # aligned, whole, agreeing with its index
        assert all(same(checkpoint.read(name), tensors[name]) for name in tensors)
        assert [path.name for path in checkpoint.aux_files] == ["tokenizer.json"]
        for name, info in layout.tensors.items():
            assert checkpoint.manifest[name] == info
    assert not partial_path(tmp_path / "out").exists()
    assert not (tmp_path / "out" / ".fewbit").exists()


def test_manifest_lists_every_file_with_its_hash(tmp_path: Path) -> None:
    layout = lay_out(specs(model()), 100)
    with ShardWriter(tmp_path / "out", layout) as writer:
        writer.finish(CONFIG, manifest={"made_by": "test"})
    manifest = json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())
    actual = shas(tmp_path / "out")
    del actual[MANIFEST_NAME]
    assert manifest["made_by"] == "test"
    assert {name: facts["sha256"] for name, facts in manifest["files"].items()} == actual
    assert all((tmp_path / "out" / name).stat().st_size == facts["bytes"] for name, facts in manifest["files"].items())


def test_layout_is_deterministic_aligned_and_named_like_transformers() -> None:
    tensors = specs(model())
    layout = lay_out(tensors, 150)
    assert layout == lay_out(tensors, 150)
    assert layout.digest() != lay_out(tensors, 300).digest()
    count = len(layout.shards)
    assert [shard.name for shard in layout.shards] == [
        f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)
    ]
    widths = {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2}
    assert all(info.offset % widths.get(info.dtype, 1) == 0 for info in layout.tensors.values())
    assert all(len(shard.head) % 8 == 0 for shard in layout.shards)
    assert all(sum(info.nbytes for info in shard.tensors) <= 150 or len(shard.tensors) == 1 for shard in layout.shards)
    index = json.loads(layout.index())
    assert index["metadata"]["total_size"] == sum(info.nbytes for info in layout.tensors.values())
    assert set(index["weight_map"]) == {name for name, _, _ in tensors}
    assert lay_out(tensors).index() is None


def test_a_shard_fills_from_its_beginning_unless_alignment_forbids_it() -> None:
    whole = [
        ("a.packed", "I32", (4, 8)),
        ("a.scale", "BF16", (4, 4)),
        ("a.shape", "I64", (2,)),
        ("b.packed", "I32", (3, 8)),
    ]
    (shard,) = lay_out(whole).shards
    assert [info.name for info in shard.tensors] == [name for name, _, _ in whole]
    odd = [("a.scale", "BF16", (3, 1)), ("a.shape", "I64", (2,)), ("b", "U8", (3,)), ("c", "F32", (1,))]
    (shard,) = lay_out(odd).shards
    assert [info.name for info in shard.tensors] == ["a.shape", "c", "a.scale", "b"]


@pytest.mark.parametrize(
    "bad", [[("a", "F32", (1,))] * 2, [("a", "Q4", (1,))], [("", "F32", ())], [("a/../b", "F32", ())]]
)
def test_layout_refuses_what_no_reader_takes(bad: list) -> None:
    with pytest.raises(InputError, match="FB-E0143"):
        lay_out(bad)


def test_write_refuses_what_was_not_laid_out(tmp_path: Path) -> None:
    layout = lay_out([("a", "F32", (2,)), ("f4", "F4", (2, 4))])
    with ShardWriter(tmp_path / "out", layout) as writer:
        writer.write("f4", torch.zeros(2, 2, dtype=torch.uint8))
        for name, data in [
            ("b", b""), ("a", b"1234567"), ("a", torch.zeros(2, dtype=torch.float64)), ("a", torch.zeros(1, 2)),
            ("a", torch.zeros(2, dtype=torch.int32)), ("f4", torch.zeros(2, 4, dtype=torch.uint8)),
        ]:  # fmt: skip
            with pytest.raises(InputError, match="FB-E0143"):
                writer.write(name, data)
        for name in ("../x", "/x", MANIFEST_NAME):
            with pytest.raises(InputError, match="FB-E0143"):
                writer.finish({name: b""})


def test_threads_write_at_once(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((1000 + i,), i, dtype=torch.int16) for i in range(64)}
    with ShardWriter(tmp_path / "out", lay_out(specs(tensors), 20_000)) as writer:
        threads = [threading.Thread(target=writer.write, args=item) for item in tensors.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        writer.finish(CONFIG)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert all(same(checkpoint.read(name), tensor) for name, tensor in tensors.items())


def test_resumed_output_is_the_same_output(tmp_path: Path) -> None:
    tensors, layout = model(), lay_out(specs(model()), 150)
    with ShardWriter(tmp_path / "straight", layout) as writer:
        assert not writer.resumed
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        writer.finish(CONFIG)
    names = list(tensors)
    first = ShardWriter(tmp_path / "resumed", layout)
    for name in names[:4]:
        first.write(name, tensors[name])
    (first.scratch / "journal").write_text("mine")
    (first.partial / "left.json").write_text("from a finish that was killed")
    first.close()
    with ShardWriter(tmp_path / "resumed", layout) as second:
        assert second.resumed
        assert (scratch_path(tmp_path / "resumed") / "journal").read_text() == "mine"
        assert all(bytes(second.read_back(name)) == bytes_of(tensors[name]) for name in names[:4])
        for name in names[4:]:
            second.write(name, tensors[name])
        second.finish(CONFIG)
    assert shas(tmp_path / "straight") == shas(tmp_path / "resumed")


_CHILD = """
import sys
sys.path.insert(0, {src!r})
from pathlib import Path
from fewbit.store.layout import lay_out
from fewbit.store.writer import ShardWriter
specs = [(f"t{{i}}", "U8", (200_000,)) for i in range(60)]
with ShardWriter(Path(sys.argv[1]), lay_out(specs, 1_000_000)) as writer:
    journal = writer.scratch / "journal"
    done = journal.read_text().split() if journal.exists() else []
    print("go", flush=True)
    for i, (name, _, _) in enumerate(specs):
        if name not in done:
            writer.write(name, bytes([i]) * 200_000)
            writer.sync([name])
            with open(journal, "a") as file:
                file.write(name + "\\n")
    writer.finish({{"config.json": b"x"}}, manifest={{"a": 1}})
"""


def test_killed_at_any_moment_then_run_again(tmp_path: Path) -> None:
    script = tmp_path / "child.py"
    here = Path(__file__)
    script.write_text(_CHILD.format(src=str(here.parents[3] / "src")))
    subprocess.run([sys.executable, script, tmp_path / "straight"], check=True)
    pause = random.Random(7)
    for _ in range(6):
        child = subprocess.Popen([sys.executable, script, tmp_path / "killed"], stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        try:
            child.wait(pause.uniform(0.0, 0.1))
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
        if (tmp_path / "killed").exists():
            break
        assert partial_path(tmp_path / "killed").exists()
    if not (tmp_path / "killed").exists():
        subprocess.run([sys.executable, script, tmp_path / "killed"], check=True)
    assert shas(tmp_path / "straight") == shas(tmp_path / "killed")


def test_partial_folder_of_another_layout_or_process_is_refused(tmp_path: Path) -> None:
    layout = lay_out(specs(model()))
    with ShardWriter(tmp_path / "out", layout), pytest.raises(InputError, match=r"FB-E0142.*another run"):
        ShardWriter(tmp_path / "out", layout)
    other = lay_out([*specs(model()), ("more", "F32", (1,))])
    with pytest.raises(InputError, match=r"FB-E0142.*other tensors"):
        ShardWriter(tmp_path / "out", other)
    with ShardWriter(tmp_path / "out", layout) as writer:  # the refusals did no harm
        assert writer.resumed
    foreign = partial_path(tmp_path / "foreign")
    foreign.mkdir()
    (foreign / "precious.txt").write_text("x")
    with pytest.raises(InputError, match="FB-E0142"):
        ShardWriter(tmp_path / "foreign", layout)
    assert (foreign / "precious.txt").read_text() == "x"


def test_output_that_would_destroy_something_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(source)
    for out in (source, tmp_path / "link", source / "out", tmp_path, source / ".." / "model"):
        with pytest.raises(InputError, match="FB-E0140"):
            check_output(out, [source], overwrite=True)
    check_output(tmp_path / "other", [source])
    other = tmp_path / "other"
    other.mkdir()
    check_output(other, [source])
    (other / "x").write_text("x")
    with pytest.raises(InputError, match="FB-E0141"):
        check_output(other, [source])
    check_output(other, [source], overwrite=True)
    with pytest.raises(InputError, match="FB-E0141"):
        check_output(other / "x", [source], overwrite=True)


def test_overwrite_replaces_only_when_whole(tmp_path: Path) -> None:
    out, layout = tmp_path / "out", lay_out(specs(model()))
    out.mkdir()
    (out / "old.txt").write_text("old")
    writer = ShardWriter(out, layout, overwrite=True)
    writer.write("byte", model()["byte"])
    assert (out / "old.txt").read_text() == "old"
    writer.finish(CONFIG)
    assert not (out / "old.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_old_output_survives_a_failing_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    writer = ShardWriter(out, lay_out(specs(model())), overwrite=True)
    real = os.rename

    def rename(a: Path, b: Path) -> None:
        if Path(b) == out and Path(a).name.endswith(".partial"):
            raise PermissionError(errno.EACCES, "no")
        real(a, b)

    monkeypatch.setattr(writing.os, "rename", rename)
    with pytest.raises(ResourceError, match="FB-E0502"):
        writer.finish(CONFIG)
    assert (out / "old.txt").read_text() == "old"


class TestDiskFull:
    def test_found_before_the_run(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        layout = lay_out([("big", "F32", (1 << 20,))])
        monkeypatch.setattr(writing, "free_bytes", lambda path: 1_000_000)
        with pytest.raises(ResourceError) as caught:
            ShardWriter(tmp_path / "out", layout)
        assert caught.value.code == "FB-E0501"
        assert f"{layout.nbytes - 1_000_000:,} missing" in caught.value.message
        assert caught.value.exit_status == 3
        assert not partial_path(tmp_path / "out").exists()

    def test_found_by_preallocation(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(fd: int, start: int, size: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(writing.os, "posix_fallocate", full)
        with pytest.raises(ResourceError, match="FB-E0501"):
            ShardWriter(tmp_path / "out", lay_out(specs(model())))

    def test_during_the_run_keeps_what_is_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        tensors, layout = model(), lay_out(specs(model()), 150)
        writer = ShardWriter(tmp_path / "out", layout)
        writer.write("half", tensors["half"])

        def full(fd: int, view: memoryview, offset: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(writing, "pwrite_all", full)
            with pytest.raises(ResourceError, match="FB-E0501"):
                writer.write("brain", tensors["brain"])
            with pytest.raises(ResourceError, match="FB-E0501"):
                writer.write_at("brain", 0, b"12")
        writer.close()
        with ShardWriter(tmp_path / "out", layout) as again:
            assert again.resumed
            assert bytes(again.read_back("half")) == bytes_of(tensors["half"])

    def test_in_small_files(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        writer = ShardWriter(tmp_path / "out", lay_out(specs(model())))

        def full(path: Path, data: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(writing, "_write_whole", full)
        with pytest.raises(ResourceError, match="FB-E0501"):
            writer.finish(CONFIG)
        writer.close()
        assert not (tmp_path / "out").exists()
        assert partial_path(tmp_path / "out").exists()

    def test_a_real_limit_of_the_system(self, tmp_path: Path) -> None:
        """RLIMIT_FSIZE in a child: the real system call fails, the error is ours and the folder stays usable."""
        script = (
            "import resource, signal, sys\n"
            "from pathlib import Path\n"
            "from fewbit.store.layout import lay_out\n"
            "from fewbit.store.writer import ShardWriter\n"
            "from fewbit.base.errors import ResourceError\n"
            "layout = lay_out([('a', 'U8', (4000,)), ('b', 'U8', (1 << 20,))], 5000)\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))\n"
            "try:\n"
            "    ShardWriter(Path(sys.argv[1]), layout)\n"
            "except ResourceError as error:\n"
            "    print(error.code)\n"
        )
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3] / "src")}
        done = subprocess.run(
            [sys.executable, "-c", script, tmp_path / "out"], env=env, capture_output=True, text=True, check=True
        )
        assert done.stdout == "FB-E0501\n"


def test_write_at_parts_make_the_whole(tmp_path: Path) -> None:
    tensor = model()["brain"]
    data = bytes_of(tensor)
    with ShardWriter(tmp_path / "out", lay_out(specs({"brain": tensor}))) as writer:
        writer.write_at("brain", 100, data[100:])
        writer.write_at("brain", 0, data[:100])
        with pytest.raises(InputError, match="FB-E0143"):
            writer.write_at("brain", len(data) - 1, b"12")
        writer.finish(CONFIG)
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert same(checkpoint.read("brain"), tensor)
