"""`report.html`: one self-contained page from the plain data of one or several evaluations; no network, no script."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from typing import Any

from fewbit.report.parts import sections, tiles

Record = Mapping[str, Any]


def report_html(record: Record) -> str:
    """The page of a study's record (see `eval.fidelity.Study.record`), or of several merged by `merge.merged`."""
    from jinja2 import Environment, StrictUndefined

    from fewbit import __version__

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(
        resources.files("fewbit.report").joinpath("data/report.html.jinja").read_text(encoding="utf-8")
    )
    scores, text = record["scores"], record["text"]
    names = {item["name"] for item in scores}
    title = f"What quantisation cost {_short(record['base']['name'])}"
    lead = (
        f"{len(names)} candidate{'' if len(names) == 1 else 's'} against {record['base']['name']}: {text['scored']:,} tokens of {text['source']}, "
        f"{text['windows']} windows of {text['length']}, the same for all."
    )
    footer = (
        f"Made by fewbit {__version__}. ± is one standard error, clustered by document. Tokens {text['digest'][:16]}."
    )
    page = template.render(
        title=title,
        lead=lead,
        warnings=all_warnings(record),
        tiles=tiles(record),
        sections=sections(record),
        footer=footer,
    )
    return "\n".join(row for row in page.splitlines() if row.strip()) + "\n"


def all_warnings(record: Record) -> list[str]:
    """What a reader must know first: about the text, the candidates, the layers."""
    found = list(record["warnings"])
    for item in record["scores"]:
        found += [f"{_short(item['name'])}: {line}" for line in item["facts"].get("warnings", ())]
        if item["kl"]["value"] > 0.5:
            found.append(f"{_short(item['name'])} lost much: mean KL {item['kl']['value']:.2f} nats")
    floor = max((item["kl"]["value"] for item in record["noise_floor"]), default=0.0)
    below = sorted({_short(item["name"]) for item in record["scores"] if item["kl"]["value"] < floor})
    if below:
        found.append(
            f"{', '.join(below)}: below the noise floor of {floor:.2g} nats, differences among them mean nothing"
        )
    for name, layers in record.get("layers", {}).items():
        found += [f"{_short(name)}: {note}" for note in layers["notes"]]
    return list(dict.fromkeys(found))


def _short(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2] or path
