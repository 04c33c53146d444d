"""Train one method and write its record: python scripts/train.py uda --dataset scenes --seed 0 --steps 1500 --set threshold=0.8

Supervised runs write two records, one of the last weights and one of their average (`supervised_ema`).
With --start a run goes on from a checkpoint of CCT (--work of an earlier run); the record then also has the score of the start.
"""
import argparse
import json
from inspect import signature

from semiseg_nb.advsemiseg import S4GAN, AdvSemiSeg
from semiseg_nb.catalogue import load_task
from semiseg_nb.cct import CCT, CCTWeak
from semiseg_nb.continuation import Continuation, load_start, start_label
from semiseg_nb.core import UserError, named_values, seed_everything
from semiseg_nb.engine import evaluate, fit, save_weights
from semiseg_nb.guidedmix import GuidedMix
from semiseg_nb.mask_cycle import MaskCycle
from semiseg_nb.models import build_model
from semiseg_nb.records import make_record, settings_of, write_record
from semiseg_nb.stylegan2 import load_pairs
from semiseg_nb.supervised import Supervised
from semiseg_nb.temporal import MeanTeacher, TemporalEnsembling
from semiseg_nb.uda import UDA
from semiseg_nb.unimatch import CPS, ClassMix, CutMixSeg, FixMatch, UniMatch, UniMatchV2

METHODS = {"supervised": Supervised, "uda": UDA, "temporal": TemporalEnsembling, "mean_teacher": MeanTeacher, "cct": CCT, "cct_weak": CCTWeak,
           "cutmix": CutMixSeg, "classmix": ClassMix, "fixmatch": FixMatch, "cps": CPS, "unimatch": UniMatch, "unimatch_v2": UniMatchV2,
           "advsemiseg": AdvSemiSeg, "s4gan": S4GAN, "continuation": Continuation, "guidedmix": GuidedMix,
           "mask_cycle": MaskCycle}


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("method", choices=METHODS)
    p.add_argument("--dataset", default="scenes")
    p.add_argument("--data-root")
    p.add_argument("--n-labelled", type=int, default=12)
    p.add_argument("--split-seed", type=int, default=0)
    p.add_argument("--size", type=json.loads, help="64, or [96,128] for height and width")
    p.add_argument("--model", default="unet")
    p.add_argument("--encoder")
    p.add_argument("--pretrained", action="store_true", help="start the encoder from published weights")
    p.add_argument("--weights", help="local file with encoder weights")
    p.add_argument("--width", type=int, default=8)
    p.add_argument("--steps", type=int, default=1500)
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--unlabelled-batch", type=int)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--eval-every", type=int)
    p.add_argument("--score-on", default="val", choices=("val", "tune"), help="choose settings on tune, report on val")
    p.add_argument("--data", action="append", default=[], metavar="NAME=VALUE", help="more arguments of load_task, e.g. crop=128")
    p.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="arguments of the method, e.g. threshold=0.8")
    p.add_argument("--start", help="go on from a checkpoint of CCT: its file, or the --work folder of that run")
    p.add_argument("--variant", help="name of this variant in an ablation, written into the record")
    p.add_argument("--out", default="results", help="folder for records")
    p.add_argument("--work", help="folder for checkpoints: the run can be interrupted and goes on from there")
    p.add_argument("--save", help="file for the final weights (safetensors)")
    return p.parse_args()


def main(a):
    chosen, data = named_values(a.set), named_values(a.data, signature(load_task).parameters)
    task = load_pairs(a.dataset, a.data_root, n_labelled=a.n_labelled, split_seed=a.split_seed, size=a.size, **data)
    seed_everything(a.seed)
    net = build_model(a.model, task.n_classes, encoder=a.encoder, width=a.width, pretrained=a.pretrained, weights=a.weights, mean=task.mean)
    settings_of(METHODS[a.method], **chosen)
    label = start_label(a.start) if a.start else None
    if a.method == "continuation": chosen["start"] = a.start
    elif a.start: load_start(net, a.start, task)
    method = METHODS[a.method](net, task, **chosen)
    on = getattr(task, a.score_on)
    began = {"start": {"name": label, "miou": evaluate(method, on)["miou"]}} if a.start else {}
    run = fit(method, task, a.steps, a.batch_size, a.unlabelled_batch, seed=a.seed, eval_every=a.eval_every, eval_on=on,
              out_dir=a.work, checkpoint_every=a.eval_every)
    params = {"width": a.width, "unlabelled_batch": a.unlabelled_batch or a.batch_size, "split_seed": a.split_seed, "scored_on": a.score_on,
              **({"variant": a.variant} if a.variant else {}), **data, **settings_of(METHODS[a.method], **chosen), **({"start": label} if label else {})}
    rows = {a.method: run.result}
    if a.method == "supervised":
        name = "supervised_strong" if chosen.get("views") == "strong" else "supervised"
        rows = {name: evaluate(method.net, on), "supervised_ema": run.result}
    for name, result in rows.items():
        record = make_record(name, run, task, result, params, a.model, a.encoder, bool(a.pretrained or a.weights)) | began
        print(f"{name:18} mIoU {result['miou']:.4f}  {run.seconds:.0f} s  {write_record(record, a.out)}", flush=True)
    if a.save: save_weights(method.ema.net, a.save, {k: record[k] for k in ("method", "model", "encoder", "dataset", "params", "result")})


if __name__ == "__main__":
    try: main(arguments())
    except UserError as e: raise SystemExit(f"error: {e}") from None
