"""The quantised cache: the window is exact, old tokens are rounded along the right axes, and a model runs on it."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig
from transformers.cache_utils import DynamicCache, DynamicSlidingWindowLayer

from fewbit.base.errors import InputError
from fewbit.math.scales import Search, quantize
from fewbit.runtime.kv import KINDS, QuantCache, QuantLayer, scheme_for


def states(tokens: int, seed: int = 0, channels: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 2, 3, tokens, channels, generator=generator)
    keys[..., 5] *= 30  # a channel that is large for every token
    return keys, values


def fed(
    layer: QuantLayer, keys: torch.Tensor, values: torch.Tensor, pieces: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    out = (torch.empty(0), torch.empty(0))
    for k, v in zip(keys.split(pieces, -2), values.split(pieces, -2), strict=True):
        out = layer.update(k, v)
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pieces", ((100, 1, 1, 1), (7,) * 14 + (5,), (103,)), ids=str)
def test_old_tokens_are_rounded_and_the_window_is_exact(kind: str, pieces: tuple[int, ...]) -> None:
    keys, values = states(103)
    layer = QuantLayer(kind, group=32, window=16)
    fed(layer, keys, values, pieces)
    found = layer.update(*states(1, seed=1))
    old = len(layer.old_keys)
    assert layer.get_seq_length() == 104 and old == 64 and layer.get_mask_sizes(3) == (107, 0)
    assert torch.equal(found[0][..., old:103, :], keys[..., old:, :])
    assert torch.equal(found[1][..., old:103, :], values[..., old:, :])
    scheme = scheme_for(kind, 32)
    per_channel = quantize(
        scheme, keys[..., :old, :].transpose(-1, -2).contiguous(), search=Search("absmax")
    ).dequantize()
    per_token = quantize(scheme, values[..., :old, :].contiguous(), search=Search("absmax")).dequantize()
    assert torch.equal(found[0][..., :old, :], per_channel.transpose(-1, -2))
    assert torch.equal(found[1][..., :old, :], per_token)


def test_keys_along_channels_are_what_outlier_channels_want() -> None:
    keys, values = states(128)
    layer = QuantLayer("int2", window=0)
    layer.update(keys, values)
    found, _ = layer.update(*states(1))
    along_tokens = quantize(scheme_for("int2", 32), keys, search=Search("absmax")).dequantize()
    plain = [c for c in range(64) if c != 5]
    error = lambda w: float((w - keys)[..., plain].norm() / keys[..., plain].norm())  # noqa: E731
    assert error(found[..., :128, :]) < 0.5 < 1.0 < error(along_tokens)


def test_bytes() -> None:
    keys, values = states(1024)
    for kind, bits in (("int8", 8.5), ("int4", 5.0), ("int2", 3.0), ("fp8", 8.5)):
        layer = QuantLayer(kind, window=0)
        layer.update(keys, values)
        assert 8 * layer.nbytes / (2 * keys.numel()) == bits


@pytest.mark.parametrize("channels", (64, 40))
def test_crop_select_and_reset(channels: int) -> None:
    keys, values = states(100, channels=channels)
    layer = QuantLayer("int8", group=16, window=8)
    layer.update(keys, values)
    assert len(layer.old_keys) == 80
    layer.crop(-5)
    assert layer.get_seq_length() == 95 and len(layer.old_keys) == 80
    layer.crop(-25)
    assert layer.get_seq_length() == 70 and len(layer.old_keys) == 64 and layer.keys.shape[-2] == 6
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 2, 3]))
    assert layer.keys.shape[0] == 3
    found = layer.update(torch.zeros(3, 3, 1, channels), torch.zeros(3, 3, 1, channels))
    assert found[0].shape == found[1].shape == (3, 3, 71, channels)
    error = (found[1][0, :, :70] - values[1, :, :70]).abs().max()
    assert float(error) < 0.05 and float((found[0][1, :, :70] - keys[0, :, :70]).abs().max()) < 1.0
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.nbytes == 0


def test_refusals() -> None:
    for kind, group, window in (("int3", 32, 0), ("int4", 12, 0), ("int4", 0, 0), ("int4", 32, -1)):
        with pytest.raises(InputError, match="FB-E0923"):
            QuantLayer(kind, group, window)


def test_a_model_on_it() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 64, (1, 90))
    sizes = {}
    with torch.no_grad():
        wanted = model(ids).logits
        for kind in KINDS:
            cache = QuantCache(config, kind, window=16)
            outs = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(10, 1)]
            error = float((torch.cat(outs, 1) - wanted).norm() / wanted.norm())
            assert 0 < error < {"int8": 0.02, "fp8": 0.05, "int4": 0.15, "int2": 0.8}[kind], (kind, error)
            sizes[kind] = cache.nbytes
        text = model.generate(ids, past_key_values=QuantCache(config, "int8"), max_new_tokens=5, do_sample=False)
    assert text.shape == (1, 95)
    full = DynamicCache(config=config)
    assert sizes["int2"] < sizes["int4"] < sizes["int8"] < 2 * 90 * 2 * 32 * 4
    assert len(full.layers) == 2


def test_sliding_layers_stay_as_they_are() -> None:
    config = MistralConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=8,
        vocab_size=64,
    )
    assert all(isinstance(layer, DynamicSlidingWindowLayer) for layer in QuantCache(config).layers)
