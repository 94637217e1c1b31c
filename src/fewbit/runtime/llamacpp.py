"""Text from a GGUF file through llama.cpp, where its Python bindings (`pip install llama-cpp-python`) are installed.

What they load, tokenise and sample is theirs; here is only which file, how long a context, and the stream of text.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fewbit.base.errors import InputError

MODULE = "llama_cpp"
SPARE = 16  # positions for what a template or tokenizer adds


def missing() -> str | None:
    """Why llama.cpp cannot be used here, or None. Nothing is loaded."""
    return (
        None if importlib.util.find_spec(MODULE) else "llama-cpp-python is not installed (pip install llama-cpp-python)"
    )


class LlamaCpp:
    """A GGUF file opened by llama.cpp.

    Args:
        file: .gguf, the first one of a split.
        prompt: text to continue, or with `chat` the user's turn in the model's own template.
        count: tokens to generate at most; prompt and answer must fit the context.

    Raises:
        InputError: FB-E0918 when the bindings are missing, or refuse the file.
    """

    def __init__(self, file: Path, prompt: str, count: int, *, chat: bool = False, seed: int = 0) -> None:
        if (problem := missing()) is not None:
            raise InputError("FB-E0918", problem)
        import llama_cpp

        self.prompt, self.count, self.chat = prompt, count, chat
        room = len(prompt.encode()) + count + SPARE  # a token is a byte at least
        try:
            self.model: Any = llama_cpp.Llama(model_path=str(file), n_ctx=room, seed=seed, verbose=False)
        except (ValueError, RuntimeError, OSError) as error:
            raise InputError("FB-E0918", f"llama.cpp does not load it: {error}", file=file) from None
        self.prompt_tokens = len(self.model.tokenize(prompt.encode(), special=True))

    def stream(self, temperature: float, top_p: float) -> Iterator[str]:
        """Pieces of text, one a token; a token that ends no character gives an empty piece."""
        words: dict[str, Any] = {"max_tokens": self.count, "temperature": temperature, "top_p": top_p, "stream": True}
        if not self.chat:
            for part in self.model.create_completion(self.prompt, **words):
                if part["choices"][0].get("finish_reason") is None:
                    yield part["choices"][0]["text"]
            return
        turns = [{"role": "user", "content": self.prompt}]
        for part in self.model.create_chat_completion(turns, **words):
            delta = part["choices"][0]["delta"]
            if "content" in delta:
                yield delta["content"] or ""
