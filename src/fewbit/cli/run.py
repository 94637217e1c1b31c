"""`fewbit run MODEL -p TEXT`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewbit.base.resident import peak_resident
from fewbit.cli.output import print_json

if TYPE_CHECKING:
    import torch

    from fewbit.run.calib import Tokens
    from fewbit.run.source import Source


def command(
    model: Annotated[str, typer.Argument(help="checkpoint of any format")],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="text to continue")],
    tokens: Annotated[int, typer.Option("--tokens", "-n", min=1, help="tokens to generate at most")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most probable token")] = 0.0,
    top_p: Annotated[float, typer.Option(help="sample among the most probable tokens of this share")] = 1.0,
    seed: Annotated[int, typer.Option(help="of the sampling")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="put the prompt into the model's chat template")] = False,
    engine: Annotated[
        str, typer.Option(help="torch, llama.cpp, or auto: llama.cpp for GGUF files where it is installed")
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32: what is computed in")] = "auto",
    tokenizer_from: Annotated[
        Path | None, typer.Option("--tokenizer", help="folder with the tokenizer, where the checkpoint has none")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="one JSON document on stdout at the end")] = False,
) -> None:
    """Generates text in this process, quantised weights staying quantised; tokens per second and memory on stderr."""
    from fewbit.base.errors import InputError
    from fewbit.run.calib import Document

    if (file := _for_llamacpp(model, engine)) is not None:
        record = _through_llamacpp(file, prompt, chat, not json, (tokens, temperature, top_p, seed))
        record = {"model": model, "prompt": prompt, **record}
        print_json("fewbit.run/1", record) if json else print(_summary(record), file=sys.stderr)
        return
    with _open(model) as source:
        tokenizer = _tokenizer(source, tokenizer_from)
        module, facts = _load(source, dtype)
        config = source.config
        if chat and not getattr(tokenizer.inner, "chat_template", None):
            raise InputError("FB-E0907", "--chat: the tokenizer has no chat template")
        ends = _ends(source)
    ids = tokenizer.ids(Document("" if chat else prompt, ({"role": "user", "content": prompt},) if chat else ()))
    text, speed = _stream(
        module, tokenizer, ids, _stops(config, tokenizer) | ends, not json, (tokens, temperature, top_p, seed)
    )
    record = {"model": model, "prompt": prompt, "text": text, **speed, **facts}
    print_json("fewbit.run/1", record) if json else print(_summary(record), file=sys.stderr)


def _for_llamacpp(model: str, engine: str) -> Path | None:
    """The GGUF file that llama.cpp shall run, or None where our own path serves."""
    from fewbit.base.errors import InputError
    from fewbit.runtime.llamacpp import missing

    if engine not in ("auto", "torch", "llama.cpp"):
        raise InputError("FB-E0907", f"--engine is auto, torch or llama.cpp, got {engine!r}")
    place = Path(model)
    files = sorted(place.glob("*.gguf")) if place.is_dir() else [place] if place.suffix == ".gguf" else []
    if engine == "llama.cpp" and not files:
        raise InputError("FB-E0918", "llama.cpp reads GGUF files only", file=place)
    return files[0] if engine == "llama.cpp" or (engine == "auto" and files and missing() is None) else None


def _through_llamacpp(
    file: Path, prompt: str, chat: bool, show: bool, options: tuple[int, float, float, int]
) -> dict[str, Any]:
    """Text and figures of a GGUF file that llama.cpp runs."""
    import time

    from fewbit.runtime.llamacpp import LlamaCpp

    count, temperature, top_p, seed = options
    started = time.perf_counter()
    model = LlamaCpp(file, prompt, count, chat=chat, seed=seed)
    times, text = [time.perf_counter()], ""
    loading = times[0] - started
    for piece in model.stream(temperature, top_p):
        times.append(time.perf_counter())
        text += piece
        if show:
            print(piece, end="", flush=True)
    if show:
        print()
    return {
        "text": text,
        **_speed(times, model.prompt_tokens),
        "peak_bytes": peak_resident(),
        "format": "gguf",
        "dtype": "llama.cpp's own",
        "kernels": {"llama.cpp": 1},
        "decoded_tensors": 0,
        "weight_bytes": sum(part.stat().st_size for part in _split(file)),
        "load_seconds": loading,
    }


def _split(file: Path) -> list[Path]:
    """All files of a split GGUF, or the one."""
    import re

    pattern = re.sub(r"-\d{5}-of-(\d{5})\.gguf$", r"-*-of-\1.gguf", file.name)
    return sorted(file.parent.glob(pattern)) if pattern != file.name else [file]


def _speed(times: list[float], prompt_tokens: int) -> dict[str, Any]:
    """Figures of a generation from the time it began and those at which tokens came."""
    count = len(times) - 1
    return {
        "prompt_tokens": prompt_tokens,
        "tokens": count,
        "first_token_seconds": times[1] - times[0] if count else None,
        "tokens_per_second": (count - 1) / (times[-1] - times[1]) if count > 1 else None,
    }


def _open(model: str) -> Source:
    from fewbit.run.gguf_source import as_checkpoint
    from fewbit.run.source import open_source

    return as_checkpoint(open_source(model))


def _tokenizer(source: Source, folder: Path | None) -> Tokens:
    """The tokenizer of a folder, of the checkpoint's own, or the one that a GGUF file holds."""
    import tempfile

    from fewbit.base.errors import InputError
    from fewbit.base.record import readable_json
    from fewbit.run.calib import Tokens
    from fewbit.run.gguf_source import GgufAsCheckpoint

    if folder is not None and not folder.is_dir():
        raise InputError("FB-E0731", f"--tokenizer is a folder with a tokenizer, {folder} is none", file=folder)
    place = folder or (source.root if source.root.is_dir() else source.root.parent)
    if folder is not None or not isinstance(source, GgufAsCheckpoint) or any(place.glob("tokenizer*")):
        return Tokens(place)
    with tempfile.TemporaryDirectory() as made:
        for name, data in source.small_files.items():
            (Path(made) / name).write_text(readable_json(data), encoding="utf-8")
        return Tokens(Path(made))


