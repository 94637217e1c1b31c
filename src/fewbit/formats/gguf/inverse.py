"""A GGUF read as the Hugging Face checkpoint it was made from, with nothing but the file: config, names, shapes, and the ops to undo.

Goes the rows of `families.toml` backwards. Of an architecture whose table has no way back, and of rotary factors that no known rule gives,
it says so instead of guessing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fewbit.base.errors import InputError
from fewbit.base.manifest import Manifest, TensorInfo, data_bytes
from fewbit.formats.gguf.expressions import evaluate, first
from fewbit.formats.gguf.families import Family, family_named, prepared
from fewbit.formats.gguf.metadata import GgufManifest, Metadata
from fewbit.formats.gguf.shapes import parse
from fewbit.formats.gguf.targets import GENERATED, Target, rope_llama3

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_TOKEN_WORDS = {"bos": "bos", "eos": "eos", "pad": "padding"}
_LLAMA3_CONTEXTS = (8192, 4096, 16384, 2048, 1024, 512, 256, 128)


@dataclass(frozen=True)
class Inverse:
    """A GGUF as a checkpoint.

    Attributes:
        config: config.json as transformers wants it.
        manifest: the checkpoint's tensors; blocks count as F16, the dtype of their scales.
        targets: the GGUF's tensors as they would be made of them, for `encode.users`.
    """

    config: dict[str, Any]
    manifest: Manifest
    targets: tuple[Target, ...]


def inverse(manifest: GgufManifest, factors: Mapping[str, list[float]] | None = None) -> Inverse:
    """Reads a GGUF's manifest as that of its checkpoint.

    Args:
        factors: values of the tensors of rotary factors (`ROPE_TENSORS`) that the file has.

    Raises:
        InputError: FB-E0320 for an architecture without a way back, FB-E0323 for tensors that no row makes.
    """
    architecture = manifest.typed.get("general.architecture")
    family = family_named(str(architecture.data) if architecture else "none")
    if "architectures" not in family.config:
        what = f"a GGUF of architecture {family.name} cannot be read back as a checkpoint yet"
        raise InputError("FB-E0320", what, remedy="give the original checkpoint as --base")
    config = _config(manifest, family, factors or {})
    names = prepared(config, family)
    found = [target for key, rules in family.tensors.items() for target in _targets(key, rules, manifest, names)]
    unknown = sorted(set(manifest) - {target.name for target in found})
    if unknown:
        raise InputError("FB-E0323", f"{family.name}: no row makes {', '.join(unknown[:5])}")
    return Inverse(config, Manifest(_sources(found, manifest)), tuple(found))


def _nested(typed: Metadata, prefix: str) -> dict[str, Any]:
    """The keys of an architecture as nested plain values: `llama.rope.freq_base` -> {"rope": {"freq_base": …}}."""
    root: dict[str, Any] = {}
    for key, value in typed.items():
        if not key.startswith(prefix + "."):
            continue
        *path, last = key.removeprefix(prefix + ".").split(".")
        place = root
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value.data.tolist() if value.is_array and value.kind != "str" else value.data
    return root


def _config(manifest: GgufManifest, family: Family, factors: Mapping[str, list[float]]) -> dict[str, Any]:
    names = _nested(manifest.typed, family.name)
    names["vocab_rows"] = manifest["token_embd.weight"].shape[0] if "token_embd.weight" in manifest else None
    names["type_rows"] = manifest["token_types.weight"].shape[0] if "token_types.weight" in manifest else None
    names["untied"] = "output.weight" in manifest
    names["has_bias"] = "blk.0.attn_q.bias" in manifest
    names["has_mlp_bias"] = "blk.0.ffn_up.bias" in manifest
    plain, long, short = (factors.get(name) for name in ROPE_TENSORS)
    names["rope_llama3"] = _llama3_rule(names, plain) if plain else None
    names["rope_long"], names["rope_short"] = long, short
    values = {key: evaluate(expression, names) for key, expression in family.config.items()}
    for role in ("bos", "eos", "pad"):
        token = manifest.typed.get(f"tokenizer.ggml.{_TOKEN_WORDS[role]}_token_id")
        values[f"{role}_token_id"] = int(token.data) if token is not None else None
    return {key: value for key, value in values.items() if value is not None}


def _llama3_rule(names: Mapping[str, Any], factors: list[float]) -> dict[str, Any]:
    """The parameters of Llama 3's rotary scaling that give these factors, by trial over the original context lengths in use."""
    rule: dict[str, Any] = {
        "rope_type": "llama3",
        "factor": float(max(factors)),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    for context in _LLAMA3_CONTEXTS:
        rule["original_max_position_embeddings"] = context
        rope = {**rule, "rope_theta": names.get("rope", {}).get("freq_base", 10000.0)}
        tried = rope_llama3({"rope": rope, "head_dim": 2 * len(factors), "hidden_size": 1, "num_attention_heads": 1})
        if tried and all(abs(a - b) <= 1e-3 * b for a, b in zip(factors, tried, strict=True)):
            return dict(rule)
    raise InputError(
        "FB-E0320",
        "the rotary factors (rope_freqs.weight) follow no rule that transformers has",
        tensor="rope_freqs.weight",
    )


def _targets(key: str, rules: tuple[str, ...], manifest: Manifest, names: Mapping[str, Any]) -> list[Target]:
    """The targets of one row that the file holds, made by the row's first rule."""
    source, *ops = (part.strip() for part in rules[0].split("|"))
    name = key.removesuffix("?")
    found = []
    blocks = first(names.get("num_hidden_layers"), names.get("n_layer"))
    if blocks is None:
        raise InputError("FB-E0312", "the GGUF does not say how many blocks the model has (block_count)")
    for block in range(blocks) if "{i}" in name else [0]:
        target = name.replace("{i}", str(block))
        if target not in manifest:
            continue
        info = manifest[target]
        if source in GENERATED:
            found.append(Target(target, (), (), info.shape, "F32", (0.0,)))
            continue
        done, _ = _undone(ops, info.shape, names)
        start = source.replace("{i}", str(block))
        count = info.shape[0] if "stack" in done else 1
        reads = tuple(start.replace("{e}", str(expert)) for expert in range(count))
        found.append(Target(target, reads, tuple(done), info.shape, info.dtype))
    return found


def _undone(ops: list[str], shape: tuple[int, ...], names: Mapping[str, Any]) -> tuple[list[str], tuple[int, ...]]:
    """Ops with their numbers, found from the shape they end in; and that shape before them (a cut axis counts as the cut)."""
    done: list[str] = []
    for op in reversed(ops):
        word, *texts = op.split(":")
        numbers = [evaluate(text, names) for text in texts]
        if word == "every":
            axis, start, step = numbers
            word, numbers = "slice", [axis, start, shape[axis] * step, step]
        elif word == "range":
            word, numbers = "slice", [*numbers, 1]
        done.insert(0, ":".join([word, *map(str, numbers)]))
        shape = _before(done[0], shape)
    return done, shape


def _before(op: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    word, _ = parse(op)
    if word == "stack":
        return shape[1:]
    if word == "transpose":
        return (*shape[:-2], shape[-1], shape[-2])
    if word == "unfold":
        return (shape[0] * shape[1], *shape[2:])
    return shape


def _sources(targets: list[Target], manifest: Manifest) -> dict[str, TensorInfo]:
    """Name, dtype and shape of each source, from the targets that read it."""
    readers: dict[str, list[Target]] = {}
    for target in targets:
        for name in target.reads:
            readers.setdefault(name, []).append(target)
    found = {}
    for name, group in readers.items():
        shape = group[0].shape
        for op in reversed(group[0].ops):
            if op.startswith("slice"):
                axis = int(parse(op)[1][0])
                total = sum(_cut_size(target, axis) for target in group)
                shape = (*shape[: len(shape) + axis], total, *shape[len(shape) + axis + 1 :])
            else:
                shape = _before(op, shape)
        dtype = "F16" if group[0].dtype.startswith("GGML:") else group[0].dtype
        info = manifest[group[0].name]
        found[name] = TensorInfo(name, dtype, shape, data_bytes(dtype, shape), info.file)
    return found


def _cut_size(target: Target, axis: int) -> int:
    """Length of what a target cuts out along an axis."""
    cut = next(parse(op)[1] for op in target.ops if op.startswith("slice") and int(parse(op)[1][0]) == axis)
    return len(range(int(cut[1]), int(cut[2]), int(cut[3])))
