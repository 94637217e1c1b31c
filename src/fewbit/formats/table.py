"""What a format is, and the hand-written table of all of them.

A format says how a `QTensor` lies on disk: which stored tensors, of which dtypes, packed in which order, and what the config
tells a loader. It is a handful of pure functions; it never opens a file and never rounds a weight.

    parts(name, scheme, shape)   -> {stored name: (dtype, shape)}      from shapes alone, so a file can be laid out beforehand
    encode(name, q)              -> {stored name: Tensor}              exactly what `parts` promised
    decode(name, read, stored)   -> QTensor                            the inverse, code for code
    detect(config, manifest)     -> {weight name: Stored} | None       recognise somebody's checkpoint
    accepts(scheme, shape)       -> None | reason                      a sentence: what was given, what is needed

Adding a format is one new file with these functions and one row here (see docs/adding_a_format.md).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fewbit.base.errors import InputError
from fewbit.base.manifest import Manifest
from fewbit.num.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from fewbit.num.qtensor import QTensor

Parts = dict[str, tuple[str, tuple[int, ...]]]
"""Stored tensors of one weight: name -> (safetensors dtype, shape)."""


@dataclass(frozen=True)
class Stored:
    """Where one quantised weight lies in a checkpoint that was recognised.

    Attributes:
        scheme: how it is stored.
        shape: shape of the weight it stands for, in the layout of the float checkpoint ([out, in] for linear layers).
        parts: names of the stored tensors that make it up.
        facts: what else decoding needs to know, e.g. {"version": 1} for GPTQ zero points.
    """

    scheme: Scheme
    shape: tuple[int, ...]
    parts: tuple[str, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Assignment:
    """What a plan decided for the weights of one output, as a format's config needs it.

    Attributes:
        schemes: weight name -> scheme for quantised weights.
        kept: names of two- or more-dimensional weights that stay in high precision.
        solver: name of the solver, for the record.
        options: format options the user gave, e.g. {"version": "v2"}.
        stacks: shapes of the quantised weights that are stacks of matrices [experts, rows, cols].
        kv: whether FP8 scales of cached keys and values are stored, for formats that have a place for them.
    """

    schemes: Mapping[str, Scheme]
    kept: tuple[str, ...] = ()
    solver: str = "rtn"
    options: Mapping[str, Any] = field(default_factory=dict)
    stacks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    kv: bool = False


@dataclass(frozen=True)
class Format:
    """One on-disk convention; the functions are described at the top of this file.

    Attributes:
        name: as the user types it after `--to`.
        summary: one line for `fewbit formats`.
        container: "safetensors" (a directory of shards) or "gguf" (one file).
        default_scheme: used when the user gives none after the colon.
        engines: what loads it, for `fewbit formats` and the advisor.
        config: (source config, Assignment) -> (new config.json, {file name: JSON data} written beside it).
        one_scheme: whether all quantised weights of a checkpoint must have the same scheme, as the config has room for one.
        ordered: whether columns may be stored in an order of their own (GPTQ's g_idx).
        kv_scale: (attention module, "k" or "v") -> name of the stored scale of cached keys or values; None where the format has no place for one.
        conform: (scheme, model dtype) -> the scheme as this format stores it (e.g. scales in the model's dtype).
        options: what may follow the scheme in a target: name -> the words that it may be, none for any word.
    """

    name: str
    summary: str
    container: str
    default_scheme: str
    engines: tuple[str, ...]
    accepts: Callable[[Scheme, tuple[int, ...]], str | None]
    parts: Callable[[str, Scheme, tuple[int, ...]], Parts]
    encode: Callable[[str, QTensor], dict[str, torch.Tensor]]
    decode: Callable[[str, Callable[[str], torch.Tensor], Stored], QTensor]
    config: Callable[[dict[str, Any], Assignment], tuple[dict[str, Any], dict[str, Any]]]
    detect: Callable[[dict[str, Any], Manifest], dict[str, Stored] | None]
    conform: Callable[[Scheme, str], Scheme] = lambda scheme, dtype: scheme
    one_scheme: bool = False
    ordered: bool = False
    kv_scale: Callable[[str, str], str] | None = None
    options: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


# name -> module that defines FORMAT (or module:NAME of the row); the order is the order of detection and of `fewbit formats`
_ROWS: dict[str, str] = {
    "gguf": "fewbit.formats.gguf.format",
    "compressed-tensors": "fewbit.formats.compressed",
    "gptq": "fewbit.formats.gptq",
    "gptq-v2": "fewbit.formats.gptq:V2",
    "awq": "fewbit.formats.awq",
    "bitsandbytes": "fewbit.formats.bnb",
    "fp8": "fewbit.formats.fp8",
    "modelopt": "fewbit.formats.modelopt",
    "mlx": "fewbit.formats.mlx",
    "hqq": "fewbit.formats.hqq",
    "auto-round": "fewbit.formats.autoround",
    "dense": "fewbit.formats.dense",
    "dense-f16": "fewbit.formats.dense:F16",
    "dense-f32": "fewbit.formats.dense:F32",
}


def format_names() -> tuple[str, ...]:
    """All formats in table order."""
    return tuple(_ROWS)


def format_named(name: str) -> Format:
    """A format by name.

    Raises:
        InputError: FB-E0604 with the names that exist.
    """
    if name not in _ROWS:
        raise InputError("FB-E0604", f"no format is called {name!r}; there are {', '.join(_ROWS)}")
    module, _, row = _ROWS[name].partition(":")
    return getattr(importlib.import_module(module), row or "FORMAT")


def check_options(form: Format, options: Mapping[str, str]) -> None:
    """
    Raises:
        InputError: FB-E0403 for an option that a target's format does not have, or a word that it cannot be.
    """
    for name, word in options.items():
        if name not in form.options:
            has = f"it has {', '.join(form.options)}" if form.options else "it has none"
            raise InputError("FB-E0403", f"format {form.name} has no option {name!r}; {has}")
        words = form.options[name]
        if words and word not in words:
            raise InputError("FB-E0403", f"option {name} of format {form.name} is {' or '.join(words)}, got {word!r}")


def detect(config: dict[str, Any], manifest: Manifest) -> tuple[Format, dict[str, Stored]] | None:
    """The format of a checkpoint and its quantised weights, or None when it holds plain weights only."""
    for name in _ROWS:
        found = format_named(name)
        stored = found.detect(config, manifest)
        if stored is not None:
            return found, stored
    return None
