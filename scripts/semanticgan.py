"""Train SemanticGAN and write its record: python scripts/semanticgan.py --seed 0 --out results

--stage gan trains the generator alone; its record's result is the agreement of generated labels with an oracle (scored_on "generated").
--stage full (the default) trains the encoder too; its result is that of encode + optimise, `encoder_only` that without optimisation.
Every record has `agreement` beside the result. The oracle is a U-Net trained on every mask; it is kept in --oracle and used for measuring only.
--sweep prints the commands of the D_m sweep (the variants of nbs/41_semanticgan.ipynb); give it the options that all of them should have.
"""
import argparse
import shlex
from dataclasses import replace
from inspect import signature
from pathlib import Path

import torch

from semiseg_nb.catalogue import load_task
from semiseg_nb.core import UserError, named_values, seed_everything
from semiseg_nb.data import Labelled
from semiseg_nb.engine import evaluate, fit, make_accelerator
from semiseg_nb.records import make_record, settings_of, write_record
from semiseg_nb.semanticgan import SemanticEncoder, SemanticGAN, agreement, fit_oracle, save_semantic, share_distance
from semiseg_nb.stylegan2 import chosen, load_pairs

SWEEP = {
    "as above": {}, "patch of 34 pixels": {"n_layers": 2}, "one scale": {"n_scales": 1}, "half the channels": {"ndf": 12},
    "D_m four times slower": {"dm_lr": 2.5e-4}, "D_m as fast as D_r": {"dm_lr": 5e-3}, "no R1 on D_m": {"r1_m": 0}, "ten times R1": {"r1_m": 0.5},
    "no wrong pairs": {"mismatched": 0}, "wrong pairs only": {"mismatched": 1.0},
    "pairs not augmented": {"augment_pairs": ""}, "colours of pairs changed": {"augment_pairs": "translation,colour"},
    "cutout for pairs": {"augment_pairs": "translation,colour,cutout"}, "instance norm": {"norm": "instance"},
    "softmax labels": {"label_act": "softmax"}, "tanh labels": {"label_act": "tanh"}, "noise on labels": {"label_noise": 0.3},
    "no feature matching": {"fm": 0}, "label branch alone": {"label_grad": "head"}, "D_r augmented": {"augment": "translation,colour"},
    "R1 on D_r five times": {"r1": 0.1}, "mixing of the paper": {"mixing": 0.9}, "rate of the paper": {"lr": 2e-3},
    "the pilot": {"n_layers": 2, "norm": "instance", "r1_m": 0, "augment_pairs": "", "mismatched": 0},
}


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stage", default="full", choices=("gan", "full"))
    p.add_argument("--sweep", action="store_true", help="print the commands of the sweep and stop")
    p.add_argument("--dataset", default="portraits")
    p.add_argument("--data-root")
    p.add_argument("--n-labelled", type=int, default=32)
    p.add_argument("--split-seed", type=int, default=0)
    p.add_argument("--size", type=int, default=32)
    p.add_argument("--steps", type=int, default=2500, help="of the GAN")
    p.add_argument("--encoder-steps", type=int, help="a sixth of --steps where it is not given")
    p.add_argument("--oracle-steps", type=int, default=600)
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", choices=("cpu", "cuda"))
    p.add_argument("--score-on", default="val", choices=("val", "tune"), help="choose settings on tune, report on val")
    p.add_argument("--n-scored", type=int, help="only the first so many images of that split")
    p.add_argument("--data", action="append", default=[], metavar="NAME=VALUE", help="more arguments of load_task, e.g. stretch=true")
    p.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="arguments of SemanticGAN, e.g. dm_lr=0.0005")
    p.add_argument("--encode", action="append", default=[], metavar="NAME=VALUE", help="arguments of SemanticEncoder, e.g. inversion_steps=100")
    p.add_argument("--variant", help="name of this variant in a sweep, written into the record")
    p.add_argument("--oracle", help="weights file of the oracle: read where it exists, else written")
    p.add_argument("--out", default="results", help="folder for records")
    p.add_argument("--work", help="folder for checkpoints: the run can be interrupted and goes on from there")
    p.add_argument("--save", help="file for the final weights (safetensors) of both stages")
    return p


def commands(a):
    "One command for each variant of the sweep, with the options that were given"
    options = []
    for x in parser()._actions:
        value = getattr(a, x.dest, x.default)
        if x.dest in ("help", "stage", "sweep", "set", "variant", "save") or value == x.default: continue
        options += [f"{x.option_strings[0]} {shlex.quote(str(v))}" for v in (value if isinstance(value, list) else [value])]
    for name, more in SWEEP.items():
        own = " ".join(f"--set {shlex.quote(f'{k}={v}')}" for k, v in (named_values(a.set) | more).items())
        yield " ".join(filter(None, ("python scripts/semanticgan.py --stage gan", *options, f"--variant {shlex.quote(name)}", own)))


