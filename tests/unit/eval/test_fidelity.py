"""Evaluation of the sample as a whole: against a plain transformers loop, counted, cached, within its stated memory."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fewbit.base.errors import InputError, ResourceError
from fewbit.eval.fidelity import Options, study
from fewbit.eval.room import Demand, Room, fitted, peak_bytes
from fewbit.eval.stream import Runner
from fewbit.eval.windows import windows
from fewbit.run.hf import BlockModel
from fewbit.run.source import open_source

ROOT = Path(__file__).parents[3]
SAMPLE = ROOT / "samples" / "sample"
TEXT = str(ROOT / "samples" / "text" / "wikitext2-test.txt")


def test_perplexity_is_that_of_a_transformers_loop() -> None:
    transformers = pytest.importorskip("transformers")
    options = Options(text=TEXT, tokens=512, length=128)
    found = study([SAMPLE], SAMPLE, options)
    model = transformers.AutoModelForCausalLM.from_pretrained(SAMPLE, dtype=torch.float32).eval()
    total = count = 0.0
    with torch.no_grad():
        for row in found.windows.tokens:
            loss = model(row.unsqueeze(0), labels=row.unsqueeze(0)).loss
            total, count = total + float(loss) * (len(row) - 1), count + len(row) - 1
    assert found.scores[0].measures["perplexity"][0] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found.scores[0].measures["kl"][0] == 0.0 and found.scores[0].measures["top1"][0] == 1.0


def test_candidates_share_one_pass_of_the_base(tiny: Path, tiny_int4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    real = BlockModel.run_block

    def counted(self: BlockModel, index: int, params: object, hidden: torch.Tensor, kwargs: object) -> torch.Tensor:
        nonlocal calls
        calls += hidden.shape[0]
        return real(self, index, params, hidden, kwargs)

    monkeypatch.setattr(BlockModel, "run_block", counted)
    found = study([tiny_int4] * 6, tiny, Options(text=TEXT, tokens=256, length=128))
    assert calls == 7 * 3 * 2  # seven passes, three blocks, two windows
    assert found.resources["forward_passes"] == 7
    assert len({json.dumps(score.record()["kl"]) for score in found.scores}) == 1


def test_cache_is_small_and_exact_enough_at_the_loss_of_q4_k(q4_k_m: Path, tmp_path: Path) -> None:
    exact = study([q4_k_m], SAMPLE, Options(text=TEXT, tokens=1024))
    first = study([q4_k_m], SAMPLE, Options(text=TEXT, tokens=1024, cache=tmp_path))
    assert first.resources["cache_bytes"] <= 0.02 * first.resources["full_logits_bytes"]
    (file,) = tmp_path.glob("*.safetensors")
    assert file.stat().st_size <= 0.02 * first.resources["full_logits_bytes"] + 2000
    kl, true = first.scores[0].measures["kl"][0], exact.scores[0].measures["kl"][0]
    assert abs(kl - true) <= first.scores[0].kl_slack < 0.01 * true
    assert 0.005 < true < 0.03  # Q4_K's loss
    assert exact.scores[0].kl_slack == 0.0
    perplexity = exact.scores[0].measures["base_perplexity"][0]
    assert first.scores[0].measures["base_perplexity"][0] == pytest.approx(perplexity, rel=1e-6)


def test_cache_is_reused_for_the_same_tokens_only(tiny: Path, tiny_int4: Path, tmp_path: Path) -> None:
    options = Options(text=TEXT, tokens=256, length=128, cache=tmp_path)
    first, second = study([tiny_int4], tiny, options), study([tiny_int4], tiny, options)
    assert (first.resources["forward_passes"], second.resources["forward_passes"]) == (2, 1)
    assert second.resources["base_from_cache"] and second.scores[0].record() == first.scores[0].record()
    (file,) = tmp_path.glob("*.safetensors")
    study([tiny_int4], tiny, Options(text=TEXT, tokens=128, length=128, cache=tmp_path))
    assert len(list(tmp_path.glob("*.safetensors"))) == 2  # other tokens, another cache
    file.write_bytes(b"torn")
    assert not study([tiny_int4], tiny, options).resources["base_from_cache"]


def test_small_pieces_change_nothing_but_memory(tiny: Path, tiny_int4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbit.eval import fidelity
    from fewbit.run.acts import ActStore

    spilled: list[Path | None] = []
    real = ActStore.__init__

    def watched(
        self: ActStore, shape: tuple[int, int, int], dtype: torch.dtype, batch: int, path: Path | None = None
    ) -> None:
        spilled.append(path)
        real(self, shape, dtype, batch, path)

    monkeypatch.setattr(ActStore, "__init__", watched)
    options = Options(text=TEXT, tokens=512, length=128)
    free = study([tiny_int4], tiny, options)
    assert spilled == [None, None]
    smallest = Room(hidden=1000, row_bytes=1, batch_tokens=1)
    monkeypatch.setattr(fidelity, "fitted", lambda *_: smallest)
    tight = study([tiny_int4], tiny, options)
    assert all(path is not None and not path.exists() for path in spilled[2:]) and len(spilled) == 4
    assert tight.scores[0].measures["kl"][0] == pytest.approx(free.scores[0].measures["kl"][0], rel=1e-4)


def test_pieces_shrink_until_a_limit_holds_or_it_is_refused(tiny: Path) -> None:
    with open_source(tiny) as source:
        runner, demand = Runner(source), Demand(windows=4096, length=512, scored=4096 * 511, candidates=2)
        free = peak_bytes(runner, demand, Room())
        room = fitted(runner, demand, before=10**8, ram=10**8 + free // 2)
        assert room.spills(4096 * 512 * 64 * 4) and room.row_bytes <= Room().row_bytes
        assert peak_bytes(runner, demand, room) <= free // 2
        assert fitted(runner, demand, before=10**8, ram=10**8 + free) == Room()
        with pytest.raises(ResourceError, match="FB-E0813"):
            fitted(runner, demand, before=10**8, ram=2 * 10**8)


def test_the_limit_holds_in_a_process_of_its_own(tiny: Path, tiny_int4: Path) -> None:
    """Measured by the system over the process's whole life; the prediction is an upper bound and no wild one."""
    probe = [sys.executable, "-m", "fewbit.cli.main", "eval", str(tiny_int4), "--base", str(tiny), "--text", TEXT]
    probe += ["--tokens", "8192", "--length", "1024", "--cache", "off", "--no-noise", "--json"]

    def run(*more: str) -> dict:
        done = subprocess.run([*probe, *more], capture_output=True, text=True, timeout=280, check=False)
        return json.loads(done.stdout)

    free = run()["resources"]
    assert free["peak_bytes"] <= free["predicted_peak_bytes"] <= 1.5 * free["peak_bytes"]
    limit = int(0.94 * free["predicted_peak_bytes"])
    held = run("--ram", str(limit))["resources"]
    assert held["peak_bytes"] <= held["predicted_peak_bytes"] <= limit
    assert run("--ram", "200MB")["error"]["code"] == "FB-E0813"


