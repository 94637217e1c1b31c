"""config.json: read strictly, stripped of what could run code, checked against the tensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fewbit.base.errors import InputError
from fewbit.base.manifest import Manifest, TensorInfo
from fewbit.store import strictjson

DANGEROUS = ("auto_map", "trust_remote_code")

_WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")
_VOCABS = ("vocab_size", "n_vocab")
_DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
# size in any of its spellings -> largest value that is believed
_SIZES: dict[tuple[str, ...], int] = {
    _WIDTHS: 1 << 20,
    _DEPTHS: 1 << 14,
    _VOCABS: 1 << 28,
}
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "embed_in.weight",
)
_FULL_PRECISION = ("F64", "F32", "F16", "BF16")
_HEADS = ("lm_head.weight", "embed_out.weight")
_HEAD_LIKE = "lm_head."
_GENERATORS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_LAYER = re.compile(r"(.*?)\b(?:layers|layer|h|blocks|block)\.(\d{1,5})\.")
INFINITE = "__float__"  # transformers writes {"__float__": "Infinity"} where JSON has no number
# keys by which transformers repeats what other keys say: dropped without a word
_REPEATED = frozenset({"quantization_config._load_in_4bit", "quantization_config._load_in_8bit"})
# quant_method -> ends of tensor names, one of which its checkpoints always have
_QUANTISED_BY: dict[str, tuple[str, ...]] = {
    "gptq": (".qweight",),
    "awq": (".qweight",),
    "auto-round": (".qweight", ".weight_packed", ".weight_scale"),
    "compressed-tensors": (".weight_packed", ".weight_scale"),
    "bitsandbytes": (".absmax", ".SCB"),
    "fp8": (".weight_scale_inv", ".weight_scale", "_scale_inv"),
    "mxfp4": ("_blocks",),
    "hqq": (".W_q",),
    "modelopt": (".weight_scale",),
}


def read_config(root: Path, required: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The config of a folder without its dangerous keys, and a sentence for each key dropped.

    Args:
        root: the folder.
        required: whether a missing config.json is an error (FB-E0201) or a warning.
    """
    path = root / "config.json"
    if not path.exists():
        if required:
            raise InputError("FB-E0201", "the folder has no config.json", file=path)
        return {}, ("there is no config.json beside the weights; nothing is known about the model but its tensors",)
    raw = strictjson.load_object(path, "FB-E0201", max_bytes=16 << 20)
    dropped: list[str] = []
    return _safe(raw, "", dropped), tuple(
        f"config.json: {key} is dropped; keys that are private or ask to run code are never honoured" for key in dropped
    )


