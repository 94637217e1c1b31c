"""Continuations, embeddings and lm_eval's requests on the reference path, against transformers and by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fewbit.base.errors import InputError
from fewbit.eval.encoders import compare_embeddings, embeddings, spearman
from fewbit.eval.generate import Resident, continuations, repetition
from fewbit.eval.stream import Runner
from fewbit.eval.tasks import Likelihoods, require_harness
from fewbit.eval.windows import windows
from fewbit.run.calib import Tokens
from fewbit.run.source import open_source

ROOT = Path(__file__).parents[3]
SAMPLE = ROOT / "samples" / "sample"
TEXT = str(ROOT / "samples" / "text" / "wikitext2-test.txt")


@pytest.fixture(scope="module")
def runner() -> Runner:
    return Runner(open_source(SAMPLE))


@pytest.fixture(scope="module")
def peer() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(SAMPLE, dtype=torch.float32).eval()


def test_greedy_is_what_transformers_generates(runner: Runner, peer: torch.nn.Module) -> None:
    prompts = windows(TEXT, SAMPLE, 24, 96, 8192).tokens
    made = Resident(runner).greedy(prompts, 12)
    theirs = peer.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=12, min_new_tokens=12, do_sample=False
    )
    assert torch.equal(made, theirs[:, 24:])


def test_continuations_and_repetition() -> None:
    base = torch.tensor([[1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]])
    other = torch.tensor([[1, 2, 9, 4, 5, 6], [1, 2, 3, 4, 5, 6]])
    found = continuations(torch.zeros(2, 3, dtype=torch.int64), base, other)
    assert found.agreement[0] == 4.0 and found.identical[0] == 0.5 and found.example[2] == other[0].tolist()
    assert repetition([1, 2, 3, 4] * 3) == pytest.approx(1 - 4 / 9) and repetition([1, 2, 3]) == 0.0


def test_log_likelihoods_are_those_of_a_plain_forward(runner: Runner, peer: torch.nn.Module) -> None:
    tokens = Tokens(SAMPLE)
    pairs = [("The king and the", " queen of the land"), ("def main(", "):"), ("", "Once upon a time")]
    found = Likelihoods(runner, tokens).of_pairs(pairs)
    for (context, continuation), (value, _) in zip(pairs, found, strict=True):
        ids = tokens.inner(context + continuation)["input_ids"]
        alone = tokens.inner(context)["input_ids"]
        before = next(
            (i for i, token in enumerate(alone) if token != ids[i]), len(alone)
        )  # "(" and "):" merge into one token
        ids, before = (tokens.separator + ids, 1) if not context else (ids, before)
        with torch.no_grad():
            log_p = torch.log_softmax(peer(torch.tensor([ids])).logits[0].double(), -1)
        wanted = sum(float(log_p[i - 1, ids[i]]) for i in range(before, len(ids)))
        assert value == pytest.approx(wanted, rel=1e-5)


def test_rolling_sums_all_tokens(runner: Runner) -> None:
    work = Likelihoods(runner, Tokens(SAMPLE))
    whole = work.rolling(["Once upon a time there was a king"])[0]
    assert whole == pytest.approx(work.of_pairs([("", "Once upon a time there was a king")])[0][0], rel=1e-6)


def test_generation_stops_at_its_words(runner: Runner) -> None:
    work = Likelihoods(runner, Tokens(SAMPLE))
    free = work.generated([("The king and the", {"until": [], "max_gen_toks": 12})])[0]
    word = free.split()[2]
    assert work.generated([("The king and the", {"until": [word], "max_gen_toks": 12})])[0] == free[: free.index(word)]


def test_equal_embeddings_agree_and_noise_does_not(runner: Runner) -> None:
    chosen = windows(TEXT, SAMPLE, 32, 32 * 12, 8192)
    base = embeddings(runner, chosen)
    same = compare_embeddings(base, base, chosen.clusters)
    assert (same.cosine[0], same.overlap[0], same.order[0], same.first[0]) == pytest.approx((1.0, 1.0, 1.0, 1.0))
    noise = torch.nn.functional.normalize(
        torch.randn(base.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64), dim=-1
    )
    far = compare_embeddings(base, noise, chosen.clusters)
    assert abs(far.cosine[0]) < 0.2 and abs(far.order[0]) < 0.3 and far.overlap[0] < 0.7
    assert float(spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([9.0, 4.0, 1.0]))) == pytest.approx(-1.0)


def test_a_missing_harness_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match="FB-E0811"):
        require_harness()
