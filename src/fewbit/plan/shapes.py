"""The weights of a model as planning sees them: from safetensors headers, or from a config.json alone.

Planning needs names, shapes, dtypes and roles, never a value. Headers give them exactly; where there are none, `shapes.toml` says how
each family's config determines them. Experts of one layer that are alike are one row with a count, so a model of 90,000 tensors
is a few hundred rows.
"""

from __future__ import annotations

import ast
import functools
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from math import prod
from types import CodeType
from typing import Any

from fewbit.arch.infer import facts
from fewbit.base.errors import InputError
from fewbit.base.manifest import DTYPE_BITS, Manifest, TensorInfo

_EXPERT = re.compile(r"(\.experts\.)\d+\.")
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "float8_e4m3fn": "F8_E4M3"}
_ALLOWED = (
    ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod,
    ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.In, ast.NotIn, ast.Name, ast.Load, ast.Constant, ast.Attribute,
)  # fmt: skip


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

    @property
    def params(self) -> int:
        return sum(weight.numel for weight in self.weights)

    @property
    def experts(self) -> int:
        """Routed experts of a layer; 0 for dense models."""
        return int(_first(self.text, "num_experts", "num_local_experts", "n_routed_experts") or 0)

    @property
    def experts_per_token(self) -> int:
        return int(_first(self.text, "num_experts_per_tok", "experts_per_token", "moe_topk", "top_k_experts") or 0)

    @property
    def active_share(self) -> float:
        """Share of the routed experts that one token uses."""
        return self.experts_per_token / self.experts if self.experts and self.experts_per_token else 1.0

    @property
    def active_params(self) -> int:
        """Parameters that one token uses, embeddings included."""
        return sum(round(weight.numel * self.share(weight)) for weight in self.weights)

    def share(self, weight: Weight) -> float:
        """Share of a weight that one token uses."""
        return self.active_share if weight.kind == "experts" else 1.0

    @property
    def tied(self) -> bool:
        """Whether the embedding serves as the output head too."""
        return not any(weight.kind == "head" for weight in self.weights)

    @property
    def layers(self) -> int:
        return int(_first(self.text, "num_hidden_layers", "n_layer", "num_layers", "n_layers") or 0)

    @property
    def hidden_size(self) -> int:
        return int(_first(self.text, "hidden_size", "n_embd", "d_model") or 0)

    @property
    def vocab_size(self) -> int:
        return int(self.text.get("vocab_size") or 0)

    @property
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


def model_from_manifest(
    name: str, manifest: Manifest, config: Mapping[str, Any], disk_bytes: int | None = None
) -> Model:
    """A model from the headers of its files; exact whatever its family."""
    counted: dict[tuple[str, tuple[int, ...], str], int] = {}
    for info in manifest.values():
        key = (_EXPERT.sub(r"\1*.", info.name), info.shape, info.dtype)
        counted[key] = counted.get(key, 0) + 1
    rows = [(name, shape, dtype, count) for (name, shape, dtype), count in counted.items()]
    text, notes = text_config(config), ()
    if not text:
        notes = ("no config: the KV cache and activations are unknown",)
    return Model(
        name,
        config,
        text,
        _with_facts(rows, config),
        "headers",
        manifest.nbytes if disk_bytes is None else disk_bytes,
        notes,
    )


def model_from_config(name: str, config: Mapping[str, Any]) -> Model:
    """A model from its config.json alone.

    Raises:
        InputError: FB-E0450 when the family is not in `shapes.toml`, FB-E0451 when the config lacks what its shapes need.
    """
    dtype = _DTYPES.get(
        str(
            _first(config, "torch_dtype", "dtype") or _first(text_config(config), "torch_dtype", "dtype") or "bfloat16"
        ),
        "BF16",
    )
    notes: tuple[str, ...] = ("tensor shapes were derived from config.json; the files themselves were not seen",)
    model_type = str(config.get("model_type", ""))
    composite = _tables()["composite"].get(model_type)
    if composite is not None:
        rows = _composite_rows(composite, config)
    else:
        text = text_config(config)
        rows = list(_family_rows(_family(str(text.get("model_type") or model_type)), text))
        if text is not config and any(key in config for key in ("vision_config", "audio_config")):
            notes += (f"only the language part is counted: no table says how {model_type}'s other parts are shaped",)
    sized = [(tensor, shape, dtype, count) for tensor, shape, count in rows]
    return Model(name, config, text_config(config), _with_facts(sized, config), "config", None, notes)


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language part of a config, flat, with the defaults that its family's config class would fill in."""
    inner = next(
        (
            config[key]
            for key in ("text_config", "llm_config", "language_config")
            if isinstance(config.get(key), Mapping)
        ),
        config,
    )
    model_type = str(inner.get("model_type") or config.get("model_type") or "")
    found = next((family for family in _tables()["family"].values() if model_type in family["model_types"]), None)
    defaults = {} if found is None else {**_tables()["common"]["defaults"], **found.get("defaults", {})}
    return {**defaults, **{key: value for key, value in inner.items() if value is not None or key not in defaults}}


def known_model_types() -> tuple[str, ...]:
    """Every model_type whose shapes follow from its config."""
    tables = _tables()
    return tuple(
        sorted(
            {kind for family in tables["family"].values() for kind in family["model_types"]} | set(tables["composite"])
        )
    )


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
        kept = fact.kept or kind == "vision" or len(shape) < 2
        weights.append(Weight(name, shape, dtype, count, fact.role, kind, fact.layer, fact.matrix_shape(shape), kept))
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
    if re.search(r"vision|visual|image|audio|multi_modal", name):
        return "vision"
    if ".experts." in name and role in _KINDS[1][1] | {"bias", "linear"}:
        return "experts"
    if "shared_expert" in name and role in _KINDS[1][1]:
        return "shared experts"
    found = next((kind for kind, roles in _KINDS if role in roles), "other")
    return "attention" if found == "other" and re.search(r"attn|attention|mixer", name) else found


