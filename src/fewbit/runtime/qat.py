"""Training through the rounding: make a model compute with fake-quantised weights, train it, and take the codes out.

    prepared = prepare(model, "int4-channel-bf16", floats="bf16")        every linear layer and stacked expert, in place
    distil(model, teacher, tokens, …)                                   any training loop does; see `runtime.distil`
    freeze(model);  qtensors(model)  or  convert(model)                 what was trained, as codes: the same logits, bit for bit

Three recipes. `scales` keeps the codes that a solver chose and trains step sizes, norms and biases: no float weights, no optimiser state for them, minutes
instead of hours. `floats` trains embeddings and head besides, all that a file keeps in floating point. `full` trains the float weights behind the rounding too.

Weights are reached by `torch.nn.utils.parametrize`, so every module that has a `weight` (or a stacked parameter) is served alike and its own code runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.utils import parametrize

from fewbit.base.errors import InputError
from fewbit.base.names import matches
from fewbit.num.qtensor import QTensor
from fewbit.num.scheme import Scheme, parse_scheme
from fewbit.runtime.fake import FakeQuantise, inside_cells
from fewbit.runtime.fake_inputs import FakeInputs
from fewbit.runtime.floats import learn, learning, tied_names
from fewbit.runtime.linear import QuantLinear, bias_of, weight_of
from fewbit.solve.table import solver_named

Recipe = Literal["full", "floats", "scales"]
RECIPES: tuple[Recipe, ...] = ("full", "floats", "scales")
Start = Mapping[str, QTensor] | Callable[[str], "QTensor | None"]
SKIP = ("*lm_head.*", "*.router.*", "*.mlp.gate.*", "*.block_sparse_moe.gate.*")
INPUTS = "fake_inputs"


@dataclass(frozen=True)
class Prepared:
    """What `prepare` did.

    Attributes:
        quantised: parameter name -> spelling of its scheme.
        trained: names of float parameters that learn besides (norms, biases, embeddings, what was asked for); of a tied one the first.
        kept: weights that are not quantised -> why.
        learning, total: numbers that learn; numbers in the model.
    """

    quantised: dict[str, str]
    trained: tuple[str, ...]
    kept: dict[str, str]
    learning: int
    total: int


@dataclass(frozen=True)
class Target:
    """A weight that can be quantised: attribute `attribute` of `module`, whose full name is `name`."""

    module: nn.Module
    attribute: str
    name: str
    transposed: bool

    @property
    def weight(self) -> torch.Tensor:
        return getattr(self.module, self.attribute)


def prepare(
    model: nn.Module,
    scheme: str | Scheme,
    *,
    recipe: Recipe = "full",
    start: Start | None = None,
    method: str = "rtn",
    skip: Collection[str] = SKIP,
    also: Collection[str] = (),
    transposed: Collection[str] = (),
    floats: str | Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Prepared:
    """Puts fake quantisation on every linear layer, Conv1D and stacked expert of a model, in place; what else learns is the recipe's matter.

    Args:
        model: floating, ideally float32: small updates get lost in 16 bits.
        scheme: of weights, and of inputs where it says so (`int4-g128+int8-token`).
        recipe: what learns, see the module's text.
        start: quantised weights to start from, by parameter name (a GPTQ result, say); what it lacks is solved by `method`.
        method: a solver that needs no calibration.
        skip: patterns of names of weights that stay floating. Tied weights always do.
        also: patterns of further float parameters that learn.
        transposed: patterns of stacked parameters that lie [experts, in, out].
        floats: grid in which trained float parameters will be stored (`bf16`), or one for each name: they are rounded to it while training; None for their own.
        options, seed: of the solver.

    Raises:
        InputError: FB-E0913 when nothing can be quantised, a weight is not floating or on the meta device, or a word is unknown;
            FB-E0914 for a start of another shape or scheme; FB-E0911 for activations that cannot be static; FB-E0601 … FB-E0704 from parsing and solving.
    """
    wanted = parse_scheme(scheme) if isinstance(scheme, str) else scheme
    _check(model, wanted, recipe, floats)
    tied = tied_names(model)
    targets = list(find_targets(model, transposed))
    kept = {t.name: "tied to another parameter" for t in targets if t.name in tied}
    kept |= {t.name: "skipped" for t in targets if t.name not in kept and _any(skip, t.name)}
    chosen = [t for t in targets if t.name not in kept]
    if not chosen:
        raise InputError("FB-E0913", f"no weight of this {type(model).__name__} is left to quantise")
    refuse_inputs(wanted, chosen)
    found = {t.name: _starting(t, wanted, start, method, options or {}, seed) for t in chosen}
    trained = list(learning(model, found, also, embeddings=recipe != "scales"))
    model.requires_grad_(False)
    for target in chosen:
        _install(target, found[target.name], wanted, keep_codes=recipe != "full")
    for one in trained:
        learn(one, floats.get(one.names[0]) if isinstance(floats, Mapping) else floats)
    numbers = [p.numel() for p in model.parameters() if p.requires_grad]
    return Prepared(
        {t.name: str(wanted) for t in chosen},
        tuple(one.names[0] for one in trained),
        kept,
        sum(numbers),
        sum(p.numel() for p in model.parameters()),
    )


def _check(model: nn.Module, scheme: Scheme, recipe: str, floats: str | Mapping[str, str] | None) -> None:
    if recipe not in RECIPES:
        raise InputError("FB-E0913", f"recipes are {', '.join(RECIPES)}, got {recipe!r}")
    if any(isinstance(module, FakeQuantise) for module in model.modules()):
        raise InputError("FB-E0913", "the model is prepared already")
    if scheme.is_leaf:
        raise InputError("FB-E0913", f"{scheme} has no scale to learn")
    for word in set(floats.values()) if isinstance(floats, Mapping) else {floats} - {None}:
        if not parse_scheme(word).is_leaf:
            raise InputError("FB-E0913", f"floats are stored as f32, f16 or bf16, got {word}")


def find_targets(model: nn.Module, transposed: Collection[str] = ()) -> Iterator[Target]:
    """Weights of linear layers and Conv1D, and stacked parameters [experts, out, in]; each once, in the module's order."""
    for prefix, module in model.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.Linear) or kind == "Conv1D":
            yield Target(module, "weight", f"{prefix}.weight".lstrip("."), kind == "Conv1D")
        elif not isinstance(module, nn.modules.conv._ConvNd):
            for attribute, param in module._parameters.items():
                if param is not None and param.ndim == 3:
                    name = f"{prefix}.{attribute}".lstrip(".")
                    yield Target(module, attribute, name, _any(transposed, name))