def test_skip_is_llama_cpps_protocol(tiny: Path, tiny_int4: Path) -> None:
    found = study([tiny_int4], tiny, Options(text=TEXT, tokens=1024, length=512, skip=256))
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


def test_windows_longer_than_the_usual_and_than_the_context(tiny: Path, tiny_int4: Path) -> None:
    found = study([tiny_int4], tiny, Options(text=TEXT, tokens=2048, length=1024))
    assert found.windows.tokens.shape == (2, 1024) and found.scores[0].tokens == 2 * 1023
    assert not any("longer" in line for line in found.warnings)
    assert any(
        "longer than the model's context of 1024" in line
        for line in study([tiny_int4], tiny, Options(text=TEXT, tokens=2048, length=2048)).warnings
    )


def test_a_conversation_is_scored_through_the_template(tiny: Path, tiny_int4: Path) -> None:
    plain = study([tiny_int4], tiny, Options(tokens=512, length=128))
    chat = study([tiny_int4], tiny, Options(tokens=512, length=128, chat=True))
    assert (
        chat.record()["text"]["chat"] and 0 < chat.scores[0].tokens < plain.scores[0].tokens
    )  # the request is not scored
    assert chat.windows.digest != plain.windows.digest


@pytest.mark.parametrize("kind", ["parquet", "dataset", "dataset#test"])
def test_texts_of_every_kind(kind: str, tmp_path: Path) -> None:
    """A parquet file, and a dataset by the name of its folder, with and without a split."""
    rows = [
        {"text": f"Document {i} tells of " + "foxes and of hounds, and of what they did " * (9 + i)} for i in range(20)
    ]
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "data"
    folder.mkdir()
    for split, part in (("train", rows[:11]), ("test", rows[11:])):
        parquet.write_table(arrow.Table.from_pylist(part), folder / f"{split}.parquet")
    if kind != "parquet":
        pytest.importorskip("datasets")
    name = str(folder / "train.parquet") if kind == "parquet" else str(folder) + kind.removeprefix("dataset")
    chosen = windows(name, SAMPLE, 64, None, 8192)
    assert set(chosen.clusters.tolist()) == set(range(11 if "#" not in kind else 9))


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
