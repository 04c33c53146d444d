"""The ablation of 40_stylegan2: python scripts/stylegan2.py [--variants NAME ...] [--seeds 0 1 2] [--steps 2000] [--out FOLDER]

Every variant is a run on portraits, and leaves one file: its settings, its curve, and how far its images are from unseen real ones.
StyleGAN2 labels nothing, so there is no mIoU, and these files are no rows of the leaderboard. A file that exists is not made again.
"""
import argparse
import json
from pathlib import Path

import torch

from semiseg_nb.core import UserError, atomic_write, one_of, seed_everything
from semiseg_nb.engine import fit, make_accelerator
from semiseg_nb.records import commit, thin, versions
from semiseg_nb.stylegan2 import StyleGAN2, frechet, load_pairs, statistics

KINDS = {"no augmentation": {"augment": ""}, "DiffAugment": {"augment": "translation,colour"}, "ADA": {"augment": "ada"}}
VARIANTS = {f"{kind}, {n} images": (n, settings) for n in (50, 200, 2000) for kind, settings in KINDS.items()} | {
    "DiffAugment with cutout": (2000, {"augment": "translation,colour,cutout"}),
    "DiffAugment, translation only": (2000, {"augment": "translation"}),
    "without R1": (2000, {"gamma": 0.0}),
    "R1 five times": (2000, {"gamma": 0.1}),
    "R1 a tenth": (2000, {"gamma": 0.002}),
    "without mixing": (2000, {"mixing": 0.0}),
    "mixing of the paper": (2000, {"mixing": 0.9}),
    "rate of the paper": (2000, {"lr": 2e-3}),
    "with path length": (2000, {"path_weight": 2.0}),
    "without averaging": (2000, {"half_life": 1.0}),
}


@torch.no_grad()
def mean_sign(gan, images, batch=16):
    "Mean sign of the discriminator's answers to images (N,3,S,S) of 0..255, un-augmented"
    parts = images[:len(images) // batch * batch].split(batch)
    answers = [gan.D(x.to(gan.device).float() / 127.5 - 1).sign().mean() for x in parts]
    return torch.stack(answers).mean().item()


def scores(gan, task, n):
    "How far the drawn images are from unseen ones, and what the discriminator says of both kinds of real images"
    unseen, seen = task.val.images, task.unlabelled.images
    reference = statistics(unseen.float() / 255)
    return {"frechet": float(frechet(statistics(gan.sample(n).cpu()), reference)),
            "frechet_truncated": float(frechet(statistics(gan.sample(n, psi=0.7).cpu()), reference)),
            "frechet_real": float(frechet(statistics(task.tune.images.float() / 255), reference)),
            "sign on training images": mean_sign(gan, seen), "sign on unseen images": mean_sign(gan, unseen)}


def run(name, seed, a, accelerator):
    "One variant with one seed: its file"
    path = Path(a.out) / f"{name.replace(' ', '_').replace(',', '')}-{seed}.json"
    if path.exists(): return print(f"{path.name} is there already")
    n, settings = VARIANTS[name]
    labelled = max(n // a.batch_size, 1)                                   # each batch has one of them: all images are seen equally often
    task = load_pairs("portraits", n_labelled=labelled, n_unlabelled=n - labelled, size=a.size)
    seed_everything(seed)
    gan = StyleGAN2(task, **settings)
    trained = fit(gan, task, a.steps, 1, a.batch_size - 1, seed=seed, eval_on=False, accelerator=accelerator)
    own = {k: v for k, v in vars(gan).items() if isinstance(v, (bool, int, float, str)) and k != "training" and not k.startswith("_")}
    record = {"method": "stylegan2", "variant": name, "params": own | {"batch_size": a.batch_size}, "steps": a.steps, "seed": seed,
              "dataset": task.describe(), "result": scores(gan, task, a.drawn), "curve": thin(trained.history), "seconds": round(trained.seconds, 1),
              "device": trained.device, "versions": versions(), "commit": commit()}
    atomic_write(path, lambda f: f.write((json.dumps(record, indent=1) + "\n").encode()))
    print(f"{name}, seed {seed}: " + ", ".join(f"{k} {v:.3f}" for k, v in record["result"].items()))


def main(a):
    if a.steps < 1 or a.batch_size < 2: raise UserError(f"steps is {a.steps} and batch_size {a.batch_size}: at least 1 and 2 would be right.")
    for name in a.variants: one_of(name, VARIANTS, "variant")
    accelerator = make_accelerator(a.device)
    for seed in a.seeds:
        for name in a.variants: run(name, seed, a, accelerator)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--variants", nargs="+", default=list(VARIANTS), metavar="NAME")
    p.add_argument("--seeds", nargs="+", type=int, default=[0])
    p.add_argument("--steps", type=int, default=2000)
    p.add_argument("--size", type=int, default=32)
    p.add_argument("--batch-size", type=int, default=16)
    p.add_argument("--drawn", type=int, default=200, help="images drawn to be measured: as many as the tune images that give the floor")
    p.add_argument("--device", default=None)
    p.add_argument("--out", default="results/ablations/stylegan2")
    try: main(p.parse_args())
    except UserError as e: raise SystemExit(str(e)) from None