def refuse_inputs(scheme: Scheme, targets: list[Target]) -> None:
    """What cannot be done to inputs; those of stacked experts are born inside their module, where nothing of ours can round them."""
    if scheme.activation is not None:
        FakeInputs(scheme.activation, scheme.static)  # refuses before anything is changed
    stacked = [t.name for t in targets if t.weight.ndim == 3]
    if scheme.activation is not None and stacked:
        raise InputError(
            "FB-E0911", f"inputs of stacked experts cannot be rounded in training ({scheme})", tensor=stacked[0]
        )


def _any(patterns: Collection[str], name: str) -> bool:
    return any(matches(pattern, name) for pattern in patterns)


def _starting(
    target: Target, scheme: Scheme, start: Start | None, method: str, options: Mapping[str, Any], seed: int
) -> QTensor:
    """Where a weight's codes and scales start, [.., out, in]."""
    weight = target.weight.detach()
    if weight.is_meta or not weight.is_floating_point():
        raise InputError("FB-E0913", f"the weight is {weight.dtype} on {weight.device}", tensor=target.name)
    rows_first = weight.transpose(-1, -2) if target.transposed else weight
    given = None if start is None else start(target.name) if callable(start) else start.get(target.name)
    if given is not None:
        if tuple(given.shape) != tuple(rows_first.shape) or given.scheme.weights_only != scheme.weights_only:
            what = (
                f"the start is {given.scheme} of {tuple(given.shape)}, wanted is {scheme} of {tuple(rows_first.shape)}"
            )
            raise InputError("FB-E0914", what, tensor=target.name)
        return given.to(weight.device)
    solver = solver_named(method)
    if solver.needs:
        raise InputError("FB-E0905", f"{method} needs calibration statistics: {', '.join(sorted(solver.needs))}")
    try:
        return solver(rows_first.float().contiguous(), None, scheme.weights_only, seed=seed, options=dict(options)).q
    except InputError as error:
        error.tensor = error.tensor or target.name
        raise


