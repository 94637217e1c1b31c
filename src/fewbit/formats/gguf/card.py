"""What lies beside a GGUF: the model card (README.md with the hub's metadata) and an Ollama Modelfile. Text only."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import yaml

from fewbit.formats.gguf.plan import GgufPlan

_TAKEN_OVER = ("license", "license_name", "license_link", "language", "pipeline_tag", "datasets")
_OLLAMA = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}


def front_matter(text: str) -> dict[str, Any]:
    """The YAML head of a model card, {} without one or where it is no mapping."""
    if not text.startswith("---"):
        return {}
    head = text.removeprefix("---").partition("\n---")[0]
    try:
        found = yaml.safe_load(head)
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def command_of(record: Mapping[str, Any], target: str) -> str:
    """The `fewbit quantize` command that makes this output again."""
    recipe = record["recipe"]
    words = ["fewbit", "quantize", str(record["source"]), "--to", target]
    if recipe.get("method", "rtn") != "rtn":
        words += ["--method", str(recipe["method"])]
    for flag in ("imatrix", "calib"):
        if recipe.get(flag):
            words += [f"--{flag}", str(recipe[flag])]
    for rule in recipe.get("rules", ()):
        words += ["--rule", f"{rule['pattern']}={rule['scheme']}"]
    for name, value in recipe.get("options", {}).items():
        words += ["--set", f"{name}={value}"]
    for rewrite in recipe.get("rewrites", ()):
        words += ["--rewrites", str(rewrite)]
    return " ".join(map(shlex.quote, [*words, "-o", "OUT"]))


def model_card(
    plan: GgufPlan, files: Sequence[str], record: Mapping[str, Any], target: str, base: str = "", hub_id: str = ""
) -> str:
    """README.md for a GGUF.

    Args:
        files: names of its files, the first part first.
        record: what the run says of itself: `source`, `recipe`, `fewbit`.
        target: as the user spelt it.
        base: text of the source's own README.md, of which licence, language and task are taken over.
        hub_id: of the source, where it came from the hub.
    """
    source = str(record["source"])
    held = front_matter(base)
    head: dict[str, Any] = {key: held[key] for key in _TAKEN_OVER if key in held}
    if hub_id:
        head["base_model"] = hub_id
    head |= {
        "base_model_relation": "quantized",
        "quantized_by": "fewbit",
        "library_name": "gguf",
        "tags": ["gguf", "fewbit", plan.recipe.name],
    }
    numel, nbytes = Counter[str](), Counter[str]()
    for tensor in plan.tensors:
        numel[tensor.type] += prod(tensor.shape)
        nbytes[tensor.type] += tensor.nbytes
    count = Counter(tensor.type for tensor in plan.tensors)
    total = sum(numel.values())
    rows = [
        f"| {kind} | {count[kind]} | {numel[kind]:,} | {nbytes[kind] / 1e6:,.2f} MB |"
        for kind, _ in nbytes.most_common()
    ]
    name = source.rstrip("/").rpartition("/")[2]
    return "\n".join(
        [
            "---", yaml.safe_dump(head, sort_keys=False, allow_unicode=True).rstrip(), "---",
            f"# {name}, GGUF {plan.recipe.name}", "",
            f"{total:,} weights of `{plan.architecture}` in {sum(nbytes.values()) / 1e6:,.2f} MB: {8 * sum(nbytes.values()) / max(1, total):.3f} bits per weight.", "",
            "| type | tensors | weights | size |", "|---|---|---|---|", *rows, "",
            "```bash", command_of(record, target), "```", "",
            f"Made by fewbit {record.get('fewbit', '')}. It opens in llama.cpp (`llama-cli -m {files[0]}`) and, by the `Modelfile` beside it, in Ollama (`ollama create NAME -f Modelfile`).",
            *(["", f"Parts: {', '.join(files)}."] if len(files) > 1 else []), "",
            *(f"- {note}" for note in plan.notes),
        ]
    ).rstrip() + "\n"  # fmt: skip


def modelfile(files: Sequence[str], plan: GgufPlan, generation: Mapping[str, Any] | None = None) -> str:
    """An Ollama Modelfile for a GGUF in the same folder: `ollama create NAME -f Modelfile`.

    Ollama takes the chat template from the file; how to sample and where to stop is said here.

    Args:
        files: names of its files; Ollama opens whole files only.
        generation: contents of generation_config.json.
    """
    lines = [f"FROM ./{files[0]}"]
    if len(files) > 1:
        lines.insert(
            0,
            f"# {len(files)} parts: Ollama wants one file, so merge them first (llama-gguf-split --merge {files[0]} OUT.gguf)",
        )
    length = plan.metadata.get(f"{plan.architecture}.context_length")
    if length is not None:
        lines.append(f"PARAMETER num_ctx {min(int(length.data), 8192)}")
    for key, word in _OLLAMA.items():
        value = (generation or {}).get(key)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            lines.append(f"PARAMETER {word} {value:g}")
    return (
        "\n".join(
            [*lines, *(f"PARAMETER stop {json.dumps(token, ensure_ascii=False)}" for token in _stops(plan, generation))]
        )
        + "\n"
    )


def _stops(plan: GgufPlan, generation: Mapping[str, Any] | None) -> list[str]:
    """Texts of the tokens that end an answer."""
    tokens = plan.metadata.get("tokenizer.ggml.tokens")
    if tokens is None:
        return []
    listed = (generation or {}).get("eos_token_id")
    ids = listed if isinstance(listed, list) else [listed]
    own = plan.metadata.get("tokenizer.ggml.eos_token_id")
    ids = [*ids, own.data if own is not None else None]
    found = dict.fromkeys(int(token) for token in ids if isinstance(token, int) and 0 <= token < len(tokens.data))
    return [text for token in found if isinstance(text := tokens.data[token], str) and text]
