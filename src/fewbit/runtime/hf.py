"""transformers loads models through us: `AutoModelForCausalLM.from_pretrained(id, quantization_config=FewbitConfig("nf4"))`.

Three ways in, told apart by what lies on disk:

    a float checkpoint             each linear layer's weight is rounded as soon as it is read and the float one let go
    one that `save_pretrained`     wrote of such a model: the canonical parts of every layer are read back
    any other that fewbit reads    (GPTQ, AWQ, compressed-tensors, bitsandbytes, MLX …): stored weights stay in their bits, `open_foreign` reads them

While transformers fills the model, quantised layers stand there as linear layers without a weight; it would take our buffers for its own and
empty them. They are put in at the end. Importing this module registers the method "fewbit" with transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fewbit.base.errors import InputError
from fewbit.base.resident import straight_from_the_system
from fewbit.num.qtensor import QTensor
from fewbit.num.scheme import parse_scheme
from fewbit.runtime.linear import ABOUT, QuantLinear
from fewbit.runtime.parts import rebuild
from fewbit.runtime.replace import SHORT, data_free, quantised_layer, skipped
from fewbit.runtime.tables import QuantEmbedding

METHOD = "fewbit"


@dataclass(frozen=True)
class Stored:
    """Quantised weights on disk.

    Attributes:
        layers: path of a linear layer -> its weight, called when it is wanted.
        decoded: parameter name -> float32 values, for quantised weights of modules that want numbers.
    """

    layers: Mapping[str, Callable[[], QTensor]]
    decoded: Mapping[str, Callable[[], torch.Tensor]]


open_foreign: list[
    Callable[[nn.Module, Path], Stored | None]
] = []  # readers of other formats, from floors above; None: not theirs


@register_quantization_config(METHOD)
class FewbitConfig(QuantizationConfigMixin):
    """What to quantise while loading, and how.

    Args:
        scheme: spelling or preset, e.g. "nf4", "int8", "int4-g128", "w8a8", "fp8". None: as the checkpoint stores it.
        method: a solver that needs no calibration: rtn, hqq.
        skip: layers to leave in floating point (names, last parts of names, patterns); None for those that transformers keeps: heads, tied weights.
        threshold: LLM.int8()'s, for int8 activations.
        options: of the solver.

    Raises:
        InputError: FB-E0601 for an unknown scheme, FB-E0905 where it cannot be reached without calibration, FB-E0904 for a threshold without int8 activations.
    """

    def __init__(
        self,
        scheme: str | None = None,
        *,
        method: str = "rtn",
        skip: Collection[str] | None = None,
        threshold: float = 0.0,
        options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method = METHOD
        known = {"quant_method", "fewbit_version"}
        if unknown := set(kwargs) - known:
            raise InputError("FB-E0909", f"FewbitConfig has no {', '.join(sorted(unknown))}")
        self.scheme = None if scheme is None else SHORT.get(scheme, str(scheme))
        self.method, self.threshold = method, float(threshold)
        if self.scheme is not None:
            wanted = parse_scheme(self.scheme)
            data_free(wanted, method)
            if self.threshold and wanted.activation is None:
                raise InputError(
                    "FB-E0904", f"a threshold of {self.threshold} with {wanted}, which leaves inputs as they are"
                )
        self.skip = None if skip is None else list(skip)
        self.options = dict(options or {})


class _Rounding(ConversionOps):
    """Rounds a weight as soon as transformers has read it; nothing is left for transformers to put into the model."""

    def __init__(self, owner: FewbitHfQuantizer) -> None:
        self.owner = owner

    def __deepcopy__(self, memo: dict[int, Any]) -> _Rounding:
        return self

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, torch.Tensor]:
        for name, value in input_dict.items():
            self.owner.take(kwargs["model"], name, value[0] if isinstance(value, list) else value)
            if kwargs.get("missing_keys") is not None:
                kwargs["missing_keys"].discard(name)
        return {}


@register_quantizer(METHOD)
class FewbitHfQuantizer(HfQuantizer):
    """What transformers calls while it loads and saves."""

    quantization_config: FewbitConfig

    def __init__(self, quantization_config: FewbitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.targets: set[str] = set()  # paths of layers to round while loading
        self.made: dict[str, QuantLinear] = {}
        self.stored: Stored | None = None
        self.unsaved: tuple[str, ...] = ()  # kinds of quantised modules that loading cannot make
        self.loading = ExitStack()  # what holds between the two calls around the loading of weights

    @property
    def is_trainable(self) -> bool:
        return True  # adapters on top

    def is_serializable(self) -> bool:
        """
        Raises:
            InputError: FB-E0909 where what would be written could not be loaded.
        """
        if self.unsaved:
            what = f"save_pretrained has no place for quantised {' and '.join(self.unsaved)}"
            raise InputError(
                "FB-E0909", what, remedy="save the state dict, and load it into a model that was quantised alike"
            )
        return True

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        files = kwargs.get("checkpoint_files") or []
        self.loading.enter_context(straight_from_the_system())
        self.stored = _stored(model, files)
        if self.stored is None:
            if self.quantization_config.scheme is None:
                raise InputError("FB-E0909", "FewbitConfig names no scheme and the checkpoint is not quantised")
            self._choose_targets(model)
            return
        self.pre_quantized = True
        on_disk, self.stored = self.stored, _placed(model, self.stored)
        for path in self.stored.layers:
            _empty(model.get_submodule(path))
        for name in self.stored.decoded:
            _mark_initialised(model.get_submodule(name.rpartition(".")[0]))
        parts = {rf"^{re.escape(path)}\.(?!bias$)" for path in (*self.stored.layers, *on_disk.layers)}
        parts |= {rf"^{re.escape(name.rpartition('.')[0])}\." for name in self.stored.decoded}
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *parts}
        missing = {re.escape(name) for name in self.stored.decoded}
        model._keys_to_ignore_on_load_missing = {*(model._keys_to_ignore_on_load_missing or ()), *missing}

    def _choose_targets(self, model: PreTrainedModel) -> None:
        config = self.quantization_config
        keep = config.skip if config.skip is not None else self.get_modules_to_not_convert(model)
        tied = model.get_output_embeddings() if model.config.get_text_config().tie_word_embeddings else None
        for path, module in model.named_modules():
            if isinstance(module, (nn.Linear, Conv1D)) and module is not tied and not skipped(path, keep):
                self.targets.add(path)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        if self.stored is not None:
            return param_name in self.stored.decoded  # may have another shape on disk; filled afterwards
        path, _, attribute = param_name.rpartition(".")
        return attribute == "weight" and path in self.targets

    def get_quantize_ops(self) -> ConversionOps:
        return _Rounding(self)

    def take(self, model: PreTrainedModel, name: str, value: torch.Tensor) -> None:
        """Rounds the weight of one layer; the layer waits without one."""
        path = name.rpartition(".")[0]
        layer, config = model.get_submodule(path), self.quantization_config
        assert config.scheme is not None
        dtype = value.dtype if value.is_floating_point() else model.dtype
        self.made[path] = quantised_layer(
            value, None, parse_scheme(config.scheme), name=path, transposed=isinstance(layer, Conv1D), method=config.method,
            threshold=config.threshold, options=config.options, dtype=dtype,
        )[0]  # fmt: skip
        _empty(layer)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> nn.Module:
        if self.stored is not None:
            for name, values in self.stored.decoded.items():
                owner = model.get_submodule(name.rpartition(".")[0])
                param = nn.Parameter(values().to(model.dtype), requires_grad=False)
                setattr(owner, name.rpartition(".")[2], param)
            if self.stored.decoded:
                model.tie_weights()
            for path, weight in self.stored.layers.items():
                self.made[path] = QuantLinear(weight(), dtype=model.dtype, threshold=self.quantization_config.threshold)
        unread = sorted(self.targets - self.made.keys())
        if unread:
            raise InputError("FB-E0906", f"no stored tensor fills {len(unread)} layer(s)", tensor=unread[0])
        for path, layer in self.made.items():
            parent, _, attribute = path.rpartition(".")
            layer.bias = model.get_submodule(path).bias
            setattr(model.get_submodule(parent), attribute, layer.train(model.training))
        self.made, self.targets, self.stored = {}, set(), None
        self.loading.close()
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> nn.Module:
        for path, table in [(path, m) for path, m in model.named_modules() if isinstance(m, QuantEmbedding)]:
            if table.scale is None:  # a scaled one stays: no plain module of torch's computes it
                rows = table.table.qtensor().dequantize(dtype or table.table.dtype)
                parent, _, attribute = path.rpartition(".")
                plain = nn.Embedding.from_pretrained(rows, padding_idx=table.padding_idx)
                setattr(model.get_submodule(parent), attribute, plain)
        tables = {id(m.table) for m in model.modules() if isinstance(m, QuantEmbedding)}
        for path, layer in [(path, m) for path, m in model.named_modules() if isinstance(m, QuantLinear)]:
            if id(layer) in tables:
                continue
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            plain.weight = nn.Parameter(layer.qtensor().dequantize(dtype or layer.dtype), requires_grad=False)
            plain.register_parameter("bias", layer.bias)
            parent, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(parent), attribute, plain)
        return model


def mark(model: PreTrainedModel, config: FewbitConfig, also: Collection[str] = ()) -> None:
    """Lets transformers know of a model that was quantised in memory; `also`: kinds of modules besides linear layers."""
    before = getattr(model, "hf_quantizer", None)
    if before is not None and not isinstance(before, FewbitHfQuantizer):
        return  # another method's model, to be saved in its way
    quantizer = before or FewbitHfQuantizer(config)
    quantizer.unsaved = tuple(dict.fromkeys((*quantizer.unsaved, *also)))
    known: Any = model
    known.hf_quantizer = quantizer
    # `is_quantized` is not set: transformers would refuse .half() and .float(), which our layers follow
    known.config.quantization_config = quantizer.quantization_config


def _empty(layer: nn.Module) -> None:
    """A layer that waits for its weight: nothing to initialise, and nothing that the weight's stored name could fill."""
    hollow = nn.Parameter(torch.empty(0), requires_grad=False)
    _mark_initialised(hollow)
    layer._parameters["weight"] = None
    layer.__dict__["weight"] = hollow  # families that initialise weights by name find one
    _mark_initialised(layer)


