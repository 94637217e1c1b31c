"""Adapters on quantised layers: QLoRA (arXiv 2305.14314) with peft.

    quantize_(model, "nf4-g64-dq")
    tuned = attach(model, r=16, checkpointing=True)        a peft model: only adapters learn; train it with any loop
    tuned.save_pretrained("adapter")                       as ever; `load_adapter(model, "adapter")` puts it back
    model, rows = merge(tuned)                             adapters folded in and the sum quantised again, with the error stated per layer

peft is told of our layer through its own table of custom layers, so `get_peft_model` works too once `register(config)` was called. The base stays in few bits
and gets no gradient; products are computed in the layer's dtype, adapters in theirs (float32, unless told otherwise).

peft is an optional dependency: `pip install 'fewbit[train]'`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import nn

from fewbit.base.errors import InputError
from fewbit.base.names import matches
from fewbit.math.metrics import relative_error
from fewbit.num.qtensor import QTensor
from fewbit.num.scheme import Scheme, parse_scheme
from fewbit.runtime.linear import QuantLinear, weight_of
from fewbit.runtime.tables import QuantEmbedding
from fewbit.solve.table import solver_named

try:
    from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import check_adapters_to_merge
except ImportError as missing:
    raise InputError("FB-E0920", f"adapters need peft: {missing}") from None


class _Recomputing(Protocol):
    """A transformers model, which can compute activations anew in the backward pass."""

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any]) -> None: ...

    def enable_input_require_grads(self) -> None: ...


@dataclass(frozen=True)
class Merged:
    """One layer whose adapters were folded in.

    Attributes:
        name, scheme: of the layer, and how the sum is stored.
        update: size of what the adapters added, relative to the weight.
        error: of storing the sum, relative to the sum: |stored - sum| / |sum|.
        lost: the same, relative to what was added: above 1, rounding moved the weight further than training did.
    """

    name: str
    scheme: str
    update: float
    error: float
    lost: float


class LoraQuantLinear(nn.Module, LoraLayer):
    """A `QuantLinear` with adapters beside it: y = base(x) + scaling · B A x.

    Raises:
        InputError: FB-E0921 for adapters that change the base or need its float weight (DoRA, PiSSA, LoftQ …), or bring a bias.
    """

    # what peft's LoraLayer brings: torch's Module knows only that an attribute is a tensor or a module
    base_layer: QuantLinear
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_dropout: nn.ModuleDict
    scaling: dict[str, float]
    merged: bool
    disable_adapters: bool
    merged_adapters: list[str]
    active_adapters: list[str]
    _check_forward_args: Callable[..., None]
    _cast_input_dtype: Callable[[torch.Tensor, torch.dtype], torch.Tensor]

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        with warnings.catch_warnings():  # "unsupported layer type": it is supported here
            warnings.filterwarnings("ignore", message="Unsupported layer type")
            LoraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = False
        self._active_adapter = adapter_name
        self._before: list[tuple[QTensor, float]] = []  # weights and thresholds
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Adds an adapter; see peft."""
        plain = config.init_lora_weights in (True, False, "gaussian", "orthogonal")
        if config.use_dora or config.lora_bias or not plain or getattr(config, "alora_invocation_tokens", None):
            what = f"use_dora={config.use_dora}, lora_bias={config.lora_bias}, init_lora_weights={config.init_lora_weights!r}"
            raise InputError(
                "FB-E0921", f"quantised layers take plain LoRA, got {what}", tensor=kwargs.get("target_name")
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """[out, in] in float32: what an adapter adds to the weight."""
        down, up = weight_of(self.lora_A[adapter]), weight_of(self.lora_B[adapter])
        return up.float() @ down.float() * self.scaling[adapter]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x [..., in] -> [..., out]; `adapter_names`, one per sequence, mixes adapters in a batch."""
        self._check_forward_args(x, *args, **kwargs)
        names = kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        if names is None:
            for adapter in self.active_adapters:
                if adapter in self.lora_A:
                    result = result + self._added(x, adapter).to(result.dtype)
            return result
        rows = [self._added(x[i : i + 1], a) if a in self.lora_A else result.new_zeros(1) for i, a in enumerate(names)]
        return torch.cat([result[i : i + 1] + row.to(result.dtype) for i, row in enumerate(rows)])

    def _added(self, x: torch.Tensor, adapter: str) -> torch.Tensor:
        down, up = self.lora_A[adapter], self.lora_B[adapter]
        if not torch.is_autocast_enabled(x.device.type):
            x = self._cast_input_dtype(x, weight_of(down).dtype)
        return up(down(self.lora_dropout[adapter](x))) * self.scaling[adapter]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Folds adapters into the weight, which is rounded to nearest under its own scheme again; `unmerge` restores the codes exactly."""
        for adapter in check_adapters_to_merge(self, adapter_names) or ():
            if adapter in self.lora_A:
                self._fold([adapter], self.base_layer.scheme, "rtn", safe_merge)
                self.merged_adapters.append(adapter)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Puts the base's codes back as they were before merging."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        q, self.base_layer.threshold = self._before[0]
        self.base_layer._hold(q, self.base_layer.dtype)
        self._before.clear()
        self.merged_adapters.clear()

    def _fold(
        self, adapters: Collection[str], scheme: Scheme, method: str, check: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantises base + adapters into the base layer; (the base before, the sum), float32."""
        q = self.base_layer.qtensor()
        base = q.dequantize()
        total = base.clone()
        for adapter in adapters:
            total += self.get_delta_weight(adapter)
        if check and not bool(torch.isfinite(total).all()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {list(adapters)} seems to be broken")
        new = _solved(total, scheme, method)
        if scheme.static and "input_scale" in q.sides:
            new = replace(new, sides={**new.sides, "input_scale": q.sides["input_scale"]})
        before = (q, self.base_layer.threshold)
        if scheme.activation is None:  # its columns of outliers are a matter of rounded inputs
            self.base_layer.threshold = 0.0
        try:
            self.base_layer._hold(new, self.base_layer.dtype)
        except InputError:
            self.base_layer.threshold = before[1]
            raise
        self._before.append(before)
        return base, total

    def adapted_weight(self) -> torch.Tensor:
        """[out, in]: the weight with its active adapters, which learn through it; for code that wants the numbers of a matrix."""
        weight = self.base_layer.weight
        if self.disable_adapters or self.merged:
            return weight
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                weight = weight + self.get_delta_weight(adapter).to(weight.dtype)
        return weight

    def __repr__(self) -> str:
        return "lora." + super().__repr__()


def _solved(weight: torch.Tensor, scheme: Scheme, method: str) -> QTensor:
    solver = solver_named(method)
    if solver.needs:
        raise InputError("FB-E0905", f"{method} needs calibration statistics: {', '.join(sorted(solver.needs))}")
    q = solver(weight.contiguous(), None, scheme.weights_only, seed=0, options={}).q
    return replace(q, scheme=replace(q.scheme, activation=scheme.activation, static=scheme.static))


def register(config: LoraConfig) -> LoraConfig:
    """Tells a peft configuration of our layer; returns it. Needed before `get_peft_model` and `PeftModel.from_pretrained(config=…)`."""
    config._register_custom_module({QuantLinear: LoraQuantLinear})
    return config


def quantised_layers(model: nn.Module, patterns: Collection[str] = ("*",)) -> list[str]:
    """Full names of the quantised linear layers that patterns select; tables of embeddings, and heads tied to them, are none."""
    tables = {id(module.table) for module in model.modules() if isinstance(module, QuantEmbedding)}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear)
        and id(module) not in tables
        and any(matches(pattern, name) for pattern in patterns)
    ]


def attach(
    model: nn.Module,
    config: LoraConfig | None = None,
    *,
    r: int = 16,
    alpha: int | None = None,
    dropout: float = 0.0,
    targets: Collection[str] = ("*",),
    checkpointing: bool = False,
) -> PeftModel:
    """Puts adapters on the quantised linear layers of a model and freezes everything else.

    Args:
        model: with `QuantLinear` layers.
        config: peft's, for everything that is not said here; its `target_modules` are filled in where it names none.
        r, alpha: rank, and numerator of the scaling alpha / r (2 r by default). dropout: of the adapters' inputs.
        targets: patterns of full layer names.
        checkpointing: recompute activations in the backward pass.

    Raises:
        InputError: FB-E0922 when no quantised layer is selected; FB-E0921 as `LoraQuantLinear`.
    """
    names = quantised_layers(model, targets)
    if not names:
        raise InputError(
            "FB-E0922", f"no quantised linear layer of this {type(model).__name__} matches {list(targets)}"
        )
    if config is None:
        config = LoraConfig(
            r=r, lora_alpha=2 * r if alpha is None else alpha, lora_dropout=dropout, task_type="CAUSAL_LM"
        )
    if config.target_modules is None:
        config.target_modules = names
    model.requires_grad_(False)
    if checkpointing:
        recomputing = cast("_Recomputing", model)
        recomputing.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        recomputing.enable_input_require_grads()
    return get_peft_model(model, register(config))


def load_adapter(model: nn.Module, path: str | Path, **options: Any) -> PeftModel:
    """A saved adapter on a model with quantised layers."""
    config = PeftConfig.from_pretrained(str(path))
    return PeftModel.from_pretrained(model, str(path), config=register(config), **options)


def adapted(model: nn.Module) -> Iterator[tuple[str, LoraQuantLinear]]:
    """The quantised layers that have adapters, by name."""
    for name, module in model.named_modules():
        if isinstance(module, LoraQuantLinear):
            yield name, module


@torch.no_grad()
def merge(
    tuned: PeftModel, scheme: str | Scheme | None = None, *, method: str = "rtn"
) -> tuple[nn.Module, tuple[Merged, ...]]:
    """Folds the active adapters into the quantised weights and takes peft's wrapping off.

    Args:
        scheme: how sums are stored; None for each layer's own. A leaf (`bf16`) keeps them in floating point.
        method: a solver that needs no calibration.

    Returns:
        The model, and for each layer how far storing the sum moved it.

    Raises:
        InputError: FB-E0922 when there is nothing to merge.
    """
    rows = []
    wanted = parse_scheme(scheme) if isinstance(scheme, str) else scheme
    for name, layer in adapted(tuned):
        if layer.merged:
            layer.unmerge()
        active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
        base, total = layer._fold(active, wanted or layer.base_layer.scheme, method)
        stored = layer.base_layer.qtensor().dequantize()
        added = float((total - base).norm())
        rows.append(
            Merged(
                name.removeprefix("base_model.model."),
                str(layer.base_layer.scheme),
                relative_error(base, total),
                relative_error(total, stored),
                float((stored - total).norm()) / added if added else float("inf"),
            )
        )
    if not rows:
        raise InputError("FB-E0922", "no quantised layer of this model has adapters")
    return tuned.unload(), tuple(rows)
