"""The spaces of a model: which tensors write each and which read it, and so which equal rewrites it bears. Needs no tensor.

A space is a vector that passes between linear maps. Whoever writes it does so with rows (or, an embedding, with columns), a norm entry by
entry; whoever reads it does so with columns. `spaces` finds every instance in a checkpoint from the architecture data: one `attn_in` per
block, one `ffn` per feed-forward or expert, one `resid` for the model.

    scale    s > 0 per channel: writers divide, readers multiply         attn_in, mlp_in (written by norms), attn_v, ffn
    rotate   orthogonal: writers and readers turn alike                  resid (norm gains absorbed first), attn_v (per head)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fewbit.arch.infer import TensorFacts, facts, family_for, model_type_of
from fewbit.arch.spec import Family
from fewbit.base.manifest import Manifest

SCALABLE = ("attn_in", "attn_v", "mlp_in", "ffn")
GLOBAL = ("resid", "head_in")
PER_LAYER = ("attn_in", "mlp_in")


@dataclass(frozen=True)
class End:
    """One tensor at one end of a space.

    Attributes:
        name: in the checkpoint.
        role: see `arch.spec`.
        axis: of the stored tensor that runs along the space, from the end: -1 or -2.
        start, size: the part of that axis; `size` is repeat * the space's size.
        repeat: heads that read one head of the space (`o` under grouped-query attention).
        transposed: stored [in, out].
    """

    name: str
    role: str
    axis: int
    start: int
    size: int
    repeat: int = 1
    transposed: bool = False


@dataclass(frozen=True)
class Space:
    """One instance of a space.

    Attributes:
        key: unique, e.g. "model.layers.0/attn_in".
        kind: attn_in, attn_v, mlp_in, ffn, resid or head_in.
        layer: index of the block, or None.
        size: channels.
        head: channels per head (attn_v), else 0.
        stack: experts whose tensors are stacked, each with its own instance of the space; 0 for none.
        writers, readers: linear ends. gains, shifts: weights and biases of the norm that writes it.
    """

    key: str
    kind: str
    layer: int | None
    size: int
    head: int = 0
    stack: int = 0
    writers: tuple[End, ...] = ()
    readers: tuple[End, ...] = ()
    gains: tuple[str, ...] = ()
    shifts: tuple[str, ...] = ()

    @property
    def scalable(self) -> bool:
        """Whether a positive diagonal can be folded into both of its ends."""
        return (
            self.kind in SCALABLE
            and bool(self.readers)
            and bool(self.gains or any(end.role != "bias" for end in self.writers))
        )


@dataclass(frozen=True)
class Spaces:
    """All spaces of a checkpoint, and what the rewrites must know of the model.

    Attributes:
        all: in the order of the manifest.
        family: architecture data.
        embed, head: names of the embedding and the output head; `tied`: the head is the embedding.
        off: why nothing can be rewritten, or "".
        no_rotation: why the residual stream cannot be rotated, or "".
    """

    all: tuple[Space, ...]
    family: Family | None = None
    embed: str = ""
    head: str = ""
    tied: bool = False
    off: str = ""
    no_rotation: str = ""

    def scalable(self, kinds: Iterable[str] = SCALABLE) -> tuple[Space, ...]:
        """Spaces that bear a scale, of the given kinds."""
        wanted = tuple(kinds)
        return tuple(space for space in self.all if space.scalable and space.kind in wanted)

    def one(self, kind: str) -> Space | None:
        """The only space of a global kind."""
        return next((space for space in self.all if space.kind == kind), None)


@dataclass
class _Draft:
    kind: str
    layer: int | None
    size: int = 0
    stack: int = 0
    writers: list[End] = field(default_factory=list)
    readers: list[End] = field(default_factory=list)
    gains: list[str] = field(default_factory=list)
    shifts: list[str] = field(default_factory=list)


class _Finder:
    """Gathers the spaces of one checkpoint."""

    def __init__(self, manifest: Manifest, config: Mapping[str, Any], family: Family) -> None:
        self.manifest, self.config, self.family = manifest, config, family
        self.facts = facts(manifest, config)
        self.heads = _first(config, "num_attention_heads", "n_head")
        self.kv = _first(config, "num_key_value_heads") or self.heads
        width = _first(config, "hidden_size", "n_embd")
        self.head_dim = _first(config, "head_dim") or (width // self.heads if self.heads else 0)
        self.drafts: dict[str, _Draft] = {}
        self.problem = ""
        self.normed_resid = ""

    def run(self) -> None:
        for name, known in self.facts.items():
            if not known.known and known.role != "buffer":
                self.problem = self.problem or f"the architecture data does not know {name}"
            elif known.role == "norm":
                self._norm(name, known)
            elif known.role == "bias":
                self._bias(name)
            elif known.role not in ("buffer", "sinks"):
                self._matrix(name, known)

    def _draft(self, space: str, name: str, known: TensorFacts, size: int) -> _Draft:
        scope = "" if space in GLOBAL else _layer_of(name) if space in PER_LAYER else _module_of(name)
        made = self.drafts.setdefault(f"{scope}/{space}" if scope else space, _Draft(space, known.layer))
        if made.size not in (0, size):
            self.problem = self.problem or f"{name} has {size} channels in {space}, another tensor {made.size}"
        made.size = size
        return made

    def _norm(self, name: str, known: TensorFacts) -> None:
        if not known.writes:
            return
        size = self.manifest[name].shape[-1]
        draft = self._draft(known.writes, name, known, size)
        (draft.shifts if name.endswith("bias") else draft.gains).append(name)
        if known.writes == "resid":
            self.normed_resid = self.normed_resid or name

    def _bias(self, name: str) -> None:
        weight = name.removesuffix("bias") + "weight"
        known = self.facts.get(weight)
        if known is None or not known.writes or known.writes in ("qk", "act"):
            return
        shape = self.manifest[name].shape
        start, size = self._written(known, shape[-1])
        draft = self._draft(known.writes, weight, known, size)
        draft.writers.append(End(name, "bias", -1, start, size))

    def _matrix(self, name: str, known: TensorFacts) -> None:
        shape = self.manifest[name].shape
        out_axis, in_axis = (-1, -2) if known.transposed else (-2, -1)
        if known.role in ("embed", "position"):
            out_axis = -1  # a row per token: its columns are what it writes
        if known.writes and known.writes not in ("qk", "act"):
            start, size = self._written(known, shape[out_axis])
            draft = self._draft(known.writes, name, known, size)
            draft.writers.append(End(name, known.role, out_axis, start, size, transposed=known.transposed))
            draft.stack = shape[0] if len(shape) == 3 and known.writes == "ffn" else draft.stack
        if known.reads and known.reads not in ("qk", "act"):
            repeat = self.heads // self.kv if known.reads == "attn_v" and self.kv else 1
            draft = self._draft(known.reads, name, known, shape[in_axis] // repeat)
            draft.readers.append(End(name, known.role, in_axis, 0, shape[in_axis], repeat, known.transposed))
            draft.stack = shape[0] if len(shape) == 3 and known.reads == "ffn" else draft.stack

    def _written(self, known: TensorFacts, size: int) -> tuple[int, int]:
        """(start, size) of the rows that write the space: the values of a fused qkv, the second half of a fused gate_up."""
        if known.role == "qkv":
            return size - self.kv * self.head_dim, self.kv * self.head_dim
        if known.role == "gate_up":
            return size // 2, size // 2
        return 0, size


def spaces(manifest: Manifest, config: Mapping[str, Any]) -> Spaces:
    """The spaces of a checkpoint; `off` says why there are none."""
    family = family_for(config)
    if family is None:
        return Spaces((), off=f"there is no architecture data for model type {model_type_of(config)!r}")
    if not family.rewrites:
        return Spaces((), family, off=f"the architecture data of {model_type_of(config)!r} declares no rewrites")
    if "text_config" in config:
        return Spaces((), family, off="the text part of a composite model is not rewritten")
    finder = _Finder(manifest, config, family)
    finder.run()
    made = tuple(_finish(key, draft, finder) for key, draft in finder.drafts.items())
    odd = next((space for space in made if space.kind == "attn_v" and not space.head), None)
    if odd is not None:
        finder.problem = (
            finder.problem
            or f"{odd.key} has {odd.size} channels, the config says {finder.kv} heads of {finder.head_dim}"
        )
    if finder.problem:
        return Spaces((), family, off=finder.problem)
    embed = next((name for name, known in finder.facts.items() if known.role == "embed"), "")
    head = next((name for name, known in finder.facts.items() if known.role == "head"), "")
    tied = not head or bool(config.get("tie_word_embeddings"))
    return Spaces(made, family, embed, head, tied, no_rotation=_no_rotation(made, finder, embed))


def _finish(key: str, draft: _Draft, finder: _Finder) -> Space:
    head = finder.head_dim if draft.kind == "attn_v" and draft.size == finder.kv * finder.head_dim else 0
    return Space(
        key,
        draft.kind,
        draft.layer,
        draft.size,
        head,
        draft.stack,
        tuple(draft.writers),
        tuple(draft.readers),
        tuple(draft.gains),
        tuple(draft.shifts),
    )


def _no_rotation(found: tuple[Space, ...], finder: _Finder, embed: str) -> str:
    by_kind = {space.kind: space for space in found}
    if finder.normed_resid:
        return f"a norm writes the residual stream ({finder.normed_resid}), and its gain fixes the stream's coordinates"
    if not embed or "resid" not in by_kind:
        return "the residual stream is not described"
    if any(reader.role not in ("norm", "head") for reader in by_kind["resid"].readers):
        return "a matrix reads the residual stream without a norm in between"
    if "head_in" not in by_kind or not by_kind["head_in"].gains:
        return "no final norm is described"
    return ""


def _first(config: Mapping[str, Any], *names: str) -> int:
    return next((int(config[name]) for name in names if config.get(name)), 0)


def _module_of(name: str) -> str:
    """The module that a linear layer belongs to: `…mlp` of `…mlp.up_proj.weight`, `…mlp.experts` of a stack `…mlp.experts.down_proj`."""
    return name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[0]


def _layer_of(name: str) -> str:
    """The name up to and including the block's index."""
    parts = name.split(".")
    index = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[: index + 1])
