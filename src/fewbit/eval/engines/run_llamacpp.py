"""A GGUF run by llama.cpp's library through llama-cpp-python's declarations. Runs under the interpreter that has llama_cpp.

The package's own front is not imported (it wants more than the library). Where $LLAMA_CPP_LIB_PATH names another build of the library,
functions that this build does not export are left out; a disagreement about the context's parameters is refused.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
wire = importlib.import_module("wire")


def library() -> Any:
    """The low-level module, and its backends loaded."""
    found = importlib.util.find_spec("llama_cpp")
    if found is None or not found.submodule_search_locations:
        raise ImportError("this interpreter has no llama_cpp: pip install llama-cpp-python")
    own = Path(sys.prefix) / "lib-llama"
    if "LLAMA_CPP_LIB_PATH" not in os.environ and own.is_dir():
        os.environ["LLAMA_CPP_LIB_PATH"] = str(own)
    package = types.ModuleType("llama_cpp")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["llama_cpp"] = package
    extensions: Any = importlib.import_module("llama_cpp._ctypes_extensions")
    declare = extensions.ctypes_function_for_shared_library

    def tolerant(shared: ctypes.CDLL) -> Any:
        decorator = declare(shared)

        def wrap(name: str, *types_: Any, **options: Any) -> Any:
            if hasattr(shared, name):
                return decorator(name, *types_, **options)
            return lambda stub: functools.wraps(stub)(stub)

        return wrap

    extensions.ctypes_function_for_shared_library = tolerant
    api = importlib.import_module("llama_cpp.llama_cpp")
    folder = Path(os.environ.get("LLAMA_CPP_LIB_PATH") or Path(package.__path__[0]) / "lib")
    backends = ctypes.CDLL(str(folder / "libggml.so"))
    if hasattr(backends, "ggml_backend_load_all_from_path"):
        backends.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
        backends.ggml_backend_load_all_from_path(str(folder).encode())
    api.llama_backend_init()
    defaults = api.llama_context_default_params()
    if (defaults.n_ctx, defaults.n_batch, defaults.n_seq_max) != (512, 2048, 1):
        raise RuntimeError(
            "llama_cpp's declarations and the library disagree about llama_context_params: install matching versions"
        )
    return api


def run(job: dict[str, Any]) -> tuple[int, str, Any]:
    np, api = importlib.import_module("numpy"), library()
    wish = api.llama_model_default_params()
    wish.n_gpu_layers = 0 if job.get("device", "cpu") == "cpu" else 999
    model = api.llama_model_load_from_file(job["model"].encode(), wish)
    if not model:
        raise RuntimeError("llama.cpp refuses the file; its reason is on stderr")
    vocab = int(api.llama_vocab_n_tokens(api.llama_model_get_vocab(model)))

    def frames() -> Any:
        length = max(len(ids) for ids in job["tokens"])
        options = api.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = length
        options.n_threads = options.n_threads_batch = job["threads"]
        options.type_k = options.type_v = {"f32": 0, "f16": 1}[job.get("cache", "f16")]
        options.flash_attn_type = 0
        for ids in job["tokens"]:
            context = api.llama_init_from_model(model, options)
            batch = api.llama_batch_init(len(ids), 0, 1)
            batch.n_tokens = len(ids)
            for index, token in enumerate(ids):
                batch.token[index], batch.pos[index], batch.logits[index] = token, index, 1
                batch.n_seq_id[index], batch.seq_id[index][0] = 1, 0
            status = api.llama_decode(context, batch)
            if status:
                raise RuntimeError(f"llama_decode returned {status}")
            yield np.ctypeslib.as_array(api.llama_get_logits(context), shape=(len(ids), vocab)).astype(np.float32)
            api.llama_batch_free(batch)
            api.llama_free(context)

    return vocab, "llama.cpp", frames()


if __name__ == "__main__":
    wire.serve(run)
