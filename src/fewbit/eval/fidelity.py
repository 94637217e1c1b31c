"""Fidelity of quantised checkpoints: perplexity, KL divergence and flips against a base, on identical tokens, with standard errors.

For each token position the base's and the candidate's next-token distributions p and q are compared:

    nll      -log q(correct)                       perplexity = exp(mean)
    kl       sum p (log p - log q), in nats        the loss of information that quantisation caused
    delta p  q(correct) - p(correct)               its root mean square and percentiles are llama.cpp's measures
    top1     whether both put the same token first; top5: share of the base's five best among the candidate's five best

Windows of one document are not independent, so standard errors are those of cluster means: clusters are documents where the text has
several, else windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fewbit.base.errors import InputError
from fewbit.eval.stream import Runner
from fewbit.run.acts import ActStore
from fewbit.run.calib import Tokens, read_documents
from fewbit.run.source import open_source

QUANTILES = (0.5, 0.9, 0.99, 0.999)


@dataclass(frozen=True)
class Windows:
    """Evaluation tokens: int64 [windows, length], and the cluster (document) of each window."""

    tokens: torch.Tensor
    clusters: torch.Tensor


@dataclass
class PerToken:
    """Measures of every scored position, float64 [positions], in window order."""

    base_nll: list[torch.Tensor] = field(default_factory=list)
    nll: list[torch.Tensor] = field(default_factory=list)
    kl: list[torch.Tensor] = field(default_factory=list)
    delta_p: list[torch.Tensor] = field(default_factory=list)
    top1: list[torch.Tensor] = field(default_factory=list)
    top5: list[torch.Tensor] = field(default_factory=list)
    cluster: list[torch.Tensor] = field(default_factory=list)

    def joined(self) -> dict[str, torch.Tensor]:
        return {name: torch.cat(parts) for name, parts in vars(self).items()}


@dataclass(frozen=True)
class Score:
    """Fidelity of one candidate; each measure is (value, standard error).

    Attributes:
        name: path of the candidate.
        tokens: positions scored.
        measures: perplexity, base_perplexity, perplexity_ratio, kl, top1, top5, rms_delta_p.
        kl_quantiles: quantile -> KL; the maximum under 1.0.
        nbytes, bits_per_weight: of the candidate's weights.
    """

    name: str
    tokens: int
    measures: dict[str, tuple[float, float]]
    kl_quantiles: dict[float, float]
    nbytes: int
    bits_per_weight: float


def windows(text: str, root: Path, length: int, limit: int | None, vocab: int) -> Windows:
    """Consecutive, non-overlapping windows of a text (see `run.calib.read_documents`) under the base's tokenizer."""
    tokenizer = Tokens(root)
    rows: list[list[int]] = []
    clusters: list[int] = []
    documents = read_documents(text)
    wanted = None if limit is None else -(-limit // length)
    stream: list[int] = []
    for index, document in enumerate(documents):
        ids = tokenizer.ids(document)
        stream = ids if document.domain or document.messages or len(documents) == 1 else stream + ids
        while len(stream) >= length and (wanted is None or len(rows) < wanted):
            rows.append(stream[:length])
            clusters.append(index)
            stream = stream[length:]
    if not rows:
        raise InputError("FB-E0801", f"the text gives no window of {length} tokens", file=text)
    tokens = torch.tensor(rows, dtype=torch.int64)
    if int(tokens.max()) >= vocab:
        raise InputError("FB-E0732", f"token id {int(tokens.max())} exceeds the embedding's {vocab} rows", file=root)
    several = len(set(clusters)) > 5
    return Windows(tokens, torch.tensor(clusters) if several else torch.arange(len(rows)))


def evaluate(
    candidates: Sequence[str | Path],
    base: str | Path,
    *,
    text: str = "default",
    tokens: int | None = None,
    length: int = 512,
    device: str = "cpu",
    on_progress: Callable[[str], None] | None = None,
) -> list[Score]:
    """Scores candidates against a base on identical tokens. The base runs once; one model is in memory at a time.

    Args:
        candidates, base: paths or hub ids, of any format we read.
        text: file, `default`, or dataset name.
        tokens: how many to use at most (rounded up to whole windows).
        length: window length.
        on_progress: told what is being done.

    Raises:
        InputError: FB-E0801 for a text too short; FB-E0802 when a candidate has another vocabulary.
    """
    say = on_progress or (lambda _line: None)
    with open_source(base) as base_source:
        say(f"base {base}")
        reference = Runner(base_source, device=device)
        vocab = reference.model.module.get_input_embeddings().weight.shape[0]
        chosen = windows(text, base_source.root, length, tokens, vocab)
        base_hidden = reference.hidden(chosen.tokens)
        scores = []
        for candidate in candidates:
            say(f"candidate {candidate}")
            scores.append(_score(str(candidate), reference, base_hidden, chosen, device))
    return scores


def _score(candidate: str, reference: Runner, base_hidden: ActStore, chosen: Windows, device: str) -> Score:
    with open_source(candidate) as source:
        runner = Runner(source, device=device)
        hidden = runner.hidden(chosen.tokens)
        per_token = PerToken()
        pairs = zip(reference.logits(chosen.tokens, base_hidden), runner.logits(chosen.tokens, hidden), strict=True)
        for (start, stop, p_logits), (_, _, q_logits) in pairs:
            if p_logits.shape != q_logits.shape:
                raise InputError("FB-E0802", f"the candidate gives {q_logits.shape[-1]} logits, the base {p_logits.shape[-1]}", file=candidate)
            compare_batch(per_token, chosen.tokens[start:stop], chosen.clusters[start:stop], p_logits, q_logits)
        info = source.checkpoint.manifest
        return summarise(candidate, per_token.joined(), info.nbytes, 8 * info.nbytes / max(1, source.manifest.numel))


def compare_batch(into: PerToken, tokens: torch.Tensor, clusters: torch.Tensor, p_logits: torch.Tensor, q_logits: torch.Tensor) -> None:
    """Adds the measures of a batch: tokens [windows, length], logits [windows, length, vocab]; the last position predicts nothing."""
    targets = tokens[:, 1:].reshape(-1, 1).to(p_logits.device)
    for begin in range(0, targets.shape[0], 2048):
        rows = slice(begin, begin + 2048)
        log_p = torch.log_softmax(_scored(p_logits)[rows].double(), -1)
        log_q = torch.log_softmax(_scored(q_logits)[rows].double(), -1)
        right = targets[rows]
        p_right, q_right = log_p.gather(-1, right)[:, 0], log_q.gather(-1, right)[:, 0]
        into.base_nll.append(-p_right)
        into.nll.append(-q_right)
        into.kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
        into.delta_p.append(q_right.exp() - p_right.exp())
        best_p, best_q = log_p.topk(min(5, log_p.shape[-1]), -1).indices, log_q.topk(min(5, log_q.shape[-1]), -1).indices
        into.top1.append((best_p[:, 0] == best_q[:, 0]).double())
        into.top5.append((best_p.unsqueeze(-1) == best_q.unsqueeze(-2)).any(-1).double().mean(-1))
    into.cluster.append(clusters.repeat_interleave(tokens.shape[1] - 1))


def _scored(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, :-1].reshape(-1, logits.shape[-1])


def clustered(values: torch.Tensor, clusters: torch.Tensor) -> tuple[float, float]:
    """Mean over positions and its cluster-robust standard error (linearised ratio of cluster totals)."""
    _, index = clusters.unique(return_inverse=True)
    groups = int(index.max()) + 1
    mean = float(values.mean())
    if groups < 2:
        return mean, float(values.std(correction=1) / math.sqrt(values.numel())) if values.numel() > 1 else math.inf
    totals = torch.zeros(groups, dtype=torch.float64).index_add_(0, index, values.double() - mean)
    return mean, float((totals.square().sum() * groups / (groups - 1)).sqrt() / values.numel())


def summarise(name: str, measures: dict[str, torch.Tensor], nbytes: int, bits_per_weight: float) -> Score:
    """All measures with standard errors from the measures of single positions."""
    cluster = measures["cluster"]

    def mean(values: torch.Tensor) -> tuple[float, float]:
        return clustered(values, cluster)

    def exponential(values: torch.Tensor) -> tuple[float, float]:
        centre, error = mean(values)
        return math.exp(centre), math.exp(centre) * error

    square, square_error = mean(measures["delta_p"].square())
    rms = math.sqrt(square)
    kl = measures["kl"]
    return Score(
        name=name,
        tokens=int(kl.numel()),
        measures={
            "perplexity": exponential(measures["nll"]),
            "base_perplexity": exponential(measures["base_nll"]),
            "perplexity_ratio": exponential(measures["nll"] - measures["base_nll"]),
            "kl": mean(kl),
            "top1": mean(measures["top1"]),
            "top5": mean(measures["top5"]),
            "rms_delta_p": (rms, square_error / (2 * rms) if rms else 0.0),
        },
        kl_quantiles={**{q: float(_quantile(kl, q)) for q in QUANTILES}, 1.0: float(kl.max())},
        nbytes=nbytes,
        bits_per_weight=bits_per_weight,
    )


def _quantile(values: torch.Tensor, q: float) -> torch.Tensor:
    ordered = values.sort().values
    return ordered[min(ordered.numel() - 1, int(q * ordered.numel()))]


def records(scores: Iterable[Score]) -> list[dict[str, Any]]:
    """Scores as plain data for `--json`."""
    return [
        {
            "name": score.name,
            "tokens": score.tokens,
            "bytes": score.nbytes,
            "bits_per_weight": score.bits_per_weight,
            **{name: {"value": value, "stderr": error} for name, (value, error) in score.measures.items()},
            "kl_quantiles": {str(q): value for q, value in score.kl_quantiles.items()},
        }
        for score in scores
    ]
