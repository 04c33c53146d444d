"One step of a method on a small task of scenes: what the tests of pseudo-labels and of UniMatch share"
import json
import re
from pathlib import Path

import torch

from semiseg_nb.clock import Clock
from semiseg_nb.core import seed_everything
from semiseg_nb.engine import fit
from semiseg_nb.networks import UNet

ROOT = Path(__file__).resolve().parents[1]
EVERYTHING = {"threshold": 0.2, "warmup": 0.0}      # an untrained network is sure of nothing above 0.9


def net(task, seed=0):
    seed_everything(seed)
    return UNet(task.n_classes, width=4)


def batch(task, n=4):
    lab, unl = task.labelled.__getitems__(list(range(n))), task.unlabelled.__getitems__(list(range(n)))
    return {"image": lab["image"].float() / 255, "mask": lab["mask"].long()}, {"image": unl["image"].float() / 255}


def updates(method, task, step=50): return {name: losses for name, losses, *_ in method.updates(*batch(task), Clock(step, 100))}
def first_update(method, task, clock=None): return next(method.updates(*batch(task), clock or Clock(50, 100)))
def losses_of(method, task, step=50): return updates(method, task, step)["net"]
def statistics_of(method, task): return first_update(method, task)[2]
def train(method, task, steps=4, **more):
    return fit(method, task, steps, batch_size=4, seed=3, progress=False, eval_on=False, **more)


def same(a, b):
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def solved(lesson, namespace):
    "What a lesson's check of its exercises prints, with the solutions that are folded under it in place of the empty cells"
    cells = {c["id"]: "".join(c["source"]) for c in json.loads((ROOT / f"nbs/{lesson}.ipynb").read_text(encoding="utf-8"))["cells"]}
    printed = []
    namespace |= {"torch": torch, "print": lambda *words: printed.append(" ".join(map(str, words)))}
    for name in ("exercise-1", "exercise-2", "exercise-check"): exec(cells[name], namespace)
    empty, printed[:] = list(printed), []
    for solution in re.findall(r"```python\n(.*?)```", cells["answers"], re.S): exec(solution, namespace)
    exec(cells["exercise-check"], namespace)
    return empty, printed
