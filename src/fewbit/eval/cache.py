"""The base's distributions on disk: compact, exact enough to be proved so, reusable.

What is kept of each scored position is the last hidden state, each value in 16 bits with one float32 scale per position; the base's own
final norm and head turn it back into all logits. That takes 2 width + 16 bytes where the float32 logits take 4 vocab: 1.6 % for a
width of 4,096 and a vocabulary of 128,256. Top-k lists with an exact normaliser take as much for k near 0.3 % of the vocabulary and
leave the tail, where a fifth of the divergence of a good quantisation lies, to a lower bound (the log-sum inequality) and no upper one.

Rounding the hidden states moves each logit a little. When the cache is written the exact distribution p and the restored p~ are both at
hand, so two numbers per position are kept beside it: KL(p || p~) and chi2 = sum (p - p~)^2 / p~. With them the error of any KL computed
from the cache is bounded, position by position, without p:

    | KL(p||q) - KL(p~||q) |  <=  KL(p||p~) + sqrt(chi2 * Var_p~(log p~/q))

The variance is computed exactly from what is at hand. `fewbit eval` states the mean of this bound for each candidate.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fewbit.base.record import canonical_json, digest
from fewbit.eval.measures import Rounding, softmax
from fewbit.eval.stream import Runner, States, rows_of
from fewbit.eval.windows import Windows
from fewbit.run.acts import ActStore

VERSION = 1
LEVELS = 32767


def default_folder() -> Path:
    """Where caches lie: $FEWBIT_CACHE/eval, else ~/.cache/fewbit/eval."""
    return Path(os.environ.get("FEWBIT_CACHE") or Path.home() / ".cache" / "fewbit").expanduser() / "eval"


def cache_key(fingerprint: str, chosen: Windows, settings: dict[str, Any]) -> str:
    """Name of a cache: changes with the model, the tokens, what is scored, and how the base is computed."""
    return digest({"version": VERSION, "model": fingerprint, "tokens": chosen.digest, **settings})[:32]


def encode_hidden(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float [rows, width] -> int16 codes [rows, width] and float32 scales [rows]."""
    exact = hidden.double()
    scale = (exact.abs().amax(-1) / LEVELS).float()
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale)).double()
    return (exact / divisor.unsqueeze(-1)).round().clamp(-LEVELS, LEVELS).to(torch.int16), scale


def decode_hidden(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The hidden states that codes stand for, float32 [rows, width]."""
    return codes.float() * scale.unsqueeze(-1)


def rounding(p_logits: torch.Tensor, restored: torch.Tensor) -> Rounding:
    """How far restored logits are from the exact ones: [rows, vocab] twice."""
    exact, near = p_logits.double(), restored.double()
    (p, norm_p), (r, norm_r) = softmax(exact), softmax(near)
    kl = (p * (exact - near)).sum(-1) - (norm_p - norm_r)[:, 0]
    return Rounding(kl.clamp_(min=0), ((p - r).square_() / r.clamp_min(1e-300)).sum(-1))


@dataclass
class BaseCache:
    """The base on some windows, rows in the order of `rows_of`.

    Attributes:
        codes: int16 [rows, width]. scale: float32 [rows].
        kl, chi2: float32 [rows], see `rounding`; nll: float32 [rows], exact loss of the right token.
        facts: what it was made of.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    kl: torch.Tensor
    chi2: torch.Tensor
    nll: torch.Tensor
    facts: dict[str, Any]

    @property
    def nbytes(self) -> int:
        return sum(
            part.numel() * part.element_size() for part in (self.codes, self.scale, self.kl, self.chi2, self.nll)
        )

    def rows(self, start: int, stop: int) -> tuple[torch.Tensor, Rounding]:
        """Hidden states [rows, width] of some positions, and how exact they are."""
        kept = slice(start, stop)
        return decode_hidden(self.codes[kept], self.scale[kept]), Rounding(
            self.kl[kept].double(), self.chi2[kept].double()
        )

    def save(self, path: Path) -> None:
        """Writes the cache beside its place, then renames it."""
        from safetensors.torch import save_file

        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        tensors = {"codes": self.codes, "scale": self.scale, "kl": self.kl, "chi2": self.chi2, "nll": self.nll}
        save_file(tensors, beside, metadata={"fewbit": canonical_json(self.facts)})
        os.replace(beside, path)

    @classmethod
    def load(cls, path: Path) -> BaseCache | None:
        """A cache from its file; None when there is none, or it is torn."""
        from safetensors import SafetensorError, safe_open

        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                parts = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
                facts = json.loads((file.metadata() or {}).get("fewbit", "{}"))
            return cls(**parts, facts=facts)
        except (SafetensorError, TypeError, ValueError):
            return None


def build(
    runner: Runner, chosen: Windows, facts: dict[str, Any], on_block: Callable[[int, int], None] | None = None
) -> BaseCache:
    """Runs the base once over the windows and keeps what is needed to compare anything with it."""
    hidden = runner.hidden(chosen.tokens, on_block)
    try:
        return _packed(runner, chosen, hidden, facts)
    finally:
        hidden.close()


def _packed(runner: Runner, chosen: Windows, hidden: ActStore, facts: dict[str, Any]) -> BaseCache:
    total = int(chosen.scored.sum())
    scale, kl, chi2, nll = (torch.empty(total, dtype=torch.float32) for _ in range(4))
    made = BaseCache(torch.empty(total, runner.width, dtype=torch.int16), scale, kl, chi2, nll, facts)
    at, states = 0, States(hidden)
    for window, positions in rows_of(chosen.tokens, chosen.scored, runner.room.rows(runner.vocab)):
        exact = states(window, positions)
        codes, steps = encode_hidden(exact)
        shown = chosen.tokens[window, positions].unsqueeze(0)
        p_logits = runner.logits(shown, exact.unsqueeze(0))
        found = rounding(p_logits, runner.logits(shown, decode_hidden(codes, steps).unsqueeze(0)))
        target = chosen.tokens[window, positions + 1].to(p_logits.device).unsqueeze(-1)
        rows = slice(at, at + positions.numel())
        made.codes[rows], made.scale[rows] = codes, steps
        made.kl[rows], made.chi2[rows] = found.kl.float(), found.chi2.float()
        made.nll[rows] = -torch.log_softmax(p_logits.double(), -1).gather(-1, target)[:, 0].float()
        at += positions.numel()
    return made
