"""Carry masks into another look with a CycleGAN, train segmenters on the pairs, write one record with all scores:
python scripts/cyclegan.py --style inverted --seed 0 --variant "identity loss 0.5" --set identity=0.5

The record's result is that of a segmenter trained on the translated pairs, G(A). Field "scores" has the others: trained on the source only, on both,
the source's segmenter on target images that were translated to the source ("there"), and for scenes the oracle and how well it finds the carried
masks ("carry-over").
A folder needs --data-root, --target-split (unlabelled images of the target) and --target-val (images of the target with masks).
"""
import argparse
import json
from dataclasses import replace
from inspect import signature

import torch

from semiseg_nb.catalogue import load_split, load_task
from semiseg_nb.core import UserError, named_values, seed_everything
from semiseg_nb.cyclegan import CycleGAN, joined, load_across, patch_distance, translated
from semiseg_nb.engine import evaluate, fit, make_accelerator
from semiseg_nb.models import build_model
from semiseg_nb.records import make_record, settings_of, write_record
from semiseg_nb.supervised import Supervised

LESSON = {"lr": 5e-4, "identity": 0.0, "skip": False, "norm": "none"}  # where the notebook differs from the defaults of the class


def arguments(words=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", default="scenes", choices=("scenes", "folder"))
    p.add_argument("--data-root")
    p.add_argument("--style", default="inverted", help="scenes: look of the target")
    p.add_argument("--strength", type=float, default=1.0, help="scenes: how far the look goes, in [0,1]")
    p.add_argument("--target-split")
    p.add_argument("--target-val")
    p.add_argument("--n-labelled", type=int, default=100)
    p.add_argument("--split-seed", type=int, default=0)
    p.add_argument("--size", type=json.loads, default=32, help="32, or [96,128] for height and width")
    p.add_argument("--data", action="append", default=[], metavar="NAME=VALUE", help="more arguments of load_task, e.g. stretch=true")
    p.add_argument("--model", default="unet")
    p.add_argument("--width", type=int, default=8)
    p.add_argument("--views", default="weak", choices=("weak", "strong"))
    p.add_argument("--steps", type=int, default=2500, help="steps of the CycleGAN")
    p.add_argument("--batch-size", type=int, default=4, help="of the CycleGAN; segmenters take twice as many")
    p.add_argument("--segmenter-steps", type=int, default=750)
    p.add_argument("--least", type=float, default=0.5, help="content check: least mIoU with which the mask is found again; 0 keeps all pairs")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--score-on", default="val", choices=("val", "tune"), help="choose settings on tune, report on val")
    p.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="arguments of CycleGAN, e.g. identity=0")
    p.add_argument("--variant", default="as above", help="name of this variant in an ablation, written into the record")
    p.add_argument("--out", default="results/ablations/cyclegan", help="folder for records")
    p.add_argument("--work", help="folder for the CycleGAN's checkpoint: the run can be interrupted and goes on from there")
    return p.parse_args(words)


def segmenter(a, task, accelerator):
    "A supervised segmenter for the labelled images of a task, and its run"
    seed_everything(a.seed)
    m = Supervised(build_model(a.model, task.n_classes, width=a.width, mean=task.mean), task, views=a.views)
    run = fit(m, task, a.segmenter_steps, 2 * a.batch_size, seed=a.seed, eval_on=False, progress=False, accelerator=accelerator)
    return m, run


def ruler_of(a, source, task, accelerator):
    "Scenes: a segmenter trained on target images with their masks, which nobody else may see; else None"
    if a.dataset != "scenes": return None
    order = [i.rsplit("/", 1)[-1] for i in (*source.labelled.ids, *task.unlabelled.ids)]
    full = load_split("scenes", split="train", size=a.size, ids=order, style=a.style, strength=a.strength)
    return segmenter(a, replace(source, labelled=full), accelerator)[0]


def main(a):
    further = [k for k in signature(load_task).parameters if k not in ("style", "strength", "n_labelled", "split_seed", "size", "unlabelled_from")]
    chosen, data, accelerator = LESSON | named_values(a.set), named_values(a.data, further), make_accelerator()
    settings = settings_of(CycleGAN, **chosen)
    source, task = load_across(a.dataset, a.data_root, a.n_labelled, a.split_seed, a.size, a.style, a.strength, a.target_split, a.target_val, **data)
    on = getattr(task, a.score_on)
    if on is None: raise UserError("score-on is 'tune', but this target has no tune images: use --score-on val.")
    def score(m, images): return evaluate(m, images, accelerator=accelerator)["miou"]
    f_A, _ = segmenter(a, source, accelerator)
    oracle = ruler_of(a, source, task, accelerator)
    features = (oracle or f_A).ema.net

    @torch.no_grad()
    def probe(m):
        made, content = translated(m, source.labelled)
        n = min(200, len(made), len(task.unlabelled))
        fake, real = (s.images.index_select(0, torch.arange(n)).float().to(m.device) / 255 for s in (made, task.unlabelled))
        row = {"realism": patch_distance(features.encode(fake)[1], features.encode(real)[1]).item(), "content": content.mean().item()}
        return row | ({"carry-over": score(oracle, made)} if oracle else {})
    seed_everything(a.seed)
    gan = CycleGAN(task, f_A.ema.net, **chosen)
    every = -(-a.steps // 6)
    run_gan = fit(gan, task, a.steps, a.batch_size, seed=a.seed, eval_every=every, eval_on=on, probe=probe, out_dir=a.work, checkpoint_every=every,
                  accelerator=accelerator)
    content = translated(gan, source.labelled)[1]
    made, _ = translated(gan, source.labelled, least=min(a.least, content.median().item()))  # at least the better half
    on_made, run = segmenter(a, replace(task, labelled=made), accelerator)
    on_both, _ = segmenter(a, replace(task, labelled=joined(source.labelled, made)), accelerator)
    last = [r for r in run_gan.history if "content" in r][-1]
    result = evaluate(on_made, on, accelerator=accelerator)
    scores = {"source only": score(f_A, on), "at home": score(f_A, source.val), "there": last["miou"], "G(A)": result["miou"],
              "A + G(A)": score(on_both, on), "kept": len(made), **{k: last[k] for k in ("realism", "content", "carry-over") if k in last}}
    if oracle: scores["oracle"] = score(oracle, on)
    look = f"{a.style}@{a.strength:g}" if a.dataset == "scenes" else a.target_val
    params = {"width": a.width, "split_seed": a.split_seed, "scored_on": f"{a.score_on} in the look {look}", "look": look, "variant": a.variant,
              "least": a.least, "gan_steps": a.steps, "gan_batch": a.batch_size, "gan_lr": settings["lr"], **data, **settings,
              **settings_of(Supervised, views=a.views)}
    record = make_record("cyclegan", run, task, result, params, a.model)
    record |= {"scores": scores, "translation": run_gan.history, "gan_seconds": round(run_gan.seconds, 2)}
    print({k: round(v, 4) for k, v in scores.items()}, f"{run_gan.seconds:.0f} s", write_record(record, a.out), flush=True)


if __name__ == "__main__":
    try: main(arguments())
    except UserError as e: raise SystemExit(f"error: {e}") from None
