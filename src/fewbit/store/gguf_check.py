"""Whether the metadata of a GGUF file can be true: the lies that have crashed loaders, refused before anything trusts them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NoReturn

from fewbit.base.errors import InputError
from fewbit.base.manifest import TensorInfo
from fewbit.formats.gguf.metadata import Metadata

MAX_LAYERS = 512  # LLAMA_MAX_LAYERS; larger counts have overrun arrays in loaders
MAX_COUNT = 1 << 31

# key after `<arch>.` -> (kinds allowed, lowest, highest); a key may also be an array of such, one per layer
_NUMBERS: dict[str, tuple[tuple[str, ...], int, int]] = {
    "block_count": (("u32", "i32", "u64"), 1, MAX_LAYERS),
    "context_length": (("u32", "i32", "u64"), 1, MAX_COUNT),
    "embedding_length": (("u32", "i32", "u64"), 1, MAX_COUNT),
    "feed_forward_length": (("u32", "i32", "u64"), 0, MAX_COUNT),
    "attention.head_count": (("u32", "i32", "u64"), 0, 1 << 20),  # 0 only per layer: a layer without attention
    "attention.head_count_kv": (("u32", "i32", "u64"), 0, 1 << 20),
    "attention.key_length": (("u32", "i32", "u64"), 1, MAX_COUNT),
    "attention.value_length": (("u32", "i32", "u64"), 1, MAX_COUNT),
    "rope.dimension_count": (("u32", "i32", "u64"), 0, MAX_COUNT),
    "expert_count": (("u32", "i32", "u64"), 0, 1 << 16),
    "expert_used_count": (("u32", "i32", "u64"), 0, 1 << 16),
}
_PER_LAYER = ("feed_forward_length", "attention.head_count", "attention.head_count_kv")
_TYPES: dict[str, str] = {
    "general.architecture": "str",
    "general.quantization_version": "u32",
    "general.file_type": "u32",
    "tokenizer.ggml.model": "str",
    "tokenizer.ggml.pre": "str",
    "tokenizer.ggml.tokens": "[str]",
    "tokenizer.ggml.merges": "[str]",
    "tokenizer.ggml.scores": "[f32]",
    "tokenizer.ggml.token_type": "[i32]",
    "split.no": "u16",
    "split.count": "u16",
    "split.tensors.count": "i32",
}
_TOKEN_IDS = ("bos", "eos", "eot", "unknown", "seperator", "padding", "mask", "cls")


def check_metadata(metadata: Metadata, tensors: Mapping[str, TensorInfo], file: object) -> None:
    """Checks kinds and ranges of the keys that loaders build on, and the vocabulary against the embedding.

    Raises:
        InputError FB-E0312: naming the key, what it holds and what is allowed.
    """

    def fail(what: str, tensor: str | None = None) -> NoReturn:
        raise InputError("FB-E0312", what, tensor=tensor, file=file)

    for key, spelling in _TYPES.items():
        if key in metadata and metadata[key].spelling != spelling:
            fail(f"{key} is of kind {metadata[key].spelling}, {spelling} is needed")
    arch = metadata["general.architecture"].data if "general.architecture" in metadata else None
    for name, (kinds, low, high) in _NUMBERS.items():
        key = f"{arch}.{name}"
        value = metadata.get(key)
        if value is None:
            continue
        if value.kind not in kinds or (value.is_array and name not in _PER_LAYER):
            fail(f"{key} is of kind {value.spelling}, {kinds[0]} is needed")
        numbers = [int(n) for n in value.data[:MAX_LAYERS]] if value.is_array else [value.data]
        if any(not low <= n <= high for n in numbers) or (name == "attention.head_count" and not any(numbers)):
            fail(f"{key} is {numbers[0] if not value.is_array else numbers}, {max(low, 1)} to {high:,} are allowed")
    _check_vocabulary(metadata, tensors, fail)


def _check_vocabulary(metadata: Metadata, tensors: Mapping[str, TensorInfo], fail: Callable[..., NoReturn]) -> None:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if tokens is None:
        return
    count = len(tokens.data)
    for key in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
        if key in metadata and len(metadata[key].data) != count:
            fail(f"{key} has {len(metadata[key].data):,} entries for {count:,} tokens")
    for name in _TOKEN_IDS:
        value = metadata.get(f"tokenizer.ggml.{name}_token_id")
        # 2^32 - 1 is the format's way of saying "none"
        if value is not None and (
            value.is_array or not isinstance(value.data, int) or not (value.data < count or value.data == 0xFFFFFFFF)
        ):
            fail(f"tokenizer.ggml.{name}_token_id is {value.data}, the vocabulary has {count:,} tokens")
    table = tensors.get("token_embd.weight")
    if table is not None and count < table.shape[0]:
        fail(f"the embedding has {table.shape[0]:,} rows for {count:,} tokens", "token_embd.weight")
