"""The day of somebody with images of one's own, on a real folder: doctor, baseline and method over seeds, verdict, predictions.

    python benchmarks/own_images.py data/camvid --labelled 46 --steps 400 size='[96, 128]'

Further words NAME=VALUE are arguments of `load_task`. The record goes to results/benchmarks/own_images-<name>.json.
"""
import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import torch

from semiseg_nb.catalogue import load_task
from semiseg_nb.core import named_values
from semiseg_nb.doctor import check_folder
from semiseg_nb.experiment import run
from semiseg_nb.predict import load_model, predict_files
from semiseg_nb.records import commit
from semiseg_nb.verdict import verdict

RESULTS = Path(__file__).resolve().parents[1] / "results/benchmarks"


def day(words: argparse.Namespace, out: Path) -> dict:
    "What every step of the day says"
    report = check_folder(words.folder)
    data = {"dataset": "folder", "data_root": str(words.folder), "n_labelled": words.labelled} | named_values(words.values)
    task = load_task(**data)
    for seed in words.seeds:
        for method in ("supervised", words.method):
            result = run(method, task, seed=seed, steps=words.steps, batch_size=words.batch_size, width=words.width, model=words.model,
                         settings={"views": "strong"}, device="cpu", out_dir=out / "runs", data=data, progress=False)
            print(method, seed, round(result.record["result"]["miou"], 4), f"{result.record['seconds']:.0f} s", flush=True)
    found = verdict(out / "runs", device="cpu")
    print(found, flush=True)
    pictures = [item.image for item in report.folder.splits.get("val", report.folder.splits.get("")).values() if item.mask][:words.pictures]
    start = time.perf_counter()
    done = predict_files(load_model(out / "runs/best", "cpu"), pictures, out / "predictions", tile=words.tile, progress=False)
    return {
        "data": {k: v for k, v in data.items() if k != "data_root"} | {"name": task.name}, "doctor": report.as_dict(), "text": str(found),
        "verdict": found.as_dict(), "predictions": {"pictures": len(done.done), "failed": len(done.failed), "tile": words.tile,
                                                    "seconds": round(time.perf_counter() - start, 1)}}


def main(words: list | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("folder", type=Path)
    p.add_argument("values", nargs="*", metavar="NAME=VALUE")
    p.add_argument("--method", default="uda")
    p.add_argument("--labelled", type=int)
    p.add_argument("--steps", type=int, default=400)
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--width", type=int, default=8)
    p.add_argument("--model", default="unet")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    p.add_argument("--tile", type=int)
    p.add_argument("--pictures", type=int, default=8)
    p.add_argument("--out", type=Path, default=RESULTS)
    words = p.parse_args(words)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = json.loads(json.dumps(day(words, Path(folder)), default=str).replace(f"{folder}/", ""))
    asked = {k: v for k, v in vars(words).items() if k not in ("folder", "out", "values")}
    record = {"commit": commit(), "device": f"cpu, 1 thread, {platform.machine()}", "asked": asked} | found
    text = json.dumps(record, indent=1).replace(str(words.folder), words.folder.name)
    (words.out / f"own_images-{found['data']['name']}.json").write_text(text + "\n")


if __name__ == "__main__": main()
