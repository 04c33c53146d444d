"""How often `diagnose` finds the mistake of a run, on runs that it was not made from: python benchmarks/failures.py [reference | test] [--record]

`reference` trains the runs from which `diagnose` is made and writes results/benchmarks/failures_reference.json; `test` trains runs on other data,
seeds and numbers of labels, and writes results/benchmarks/failures.json. Each finished run leaves its history in a folder, so that a stopped
benchmark goes on where it was; without --record nothing is written to results.
"""
import argparse
import json
import math
import time
from collections import Counter
from functools import lru_cache
from pathlib import Path

import torch

from semiseg_nb.catalogue import load_split, load_task
from semiseg_nb.core import atomic_write
from semiseg_nb.data import Images, Labelled
from semiseg_nb.engine import device_name, make_accelerator
from semiseg_nb.failures import EXHIBITS, MUSEUM, PLAIN, REFERENCE, diagnose, features, leaky, plain_curves, visit
from semiseg_nb.records import commit, versions

ROOT = Path(__file__).resolve().parents[1]
SCORED, UNLABELLED = 60, 200  # images at most: the curves need no more
CONDITIONS = {  # part -> name -> data, and what else differs
    "reference": {
        "scenes, 12 labels": dict(n_labelled=12, size=32, seed=0),
        "scenes, 24 labels": dict(n_labelled=24, size=32, seed=1),
        "fasseg, 8 labels": dict(folder="fasseg", n_labelled=8, size=32, seed=0),
    },
    "test": {
        "scenes, 6 labels": dict(n_labelled=6, size=32, seed=11),
        "portraits, 16 labels": dict(dataset="portraits", n_labelled=16, size=32, seed=8),
        "nuclei, 8 labels": dict(folder="nuclei", n_labelled=8, size=64, crop=32, seed=9),
        "camvid, 24 labels": dict(folder="camvid", n_labelled=24, size=(24, 32), seed=10),
    },
}
VARIANTS = [*((name, {}) for name in EXHIBITS), ("healthy", dict(weight=0.0))]


def few(dataset, n):
    "The first images of a set, decoded once"
    batch = dataset.__getitems__(list(range(min(n, len(dataset)))))
    ids = dataset.ids[:len(batch["image"])]
    if isinstance(dataset, Labelled): return Labelled(ids, batch["image"], batch["mask"], dataset.n_classes, dataset.crop)
    return Images(ids, batch["image"], crop=dataset.crop)


@lru_cache(maxsize=1)
def tasks(part, condition, data):
    "The task of a condition, and the one whose masks leak"
    given = dict(CONDITIONS[part][condition])
    seed, folder = given.pop("seed"), given.pop("folder", None)
    where = dict(dataset="folder", data_root=data / folder) if folder else dict(dataset=given.pop("dataset", "scenes"))
    task = load_task(**where, **given, split_seed=seed % 3)  # folders name three orders of their labels
    task.unlabelled, task.val = few(task.unlabelled, UNLABELLED), few(task.val, SCORED)
    masks = load_split(**where, split="train", size=given["size"], ids=task.unlabelled.ids)
    return task, leaky(task, masks), seed


def trained(part, steps, out, data, finished=False):
    "Histories of all runs of a part: those in the folder, and the others trained now"
    runs, accelerator = [], make_accelerator("cpu")
    for condition in CONDITIONS[part]:
        for exhibit, change in VARIANTS:
            name = exhibit + (" on the baseline" if change else "")
            path = out / part / f"{condition}, {name}.json"
            if finished and not path.exists(): continue
            if not path.exists():
                task, leak, seed = tasks(part, condition, data)
                start = time.perf_counter()
                run = visit(exhibit, leak if exhibit == "mask leak" else task, steps, seed, settings=MUSEUM | change, accelerator=accelerator)
                atomic_write(path, lambda f, rows=run.history: f.write(json.dumps(rows).encode()))
                print(f"{condition}, {name}: mIoU {run.history[-1]['miou']:.3f}, {time.perf_counter() - start:.0f} s", flush=True)
            runs.append({"condition": condition, "exhibit": exhibit, "baseline": bool(change), "history": json.loads(path.read_text())})
    return runs


