"""Which types llama-quantize's own code would give each tensor, by its dry run. Env: llamacpp.

Job:  model         .gguf file in F32
      recipes       [{"ftype": number, "pure": bool, "imatrix": bool}]
Result: types       for each recipe: {tensor: type name} of the tensors that would be converted; null when llama.cpp refuses
        needs       for each recipe: whether an importance matrix would be required to do it
"""

from __future__ import annotations

import ctypes
import re
import types
from typing import Any

from _wire import Job, Result, serve
from llamacpp_driver import bindings

_LINE = re.compile(r"\] (\S+) +- \[[^\]]*\], type = +\S+ +size = [^\n]*MiB -> [^\n]*MiB \((\w+)\)")


def importance(api: types.ModuleType) -> Any:
    """An importance matrix for one tensor that no model has: enough for the choice of types, which asks only whether there is one."""
    entries = (api.llama_model_imatrix_data * 2)()
    entries[0].name, entries[0].size, entries[0].data = b"none", 1, (ctypes.c_float * 1)(1.0)
    return entries


def handle(job: Job) -> Result:
    api, lines = bindings(), []
    listen = api.llama_log_callback(lambda _level, text, _data: lines.append(text.decode("utf-8", "replace")))
    api.llama_log_set(listen, None)
    found, needs = [], []
    for recipe in job["recipes"]:
        lines.clear()
        options = api.llama_model_quantize_default_params()
        options.nthread, options.ftype, options.pure, options.dry_run = (
            1,
            recipe["ftype"],
            recipe.get("pure", False),
            True,
        )
        if recipe.get("imatrix"):
            entries = importance(api)
            options.imatrix = ctypes.cast(entries, ctypes.POINTER(api.llama_model_imatrix_data))
        status = api.llama_model_quantize(job["model"].encode(), b"/nowhere.gguf", ctypes.byref(options))
        log = "".join(lines).replace(", size", " size")
        found.append(None if status else {name: kind.upper() for name, kind in _LINE.findall(log)})
        needs.append("will require an imatrix" in log)
    return {"types": found, "needs": needs}


if __name__ == "__main__":
    serve(handle, ("gguf",))
