"""`fewbit eval`: candidates against a base on identical tokens.

The base runs once (or not at all, when its cache is there), each candidate once; one model's blocks are in memory at a time.

    windows ─> base: hidden states ──────────────┐ its head
                                                 ├─> measures per position ─> Score with clustered standard errors
               candidate: hidden states ─────────┘ its head
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from fewbit.base.errors import InputError
from fewbit.base.resident import peak_resident
from fewbit.eval.cache import BaseCache, build, cache_key
from fewbit.eval.extras import Extras, Wishes
from fewbit.eval.gguf_view import GgufView, open_candidate
from fewbit.eval.look import look
from fewbit.eval.measures import PerToken, Rounding, Score, compare, summarise
from fewbit.eval.provenance import about
from fewbit.eval.room import Demand, Room, fitted, peak_bytes
from fewbit.eval.stream import Runner, States, rows_of
from fewbit.eval.windows import Windows, windows
from fewbit.run.acts import ActStore
from fewbit.run.calib import Tokens
from fewbit.run.settings import chosen_device, require_device
from fewbit.run.source import Source, open_source

NOISE_TOKENS = 4096

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What an evaluation is made of.

    Attributes:
        text: file, `default` (bundled, held out from calibration), or dataset name; see `windows`.
        tokens: how many to use at most; length: of a window; skip: positions at a window's start that are not scored.
        chat: put plain documents into the chat template.
        device: "cpu", "cuda" …; ram: limit of resident memory, bytes.
        cache: folder of base caches, or None to compute the base exactly and keep nothing.
        noise: also compare the base with itself computed in bfloat16 and one window at a time, on some of the tokens.
        look: how many of the candidates to look at layer by layer.
        wishes: continuations, tasks, embeddings; see `extras`.
    """

    text: str = "default"
    tokens: int | None = None
    length: int = 512
    skip: int = 0
    chat: bool = False
    device: str = "cpu"
    ram: int | None = None
    cache: Path | None = None
    noise: bool = False
    look: int = 0
    wishes: Wishes = field(default_factory=Wishes)


@dataclass
class Study:
    """An evaluation as a whole: what was compared on which tokens, and how it came out.

    Attributes:
        scores: one for each candidate (two with an engine); noise: the base against itself.
        per_token: the measures of single positions, in the order of `scores`.
        extras: further parts by name (layers, tokens, tasks, generation …), plain data.
        resources: predicted and measured memory, forward passes, the cache's size.
    """

    base: str
    options: Options
    windows: Windows
    scores: list[Score] = field(default_factory=list)
    noise: list[Score] = field(default_factory=list)
    per_token: list[dict[str, torch.Tensor]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)
    resources: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """The study as plain data: what report.json holds."""
        text = {
            "source": self.options.text,
            "digest": self.windows.digest,
            "windows": self.windows.tokens.shape[0],
            "length": self.options.length,
            "skip": self.options.skip,
            "chat": self.options.chat,
            "scored": int(self.windows.scored.sum()),
        }
        return {
            "base": {"name": self.base, **self.facts},
            "text": text,
            "warnings": self.warnings,
            "scores": [score.record() for score in self.scores],
            "noise_floor": [score.record() for score in self.noise],
            "resources": self.resources,
            **self.extras,
        }


class Reference:
    """The base on the chosen windows: logits of any position, from memory or from the cache."""

    def __init__(self, source: Source, options: Options, say: Say) -> None:
        self.room = Room()
        self.runner = Runner(source, device=options.device)
        self.windows = windows(
            options.text, source.root, options.length, options.tokens, self.runner.vocab,
            skip=options.skip, chat=options.chat, most=self.runner.context,
        )  # fmt: skip
        self.options, self.source, self._say = options, source, say
        self.cached: BaseCache | None = None
        self.reused = False
        self._hidden: ActStore | None = None

    def make_room(self, candidates: int) -> int:
        """Fits the pieces of the work into the limit; the predicted peak of resident memory, bytes.

        Raises:
            ResourceError: FB-E0813 when the limit cannot be held.
        """
        options, (windows, length) = self.options, self.windows.tokens.shape
        wishes = options.wishes
        demand = Demand(
            windows, length, int(self.windows.scored.sum()), candidates, options.cache is not None,
            look=options.look > 0, resident=bool(wishes.generate or wishes.tasks),
        )  # fmt: skip
        before = psutil.Process().memory_info().rss
        self.room = self.runner.room = fitted(self.runner, demand, options.ram, before)
        return max(peak_resident(), before + peak_bytes(self.runner, demand, self.room))

    def run(self) -> None:
        """Computes the base, or finds it in the cache."""
        tokens = self.windows.tokens
        if self.options.cache is None:
            self._say(f"base: {tokens.numel():,} tokens")
            self._hidden = self.runner.hidden(tokens, _blocks(self._say))
            return
        settings = {"dtype": str(self.runner.model.dtype), "device": self.options.device.partition(":")[0]}
        path = self.options.cache / f"{cache_key(self.source.fingerprint(), self.windows, settings)}.safetensors"
        self.cached = BaseCache.load(path)
        self.reused = self.cached is not None
        if self.cached is None:
            self._say(f"base: {tokens.numel():,} tokens")
            facts = {"model": str(self.source.root), "text": self.windows.source, **settings}
            self.cached = build(self.runner, self.windows, facts, _blocks(self._say))
            self.cached.save(path)
        else:
            self._say(f"base: from the cache, {path}")

    def rows(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor, Rounding | None, torch.Tensor | None]]:
        """(window, positions, logits [rows, vocab], how exact they are, exact loss of the right token) over all scored positions."""
        at = 0
        states = States(self._hidden) if self._hidden is not None else None
        for window, positions in rows_of(self.windows.tokens, self.windows.scored, self.room.rows(self.runner.vocab)):
            exactness, nll = None, None
            if states is not None:
                hidden = states(window, positions)
            else:
                assert self.cached is not None, "run() comes first"
                hidden, exactness = self.cached.rows(at, at + positions.numel())
                nll = self.cached.nll[at : at + positions.numel()]
            at += positions.numel()
            shown = self.windows.tokens[window, positions].unsqueeze(0)
            yield window, positions, self.runner.logits(shown, hidden.unsqueeze(0)), exactness, nll

    def close(self) -> None:
        if self._hidden is not None:
            self._hidden.close()