def judged(G, oracle, everything, accelerator, val):
    "What a record says under `agreement`, and the full result"
    found = agreement(G, oracle.predict, 512)
    far = share_distance(found["shares"], everything.labelled.masks)
    return {"miou": found["miou"], "iou_per_class": found["iou_per_class"], "share_distance": far, "sure": found["sure"],
            "oracle_miou": evaluate(oracle, val, accelerator=accelerator)["miou"]}, found


def main(a):
    if a.sweep: return print("\n".join(commands(a)))
    if a.save and a.stage == "gan": raise UserError("--save stores both stages, but --stage gan trains the first alone: leave one of them out.")
    own, encoding, data = named_values(a.set), named_values(a.encode), named_values(a.data, signature(load_task).parameters)
    settings, encoder_settings = settings_of(SemanticGAN, **own), settings_of(SemanticEncoder, **encoding)
    where = dict(dataset=a.dataset, data_root=a.data_root, split_seed=a.split_seed, size=a.size)
    task = load_pairs(n_labelled=a.n_labelled, **where, **data)
    if a.score_on == "tune" and task.tune is None: raise UserError("This task has no tune images: give --data n_tune=..., or --score-on val.")
    if a.n_scored:
        split = getattr(task, a.score_on)
        task = replace(task, **{a.score_on: Labelled(*chosen(split, torch.arange(min(a.n_scored, len(split)))), task.n_classes)})
    on, accelerator, work = getattr(task, a.score_on), make_accelerator(a.device), Path(a.work) if a.work else None
    seed_everything(a.seed)
    gan = SemanticGAN(task, **own)
    everything = load_pairs(n_labelled=None, **where, **data)
    oracle = fit_oracle(everything, a.oracle_steps, path=a.oracle, accelerator=accelerator)
    def watch(gan): return {"agreement": torch.tensor(agreement(gan.ema.net, oracle.predict, 128)["miou"])}
    gan.watch = watch
    seed_everything(a.seed)
    run = fit(gan, task, a.steps, a.batch_size, seed=a.seed, eval_on=False, out_dir=work and work / "gan", checkpoint_every=250,
              accelerator=accelerator)
    measured, found = judged(gan.ema.net, oracle, everything, accelerator, on)
    params = {"split_seed": a.split_seed, "oracle_steps": a.oracle_steps, **({"variant": a.variant} if a.variant else {}), **data, **settings}
    if a.stage == "gan":
        record = make_record("semanticgan", run, task, found, params | {"stage": "gan", "scored_on": "generated"}, "stylegan2")
    else: record = second_stage(a, gan, task, on, run, params, encoding, encoder_settings, accelerator, work)
    path = write_record(record | {"agreement": measured}, a.out)
    print(f"agreement {measured['miou']:.4f}  mIoU {record['result']['miou']:.4f}  {record['seconds']:.0f} s  {path}", flush=True)


def second_stage(a, gan, task, on, run, params, encoding, settings, accelerator, work):
    "Train the encoder, score with and without optimisation, store the weights: the record"
    seed_everything(a.seed)
    method, steps = SemanticEncoder(gan, task, **encoding), a.encoder_steps or max(1, a.steps // 6)
    again = fit(method, task, steps, a.batch_size, seed=a.seed, eval_on=False, out_dir=work and work / "encoder", checkpoint_every=250,
                accelerator=accelerator)
    result, n = evaluate(method, on, 64, accelerator), method.inversion_steps
    method.inversion_steps = 0
    alone = evaluate(method, on, 64, accelerator)
    method.inversion_steps = n
    named = {f"encoder_{k}" if k == "lr" else k: v for k, v in settings.items()}
    params = params | named | {"encoder_steps": steps, "distance": method.distance.name, "stage": "full", "scored_on": a.score_on}
    both = replace(run, seconds=run.seconds + again.seconds, images=run.images + again.images)
    record = make_record("semanticgan", both, task, result, params, "stylegan2") | {"encoder_only": {k: alone[k] for k in ("miou", "iou_per_class")}}
    if a.save: save_semantic(method, named_values(a.set), encoding, a.save, dataset=task.describe(), steps=a.steps, encoder_steps=steps, seed=a.seed)
    return record


if __name__ == "__main__":
    try: main(parser().parse_args())
    except UserError as e: raise SystemExit(f"error: {e}") from None
