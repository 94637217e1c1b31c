"""Learned rounding of one block of the sample under several schedules."""
import sys, time, torch
import loop as L, sample as S, real
from fewbit.num.scheme import parse_scheme
from fewbit.solve import learned
from fewbit.solve.learned import Schedule

torch.set_num_threads(2)
ids = S.calibration(48)[:24]
fisher = L.fisher(None, 48)
held = {}
layer = 0
S.LAYERS = 1
captured = {}
def after(l, block, start, wanted):
    captured.update(block=block, start=start, wanted=wanted)
    return {}
L.run(real.solver(parse_scheme(sys.argv[1]), "gptq", {}, fisher, [0.0], held), ids, residual=False, after_block=after)
block, ins, outs = captured["block"], captured["start"].split(4), captured["wanted"].split(4)
names = [n for n in block.w if "proj" in n]
def forward(weights, k):
    original = dict(block.w); block.w.update(weights); out = block(ins[k]); block.w.update(original); return out
metric = fisher["0.mlp.down_proj"]["gram"]
for arg in sys.argv[2:]:
    kw = eval("dict(" + arg + ")")
    center = kw.pop("center", False)
    t = time.time()
    latent = {n: held[f"0.{n}"][0].dequantize() if center else held[f"0.{n}"][1] for n in names}
    f = learned.learn(forward, lambda k: outs[k], len(ins), {n: held[f"0.{n}"][0] for n in names}, latent, metric=metric, schedule=Schedule(**kw), verbose=True)
    print(arg, f[names[0]].notes, f"{time.time()-t:.0f} s", flush=True)
