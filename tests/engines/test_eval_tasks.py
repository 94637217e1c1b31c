"""`fewbit eval --tasks` through the real lm_eval: choices, perplexities and generated answers, the first two against transformers by hand."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import envs_root

pytestmark = pytest.mark.engines
ROOT = Path(__file__).resolve().parents[2]
TEXT = ROOT / "samples" / "text" / "wikitext2-test.txt"
CHOICES = [
    {"question": "He opened the door and went", "choices": [" into", " banana", " the of"], "answer": 0},
    {"question": "def main(", "choices": ["):", " whale", " upon"], "answer": 0},
    {"question": "Once upon a", "choices": [" time", " import", " return"], "answer": 0},
    {"question": "The king and the", "choices": [" {", " 7", " of queen"], "answer": 2},
]
YAML = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: {kind}
{more}"""
CHOICE = """doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
ROLLING = """doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: word_perplexity}
"""
GENERATED = """doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


def harness_path() -> str:
    """Where lm_eval is: installed, or unpacked as an environment of its own."""
    if importlib.util.find_spec("lm_eval"):
        return ""
    folder = envs_root() / "lmeval"
    if not (folder / "lm_eval").is_dir():
        if os.environ.get("FEWBIT_REQUIRE_ENGINES"):
            pytest.fail("no lm_eval", pytrace=False)
        pytest.skip(f"SKIPPED FOR LACK OF AN ENGINE: no lm_eval; pip install --target {folder} lm_eval")
    return str(folder)


@pytest.fixture(scope="module")
def record(sample: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tasks")
    extra = harness_path()
    data = folder / "probe.jsonl"
    data.write_text("\n".join(map(json.dumps, CHOICES)))
    kinds = {
        "multiple_choice": CHOICE,
        "loglikelihood_rolling": ROLLING,
        "generate_until": GENERATED,
    }
    files = []
    for kind, more in kinds.items():
        files.append(folder / f"fewbit_{kind}.yaml")
        files[-1].write_text(YAML.format(name=files[-1].stem, data=data, kind=kind, more=more))
    path = os.pathsep.join(filter(None, (str(ROOT / "src"), extra)))
    done = subprocess.run(
        [sys.executable, "-m", "fewbit.cli.main", "eval", str(sample), "--base", str(sample), "--text", str(TEXT), "--tokens", "64",
         "--length", "32", "--cache", "off", "--no-noise", "--json", "--tasks", ",".join(map(str, files))],
        capture_output=True, text=True, timeout=280, check=False, env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def peer(sample: Path) -> tuple[Any, Any]:
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(sample, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(sample)


def log_likelihood(model: Any, ids: list[int], before: int) -> float:
    with torch.no_grad():
        scores = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    return sum(float(scores[i - 1, ids[i]]) for i in range(before, len(ids)))


def value(record: dict[str, Any], task: str) -> float:
    row = next(row for row in record["tasks"]["rows"] if row[0].startswith(task))
    assert row[1] == row[2]  # the candidate is the base
    return row[1]["value"]


def test_choices_are_those_of_a_plain_loop(record: dict[str, Any], peer: tuple[Any, Any]) -> None:
    model, tokenizer = peer
    right = 0
    for row in CHOICES:
        context = tokenizer(row["question"])["input_ids"]
        sums = []
        for choice in row["choices"]:
            ids = tokenizer(row["question"] + choice)["input_ids"]
            before = next((i for i, token in enumerate(context) if token != ids[i]), len(context))
            sums.append(log_likelihood(model, ids, before))
        right += sums.index(max(sums)) == row["answer"]
    assert value(record, "fewbit_multiple_choice") == pytest.approx(right / len(CHOICES))


def test_word_perplexity_is_that_of_a_plain_loop(record: dict[str, Any], peer: tuple[Any, Any]) -> None:
    model, tokenizer = peer
    total = words = 0.0
    for row in CHOICES:
        ids = [tokenizer.eos_token_id, *tokenizer(row["question"])["input_ids"]]
        total, words = total + log_likelihood(model, ids, 1), words + len(row["question"].split())
    assert value(record, "fewbit_loglikelihood_rolling") == pytest.approx(math.exp(-total / words), rel=1e-4)


def test_generated_answers_are_scored(record: dict[str, Any]) -> None:
    assert value(record, "fewbit_generate_until") == 0.0  # no continuation is a bare number
