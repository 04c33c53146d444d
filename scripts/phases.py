"""The ten arms of the phases: python scripts/phases.py --n-labelled 32 --seeds 0 1 2

Arms of one split and seed share the files of their phases in --work, and a run that was cut off goes on from there.
The network with all labels is trained once per seed; it also judges what the second generator paints.
"""
import argparse
import json
from dataclasses import replace
from pathlib import Path

from semiseg_nb.catalogue import load_task
from semiseg_nb.core import UserError, frozen, named_values, one_of
from semiseg_nb.engine import evaluate, make_accelerator
from semiseg_nb.phases import ARMS, Plan, painter_scores, run_arm, settings_of_plan, whole_run
from semiseg_nb.records import make_record, write_record


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--arms", nargs="+", default=list(ARMS), metavar="ARM", help=f"of {', '.join(map(repr, ARMS))}")
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--n-labelled", nargs="+", type=int, default=[32])
    p.add_argument("--dataset", default="scenes")
    p.add_argument("--data-root")
    p.add_argument("--split-seed", type=int, help="which images are labelled; without it the seed decides, so that each seed has its own")
    p.add_argument("--size", type=json.loads, default=32, help="32, or [96,128] for height and width")
    p.add_argument("--model", default="unet")
    p.add_argument("--width", type=int, default=12)
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--steps", nargs=4, type=int, default=[800, 560, 800, 800], help="of phases 0 to 3")
    p.add_argument("--n-painted", type=int, default=1000, help="pairs that the second generator leaves for phase 3")
    p.add_argument("--lr", type=float, default=2e-3)
    p.add_argument("--lr-part", type=float, default=1.0, help="part of it with which phase 3 goes on")
    p.add_argument("--views", default="strong", choices=("weak", "strong"))
    p.add_argument("--score-on", default="val", choices=("val", "tune"), help="choose settings on tune, report on val")
    for name, cls in (("cyclegan", "CycleGAN"), ("first", "Phase1"), ("render", "Phase2"), ("again", "Phase3")):
        p.add_argument(f"--{name}", action="append", default=[], metavar="NAME=VALUE", help=f"settings of {cls}")
    p.add_argument("--variant", default="", help="put before the name of the arm in the record, for trials")
    p.add_argument("--out", default="results/ablations/phases", help="folder for records")
    p.add_argument("--work", default="_runs/phases", help="folder for the files of the phases")
    return p.parse_args()


def run(a, arm, n_labelled, seed, plan, accelerator, oracle=None):
    "Train an arm and write its record; gives the network"
    split, complete = seed if a.split_seed is None else a.split_seed, arm == "all labels"
    load = dict(data_root=a.data_root, split_seed=split, size=a.size)
    few = load_task(a.dataset, n_labelled=n_labelled, **load)
    task = load_task(a.dataset, n_labelled=None, n_unlabelled=0, **load) if complete else few
    artefacts = run_arm(arm, task, plan)
    net = plan.segmenter(task)
    artefacts[-1].load(G1=net)
    net = frozen(net).to(accelerator.device)
    result = evaluate(net, getattr(task, a.score_on), accelerator=accelerator)
    params = settings_of_plan(plan, artefacts) | {"width": a.width, "scored_on": a.score_on, "variant": a.variant + arm, "split_seed": split,
                                                  "of_n_labelled": n_labelled,
                                                  "steps_by_phase": {str(x.card["phase"]): x.card["steps"] for x in artefacts}}
    record = make_record("phases", whole_run(*artefacts), task, result, params, a.model)
    painter = [x for x in artefacts if x.card["phase"] == 2]
    if painter and oracle is not None: record["painter"] = painter_scores(painter[0], task, plan, oracle)
    print(f"{n_labelled:4} labelled  seed {seed}  {arm:24} mIoU {result['miou']:.4f}  {record['seconds']:.0f} s  {write_record(record, a.out)}", flush=True)
    return net


def main(a):
    for arm in a.arms: one_of(arm, ARMS, "arm")
    accelerator = make_accelerator()
    for seed in a.seeds:
        oracle = None
        for n in a.n_labelled:
            plan = Plan(Path(a.work) / f"{a.dataset}-{n}-seed{seed}", seed, tuple(a.steps), a.batch_size, a.lr, a.lr_part, a.views, a.n_painted,
                        net={"model": a.model, "width": a.width}, cyclegan=named_values(a.cyclegan), first=named_values(a.first), render=named_values(a.render),
                        again=named_values(a.again), accelerator=accelerator)
            if "all labels" in a.arms:
                oracle = run(a, "all labels", n, seed, replace(plan, out=Path(a.work) / f"{a.dataset}-all-seed{seed}"), accelerator)
            for arm in (x for x in a.arms if x != "all labels"): run(a, arm, n, seed, plan, accelerator, oracle)


if __name__ == "__main__":
    try: main(arguments())
    except UserError as e: raise SystemExit(f"error: {e}") from None
