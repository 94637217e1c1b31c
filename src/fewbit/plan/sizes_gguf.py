"""Which GGML type each weight gets under a GGUF recipe, from roles and shapes: what `formats.gguf.recipes` asks, answered in GGUF's names."""

from __future__ import annotations

from collections.abc import Container

from fewbit.formats.gguf.recipes import ModelFacts, choose, recipe_named
from fewbit.plan.shapes import Model, Weight

_NAMES = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "qkv": "attn_qkv", "o": "attn_output", "q_a": "attn_q_a", "q_b": "attn_q_b",
    "kv_a": "attn_kv_a_mqa", "gate": "ffn_gate", "up": "ffn_up", "gate_up": "ffn_up", "down": "ffn_down",
    "fc1": "ffn_up", "fc2": "ffn_down", "router": "ffn_gate_inp",
}  # fmt: skip
_OUTSIDE = {"embed": "token_embd.weight", "head": "output.weight", "position": "position_embd.weight"}
_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
}  # those that recipes ask for by name


Piece = tuple[str, tuple[int, ...]]
"""A tensor of the file: (GGML type, shape)."""


def gguf_pieces(model: Model, recipe: str) -> tuple[tuple[Piece, ...], ...]:
    """The tensors that each row of `model.weights` becomes: nearly always one; the vision part stays as it is, in F16."""
    shapes: dict[str, tuple[int, ...]] = {}
    names = []
    for index, weight in enumerate(model.weights):
        pieces = _split(model, index, weight, shapes)
        shapes |= pieces
        names.append(tuple(pieces))
    heads = int(model.text.get("num_attention_heads") or model.text.get("n_head") or 1)
    kv_heads = int(model.text.get("num_key_value_heads") or heads)
    facts = ModelFacts(
        _ARCHITECTURES.get(model.model_type, model.model_type),
        model.layers,
        model.experts,
        max(1, heads // max(1, kv_heads)),
    )
    chosen = choose(shapes.items(), recipe_named(recipe), facts)
    found = []
    for weight, own in zip(model.weights, names, strict=True):
        plain = "F16" if len(weight.shape) > 1 else "F32"
        found.append(tuple((plain if weight.kind == "vision" else chosen[name].type, shapes[name]) for name in own))
    return tuple(found)


def _split(model: Model, index: int, weight: Weight, taken: Container[str]) -> dict[str, tuple[int, ...]]:
    """GGUF names and shapes of a weight; the second half of latent attention becomes a matrix of keys and one of values a head."""
    if weight.role != "kv_b":
        name = _name(index, weight)
        return {name if name not in taken else name.replace(".weight", f".x{index}.weight"): stacked_shape(weight)}
    text, rank = model.text, weight.matrix[-1]
    heads = int(text["num_attention_heads"])
    keys, values = int(text["qk_nope_head_dim"]), int(text["v_head_dim"])
    block = f"blk.{weight.layer or 0}"
    return {f"{block}.attn_k_b.weight": (heads, rank, keys), f"{block}.attn_v_b.weight": (heads, values, rank)}


def stacked_shape(weight: Weight) -> tuple[int, ...]:
    """The shape that GGUF stores: experts of a layer lie in one tensor."""
    return (weight.count, *weight.matrix) if weight.count > 1 and len(weight.matrix) == 2 else weight.matrix


def _name(index: int, weight: Weight) -> str:
    """A name that the recipes recognise; the index keeps names apart."""
    if weight.role in _OUTSIDE:
        return "token_types.weight" if "token_type" in weight.name else _OUTSIDE[weight.role]
    if weight.role not in _NAMES:
        return (
            f"blk.{weight.layer or 0}.x{index}_norm.weight"
            if len(weight.shape) < 2 or weight.kept
            else f"blk.{weight.layer or 0}.x{index}.weight"
        )
    part = "_exps" if weight.kind == "experts" else "_shexp" if weight.kind == "shared experts" else ""
    return f"blk.{weight.layer or 0}.{_NAMES[weight.role]}{part}.weight"


def extra_bytes(model: Model) -> int:
    """Bytes of tensors that GGUF has and the checkpoint has not: Llama 3.1's rotary frequency factors, one F32 for each pair of a head's dimensions."""
    rope = model.text.get("rope_scaling") or model.text.get("rope_parameters") or {}
    if (rope.get("rope_type") or rope.get("type")) != "llama3":
        return 0
    head_dim = model.text.get("head_dim") or model.hidden_size // int(model.text["num_attention_heads"])
    return 4 * (int(head_dim) // 2)
