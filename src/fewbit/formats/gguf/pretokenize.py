"""Which of llama.cpp's built-in pre-tokenisers does what a tokenizer.json says.

Upstream recognises a tokeniser by the hash of one encoded text, which any added token changes. Here the rule itself is compared: the
steps of `pre_tokenizer` are written flat and looked up in `pretokenizers.toml`. What is not found there is refused.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from importlib import resources
from typing import Any

from fewbit.base.errors import InputError

_CONTRACTIONS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPELT = ("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?i:'s|'t|'re|'ve|'m|'ll|'d|)")
_HARMLESS_NORMALIZERS = ("NFC",)  # llama.cpp does not normalise; text is nearly always NFC already, as upstream accepts


@functools.cache
def rows() -> tuple[tuple[tuple[str, ...], bool, str], ...]:
    """(steps, ignore_merges, name) of every rule that llama.cpp has a row for."""
    table = tomllib.loads(resources.files(__package__).joinpath("pretokenizers.toml").read_text(encoding="utf-8"))
    return tuple(
        (tuple(map(_spelt_out, row["steps"])), row.get("ignore_merges", False), row["pre"]) for row in table["row"]
    )


def _spelt_out(pattern: str) -> str:
    """One spelling for patterns that mean the same."""
    for written in _SPELT:
        pattern = pattern.replace(written, _CONTRACTIONS)
    return pattern.replace("\r", r"\r").replace("\n", r"\n")


def steps_of(pre_tokenizer: Mapping[str, Any] | None) -> list[str]:
    """A `pre_tokenizer` of tokenizer.json as flat steps; see `pretokenizers.toml`.

    Raises:
        InputError: FB-E0321 for a step that no rule of llama.cpp has.
    """
    if pre_tokenizer is None:
        return []
    kind = pre_tokenizer.get("type")
    if kind == "Sequence":
        return [step for inner in pre_tokenizer.get("pretokenizers", ()) for step in steps_of(inner)]
    if kind == "ByteLevel":
        if pre_tokenizer.get("add_prefix_space"):
            raise InputError(
                "FB-E0321",
                "the tokeniser puts a space before every text (add_prefix_space), llama.cpp's BPE never does",
            )
        return ["@gpt2"] if pre_tokenizer.get("use_regex", True) else []
    if kind == "Digits":
        return ["@digits:1" if pre_tokenizer.get("individual_digits") else "@digits"]
    if kind == "Punctuation":
        return ["@punctuation"]
    if kind == "Split":
        pattern = pre_tokenizer.get("pattern", {})
        behavior, invert = pre_tokenizer.get("behavior"), pre_tokenizer.get("invert", False)
        if "Regex" in pattern and (behavior, invert) in (("Isolated", False), ("Removed", True)):
            return [_spelt_out(pattern["Regex"])]
    raise InputError("FB-E0321", f"no pre-tokeniser of llama.cpp has a step like {kind} {dict(pre_tokenizer)!r:.200}")


def pre_name(tokenizer: Mapping[str, Any]) -> str:
    """The value of `tokenizer.ggml.pre` for a byte-level BPE tokenizer.json.

    Raises:
        InputError: FB-E0321 with the steps that no row has.
    """
    normalizer = tokenizer.get("normalizer")
    kinds = [item.get("type") for item in (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])]
    if strange := [kind for kind in kinds if kind not in _HARMLESS_NORMALIZERS]:
        raise InputError(
            "FB-E0321", f"the tokeniser normalises text by {', '.join(map(str, strange))}, llama.cpp's BPE does not"
        )
    steps = tuple(steps_of(tokenizer.get("pre_tokenizer")))
    ignore = bool(tokenizer.get("model", {}).get("ignore_merges", False))
    names = [(known, name) for found, known, name in rows() if found == steps]
    exact = next((name for known, name in names if known == ignore), None)
    if exact is None:
        why = f" with ignore_merges={ignore}" if names else ""
        raise InputError("FB-E0321", f"no pre-tokeniser of llama.cpp splits text by {list(steps)}{why}")
    return exact
