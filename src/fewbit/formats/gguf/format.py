"""GGUF as a format: weights by their GGUF names, one stored tensor each, its rows as bytes of blocks.

What a whole file holds (names, permutations, stacked experts, metadata) is planned in `plan.py`; this row of the table serves
everything that looks at weights one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from fewbit.base.manifest import Manifest
from fewbit.formats.gguf.types import FLOATS, block_type, type_of
from fewbit.formats.table import Assignment, Format, Parts, Stored
from fewbit.num.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from fewbit.num.qtensor import QTensor

PREFIX = "GGML:"


def accepts(scheme: Scheme, shape: tuple[int, ...]) -> str | None:
    """A scheme that is one of ggml's block types, on rows that are whole blocks."""
    row = type_of(scheme)
    if row is None:
        return f"GGUF has no block type that stores {scheme}; it has q4_0 … q8_0, q2_k … q6_k, the i-quants, tq1_0, tq2_0, mxfp4, nvfp4"
    return row.accepts(shape)


def parts(name: str, scheme: Scheme, shape: tuple[int, ...]) -> Parts:
    """The bytes of the rows, uint8 [..., bytes per row]."""
    row = type_of(scheme)
    assert row is not None, "accepts comes first"
    return {name: ("U8", (*shape[:-1], row.row_bytes(shape[-1])))}


def encode(name: str, q: QTensor) -> dict[str, torch.Tensor]:
    from fewbit.formats.gguf.codecs import to_blocks

    row = type_of(q.scheme)
    assert row is not None, "accepts comes first"
    return {name: to_blocks(row.name, q)}


def decode(name: str, read: Callable[[str], torch.Tensor], stored: Stored) -> QTensor:
    from fewbit.formats.gguf.codecs import from_blocks

    return from_blocks(stored.facts["type"], read(name), stored.shape)


def config(source: dict[str, Any], assignment: Assignment) -> tuple[dict[str, Any], dict[str, Any]]:
    """GGUF carries its metadata itself."""
    return {}, {}


def detect(config: Mapping[str, Any], manifest: Manifest) -> dict[str, Stored] | None:
    """The block tensors of a GGUF file, by GGUF name; None for anything but a GGUF file."""
    if "general.architecture" not in manifest.metadata and not any(
        info.dtype.startswith(PREFIX) for info in manifest.values()
    ):
        return None
    found = {}
    for name, info in manifest.items():
        kind = info.dtype.removeprefix(PREFIX)
        if info.dtype.startswith(PREFIX) and kind not in FLOATS:
            found[name] = Stored(block_type(kind).scheme, info.shape, (name,), {"type": kind})
    return found


FORMAT = Format(
    name="gguf",
    summary="llama.cpp, Ollama, LM Studio: one file; a recipe (Q4_K_M …) or pure-TYPE",
    container="gguf",
    default_scheme="Q4_K_M",
    engines=("llama.cpp", "ollama", "lm studio"),
    accepts=accepts,
    parts=parts,
    encode=encode,
    decode=decode,
    config=config,
    detect=detect,
    options={"split": ("true", "false"), "pre": ()},
)
