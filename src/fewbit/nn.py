"""Low-bit layers for people who stay in PyTorch.

from fewbit.nn import FewbitConfig, QuantLinear, quantize_

quantize_(model, "nf4-g64-dq")                                                          a model in memory
AutoModelForCausalLM.from_pretrained(id, quantization_config=FewbitConfig("nf4"))       while transformers loads it
AutoModelForCausalLM.from_pretrained(folder, quantization_config=FewbitConfig())        any quantised checkpoint that fewbit reads
"""

from typing import TYPE_CHECKING, Any

from fewbit.runtime.linear import QuantLinear
from fewbit.runtime.replace import Replaced, quantize_
from fewbit.runtime.tables import QuantEmbedding, QuantStack

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from fewbit.runtime.hf import FewbitConfig, Stored
    from fewbit.runtime.kv import QuantCache

__all__ = ["FewbitConfig", "QuantCache", "QuantEmbedding", "QuantLinear", "QuantStack", "Replaced", "quantize_"]


def __getattr__(name: str) -> Any:
    """What wants transformers is imported on first use; FewbitConfig tells it of the method "fewbit"."""
    if name == "QuantCache":
        from fewbit.runtime.kv import QuantCache

        return QuantCache
    if name != "FewbitConfig":
        raise AttributeError(f"module 'fewbit.nn' has no attribute {name!r}")
    from fewbit.runtime import hf

    if _foreign not in hf.open_foreign:
        hf.open_foreign.append(_foreign)
    return hf.FewbitConfig


def _foreign(model: "nn.Module", folder: "Path") -> "Stored | None":
    """Weights of a model in a checkpoint of another format, or None where it is not quantised."""
    import torch
    from torch import nn

    from fewbit.run.hf import Slot, bind
    from fewbit.run.source import open_source
    from fewbit.runtime.hf import Stored

    source = open_source(folder)
    if not source.quantised:
        source.close()
        return None
    by_param: dict[str, list[Slot]] = {}
    for slot in bind(model, source.manifest).values():
        by_param.setdefault(slot.param, []).append(slot)
    layers: dict[str, Any] = {}
    decoded: dict[str, Any] = {}
    for name, param in model.named_parameters():
        slots = by_param.get(name, [])
        if not any(slot.name in source.stored for slot in slots):
            continue
        path, _, attribute = name.rpartition(".")
        whole = len(slots) == 1 and slots[0].expert is None
        if whole and attribute == "weight" and isinstance(model.get_submodule(path), nn.Linear):
            layers[path] = lambda stored=slots[0].name: source.qtensor(stored)
        else:

            def values(slots: list[Slot] = slots, shape: tuple[int, ...] = tuple(param.shape)) -> torch.Tensor:
                out = torch.empty(shape)
                for slot in slots:
                    view = slot.view(out)
                    view.copy_(source.read(slot.name).reshape(view.shape))
                return out

            decoded[name] = values
    return Stored(layers, decoded)
