"""The weights of a model as planning sees them: from safetensors headers, or from a config.json alone.

Planning needs names, shapes, dtypes and roles, never a value. Headers give them exactly; where there are none, `shapes.toml` says how
each family's config determines them. Experts of one layer that are alike are one row with a count, so a model of 90,000 tensors
is a few hundred rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from fewbit.arch.infer import facts
from fewbit.base.manifest import DTYPE_BITS, Manifest, TensorInfo, data_bytes
from fewbit.formats.table import detect
from fewbit.plan.shapes_config import rows_of, text_config
from fewbit.plan.shapes_gguf import config_of_gguf, facts_of_gguf, is_gguf

_EXPERT = re.compile(r"(\.experts\.)\d+\.")
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "float8_e4m3fn": "F8_E4M3"}


@dataclass(frozen=True, slots=True)
class Weight:
    """`count` stored tensors that are alike.

    Attributes:
        name: of the tensor; experts of a layer carry `*` for their index.
        shape: of one of them, as stored.
        dtype: safetensors dtype name of the float tensor.
        count: how many there are.
        role: see `arch.spec`.
        kind: embedding, head, attention, mlp, experts, shared experts, router, norms and biases, vision, other.
        layer: index of the block, None outside the blocks.
        matrix: shape as [..., out, in], whatever way round it is stored.
        kept: whether quantising leaves it alone by default.
        transposed: whether it is stored [in, out].
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    count: int
    role: str
    kind: str
    layer: int | None
    matrix: tuple[int, ...]
    kept: bool
    transposed: bool = False

    @property
    def numel(self) -> int:
        """Parameters of all `count` tensors."""
        return prod(self.shape) * self.count

    @property
    def nbytes(self) -> int:
        """Bytes of all `count` tensors in their own dtype."""
        return (prod(self.shape) * DTYPE_BITS.get(self.dtype, 16) + 7) // 8 * self.count


@dataclass(frozen=True, eq=False)
class Model:
    """What planning knows of a model.

    Attributes:
        name: as the user gave it.
        config: its config.json.
        text: config of the language part with the family's defaults filled in.
        weights: all its weights.
        source: "headers" (exact, read from the files) or "config" (derived from config.json).
        disk_bytes: bytes of tensor data on disk, None when there are no files.
        notes: what the reader should know about these facts.
    """

    name: str
    config: Mapping[str, Any]
    text: Mapping[str, Any]
    weights: tuple[Weight, ...]
    source: str
    disk_bytes: int | None = None
    notes: tuple[str, ...] = ()

    @cached_property
    def params(self) -> int:
        return sum(weight.numel for weight in self.weights)

    @cached_property
    def experts(self) -> int:
        """Routed experts of a layer; 0 for dense models."""
        return int(_first(self.text, "num_experts", "num_local_experts", "n_routed_experts") or 0)

    @cached_property
    def experts_per_token(self) -> int:
        return int(_first(self.text, "num_experts_per_tok", "experts_per_token", "moe_topk", "top_k_experts") or 0)

    @cached_property
    def active_share(self) -> float:
        """Share of the routed experts that one token uses."""
        return self.experts_per_token / self.experts if self.experts and self.experts_per_token else 1.0

    @cached_property
    def active_params(self) -> int:
        """Parameters that one token uses, embeddings included."""
        return sum(round(weight.numel * self.share(weight)) for weight in self.weights)

    def share(self, weight: Weight) -> float:
        """Share of a weight that one token uses."""
        return self.active_share if weight.kind == "experts" else 1.0

    @cached_property
    def tied(self) -> bool:
        """Whether the embedding serves as the output head too."""
        return not any(weight.kind == "head" for weight in self.weights)

    @cached_property
    def layers(self) -> int:
        return int(_first(self.text, "num_hidden_layers", "n_layer", "num_layers", "n_layers") or 0)

    @cached_property
    def hidden_size(self) -> int:
        return int(_first(self.text, "hidden_size", "n_embd", "d_model") or 0)

    @cached_property
    def vocab_size(self) -> int:
        return int(self.text.get("vocab_size") or 0)

    @cached_property
    def max_context(self) -> int | None:
        found = _first(
            self.text, "max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length"
        )
        return int(found) if found else None

    @property
    def model_type(self) -> str:
        return str(self.text.get("model_type") or self.config.get("model_type") or "unknown")


def _first(config: Mapping[str, Any], *keys: str) -> Any:
    return next((config[key] for key in keys if config.get(key) is not None), None)


