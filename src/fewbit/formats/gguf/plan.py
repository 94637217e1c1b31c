"""A whole GGUF, planned from a manifest, a config and the tokeniser's files: no tensor is read and torch is not imported.

plan = gguf_plan(manifest, config, files, "Q4_K_M")
plan.tensors        what to write: name, sources, ops, shape, type, scheme, reason
plan.metadata       all keys of the file
plan.layout_rows()  for store.gguf_layout.lay_out_gguf
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from fewbit.base.errors import FewbitError, InputError, Refusals
from fewbit.formats.gguf import metadata as meta
from fewbit.formats.gguf.families import Family, check_config, family_of, model_metadata, prepared
from fewbit.formats.gguf.metadata import GgufManifest, Metadata
from fewbit.formats.gguf.recipes import Choice, ModelFacts, Recipe, choose, quantisable, recipe_named
from fewbit.formats.gguf.targets import Info, Target, expand
from fewbit.formats.gguf.types import FLOATS, TYPES, block_type
from fewbit.formats.gguf.vocabulary import Vocabulary, read_vocabulary
from fewbit.num.scheme import Scheme, parse_scheme

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the file.

    Attributes:
        name: GGUF name.
        reads, ops, shape, dtype, values: see `targets.Target`.
        type: GGML type name.
        scheme: the same as a scheme; None for F32, F16 and BF16, and for blocks of a GGUF that are copied as they are.
        reason: why this type.
        needs_imatrix: whether the type is useless without an importance matrix, and none was announced.
    """

    name: str
    reads: tuple[str, ...]
    ops: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    type: str
    scheme: Scheme | None
    reason: str
    values: tuple[float, ...] = ()
    needs_imatrix: bool = False

    @property
    def nbytes(self) -> int:
        row = block_type(self.type)
        return prod(self.shape) // row.block * row.nbytes


