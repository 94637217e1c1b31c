"""Ablations of the shipped `gptq` solver on the whole sample: python real.py WINDOWS SCHEME LABEL=json …"""

from __future__ import annotations

import json
import sys
import time

import loop as L
import sample as S
import torch

from fewbit.math.stats import Stats
from fewbit.num.scheme import parse_scheme
from fewbit.solve.table import SOLVERS


def learner(held, fisher, schedule, spent, batch=4):
    from fewbit.solve.learned import learn

    def after(layer, block, start, wanted):
        names = [n for n in block.w if "proj" in n]
        ins, outs = start.split(batch), wanted.split(batch)

        def forward(weights, k):
            original = dict(block.w)
            block.w.update(weights)
            out = block(ins[k])
            block.w.update(original)
            return out

        metric = fisher[f"{layer}.mlp.down_proj"]["gram"] if fisher else None
        begin = time.time()
        with torch.enable_grad():
            found = learn(forward, lambda k: outs[k], len(ins), {n: held[f"{layer}.{n}"][0] for n in names},
                          {n: held[f"{layer}.{n}"][1] for n in names}, metric=metric, schedule=schedule)
        spent[0] += time.time() - begin
        print("   ", layer, next(iter(found.values())).notes[-1], flush=True)
        return {n: f.q.dequantize() for n, f in found.items()}

    return after


def solver(scheme, method, options, fisher, spent, held=None):
    def solve(name, w, st):
        n = st["gram"].shape[0]
        stats = Stats(1, gram=st["gram"], cross_gram=st["cross"], out_gram=fisher[name]["gram"] if fisher else None)
        start = time.time()
        found = SOLVERS[method](w, stats, scheme, options=options)
        spent[0] += time.time() - start
        for note in found.notes:
            print("   ", name, n, note)
        if held is not None:
            held[name] = (found.q, w)
        return found.q.dequantize()

    return solve


if __name__ == "__main__":
    torch.set_num_threads(1)
    windows, schemes = int(sys.argv[1]), sys.argv[2].split(",")
    ids = S.calibration(windows)
    fisher = L.fisher(ids, windows)
    for scheme in schemes:
        for arg in sys.argv[3:]:
            label, _, text = arg.partition("=")
            options = json.loads(text or "{}")
            method = options.pop("method", "gptq")
            use = options.pop("fisher", True)
            start, spent = time.time(), [0.0]
            learning, held, after = options.pop("learn", None), None, None
            if learning is not None:
                from fewbit.solve.learned import Schedule

                held = {}
                after = learner(held, fisher if learning.pop("metric", True) else None, Schedule(**learning), spent)
            w = L.run(solver(parse_scheme(scheme), method, options, fisher if use else None, spent, held), ids, residual=False, after_block=after)
            mid = time.time() - start
            line = f"{windows:4d} {scheme:18s} {label:34s} KL {S.mean_kl(w):.5f}  run {mid:.0f} s, solver {spent[0]:.0f} s"
            print(line, flush=True)
            with open(L.TMP / "real.txt", "a") as f:
                f.write(line + "\n")
