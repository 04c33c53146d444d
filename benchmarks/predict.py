"""How fast pictures are predicted, and in how much memory: python benchmarks/predict.py [--record]

Speed: `predict_files` (masks, overlays, confidence) against the loop that a person would write (read, one pass for each batch, enlarge, save the
same three files one after the other), on the same pictures, network and batch; both take turns, medians over rounds. Beside the clock stands
the time of the processor, on which other work on the machine does not count. With `--masks-only` neither
writes more than masks. Memory: one uncompressed TIFF of `--side` pixels a side is predicted by windows in a process of its own, whose peak is
compared with that of the same process before; 20,000 is what is meant by large.
"""
import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tifffile
import torch
import torch.nn.functional as F
from PIL import Image

from semiseg_nb.core import atomic_write
from semiseg_nb.engine import device_name
from semiseg_nb.models import build_model
from semiseg_nb.pictures import read_image
from semiseg_nb.predict import Predictor, predict_files
from semiseg_nb.records import commit, versions
from semiseg_nb.scenes import CLASSES, PALETTE, make_scenes
from semiseg_nb.viz import overlay


def write_tiff(path, side, **how):
    "An RGB TIFF of side x side pixels, uncompressed unless told otherwise, written strip by strip: scenes of 256 px, repeated"
    tile = make_scenes([0], size=256)[0][0].permute(1, 2, 0).numpy()
    rows = np.tile(tile, (1, -(-side // 256), 1))[:, :side]
    strips = (rows[:side - y] for y in range(0, side, 256))
    tifffile.imwrite(path, strips, shape=(side, side, 3), dtype=np.uint8, photometric="rgb", rowsperstrip=256, **how)


def predictor(rule, size, width, model="unet"):
    "An untrained network: it takes the time of a trained one"
    net = {"model": model, "encoder": None, "width": width, "n_classes": len(CLASSES), "mean": [0.5] * 3}
    card = {"classes": list(CLASSES), "palette": [list(map(int, c)) for c in PALETTE], "reading": {}, "size": {"rule": rule, "training": [size, size]}}
    return Predictor(build_model(**net), card | {"network": net})


def plain_loop(model, paths, out, batch, masks_only):
    "What a person would write"
    out.mkdir()
    for i in range(0, len(paths), batch):
        some = paths[i:i + batch]
        native = [read_image(p) for p in some]
        x = torch.stack([read_image(p, size=model.training) for p in some])
        with torch.no_grad(): z = model.net(x.float() / 255)
        for path, image, logits in zip(some, native, z):
            p = F.interpolate(logits[None], image.shape[1:], mode="bilinear")[0].softmax(0)
            confidence, labels = p.max(0)
            mask = Image.fromarray(labels.byte().numpy())
            mask.putpalette([c for rgb in model.palette for c in rgb])
            mask.save(out / f"{path.stem}.png")
            if masks_only: continue
            Image.fromarray((255 * confidence).byte().numpy()).save(out / f"{path.stem}-confidence.png")
            Image.fromarray(overlay(image, labels, model.palette)).save(out / f"{path.stem}.jpg", quality=90)


def speed(a, folder):
    "Images a second and processor time, both ways"
    images = make_scenes(range(a.images), size=a.size)[0]
    (folder / "in").mkdir()
    paths = [folder / "in" / f"{i:04d}.jpg" for i in range(a.images)]
    for path, x in zip(paths, images): Image.fromarray(x.permute(1, 2, 0).numpy()).save(path, quality=92)
    model = predictor("resize", a.training, a.width)
    ways = {
        "plain loop": lambda r: plain_loop(model, paths, folder / f"loop{r}", a.batch_size, a.masks_only),
        "predict_files": lambda r: predict_files(model, folder / "in", folder / f"files{r}", batch_size=a.batch_size, progress=False,
                                                 overlays=not a.masks_only, confidence=not a.masks_only)}
    seconds, worked = {name: [] for name in ways}, {name: [] for name in ways}
    for r in range(a.rounds + 1):  # the first warms up
        for name, way in ways.items():
            start, work = time.perf_counter(), time.process_time()
            way(r)
            seconds[name].append(time.perf_counter() - start)
            worked[name].append(time.process_time() - work)
    return {name: {"images_per_second": round(a.images / statistics.median(seconds[name][1:]), 2),
                   "processor_seconds_per_image": round(statistics.median(worked[name][1:]) / a.images, 4)} for name in ways}


def memory(a, folder):
    "Peak memory in MB of a process that predicts one large picture, and what it had before"
    words = [sys.executable, __file__, "--alone", str(folder), "--side", str(a.side), "--large-width", str(a.large_width),
             "--large-model", a.large_model, "--threads", str(a.threads)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def alone(a):
    "The process whose memory is measured"
    folder = Path(a.alone)
    write_tiff(folder / "large.tif", a.side)
    model = predictor("native", 256, a.large_width, a.large_model)
    model(torch.zeros(3, 512, 512, dtype=torch.uint8))
    def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    before, start, worked = peak(), time.perf_counter(), time.process_time()
    done = predict_files(model, folder / "large.tif", folder / "out", batch_size=1, progress=False)
    assert done.done == ["large"], done
    row = {"side": a.side, "picture_mb": round(3 * a.side**2 / 2**20), "model": f"{a.large_model}, width {a.large_width}",
           "before_mb": round(before), "peak_mb": round(peak()), "seconds": round(time.perf_counter() - start, 1),
           "processor_seconds": round(time.process_time() - worked, 1)}
    print(json.dumps(row))


def main(a):
    torch.set_num_threads(a.threads)
    if a.alone: return alone(a)
    with tempfile.TemporaryDirectory() as name:
        large = memory(a, Path(name))  # first: a new process counts the peak of the one that starts it as its own
        rates = speed(a, Path(name))
    print(f"{a.images} pictures of {a.size} px, network at {a.training} px, batch {a.batch_size}:")
    for name, row in rates.items():
        print(f"    {name:14} {row['images_per_second']:6.2f} a second, {row['processor_seconds_per_image']:.4f} s of the processor each")
    print(f"{large['side']} x {large['side']} px ({large['picture_mb']} MB): peak {large['peak_mb']} MB, before {large['before_mb']} MB, {large['seconds']} s")
    if not a.record: return rates, large
    about = {"what": "images a second of predict_files and of a plain loop, medians over rounds; peak memory of one large picture by windows",
             "device": device_name(torch.device("cpu")), "images": a.images, "size": a.size, "training": a.training, "width": a.width,
             "batch_size": a.batch_size, "rounds": a.rounds, "masks_only": a.masks_only, "speed": rates, "large": large,
             "versions": versions(), "commit": commit()}
    path = Path(__file__).parents[1] / "results/benchmarks/predict.json"
    print(atomic_write(path, lambda f: f.write((json.dumps(about, indent=1) + "\n").encode())).name)


def words():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--images", type=int, default=64)
    p.add_argument("--size", type=int, default=512, help="side of the pictures")
    p.add_argument("--training", type=int, default=128, help="side at which the network sees them")
    p.add_argument("--width", type=int, default=16)
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--masks-only", action="store_true")
    p.add_argument("--side", type=int, default=6000, help="of the large picture; 20000 for the whole measurement")
    p.add_argument("--large-model", default="deeplabv3", help="network for the large picture: a tiny one, as its memory is not the question")
    p.add_argument("--large-width", type=int, default=2)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--record", action="store_true", help="write results/benchmarks/predict.json")
    p.add_argument("--alone", help=argparse.SUPPRESS)
    return p


if __name__ == "__main__": main(words().parse_args())