def _install(target: Target, q: QTensor, scheme: Scheme, keep_codes: bool) -> None:
    """Parametrises one weight and, where the scheme rounds inputs, hooks the module."""
    fake = FakeQuantise(q, transposed=target.transposed, keep_codes=keep_codes).to(target.weight.device)
    param = getattr(target.module, target.attribute)
    if not keep_codes:  # solvers do not always choose the nearest codes
        rows_first = param.data.transpose(-1, -2) if target.transposed else param.data
        latent = inside_cells(q, rows_first)
        param.data = (latent.transpose(-1, -2) if target.transposed else latent).contiguous().to(param.dtype)
    parametrize.register_parametrization(target.module, target.attribute, fake, unsafe=True)
    original(target.module, target.attribute).requires_grad_(not keep_codes)
    if len(q.shape) == 3:  # stacked experts ask for the whole stack once per expert
        target.module.register_forward_pre_hook(partial(_scope, target.attribute, True))
        target.module.register_forward_hook(partial(_scope, target.attribute, False), always_call=True)
    if scheme.activation is not None:
        inputs = FakeInputs(scheme.activation, scheme.static).to(target.weight.device)
        target.module.add_module(INPUTS, inputs)
        target.module.register_forward_pre_hook(_round_inputs)


def _scope(attribute: str, begins: bool, module: nn.Module, *_: Any) -> None:
    """Begins or ends the forward pass within which a weight is rounded once."""
    if parametrize.is_parametrized(module, attribute):
        fake = module.get_submodule(f"parametrizations.{attribute}.0")
        if isinstance(fake, FakeQuantise):
            fake.scope = {} if begins else None


def _round_inputs(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (getattr(module, INPUTS)(args[0]), *args[1:]) if hasattr(module, INPUTS) else args


def original(module: nn.Module, attribute: str) -> nn.Parameter:
    """The parameter behind a parametrised attribute."""
    return module.get_parameter(f"parametrizations.{attribute}.original")


def fakes(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, FakeQuantise]]:
    """(parameter name, module, attribute, node) of everything that is fake-quantised, floats stored in fewer bits included."""
    for prefix, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for attribute, chain in module.parametrizations.items():
                if isinstance(chain[0], FakeQuantise):
                    yield f"{prefix}.{attribute}".lstrip("."), module, attribute, chain[0]


@torch.no_grad()
def observe(
    model: nn.Module, batches: Collection[torch.Tensor], run: Callable[[torch.Tensor], Any] | None = None
) -> int:
    """Warm-up: runs batches so that static inputs see their range, then settles them. Returns how many ranges were found."""
    watching = [module for module in model.modules() if isinstance(module, FakeInputs) and module.observing]
    if watching:
        for batch in batches:
            (run or model)(batch)
    for module in watching:
        module.settle()
    return len(watching)


def freeze(model: nn.Module) -> None:
    """Ends learning: every node holds its value. Faster to evaluate, and the same numbers."""
    for _, module, attribute, fake in list(fakes(model)):
        fake.freeze(original(module, attribute))
    for module in model.modules():
        if isinstance(module, FakeInputs):
            module.settle()
    model.requires_grad_(False)


def qtensors(model: nn.Module) -> dict[str, QTensor]:
    """The quantised weights of a prepared model, [.., out, in], by parameter name; a static input range lies in `sides`.

    Raises:
        InputError: FB-E0915 when the model is not prepared.
    """
    found = {}
    for name, module, attribute, fake in fakes(model):
        if fake.scheme.is_leaf:
            continue
        q = fake.qtensor(original(module, attribute))
        inputs = getattr(module, INPUTS, None)
        if isinstance(inputs, FakeInputs):
            q = replace(q, scheme=replace(q.scheme, activation=inputs.scheme, static=inputs.static))
            scale = inputs.input_scale()
            if inputs.static and scale is None:
                raise InputError("FB-E0912", "the range of the inputs was never settled", tensor=name)
            q = q if scale is None else replace(q, sides={"input_scale": scale})
        found[name] = q
    if not found:
        raise InputError("FB-E0915", "the model was not prepared for training in few bits")
    return found