def _mark_initialised(part: nn.Module | nn.Parameter) -> None:
    """Tells transformers to leave the values of a module or parameter alone."""
    part.__dict__["_is_hf_initialized"] = True


def _stored(model: PreTrainedModel, files: Iterable[str]) -> Stored | None:
    """How the weights lie in the files, or None where they are floats."""
    paths = [Path(file) for file in files]
    if not paths:
        return None
    own = _own(paths)
    if own is not None:
        return own
    for reader in open_foreign:
        found = reader(model, paths[0].parent)
        if found is not None:
            return found
    return None


def _own(paths: list[Path]) -> Stored | None:
    """Layers in the parts that a QuantLinear's state dict has."""
    where: dict[str, Path] = {}
    for path in paths:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                where |= dict.fromkeys(file.keys(), path)
    stems = [name.removesuffix(f".weight.{ABOUT}") for name in where if name.endswith(f".weight.{ABOUT}")]
    if not stems:
        return None

    def read(stem: str) -> QTensor:
        parts = {}
        for name in sorted(name for name in where if name.startswith(f"{stem}.weight.")):
            with safe_open(where[name], "pt") as file:
                parts[name.removeprefix(f"{stem}.weight.")] = file.get_tensor(name)
        about = json.loads(bytes(parts.pop(ABOUT).tolist()))
        q = rebuild(parse_scheme(about["scheme"]), tuple(about["shape"]), parts)
        q.check(stem)
        return q

    return Stored({stem: partial(read, stem) for stem in stems}, {})