Logits = Callable[[int, torch.Tensor], torch.Tensor]
"""(window, positions) -> float32 logits [positions, vocab] of a candidate, called in order."""


def measure(
    reference: Reference, candidates: Sequence[Logits], name: str, pair: bool = False
) -> list[dict[str, torch.Tensor]]:
    """Measures of every position, for each of some candidates in one walk over the base.

    Args:
        pair: also compare the second candidate with the first; comes last in the answer.

    Raises:
        InputError: FB-E0802 when a candidate has another vocabulary; FB-E0806 when its logits are not finite.
    """
    chosen = reference.windows
    found = [PerToken(int(chosen.scored.sum())) for _ in range(len(candidates) + pair)]
    for window, positions, p_logits, exactness, nll in reference.rows():
        target = chosen.tokens[window, positions + 1]
        given = [_checked(logits(window, positions), p_logits, name) for logits in candidates]
        every = [compare(p_logits, q_logits, target, exactness) for q_logits in given]
        if nll is not None:
            for parts in every:
                parts["base_nll"] = nll.double()
        if pair:
            every.append(compare(given[0], given[1], target))
        count = torch.ones_like(positions)
        for into, parts in zip(found, every, strict=True):
            into.add(**parts, window=count * window, position=positions, cluster=count * chosen.clusters[window])
    return [part.measures for part in found]


def _checked(q_logits: torch.Tensor, p_logits: torch.Tensor, name: str) -> torch.Tensor:
    if p_logits.shape[-1] != q_logits.shape[-1]:
        what = f"the candidate gives {q_logits.shape[-1]} logits, the base {p_logits.shape[-1]}"
        raise InputError("FB-E0802", what, file=name)
    if not bool(torch.isfinite(q_logits).all()):
        raise InputError("FB-E0806", "the candidate's logits hold NaN or infinity", file=name)
    return q_logits


def stored_logits(runner: Runner, tokens: torch.Tensor, hidden: ActStore) -> Logits:
    """Logits of a candidate whose hidden states are at hand."""
    states = States(hidden)
    return lambda window, positions: runner.logits(
        tokens[window, positions].unsqueeze(0), states(window, positions).unsqueeze(0)
    )


def study(
    candidates: Sequence[str | Path], base: str | Path, options: Options, say: Say | None = None, engine: Any = None
) -> Study:
    """Compares candidates with a base.

    Args:
        candidates, base: paths or hub ids, of any format we read.
        options: tokens, memory, cache.
        say: told what is being done.
        engine: an `engines.Engine`; candidates run through it too.

    Raises:
        InputError: FB-E0513 for a device that is not there; FB-E0801 for a text too short; FB-E0802 when a candidate has another vocabulary; FB-E0805 for a GGUF of another model.
        ResourceError: FB-E0813 when `ram` cannot be held, before any work.
    """
    tell = say or (lambda _line: None)
    options = replace(options, device=chosen_device(options.device))
    require_device(options.device)
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(open_source(base))
        opened: list[Source | GgufView] = []
        for path in candidates:
            opened.append(open_candidate(path, source))
            stack.enter_context(opened[-1])
        reference = Reference(source, options, tell)
        stack.callback(reference.close)
        made = Study(
            str(base), options, reference.windows, facts=about(source), warnings=list(reference.windows.warnings)
        )
        predicted = reference.make_room(len(opened))
        reference.run()
        passes = reference.runner.passes
        extras = Extras(options.wishes, reference.runner, reference.windows, lambda: Tokens(source.root), tell)
        for path, candidate in zip(candidates, opened, strict=True):
            passes += _score(made, reference, str(path), candidate, engine, extras, tell)
        made.extras |= extras.tables()
        if options.noise:
            made.noise = noise_floor(source, reference, options, tell)
        cached = reference.cached
        made.resources = {
            "predicted_peak_bytes": predicted,
            "peak_bytes": peak_resident(),
            "forward_passes": passes,
            "base_from_cache": reference.reused,
            "cache_bytes": cached.nbytes if cached else 0,
            "full_logits_bytes": 4 * reference.runner.vocab * int(reference.windows.scored.sum()),
        }
    return made


