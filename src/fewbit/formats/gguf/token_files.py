"""The files of a tokeniser, handed over as bytes by name, and the kinds of tokens that llama.cpp tells apart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fewbit.base.errors import InputError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "generation_config.json", "chat_template.jinja", "chat_template.json", "modules.json", "1_Pooling/config.json",
)  # fmt: skip


class TokenizerFiles:
    """Tokeniser files parsed on demand; a missing one is empty."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = files

    def json(self, name: str) -> Any:
        if name not in self.files:
            return {}
        try:
            return json.loads(self.files[name])
        except ValueError as error:
            raise InputError("FB-E0321", f"{name} is not JSON: {error}") from None

    def added(self) -> dict[int, dict[str, Any]]:
        """Added tokens: id -> {content, special, …}, from all the places where they may stand."""
        listed = {
            int(key): dict(value)
            for key, value in self.json("tokenizer_config.json").get("added_tokens_decoder", {}).items()
        }
        for content, token in self.json("added_tokens.json").items():
            listed.setdefault(int(token), {"content": content, "special": False})
        for entry in self.json("tokenizer.json").get("added_tokens", ()):
            listed[int(entry["id"])] = entry
        return listed


def looks_special(token: str) -> bool:
    """Whether an added token is a control token by its looks, though not marked so (as llama.cpp's converter sees it)."""
    return (
        token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (token.startswith("<|") and token.endswith("|>"))
        or (token.startswith("<｜") and token.endswith("｜>"))
        or (token.startswith("<unused") and token.endswith(">"))
    )