# ---- shapes.toml


@functools.cache
def _tables() -> dict[str, Any]:
    return tomllib.loads(resources.files(__package__).joinpath("shapes.toml").read_text(encoding="utf-8"))


def _family(model_type: str) -> dict[str, Any]:
    found = next((family for family in _tables()["family"].values() if model_type in family["model_types"]), None)
    if found is None:
        known = ", ".join(known_model_types())
        what = f"no shape table for model_type {model_type or '(none given)'!r}; there are {known}"
        raise InputError(
            "FB-E0450",
            what,
            remedy="give a directory or hub id with safetensors files: their headers are exact for any family",
        )
    return found


@dataclass(frozen=True)
class _Line:
    """One line of a block: how tensors are named and shaped, and when they are there."""

    name: str
    shape: tuple[CodeType, ...]
    condition: CodeType | None
    per_layer: bool
    per_expert: bool


@functools.cache
def _lines(text: str) -> tuple[_Line, ...]:
    found = []
    for line in filter(None, (line.strip() for line in text.splitlines())):
        body, _, condition = line.partition(" if ")
        name, *shape = re.split(r"\s{2,}", body.strip())
        found.append(
            _Line(
                name,
                tuple(map(_compiled, shape)),
                _compiled(condition.strip()) if condition else None,
                "{layer}" in name,
                "{expert}" in name,
            )
        )
    return tuple(found)


@functools.cache
def _compiled(text: str) -> CodeType:
    """An expression of names, integers, arithmetic, comparisons and and/or/not; anything else is a fault of the table."""
    tree = ast.parse(text, mode="eval")
    for node in ast.walk(tree):
        if not isinstance(node, _ALLOWED):
            raise InputError("FB-E0001", f"shapes.toml: {type(node).__name__} is not allowed in {text!r}")
    return compile(tree, f"shapes.toml: {text}", "eval")


class _Names(dict):
    """Names of an expression; what the config does not have is None."""

    def __missing__(self, key: str) -> None:
        return None


def _evaluate(code: CodeType, names: _Names) -> Any:
    try:
        return eval(code, {"__builtins__": {}}, names)  # noqa: S307: node types were checked in _compiled
    except (TypeError, ZeroDivisionError, AttributeError) as error:
        missing = [name for name in code.co_names if names.get(name) is None]
        what = f"config.json lacks {', '.join(missing) or 'a usable value'} ({code.co_filename})"
        raise InputError("FB-E0451", what) from error


def _family_rows(family: Mapping[str, Any], config: Mapping[str, Any]) -> Iterable[tuple[str, tuple[int, ...], int]]:
    """(name, shape, count) of all tensors of a family for one config."""
    tables = _tables()
    names = _Names(
        {
            **tables["common"]["defaults"],
            **family.get("defaults", {}),
            **{k: v for k, v in config.items() if v is not None},
        }
    )
    let = {**tables["common"]["let"], **family.get("let", {})}
    if family.get("alone"):
        let = dict(family["let"])
    lines = [line for block in family["blocks"] for line in _lines(tables["blocks"][block])]
    yield from _expand([line for line in lines if not line.per_layer], _bind(names, let, 0), "")
    layers = _bind(names, let, 0)["layers"]
    if not isinstance(layers, int):
        raise InputError("FB-E0451", "config.json does not say how many layers the model has")
    for layer in range(layers):
        yield from _expand([line for line in lines if line.per_layer], _bind(names, let, layer), str(layer))


def _bind(names: _Names, let: Mapping[str, str], layer: int) -> _Names:
    bound = _Names(names)
    bound["layer"] = layer
    for name, expression in let.items():
        bound[name] = _evaluate(_compiled(expression), bound)
    return bound


def _expand(lines: Iterable[_Line], names: _Names, layer: str) -> Iterable[tuple[str, tuple[int, ...], int]]:
    for line in lines:
        if line.condition is not None and not _evaluate(line.condition, names):
            continue
        shape = tuple(_evaluate(code, names) for code in line.shape)
        if not all(isinstance(size, int) and size > 0 for size in shape):
            missing = sorted({name for code in line.shape for name in code.co_names if not names.get(name)})
            raise InputError("FB-E0451", f"config.json lacks {', '.join(missing)}, which {line.name} needs")
        count = names["experts"] if line.per_expert else 1
        yield line.name.replace("{layer}", layer).replace("{expert}", "*"), shape, count


def _composite_rows(composite: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[str, tuple[int, ...], int]]:
    rows, parts = [], _Names()
    for part in composite["parts"]:
        family = _tables()["family"][part["family"]]
        inner = config.get(part["config"]) or {}
        rows += [(part["prefix"] + name, shape, count) for name, shape, count in _family_rows(family, inner)]
        parts[part["config"].removesuffix("_config")] = _Part({**family.get("defaults", {}), **inner})
    return rows + list(_expand(_lines(composite["bridge"]), parts, ""))


class _Part:
    """A sub-config whose keys read as attributes, for the lines between the parts."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)


def without_vision(model: Model) -> Model:
    """The language part alone."""
    return replace(model, weights=tuple(weight for weight in model.weights if weight.kind != "vision"))