@dataclass(frozen=True)
class GgufPlan:
    """Everything that decides the bytes of a GGUF except the weights.

    Attributes:
        architecture: llama.cpp's name for it.
        recipe: how types were chosen.
        tensors: in file order.
        metadata: all keys, typed.
        notes: what is worth saying to the user.
    """

    architecture: str
    recipe: Recipe
    tensors: tuple[PlannedTensor, ...]
    metadata: Metadata
    notes: tuple[str, ...]

    def layout_rows(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """(name, type, shape) of each tensor, for the layout."""
        return ((tensor.name, tensor.type, tensor.shape) for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def gguf_plan(
    manifest: Mapping[str, Info],
    config: Mapping[str, Any],
    files: Mapping[str, bytes],
    recipe: str = "Q4_K_M",
    overrides: Mapping[str, str] | None = None,
    *,
    imatrix: bool = False,
    name: str = "model",
    pre: str | None = None,
    global_scales: bool = False,
) -> GgufPlan:
    """Plans the conversion and quantisation of a Hugging Face checkpoint.

    Args:
        manifest: source tensors: name -> dtype and shape.
        config: config.json as plain data.
        files: contents of the tokeniser files by name (see `vocabulary.FILES`); without any, the file carries no vocabulary.
        recipe: a recipe of llama-quantize, or `pure-TYPE`.
        overrides: pattern of GGUF names -> type; the first that matches wins.
        imatrix: whether there will be an importance matrix; types that need one are marked otherwise.
        name: for general.name.
        pre: name of the pre-tokeniser, where the user knows better than fewbit.
        global_scales: whether NVFP4 tensors get a scale over all their blocks, as a tensor of its own beside them.

    Raises:
        InputError: FB-E0320 .. FB-E0324, FB-E0330; several at once as `Refusals`.
    """
    if isinstance(manifest, GgufManifest):
        plan = requantised(manifest, recipe, overrides, imatrix=imatrix)
        return with_global_scales(plan) if global_scales else plan
    family = family_of(config)
    names = prepared(config, family)
    refused: list[FewbitError] = []

    def attempt(step: Any) -> Any:
        try:
            return step()
        except InputError as error:
            refused.append(error)
            return None

    chosen = attempt(lambda: recipe_named(recipe))
    attempt(lambda: check_config(names, family))
    own = attempt(lambda: model_metadata(names, family))
    expanded = attempt(lambda: expand(manifest, names, family))
    if expanded is None or own is None:
        raise _all(refused)
    targets = expanded[0]
    rows = next(target.shape[0] for target in targets if target.name == "token_embd.weight")
    vocabulary = attempt(lambda: _vocabulary(files, names, family, rows, pre))
    facts = model_facts(own, family.name)
    shapes = [(target.name, target.shape) for target in targets]
    types = chosen and attempt(lambda: choose(shapes, chosen, facts, overrides, imatrix))
    if refused:
        raise _all(refused)
    plan = _assembled(name, family, chosen, names, own, expanded, types, vocabulary)
    return with_global_scales(plan) if global_scales else plan


def _assembled(
    name: str,
    family: Family,
    chosen: Recipe,
    names: Mapping[str, Any],
    own: Metadata,
    expanded: tuple[tuple[Target, ...], tuple[str, ...]],
    types: Mapping[str, Choice],
    vocabulary: Vocabulary | None,
) -> GgufPlan:
    """The plan of what was decided."""
    targets, notes = expanded
    rows = next(target.shape[0] for target in targets if target.name == "token_embd.weight")
    metadata = (
        {"general.architecture": meta.text(family.name)}
        | _general(name, chosen, targets)
        | own
        | _token_metadata(vocabulary, family, names, rows)
    )
    tensors = tuple(_planned(target, types[target.name]) for target in targets)
    silent = ["no tokeniser was found: the file has no vocabulary and answers token ids only"] * (vocabulary is None)
    return GgufPlan(
        family.name, chosen, tensors, metadata, (*notes, *silent, *(vocabulary.notes if vocabulary else ()))
    )


def global_scale_name(name: str) -> str:
    """Where the scale over all blocks of an NVFP4 tensor lies: one number, or one per expert."""
    return name.removesuffix("weight") + "scale"


def with_global_scales(plan: GgufPlan) -> GgufPlan:
    """The plan with a scale over the whole tensor beside every NVFP4 tensor that has none: E4M3 alone is too coarse for small weights."""
    held = {tensor.name for tensor in plan.tensors}
    made: list[PlannedTensor] = []
    for tensor in plan.tensors:
        beside = global_scale_name(tensor.name)
        if tensor.type == "NVFP4" and tensor.scheme is not None and beside not in held:
            made.append(replace(tensor, scheme=parse_scheme("nvfp4")))
            count = prod(tensor.shape[:-2])
            made.append(PlannedTensor(beside, (), (), (count,), "F32", "F32", None, "scale over the whole tensor"))
        else:
            made.append(tensor)
    return replace(plan, tensors=tuple(made))


def _all(refused: list[FewbitError]) -> FewbitError:
    return refused[0] if len(refused) == 1 else Refusals(refused)


def requantised(
    manifest: GgufManifest, recipe: str = "Q4_K_M", overrides: Mapping[str, str] | None = None, *, imatrix: bool = False
) -> GgufPlan:
    """Plans another GGUF of a GGUF, of whatever architecture: the same tensors and metadata, other types.

    Tensors that llama.cpp never quantises keep their type; so does every tensor that the recipe would store in more bits than it has. What
    keeps its type is copied byte for byte: it has no scheme in the plan.

    Raises:
        InputError: FB-E0312 for a file that names no architecture, FB-E0324 and FB-E0330 for words that do not exist.
    """
    chosen, own = recipe_named(recipe), manifest.typed
    if "general.architecture" not in own or own["general.architecture"].spelling != "str":
        raise InputError("FB-E0312", "the GGUF names no architecture (general.architecture), so it is no model")
    architecture = str(own["general.architecture"].data)
    kind = str(own["general.type"].data) if "general.type" in own else "model"
    if kind != "model" or architecture == "clip":
        what = f"the GGUF is a{'n' * (kind[:1] in 'aei')} {'projector (mmproj)' if architecture == 'clip' else kind}, not a language model"
        raise InputError(
            "FB-E0320", what, remedy="give the language model's own GGUF; llama.cpp keeps projectors in F16"
        )
    shapes = [(info.name, info.shape) for info in manifest.values()]
    types = choose(shapes, chosen, model_facts(own, architecture), overrides, imatrix)
    tensors = []
    for info in manifest.values():
        choice, held = types[info.name], info.dtype.removeprefix("GGML:")
        if held not in TYPES:
            raise InputError("FB-E0310", f"tensors of type {held} can be listed but not converted", tensor=info.name)
        if not quantisable(info.name, info.shape):
            choice = Choice(held, choice.reason)
        elif TYPES[held].bits < TYPES[choice.type].bits and choice.reason != "by override":
            choice = Choice(held, f"kept: {choice.type} would take more bits and gain nothing")
        planned = _planned(Target(info.name, (info.name,), (), info.shape, info.dtype), choice)
        tensors.append(replace(planned, scheme=None) if held == choice.type else planned)
    changed = {
        "general.quantization_version": meta.u32(QUANTIZATION_VERSION),
        "general.file_type": meta.u32(chosen.file_type),
    }
    return GgufPlan(architecture, chosen, tuple(tensors), own | changed, ())


def model_facts(own: Metadata, architecture: str) -> ModelFacts:
    """What recipes ask of a model, from its metadata."""

    def number(key: str, default: int) -> int:
        value = own.get(f"{architecture}.{key}")
        if value is None or (value.is_array and not len(value.data)):
            return default
        return int(value.data[0] if value.is_array else value.data)

    heads = number("attention.head_count", 1)
    shared = number("attention.head_count_kv", heads)
    return ModelFacts(
        architecture, number("block_count", 0), number("expert_count", 0), heads // shared if shared else 0
    )


def _vocabulary(
    files: Mapping[str, bytes], names: Mapping[str, Any], family: Family, rows: int, pre: str | None
) -> Vocabulary | None:
    if not any(name in files for name in ("tokenizer.json", "tokenizer.model")):
        return None
    return read_vocabulary(files, names, family.vocab, rows, pre)


def _token_metadata(vocabulary: Vocabulary | None, family: Family, names: Mapping[str, Any], rows: int) -> Metadata:
    found = vocabulary.metadata() if vocabulary else {"tokenizer.ggml.model": meta.text("no_vocab")}
    if vocabulary is None:
        found[f"{family.name}.vocab_size"] = meta.u32(rows)
    if {"wpm", "ugm"} & set(family.vocab) and vocabulary is not None:
        found["tokenizer.ggml.token_type_count"] = meta.u32(names.get("type_vocab_size") or 1)
    return found


def _general(name: str, recipe: Recipe, targets: tuple[Target, ...]) -> Metadata:
    total = sum(prod(target.shape) for target in targets if target.reads)
    found = {
        "general.type": meta.text("model"),
        "general.name": meta.text(name),
        "general.size_label": meta.text(size_label(total)),
    }
    found["general.quantized_by"] = meta.text("fewbit")
    found["general.quantization_version"] = meta.u32(QUANTIZATION_VERSION)
    return found | {"general.file_type": meta.u32(recipe.file_type)}


def size_label(weights: int) -> str:
    """Weights in the way model names count them: 7.2B, 270M."""
    for unit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if weights >= unit:
            return f"{weights / unit:.1f}{suffix}" if weights < 10 * unit else f"{weights / unit:.0f}{suffix}"
    return f"{weights / 1e3:.0f}K"


def _planned(target: Target, choice: Choice) -> PlannedTensor:
    row = block_type(choice.type)
    return PlannedTensor(
        name=target.name,
        reads=target.reads,
        ops=target.ops,
        shape=target.shape,
        dtype=target.dtype,
        type=choice.type,
        scheme=None if choice.type in FLOATS else row.scheme,
        reason=choice.reason,
        values=target.values,
        needs_imatrix=choice.needs_imatrix,
    )
