"""Train one row of the out-of-domain experiment on the source and score it on shifted images; one record for each way of predicting.

    python scripts/out_of_domain.py unet --seed 0                        three kinds of views, and the target's BatchNorm statistics
    python scripts/out_of_domain.py uda --seed 0
    python scripts/out_of_domain.py semanticgan --seed 0                 encoder only, optimised, optimised with an intensity map
    python scripts/out_of_domain.py cyclegan --target inverted --seed 0  sees unlabelled images of one target, as does:
    python scripts/out_of_domain.py phases --target inverted --seed 0

Block 1 (unet, uda, semanticgan) sees source images alone. Real data: --dataset folder --data-root <nuclei> --targets ood_histology.
"""
import argparse
import tempfile
from dataclasses import fields, replace
from pathlib import Path

from semiseg_nb.catalogue import load_task
from semiseg_nb.core import UserError, named_values, one_of, seed_everything
from semiseg_nb.cyclegan import CycleGAN, joined, translated
from semiseg_nb.engine import fit, make_accelerator
from semiseg_nb.inversion import SemanticEncoder
from semiseg_nb.models import build_model
from semiseg_nb.out_of_domain import KEPT, PAIRED, colour_views, scores, shifts, with_statistics, with_target
from semiseg_nb.phases import Plan, run_phases, settings_of_plan, whole_run
from semiseg_nb.records import make_record, settings_of, write_record
from semiseg_nb.semanticgan import SemanticGAN
from semiseg_nb.supervised import Supervised
from semiseg_nb.uda import UDA

VIEWS = {"U-Net, weak views": dict(views="weak"), "U-Net, strong colour views": dict(views="strong"),
         "U-Net, strong views without solarize": dict(views="strong")}
STATISTICS = "U-Net, target statistics"


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("row", choices=ROWS)
    p.add_argument("--target", help="block 2: the target whose unlabelled images are seen")
    p.add_argument("--targets", nargs="+", help="to score on: styles (all), or splits of a folder")
    p.add_argument("--target-images", action="append", default=[], metavar="TARGET=SPLIT", help="folder: where a target's unlabelled images are")
    p.add_argument("--dataset", default="portraits", help="portraits | scenes | folder")
    p.add_argument("--data-root")
    p.add_argument("--n-labelled", type=int, default=32)
    p.add_argument("--size", type=int, default=32)
    p.add_argument("--stretch", action="store_true", help="spread dark images between percentiles (nuclei)")
    p.add_argument("--images", type=int, help="score on so many images of each set (generated images: 64)")
    p.add_argument("--width", type=int, default=8)
    p.add_argument("--steps", type=int, default=1500, help="of a segmenter")
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--gan-steps", type=int, help="2500 of SemanticGAN, 1500 of CycleGAN")
    p.add_argument("--gan-batch", type=int, help="16 for SemanticGAN, 4 for CycleGAN")
    p.add_argument("--encoder-steps", type=int, default=416)
    p.add_argument("--inversion-steps", type=int, default=40)
    p.add_argument("--least", type=float, default=0.5, help="CycleGAN: content score that a translated pair should have")
    p.add_argument("--seed", type=int, default=0, help="of weights and data order, and which images are labelled")
    p.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="arguments of UDA, SemanticGAN or CycleGAN; for phases of Plan")
    p.add_argument("--device")
    p.add_argument("--out", default="results/ablations/out_of_domain", help="folder for records")
    p.add_argument("--work", help="folder for checkpoints: the run can be interrupted and goes on from there")
    return p.parse_args()


