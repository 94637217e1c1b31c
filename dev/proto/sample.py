"""The sample model as plain functions, for measuring solver options: forward by parts, calibration tokens, mean KL.

Nothing here is shipped; it exists so that an ablation takes seconds. Float32 throughout.
"""

from __future__ import annotations

import json
import math
import pathlib

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = ROOT / "samples" / "sample"
DATA = ROOT.parent / "shared" / "data"
LAYERS, HEADS, KV, DIM, EPS, THETA = 8, 4, 2, 64, 1e-6, 10000.0
LINEARS = {
    "attn_in": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o_in": ("self_attn.o_proj",),
    "mlp_in": ("mlp.gate_proj", "mlp.up_proj"),
    "down_in": ("mlp.down_proj",),
}


def weights() -> dict[str, torch.Tensor]:
    return {name: w.float() for name, w in load_file(MODEL / "model.safetensors").items()}


def calibration(windows: int = 128, length: int = 512) -> torch.Tensor:
    """int64 [windows, length]: the texts in file order, joined, cut, spread evenly over the file."""
    tok = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    texts = [json.loads(line)["text"] for line in (DATA / "calibration.jsonl").read_text().splitlines()]
    ids = [i for e in tok.encode_batch(texts, add_special_tokens=False) for i in [0, *e.ids]]
    total = len(ids) // length
    pick = [int(k * total / windows) for k in range(windows)]
    return torch.tensor([ids[p * length : (p + 1) * length] for p in pick])


def heldout(windows: int = 24, length: int = 512) -> torch.Tensor:
    tok = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    ids = tok.encode((DATA / "wikitext2-test.txt").read_text(), add_special_tokens=False).ids
    return torch.tensor(ids[: windows * length]).reshape(windows, length)


def norm(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS) * w


def _rope(t: int) -> tuple[torch.Tensor, torch.Tensor]:
    freq = 1.0 / THETA ** (torch.arange(0, DIM, 2).float() / DIM)
    angle = torch.arange(t).float()[:, None] * freq
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = DIM // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class Block:
    """One block's weights and its parts; `lin` may be replaced to observe."""

    def __init__(self, w: dict[str, torch.Tensor], layer: int) -> None:
        p = f"model.layers.{layer}."
        self.w = {k.removeprefix(p).removesuffix(".weight"): v for k, v in w.items() if k.startswith(p)}
        self.lin = lambda name, x: x @ self.w[name].T

    def attn_in(self, h):
        return norm(h, self.w["input_layernorm"])

    def o_in(self, x):
        b, t, _ = x.shape
        q, k, v = (self.lin(n, x).view(b, t, -1, DIM).transpose(1, 2) for n in LINEARS["attn_in"])
        cos, sin = _rope(t)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        k, v = (z.repeat_interleave(HEADS // KV, 1) for z in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, t, -1)

    def mlp_in(self, h):
        return norm(h, self.w["post_attention_layernorm"])

    def down_in(self, x):
        return F.silu(self.lin("mlp.gate_proj", x)) * self.lin("mlp.up_proj", x)

    def __call__(self, h):
        h = h + self.lin("self_attn.o_proj", self.o_in(self.attn_in(h)))
        return h + self.lin("mlp.down_proj", self.down_in(self.mlp_in(h)))


def logits(w: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    h = w["model.embed_tokens.weight"][ids]
    for layer in range(LAYERS):
        h = Block(w, layer)(h)
    return norm(h, w["model.norm.weight"]) @ w["model.embed_tokens.weight"].T


_cache: dict[str, torch.Tensor] = {}


@torch.no_grad()
def mean_kl(w: dict[str, torch.Tensor], windows: int = 24) -> float:
    """Mean over tokens of KL(float || w), in nats."""
    ids = heldout(windows)
    total = 0.0
    for k in range(0, windows, 4):
        key = f"{windows}/{k}"
        if key not in _cache:
            _cache[key] = F.log_softmax(logits(weights(), ids[k : k + 4]), -1).half()
        p = _cache[key].float()
        q = F.log_softmax(logits(w, ids[k : k + 4]), -1)
        total += float((p.exp() * (p - q)).sum())
    return total / ids.numel()


if __name__ == "__main__":
    import time

    from transformers import AutoModelForCausalLM

    ids = heldout(2)
    ref = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)(ids).logits
    print("difference from transformers", float((ref - logits(weights(), ids)).abs().max()))
    start = time.time()
    w = weights()
    for name in w:
        if "proj" in name:
            g = w[name].view(-1, 128)
            lo, hi = g.amin(1, True).clamp(max=0), g.amax(1, True).clamp(min=0)
            s = ((hi - lo) / 15).half().float()
            z = (-lo / s).round()
            w[name] = (((g / s).round() + z).clamp(0, 15) - z).mul(s).view_as(w[name])
    print("RTN int4-g128-asym", mean_kl(w), time.time() - start)
    a = torch.randn(4096, 256); b = torch.randn(768, 256)
    start = time.time()
    for _ in range(50): a @ b.T
    print("GFLOP/s", 50 * 2 * 4096 * 256 * 768 / (time.time() - start) / 1e9)
    assert math.isfinite(1)
