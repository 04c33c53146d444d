"""Where the time of a training step goes, method by method, in one process: python benchmarks/step.py [--record]

A step is timed as the engine runs it. Its parts are timed inside the same steps: waiting for data, drawing and applying views, forward passes
with losses, backward, optimiser, weight average, and the engine's own bookkeeping. Methods take turns, so that a machine that slows down slows all of them.
FLOPs are counted by PyTorch and set against the fastest float32 matrix product of this machine, measured between the rounds. Their ratio to those of
the supervised step ("passes") is what the forward and backward passes of a method must cost; "beyond" is how much more the step costs than that.
GANs are timed by benchmarks/gan.py, against the same ceiling.
Peak memory is what the tensors of one step take at most, beyond weights and optimiser, as PyTorch's allocator reports it.
"""
import argparse
import inspect
import json
import statistics
import time
from collections import defaultdict
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from semiseg_nb import engine
from semiseg_nb.augment import Policy
from semiseg_nb.catalogue import load_task
from semiseg_nb.cct import CCT
from semiseg_nb.clock import Clock
from semiseg_nb.core import EMA, atomic_write, one_of, seed_everything
from semiseg_nb.engine import device_name, fit, make_accelerator, one_step, pairs, prepare
from semiseg_nb.experiment import methods
from semiseg_nb.models import build_model
from semiseg_nb.records import commit, versions

K = {4: "f_noise,f_drop,dropout,con_msk", 10: "f_noise:2,f_drop:2,dropout:2,con_msk:1,obj_msk:1,g_cutout:1,i_vat:1",
     30: "f_noise:6,f_drop:6,dropout:6,con_msk:2,obj_msk:2,g_cutout:6,i_vat:2"}  # 30 as in the authors' configuration
METHODS = {name: what for name, what in methods().items() if inspect.isclass(what) and name != "cct"} | {
    f"cct K={k}{', one by one' if saver else ''}": partial(CCT, kinds=kinds, saver=saver) for k, kinds in K.items() for saver in (False, True)}
MIDDLE = 5 * 10**5  # steps are taken from the middle of a run of 10**6, when nothing warms up any more
PARTS = ("data", "views", "forward", "backward", "optimiser", "average", "rest")


class Stopwatch:
    "Adds up the time spent in wrapped functions; an outer function is not charged for an inner one"

    def __init__(self, device):
        self.device, self.spent, self.stack = device, defaultdict(float), []

    def now(self):
        if self.device.type == "cuda": torch.cuda.synchronize()
        return time.perf_counter()

    def call(self, part, function, *args, **kwargs):
        start, self.stack = self.now(), [*self.stack, 0.0]
        try: return function(*args, **kwargs)
        finally:
            took, *self.stack = self.now() - start, *self.stack
            inner = self.stack.pop()
            self.spent[part] += took - inner
            if self.stack: self.stack[-1] += took

    @contextmanager
    def watching(self, *places):
        "Wrap (owner, name, part) for the time of the block"
        saved = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
        for (owner, name, part), (_, _, function) in zip(places, saved):
            setattr(owner, name, lambda *a, _p=part, _f=function, **k: self.call(_p, _f, *a, **k))
        try: yield
        finally:
            for owner, name, function in saved: setattr(owner, name, function)


def measure(method, batches, accelerator, steps, first):
    "Seconds per step, in all and by part"
    watch = Stopwatch(accelerator.device)
    places = [(Policy, n, "views") for n in ("sample", "apply_image", "apply_label", "valid", "apply_pred")]
    places += [(Clock, "draw", "views"), (torch.Tensor, "backward", "backward"), (EMA, "update", "average"), (engine, "optimise", "optimiser")]

    def forward(lab, unl, clock):
        "The method's generator, timed while it computes"
        updates = type(method).updates(method, lab, unl, clock)
        while (update := watch.call("forward", next, updates, None)) is not None: yield update

    def run():
        for i in range(steps):
            lab, unl = watch.call("data", next, batches)
            one_step(method, lab, unl, Clock(first + i, 10**6), accelerator)
    method.updates = forward
    with watch.watching(*places): watch.call("rest", run)
    del method.updates
    return {part: watch.spent[part] / steps for part in PARTS}


def ceiling(device, rounds=5):
    "The best FLOP/s this device shows for big products in float32 (bfloat16 on a GPU): as a matrix product, and as a 3x3 convolution of 64 channels"
    kind = {"device": device, "dtype": torch.bfloat16 if device.type == "cuda" else torch.float32}
    a, b = torch.randn(2048, 2048, **kind), torch.randn(2048, 2048, **kind)
    x = torch.randn(8, 64, 64, 64, **kind).contiguous(memory_format=torch.channels_last)
    w = torch.randn(64, 64, 3, 3, **kind).contiguous(memory_format=torch.channels_last)
    products = ((2 * 2048**3, lambda: a @ b), (2 * 8 * 64 * 64 * 64 * 64 * 9, lambda: torch.nn.functional.conv2d(x, w, padding=1)))
    best = 0.0
    for flops, product in products * rounds:
        start = time.perf_counter()
        product()
        if device.type == "cuda": torch.cuda.synchronize()
        best = max(best, flops / (time.perf_counter() - start))
    return best


def flops_of(method, batches, accelerator):
    "Floating-point operations of one step, forward and backward, counted by PyTorch"
    lab, unl = next(batches)
    with FlopCounterMode(display=False) as counter: one_step(method, lab, unl, Clock(MIDDLE, 10**6), accelerator)
    return counter.get_total_flops()


