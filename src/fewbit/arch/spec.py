"""Architecture data: which space each weight reads and writes, one TOML file per kind of family.

A family file in `data/` looks like this; unknown keys are errors.

    model_types = ["llama", "mistral"]      # config.json's model_type
    rewrites = true                         # the spaces below are complete, so rewrites may rely on them
    layers = "model.layers"                 # prefix of the repeated blocks, up to the index
    norm = "rms"                            # or "layer": the mean is taken off first
    norm_offset = 1.0                       # a norm multiplies by weight + this (Gemma); 0 by default

    [[tensor]]
    pattern = "*.self_attn.q_proj.weight"   # glob of the full name; the first row that matches counts
    role = "q"
    reads = "attn_in"
    writes = "qk"
    transposed = true                       # stored [in, out] (GPT-2's Conv1D)

Spaces: resid, attn_in, attn_v (values, per head), mlp_in, ffn (gate's activation times up), head_in; qk and act stand for what no linear
change passes through (rotary positions, nonlinear functions). A fused `qkv` that writes attn_v does so with its last rows, a fused `gate_up`
that writes ffn with its second half. A bias writes what the weight of its module writes.

`generic.toml` is tried after the family's own rows, so a family lists only what differs from the common names.
"""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from importlib import resources

from fewbit.base.errors import InputError
from fewbit.base.names import compile_pattern, matches

QUANTISED_ROLES = frozenset(
    {"q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down", "fc1", "fc2", "linear", "q_a", "q_b", "kv_a", "kv_b"}
)
KEPT_ROLES = frozenset(
    {"embed", "position", "head", "norm", "bias", "router", "conv", "sinks", "vector", "buffer", "tower"}
)


@dataclass(frozen=True)
class Row:
    """One tensor pattern of a family."""

    pattern: str
    role: str
    reads: str = ""
    writes: str = ""
    transposed: bool = False

    def __post_init__(self) -> None:
        compile_pattern(self.pattern)
        if self.role not in QUANTISED_ROLES | KEPT_ROLES:
            raise InputError("FB-E0001", f"architecture data names an unknown role {self.role!r} for {self.pattern!r}")


@dataclass(frozen=True)
class Family:
    """Architecture data of a kind of model; see the text at the top of this file."""

    name: str
    model_types: tuple[str, ...]
    rows: tuple[Row, ...]
    rewrites: bool = False
    layers: str = "model.layers"
    norm: str = "rms"
    norm_offset: float = 0.0

    def row(self, tensor: str) -> Row | None:
        """The first row whose pattern matches a tensor name."""
        return next((row for row in self.rows if matches(row.pattern, tensor)), None)


def _load(name: str, text: str) -> Family:
    data = tomllib.loads(text)
    rows = tuple(Row(**row) for row in data.pop("tensor", ()))
    return Family(name=name, model_types=tuple(data.pop("model_types", ())), rows=rows, **data)


@functools.cache
def families() -> dict[str, Family]:
    """All families by file name; `generic` among them."""
    folder = resources.files(__package__).joinpath("data")
    found = {}
    for entry in sorted(folder.iterdir(), key=lambda item: item.name):
        if entry.name.endswith(".toml"):
            name = entry.name.removesuffix(".toml")
            found[name] = _load(name, entry.read_text(encoding="utf-8"))
    return found


@functools.cache
def family_of(model_type: str) -> Family | None:
    """The family that lists a model_type, or None when there is no data for it."""
    return next((family for family in families().values() if model_type in family.model_types), None)
