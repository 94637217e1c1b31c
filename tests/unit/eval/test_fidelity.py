"""Evaluation of the sample as a whole: against a plain transformers loop, counted, cached, within its stated memory."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from fewbit import api
from fewbit.base.errors import InputError
from fewbit.eval.fidelity import Options, study
from fewbit.eval.windows import windows
from fewbit.run.hf import BlockModel

ROOT = Path(__file__).parents[3]
SAMPLE = ROOT / "samples" / "sample"
TEXT = str(ROOT / "samples" / "text" / "wikitext2-test.txt")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("candidates") / "out"
    api.quantize(
        SAMPLE, to=("compressed-tensors:int4-g128", "gguf:Q4_K_M"), out=out, verify=False, options={"search": "absmax"}
    )
    return out


@pytest.fixture(scope="module")
def int4(made: Path) -> Path:
    return made / "compressed-tensors-int4-g128"


@pytest.fixture(scope="module")
def q4_k_m(made: Path) -> Path:
    return made / "gguf-Q4_K_M"


def test_perplexity_is_that_of_a_transformers_loop() -> None:
    transformers = pytest.importorskip("transformers")
    options = Options(text=TEXT, tokens=1024, length=256)
    found = study([SAMPLE], SAMPLE, options)
    model = transformers.AutoModelForCausalLM.from_pretrained(SAMPLE, dtype=torch.float32).eval()
    total = count = 0.0
    with torch.no_grad():
        for row in found.windows.tokens:
            loss = model(row.unsqueeze(0), labels=row.unsqueeze(0)).loss
            total, count = total + float(loss) * (len(row) - 1), count + len(row) - 1
    assert found.scores[0].measures["perplexity"][0] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found.scores[0].measures["kl"][0] == 0.0 and found.scores[0].measures["top1"][0] == 1.0


def test_candidates_share_one_pass_of_the_base(int4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    real = BlockModel.run_block

    def counted(self: BlockModel, index: int, params: object, hidden: torch.Tensor, kwargs: object) -> torch.Tensor:
        nonlocal calls
        calls += hidden.shape[0]
        return real(self, index, params, hidden, kwargs)

    monkeypatch.setattr(BlockModel, "run_block", counted)
    found = study([int4] * 6, SAMPLE, Options(text=TEXT, tokens=256, length=128))
    assert calls == 7 * 8 * 2  # seven passes, eight blocks, two windows
    assert found.resources["forward_passes"] == 7
    assert len({json.dumps(score.record()["kl"]) for score in found.scores}) == 1


def test_cache_is_small_exact_enough_and_reused(q4_k_m: Path, tmp_path: Path) -> None:
    exact = study([q4_k_m], SAMPLE, Options(text=TEXT, tokens=2048))
    options = Options(text=TEXT, tokens=2048, cache=tmp_path)
    first, second = study([q4_k_m], SAMPLE, options), study([q4_k_m], SAMPLE, options)
    assert (first.resources["forward_passes"], second.resources["forward_passes"]) == (2, 1) and second.resources[
        "base_from_cache"
    ]
    assert first.resources["cache_bytes"] <= 0.02 * first.resources["full_logits_bytes"]
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) == 1 and files[0].stat().st_size <= 0.02 * first.resources["full_logits_bytes"] + 2000
    kl, true = first.scores[0].measures["kl"][0], exact.scores[0].measures["kl"][0]
    assert abs(kl - true) <= first.scores[0].kl_slack < 0.01 * true
    assert 0.005 < true < 0.03  # Q4_K's loss
    assert second.scores[0].record() == first.scores[0].record()
    assert exact.scores[0].kl_slack == 0.0
    assert first.scores[0].measures["base_perplexity"][0] == pytest.approx(
        exact.scores[0].measures["base_perplexity"][0], rel=1e-6
    )
    study([q4_k_m], SAMPLE, Options(text=TEXT, tokens=1024, cache=tmp_path))
    assert len(list(tmp_path.glob("*.safetensors"))) == 2  # other tokens, another cache
    files[0].write_bytes(b"torn")
    assert not study([q4_k_m], SAMPLE, options).resources["base_from_cache"]


def test_memory_limits_change_nothing_but_memory(int4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbit.run.acts import ActStore

    spilled: list[Path | None] = []
    real = ActStore.__init__

    def watched(
        self: ActStore, shape: tuple[int, int, int], dtype: torch.dtype, batch: int, path: Path | None = None
    ) -> None:
        spilled.append(path)
        real(self, shape, dtype, batch, path)

    monkeypatch.setattr(ActStore, "__init__", watched)
    free = study([int4], SAMPLE, Options(text=TEXT, tokens=1024))
    assert spilled == [None, None]
    tight = study([int4], SAMPLE, Options(text=TEXT, tokens=1024, ram=3_000_000))
    assert all(path is not None and not path.exists() for path in spilled[2:]) and len(spilled) == 4
    assert tight.scores[0].measures["kl"][0] == pytest.approx(free.scores[0].measures["kl"][0], rel=1e-4)


def test_skip_is_llama_cpps_protocol(int4: Path) -> None:
    found = study([int4], SAMPLE, Options(text=TEXT, tokens=1024, length=512, skip=256))
    assert found.scores[0].tokens == 2 * 255 and int(found.per_token[0]["position"].min()) == 256


def test_documents_are_clusters_and_drawn_evenly(tmp_path: Path) -> None:
    file = tmp_path / "docs.jsonl"
    rows = [{"text": f"Document {i} says: " + "the quick brown fox is number " * (3 + 40 * i)} for i in range(8)]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    chosen = windows(str(file), SAMPLE, 64, 64 * 12, 8192)
    assert chosen.clusters.tolist()[:8] == [0, 1, 2, 3, 4, 5, 6, 7] and chosen.tokens.shape == (12, 64)
    assert not bool(chosen.scored[0].all()) and bool(
        chosen.scored[1].all()
    )  # the short one is padded, its padding not scored


def test_conversations_score_the_assistant(tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    talk = [
        {"role": "user", "content": "What is a fox, and where does it live?"},
        {"role": "assistant", "content": "A fox is a small animal that lives in the woods."},
    ]
    file.write_text("\n".join(json.dumps({"messages": talk}) for _ in range(3)))
    chosen = windows(str(file), SAMPLE, 64, None, 8192)
    share = float(chosen.scored[0].sum()) / int((chosen.tokens[0] != chosen.tokens[0, -1]).sum())
    assert 0.2 < share < 0.8


def test_bundled_text_is_held_out() -> None:
    chosen = windows("default", SAMPLE, 512, 8192, 8192)
    assert chosen.tokens.shape == (16, 512) and chosen.clusters.unique().numel() == 16


@pytest.mark.parametrize(
    ("options", "code"), [({"length": 512, "skip": 511}, "FB-E0804"), ({"text": "short.txt"}, "FB-E0801")]
)
def test_refusals(tmp_path: Path, options: dict, code: str) -> None:
    (tmp_path / "short.txt").write_text("too short")
    if "text" in options:
        options = {"text": str(tmp_path / "short.txt")}
    with pytest.raises(InputError, match=code):
        study([SAMPLE], SAMPLE, Options(**{"text": TEXT, "tokens": 512, **options}))