def _load(source: Source, word: str) -> tuple[Any, dict[str, Any]]:
    """The model with its weights, and what to tell of it."""
    import time

    from fewbit.base.errors import InputError
    from fewbit.run.gguf_source import GgufAsCheckpoint
    from fewbit.run.hf import bind, build_model
    from fewbit.runtime.load import fill

    started = time.perf_counter()
    chosen = _dtype(word, source)
    module = build_model(source.config)
    able = getattr(module, "can_generate", None)
    if not hasattr(module, "generate") or able is None or not able():
        raise InputError("FB-E0907", f"a {type(module).__name__} does not generate text")

    kept = source.held if isinstance(source, GgufAsCheckpoint) else source.qtensor

    def get(name: str) -> Any:
        q = kept(name)
        return source.read(name) if q is None else q  # GGUF blocks stay as they are where a kernel reads them

    loaded = fill(module, bind(module, source.manifest).values(), get, chosen)
    facts = {
        "format": source.format.name if source.format else "plain",
        "dtype": str(chosen).removeprefix("torch."),
        "kernels": loaded.kernels,
        "quantised_layers": len(loaded.quantised),
        "decoded_tensors": len(loaded.decoded),
        "weight_bytes": loaded.bytes,
        "load_seconds": time.perf_counter() - started,
    }
    return module, facts


def _dtype(word: str, source: Source) -> torch.dtype:
    import torch

    from fewbit.base.errors import InputError

    if word == "auto":
        word = str(source.config.get("torch_dtype") or source.config.get("dtype") or "bfloat16")
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if word not in known:
        raise InputError("FB-E0907", f"--dtype is auto or one of {', '.join(known)}, got {word!r}")
    return known[word]


def _stops(config: dict[str, Any], tokenizer: Any) -> set[int]:
    """Ids that end a text: the config's and the tokenizer's."""
    return {*_ids(config), *_ids(config.get("text_config") or {}), *tokenizer.separator}


def _ids(config: dict[str, Any]) -> set[int]:
    ends = config.get("eos_token_id")
    return {end for end in (ends if isinstance(ends, list) else [ends]) if end is not None}


def _ends(source: Source) -> set[int]:
    """Ids that end a text by the checkpoint's generation_config.json, where chat models keep theirs."""
    from fewbit.store import strictjson

    files = [path for path in source.checkpoint.aux_files if path.name == "generation_config.json"]
    return _ids(strictjson.load_object(files[0], "FB-E0907")) if files else set()


def _stream(
    module: Any, tokenizer: Any, ids: list[int], stops: set[int], show: bool, options: tuple[int, float, float, int]
) -> tuple[str, dict[str, Any]]:
    """Generates, printing text as it comes; the text, and how fast it came."""
    import time

    from fewbit.runtime.generate import generate

    count, temperature, top_p, seed = options
    found: list[int] = []
    times = [time.perf_counter()]
    text = ""
    for token in generate(module, ids, count, temperature=temperature, top_p=top_p, seed=seed, stop=stops):
        found.append(token)
        times.append(time.perf_counter())
        whole = tokenizer.inner.decode(found, skip_special_tokens=True)
        if show and not whole.endswith("\ufffd"):  # a character may need several tokens
            print(whole[len(text) :], end="", flush=True)
            text = whole
    whole = tokenizer.inner.decode(found, skip_special_tokens=True)
    if show:
        print(whole[len(text) :])
    peak = peak_resident()
    return whole, {**_speed(times, len(ids)), "peak_bytes": peak}


def _summary(record: dict[str, Any]) -> str:
    """Two lines on speed and memory."""
    speed = record["tokens_per_second"]
    rate = f"{speed:.1f} tokens/s" if speed else "too few tokens to tell a speed"
    first = f", first after {record['first_token_seconds']:.2f} s" if record["first_token_seconds"] else ""
    kernels = ", ".join(f"{count} x {name}" for name, count in record["kernels"].items()) or "none quantised"
    decoded = f", {record['decoded_tensors']} stored tensors decoded" if record["decoded_tensors"] else ""
    return (
        f"{record['prompt_tokens']} + {record['tokens']} tokens, {rate}{first}\n"
        f"{record['format']}, {record['dtype']}; layers: {kernels}{decoded}; "
        f"weights {record['weight_bytes'] / 1e6:.1f} MB, process at most {record['peak_bytes'] / 1e6:.0f} MB"
    )
