"""Verify: proves that a checkpoint is whole, finite, decodes, and is what its config and its source say.

No loader protects its user: a quantised checkpoint that lacks a scale loads with a log line, or none, and gives garbage. So everything is
checked on the stored tensors:

    opens      headers, index and sizes, by the strict reader            config     every part that the config promises is there and has its shape
    skipped    a layer or expert of a kind that is quantised elsewhere   manifest   what `fewbit-manifest.json` recorded at writing
    finite     every stored number, every decoded weight                 codes      within their grid, scales that are not zero
    source     with a base: every tensor is there, and its signal to noise is what its scheme gives by plain rounding

How weights are held against the base is in `likeness.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fewbit.base.errors import FewbitError
from fewbit.eval.completeness import skipped
from fewbit.eval.findings import Finding, Findings, Verified
from fewbit.eval.likeness import Likeness, calibrated_tokens
from fewbit.formats.gguf import targets
from fewbit.formats.gguf.families import family_of, prepared
from fewbit.formats.kinds import kv_scale
from fewbit.num.grid import IntGrid
from fewbit.num.qtensor import QTensor, expand, values_of
from fewbit.num.scheme import Scheme, parse_scheme
from fewbit.run.gguf_source import GgufAsCheckpoint
from fewbit.run.kv import WHICH, attentions
from fewbit.run.source import Source, open_source

TILE = 1 << 24  # weights of a matrix that are compared at once
MANIFEST_NAME = "fewbit-manifest.json"


def verify(
    path: str | Path,
    base: str | Path | Source | None = None,
    *,
    engine: str | None = None,
    python: str | None = None,
    limit: int = 100,
) -> Verified:
    """Checks a checkpoint of any format; see the module's text.

    Args:
        path: folder or file.
        base: the float checkpoint that it was made from, open or as a path; without one nothing is said of its values.
        engine: a real loader that opens it in a process of its own, see `eval.engines`.
        python: interpreter of the environment that has the engine; None for our own.
        limit: findings of one kind after which counting stops.

    Raises:
        InputError: FB-E0120, FB-E0130, FB-E0131 when there is no such checkpoint.
    """
    place = Path(path)
    try:
        source = open_source(path)
    except FewbitError as error:
        if error.code in ("FB-E0120", "FB-E0130", "FB-E0131"):  # nothing is there to verify
            raise
        kind = "config" if error.code.startswith("FB-E06") else "opens"
        return Verified(place, findings=(Finding(kind, error.tensor or "", f"{error.message} ({error.code})"),))
    opened = None
    try:
        if base is not None and not isinstance(base, Source):
            base = opened = open_source(base)
        found = _verify(place, source, base, limit)
        return _with_engine(found, source, engine, python) if engine else found
    finally:
        source.close()
        if opened is not None:
            opened.close()


def _with_engine(found: Verified, source: Source, engine: str, python: str | None) -> Verified:
    """What a real loader says is one finding more, or a note."""
    from fewbit.eval.engines.check import open_with

    opened = open_with(engine, source, python=python)
    if opened.problem:
        return replace(
            found,
            findings=(*found.findings, Finding("engine", "", f"{opened.version or engine} {opened.problem}")),
        )
    note = f"{opened.version} loads it, {opened.difference:.2g} nats a token from the decoded weights"
    return replace(found, notes=(*found.notes, note))


def _verify(place: Path, source: Source, base: Source | None, limit: int) -> Verified:
    found = Findings(limit)
    notes: list[str] = []
    written = _own_manifest(place)
    _check_skipped(source, found)
    _check_cache(source, found)
    _check_manifest(source, written, found)
    held = source.format.container if source.format else "safetensors"
    like = Likeness(found, calibrated_tokens(written))
    comparable = None
    if (
        held == "gguf" and base is not None and source.manifest.keys().isdisjoint(base.manifest)
    ):  # not a GGUF made of a GGUF
        _compare_gguf(source, base, notes, like)
    else:
        comparable = _comparable(source, base, written, notes)
    dequantised = written.get("schemes") or {} if source.format is None else {}
    for name in _plain_names(source):
        tensor = source.checkpoint.read(name)
        _check_finite(name, tensor, found)
        if comparable is not None and name in comparable.manifest:
            if name in dequantised:
                like.hold(name, parse_scheme(dequantised[name]), tensor.float(), comparable.read(name))
            else:
                like.hold_kept(name, tensor, comparable.read(name))
    for name in source.stored:
        for q in _pieces(source, name, found):
            values = q.dequantize()
            sound = _check_codes(name, q, values, found)
            if sound and comparable is not None and name in comparable.manifest:
                like.hold(name, q.scheme, values, comparable.read(name))
    if comparable is not None:
        _check_names(source, comparable, found)
    return Verified(
        path=place,
        format=source.format.name if source.format else "",
        tensors=len(source.checkpoint.manifest),
        weights=len(source.stored),
        findings=tuple(found.items),
        compared=tuple(sorted(like.compared, key=lambda one: one.sqnr_db - one.expected_db)),
        notes=tuple(notes),
        warnings=like.warnings(),
    )


def _plain_names(source: Source) -> Iterator[str]:
    """Stored tensors that are no part of a quantised weight."""
    parts = {part for stored in source.stored.values() for part in stored.parts}
    return (name for name in source.checkpoint.manifest if name not in parts)


def _own_manifest(place: Path) -> dict[str, Any]:
    """What fewbit recorded at writing, or nothing."""
    file = (place if place.is_dir() else place.parent) / MANIFEST_NAME
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError):
        return {}


def _check_manifest(source: Source, written: dict[str, Any], found: Findings) -> None:
    schemes = written.get("schemes") or {}
    dense = str(written.get("format", "")).startswith("dense")
    comparable = not dense and (source.format is None or source.format.container == "safetensors")
    for name, spelling in schemes.items() if comparable else ():
        stored = source.stored.get(name)
        if stored is None:
            found.add("manifest", name, f"was written as {spelling} and is not stored quantised")
        elif str(stored.scheme) != spelling:
            found.add("manifest", name, f"was written as {spelling}, the config says {stored.scheme}")
    for name, facts in (written.get("files") or {}).items():
        file = (source.root if source.root.is_dir() else source.root.parent) / name
        if not file.is_file() or file.stat().st_size != facts.get("bytes"):
            found.add("manifest", "", f"{name} is not the {facts.get('bytes')} bytes that were written")


def _check_finite(name: str, tensor: torch.Tensor, found: Findings) -> bool:
    if not tensor.dtype.is_floating_point or tensor.numel() == 0:
        return True
    bad = ~torch.isfinite(tensor.float())
    count = int(bad.sum())
    if count:
        first = int(bad.flatten().nonzero()[0])
        found.add("finite", name, f"{count} of {tensor.numel()} values are NaN or infinite, the first at {first}")
    return not count


def _decoded(name: str, read: Callable[[], QTensor | None], found: Findings) -> QTensor | None:
    try:
        q = read()
        if q is not None:
            q.check(name)
        return q
    except FewbitError as error:
        kind = "finite" if "NaN" in error.message else "codes"
        found.add(kind, error.tensor or name, error.message)
        return None


def _pieces(source: Source, name: str, found: Findings) -> Iterator[QTensor]:
    """A stored weight decoded; a large matrix of a GGUF in tiles of rows; nothing, and a finding, where it cannot be."""
    stored, form = source.stored[name], source.format
    rows, step = stored.shape[0], max(1, TILE // max(1, stored.shape[-1]))
    if form is None or form.container != "gguf" or len(stored.shape) != 2 or step >= rows:
        reads = [lambda: source.qtensor(name)]
    else:
        reads = [partial(_rows, source, name, start, min(start + step, rows)) for start in range(0, rows, step)]
    for read in reads:
        q = _decoded(name, read, found)
        if q is not None:
            yield q


def _rows(source: Source, name: str, start: int, stop: int) -> QTensor:
    assert source.format is not None
    part = replace(source.stored[name], shape=(stop - start, source.stored[name].shape[-1]))
    return source.format.decode(name, lambda one: source.checkpoint.read_rows(one, start, stop), part)


def _check_codes(name: str, q: QTensor, values: torch.Tensor, found: Findings) -> bool:
    if not _check_finite(name, values, found):
        return False
    if q.scale is not None and q.scheme.value_shift is None and isinstance(q.scheme.grid, IntGrid):
        zero = values_of(q.scale) == 0
        if bool(zero.any()):  # as it must be for a block of zeros, a padding token's row; but then so are its codes
            lost = (expand(zero, q.scheme, q.shape).reshape(q.codes.shape) & (q.codes != 0)).sum()
            if int(lost):
                found.add(
                    "codes",
                    name,
                    f"{int(zero.sum())} of {zero.numel()} scales are zero, above {int(lost)} codes that are not",
                )
    return True


def _check_skipped(source: Source, found: Findings) -> None:
    for name, message in skipped(source.manifest, source.stored, source.checkpoint.config):
        found.add("skipped", name, message)


def _check_cache(source: Source, found: Findings) -> None:
    """Scales of cached keys and values: one of each for every attention where the config says that caches are quantised by them."""
    at = {kv_scale(name): name for name in source.checkpoint.manifest if kv_scale(name) is not None}
    for name in at.values():
        if not bool((source.checkpoint.read(name).float() > 0).all()):
            found.add("codes", name, "a scale of cached keys or values is not positive")
    settings = source.checkpoint.config.get("quantization_config") or {}
    promised = settings.get("kv_cache_scheme")
    if not isinstance(promised, dict) or promised.get("dynamic"):
        return
    if not at and settings.get("quant_method") != "compressed-tensors":
        return  # ModelOpt leaves out scales that are all one
    for module in attentions(source.manifest, source.config):
        for which in WHICH:
            if (module, which) not in at:
                found.add(
                    "config", f"{module}.{which}_scale", "is not stored, and the config promises a cache scaled by it"
                )


def _comparable(source: Source, base: Source | None, written: dict[str, Any], notes: list[str]) -> Source | None:
    """The base, if its tensors can be held against these one by one."""
    if base is None:
        notes.append("no base was given: values were not compared")
        return None
    rewrites = (written.get("recipe") or {}).get("rewrites")
    if rewrites:
        notes.append(
            f"the float model was rewritten ({', '.join(rewrites)}): values were not compared tensor by tensor"
        )
        return None
    shared = sum(name in base.manifest for name in source.manifest)
    if shared * 2 < len(source.manifest):
        notes.append(f"only {shared} of {len(source.manifest)} names are the base's: values were not compared")
        return None
    return base


def _compare_gguf(source: Source, base: Source, notes: list[str], like: Likeness) -> None:
    """The weights of a GGUF file, brought back under their checkpoint's names and layouts, against the base."""
    try:
        logical = GgufAsCheckpoint(source)
        here, towers = _names_here(logical, base)
    except FewbitError as error:
        notes.append(f"values were not compared: {error.message}")
        return
    if towers:
        notes.append(f"{len(towers)} tensors of the base are left out, as planned: {next(iter(towers))} …")
    for name in (name for name in base.manifest if name not in towers):
        if name not in here:
            if kv_scale(name) is None and not name.endswith(("rotary_emb.inv_freq", "attn.bias", "masked_bias")):
                like.found.add("source", name, "is in the base and not here")
            continue
        block = logical.made_of(here[name])
        if block in source.stored and len(base.manifest[name].shape) > 1:
            _compare_tiles(name, here[name], source.stored[block].scheme, logical, base, like)
        else:
            like.hold_kept(name, logical.read(here[name]), base.read(name))


