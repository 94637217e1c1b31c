"""Hub ids against a hub made of a folder: what is asked of it, and how its failures come out."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote

import pytest
import torch

from fewbit.base.errors import InputError
from fewbit.store import checkpoint as opening
from fewbit.store.checkpoint import Checkpoint, open_checkpoint
from fewbit.store.hub import HuggingFaceHub, open_hub
from fewbit.store.layout import lay_out
from fewbit.store.writer import ShardWriter

TENSORS = {"a": torch.arange(6.0), "b": torch.arange(4, dtype=torch.int8), "c": torch.ones(300, 300)}
CONFIG = json.dumps({"model_type": "none", "auto_map": {}}).encode()


class FolderHub:
    """A hub whose repository is a folder; it keeps a list of what was asked."""

    def __init__(self, content: Path, cache: Path) -> None:
        self.content, self.cache = content, cache
        self.fetched: list[str] = []
        self.ranges: list[tuple[str, int]] = []
        self.offline = False

    def listing(self, repo: str, revision: str | None) -> tuple[str, dict[str, tuple[int, str]]]:
        if self.offline:
            raise InputError("FB-E0130", "offline", file=repo)
        files = [path for path in self.content.rglob("*") if path.is_file()]
        return "c0ffee", {path.relative_to(self.content).as_posix(): (path.stat().st_size, path.name) for path in files}

    def fetch(self, repo: str, commit: str, name: str) -> Path:
        self.fetched.append(name)
        self.cache.mkdir(exist_ok=True)
        return Path(shutil.copy(self.content / name, self.cache / name))

    def read_range(self, repo: str, commit: str, name: str, start: int, stop: int) -> bytes:
        self.ranges.append((name, stop - start))
        return (self.content / name).read_bytes()[start:stop]

    def cached(self, repo: str, revision: str | None) -> Path | None:
        return self.cache if (self.cache / "config.json").exists() else None


@pytest.fixture
def hub(tmp_path: Path) -> FolderHub:
    content = tmp_path / "content"
    specs = [("a", "F32", (6,)), ("b", "I8", (4,)), ("c", "F32", (300, 300))]
    with ShardWriter(content, lay_out(specs, 100)) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
        writer.finish({"config.json": CONFIG, "tokenizer.json": b"{}"})
    return FolderHub(content, tmp_path / "cache")


def shards(names: list[str]) -> list[str]:
    return [name for name in names if name.endswith(".safetensors")]


def test_headers_come_by_ranges_and_shards_only_when_read(hub: FolderHub) -> None:
    with Checkpoint(open_hub("org/name", hub=hub)) as checkpoint:
        assert sorted(checkpoint.manifest) == ["a", "b", "c"]
        assert shards(hub.fetched) == []
        assert {name for name, _ in hub.ranges} == set(checkpoint.manifest.files)
        assert max(size for _, size in hub.ranges) <= 1 << 18
        assert len(hub.ranges) == len(checkpoint.manifest.files)
        assert any("auto_map" in warning for warning in checkpoint.warnings)
        assert [path.name for path in checkpoint.aux_files] == ["tokenizer.json"]
        quick = checkpoint.fingerprint()
        assert torch.equal(checkpoint.read("c"), TENSORS["c"])
        assert torch.equal(checkpoint.read_rows("c", 7, 9), TENSORS["c"][7:9])
        assert shards(hub.fetched) == [checkpoint.manifest["c"].file]
        assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in TENSORS.items())
        assert checkpoint.fingerprint() == quick


def test_header_longer_than_the_first_request(hub: FolderHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewbit.store.hub._FIRST_READ", 20)
    with Checkpoint(open_hub("org/name", hub=hub)) as checkpoint:
        assert sorted(checkpoint.manifest) == ["a", "b", "c"]


def test_offline_serves_the_cached_snapshot_or_says_what_to_do(hub: FolderHub) -> None:
    hub.offline = True
    with pytest.raises(InputError, match="FB-E0130") as caught:
        open_hub("org/name", hub=hub)
    assert "HF_HUB_OFFLINE" in caught.value.remedy
    shutil.copytree(hub.content, hub.cache)
    with Checkpoint(open_hub("org/name", hub=hub)) as checkpoint:
        assert torch.equal(checkpoint.read("a"), TENSORS["a"])
    assert hub.fetched == []


def test_faults_of_the_repository_are_found(hub: FolderHub) -> None:
    index = hub.content / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    index.write_text(
        json.dumps({**listed, "weight_map": {**listed["weight_map"], "d": "model-00009-of-00009.safetensors"}})
    )
    with pytest.raises(InputError, match="FB-E0123"):
        open_hub("org/name", hub=hub)
    index.write_text(json.dumps({**listed, "weight_map": {**listed["weight_map"], "d": "../x.safetensors"}}))
    with pytest.raises(InputError, match="FB-E0122"):
        open_hub("org/name", hub=hub)
    index.write_text(json.dumps(listed))
    next(hub.content.glob("model-00001*")).write_bytes(b"<html>")
    with pytest.raises(InputError, match="FB-E0101"):
        open_hub("org/name", hub=hub)
    (hub.content / "config.json").unlink()
    with pytest.raises(InputError, match="FB-E0201"):
        open_hub("org/name", hub=hub)


def test_only_pickles(hub: FolderHub) -> None:
    for path in hub.content.glob("model*"):
        path.unlink()
    (hub.content / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(InputError, match="FB-E0127"):
        open_hub("org/name", hub=hub)


def test_cache_that_differs_from_the_hub_is_refused(hub: FolderHub) -> None:
    with Checkpoint(open_hub("org/name", hub=hub)) as checkpoint:
        shard = hub.content / checkpoint.manifest["a"].file
        shard.write_bytes(shard.read_bytes() + b"x")
        with pytest.raises(InputError, match="FB-E0111"):
            checkpoint.read("a")


class Site(BaseHTTPRequestHandler):
    """As much of the hub's web interface as reading a public model takes; `content` is the repository."""

    content: ClassVar[Path]
    asked: ClassVar[list[tuple[str, str]]]

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        if path.startswith("/api/models/org/name/tree/"):
            self.reply(200, json.dumps([self.entry(path.name) for path in self.content.iterdir()]).encode())
        elif path.startswith("/api/models/org/name"):
            files = [{"rfilename": p.name, "size": p.stat().st_size, "blobId": p.name} for p in self.content.iterdir()]
            self.reply(200, json.dumps({"id": "org/name", "sha": COMMIT, "siblings": files}).encode())
        elif path.startswith((f"/org/name/resolve/{COMMIT}/", "/org/name/resolve/main/")):
            self.file(path.rsplit("/", 1)[1])
        else:
            self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        self.reply(200, json.dumps([self.entry(path) for path in paths]).encode())

    def entry(self, name: str) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": (self.content / name).stat().st_size, "oid": name}

    def file(self, name: str) -> None:
        data, status, headers = (self.content / name).read_bytes(), 200, {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT}
        wanted = self.headers.get("Range")
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            status, headers["Content-Range"] = 206, f"bytes {first}-{last}/{len(data)}"
            data = data[int(first) : int(last) + 1]
        self.asked.append((name, self.command + (" range" if wanted else "")))
        self.reply(status, data, headers)

    def reply(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {
            "Content-Length": str(len(data)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


COMMIT = "0123456789abcdef0123456789abcdef01234567"
_CHILD = """
import sys
from fewbit.base.errors import InputError
from fewbit.store.checkpoint import open_checkpoint
with open_checkpoint("org/name") as checkpoint:
    print(sorted(checkpoint.manifest), flush=True)
    print(checkpoint.read("a").tolist(), checkpoint.root.name)
try:
    open_checkpoint("org/other")
except InputError as error:
    print(error.code)
"""


@contextlib.contextmanager
def served(content: Path, home: Path) -> Iterator[tuple[type[Site], dict[str, str]]]:
    """A site on this machine that serves a repository, and the environment in which the real client asks it."""
    site = type("OneSite", (Site,), {"content": content, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), site)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    own = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    source = str(Path(__file__).parents[3] / "src")
    try:
        yield site, {**os.environ, **own, "PYTHONPATH": source, "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def child(env: dict[str, str], *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True, timeout=120, check=False)


def test_the_library_against_a_site(hub: FolderHub, tmp_path: Path) -> None:
    """The real client over HTTP, in a process of its own because it reads its settings when imported."""
    pytest.importorskip("huggingface_hub")
    with served(hub.content, tmp_path / "home") as (site, env):
        done = child(env, "-c", _CHILD)
    assert done.stdout.splitlines() == ["['a', 'b', 'c']", f"{TENSORS['a'].tolist()} {COMMIT}", "FB-E0131"], done.stderr
    first = next(name for name, _ in site.asked if name.startswith("model-00001"))
    whole = {name for name, how in site.asked if name.endswith(".safetensors") and how == "GET"}
    assert whole <= {first}
    assert {name for name, how in site.asked if how == "GET range"} >= {
        path.name for path in hub.content.glob("*.safetensors")
    }
    # what was fetched is in the cache, the other shards are not
    assert "FB-E0123" in child({**env, "HF_HUB_OFFLINE": "1"}, "-c", _CHILD).stderr


def test_a_plan_of_a_hub_id_reads_headers_only(tmp_path: Path) -> None:
    """`fewbit plan ORG/NAME` over HTTP: no byte of a weight beyond the first request of each shard, the same page as for the folder."""
    pytest.importorskip("huggingface_hub")
    content = tmp_path / "content"
    sample = Path(__file__).parents[3] / "samples" / "sample"
    shutil.copytree(sample, content)
    with served(content, tmp_path / "home") as (site, env):
        done = child(env, "-m", "fewbit.cli.main", "plan", "org/name", "--json")
        found = json.loads(done.stdout)
    local = json.loads(child(env, "-m", "fewbit.cli.main", "plan", str(sample), "--json").stdout)
    assert found["model"]["source"] == "headers" and found["model"]["params"] == local["model"]["params"]
    assert found["storages"] == json.loads(json.dumps(local["storages"]).replace(str(sample), "org/name"))
    shards = [how for name, how in site.asked if name.endswith(".safetensors")]
    assert shards and set(shards) <= {"HEAD", "GET range"}


def test_the_library_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError) as caught:
        open_checkpoint("fewbit-no-such-org/fewbit-no-such-model")
    assert caught.value.code == "FB-E0130"
    assert "fewbit-no-such-model" in caught.value.message


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ("RepositoryNotFoundError", "FB-E0131"),
        ("GatedRepoError", "FB-E0131"),
        ("RevisionNotFoundError", "FB-E0131"),
        ("EntryNotFoundError", "FB-E0131"),
        ("HFValidationError", "FB-E0131"),
        ("LocalEntryNotFoundError", "FB-E0130"),
        ("OfflineModeIsEnabled", "FB-E0130"),
    ],
)
def test_failures_of_the_library_have_our_codes(error: str, code: str) -> None:
    errors = pytest.importorskip("huggingface_hub.errors")

    def fail() -> Any:
        kind = getattr(errors, error)
        raise kind.__new__(kind)

    with pytest.raises(InputError) as caught:
        HuggingFaceHub()._asked("org/name", fail)
    assert caught.value.code == code
    assert caught.value.file == "org/name"


def test_hub_library_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(InputError, match="FB-E0132"):
        open_checkpoint("org/name")


def test_what_is_a_hub_id(tmp_path: Path) -> None:
    assert opening.container_of(Path("org/name"), "org/name") == "hub"
    for spelling in ("org/name/more", "/org/name", "name", "../name", "./name/x", "org/na me"):
        with pytest.raises(InputError, match="FB-E0120"):
            opening.container_of(Path(spelling), spelling)
