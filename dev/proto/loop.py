"""A sequential whole-model quantisation of the sample, to order solver options by their mean KL.

    python dev/proto/loop.py NAME [NAME …]      names of VARIANTS in variants.py
"""

from __future__ import annotations

import pathlib
import sys
import time

import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import sample as S

TMP = pathlib.Path("/work/tmp/solvers")
CHUNK = 8
GRAM_SCALE: dict[str, float] = {}  # mean diagonal of each gram per token, lost when stats are normalised
_float: dict[str, list[torch.Tensor]] = {}


@torch.no_grad()
def float_states(ids: torch.Tensor) -> list[torch.Tensor]:
    """Block inputs on the float path, [layers] of [windows, length, hidden]."""
    if "h" not in _float:
        w = S.weights()
        h = w["model.embed_tokens.weight"][ids]
        states = [h]
        for layer in range(S.LAYERS):
            block = S.Block(w, layer)
            h = torch.cat([block(c) for c in h.split(CHUNK)])
            states.append(h)
        _float["h"] = states
    return _float["h"]


def fisher(ids: torch.Tensor, windows: int = 128, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """Per linear: out_gram = E[g g^T] over tokens, token = |g|^2 per token [windows, length]; labels drawn from the model."""
    path = TMP / f"fisher{windows}.pt"
    if path.exists():
        return torch.load(path)
    w = S.weights()
    gen = torch.Generator().manual_seed(seed)
    out: dict[str, dict] = {}
    for c in ids[:windows].split(4):
        outs: dict[str, torch.Tensor] = {}
        h = w["model.embed_tokens.weight"][c].requires_grad_(True)
        for layer in range(S.LAYERS):
            block = S.Block(w, layer)

            def lin(name, x, block=block, layer=layer):
                y = x @ block.w[name].T
                y.retain_grad()
                outs[f"{layer}.{name}"] = y
                return y

            block.lin = lin
            h = block(h)
        lg = S.norm(h, w["model.norm.weight"]) @ w["model.embed_tokens.weight"].T
        with torch.no_grad():
            y = torch.multinomial(lg.flatten(0, 1).softmax(-1), 1, generator=gen)[:, 0]
        F.cross_entropy(lg.flatten(0, 1), y, reduction="sum").backward()
        for name, o in outs.items():
            g = o.grad.flatten(0, 1)
            e = out.setdefault(name, {"gram": 0.0, "token": []})
            e["gram"] = e["gram"] + g.T @ g
            e["token"].append(g.pow(2).sum(-1))
    for e in out.values():
        e["token"] = torch.cat(e["token"])
        e["gram"] = e["gram"] / e["token"].numel()
    torch.save(out, path)
    return out


@torch.no_grad()
def run(solve, ids: torch.Tensor, *, token_weight=None, residual: bool = True, after_block=None) -> dict[str, torch.Tensor]:
    """Quantise all linears in order. solve(name, w, stats) -> w_hat; stats: gram, cross (wanted output x input / n: w Xf Xq^T)."""
    hf_all = float_states(ids)
    w = S.weights()
    done = dict(w)
    hq = hf_all[0].clone()
    for layer in range(S.LAYERS):
        hf = hf_all[layer]
        bf, bq = S.Block(w, layer), S.Block(done, layer)
        stage_f, stage_q, start_q = hf, hq, hq
        for stage, names in S.LINEARS.items():
            n_in = bf.w[names[0]].shape[1]
            groups = {n: n for n in names} if token_weight else {names[0]: None}
            acc = {k: [torch.zeros(n_in, n_in), torch.zeros(n_in, n_in), None] for k in groups}
            base_f, base_q = (hf, hq) if stage == "attn_in" else (stage_f, stage_q)
            fx, fq = [], []
            for i, (a, b) in enumerate(zip(base_f.split(CHUNK), base_q.split(CHUNK), strict=True)):
                xf, xq = getattr(bf, stage)(a), getattr(bq, stage)(b)
                fx.append(xf), fq.append(xq)
                xf, xq = xf.flatten(0, 1), xq.flatten(0, 1)
                for k, key in groups.items():
                    xw = xq
                    if key:
                        t = token_weight[f"{layer}.{key}"][i * xq.shape[0] : (i + 1) * xq.shape[0], None]
                        xw = xq * t
                    acc[k][0] += xq.T @ xw
                    acc[k][1] += xf.T @ xw
                    if stage in ("o_in", "down_in") and residual:
                        rf, rq = hf.split(CHUNK)[i].flatten(0, 1), hq.split(CHUNK)[i].flatten(0, 1)
                        d = (rf - rq).T @ xw
                        acc[k][2] = d if acc[k][2] is None else acc[k][2] + d
            for n in names:
                gram, cross, res = acc[n if token_weight else names[0]]
                scale = 1.0 / gram.diagonal().mean()
                wanted = bf.w[n] @ cross + (res if res is not None else 0)
                GRAM_SCALE[f"{layer}.{n}"] = float(gram.diagonal().mean()) / hf.shape[0] / hf.shape[1]
                q = solve(f"{layer}.{n}", bf.w[n], {"gram": gram * scale, "cross": cross * scale, "wanted": wanted * scale})
                done[f"model.layers.{layer}.{n}.weight"] = q
                bq.w[n] = q
            if stage in ("o_in", "down_in"):
                n = names[0]
                hf = torch.cat([r + bf.lin(n, x) for r, x in zip(hf.split(CHUNK), fx, strict=True)])
                hq = torch.cat([r + bq.lin(n, x) for r, x in zip(hq.split(CHUNK), fq, strict=True)])
                stage_f, stage_q = hf, hq
            else:
                stage_f, stage_q = torch.cat(fx), torch.cat(fq)
        if after_block is not None:
            for n, value in after_block(layer, bq, start_q, hf).items():
                done[f"model.layers.{layer}.{n}.weight"] = bq.w[n] = value
            hq = torch.cat([bq(c) for c in start_q.split(CHUNK)])
    return done