def _blocks(say: Say) -> Callable[[int, int], None]:
    return lambda done, total: (
        say(f"  block {done} of {total}") if done == total or done % max(1, total // 4) == 0 else None
    )


def _score(
    into: Study, reference: Reference, path: str, source: Source | GgufView, engine: Any, extras: Extras, say: Say
) -> int:
    """Adds a candidate's score, and its engine's; returns the passes it took."""
    say(f"candidate {path}")
    runner = Runner(source, device=reference.options.device, room=reference.room)
    runner.share_with(reference.runner)
    hidden = runner.hidden(into.windows.tokens, _blocks(say))
    info = source.checkpoint.manifest
    sizes = {
        "nbytes": info.nbytes,
        "bits_per_weight": 8 * info.nbytes / max(1, source.manifest.numel),
        "facts": about(source),
    }
    try:
        ways = [stored_logits(runner, into.windows.tokens, hidden)]
        with contextlib.ExitStack() as stack:
            if engine is not None:
                ways.append(stack.enter_context(engine.open(path, into.windows.tokens)))
            found = measure(reference, ways, path, pair=len(ways) > 1)
    finally:
        hidden.close()
    if len({score.name for score in into.scores}) < reference.options.look:
        seen = look(reference.runner, runner, into.windows, found[0], Tokens(reference.source.root), say)
        for part, data in seen.items():
            into.extras.setdefault(part, {})[path] = data
    passes = runner.passes
    extras.add(path, runner)
    for measures, way in zip(found, ("reference", getattr(engine, "name", "")), strict=False):
        into.scores.append(summarise(path, measures, path=way, **sizes))
        into.per_token.append(measures)
    if engine is not None:
        _agreement(into, path, engine.name, summarise(path, found[2]))
    return passes


def _agreement(into: Study, path: str, engine: str, score: Score) -> None:
    """A row of the table that holds the engine's output against the reference path's."""
    note = "The engine against fewbit's reference path on the same file: what the engine's own arithmetic adds (rounded activations, 16-bit caches)."
    table = into.extras.setdefault(
        "engines",
        {
            "heads": ["candidate", "engine", "KL, nats", "KL 99 %", "perplexity ratio", "same top 1"],
            "rows": [],
            "note": note,
        },
    )
    made = score.record()
    cells = [made["kl"], made["kl_quantiles"]["0.99"], made["perplexity_ratio"], made["top1"]]
    table["rows"].append([path, engine, *({"value": cell["value"], "stderr": cell["stderr"]} for cell in cells)])


def noise_floor(source: Source, reference: Reference, options: Options, say: Say) -> list[Score]:
    """The base against itself, computed in another way, on some of the tokens: differences below these mean nothing."""
    few = max(1, NOISE_TOKENS // reference.windows.tokens.shape[1])
    exact = Reference.__new__(Reference)
    exact.__dict__.update(vars(reference))
    exact.windows, exact.cached, exact._hidden = reference.windows.head(few), None, None
    tokens = exact.windows.tokens
    exact._hidden = exact.runner.hidden(tokens)
    scores = []
    try:
        for name, dtype, room in (
            ("base in bfloat16", torch.bfloat16, reference.room),
            ("base, one window at a time", torch.float32, replace(reference.room, batch_tokens=1)),
        ):
            say(f"noise floor: {name}")
            runner = Runner(source, dtype=dtype, device=options.device, room=room)
            runner.share_with(exact.runner)
            hidden = runner.hidden(tokens)
            try:
                scores.append(summarise(name, measure(exact, [stored_logits(runner, tokens, hidden)], name)[0]))
            finally:
                hidden.close()
    finally:
        exact.close()
    return scores


def evaluate(
    candidates: Sequence[str | Path], base: str | Path, *, on_progress: Say | None = None, **options: Any
) -> list[Score]:
    """Scores of candidates against a base; arguments as the fields of `Options`. See `study`.

    Raises:
        InputError: FB-E0814 for an argument that is none of these; as `study`.
    """
    known = [field.name for field in fields(Options)]
    odd = sorted(options.keys() - set(known))
    if odd:
        raise InputError("FB-E0814", f"there is no argument {odd[0]!r}; there are {', '.join(known)}")
    return study(candidates, base, Options(**options), on_progress).scores


def records(scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Scores as plain data for `--json`."""
    return [score.record() for score in scores]
