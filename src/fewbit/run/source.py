"""A checkpoint as the float tensors it stands for, whatever format it is stored in.

`Source` puts a logical view over a `Checkpoint`: a quantised weight that lies in four tensors on disk is one tensor here, under the
name it had in the float checkpoint. Everything above (engine, eval, verify, convert) reads models through it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from fewbit.base.errors import InputError
from fewbit.base.manifest import Manifest, TensorInfo, data_bytes
from fewbit.formats.experts import KEY as STACKED
from fewbit.formats.table import Format, Stored, detect
from fewbit.num.qtensor import QTensor
from fewbit.store.checkpoint import Checkpoint, open_checkpoint

DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "fp32": "F32", "fp16": "F16", "bf16": "BF16"}
CONFIG_KEYS = ("quantization_config", "quantization", STACKED)


class Source:
    """The float tensors that a checkpoint stands for.

    Attributes:
        checkpoint: what lies on disk.
        manifest: logical tensors; a quantised weight appears under its float name with the model's dtype.
        config: config.json without its quantisation part.
        format: the format that was recognised, or None for a plain checkpoint.
        stored: weight name -> where and how it is stored, for the quantised ones.
        small_files: JSON files that stand for what the checkpoint says of itself in another way (a GGUF's tokenizer), by name.
        does, warnings: what is done to the stored model before it is read, in sentences.
    """

    small_files: Mapping[str, Any] = MappingProxyType({})
    does: Sequence[str] = ()
    warnings: Sequence[str] = ()

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        found = detect(checkpoint.config, checkpoint.manifest)
        self.format: Format | None = found[0] if found else None
        self.stored: dict[str, Stored] = found[1] if found else {}
        self.config: dict[str, Any] = {key: value for key, value in checkpoint.config.items() if key not in CONFIG_KEYS}
        self.manifest = self._logical(checkpoint.manifest) if self.stored else checkpoint.manifest

    @property
    def root(self) -> Path:
        return self.checkpoint.root

    @property
    def quantised(self) -> bool:
        """Whether any weight is stored quantised."""
        return bool(self.stored)

    def _logical(self, manifest: Manifest) -> Manifest:
        dtype = DTYPE_NAMES.get(str(self.config.get("torch_dtype") or self.config.get("dtype") or "bfloat16"), "BF16")
        parts = {part for stored in self.stored.values() for part in stored.parts}
        tensors = {name: info for name, info in manifest.items() if name not in parts}
        for name, stored in self.stored.items():
            first = manifest[stored.parts[0]]
            tensors[name] = TensorInfo(name, dtype, stored.shape, data_bytes(dtype, stored.shape), first.file)
        return replace(manifest, tensors=tensors)  # keeps what a GGUF's manifest knows besides

    def qtensor(self, name: str) -> QTensor | None:
        """The weight as it is stored, or None when it is not quantised."""
        stored = self.stored.get(name)
        if stored is None or self.format is None:
            return None
        return self.format.decode(name, self.checkpoint.read, stored)

    def read(self, name: str) -> torch.Tensor:
        """The tensor: as stored when it is plain, decoded to float32 when it is quantised."""
        q = self.qtensor(name)
        if q is not None:
            return q.dequantize()
        if name not in self.manifest:
            raise InputError("FB-E0112", f"the checkpoint has no tensor {name!r}", tensor=name, file=self.root)
        return self.checkpoint.read(name)

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the first dimension, as `read` gives them."""
        return self.read(name)[start:stop] if name in self.stored else self.checkpoint.read_rows(name, start, stop)

    def decide(self, run: Any) -> None:
        """Finds what must be known before anything is solved, given the run's text and journal; nothing for a source that is what lies on disk."""

    def fingerprint(self) -> str:
        return self.checkpoint.fingerprint()

    def close(self) -> None:
        self.checkpoint.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_source(path: str | Path, *, revision: str | None = None) -> Source:
    """Opens a checkpoint of any format for reading as floats; headers only.

    Raises:
        InputError: in the FB-E01xx … FB-E03xx range.
    """
    return Source(open_checkpoint(path, revision=revision))