def _names_here(logical: GgufAsCheckpoint, base: Source) -> tuple[dict[str, str], dict[str, None]]:
    """(name in the base -> name in the GGUF's checkpoint, what the plan left out): the two differ where the base holds towers beside the text part."""
    if not isinstance(base.config.get("text_config"), dict):
        return {name: name for name in base.manifest if name in logical.manifest}, {}
    family = family_of(base.config)
    planned = {
        target.name: target.reads for target in targets.expand(base.manifest, prepared(base.config, family), family)[0]
    }
    pairs = [
        pair for name, reads in logical.reads().items() for pair in zip(planned.get(name, ()), reads, strict=False)
    ]
    used = {name for reads in planned.values() for name in reads}
    return dict(pairs), {name: None for name in base.manifest if name not in used}


def _compare_tiles(name: str, here: str, scheme: Scheme, logical: Source, base: Source, like: Likeness) -> None:
    """One weight of a GGUF; a large matrix in tiles of rows."""
    shape = base.manifest[name].shape
    step = shape[0] if len(shape) != 2 or base.manifest[name].numel <= TILE else max(1, TILE // shape[1])
    if step >= shape[0] or logical.manifest[here].shape != shape:
        like.hold(name, scheme, logical.read(here).float(), base.read(name))
        return
    ends = ((start, min(start + step, shape[0])) for start in range(0, shape[0], step))
    rows = ((logical.read_rows(here, *pair).float(), base.read_rows(name, *pair).float()) for pair in ends)
    like.hold_tiles(name, scheme, rows)


def _check_names(source: Source, base: Source, found: Findings) -> None:
    tied = bool(source.config.get("tie_word_embeddings"))
    for name, info in base.manifest.items():
        if kv_scale(name) is not None:
            continue  # under another name in some formats, and of no use to others
        if name not in source.manifest:
            if not (tied and "lm_head" in name) and not name.endswith(
                ("rotary_emb.inv_freq", "attn.bias", "masked_bias")
            ):
                found.add("source", name, "is in the base and not here")
        elif name not in source.stored and source.manifest[name].shape != info.shape:
            found.add("source", name, f"has shape {list(source.manifest[name].shape)}, the base {list(info.shape)}")
