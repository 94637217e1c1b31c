"""What training takes: weights, gradients, the optimiser's state and activations, for the usual recipes and for training through the rounding.

Full fine-tuning with Adam in 32 bits takes 16 bytes a parameter (weight 4, gradient 4, two moments 8); so does mixed precision with
a 32-bit master copy (2 + 2 + 4 + 8). A 7B model: 112 GB before the first activation.
"""

from __future__ import annotations

from dataclasses import dataclass

from fewbit.base.errors import ResourceError
from fewbit.plan.calibrated import CONTEXT_BYTES, MODEL_BYTES
from fewbit.plan.memory import feed_forward
from fewbit.plan.resources import BASE_BYTES, MARGIN
from fewbit.plan.shapes import Model
from fewbit.plan.sizes import STORAGES, size_of


@dataclass(frozen=True)
class Recipe:
    """Bytes a parameter of one way to train.

    Attributes:
        weights, gradients, optimizer: bytes per trained parameter (weights: of every parameter unless `frozen` says otherwise).
        frozen: label of the storage of the frozen base, "" when everything is trained.
    """

    label: str
    weights: float
    gradients: float
    optimizer: float
    frozen: str = ""
    note: str = ""


RECIPES = (
    Recipe("Full, FP32 Adam", 4, 4, 8, note="4 weight + 4 gradient + 8 moments"),
    Recipe("Full, BF16 mixed", 2, 2, 12, note="2 + 2 + 4 master copy + 8 moments"),
    Recipe("Full, BF16 + 8-bit Adam", 2, 2, 2 + 8 / 256, note="2 + 2 + two 8-bit moments in blocks of 256"),
    Recipe("LoRA on BF16", 4, 4, 8, "BF16", note="frozen BF16 base, FP32 adapters"),
    Recipe("QLoRA on NF4", 4, 4, 8, "NF4", note="frozen NF4 base (double-quantised), FP32 adapters"),
)


@dataclass(frozen=True)
class Training:
    """Bytes of one recipe for one model; `activations` without checkpointing, `checkpointed` with it."""

    label: str
    note: str
    trained: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    checkpointed: int

    @property
    def total(self) -> int:
        """With gradient checkpointing, as nearly everybody trains."""
        return self.weights + self.gradients + self.optimizer + self.checkpointed

    @property
    def total_unchecked(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


LOGIT_COPIES = 5  # float32 copies of a step's logits: both models', the loss's slope, their gradient, a piece's shares
BLOCK_SHARE = 1 / 32  # scales and shifts that learn, as a share of the quantised weights: groups of 32 have no more
ROUNDED = {
    "full": "float32 student and teacher; all learns",
    "floats": "codes stay; scales, norms, embeddings and head learn",
    "scales": "codes, embeddings and head stay",
}  # recipes of `fewbit train`


def through_rounding(model: Model, recipe: str, tokens: int, quantised: int | None = None) -> Training:
    """What `fewbit train` takes, the program itself left out: student and teacher in float32, what learns, and one step.

    Args:
        recipe: a key of `ROUNDED`. tokens: of a step. quantised: weights behind the rounding, None for what quantising takes by default.
    """
    if quantised is None:
        quantised = sum(weight.numel for weight in model.weights if not weight.kept)
    floating = model.params - quantised
    learning = int({"full": model.params, "floats": floating}.get(recipe, 0) + BLOCK_SHARE * quantised)
    values = quantised * (4 if recipe == "full" else 5)  # what the rounding makes of them; kept codes are a byte each
    values += 4 * floating if recipe != "scales" else 0
    logits = tokens * model.vocab_size
    step = 2 * (activation_bytes(model, tokens, False) - 8 * logits) + 4 * LOGIT_COPIES * logits  # all in float32
    return Training(
        f"QAT, {recipe}", ROUNDED[recipe], learning, 8 * model.params + values, 4 * learning, 8 * learning, step, step
    )


def require_memory(model: Model, recipe: str, tokens: int, quantised: int, limit: int, device: str = "cpu") -> int:
    """Refuses a `fewbit train` that will not fit. -> the bytes foretold, the program itself included.

    Args:
        recipe, tokens, quantised: as `through_rounding`. limit: bytes of main memory, or of the device's where that is not the CPU.

    Raises:
        ResourceError: FB-E0514.
    """
    program = BASE_BYTES + MODEL_BYTES if device == "cpu" else CONTEXT_BYTES
    needed = through_rounding(model, recipe, tokens, quantised).total
    if program + MARGIN * needed > limit:
        where, allowed = ("", "--ram allows") if device == "cpu" else (f" of {device}'s memory", "are free there:")
        most = (program + MARGIN * needed) / 1e9
        what = (
            f"recipe {recipe} with {tokens:,} tokens a step takes {most:.2f} GB{where}, {allowed} {limit / 1e9:.2f} GB"
        )
        raise ResourceError("FB-E0514", what)
    return program + needed


def adapter_params(model: Model, rank: int) -> int:
    """Parameters of low-rank adapters on every linear layer: rank x (in + out) each."""
    return sum(
        rank * (weight.matrix[-1] + weight.matrix[-2]) * weight.count * _stack(weight.matrix)
        for weight in model.weights
        if not weight.kept
    )


def _stack(matrix: tuple[int, ...]) -> int:
    return matrix[0] if len(matrix) == 3 else 1


def activation_bytes(model: Model, tokens: int, checkpointing: bool) -> int:
    """Values kept for the backward pass, 16 bits each, and float32 logits with their gradient.

    A layer keeps the inputs of its norms and matrices, queries, keys, values, attention's output and three values of the gated feed-forward's
    width; attention is fused, so no scores. With checkpointing a layer keeps its input only and one layer at a time is computed again.
    """
    text = model.text
    heads = int(text.get("num_attention_heads") or text.get("n_head") or 1)
    head_dim = int(text.get("head_dim") or model.hidden_size // heads)
    kv_heads = int(text.get("num_key_value_heads") or heads)
    layer = 4 * model.hidden_size + 2 * heads * head_dim + 2 * kv_heads * head_dim + 4 * feed_forward(model)
    kept = model.layers * model.hidden_size + layer if checkpointing else model.layers * layer
    return tokens * (2 * kept + 8 * model.vocab_size)


def training(model: Model, *, sequence: int = 2048, batch: int = 1, rank: int = 16) -> tuple[Training, ...]:
    """What every recipe of `RECIPES`, and training through the rounding, takes for `batch` sequences of `sequence` tokens."""
    tokens = sequence * batch
    rows = []
    for recipe in RECIPES:
        trained = adapter_params(model, rank) if recipe.frozen else model.params
        base = size_of(model, STORAGES[recipe.frozen]).total if recipe.frozen else 0
        rows.append(
            Training(
                recipe.label, recipe.note, trained, base + round(recipe.weights * trained), round(recipe.gradients * trained), round(recipe.optimizer * trained),
                activation_bytes(model, tokens, False), activation_bytes(model, tokens, True),
            )
        )  # fmt: skip
    return (*rows, *(through_rounding(model, recipe, tokens) for recipe in ("full", "floats")))
