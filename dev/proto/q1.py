import variants as V, loop as L, sample as S, sys, torch
torch.set_num_threads(2)
V.IDS = S.calibration(); fi = L.fisher(V.IDS)
tok = {k: e["token"] / e["token"].mean() for k, e in fi.items()}
import itertools
m = V.measure
for bits in (2, 3, 4):
    b = dict(bits=bits, mode=2, drift="res")
    m(f"{bits} two trial res sweeps4", two=fi, sweeps=4, **b)
    if bits == 2:
        m("2 gptq minmax", bits=2); m("2 trial res", **b); m("2 trial res sweeps4", sweeps=4, **b)
    m(f"{bits} two trial res sweeps4 gdamp .01", two=fi, sweeps=4, gdamp=.01, **b)
    m(f"{bits} two trial res sweeps4 gdamp .2", two=fi, sweeps=4, gdamp=.2, **b)
    m(f"{bits} two trial cross sweeps4", two=fi, sweeps=4, bits=bits, mode=2, drift="cross")
