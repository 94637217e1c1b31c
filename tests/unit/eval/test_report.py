"""The page, the card and the comparison, from the record of a real run."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fewbit.base.errors import InputError
from fewbit.eval.fidelity import Options, study
from fewbit.eval.provenance import training
from fewbit.report.card import model_card
from fewbit.report.files import merged, read_record, write_cards, write_report
from fewbit.report.page import report_html
from fewbit.report.scores import study_page, with_error

ROOT = Path(__file__).parents[3]
TEXT = str(ROOT / "samples" / "text" / "wikitext2-test.txt")


@pytest.fixture(scope="module")
def record(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    from fewbit import api

    folder = tmp_path_factory.mktemp("evil") / "<script>alert(1)</script>"
    options = {"search": "absmax"}
    out = api.quantize(tiny, to="compressed-tensors:int4-g32", out=folder, verify=False, options=options).outputs[0]
    return study([out, tiny], tiny, Options(text=TEXT, tokens=256, length=128, noise=True, look=1)).record()


class Tags(HTMLParser):
    VOID = frozenset({"meta", "link", "br", "rect", "line", "circle", "path", "polyline"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_whole_and_asks_for_nothing(record: dict) -> None:
    page = report_html(record)
    tags = Tags()
    tags.feed(page)
    assert tags.open == [] and not {"script", "iframe", "object"} & {tag for tag, _ in tags.seen}
    links = [
        value
        for _, attrs in tags.seen
        for name, value in attrs.items()
        if name in ("src", "href", "srcset", "xlink:href")
    ]
    assert links == ["data:,"] and not re.search(r"url\(|@import|https?://", page)
    order = [
        page.index(word)
        for word in (
            "to know first",
            "Size against loss",
            "Fidelity",
            "Tails",
            "Size and memory",
            "Sensitivity",
            "Most damaged",
            "What was done",
        )
    ]
    assert order == sorted(order)
    assert "<script>" not in page and "&lt;script&gt;" in page  # a hostile name is words
    assert "prefers-color-scheme: dark" in page and page.count("<svg") >= 6


def test_files_read_back_and_merge(record: dict, tmp_path: Path) -> None:
    write_report(tmp_path / "a", record)
    again = read_record(tmp_path / "a")
    assert again["scores"] == json.loads(json.dumps(record["scores"]))
    other = {**again, "scores": [{**again["scores"][0], "name": "other"}], "text": {**again["text"], "digest": "x"}}
    both = merged([again, other])
    assert [item["name"] for item in both["scores"]] == [
        again["scores"][0]["name"],
        again["scores"][1]["name"],
        "other",
    ]
    assert "different tokens" in both["warnings"][0]
    assert "other" in study_page(both) and "other" in report_html(both)
    with pytest.raises(InputError, match="FB-E0808"):
        merged([again, {**again, "base": {**again["base"], "fingerprint": "y"}}])
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(InputError, match="FB-E0807"):
        read_record(tmp_path / "bad.json")


def test_the_card_is_what_the_hub_wants(tiny: Path, record: dict) -> None:
    card = model_card(record, record["scores"][0])
    head = __import__("yaml").safe_load(card.split("---")[1])
    assert (
        head["base_model_relation"] == "quantized"
        and head["base_model"] == str(tiny)
        and head["license"] == "apache-2.0"
    )
    assert {"quantized", "fewbit", "compressed-tensors"} <= set(head["tags"])
    assert "fewbit quantize" in card and "KL divergence" in card and "±" in card and "model.safetensors" in card


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (0.034118, 0.00078, "0.0341 ± 0.0008"),
        (56.63, 2.6, "56.6 ± 2.6"),
        (0.00013526, 0.0000037, "1.35e-4 ± 0.04e-4"),
        (1.0, 0.0, "1"),
        (None, None, "overflow"),
    ],
)
def test_values_with_errors(value: float | None, error: float | None, words: str) -> None:
    assert with_error(value, error) == words


def test_a_card_stands_in_the_manifest(tiny: Path, tiny_int4: Path, tmp_path: Path) -> None:
    out = tmp_path / "int4"
    shutil.copytree(tiny_int4, out)
    record = study([out], tiny, Options(text=TEXT, tokens=128, length=128)).record()
    (card,) = write_cards(record)
    assert card == out / "README.md" and "KL divergence" in card.read_text()
    listed = json.loads((out / "fewbit-manifest.json").read_text())["files"]
    assert listed["README.md"] == {
        "bytes": card.stat().st_size,
        "sha256": hashlib.sha256(card.read_bytes()).hexdigest(),
    }
    assert list(listed) == sorted(listed) and "model.safetensors" in listed
    (out / "fewbit-manifest.json").write_text("[]")
    with pytest.raises(InputError, match="FB-E0815"):
        write_cards(record)
    (out / "fewbit-manifest.json").unlink()
    write_cards(record)
    assert not (out / "fewbit-manifest.json").exists()


def test_the_curve_of_training_is_drawn_over_its_steps(record: dict) -> None:
    assert "Training of" not in report_html(record)
    curve = [{"step": step, "kl": kl, "loss": None} for step, kl in ((0, 0.4), (50, 0.2), (60, 0.1))]
    found = training({"training": {"steps": 60, "curve": [*curve, "noise", {"step": 61}]}})
    assert found is not None and found["curve"] == curve
    for bad in ({}, {"training": []}, {"training": {"curve": "x"}}, {"training": {"curve": [{"step": 1}]}}):
        assert training(bad) is None
    trained = copy.deepcopy(record)
    trained["scores"][0]["facts"]["training"] = found
    page = report_html(trained)
    assert "Training of" in page and "75% of it is gone" in page and "KL, nats, 60: 0.1" in page
    points = re.findall(r'<polyline points="([^"]*)"', page[page.index("Training of") :])[0].split()
    x = [float(point.partition(",")[0]) for point in points]
    assert x[1] - x[0] == pytest.approx(5 * (x[2] - x[1]), rel=0.02)  # steps are not evenly spread
