"""Reports and model cards as files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewbit.base.errors import InputError
from fewbit.base.record import readable_json
from fewbit.report.card import model_card
from fewbit.report.page import report_html

SCHEMA = "fewbit.eval/1"
CARD = "README.md"
MANIFEST = "fewbit-manifest.json"


def write_text(path: Path, text: str) -> None:
    """Writes a file beside its place, then renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def write_report(folder: Path, record: Mapping[str, Any]) -> None:
    """report.html and report.json of a study's record."""
    write_text(folder / "report.html", report_html(record))
    write_text(folder / "report.json", readable_json({"schema": SCHEMA, **record}))


def write_cards(record: Mapping[str, Any]) -> list[Path]:
    """README.md into the folder of every candidate that is one, and into its manifest; returns the paths."""
    written = []
    for score in record["scores"]:
        folder = Path(score["name"]).expanduser()
        if score["path"] == "reference" and folder.is_dir():
            text = model_card(record, score)
            write_text(folder / CARD, text)
            _list_in_manifest(folder, CARD, text.encode())
            written.append(folder / CARD)
    return written


def _list_in_manifest(folder: Path, name: str, data: bytes) -> None:
    """Adds a file to the list of `fewbit-manifest.json`, as if the run had written it; a folder that fewbit did not make has none."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return
    try:
        facts = json.loads(manifest.read_text(encoding="utf-8"))
        files = facts["files"]
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    except (ValueError, KeyError, TypeError) as error:
        what = f"the manifest cannot be read, so {name} cannot be listed in it: {type(error).__name__}: {error}"
        raise InputError("FB-E0815", what, file=manifest) from None
    facts["files"] = dict(sorted(files.items()))
    write_text(manifest, readable_json(facts))


def read_record(path: Path) -> dict[str, Any]:
    """A study's record from report.json, or from the folder that holds it.

    Raises:
        InputError: FB-E0807 when it is no such file.
    """
    file = path / "report.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError("FB-E0807", f"no report can be read: {error}", file=file) from None
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise InputError("FB-E0807", f"the file is no report of `fewbit eval` ({SCHEMA})", file=file)
    return found


def merged(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Several studies of one base as one: candidates side by side; a candidate measured twice on the same tokens counts once.

    Raises:
        InputError: FB-E0808 for different bases.
    """
    first = records[0]
    made = {**first, "scores": [], "warnings": []}
    for record in records:
        if record["base"]["fingerprint"] != first["base"]["fingerprint"]:
            what = f"the reports are of different bases: {first['base']['name']} and {record['base']['name']}"
            raise InputError("FB-E0808", what)
        made["warnings"] += [line for line in record["warnings"] if line not in made["warnings"]]
        known = {(item["name"], item["path"]) for item in made["scores"]}
        made["scores"] += [item for item in record["scores"] if (item["name"], item["path"]) not in known]
        for part in ("layers", "damaged", "tensor"):
            if part in record:
                made[part] = {**record[part], **made.get(part, {})}
    if len({record["text"]["digest"] for record in records}) > 1:
        made["warnings"].insert(
            0, "the candidates were measured on different tokens: their figures cannot be compared closely"
        )
    return made
