"""The sections of `report.html`, in the order in which people ask: how much was lost at what size, where, and how it was made."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from markupsafe import Markup

from fewbit.report import charts
from fewbit.report.scores import short, with_error
from fewbit.report.text import human_bytes, human_count

Record = Mapping[str, Any]
Part = dict[str, Any]

MEASURES = (  # key, heading, scale, unit, better
    ("perplexity", "perplexity", 1.0, "", min),
    ("perplexity_ratio", "ratio", 1.0, "", min),
    ("kl", "KL, nats", 1.0, "", min),
    ("top1", "same top 1", 100.0, " %", max),
    ("top5", "top 5", 100.0, " %", max),
    ("rms_delta_p", "RMS Δp", 100.0, " %", min),
)


@functools.cache
def reference_points() -> dict[str, Any]:
    """Published losses that give scale to the plot."""
    return tomllib.loads(
        resources.files("fewbit.report").joinpath("data/reference_points.toml").read_text(encoding="utf-8")
    )


def names_of(record: Record) -> dict[tuple[str, str], str]:
    """(name, path) of each score -> a label; two candidates whose last path part is the same keep their folder."""
    keys = [(item["name"], item["path"]) for item in record["scores"]]
    lasts = [short(name) for name, path in keys if path == "reference"]
    labels = {}
    for name, path in keys:
        label = short(name) if lasts.count(short(name)) < 2 else "/".join(name.rstrip("/").split("/")[-2:])
        labels[name, path] = label if path == "reference" else f"{label} in {path}"
    return labels


def tiles(record: Record) -> list[dict[str, str]]:
    """Four figures for a first glance."""
    base = record["base"]
    best = min(record["scores"], key=lambda item: item["kl"]["value"])
    small = min(record["scores"], key=lambda item: item["bytes"])
    found = [(human_bytes(base["bytes"]), f"the base, {human_count(base['weights'])} weights")]
    found.append((f"{best['kl']['value']:.3g} nats", f"least KL: {short(best['name'])}, {human_bytes(best['bytes'])}"))
    if small is not best:
        found.append((human_bytes(small["bytes"]), f"smallest: {short(small['name'])}, KL {small['kl']['value']:.3g}"))
    floor = max((item["kl"]["value"] for item in record["noise_floor"]), default=None)
    if floor is not None:
        found.append((f"{floor:.2g} nats", "noise floor: the base against itself in bfloat16"))
    return [{"value": value, "words": words} for value, words in found]


def sections(record: Record) -> list[dict[str, Any]]:
    """All sections that the record has something for."""
    made = [_plot(record), _fidelity(record), _tails(record), _sizes(record)]
    for name, layers in record.get("layers", {}).items():
        made += _layers(name, layers)
    for name, found in record.get("tensor", {}).items():
        made.append(_distribution(name, found))
    for name, tokens in record.get("damaged", {}).items():
        made.append(_damaged(name, tokens))
    made += [_table_section(record, key, title) for key, title in EXTRA if key in record]
    trained = {item["name"]: item["facts"]["training"] for item in record["scores"] if item["facts"].get("training")}
    made += [_training(name, found) for name, found in trained.items()]
    return [*made, _making(record), _method(record)]


def _section(title: str, *parts: Part, note: str = "") -> dict[str, Any]:
    return {"title": title, "note": note, "parts": [part for part in parts if part]}


def _chart(svg: str, title: str = "", note: str = "") -> Part:
    return (
        {"kind": "chart", "svg": Markup(svg), "title": title, "note": note} if svg else {}
    )  # charts escape their own words


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]], note: str = "") -> Part:
    cells = [
        [cell if isinstance(cell, dict) else {"value": cell, "error": "", "best": False} for cell in row]
        for row in rows
    ]
    return {"kind": "table", "heads": heads, "rows": cells, "note": note}


def _cell(estimate: Record, scale: float = 1.0, unit: str = "", best: bool = False) -> dict[str, Any]:
    value, _, error = with_error(estimate["value"], estimate["stderr"], scale).partition(" ± ")
    return {"value": value + unit, "error": error, "best": best}


def _plot(record: Record) -> dict[str, Any]:
    labels = names_of(record)
    marks = [
        charts.Mark(
            labels[item["name"], item["path"]],
            item["bits_per_weight"],
            item["kl"]["value"],
            item["kl"]["low"] or 0.0,
            item["kl"]["high"] or item["kl"]["value"],
        )
        for item in record["scores"]
    ]
    known = reference_points()
    low, high = min(mark.x for mark in marks) - 1.5, max(mark.x for mark in marks) + 0.5
    marks += [
        charts.Mark(p["label"], p["bits"], p["kl"], p["kl"], p["kl"], "reference")
        for p in known["points"]
        if low <= p["bits"] <= high
    ]
    floor = max((item["kl"]["value"] for item in record["noise_floor"]), default=None)
    note = f"Bars are 95 % intervals. Circles in grey: {known['name']}, another and larger model, for scale only. All tensors count, those kept in 16 bits too."
    drawn = charts.size_against_loss(
        marks, floor or None, "bits per weight, over all tensors", "mean KL divergence from the base, nats"
    )
    return _section("Size against loss", _chart(drawn, note=note))


def _fidelity(record: Record) -> dict[str, Any]:
    labels = names_of(record)
    rows: list[list[Any]] = []
    for item in sorted(record["scores"], key=lambda item: item["kl"]["value"]):
        cells = [_cell(item[key], scale, unit) for key, _, scale, unit, _ in MEASURES]
        rows.append(
            [labels[item["name"], item["path"]], human_bytes(item["bytes"]), f"{item['bits_per_weight']:.2f}", *cells]
        )
    for column, (key, *_, better) in enumerate(MEASURES, 3):
        best = better(item[key]["value"] for item in record["scores"])
        for row, item in zip(rows, sorted(record["scores"], key=lambda item: item["kl"]["value"]), strict=True):
            row[column]["best"] = item[key]["value"] == best
    base = _cell(record["scores"][0]["base_perplexity"])
    rows.append(
        [
            f"base: {short(record['base']['name'])}",
            human_bytes(record["base"]["bytes"]),
            f"{8 * record['base']['bytes'] / record['base']['weights']:.2f}",
            base,
            *["·"] * 5,
        ]
    )
    for item in record["noise_floor"]:
        rows.append([item["name"], "·", "·", *[_cell(item[key], scale, unit) for key, _, scale, unit, _ in MEASURES]])
    note = "Least loss first. The base computed in another way stands below: what is smaller than that is noise. Its perplexity is of fewer tokens."
    return _section(
        "Fidelity", _table(["candidate", "bytes", "bits/w", *(name for _, name, *_ in MEASURES)], rows, note)
    )


def _tails(record: Record) -> dict[str, Any]:
    labels = names_of(record)
    shown = sorted(record["scores"], key=lambda item: item["kl"]["value"])

    def rows(quantiles: str, which: Sequence[str], scale: float = 1.0, unit: str = "") -> list[list[Any]]:
        return [
            [labels[item["name"], item["path"]], *(_cell(item[quantiles][q], scale, unit) for q in which)]
            for item in shown
        ]

    loss = _table(
        ["KL of single tokens, nats", "median", "90 %", "99 %", "99.9 %", "largest"],
        rows("kl_quantiles", ("0.5", "0.9", "0.99", "0.999", "1.0")),
    )
    change = _table(
        ["probability of the right token, change", "1 %", "5 %", "median", "95 %", "99 %"],
        rows("delta_p_quantiles", ("0.01", "0.05", "0.5", "0.95", "0.99"), 100, " %"),
        "In points of a hundred: of all tokens, 1 % lost at least what stands under 1 %.",
    )
    return _section("Tails", loss, change, note="The mean hides the tail; these are the quantiles.")


def _sizes(record: Record) -> dict[str, Any]:
    base = record["base"]
    rows = []
    seen = set()
    for item in [{"name": base["name"], "bytes": base["bytes"], "facts": base}, *record["scores"]]:
        if item["name"] in seen:
            continue
        seen.add(item["name"])
        memory = item["facts"].get("memory", {})
        rows.append(
            [
                short(item["name"]), item["facts"]["format"], human_bytes(item["bytes"]), f"{base['bytes'] / item['bytes']:.2f} x", f"{8 * item['bytes'] / base['weights']:.2f}",
                human_bytes(memory["cache"]) if memory else "·", human_bytes(memory["total"]) if memory else "·",
            ]
        )  # fmt: skip
    context = base.get("memory", {}).get("context")
    note = (
        f"In memory: weights as stored, and the key-value cache of {context:,} tokens in 16 bits; an engine's own buffers come on top."
        if context
        else ""
    )
    return _section(
        "Size and memory, before and after",
        _table(["", "format", "weights", "smaller", "bits/w", "cache", "in memory"], rows, note),
    )


def _layers(name: str, layers: Record) -> list[dict[str, Any]]:
    inside = [item for item in layers["tensors"] if item["block"] is not None]
    kinds = list(dict.fromkeys(item["kind"] for item in inside))
    blocks = sorted({item["block"] for item in inside})
    columns = [str(block) for block in blocks]

    def cells(key: str) -> dict[tuple[int, int], float]:
        return {
            (kinds.index(item["kind"]), blocks.index(item["block"])): item[key]
            for item in inside
            if item[key] is not None
        }

    drawn = [
        _chart(
            charts.heat_map(kinds, columns, cells("sqnr_db"), "SQNR", "{:.1f}", invert=True),
            "SQNR of the weights by block, dB (deeper is worse)",
        )
    ]
    if any(item["share"] for item in layers["tensors"]):
        millis = {key: 1000 * value for key, value in cells("share").items()}
        drawn.insert(
            0,
            _chart(
                charts.heat_map(kinds, columns, millis, "share", "{:.2f}"),
                "Share of the final KL by block, thousandths of a nat (deeper is worse)",
            ),
        )
    drift = charts.curves(
        [
            ("drift after the block", [b["drift"] for b in layers["blocks"]]),
            ("the block's own error", [b["own"] for b in layers["blocks"]]),
        ],
        "drift",
        "block",
    )
    drawn.append(_chart(drift, "Relative error of hidden states through depth"))
    made = [_section(f"Where {short(name)} lost it", *drawn)]
    shares = sorted((item for item in layers["tensors"] if item["share"]), key=lambda item: -abs(item["share"]))[:16]
    if shares:
        total = layers["kl"]
        rows = [
            (
                item["name"].removesuffix(".weight").removeprefix("model."),
                item["share"],
                f"{item['share'] / total:.1%} · {item['stored']}",
            )
            for item in shares
        ]
        note = f"Shares add up to {layers['explained']:.5f} of {total:.5f} nats, on {layers['tokens']:,} tokens. Bits given to the tensors at the top buy most."
        made.append(
            _section(
                "Sensitivity: the tensors that cost most", _chart(charts.bars(rows, "share of the final KL"), note=note)
            )
        )
    return made


def _distribution(name: str, found: Record) -> dict[str, Any]:
    parts = []
    weights = charts.histograms(
        found["low"], found["high"], [("base", found["base"]), (short(name), found["candidate"])], "weights"
    )
    parts.append(
        _chart(weights, f"Weights of {found['tensor']}", "Filled: the base; outlined: what the candidate decodes to.")
    )
    if found.get("codes"):
        used = f"{found['codes_used']} of {found['codes_possible']} codes are used; entropy {found['entropy']:.2f} bits of {found['bits']:g} stored."
        parts.append(
            _chart(
                charts.histograms(found["codes_low"], found["codes_high"], [("codes", found["codes"])], "codes"),
                "Codes",
                used,
            )
        )
    return _section(f"One tensor of {short(name)}", *parts)


def _damaged(name: str, tokens: Sequence[Record]) -> dict[str, Any]:
    parts = [
        {
            "kind": "token",
            **item,
            "kl": f"{item['kl']:.2f}",
            **{key: f"{item[key]:.1%}" for key in ("p", "base_p", "p_correct", "base_p_correct")},
        }
        for item in tokens
    ]
    return _section(f"Most damaged tokens of {short(name)}", *parts)


EXTRA = (
    ("engines", "Reference path against real engines"),
    ("generation", "Greedy continuations"),
    ("tasks", "Tasks"),
    ("embedding", "Embeddings"),
)


def _table_section(record: Record, key: str, title: str) -> dict[str, Any]:
    """A section of a plain table that `eval` made: {"heads": …, "rows": …, "note": …}, cells as words or {"value", "stderr"}."""
    found = record[key]
    rows = [[_cell(cell) if isinstance(cell, Mapping) else cell for cell in row] for row in found["rows"]]
    return _section(title, _table(found["heads"], rows), note=found.get("note", ""))


def _training(name: str, found: Record) -> dict[str, Any]:
    """The curve that `fewbit train` recorded."""
    points = found["curve"]
    first, last = points[0]["kl"], points[-1]["kl"]
    won = f"{1 - last / first:.0%} of it is gone" if 0 <= last < first else "nothing was won"
    drawn = charts.curves(
        [("KL, nats", [point["kl"] for point in points])], "KL while training", "updates", [p["step"] for p in points]
    )
    note = f"On windows set aside from the training text: KL {first:.5f} before the first update, {last:.5f} after {points[-1]['step']:,}; {won}."
    return _section(f"Training of {short(name)}", _chart(drawn, "KL against the float model", note))


def _making(record: Record) -> dict[str, Any]:
    parts, seen = [], set()
    for item in record["scores"]:
        facts = item["facts"]
        if item["name"] in seen:
            continue
        seen.add(item["name"])
        rows = [
            ("path", item["name"]),
            ("format", facts["format"]),
            (
                "schemes",
                ", ".join(f"{scheme} ({human_count(count)} weights)" for scheme, count in facts["schemes"].items()),
            ),
        ]
        rows += [(key.replace("_", " "), facts[key]) for key in ("made_by", "made_from", "command") if facts.get(key)]
        rows += (
            [
                (
                    "recipe",
                    ", ".join(
                        f"{key} {value}" for key, value in facts["recipe"].items() if value not in (None, [], {}, False)
                    ),
                )
            ]
            if facts.get("recipe")
            else []
        )
        rows += [("fingerprint", facts["fingerprint"])]
        rows += [
            ("sha256", f"{name} {value}")
            for name, value in facts.get("hashes", {}).items()
            if name.endswith((".safetensors", ".gguf"))
        ]
        parts.append({"kind": "facts", "title": short(item["name"]), "rows": rows, "open": len(record["scores"]) == 1})
    return _section("What was done", *parts)


def _method(record: Record) -> dict[str, Any]:
    used, scores = record["resources"], record["scores"]
    rows = [
        ("tokens", f"{record['text']['scored']:,} scored, sha256 {record['text']['digest']}"),
        (
            "errors",
            f"one standard error of cluster means over {scores[0]['clusters']} documents or windows; quantiles after Woodruff",
        ),
        (
            "path",
            "weights decoded, activations quantised as the config says, float32, the model's own code; engines only where named",
        ),
        ("base", record["base"]["fingerprint"]),
        (
            "passes",
            f"{used['forward_passes']} forward passes; base {'from the cache' if used['base_from_cache'] else 'computed'}",
        ),
        (
            "memory",
            f"{human_bytes(used['peak_bytes'])} at the peak, at most {human_bytes(used['predicted_peak_bytes'])} foreseen",
        ),
    ]
    if used["cache_bytes"]:
        bound = max(item["kl_error_bound"] for item in scores)
        rows.append(
            (
                "base kept",
                f"{human_bytes(used['cache_bytes'])}, {used['cache_bytes'] / used['full_logits_bytes']:.2%} of its float32 logits; every mean KL exact to {bound:.1g} nats",
            )
        )
    return _section(
        "How it was measured", {"kind": "facts", "title": "tokens, errors, memory", "rows": rows, "open": True}
    )
