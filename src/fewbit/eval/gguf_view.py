"""A GGUF file as the checkpoint that it was made from: the base says which tensors there are, the GGUF what they hold.

The GGUF architecture table knows how each GGUF tensor is made of the checkpoint's (permuted, stacked, transposed, shifted); here that is
undone. So a GGUF runs through the same model code as its base, under the base's tokenizer and config.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fewbit.arch.infer import facts
from fewbit.base.errors import InputError
from fewbit.base.manifest import Manifest
from fewbit.formats.gguf.encode import checkpoint_tensor, decoded, users
from fewbit.formats.gguf.families import family_of, prepared
from fewbit.formats.gguf.plan import global_scale_name
from fewbit.formats.gguf.targets import Target, expand
from fewbit.run.rewrites import untied
from fewbit.run.source import Source
from fewbit.store.checkpoint import Checkpoint


class GgufView:
    """Bears the names of `run.source.Source`.

    Attributes:
        checkpoint: the GGUF. base: the checkpoint whose tensors it is read as.
    """

    def __init__(self, checkpoint: Checkpoint, base: Source) -> None:
        """Raises InputError FB-E0805 when the GGUF lacks tensors that the base's architecture has."""
        self.checkpoint, self.base = checkpoint, base
        self.config: dict[str, Any] = base.config
        self.manifest: Manifest = base.manifest
        known = facts(base.manifest, base.config)
        roles = {item.role: name for name, item in known.items()}
        if (
            "output.weight" in checkpoint.manifest and "head" not in roles and "embed" in roles
        ):  # a rotated model, its head untied
            self.manifest, self.config = untied(base.manifest, base.config, roles["embed"])
        self.root = checkpoint.root
        self.stored: dict[str, Any] = {}
        self.format = None
        family = family_of(base.config)
        targets, _ = expand(self.manifest, prepared(self.config, family), family)
        missing = [target.name for target in targets if target.reads and target.name not in checkpoint.manifest]
        if missing:
            what = f"the GGUF lacks {len(missing)} tensors of the base's architecture {family.name}, e.g. {', '.join(missing[:3])}"
            raise InputError("FB-E0805", what, file=self.root)
        self.targets: dict[str, Target] = {target.name: target for target in targets}
        self._check_shapes()

    def _check_shapes(self) -> None:
        for name, target in self.targets.items():
            if target.reads and tuple(self.checkpoint.manifest[name].shape) != tuple(target.shape):
                what = f"the GGUF has {list(self.checkpoint.manifest[name].shape)}, the base makes {list(target.shape)}"
                raise InputError("FB-E0805", what, tensor=name, file=self.root)

    @cached_property
    def _readers(self) -> Mapping[str, Any]:
        return users([target for target in self.targets.values() if target.reads])

    def kind(self, name: str) -> str:
        """The GGML types that a tensor of the base is stored as, e.g. "Q4_K"."""
        found = self._readers.get(name, ())
        return "+".join(
            sorted({self.checkpoint.manifest[target.name].dtype.removeprefix("GGML:") for target, _ in found})
        )

    def _values(self, name: str) -> torch.Tensor:
        info = self.checkpoint.manifest[name]
        values = decoded(info.dtype.removeprefix("GGML:"), self.checkpoint.read(name), info.shape, name)
        beside = global_scale_name(name)
        if info.dtype != "GGML:NVFP4" or beside not in self.checkpoint.manifest:
            return values
        over = self.checkpoint.read(beside).float()
        return values * (over.reshape(-1, 1, 1) if values.ndim == 3 else over)

    def read(self, name: str) -> torch.Tensor:
        """A tensor of the base as the GGUF holds it, float32."""
        return checkpoint_tensor(name, self._readers, self._values)

    def fingerprint(self) -> str:
        return self.checkpoint.fingerprint()

    @property
    def quantised(self) -> bool:
        """Whether any tensor is stored in blocks."""
        return any(info.dtype.startswith("GGML:") for info in self.checkpoint.manifest.values())

    def close(self) -> None:
        self.checkpoint.close()

    def __enter__(self) -> GgufView:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_candidate(path: str | Path, base: Source) -> Source | GgufView:
    """A candidate of any format, for reading as the base's tensors; headers only.

    Raises:
        InputError: in the FB-E01xx … FB-E03xx range; FB-E0805 for a GGUF of another model.
    """
    from fewbit.run.source import open_source
    from fewbit.store.checkpoint import open_checkpoint

    file = Path(path).expanduser()
    if file.is_file() or file.is_dir():
        checkpoint = open_checkpoint(file)
        if is_gguf(checkpoint):
            return GgufView(checkpoint, base)
        checkpoint.close()
    return open_source(path)


def is_gguf(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint lies in GGUF files."""
    return (
        any(info.file.endswith(".gguf") for info in checkpoint.manifest.values())
        or "general.architecture" in checkpoint.manifest.metadata
    )
