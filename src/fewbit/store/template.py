"""Chat templates are programs from strangers: found here, and rendered in a process that may not run long, grow or talk much."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from fewbit.base.errors import InputError
from fewbit.store import strictjson

SECONDS = 5
MEMORY_BYTES = 512 << 20
OUTPUT_CHARS = 4_000_000
MAX_TEMPLATE_BYTES = 1 << 20


def chat_template(root: Path) -> str | None:
    """The default chat template of a checkpoint, or None.

    Raises:
        InputError FB-E0220: it is not text, or larger than 1 MiB.
    """
    jinja, config = root / "chat_template.jinja", root / "tokenizer_config.json"
    if jinja.is_file():
        with open(jinja, "rb") as file:
            return _checked(file.read(MAX_TEMPLATE_BYTES + 1).decode("utf-8", "replace"), jinja)
    for path in (root / "chat_template.json", config):
        found = (
            strictjson.load_object(path, "FB-E0220", max_bytes=16 << 20).get("chat_template")
            if path.is_file()
            else None
        )
        if isinstance(found, list):  # several by name
            named = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
            found = named.get("default", next(iter(named.values()), None))
        if found is not None:
            return _checked(found, path)
    return None


def _checked(template: Any, path: Path) -> str:
    if not isinstance(template, str) or len(template) > MAX_TEMPLATE_BYTES:
        raise InputError("FB-E0220", f"a chat template is text of at most {MAX_TEMPLATE_BYTES:,} characters", file=path)
    return template


def render(
    template: str,
    messages: list[dict[str, Any]],
    *,
    add_generation_prompt: bool = True,
    file: Path | None = None,
    seconds: int = SECONDS,
    memory: int = MEMORY_BYTES,
    output: int = OUTPUT_CHARS,
    **values: Any,
) -> str:
    """A conversation as text.

    Args:
        template: Jinja source.
        messages: plain JSON data, as chat templates take it.
        add_generation_prompt: whether the text ends where the model is to answer.
        file: what errors name.
        seconds, memory, output: limits of CPU and wall time, of bytes of address space, of characters.
        values: further names for the template: bos_token, tools, …

    Raises:
        InputError FB-E0220: the template is not valid, raises, or reaches out of its sandbox. FB-E0221: it met a limit.
    """
    given = {"messages": messages, "add_generation_prompt": add_generation_prompt, **values}
    limits = {"memory": memory, "seconds": seconds, "output": output}
    job = json.dumps({"path": sys.path, "template": template, "values": given, **limits})
    child = [sys.executable, "-I", str(Path(__file__).with_name("_render.py"))]
    try:
        done = subprocess.run(child, input=job.encode(), capture_output=True, timeout=seconds + 10, check=False)
    except subprocess.TimeoutExpired:
        raise InputError("FB-E0221", f"the chat template was stopped after {seconds + 10} s", file=file) from None
    if done.returncode:
        died = "it ran out of its limits" if done.returncode < 0 else done.stderr.decode(errors="replace")[-300:]
        raise InputError("FB-E0221", f"rendering the chat template failed within {seconds} s: {died}", file=file)
    answer = json.loads(done.stdout)
    if "limit" in answer:
        raise InputError("FB-E0221", f"the chat template needs {answer['limit']}", file=file)
    if "refused" in answer:
        raise InputError("FB-E0220", f"the chat template cannot be rendered: {answer['refused']}", file=file)
    return answer["text"]
