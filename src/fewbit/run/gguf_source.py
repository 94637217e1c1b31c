"""A GGUF file as a source of float tensors under its checkpoint's names, so that it can go to any other format.

From GGUF to GGUF none of this is needed: tensors keep their names there, and blocks that keep their type are copied.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from fewbit.base.errors import InputError
from fewbit.formats.gguf.codecs import from_blocks
from fewbit.formats.gguf.encode import checkpoint_tensor, decoded, users
from fewbit.formats.gguf.inverse import ROPE_TENSORS, inverse
from fewbit.formats.gguf.metadata import GgufManifest
from fewbit.formats.gguf.ops import undo_quantised
from fewbit.formats.gguf.tokenizer import tokenizer_files
from fewbit.num.qtensor import QTensor
from fewbit.run.source import Source

GLOBAL_SCALE = (
    "scale"  # `x.scale` beside NVFP4 blocks `x.weight`: what all of them are multiplied by, one number per expert
)

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GgufAsCheckpoint(Source):
    """The float tensors that a GGUF file stands for.

    Raises:
        InputError: FB-E0320 for an architecture without a way back.
    """

    def __init__(self, source: Source) -> None:
        stored = source.checkpoint.manifest
        if not isinstance(stored, GgufManifest):
            raise InputError("FB-E0301", "the source is no GGUF file", file=source.root)
        self.checkpoint = source.checkpoint
        beside = {
            name.removesuffix("weight") + word
            for name, info in stored.items()
            if info.dtype == "GGML:NVFP4"
            for word in (GLOBAL_SCALE, "input_scale")
        }
        held = replace(stored, tensors={name: info for name, info in stored.items() if name not in beside})
        found = inverse(held, {name: self.checkpoint.read(name).tolist() for name in ROPE_TENSORS if name in held})
        self.config, self.manifest = found.config, found.manifest
        self.format, self.stored = source.format, {}  # format: what it lies in, for messages; the tensors are floats
        self.small_files, said = tokenizer_files(held.typed)
        self.checkpoint.warnings = (*self.checkpoint.warnings, *said)
        self._readers = users(found.targets)

    @property
    def quantised(self) -> bool:
        """Whether any tensor lies in blocks."""
        return any(info.dtype.startswith("GGML:") for info in self.checkpoint.manifest.values())

    def _values(self, name: str) -> torch.Tensor:
        info = self.checkpoint.manifest[name]
        values = decoded(info.dtype.removeprefix("GGML:"), self.checkpoint.read(name), info.shape, name)
        over = self.global_scale(name)
        return values if over is None else values * (over.reshape(-1, 1, 1) if values.ndim == 3 else over)

    def global_scale(self, name: str) -> torch.Tensor | None:
        """What a GGUF tensor of NVFP4 blocks is multiplied by as a whole, float32 [matrices] or [1]; None when there is nothing."""
        beside = name.removesuffix("weight") + GLOBAL_SCALE
        held = self.checkpoint.manifest
        there = held[name].dtype == "GGML:NVFP4" and beside in held
        return self.checkpoint.read(beside).float().reshape(-1) if there else None

    def made_of(self, name: str) -> str:
        """The GGUF tensor that a tensor of the checkpoint lies in (the first, where there are several)."""
        return self._readers[name][0][0].name

    def reads(self) -> dict[str, tuple[str, ...]]:
        """What each GGUF tensor was made of: its name -> names of this checkpoint."""
        return {target.name: target.reads for found in self._readers.values() for target, _ in found}

    def qtensor(self, name: str) -> QTensor | None:
        return None

    def held(self, name: str) -> QTensor | None:
        """A weight still in its blocks' bits, under the checkpoint's order of rows; None where it is a float or more than rows were moved."""
        readers = self._readers.get(name, ())
        if len(readers) != 1 or len(readers[0][0].reads) != 1:
            return None
        made = readers[0][0]
        info = self.checkpoint.manifest[made.name]
        if not info.dtype.startswith("GGML:"):
            return None
        kind = info.dtype.removeprefix("GGML:")
        return undo_quantised(made.ops, from_blocks(kind, self.checkpoint.read(made.name), info.shape))

    def read(self, name: str) -> torch.Tensor:
        """The tensor in the dtype of the manifest, every op undone."""
        if name not in self.manifest:
            raise InputError("FB-E0112", f"the checkpoint has no tensor {name!r}", tensor=name, file=self.root)
        dtype = _DTYPES[self.manifest[name].dtype]
        return checkpoint_tensor(name, self._readers, self._values).to(dtype).contiguous()

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the first dimension; only they are decoded where they lie in the GGUF as they are."""
        found = self._readers.get(name, ())
        target = found[0][0] if len(found) == 1 else None
        if target is None or target.ops or len(target.reads) != 1 or self.global_scale(target.name) is not None:
            return self.read(name)[start:stop]
        info = self.checkpoint.manifest[target.name]
        data, shape = self.checkpoint.read_rows(target.name, start, stop), (stop - start, *info.shape[1:])
        values = decoded(info.dtype.removeprefix("GGML:"), data, shape, name)
        return values.to(_DTYPES[self.manifest[name].dtype])


def for_targets(source: Source, targets: Iterable[str]) -> Source:
    """A source as the outputs need it: a GGUF keeps its own names when it goes to GGUF, and takes its checkpoint's otherwise.

    Raises:
        InputError: FB-E0403 when both kinds are asked of one GGUF.
    """
    kinds = {target.partition(":")[0] == "gguf" for target in targets}
    if not isinstance(source.checkpoint.manifest, GgufManifest) or kinds == {True}:
        return source
    if len(kinds) > 1:
        raise InputError(
            "FB-E0403", "a GGUF source goes to GGUF or to other formats, not to both in one run", file=source.root
        )
    return as_checkpoint(source)


def as_checkpoint(source: Source) -> Source:
    """A GGUF file under the names and shapes of the checkpoint that it was made of; any other source as it is."""
    return GgufAsCheckpoint(source) if isinstance(source.checkpoint.manifest, GgufManifest) else source


def open_gguf_as_checkpoint(path: str | Path) -> Source:
    """A GGUF file under its checkpoint's names."""
    from fewbit.run.source import open_source

    return GgufAsCheckpoint(open_source(path))
