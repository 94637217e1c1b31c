"""The model card of a quantised checkpoint: Hub metadata, what it is, what it cost, how to make it again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewbit.report.scores import estimate, short
from fewbit.report.text import human_bytes

Record = Mapping[str, Any]

ENGINES = {  # format -> how to run it
    "compressed-tensors": "vllm serve {name}",
    "gptq": "vllm serve {name}",
    "gptq-v2": "vllm serve {name}",
    "awq": "vllm serve {name}",
    "fp8": "vllm serve {name}",
    "modelopt": "vllm serve {name} --quantization modelopt",
    "bitsandbytes": 'transformers.AutoModelForCausalLM.from_pretrained("{name}")',
    "hqq": 'transformers.AutoModelForCausalLM.from_pretrained("{name}")',
    "mlx": 'mlx_lm.generate --model {name} --prompt "…"',
    "gguf": "llama-cli -m {name}",
}
FOLDER_KEYS = ("license", "license_name", "license_link", "language", "pipeline_tag")


def model_card(record: Record, score: Record) -> str:
    """README.md of one candidate.

    Args:
        record: the study; score: one of its scores.
    """
    facts, base = score["facts"], record["base"]
    kind = facts["format"]
    lines = ["---", *_metadata(record, score), "---", "", f"# {short(score['name'])}", ""]
    schemes = ", ".join(f"`{scheme}`" for scheme in facts["schemes"])
    lines += [
        f"[{base['name']}]({_link(base['name'])}) quantised to **{kind}** ({schemes}) by {facts.get('made_by') or 'an unknown tool'}.",
        "",
    ]
    lines += _figures(record, score)
    if kind in ENGINES:
        lines += ["## Run it", "", "```", ENGINES[kind].format(name=short(score["name"])), "```", ""]
    if facts.get("command"):
        lines += ["## Make it again", "", "```", facts["command"], "```", ""]
    files = [
        (name, value) for name, value in facts.get("hashes", {}).items() if name.endswith((".safetensors", ".gguf"))
    ]
    if files:
        lines += ["| file | sha256 |", "|---|---|", *(f"| {name} | `{value}` |" for name, value in files), ""]
    return "\n".join(lines)


def _metadata(record: Record, score: Record) -> list[str]:
    facts, base = score["facts"], record["base"]
    tags = ["quantized", "fewbit", facts["format"], *sorted({scheme.split("-")[0] for scheme in facts["schemes"]})]
    rows = [f"base_model: {_yaml(base['name'])}", "base_model_relation: quantized"]
    inherited = front_matter(Path(base["name"]))
    rows += [f"{key}: {inherited[key]}" for key in FOLDER_KEYS if key in inherited]
    rows += [] if "pipeline_tag" in inherited else ["pipeline_tag: text-generation"]
    library = {"gguf": "gguf", "mlx": "mlx"}.get(facts["format"], "transformers")
    return [*rows, f"library_name: {library}", "tags:", *(f"- {_yaml(tag)}" for tag in dict.fromkeys(tags))]


def front_matter(folder: Path) -> dict[str, str]:
    """The simple `key: value` lines at the head of a folder's README.md; empty without one."""
    file = folder / "README.md"
    if not file.is_file():
        return {}
    head = file.read_text(encoding="utf-8", errors="replace").split("---")
    if len(head) < 3 or head[0].strip():
        return {}
    pairs = (line.partition(":") for line in head[1].splitlines() if line and not line.startswith((" ", "-", "#")))
    return {key.strip(): value.strip() for key, _, value in pairs if value.strip()}


def _figures(record: Record, score: Record) -> list[str]:
    base, text = record["base"], record["text"]
    quantiles = score["kl_quantiles"]
    rows = [
        (
            "size",
            f"{human_bytes(base['bytes'])}",
            f"{human_bytes(score['bytes'])} ({score['bits_per_weight']:.2f} bits per weight)",
        ),
        ("perplexity", estimate(score["base_perplexity"]), estimate(score["perplexity"])),
        ("KL divergence, nats", "0", estimate(score["kl"])),
        ("KL, 99 % and 99.9 % of tokens", "0", f"{quantiles['0.99']['value']:.3g}, {quantiles['0.999']['value']:.3g}"),
        ("same likeliest token", "100 %", estimate(score["top1"], 100, " %")),
        ("RMS change of the correct token's probability", "0", estimate(score["rms_delta_p"], 100, " %")),
    ]
    where = f"{text['scored']:,} tokens of {short(text['source'])}, windows of {text['length']}"
    table = [
        "| | base | this |",
        "|---|---|---|",
        *(f"| {name} | {before} | {after} |" for name, before, after in rows),
    ]
    return [
        "## What it cost",
        "",
        *table,
        "",
        f"Measured by `fewbit eval` over {where}; ± is one standard error, clustered by document.",
        "",
    ]


def _link(name: str) -> str:
    return name if Path(name).exists() else f"https://huggingface.co/{name}"


def _yaml(text: str) -> str:
    return (
        text
        if text.replace("/", "").replace("-", "").replace("_", "").replace(".", "").isalnum() and not text[0].isdigit()
        else '"' + text.replace('"', '\\"') + '"'
    )