def _safe(value: Any, at: str, dropped: list[str]) -> Any:
    if isinstance(value, list):
        return [_safe(item, f"{at}[{index}]", dropped) for index, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, item in value.items():
        where = f"{at}.{key}" if at else key
        if key in DANGEROUS or (key.startswith("_") and key != INFINITE):
            if where not in _REPEATED:
                dropped.append(where)
        else:
            kept[key] = _safe(item, where, dropped)
    return kept


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that describes the language model: nested in composite models, else the whole."""
    for key in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(key), dict):
            return config[key]
    return config


def check_config(
    config: dict[str, Any], manifest: Manifest, root: Path, same_bytes: Callable[[TensorInfo, TensorInfo], bool]
) -> tuple[str, ...]:
    """Checks the config against the tensors.

    Args:
        config: as `read_config` gives it; empty when there is none.
        manifest: all tensors.
        root: folder, for naming config.json in errors.
        same_bytes: whether two tensors of equal size hold the same bytes (asked of a tied output head only).

    Returns:
        Warnings, a sentence each.

    Raises:
        InputError FB-E0202 .. FB-E0206, the first of them.
    """
    if not config:
        return ()
    path = root / "config.json"
    text = text_config(config)
    for part in (config, text):
        _check_sizes(part, path)
    warnings = [] if config.get("model_type") or config.get("architectures") else ["config.json names no architecture"]
    embedding = find_embedding(manifest)
    if embedding:
        warnings += _check_embedding(text, embedding, path)
    _check_layers(text, manifest, path)
    if embedding:
        warnings += _check_tie(config, text, manifest, embedding, path, same_bytes)
    _check_quantization(config, manifest, path)
    return tuple(warnings)


def _size(part: dict[str, Any], aliases: tuple[str, ...]) -> int | None:
    return next((part[key] for key in aliases if part.get(key) is not None), None)


def _check_sizes(part: dict[str, Any], path: Path) -> None:
    for aliases, most in _SIZES.items():
        for key in aliases:
            value = part.get(key)
            if value is not None and (type(value) is not int or not 0 < value <= most):
                what = f"{key} is {str(value)[:40]!r}, a whole number from 1 to {most:,} is needed"
                raise InputError("FB-E0202", what, file=path)


def find_embedding(manifest: Manifest) -> TensorInfo | None:
    """The token embedding, by name and shape [vocabulary, width]; the largest if several fit."""
    fits = [
        info
        for name, info in manifest.items()
        if name.endswith(_EMBEDDINGS) and len(info.shape) == 2 and info.dtype in _FULL_PRECISION
    ]
    return max(fits, key=lambda info: info.shape[0], default=None)


def _check_embedding(text: dict[str, Any], embedding: TensorInfo, path: Path) -> list[str]:
    rows, width = embedding.shape
    widths = {
        text.get(key) for key in (*_WIDTHS, "embedding_size", "word_embed_proj_dim", "hidden_size_per_layer_input")
    }
    vocab = _size(text, _VOCABS)
    if widths - {None} and width not in widths:
        said = _size(text, _WIDTHS)
        what = f"config.json says hidden_size {said}, the embedding {list(embedding.shape)} says {width}"
        raise InputError("FB-E0203", what, tensor=embedding.name, file=path)
    if vocab is not None and rows < vocab:
        what = f"config.json says vocab_size {vocab}, the embedding {list(embedding.shape)} has only {rows} rows"
        raise InputError("FB-E0203", what, tensor=embedding.name, file=path)
    return (
        [f"{embedding.name} has {rows} rows for a vocabulary of {vocab}"] if vocab is not None and rows > vocab else []
    )


def _check_layers(text: dict[str, Any], manifest: Manifest, path: Path) -> None:
    """Some stack of layers must be as deep as the config says; extra prediction layers may follow it."""
    said = _size(text, _DEPTHS)
    depths: dict[str, int] = {}
    for name in manifest:
        found = _LAYER.match(name)
        if found:
            depths[found[1]] = max(depths.get(found[1], 0), int(found[2]) + 1)
    extra = text.get("num_nextn_predict_layers")
    allowed = {said, said + extra} if said and type(extra) is int else {said}
    if said is None or not depths or allowed & set(depths.values()):
        return
    stacks = ", ".join(f"{prefix} {depth}" for prefix, depth in list(depths.items())[:4])
    raise InputError("FB-E0203", f"config.json says {said} layers, the tensors have: {stacks}", file=path)


def _check_tie(
    config: dict[str, Any], text: dict[str, Any], manifest: Manifest, embedding: TensorInfo, path: Path,
    same_bytes: Callable[[TensorInfo, TensorInfo], bool],
) -> list[str]:  # fmt: skip
    tie = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    if tie is not None and type(tie) is not bool:
        raise InputError("FB-E0202", f"tie_word_embeddings is {str(tie)[:40]!r}, true or false is needed", file=path)
    head = next((info for name, info in manifest.items() if name.endswith(_HEADS)), None)
    if tie and head:
        alike = (head.dtype, head.shape) == (embedding.dtype, embedding.shape) and same_bytes(head, embedding)
        if not alike:
            what = f"tie_word_embeddings is true but {head.name} differs from {embedding.name}"
            raise InputError("FB-E0204", what, tensor=head.name, file=path)
        return [f"{head.name} repeats the tied {embedding.name}"]
    architectures = config.get("architectures")
    generates = isinstance(architectures, list) and any(str(name).endswith(_GENERATORS) for name in architectures)
    shaped = any(info.shape == embedding.shape and info is not embedding for info in manifest.values())
    if tie is False and generates and not head and not shaped and not any(_HEAD_LIKE in name for name in manifest):
        what = "tie_word_embeddings is false but no tensor is an output head"
        raise InputError("FB-E0204", what, tensor=embedding.name, file=path)
    return []


def quantization_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """What the checkpoint says about how its weights are quantised, or None for full precision."""
    for part in (config, text_config(config)):
        for key in ("quantization_config", "compression_config", "quantization"):
            if isinstance(part.get(key), dict) and part[key]:
                return part[key]
    return None


def require_full_precision(config: dict[str, Any], root: Path) -> None:
    """Raises InputError FB-E0205 when the checkpoint is already quantised."""
    said = quantization_of(config)
    if said is not None:
        method = said.get("quant_method", said.get("mode", "an unnamed method"))
        raise InputError("FB-E0205", f"the checkpoint is already quantised with {method}", file=root / "config.json")


def _check_quantization(config: dict[str, Any], manifest: Manifest, path: Path) -> None:
    """A method that is named must have left its tensors; what they hold is for the format's own reader to check."""
    said = quantization_of(config)
    marks = _QUANTISED_BY.get(str(said.get("quant_method"))) if said else None
    if said and marks and not any(name.endswith(marks) for name in manifest):
        what = f"quantization_config says {said['quant_method']!r} but no tensor is named …{' or …'.join(marks)}"
        raise InputError("FB-E0206", what, file=path)
