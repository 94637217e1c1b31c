"""Words and figures that the pages of `fewbit plan` and `fewbit advise` share."""

from __future__ import annotations

from rich.text import Text

from fewbit.plan.advise import Option
from fewbit.plan.shapes import Model

GOOD, BAD, DIM, HEAD = "green", "red", "dim", "bold cyan"


def gb(nbytes: float) -> str:
    """Gigabytes (10^9), three figures."""
    value = nbytes / 1e9
    return (
        f"{value:,.0f}"
        if value >= 1000
        else f"{value:.3g}"
        if value < 1
        else f"{value:.2f}"
        if value < 10
        else f"{value:.1f}"
    )


def tokens(number: float) -> str:
    """A context or a rate in few figures."""
    if number >= 10_000:
        return f"{number / 1000:,.0f}k"
    return f"{number:,.0f}" if number >= 100 else f"{number:.1f}"


def heading(text: str, note: str = "") -> Text:
    line = Text("\n" + text, style=HEAD)
    return line.append(f"   {note}", style=DIM) if note else line


def model_line(model: Model) -> Text:
    """The model in a line or two."""
    text = model.text
    line = Text(model.name, style="bold")
    active = f" ({model.active_params / 1e9:.2f}B active a token)" if model.experts else ""
    line.append(f"   {model.params:,} parameters{active}\n")
    heads, kv_heads = text.get("num_attention_heads") or text.get("n_head"), text.get("num_key_value_heads")
    parts = [model.model_type, f"{model.layers} layers", f"hidden {model.hidden_size:,}"]
    if heads:
        parts.append(
            f"{heads} heads"
            + (
                f", {kv_heads} for keys and values"
                if kv_heads and kv_heads != heads and not text.get("kv_lora_rank")
                else ""
            )
        )
    if model.experts:
        parts.append(f"{model.experts} experts, {model.experts_per_token} a token")
    parts.append(f"vocabulary {model.vocab_size:,}" + (", tied" if model.tied else ""))
    if model.max_context:
        parts.append(f"context to {model.max_context:,}")
    line.append(" · ".join(parts), style=DIM)
    if model.disk_bytes is not None:
        line.append(f" · {gb(model.disk_bytes)} GB on disk", style=DIM)
    for note in model.notes:
        line.append(f"\nnote: {note}", style="yellow")
    return line


def loss_words(option: Option) -> str:
    if not option.kl:
        return "no loss"
    return f"expected KL {option.kl:.3g} ({option.basis if option.basis == 'measured' else 'estimated'}), {option.risk} risk"


def speed_words(option: Option) -> str:
    if not option.speed.decode:
        return "speed unknown"
    sign = (
        "the speed of BF16"
        if abs(option.speedup - 1) < 0.02
        else f"{option.speedup:.1f} x BF16"
        if option.speedup > 1
        else f"SLOWER than BF16 ({option.speedup:.2f} x)"
    )
    return f"at most {tokens(option.speed.decode)} tokens/s, {sign}"


def kl_words(option: Option) -> str:
    return "0" if not option.kl else f"{option.kl:.4f}" if option.basis == "measured" else f"~{option.kl:.3f}"


def clock(seconds: float) -> str:
    """A rough time."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