def model_from_manifest(name: str, manifest: Manifest, config: Mapping[str, Any]) -> Model:
    """A model from the headers of its files; exact whatever its family. Quantised checkpoints count as the float model they stand for."""
    if is_gguf(manifest):
        config = config_of_gguf(manifest)
        weights = tuple(Weight(kind=_kind(row["name"], row["role"]), **row) for row in facts_of_gguf(manifest))
        types = sorted({info.dtype.removeprefix("GGML:") for info in manifest.values()})
        return Model(
            name,
            config,
            dict(config),
            weights,
            "headers",
            manifest.nbytes,
            (f"a GGUF file of {', '.join(types)}", _STANDS_FOR),
        )
    notes: tuple[str, ...] = ()
    found = detect(dict(config), manifest)
    logical = manifest
    if found is not None and found[1]:
        logical = _logical(manifest, config, found[1])
        schemes = sorted({str(stored.scheme) for stored in found[1].values()})
        notes = (f"already quantised: {found[0].name} {', '.join(schemes[:4])}", _STANDS_FOR)
    counted: dict[tuple[str, tuple[int, ...], str], int] = {}
    for info in logical.values():
        key = (_EXPERT.sub(r"\1*.", info.name), info.shape, info.dtype)
        counted[key] = counted.get(key, 0) + 1
    rows = [(tensor, shape, dtype, count) for (tensor, shape, dtype), count in counted.items()]
    text = text_config(config)
    if not text:
        notes += ("no config: the KV cache and activations are unknown",)
    return Model(name, config, text, _with_facts(rows, config), "headers", manifest.nbytes, notes)


_STANDS_FOR = "the sizes below are those of the float model that it stands for"


def _logical(manifest: Manifest, config: Mapping[str, Any], stored: Mapping[str, Any]) -> Manifest:
    """The manifest with every quantised weight as one tensor of the model's dtype under its float name."""
    dtype = _dtype_of(config)
    parts = {part for row in stored.values() for part in row.parts}
    tensors = {name: info for name, info in manifest.items() if name not in parts}
    for name, row in stored.items():
        tensors[name] = TensorInfo(name, dtype, row.shape, data_bytes(dtype, row.shape))
    return Manifest(tensors, manifest.metadata)


def _dtype_of(config: Mapping[str, Any]) -> str:
    named = _first(config, "torch_dtype", "dtype") or _first(text_config(config), "torch_dtype", "dtype")
    return _DTYPES.get(str(named or "bfloat16"), "BF16")


def _with_facts(rows: list[tuple[str, tuple[int, ...], str, int]], config: Mapping[str, Any]) -> tuple[Weight, ...]:
    """Rows of (name, shape, dtype, count) with what `arch` knows of each tensor."""
    infos = {
        f"{index}|{name}": TensorInfo(name.replace("*", "0"), dtype, shape, 0)
        for index, (name, shape, dtype, _) in enumerate(rows)
    }
    known = facts(Manifest({info.name + f"|{key}": info for key, info in infos.items()}), config)
    weights = []
    for (name, shape, dtype, count), fact in zip(rows, known.values(), strict=True):
        kind = _kind(name, fact.role)
        kept, matrix = fact.kept or len(shape) < 2, fact.matrix_shape(shape)
        weights.append(Weight(name, shape, dtype, count, fact.role, kind, fact.layer, matrix, kept, fact.transposed))
    return tuple(weights)


_KINDS = (
    ("attention", {"q", "k", "v", "qkv", "o", "q_a", "q_b", "kv_a", "kv_b"}),
    ("mlp", {"gate", "up", "gate_up", "down", "fc1", "fc2"}),
    ("embedding", {"embed", "position"}),
    ("head", {"head"}),
    ("router", {"router"}),
    ("norms and biases", {"norm", "bias", "sinks", "vector"}),
)


def _kind(name: str, role: str) -> str:
    if role == "tower" or re.search(r"vision|visual|image|audio|multi_modal", name):
        return "vision"
    if ".experts." in name and role in _KINDS[1][1] | {"bias", "linear"}:
        return "experts"
    if "shared_expert" in name and role in _KINDS[1][1]:
        return "shared experts"
    found = next((kind for kind, roles in _KINDS if role in roles), "other")
    return "attention" if found == "other" and re.search(r"attn|attention|mixer", name) else found


def model_from_config(name: str, config: Mapping[str, Any]) -> Model:
    """A model from its config.json alone; errors of `shapes_config.rows_of`."""
    text, dtype = text_config(config), _dtype_of(config)
    rows, notes = rows_of(config)
    sized = [(tensor, shape, dtype, count) for tensor, shape, count in rows]
    seen = "tensor shapes were derived from config.json; the files themselves were not seen"
    return Model(name, config, text, _with_facts(sized, config), "config", None, (seen, *notes))
