"""AutoRound's own checkpoints: the tensors of GPTQ or AWQ under `quant_method: "auto-round"`.

`packing_format` says which: `auto_round:auto_gptq` has GPTQ's tensors of version 1 and no g_idx (symmetric weights), `auto_round:auto_awq`
AWQ's (asymmetric, 4 bits); plain `auto_round` and `auto_round:gptqmodel` (asymmetric, other bits; read, not written) have GPTQ's with the
zero points as they are, as in its version 2. `extra_config` names the layers that differ; 16 bits means left in floating point.

Source: facts.md B1; auto-round 0.16.1 `export/export_to_autoround/export.py`, `inference/backend.py` (GPTQ_FORMAT_NO_ZP).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fewbit.base.errors import InputError
from fewbit.base.manifest import Manifest
from fewbit.base.names import stem
from fewbit.formats import awq, gptq
from fewbit.formats.experts import per_expert
from fewbit.formats.kinds import affine_of, sibling
from fewbit.formats.table import Assignment, Format, Parts, Stored
from fewbit.num.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from fewbit.num.qtensor import QTensor

ZEROS_AS_THEY_ARE = ("auto_round", "auto_round:gptqmodel")


def accepts(scheme: Scheme, shape: tuple[int, ...]) -> str | None:
    """None, or why AutoRound cannot store this scheme for a weight of this shape."""
    affine = affine_of(scheme)
    if affine is not None and affine.zero == "code":
        reason = awq.accepts(scheme, shape)
        return f"auto-round stores asymmetric weights as AWQ does: {reason}" if reason else None
    return gptq.affine_misfit(scheme, shape, "auto-round", ("none",))


def parts(name: str, scheme: Scheme, shape: tuple[int, ...]) -> Parts:
    """Stored tensors of one weight, from its shape alone."""
    if scheme.code_shift is not None:
        return awq.parts(name, scheme, shape)
    return {key: size for key, size in gptq.parts(name, scheme, shape).items() if key != sibling(name, "g_idx")}


def encode(name: str, q: QTensor) -> dict[str, torch.Tensor]:
    """The stored tensors of a quantised weight.

    Raises:
        InputError: FB-E0620 for sides: without g_idx there is no place for an order of columns.
    """
    from fewbit.formats.words import refuse_sides

    refuse_sides(name, q, "auto-round")
    if q.scheme.code_shift is not None:
        return awq.encode(name, q)
    tensors = gptq.encode(name, q, version=1)
    del tensors[sibling(name, "g_idx")]
    return tensors


def decode(name: str, read: Callable[[str], torch.Tensor], stored: Stored) -> QTensor:
    """The quantised weight, code for code."""
    return awq.decode(name, read, stored) if stored.facts.get("awq") else gptq.decode(name, read, stored)


def config(source: dict[str, Any], assignment: Assignment) -> tuple[dict[str, Any], dict[str, Any]]:
    """The new config.json and AutoRound's quantization_config.json.

    Raises:
        InputError: FB-E0620 when symmetric and asymmetric weights are mixed, for they need different tensors.
    """
    common = Counter(assignment.schemes.values()).most_common(1)[0][0]
    if len({scheme.code_shift is None for scheme in assignment.schemes.values()}) > 1:
        raise InputError("FB-E0620", "auto-round has one packing for all weights: all symmetric or all asymmetric")
    extra: dict[str, Any] = {
        stem(name): {"bits": 16, "act_bits": 16} for name in assignment.kept if "embed" not in name
    }
    extra |= {stem(name): _words(scheme) for name, scheme in assignment.schemes.items() if scheme != common}
    words = {
        **_words(common),
        "data_type": "int",
        "act_bits": 16,
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_awq" if common.code_shift is not None else "auto_round:auto_gptq",
        "autoround_version": "0.16.1",
        "block_name_to_quantize": _blocks(list(assignment.schemes)),
        **({"extra_config": extra} if extra else {}),
    }
    return {**source, "quantization_config": words}, {"quantization_config.json": words}


def _words(scheme: Scheme) -> dict[str, Any]:
    return {"bits": int(scheme.grid.bits), "group_size": scheme.blocks.cols or -1, "sym": scheme.code_shift is None}


def _blocks(names: list[str]) -> str | None:
    """The list of blocks that holds the weights, e.g. `model.layers`, or None when they are in several."""
    found = {
        name[: index - 1] for name in names if (index := next((i for i, c in enumerate(name) if c.isdigit()), 0)) > 1
    }
    return found.pop() if len(found) == 1 else None


def detect(config: dict[str, Any], manifest: Manifest) -> dict[str, Stored] | None:
    """The quantised weights of an AutoRound checkpoint, or None when the config names another format.

    Raises:
        InputError: FB-E0621 for missing or misshapen parts; FB-E0620 for a packing that is not known.
    """
    given = config.get("quantization_config") or {}
    if given.get("quant_method") not in ("auto-round", "intel/auto-round"):
        return None
    packing = str(given.get("packing_format", "auto_round:auto_gptq"))
    if given.get("data_type", "int") != "int":
        raise InputError("FB-E0620", f"auto-round with data_type {given.get('data_type')!r} is not known")
    if "awq" in packing:
        found = awq.find(given, manifest)
        return {name: Stored(s.scheme, s.shape, s.parts, {**s.facts, "awq": True}) for name, s in found.items()}
    rules = {
        f"+:^{module.replace('.', chr(92) + '.')}$": words
        for module, words in (given.get("extra_config") or {}).items()
    }
    return gptq.find({**given, "dynamic": rules}, manifest, version=2 if packing in ZEROS_AS_THEY_ARE else 1)


FORMAT = per_expert(
    Format(
        name="auto-round",
        summary="AutoRound's own: GPTQ's tensors when symmetric, AWQ's when not; transformers, vLLM, SGLang",
        container="safetensors",
        default_scheme="int4-g128",
        engines=("transformers", "vllm", "sglang"),
        accepts=accepts,
        parts=parts,
        encode=encode,
        decode=decode,
        config=config,
        detect=detect,
        conform=gptq.conform,
    )
)