def peak_memory(method, batches, accelerator):
    "Largest sum of what one step has allocated and not yet freed, in MB"
    lab, unl = next(batches)
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[getattr(activity, accelerator.device.type.upper())], profile_memory=True) as profiler:
        one_step(method, lab, unl, Clock(MIDDLE, 10**6), accelerator)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = top = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        top = max(top, now)
    return top / 2**20


def engine_overhead(method, task, accelerator, steps):
    "Seconds per step of `fit` itself, logging included"
    return fit(method, task, steps, eval_on=False, progress=False, accelerator=accelerator).seconds / steps


def main(a):
    accelerator = make_accelerator()
    device = accelerator.device
    torch.set_num_threads(a.threads)
    task = load_task("scenes", n_labelled=12, size=a.size)
    runs = {}
    for model, width in a.models:
        for name in a.methods:
            one_of(name, METHODS, "method")
            seed_everything(0)
            method = METHODS[name](build_model(model, task.n_classes, width=width, mean=task.mean), task, views="strong")
            prepare(method, task, a.batch_size, a.batch_size, accelerator)
            batches = pairs(method, task, a.batch_size, a.batch_size, 0, 0, 0, accelerator)
            method.train()
            measure(method, batches, accelerator, 3, MIDDLE)                      # warm up
            counts = flops_of(method, batches, accelerator), peak_memory(method, batches, accelerator)
            runs[model, width, name] = (method, batches, counts, [], [])
    tops = []
    for _ in range(a.rounds):
        for method, batches, _, parts, whole in runs.values():
            parts.append(measure(method, batches, accelerator, a.steps, MIDDLE))
            whole.append(engine_overhead(method, task, accelerator, a.steps))
        tops.append(ceiling(device))
    top = max(tops)
    rows = [row(key, run, runs[key[0], key[1], "supervised"], top) for key, run in runs.items()]
    print(f"{device_name(device)}, batch {a.batch_size} + {a.batch_size}, {a.size} px, {a.rounds} rounds of {a.steps} steps,",
          f"ceiling {top / 1e9:.0f} GFLOP/s; milliseconds")
    head = ("model", "method", *PARTS, "step", "fit", "outside", "x superv.", "passes", "beyond", "MB", "of ceiling")
    lines = [[r["model"], r["method"], *(f"{r['ms'][p]:.2f}" for p in PARTS), f"{r['step_ms']:.1f}", f"{r['fit_ms']:.1f}",
              f"{r['outside_forward_backward']:.1%}", f"{r['over_supervised']:.2f}", f"{r['passes']:.2f}", f"{r['beyond_passes']:+.0%}",
              f"{r['peak_mb']:.0f}", f"{r['share_of_ceiling']:.1%}"] for r in rows]
    widths = [max(map(len, column)) + 2 for column in zip(head, *lines)]
    for line in (head, *lines): print("".join(cell.rjust(w) for cell, w in zip(line, widths)))
    if not a.record: return
    about = {"what": "time of a training step, medians over rounds", "device": device_name(device), "size": a.size, "batch_size": a.batch_size,
             "rounds": a.rounds, "steps": a.steps, "ceiling_gflops": round(top / 1e9, 1), "versions": versions(), "commit": commit(), "rows": rows}
    path = Path(__file__).parents[1] / "results/benchmarks" / f"step-{device.type}-{a.size}.json"
    print(atomic_write(path, lambda f: f.write((json.dumps(about, indent=1) + "\n").encode())).name)


def row(key, run, supervised, top):
    "Medians over the rounds for one model and method"
    (model, width, name), (_, _, (flops, peak), parts, whole) = key, run
    _, _, (baseline_flops, baseline_peak), baseline, _ = supervised
    ms = {p: 1000 * statistics.median(r[p] for r in parts) for p in PARTS}
    totals = [sum(r.values()) for r in parts]
    return {
        "model": f"{model} {width}", "method": name, "ms": {k: round(v, 3) for k, v in ms.items()},
        "step_ms": round(1000 * statistics.median(totals), 2), "fit_ms": round(1000 * statistics.median(whole), 2),
        "outside_forward_backward": round(statistics.median(1 - (r["forward"] + r["backward"]) / t for r, t in zip(parts, totals)), 4),
        "data_share": round(statistics.median(r["data"] / t for r, t in zip(parts, totals)), 4),
        "over_supervised": round(over := statistics.median(t / sum(b.values()) for t, b in zip(totals, baseline)), 3),
        "passes": round(flops / baseline_flops, 3), "beyond_passes": round(over * baseline_flops / flops - 1, 4),
        "peak_mb": round(peak, 2), "peak_over_supervised": round(peak / baseline_peak, 3),
        "gflop": round(flops / 1e9, 3), "share_of_ceiling": round(statistics.median(flops / t for t in totals) / top, 4),
    }


def models(text):
    "unet:8,deeplabv3:16 to names and widths"
    return [(name, int(width)) for name, _, width in (m.partition(":") for m in text.split(","))]


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", type=int, default=64)
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--models", type=models, default=models("unet:8,unet:16,deeplabv3:16"), help="name:width,...")
    p.add_argument("--methods", type=lambda text: text.split(";"), default=list(METHODS), help="name;name;..., supervised among them")
    p.add_argument("--record", action="store_true", help="write results/benchmarks/step-<device>-<size>.json")
    main(p.parse_args())
