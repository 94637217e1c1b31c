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


def solver(scheme, method, options, fisher, spent):
    def solve(name, w, st):
        n = st["gram"].shape[0]
        stats = Stats(1, gram=st["gram"], cross_gram=st["cross"], out_gram=fisher[name]["gram"] if fisher else None)
        start = time.time()
        found = SOLVERS[method](w, stats, scheme, options=options)
        spent[0] += time.time() - start
        for note in found.notes:
            print("   ", name, n, note)
        return found.q.dequantize()

    return solve


if __name__ == "__main__":
    torch.set_num_threads(2)
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
            w = L.run(solver(parse_scheme(scheme), method, options, fisher if use else None, spent), ids, residual=False)
            mid = time.time() - start
            line = f"{windows:4d} {scheme:18s} {label:34s} KL {S.mean_kl(w):.5f}  run {mid:.0f} s, solver {spent[0]:.0f} s"
            print(line, flush=True)
            with open(L.TMP / "real.txt", "a") as f:
                f.write(line + "\n")
