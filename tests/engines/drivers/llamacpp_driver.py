"""Loads a GGUF file with real llama.cpp (prebuilt libllama by ctypes). Env: llamacpp.

Job:  model         .gguf file (the first one of a split)
      texts         strings to tokenise; with special (default false): add BOS and parse control tokens
      prompts       lists of token ids
      logits        .npz to write: one float32 [tokens, vocab] per prompt, named "0", "1", ...
      embeddings    .npz to write instead, of an encoder: one float32 [tokens, width] per prompt, not pooled
      generate      greedy tokens to add to each prompt (default 0)
      threads       default 2;  flash: true for flash attention (default off);  check: scan every tensor (default true)
      kv            "f32" (default) | "f16" cache of keys and values
      quantize      {"out": .gguf, "ftype": number of llama.h's enum llama_ftype, "pure": bool}: run llama-quantize's code instead
Result: tokens, pieces, generated, generated_text, vocab, metadata, description, size, parameters, load_seconds
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from _wire import Job, Result, serve

ENV = Path(sys.prefix)
LIBRARIES = ENV / "lib-llama"


def bindings() -> types.ModuleType:
    """llama-cpp-python's ctypes declarations over the prebuilt library, skipping functions which that build does not export."""
    os.environ["LLAMA_CPP_LIB_PATH"] = str(LIBRARIES)
    package = types.ModuleType("llama_cpp")
    package.__path__ = [str(next((ENV / "lib").glob("python3*")) / "site-packages" / "llama_cpp")]
    sys.modules["llama_cpp"] = package
    import llama_cpp._ctypes_extensions as extensions

    def tolerant(library: ctypes.CDLL) -> Callable[..., Any]:
        def declare(name: str, argtypes: list[Any], restype: Any, enabled: bool = True) -> Callable[[Any], Any]:
            def decorate(stub: Any) -> Any:
                if not enabled or not hasattr(library, name):
                    return stub
                function = getattr(library, name)
                function.argtypes, function.restype = argtypes, restype
                functools.update_wrapper(function, stub, assigned=("__doc__",), updated=())
                return function

            return decorate

        return declare

    extensions.ctypes_function_for_shared_library = tolerant
    import llama_cpp.llama_cpp as api

    backends = ctypes.CDLL(str(LIBRARIES / "libggml.so"))
    backends.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
    backends.ggml_backend_load_all_from_path(str(LIBRARIES).encode())
    api.llama_backend_init()
    defaults = api.llama_context_default_params()
    if (defaults.n_ctx, defaults.n_batch, defaults.n_seq_max, defaults.type_k) != (512, 2048, 1, 1):
        raise RuntimeError("the bindings and the library disagree about llama_context_params; pin matching versions")
    return api


