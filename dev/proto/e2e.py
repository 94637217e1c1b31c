"""The whole sample by gptq, then learned rounding block by block or end to end: python e2e.py WINDOWS SCHEME block|model|both"""
import json, sys, time
import loop as L, sample as S, torch
import torch.nn.functional as F
from dataclasses import replace as rep
from fewbit.math.stats import Stats
from fewbit.num.scheme import parse_scheme
from fewbit.solve import gptq
from fewbit.solve.learned import Schedule, learn

torch.set_num_threads(2)
windows, scheme, mode = int(sys.argv[1]), parse_scheme(sys.argv[2]), sys.argv[3]
extra = json.loads(sys.argv[4]) if len(sys.argv) > 4 else {}
ids = S.calibration(windows)
fisher = L.fisher(ids, windows)
held, spent = {}, [0.0, 0.0]
say = lambda t: print("    ", t, flush=True)

def solve(name, w, st):
    stats = Stats(1, gram=st["gram"], cross_gram=st["cross"], out_gram=fisher[name]["gram"])
    t = time.time()
    found = gptq.SOLVER(w, stats, scheme, options=extra)
    held[name] = (found.q, gptq.Problem.of(w, stats, {**gptq.SOLVER.options, **extra}).quadratic)
    spent[0] += time.time() - t
    return found.q.dequantize()

def after(layer, block, start, wanted):
    if mode == "model":
        return {}
    names = [n for n in block.w if "proj" in n]
    ins, outs = start.split(4), wanted.split(4)
    metric = fisher[f"{layer}.mlp.down_proj"]["gram"]; metric = metric / metric.diagonal().mean()
    def loss(weights, k):
        original = dict(block.w); block.w.update(weights); out = block(ins[k]); block.w.update(original)
        miss = (out - outs[k]).flatten(0, 1)
        return ((miss @ metric) * miss).sum()
    t = time.time()
    found = learn(loss, len(ins), {n: held[f"{layer}.{n}"][0] for n in names}, {n: held[f"{layer}.{n}"][1] for n in names}, schedule=Schedule(rounds=3, caution=9.0), report=say)
    spent[1] += time.time() - t
    for n in names: held[f"{layer}.{n}"] = (found[n].q, held[f"{layer}.{n}"][1])
    return {n: found[n].q.dequantize() for n in names}

t = time.time()
done = L.run(solve, ids, residual=False, after_block=after)
print(f"{windows} {scheme} {mode} {extra} before end to end: KL {S.mean_kl(done):.5f}  {time.time()-t:.0f} s, gptq {spent[0]:.0f}, learning {spent[1]:.0f}", flush=True)
if mode in ("model", "both"):
    w = S.weights()
    full = lambda n: "model.layers." + n.split(".", 1)[0] + "." + n.split(".", 1)[1] + ".weight"
    batch = 4
    def loss(weights, k):
        x = ids[k * batch : (k + 1) * batch]
        with torch.no_grad():
            p = F.log_softmax(S.logits(w, x), -1)
        q = F.log_softmax(S.logits({**w, **{full(n): v for n, v in weights.items()}}, x), -1)
        return (p.exp() * (p - q)).sum()
    t = time.time()
    # Kronecker grams times tokens: G per token, H mean -> problem.outer is scaled to mean one, learn() finds the common factor; keep relative sizes
    probs = {}
    for n, (q, pr) in held.items():
        g = float(fisher[n]["gram"].diagonal().mean())
        probs[n] = rep(pr, outer=pr.outer * g * gscale) if (gscale := L.GRAM_SCALE.get(n)) else pr
    found = learn(loss, len(ids) // batch, {n: h[0] for n, h in held.items()}, probs, schedule=Schedule(rounds=4), report=lambda s: (say(s)))
    done = {**w, **{full(n): f.q.dequantize() for n, f in found.items()}}
    print(f"{windows} {scheme} {mode} after end to end: KL {S.mean_kl(done):.5f}  {time.time()-t:.0f} s", flush=True)