def words():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("part", choices=list(CONDITIONS))
    p.add_argument("--steps", type=int, default=120)
    p.add_argument("--data", type=Path, default=Path("data"), help="folder of the real data sets")
    p.add_argument("--out", type=Path, default=Path("_runs/failures"), help="folder of the histories")
    p.add_argument("--finished", action="store_true", help="only the runs whose histories lie in the folder")
    p.add_argument("--record", action="store_true", help="write the record into results/benchmarks")
    return p


def rounded(values):
    "Numbers with four digits after the point, nan as null"
    return {k: round(v, 4) if math.isfinite(v) else None for k, v in values.items()}


def reference_record(runs):
    "Features of all runs, and the curves of the first condition, for pictures"
    rows = [{k: r[k] for k in ("exhibit", "condition", "baseline")} | {"features": rounded(features(r["history"]))} for r in runs]
    first = [r for r in runs if r["condition"] == runs[0]["condition"] and not r["baseline"]]
    own = (*PLAIN, "confidence", "agreement", "labelled accuracy", "company", "blank")
    drawn = {r["exhibit"]: [rounded({k: v for k, v in row.items() if k in own and k != "iou_per_class"}) for row in r["history"]] for r in first}
    return {"runs": rows, "curves": drawn}


def test_record(runs):
    "What `diagnose` says of every run, from all curves and from those of the plain log"
    rows = []
    healthy = {r["condition"]: r["history"] for r in runs if r["exhibit"] == "healthy" and not r["baseline"]}
    for r in runs:
        row = {k: r[k] for k in ("exhibit", "condition", "baseline")}
        kinds = {"all curves": (r["history"], None), "plain log": (plain_curves(r["history"]), None)}
        if r["exhibit"] != "healthy" and r["condition"] in healthy: kinds["beside a healthy run"] = (r["history"], healthy[r["condition"]])
        for name, (history, beside) in kinds.items():
            answers = diagnose(history, beside=beside).answers
            row[name] = {"answers": {k: round(v, 3) for k, v in list(answers.items())[:3]}, "of the truth": round(answers.get(r["exhibit"], 0.0), 3)}
        rows.append(row)
    return {"runs": rows}


def report(rows):
    "The right answers of each kind of log, and the mistaken ones by name"
    for kind in ("all curves", "plain log", "beside a healthy run"):
        given = [r for r in rows if kind in r]
        first = [(r["exhibit"], next(iter(r[kind]["answers"]))) for r in given]
        print(f"{kind}: {sum(a == b for a, b in first)} of {len(first)} right, "
              f"{sum(r['exhibit'] in list(r[kind]['answers'])[:2] for r in given)} among the first two")
        for (truth, answer), n in Counter(pair for pair in first if pair[0] != pair[1]).most_common(): print(f"    {n} x {truth} -> {answer}")


def main(a):
    torch.set_num_threads(1)
    runs = trained(a.part, a.steps, a.out, a.data, a.finished)
    content = reference_record(runs) if a.part == "reference" else test_record(runs)
    if a.part == "test": report(content["runs"])
    if not a.record: return
    what = "reference runs of `diagnose`" if a.part == "reference" else "what `diagnose` says of runs that it was not made from"
    head = {"what": what, "commit": commit(), "device": device_name(torch.device("cpu")), "versions": versions(), "steps": a.steps,
            "settings": MUSEUM, "conditions": CONDITIONS[a.part]}
    path = ROOT / REFERENCE if a.part == "reference" else ROOT / "results/benchmarks/failures.json"
    lines = json.dumps(head | content).replace('{"exhibit"', '\n {"exhibit"').replace('"curves"', '\n"curves"').replace('[{"step"', '\n [{"step"')
    atomic_write(path, lambda f: f.write(lines.encode() + b"\n"))


if __name__ == "__main__": main(words().parse_args())
