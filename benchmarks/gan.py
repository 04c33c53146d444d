"""Where the time of a GAN goes: python benchmarks/gan.py [--record]

The modulated convolution, the networks and penalties of StyleGAN2 one by one, and whole iterations of StyleGAN2, SemanticGAN
and CycleGAN as the engine runs them. An iteration is the mean over `--steps` steps in a row, so that lazy penalties are in it as often as
they are due. Everything takes turns, so that a machine that slows down slows all of it; medians over rounds. On a CPU the time is that of
the processor, summed over threads and divided by their number, so that other work on the machine does not count; on a GPU it is the clock's.
FLOPs are counted by PyTorch, and the floor is the time they would take at the fastest float32 product that this machine was seen to reach
(bfloat16 on a GPU), as in benchmarks/step.py.
"""
import argparse
import json
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import step
import torch
from torch.utils.flop_counter import FlopCounterMode

from semiseg_nb.adversarial import r1_penalty
from semiseg_nb.catalogue import across, load_task
from semiseg_nb.clock import Clock
from semiseg_nb.core import atomic_write, seed_everything
from semiseg_nb.cyclegan import CycleGAN
from semiseg_nb.engine import device_name, make_accelerator, one_step, pairs, prepare
from semiseg_nb.records import commit, versions
from semiseg_nb.semanticgan import SemanticGAN
from semiseg_nb.stylegan2 import Discriminator, Generator, ModulatedConv, StyleGAN2, latents, path_penalty

MIDDLE = 480000  # steps are taken from the middle of a run of 10**6, at a step where every lazy penalty is due


def now(device):
    "Seconds: of the processor on a CPU, of the clock on a GPU"
    if device.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() / torch.get_num_threads()


class NoTracker:
    "In place of the counter's record of modules, which stops where a weight is used without gradient"
    parents = frozenset({"Global"})

    def __enter__(self): return self
    def __exit__(self, *exception): return None


def ceiling(device):
    "The ceiling of benchmarks/step.py, by the clock that everything here is measured with"
    clock, step.time = step.time, SimpleNamespace(perf_counter=lambda: now(device))
    try: return step.ceiling(device)
    finally: step.time = clock


def flops_of(function):
    "Floating-point operations of a call, counted by PyTorch"
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = NoTracker()
    with counter: function()
    return counter.get_total_flops()


def backward(net, loss):
    "Gradients of the network's weights and of nothing else"
    net.zero_grad(set_to_none=True)
    loss.backward(inputs=list(net.parameters()))


def convolutions(size, batch, device, d=64):
    "Forward and backward of a modulated convolution: same size and doubled, in the widest and in the largest layer"
    for name, channels, part, up in (("48 channels", 48, 2, False), ("24 channels", 24, 1, False), ("48 to 24 channels, doubled", 48, 2, True)):
        x = torch.randn(batch, channels, size // part, size // part, device=device, requires_grad=True)
        w = torch.randn(batch, d, device=device)
        layer = ModulatedConv(channels, 24 if up else channels, 3, d, up=up).to(device)
        yield f"modulated convolution, scaled: {name}", lambda layer=layer, x=x, w=w: backward(layer, layer(x, w).square().mean())


def pieces(size, batch, device, d=64):
    "The networks of StyleGAN2 and their penalties"
    G, D = Generator(size, d).to(device), Discriminator(size).to(device)
    x, z = torch.randn(batch, 3, size, size, device=device), latents(batch, d, Clock(0, 1), "bench", device)

    def path():
        w = G.mapping(z[:batch // 2])[:, None].repeat(1, G.n_w, 1)
        image = G.synthesis(w)[0]
        backward(G, path_penalty(image, w, torch.zeros((), device=device), torch.randn_like(image))[0])

    def draw():
        with torch.no_grad(): G(z)
    yield "generator, forward", draw
    yield "generator, forward and backward", lambda: backward(G, G(z)[0].square().mean())
    yield "discriminator, forward and backward", lambda: backward(D, D(x).sum())
    yield "R1 on a batch", lambda: backward(D, r1_penalty(D, x, 0.1))
    yield "path length on half a batch", path


def iterations(size, batch, accelerator, steps):
    "Whole iterations on scenes (whose content costs nothing); each call makes `steps` of them"
    task = load_task("scenes", n_labelled=32, size=size)
    target = across(task, load_task("scenes", n_labelled=32, size=size, style="palette").unlabelled, task.val)
    for name, make, used, n_l, n_u in (("StyleGAN2", StyleGAN2, task, 1, batch - 1), ("SemanticGAN", SemanticGAN, task, batch, batch),
                                       ("CycleGAN", CycleGAN, target, 4, 4)):
        seed_everything(0)
        method = make(used)
        prepare(method, used, n_l, n_u, accelerator)
        method.train()
        batches = pairs(method, used, n_l, n_u, 0, 0, 0, accelerator)

        def run(method=method, batches=batches):
            for i in range(steps): one_step(method, *next(batches), Clock(MIDDLE + i, 10**6), accelerator)
        yield f"{name}, one iteration", run


def main(a):
    torch.set_num_threads(a.threads)
    accelerator = make_accelerator()
    device = accelerator.device
    parts = [(name, f, 1) for make in (convolutions, pieces) for name, f in make(a.size, a.batch_size, device)]
    parts += [(name, f, a.steps) for name, f in iterations(a.size, a.batch_size, accelerator, a.steps)]
    flops, times, tops = [], [[] for _ in parts], []
    for _, f, n in parts:
        f()                                                                # warm up
        flops.append(flops_of(f) / n)
    for _ in range(a.rounds):
        for (_, f, n), seen in zip(parts, times):
            start = now(device)
            f()
            seen.append((now(device) - start) / n)
        tops.append(ceiling(device))
    top = max(tops)
    rows = [{"what": name, "ms": round(1000 * statistics.median(seen), 3), "gflop": round(flop / 1e9, 4), "floor_ms": round(1000 * flop / top, 3),
             "share_of_ceiling": round(flop / statistics.median(seen) / top, 4)} for (name, _, _), seen, flop in zip(parts, times, flops)]
    print(f"{device_name(device)}, {a.size} px, batch {a.batch_size} (CycleGAN 4 + 4), {a.rounds} rounds, ceiling {top / 1e9:.0f} GFLOP/s")
    for r in rows: print(f"{r['what']:66}{r['ms']:9.2f} ms{r['gflop']:9.3f} GFLOP   floor {r['floor_ms']:7.2f} ms {r['share_of_ceiling']:7.1%}")
    if not a.record: return
    about = {"what": "time of a GAN's iteration and of its pieces, medians over rounds", "device": device_name(device), "size": a.size,
             "batch_size": a.batch_size, "rounds": a.rounds, "steps": a.steps, "ceiling_gflops": round(top / 1e9, 1), "versions": versions(),
             "commit": commit(), "rows": rows}
    path = Path(__file__).parents[1] / "results/benchmarks" / f"gan-{device.type}-{a.size}.json"
    print(atomic_write(path, lambda f: f.write((json.dumps(about, indent=1) + "\n").encode())).name)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--size", type=int, default=32)
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--steps", type=int, default=16, help="steps per round of an iteration, a multiple of the lazy intervals")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--record", action="store_true", help="write results/benchmarks/gan-<device>-<size>.json")
    main(p.parse_args())