class Model:
    """One GGUF file, open in llama.cpp."""

    def __init__(self, api: types.ModuleType, job: Job) -> None:
        parameters = api.llama_model_default_params()
        parameters.check_tensors = job.get("check", True)
        parameters.n_gpu_layers = 0
        self.api, self.job = api, job
        self.handle = api.llama_model_load_from_file(str(job["model"]).encode(), parameters)
        if not self.handle:
            raise RuntimeError(f"llama.cpp refuses {job['model']} (its reason is on stderr)")
        self.vocab = api.llama_model_get_vocab(self.handle)
        self.n_vocab = api.llama_vocab_n_tokens(self.vocab)

    def tokenize(self, text: str, special: bool) -> list[int]:
        data = text.encode()
        buffer = (self.api.llama_token * (len(data) + 16))()
        count = self.api.llama_tokenize(self.vocab, data, len(data), buffer, len(buffer), special, special)
        if count < 0:
            raise RuntimeError(f"llama_tokenize wants {-count} tokens for {len(data)} bytes")
        return list(buffer[:count])

    def piece(self, token: int) -> str:
        buffer = ctypes.create_string_buffer(512)
        size = self.api.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, True)
        return buffer.raw[: max(size, 0)].decode("utf-8", "replace")

    def text(self, tokens: list[int]) -> str:
        buffer = ctypes.create_string_buffer(64 * len(tokens) + 64)
        array = (self.api.llama_token * len(tokens))(*tokens)
        size = self.api.llama_detokenize(self.vocab, array, len(tokens), buffer, len(buffer), False, True)
        return buffer.raw[: max(size, 0)].decode("utf-8", "replace")

    def metadata(self) -> dict[str, str]:
        found, buffer = {}, ctypes.create_string_buffer(1 << 16)
        for index in range(self.api.llama_model_meta_count(self.handle)):
            self.api.llama_model_meta_key_by_index(self.handle, index, buffer, len(buffer))
            key = buffer.value.decode()
            self.api.llama_model_meta_val_str_by_index(self.handle, index, buffer, len(buffer))
            found[key] = buffer.value.decode("utf-8", "replace")[:400]
        return found

    def run(self, tokens: list[int], generate: int) -> tuple[np.ndarray, list[int]]:
        """Logits at every position of the prompt, and the greedy continuation."""
        api, job = self.api, self.job
        parameters = api.llama_context_default_params()
        size = len(tokens) + generate + 8
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = size
        parameters.n_threads = parameters.n_threads_batch = job.get("threads", 2)
        parameters.flash_attn_type = 1 if job.get("flash") else 0
        parameters.type_k = parameters.type_v = {"f32": 0, "f16": 1}[job.get("kv", "f32")]
        context = api.llama_init_from_model(self.handle, parameters)
        if not context:
            raise RuntimeError("llama.cpp could not make a context")
        batch = api.llama_batch_init(size, 0, 1)
        try:
            logits = self.decode(context, batch, tokens, 0)
            grown, last = [], logits[-1]
            for step in range(generate):
                grown.append(int(last.argmax()))
                last = self.decode(context, batch, grown[-1:], len(tokens) + step)[-1]
            return logits, grown
        finally:
            api.llama_batch_free(batch)
            api.llama_free(context)

    def embed(self, tokens: list[int]) -> np.ndarray:
        """What an encoder makes of every position of a prompt, float32 [tokens, width]."""
        api, parameters = self.api, self.api.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = len(tokens) + 8
        parameters.n_threads = parameters.n_threads_batch = self.job.get("threads", 2)
        parameters.embeddings, parameters.pooling_type, parameters.flash_attn_type = True, 0, 0
        context = api.llama_init_from_model(self.handle, parameters)
        if not context:
            raise RuntimeError("llama.cpp could not make a context")
        batch = api.llama_batch_init(len(tokens), 0, 1)
        try:
            batch.n_tokens = len(tokens)
            for index, token in enumerate(tokens):
                batch.token[index], batch.pos[index] = token, index
                batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, 1
            if status := api.llama_encode(context, batch):
                raise RuntimeError(f"llama_encode returned {status}")
            width = api.llama_model_n_embd(self.handle)
            return np.ctypeslib.as_array(api.llama_get_embeddings(context), shape=(len(tokens), width)).copy()
        finally:
            api.llama_batch_free(batch)
            api.llama_free(context)

    def decode(self, context: Any, batch: Any, tokens: list[int], first: int) -> np.ndarray:
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index], batch.pos[index] = token, first + index
            batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, 1
        status = self.api.llama_decode(context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        pointer = self.api.llama_get_logits(context)
        return np.ctypeslib.as_array(pointer, shape=(len(tokens), self.n_vocab)).copy()


def quantize(api: types.ModuleType, job: Job) -> Result:
    """What the llama-quantize program does, without an importance matrix."""
    options, wish = api.llama_model_quantize_default_params(), job["quantize"]
    options.nthread, options.ftype, options.pure = job.get("threads", 2), wish["ftype"], wish.get("pure", False)
    start = time.monotonic()
    status = api.llama_model_quantize(str(job["model"]).encode(), str(wish["out"]).encode(), ctypes.byref(options))
    if status:
        raise RuntimeError(f"llama_model_quantize returned {status} (its reason is on stderr)")
    return {"quantize_seconds": round(time.monotonic() - start, 3), "bytes": Path(wish["out"]).stat().st_size}


def handle(job: Job) -> Result:
    api = bindings()
    if job.get("quantize"):
        return quantize(api, job)
    start = time.monotonic()
    model = Model(api, job)
    result: Result = {
        "load_seconds": round(time.monotonic() - start, 3),
        "vocab": model.n_vocab,
        "metadata": model.metadata(),
    }
    description = ctypes.create_string_buffer(256)
    api.llama_model_desc(model.handle, description, len(description))
    result["description"] = description.value.decode()
    result["size"], result["parameters"] = api.llama_model_size(model.handle), api.llama_model_n_params(model.handle)
    if job.get("texts"):
        result["tokens"] = [model.tokenize(text, job.get("special", False)) for text in job["texts"]]
        result["pieces"] = [[model.piece(token) for token in tokens] for tokens in result["tokens"]]
    if job.get("embeddings"):
        np.savez(job["embeddings"], **{str(i): model.embed(ids) for i, ids in enumerate(job["prompts"])})
        return result
    runs = [model.run(ids, job.get("generate", 0)) for ids in job.get("prompts", ())]
    if job.get("logits"):
        np.savez(job["logits"], **{str(i): logits for i, (logits, _) in enumerate(runs)})
    if job.get("generate"):
        result["generated"] = [grown for _, grown in runs]
        result["generated_text"] = [model.text(grown) for _, grown in runs]
    return result


if __name__ == "__main__":
    serve(handle, ("gguf", "numpy"))