@torch.no_grad()
def trained_floats(model: nn.Module) -> dict[str, torch.Tensor]:
    """Float parameters that learn, by name (of a tied one the first), with the values that the model computes with."""
    found: dict[FakeQuantise, tuple[str, torch.Tensor]] = {}
    for name, module, attribute, fake in fakes(model):
        if fake.scheme.is_leaf and fake not in found:
            found[fake] = (name, getattr(module, attribute).detach().clone())
    return dict(found.values())


def convert(model: nn.Module, *, kernel: str | None = None, dense: bool = False) -> dict[str, QTensor]:
    """Puts truly quantised weights in the place of fake-quantised ones, in place; returns them.

    Linear layers become `QuantLinear`, which keeps few bits in memory. Stacked experts, and with `dense` all weights, become plain parameters with the decoded
    values: the same arithmetic as in training and so the same logits, bit for bit.

    Args:
        kernel: of `QuantLinear`; None for the quickest, whose sums may be rounded in another order.
    """
    found = qtensors(model)
    freeze(model)
    for name, module, _, fake in _plain(model):
        if fake.scheme.is_leaf or dense or len(fake.shape) != 2:
            continue
        dtype = weight_of(module).dtype
        layer = QuantLinear(found[name], bias_of(module), dtype=dtype, kernel=kernel).train(module.training)
        for parent in model.modules():  # a layer that stands in two places stays one
            for key, child in parent._modules.items():
                if child is module:
                    parent._modules[key] = layer
    return found


def _plain(model: nn.Module) -> list[tuple[str, nn.Module, str, FakeQuantise]]:
    """Makes every node's value a plain parameter. (torch's own removal edits a class that copies of the model share.)"""
    nodes = list(fakes(model))
    values = {fake: nn.Parameter(getattr(module, key).detach(), requires_grad=False) for _, module, key, fake in nodes}
    for module in dict.fromkeys(module for _, module, _, _ in nodes):
        module.__class__ = type(module).__bases__[0]
        del module.parametrizations
    for _, module, attribute, fake in nodes:
        module.register_parameter(attribute, values[fake])  # tied ones stay tied
    return nodes


def parameter_groups(model: nn.Module, lr: float, scale_lr: float) -> list[dict[str, Any]]:
    """Groups for an optimiser, rates in units of a quantisation step. No weight decay: it would pull at the rounding.

    Args:
        lr: of weights: what one update of Adam moves a weight on its way to the next level, as a share of its tensor's mean step.
        scale_lr: of everything else, as a share of a step too: what an update moves a shift, or the outermost level by its step size. A step size learns as a share
            of itself, so its rate is this over half the number of levels. What stays floating acts on all levels likewise and follows the mean of those: norms and
            biases move by that much, embeddings and heads by that share of their root mean square.
    """
    groups: list[dict[str, Any]] = []
    rates: dict[float, list[nn.Parameter]] = {}
    reaches, floating, placed = [], [], set()
    for _, module, attribute, fake in fakes(model):
        param = original(module, attribute)
        if fake.scheme.is_leaf:
            floating.append(param)
            continue
        if param.requires_grad:
            step = float(fake.parts["scale"].get_buffer("start").abs().mean()) if "scale" in fake.parts else 1.0
            groups.append({"params": [param], "lr": lr * step, "weight_decay": 0.0})
            placed.add(id(param))
        reaches.append(2.0 ** (float(fake.scheme.grid.bits) - 1))
        for name, param in fake.parts.named_parameters():
            if param.requires_grad:
                shifts = name in ("code_shift.delta", "value_shift.delta")
                rates.setdefault(scale_lr / (1.0 if shifts else reaches[-1]), []).append(param)
                placed.add(id(param))
    usual = scale_lr * len(reaches) / sum(reaches) if reaches else scale_lr
    for param in dict.fromkeys(param for param in floating if param.requires_grad):  # a tied one stands there twice
        size = float(param.detach().square().mean().sqrt()) if param.ndim > 1 else 1.0
        rates.setdefault(usual * size, []).append(param)
        placed.add(id(param))
    rates.setdefault(usual, []).extend(p for p in model.parameters() if p.requires_grad and id(p) not in placed)
    return groups + [{"params": found, "lr": rate, "weight_decay": 0.0} for rate, found in rates.items() if found]
