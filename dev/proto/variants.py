from __future__ import annotations

import sys, time, json
import numpy as np, torch
import loop as L, sample as S, kern as K

RATIOS = np.array([1.0, .95, .9, .85, .8, .75, .7, .65, .6, .55, .5], np.float32)
GROUP = 128


def target(w, st, damp, drift):
    if not drift:
        return w
    h = st["gram"].double()
    lam = damp * h.diagonal().mean()
    wanted = (st["wanted"] if drift == "res" else w @ st["cross"]).double()
    hd = h + lam * torch.eye(len(h), dtype=h.dtype)
    return torch.linalg.solve(hd, (wanted + lam * w.double()).T).T.float().contiguous()


def solver(bits=4, damp=.01, drift=None, mode=0, order=False, two=None, sweeps=0, ddamp=None, gdamp=.05, log=None):
    top = np.float32(2**bits - 1)
    def solve(name, w, st):
        r, c = w.shape
        t = target(w, st, ddamp or damp, drift)
        h = st["gram"]
        ng = -(-c // GROUP)
        scale, zero = np.zeros((r, ng), np.float32), np.zeros((r, ng), np.float32)
        if two is not None:
            g = two[name]["gram"].float(); g = g / g.diagonal().mean()
            u = K.inverse_factor(h, damp); v = K.inverse_factor(g, gdamp)
            out = np.zeros((r, c), np.float32)
            K.ldlq_two(t.numpy(), u.numpy(), v.numpy(), GROUP, top, RATIOS, mode, scale, zero, out)
            if sweeps:
                gg = g + gdamp * torch.eye(r)
                hh = h + damp * torch.eye(c) * h.diagonal().mean()
                K.sweep_two(out, out - t.numpy(), hh.numpy(), gg.numpy(), GROUP, top, scale, zero, sweeps)
            return torch.from_numpy(out)
        perm = torch.arange(c)
        gid = np.arange(c) // GROUP
        fixed = False
        if order:
            d1 = K.inverse_factor(h, damp)
            o0 = np.zeros((r, c), np.float32)
            ug = torch.eye(c) / h.diagonal().clamp(min=1e-9).sqrt()  # diag weights only: static groups
            K.ldlq_rows(t.numpy(), ug.numpy(), gid, GROUP, top, RATIOS, min(mode, 1), False, scale, zero, o0)
            perm = torch.argsort(h.diagonal(), descending=True)
            fixed = True
        hp = h[perm][:, perm]
        u = K.inverse_factor(hp, damp)
        out = np.zeros((r, c), np.float32)
        K.ldlq_rows(t[:, perm].contiguous().numpy(), u.numpy(), gid[perm.numpy()], GROUP, top, RATIOS, mode, fixed, scale, zero, out)
        q = torch.empty(r, c); q[:, perm] = torch.from_numpy(out)
        if sweeps:
            hh = h + damp * torch.eye(c) * h.diagonal().mean()
            qn = q.numpy()
            K.sweep_one(qn, qn - t.numpy(), hh.numpy(), gid, top, scale, zero, sweeps)
        return q
    return solve


def measure(label, **kw):
    tw = kw.pop("token_weight", None)
    start = time.time()
    w = L.run(solver(**kw), IDS, token_weight=tw)
    mid = time.time()
    kl = S.mean_kl(w)
    line = f"{label:40s} KL {kl:.5f}  {mid - start:.1f} s"
    print(line, flush=True)
    with open(L.TMP / "results.txt", "a") as f: f.write(line + "\n")
    return w


if __name__ == "__main__":
    torch.set_num_threads(2)
    IDS = S.calibration()
    fi = L.fisher(IDS)
    for bits in [int(b) for b in sys.argv[1].split(",")]:
        b = dict(bits=bits)
        measure(f"{bits} gptq minmax", **b)
        measure(f"{bits} minmax order", order=True, **b)
        measure(f"{bits} search", mode=1, **b)
        measure(f"{bits} trial", mode=2, **b)
        measure(f"{bits} trial order", mode=2, order=True, **b)
        measure(f"{bits} trial drift", mode=2, drift="cross", **b)
        measure(f"{bits} trial res", mode=2, drift="res", **b)
        measure(f"{bits} trial res sweeps4", mode=2, drift="res", sweeps=4, **b)
        measure(f"{bits} two trial res", mode=2, drift="res", two=fi, **b)
        measure(f"{bits} two trial res sweeps4", mode=2, drift="res", two=fi, sweeps=4, **b)
