"""Parameters that stay in floating point and learn beside the quantised ones: norms, biases, embeddings and the head.

They are rounded to the grid in which a file will store them (bfloat16, say) in every forward pass, so the file computes what was trained. A parameter that
stands in two places (an embedding that is also the head) is rounded by one node in both and learns from both.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from fewbit.base.names import matches
from fewbit.math.scales import quantize
from fewbit.num.grid import BF16, F16, F32
from fewbit.num.scheme import leaf, parse_scheme
from fewbit.runtime.fake import FakeQuantise

_GRIDS = {torch.float32: F32, torch.bfloat16: BF16, torch.float16: F16}


@dataclass
class Held:
    """A parameter and where it lives.

    Attributes:
        value: the parameter itself.
        names: all its names, the first as `named_parameters` has it.
        places: modules that hold it, and under which attribute; more than one where it is tied.
    """

    value: nn.Parameter
    names: list[str]
    places: list[tuple[nn.Module, str]]

    @property
    def tied(self) -> bool:
        return len(self.places) > 1


def held(model: nn.Module) -> list[Held]:
    """Every parameter once, in the model's order."""
    found: dict[int, Held] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, param in module._parameters.items():
            if param is not None:
                one = found.setdefault(id(param), Held(param, [], []))
                one.names.append(f"{prefix}.{attribute}".lstrip("."))
                if not any(module is other for other, _ in one.places):
                    one.places.append((module, attribute))
    return list(found.values())


def tied_names(model: nn.Module) -> set[str]:
    """All names of parameters that live in more than one module."""
    return {name for one in held(model) if one.tied for name in one.names}


def learning(model: nn.Module, quantised: Collection[str], also: Collection[str], embeddings: bool) -> Iterator[Held]:
    """The float parameters that shall learn: scales of norms, biases that are there, and what is asked for.

    Args:
        quantised: names of parameters that are quantised.
        also: patterns of further names. embeddings: whether embeddings learn, and a head that stays floating.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for one in held(model):
        if not one.value.is_floating_point() or any(name in quantised for name in one.names):
            continue
        asked = any(matches(pattern, name) for pattern in also for name in one.names)
        if asked or _of_norm(one) or (embeddings and _of_words(one, head)):
            yield one


def _of_norm(one: Held) -> bool:
    """Whether a parameter is a norm's or a bias."""
    (module, attribute), *others = one.places
    return not others and one.value.ndim == 1 and ("norm" in type(module).__name__.lower() or attribute == "bias")


def _of_words(one: Held, head: nn.Module | None) -> bool:
    """Whether a parameter is an embedding's or the head's."""
    return any(isinstance(module, nn.Embedding) or module is head for module, _ in one.places)


def learn(one: Held, floats: str | None) -> None:
    """Lets a parameter learn in all its places, rounded to the grid `floats`, or to that of its own dtype."""
    grid = parse_scheme(floats) if floats else leaf(_GRIDS.get(one.value.dtype, F32))
    fake = FakeQuantise(quantize(grid, one.value.detach().float())).to(one.value.device)
    for module, attribute in one.places:
        parametrize.register_parametrization(module, attribute, fake, unsafe=True)
        module.get_parameter(f"parametrizations.{attribute}.original").requires_grad_(True)
