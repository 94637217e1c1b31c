"""What each tensor of a checkpoint is, from its name and shape and the architecture data: no module classes are walked.

Every tensor gets a role. Roles of matrices that an engine multiplies by are quantised by default; embeddings, heads, norms,
routers, biases, positions, convolutions and the towers of models that also see or hear are kept, and the plan says so for each. A tensor that no row knows is a linear layer
when it is a matrix or a stack of matrices, else a vector: nothing is skipped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fewbit.arch.spec import KEPT_ROLES, Family, Row, families, family_of
from fewbit.base.manifest import Manifest, TensorInfo
from fewbit.base.names import layer_index

# the parts of a composite model that see or hear, and what joins them to the language part
_TOWER = re.compile(
    r"(^|\.)((vision|visual|image|audio|speech)\w*|multi_modal_projector|mm_projector|modality_projection|connector|embed_vision|embed_audio)\."
)

FUSED_SPACES = ("attn_in", "mlp_in")


@dataclass(frozen=True)
class TensorFacts:
    """What is known of one tensor.

    Attributes:
        role: see `arch.spec`.
        layer: index of its block, or None outside the blocks.
        reads, writes: named spaces, "" where unknown.
        transposed: stored [in, out] instead of [out, in].
        stacked: stored as [experts, out, in].
        known: whether a row of the architecture data named it (else its shape decided).
    """

    role: str
    layer: int | None = None
    reads: str = ""
    writes: str = ""
    transposed: bool = False
    stacked: bool = False
    known: bool = True

    @property
    def kept(self) -> bool:
        """Whether it stays in high precision by default."""
        return self.role in KEPT_ROLES

    def matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape as [..., out, in], whatever way round it is stored."""
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape


def model_type_of(config: Mapping[str, Any]) -> str:
    """config.json's model_type; of the text part for composite models."""
    inner = config.get("text_config")
    if isinstance(inner, Mapping) and inner.get("model_type"):
        return str(inner["model_type"])
    return str(config.get("model_type", ""))


def family_for(config: Mapping[str, Any]) -> Family | None:
    """Architecture data for a config, or None: then names and shapes alone decide and rewrites are off."""
    return family_of(model_type_of(config))


def facts(manifest: Manifest, config: Mapping[str, Any]) -> dict[str, TensorFacts]:
    """Facts about every tensor of a checkpoint, in manifest order."""
    family = family_for(config)
    towers = _towers(manifest)
    found = {}
    for name, info in manifest.items():
        known = _facts_of(info, family)
        found[name] = replace(known, role="tower") if name in towers and not known.kept else known
    return found


def _towers(manifest: Manifest) -> frozenset[str]:
    """Tensors of vision and audio towers beside a language model; none where they are most of the model (CLIP, Whisper, ViT): there they are it."""
    found = frozenset(name for name in manifest if _TOWER.search(name))
    inside = sum(manifest[name].numel for name in found)
    return found if 2 * inside < sum(info.numel for info in manifest.values()) else frozenset()


def _facts_of(info: TensorInfo, family: Family | None) -> TensorFacts:
    row = (family.row(info.name) if family else None) or families()["generic"].row(info.name)
    if row is not None and _plausible(row, info):
        return TensorFacts(
            role=row.role,
            layer=layer_index(info.name),
            reads=row.reads if family else "",
            writes=row.writes if family else "",
            transposed=row.transposed,
            stacked=len(info.shape) == 3 and row.role not in KEPT_ROLES,
        )
    return TensorFacts(
        role=_role_by_shape(info), layer=layer_index(info.name), stacked=len(info.shape) == 3, known=False
    )


def _plausible(row: Row, info: TensorInfo) -> bool:
    """A row that names a matrix must meet a matrix."""
    return row.role in KEPT_ROLES or len(info.shape) in (2, 3)


def _role_by_shape(info: TensorInfo) -> str:
    if not info.dtype.startswith(("F", "BF", "GGML")):
        return "buffer"
    if len(info.shape) <= 1 or 1 in info.shape[-2:]:
        return "vector"
    return "linear" if len(info.shape) in (2, 3) else "conv"
