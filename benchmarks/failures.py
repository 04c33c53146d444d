"""How often `diagnose` finds the mistake of a run, on data that it was not made from: python benchmarks/failures.py [--record]

Trains the reference runs of `diagnose` on eight conditions, for results/benchmarks/failures_reference.json, and asks about the runs of each condition with
that condition left out, for results/benchmarks/failures.json. The constants of `diagnose` were chosen on the first four conditions; `ODD` and the
early agreement came last, when all eight had been seen. The healthy runs beside a run have other seeds. Each finished run leaves its history in a
folder, so that a stopped benchmark goes on where it was. Without --record nothing is written to results.
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
from semiseg_nb.failures import EXHIBITS, MUSEUM, REFERENCE, diagnose, features, leaky, visit
from semiseg_nb.records import commit, versions

ROOT = Path(__file__).resolve().parents[1]
VERDICTS = "results/benchmarks/failures.json"
SCORED, UNLABELLED = 60, 200  # images at most: the curves need no more
CONDITIONS = {  # name -> data, and what else differs
    "scenes, 12 labels": dict(n_labelled=12, size=32, seed=0),
    "scenes, 24 labels": dict(n_labelled=24, size=32, seed=1),
    "fasseg, 8 labels": dict(folder="fasseg", n_labelled=8, size=32, seed=0),
    "ccp, 16 labels": dict(folder="ccp", n_labelled=16, size=32, seed=2),
    "scenes, 6 labels": dict(n_labelled=6, size=32, seed=11),
    "portraits, 16 labels": dict(dataset="portraits", n_labelled=16, size=32, seed=8),
    "nuclei, 8 labels": dict(folder="nuclei", n_labelled=8, size=64, crop=32, seed=9),
    "camvid, 24 labels": dict(folder="camvid", n_labelled=24, size=(24, 32), seed=10),
}
CHOSEN_ON = list(CONDITIONS)[:4]  # the constants of `diagnose` were
VARIANTS = [*((name, {}, 0) for name in EXHIBITS),  # exhibit, change of settings, added to the seed
            *(("healthy", {}, more) for more in (100, 200, 300, 400)),
            *(("healthy", dict(weight=0.0), more) for more in (0, 100, 200)),
            *((name, {}, 50) for name in EXHIBITS if name != "healthy")]
KINDS = {  # healthy runs that are handed over at most, and whether the museum's own statistics are
    "beside healthy runs": (4, True), "beside one healthy run": (1, True), "plain log beside healthy runs": (4, False), "alone": (0, True),
}
OWN = {"kept - confidence", "agreement", "agreement, early", "error / error on labels", "company", "blank"}  # features of these statistics
DRAWN = ("step", "supervised", "consistency", "kept", "confidence", "agreement", "miou", "pixel_accuracy", "ece", "labelled accuracy", "company", "blank")


def few(dataset, n):
    "The first images of a set, decoded once"
    batch = dataset.__getitems__(list(range(min(n, len(dataset)))))
    ids = dataset.ids[:len(batch["image"])]
    if isinstance(dataset, Labelled): return Labelled(ids, batch["image"], batch["mask"], dataset.n_classes, dataset.crop)
    return Images(ids, batch["image"], crop=dataset.crop)


@lru_cache(maxsize=1)
def tasks(condition, data):
    "The task of a condition, and the one whose masks leak"
    given = dict(CONDITIONS[condition])
    seed, folder = given.pop("seed"), given.pop("folder", None)
    where = dict(dataset="folder", data_root=data / folder) if folder else dict(dataset=given.pop("dataset", "scenes"))
    task = load_task(**where, **given, split_seed=seed % 3)  # folders name three orders of their labels
    task.unlabelled, task.val = few(task.unlabelled, UNLABELLED), few(task.val, SCORED)
    masks = load_split(**where, split="train", size=given["size"], ids=task.unlabelled.ids)
    return task, leaky(task, masks), seed


def rounded(values):
    "Numbers with three digits after the point, nan as null"
    return {k: round(v, 3) if math.isfinite(v) else None for k, v in values.items()}


def trained(steps, out, data, finished=False):
    "A row for each run, those in the folder read, the others trained now"
    rows, accelerator = [], make_accelerator("cpu")
    for condition in CONDITIONS:
        for exhibit, change, more in VARIANTS:
            path = out / f"{condition}, {exhibit}{' on the baseline' if change else ''}{f', seed +{more}' if more else ''}.json"
            if not path.exists():
                if finished: continue
                task, leak, seed = tasks(condition, data)
                start = time.perf_counter()
                run = visit(exhibit, leak if exhibit == "mask leak" else task, steps, seed + more, settings=MUSEUM | change, accelerator=accelerator)
                atomic_write(path, lambda f, history=run.history: f.write(json.dumps(history).encode()))
                print(f"{path.stem}: mIoU {run.history[-1]['miou']:.3f}, {time.perf_counter() - start:.0f} s", flush=True)
            history = json.loads(path.read_text())
            rows.append({"exhibit": exhibit, "condition": condition, "baseline": bool(change), "repeat": more,
                         "features": rounded(features(history)), "history": history})
    return rows


def words():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--steps", type=int, default=120)
    p.add_argument("--data", type=Path, default=Path("data"), help="folder of the real data sets")
    p.add_argument("--out", type=Path, default=Path("_runs/failures"), help="folder of the histories")
    p.add_argument("--finished", action="store_true", help="only the runs whose histories lie in the folder")
    p.add_argument("--record", action="store_true", help="write the record into results/benchmarks")
    return p


def curves_of(rows):
    "The curves of the first condition, for pictures"
    first = [r for r in rows if r["condition"] == rows[0]["condition"] and not r["baseline"] and not r["repeat"]]
    return {r["exhibit"]: [rounded({k: v for k, v in row.items() if k in DRAWN}) for row in r["history"]] for r in first}


def verdicts(rows):
    "What `diagnose` says of every run, made from the runs of the other conditions alone"
    made = []
    for r in rows:
        others = [o["features"] for o in rows if (o["condition"], o["exhibit"], o["baseline"]) == (r["condition"], "healthy", r["baseline"])
                  and o["repeat"] != r["repeat"]]
        known = [o for o in rows if o["condition"] != r["condition"]]
        row = {k: r[k] for k in ("exhibit", "condition", "baseline", "repeat")}
        for kind, (n, whole) in KINDS.items():
            found = diagnose({k: v if whole or k not in OWN else None for k, v in r["features"].items()}, others[:n], reference=known)
            row[kind] = {"verdict": found.verdict, "answer": found.answer, "confidence": round(found.confidence, 3)}
        made.append(row)
    return made


def report(rows):
    "The right verdicts of each kind of question, and the mistaken ones by name"
    for kind in KINDS:
        pairs = [(r["exhibit"], r[kind]["verdict"]) for r in rows]
        wrong, healthy = [p for p in pairs if p[0] != "healthy"], [v for e, v in pairs if e == "healthy"]
        accused = sum(v not in ("healthy", "cannot tell") for v in healthy)
        print(f"{kind}: of {len(wrong)} wrong runs {sum(a == b for a, b in wrong)} named rightly, "
              f"{sum(v not in (e, 'healthy', 'cannot tell') for e, v in wrong)} wrongly, {sum(v == 'cannot tell' for _, v in wrong)} 'cannot tell', "
              f"{sum(v == 'healthy' for _, v in wrong)} pass as healthy; of {len(healthy)} healthy runs {accused} accused, "
              f"{healthy.count('cannot tell')} 'cannot tell'")
        for (truth, answer), n in Counter(p for p in pairs if p[0] != p[1]).most_common(): print(f"    {n} x {truth} -> {answer}")


def main(a):
    torch.set_num_threads(1)
    rows = trained(a.steps, a.out, a.data, a.finished)
    made = verdicts(rows)
    report(made)
    print(f"\nOn {', '.join(c for c in CONDITIONS if c not in CHOSEN_ON)}, which few of the constants were chosen on:")
    report([r for r in made if r["condition"] not in CHOSEN_ON])
    if not a.record: return
    head = {"commit": commit(), "device": device_name(torch.device("cpu")), "versions": versions(), "steps": a.steps, "settings": MUSEUM,
            "conditions": CONDITIONS, "chosen on": CHOSEN_ON}
    reference = [{k: v for k, v in r.items() if k != "history"} for r in rows]
    for path, content in ((REFERENCE, {"what": "reference runs of `diagnose`", **head, "runs": reference, "curves": curves_of(rows)}),
                          (VERDICTS, {"what": "what `diagnose` says of each run, made from runs on other data alone", **head, "runs": made})):
        lines = json.dumps(content).replace('{"exhibit"', '\n {"exhibit"').replace('"curves"', '\n"curves"').replace('[{"step"', '\n [{"step"')
        atomic_write(ROOT / path, lambda f, lines=lines: f.write(lines.encode() + b"\n"))


if __name__ == "__main__": main(words().parse_args())