class Experiment:
    "Task, target sets and settings that all rows share"

    def __init__(self, a):
        self.a, self.accelerator = a, make_accelerator(a.device)
        self.task = load_task(a.dataset, a.data_root, a.n_labelled, a.seed, a.size, stretch=a.stretch)
        n = a.images or (64 if a.dataset in PAIRED else None)
        self.sets = shifts(a.dataset, a.data_root, a.targets, size=a.size, n=n, stretch=a.stretch, classes=self.task.classes)
        self.source = next(iter(self.sets.values()))[0.0]

    def net(self):
        "A U-Net with the initial weights of this seed"
        seed_everything(self.a.seed)
        return build_model("unet", self.task.n_classes, width=self.a.width, mean=self.task.mean)

    def fit(self, method, task, steps, batch_size, name, eval_on=False):
        "Train, with a checkpoint where --work is given"
        work = Path(self.a.work) / f"{name.replace(', ', '-').replace(' ', '_')}-{self.a.seed}" if self.a.work else None
        every = max(1, steps // 5)
        return fit(method, task, steps, batch_size, seed=self.a.seed, eval_on=eval_on, out_dir=work, checkpoint_every=every if work else None,
                   progress=False, accelerator=self.accelerator)

    def target(self, name):
        "The task with unlabelled images of a target; None for a real target that has none"
        if self.a.dataset in PAIRED: return with_target(self.task, name, dataset=self.a.dataset)
        split = named_values(self.a.target_images).get(name)
        return split and with_target(self.task, split, dataset=self.a.dataset, data_root=self.a.data_root, stretch=self.a.stretch)

    def scores(self, method, targets=None):
        "Rows of `scores` for all targets, or some"
        return scores(method, {t: self.sets[t] for t in targets or self.sets}, accelerator=self.accelerator)

    def write(self, variant, kind, run, rows, settings, model="unet", beside=None, **more):
        "Write the record of one way of predicting; `beside` are results that are not settings"
        params = {"width": self.a.width, "unlabelled_batch": run.batch_size, "split_seed": self.a.seed, "variant": variant,
                  "scored_on": f"val, the first {len(self.source)}", **settings, **more}
        record = make_record(kind, run, self.task, {k: rows[0][k] for k in KEPT}, params, model) | {"out_of_domain": rows} | (beside or {})
        path = write_record(record, self.a.out)
        ends = "  ".join(f"{r['target']} {r['miou']:.3f}" for r in rows if r["strength"] == 1)
        print(f"{variant:36} source {rows[0]['miou']:.3f}  {ends}  {run.seconds:.0f} s  {path}", flush=True)

    def target_task(self):
        "The task of a row of block 2; raises `UserError` when its target is not named or has no unlabelled images"
        if self.a.target is None: raise UserError(f"row '{self.a.row}' sees one target: name it with --target, one of {', '.join(self.sets)}.")
        task = self.target(one_of(self.a.target, self.sets, "target"))
        if task is None: raise UserError(f"target '{self.a.target}' has no unlabelled images: give --target-images {self.a.target}=SPLIT.")
        return task


def segmenter(x, variant, task=None):
    "A supervised U-Net with one kind of views, trained; its run and settings"
    a, chosen = x.a, VIEWS[variant]
    method, without = Supervised(x.net(), x.task, **chosen), {}
    if "without" in variant: method.policies, without = colour_views(x.task.mean, without=("solarize",)), {"without": "solarize"}
    run = x.fit(method, task or x.task, a.steps, a.batch_size, variant if task is None else f"{a.row} {a.target} segmenter", x.source)
    return method, run, settings_of(Supervised, **chosen) | without


def unet(x):
    for variant in VIEWS:
        method, run, settings = segmenter(x, variant)
        x.write(variant, "supervised_ema", run, x.scores(method), settings)
        if variant != "U-Net, weak views": continue
        for target in x.sets:
            task = x.target(target)
            if task is None: continue
            counted = with_statistics(method.ema.net, task.unlabelled)
            x.write(STATISTICS, "supervised_ema", run, x.scores(counted, [target]), settings, target=target)


def uda(x):
    settings = dict(views="strong") | named_values(x.a.set)
    settings_of(UDA, **settings)
    method = UDA(x.net(), x.task, **settings)
    run = x.fit(method, x.task, x.a.steps, x.a.batch_size, "uda", x.source)
    x.write("UDA", "uda", run, x.scores(method), settings_of(UDA, **settings))


def semanticgan(x):
    a, settings = x.a, named_values(x.a.set)
    of_gan = settings_of(SemanticGAN, **settings)
    seed_everything(a.seed)
    gan = SemanticGAN(x.task, **settings)
    steps, batch = a.gan_steps or 2500, a.gan_batch or 16
    first = x.fit(gan, x.task, steps, batch, "semanticgan")
    method = SemanticEncoder(gan, x.task)
    run = x.fit(method, x.task, a.encoder_steps, batch, "semanticgan encoder")
    run = replace(run, seconds=run.seconds + first.seconds, images=run.images + first.images)
    for variant, n, intensity in (("SemanticGAN, encoder only", 0, False), ("SemanticGAN, optimised", a.inversion_steps, False),
                                  ("SemanticGAN, intensity map", a.inversion_steps, True)):
        method.inversion_steps, method.intensity = n, intensity
        x.write(variant, "semanticgan", run, x.scores(method), of_gan, "stylegan2", gan_steps=steps, encoder_steps=a.encoder_steps,
                inversion_steps=n, intensity=intensity)


def cyclegan(x):
    a, settings, task = x.a, {"lr": 5e-4} | named_values(x.a.set), x.target_task()
    of_gan = settings_of(CycleGAN, **settings)
    judge, first, of_segmenter = segmenter(x, "U-Net, weak views")
    seed_everything(a.seed)
    gan = CycleGAN(task, judge.ema.net, **settings)
    steps = a.gan_steps or 1500
    second = x.fit(gan, task, steps, a.gan_batch or 4, f"cyclegan {a.target}")
    _, content = translated(gan, task.labelled)
    least = min(a.least, content.median().item())  # the better half at least
    made, _ = translated(gan, task.labelled, least)
    both = replace(task, labelled=joined(task.labelled, made))
    method, run, _ = segmenter(x, "U-Net, weak views", both)
    run = replace(run, seconds=run.seconds + first.seconds + second.seconds, images=run.images + first.images + second.images)
    x.write("CycleGAN pairs", "cyclegan", run, x.scores(method, [a.target]), of_segmenter | of_gan, target=a.target, gan_steps=steps,
            least=a.least, beside={"pairs": {"made": len(content), "kept": len(made), "content": round(content.mean().item(), 4)}})


def phases(x):
    named = [f.name for f in fields(Plan) if f.name not in ("out", "seed", "net", "resume", "progress", "accelerator")]
    a, settings, task = x.a, {"batch_size": 16} | named_values(x.a.set, named), x.target_task()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(a.work or folder) / f"phases-{a.target}-{a.seed}"
        plan = Plan(out, a.seed, net={"width": a.width}, accelerator=x.accelerator, **settings)
        left = run_phases(task, plan)
        net, run = plan.segmenter(task), whole_run(*left.values())
        left["phase3"].load(G1=net)
    steps = {str(artefact.card["phase"]): artefact.card["steps"] for artefact in left.values()}
    x.write("phases", "phases", run, x.scores(net.to(x.accelerator.device), [a.target]), settings_of_plan(plan), target=a.target, steps_by_phase=steps)


ROWS = {"unet": unet, "uda": uda, "semanticgan": semanticgan, "cyclegan": cyclegan, "phases": phases}


def main(a): ROWS[a.row](Experiment(a))


if __name__ == "__main__":
    try: main(arguments())
    except UserError as e: raise SystemExit(f"error: {e}") from None
