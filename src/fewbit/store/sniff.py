"""What a file really is, by its first bytes: names lie."""

from __future__ import annotations

from pathlib import Path

from fewbit.base.errors import InputError
from fewbit.store.fileio import require_regular

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"GGUF", "gguf"),
    (b"FUGG", "gguf"),  # big-endian
    (b"PK\x03\x04", "zip"),  # what torch.save writes
    (b"PK\x05\x06", "zip"),
    (b"7z\xbc\xaf\x27\x1c", "7z"),
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x89HDF\r\n\x1a\n", "hdf5"),
    (b"version https://git-lfs", "lfs"),
    (b"\x93NUMPY", "numpy"),
)
PICKLE_NAMES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

_ADVICE = (
    "a pickle can run code when it is opened, so fewbit never opens one: take the repository's safetensors files, or convert it in "
    "a sandbox with torch.load(weights_only=True) and safetensors.torch.save_file"
)
_LFS = "run `git lfs pull` in the repository, or fetch it with `hf download`"
# kind -> (what it is, remedy)
_REFUSED: dict[str, tuple[str, str]] = {
    "zip": ("a zip archive, which is how torch.save writes a pickle", _ADVICE),
    "pickle": ("a pickle", _ADVICE),
    "7z": ("a 7z archive; a pickle may hide in it", _ADVICE),
    "gzip": ("a gzip archive", "unpack it first"),
    "zstd": ("a zstd archive", "unpack it first"),
    "xz": ("an xz archive", "unpack it first"),
    "hdf5": ("an HDF5 file", "convert the Keras or TensorFlow weights to safetensors first"),
    "numpy": ("a NumPy array", "save it as safetensors first"),
    "lfs": ("a Git LFS pointer of a few lines, not the weights", _LFS),
    "html": ("a web page, most likely an error or login page", "fetch the file again with `hf download`"),
}


def kind_of(path: Path) -> str:
    """`safetensors`, `gguf`, or a kind that `refuse` explains; `unknown` when the bytes say nothing."""
    require_regular(path)
    with open(path, "rb") as file:
        head = file.read(64)
    # a safetensors header is below 2^27 bytes, so its bytes 4 to 8 are zero, and it opens with a brace; asked first, for a header of
    # 640 bytes begins as a pickle does
    if len(head) >= 9 and head[4:8] == b"\0\0\0\0" and head[8:9] == b"{":
        return "safetensors"
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if head[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"):
        return "pickle"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "html"
    return "unknown"


def require_safetensors(path: Path) -> None:
    """Raises InputError FB-E0127 (pickles) or FB-E0101 where the bytes are plainly something else.

    An unknown beginning passes: the header reader says exactly what is wrong with it.
    """
    kind = kind_of(path)
    if kind in ("safetensors", "unknown"):
        return
    if kind == "gguf":
        raise InputError("FB-E0101", f"{path.name} is a GGUF file", file=path, remedy="give it the suffix .gguf")
    refuse(path, kind)


def refuse(path: Path, kind: str) -> None:
    """Raises the error for a file of a kind that is never read."""
    what, remedy = _REFUSED[kind]
    code = "FB-E0127" if remedy is _ADVICE else "FB-E0101"
    raise InputError(code, f"{path.name} is {what}", file=path, remedy=remedy)


def refuse_pickle(path: Path) -> None:
    """Raises InputError FB-E0127 for a file that its name gives away as a pickle."""
    raise InputError("FB-E0127", f"{path.name} is a pickle by its name", file=path, remedy=_ADVICE)