def _placed(model: PreTrainedModel, stored: Stored) -> Stored:
    """The same under this model's names: one with a head calls its trunk `model.`, the trunk by itself does not; it has no head to fill either."""
    prefix = f"{model.base_model_prefix}."
    paths = {name for name, _ in model.named_modules()}
    layers = {}
    for path, read in stored.layers.items():
        found = next((p for p in (path, path.removeprefix(prefix), prefix + path) if p in paths), None)
        if found is None and model.get_output_embeddings() is not None:
            raise InputError("FB-E0906", f"a {type(model).__name__} has no layer for a stored weight", tensor=path)
        if found is not None:
            layers[found] = read
    return Stored(layers, stored.decoded)


def _prefer_ours() -> None:
    """A FewbitConfig that is passed wins over the config of a checkpoint in another format, as AutoRoundConfig's does."""
    before = AutoHfQuantizer.merge_quantization_configs.__func__

    def merge(cls: type, stored: Any, passed: Any) -> Any:
        if isinstance(passed, FewbitConfig):
            method = stored.get("quant_method", "no method named") if isinstance(stored, dict) else stored.quant_method
            if passed.scheme is not None and method != METHOD:
                raise InputError("FB-E0909", f"the checkpoint is quantised already ({method}); pass FewbitConfig()")
            held = stored.get("scheme") if isinstance(stored, dict) else getattr(stored, "scheme", None)
            if passed.scheme is not None and held is not None and passed.scheme != held:
                raise InputError("FB-E0909", f"the checkpoint is quantised already ({held}); pass FewbitConfig()")
            return passed if passed.scheme is not None or not isinstance(stored, dict) else _from_stored(stored, passed)
        return before(cls, stored, passed)

    AutoHfQuantizer.merge_quantization_configs = classmethod(merge)


def _from_stored(stored: dict[str, Any], passed: FewbitConfig) -> FewbitConfig:
    return FewbitConfig.from_dict(stored) if stored.get("quant_method") == METHOD else passed


def _accept_nameless() -> None:
    """MLX writes a quantization_config without a method's name; transformers would stop before it asks us."""
    before = AutoHfQuantizer.supports_quant_method

    def supports(stored: dict[str, Any]) -> bool:
        nameless = "quant_method" not in stored and {"bits", "group_size"} <= stored.keys()
        return True if nameless else before(stored)

    AutoHfQuantizer.supports_quant_method = staticmethod(supports)


_prefer_ours()
_accept_nameless()
