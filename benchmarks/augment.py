"""Views for a batch: ours against a per-sample torchvision v2 loop and kornia, side by side in one process.

python benchmarks/augment.py              prints a table
python benchmarks/augment.py --record     also writes results/benchmarks/augment.json
python benchmarks/augment.py --device cuda --threads 1 --batch 16 --sizes 64 128

Every column draws and applies a view of image and label for the whole batch. Rounds of a few calls each are interleaved, so that
whatever else the machine does falls on all columns; the table gives medians over the rounds and the median of the per-round ratios.
torchvision's columns are loops over the images: "float" and "uint8" call its v2 kernels as leanly as possible with ops drawn by hand,
"classes" uses its transform objects (its policies take no mask, so there is none for the view with geometry). kornia shares one list of ops over the batch.
On a CPU with one thread the clock counts the thread's own time.
"""
import argparse
import datetime
import json
import math
import os
import platform
import subprocess
import time
from pathlib import Path

import torch
import torchvision
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from semiseg_nb.augment import GEO, OPS, PHOTO
from semiseg_nb.core import IGNORE, atomic_write, generator
from semiseg_nb.policies import flip_crop, randaugment

try:
    import kornia
    from kornia.augmentation import AugmentationSequential
    from kornia.augmentation.auto import RandAugment
except ImportError:
    kornia = None

STRENGTH, FILL, CALLS = 0.5, (0.5, 0.5, 0.5), 4  # calls of a column per round


def tv_photo(op, image, value):
    "One photometric op of torchvision on one image"
    if op == "brightness": return TF.adjust_brightness(image, value)
    if op == "contrast": return TF.adjust_contrast(image, value)
    if op == "color": return TF.adjust_saturation(image, value)
    if op == "sharpness": return TF.adjust_sharpness(image, value)
    if op == "posterize": return TF.posterize(image, int(value))
    if op == "solarize": return TF.solarize(image, value if image.is_floating_point() else value * 255)
    if op == "autocontrast": return TF.autocontrast(image)
    if op == "equalize": return TF.equalize(image)
    return image


def tv_geo(op, image, label, value):
    "One geometric op of torchvision on one image and its label: bilinear and nearest, padded with the mean and with 255"
    H, W = image.shape[-2:]
    shear, translate, angle = [0.0, 0.0], [0, 0], 0.0
    if op == "rotate": angle = value
    elif op.startswith("shear"): shear[op == "shear_y"] = math.degrees(math.atan(value))
    else: translate[op == "translate_y"] = int(value * (H if op == "translate_y" else W))
    fill = list(FILL) if image.is_floating_point() else [int(f * 255) for f in FILL]
    args = dict(angle=angle, translate=translate, scale=1.0, shear=shear)
    return (TF.affine(image, **args, interpolation=TF.InterpolationMode.BILINEAR, fill=fill),
            TF.affine(tv_tensors.Mask(label), **args, fill=IGNORE))


def tv_randaugment(image, label, ops):
    "RandAugment for segmentation as a loop over torchvision's kernels: draw and apply two ops per image, chained"
    out = []
    for x, y in zip(image, label):
        for _ in range(2):
            op = ops[int(torch.randint(len(ops), ()))]
            o = OPS[op]
            sign = -1 if o.signed and torch.rand(()) < 0.5 else 1
            value = o.zero + sign * o.reach * STRENGTH
            if op in GEO: x, y = tv_geo(op, x, y, value)
            else: x = tv_photo(op, x, value)
        out.append((x, y))
    return torch.stack([x for x, _ in out]), torch.stack([y for _, y in out])


def tv_weak(image, label):
    "Mirror, zoom and shift as a loop: one affine warp per image and label"
    out, (H, W) = [], image.shape[-2:]
    fill = list(FILL) if image.is_floating_point() else [int(f * 255) for f in FILL]
    for x, y in zip(image, label):
        y = tv_tensors.Mask(y)
        u = torch.rand(4)
        if u[0] < 0.5: x, y = TF.horizontal_flip(x), TF.horizontal_flip(y)
        args = dict(angle=0.0, translate=[float(u[1] * 2 - 1) * 0.1 * W, float(u[2] * 2 - 1) * 0.1 * H], shear=[0.0, 0.0],
                    scale=math.exp(math.log(0.8) + float(u[3]) * math.log(1.25 / 0.8)))
        x = TF.affine(x, **args, interpolation=TF.InterpolationMode.BILINEAR, fill=fill)
        out.append((x, TF.affine(y, **args, fill=IGNORE)))
    return torch.stack([x for x, _ in out]), torch.stack([y for _, y in out])


class PhotoRandAugment(v2.RandAugment):
    "torchvision's own class with its photometric ops only: with the others it has no way to move a label"
    _AUGMENTATION_SPACE = {
        name: bins for name, bins in v2.RandAugment._AUGMENTATION_SPACE.items() if not name.startswith(("Shear", "Translate", "Rotate"))}


def tv_classes(image, label, transform, with_label):
    "torchvision's transform objects in a loop, as its documentation writes it"
    out = []
    for x, y in zip(image, label):
        x, y = tv_tensors.Image(x), tv_tensors.Mask(y)
        out.append(transform(x, y) if with_label else (transform(x), y))
    return torch.stack([x for x, _ in out]), torch.stack([y for _, y in out])


def columns(batch, size, device):
    "The rows of the table: name -> {column: function}"
    g = generator(0, "benchmark")
    image = torch.rand(batch, 3, size, size, generator=g).to(device)
    label = torch.randint(0, 5, (batch, size, size), generator=g).to(device)
    image8, soft = (image * 255).byte(), label[:, None].float()

    def ours(policy):
        def run():
            P = policy.sample(batch, (size, size), g)
            return policy.apply_image(image, P), policy.apply_label(label, P)
        return run

    rows = {"strong view, photometric": (randaugment(2, STRENGTH, PHOTO), PHOTO),
            "strong view, photometric and geometric": (randaugment(2, STRENGTH, PHOTO + GEO), PHOTO + GEO), "weak view, flip and crop": (flip_crop(), None)}
    table = {}
    for name, (policy, ops) in rows.items():
        cells = {"ours": ours(policy)}
        if ops is None: loops = {"torchvision float": lambda: tv_weak(image, label), "torchvision uint8": lambda: tv_weak(image8, label)}
        else: loops = {"torchvision float": lambda ops=ops: tv_randaugment(image, label, ops),
                       "torchvision uint8": lambda ops=ops: tv_randaugment(image8, label, ops)}
        cells.update(loops)
        affine = v2.RandomAffine(0, translate=(0.1, 0.1), scale=(0.8, 1.25), interpolation=v2.InterpolationMode.BILINEAR,
                                 fill={tv_tensors.Image: FILL[0], tv_tensors.Mask: IGNORE})
        transform = v2.Compose([v2.RandomHorizontalFlip(), affine]) if ops is None else PhotoRandAugment(2, 15)
        if ops != PHOTO + GEO: cells["torchvision classes"] = lambda t=transform, weak=ops is None: tv_classes(image, label, t, weak)
        if kornia and ops == PHOTO + GEO:
            auto = AugmentationSequential(RandAugment(n=2, m=15), data_keys=["input", "mask"])
            cells["kornia"] = lambda auto=auto: auto(image, soft)
        table[name] = cells
    return table


def measure(cells, rounds, device, clock):
    "Seconds per call of each column in each round, interleaved"
    def once(f):
        if device == "cuda": torch.cuda.synchronize()
        start = clock()
        for _ in range(CALLS): f()
        if device == "cuda": torch.cuda.synchronize()
        return (clock() - start) / CALLS
    for f in cells.values():
        for _ in range(3): f()
    times = {name: [] for name in cells}
    for _ in range(rounds):
        for name, f in cells.items(): times[name].append(once(f))
    return times


def median(values): return sorted(values)[len(values) // 2]


def commit():
    "The commit of the working tree, or None outside one"
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() or None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--record", action="store_true", help="write results/benchmarks/augment.json")
    parser.add_argument("--out", default=str(Path(__file__).parent.parent / "results" / "benchmarks"))
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.ones(7_800_000)    # a training step frees blocks of this size; from then on glibc keeps smaller ones instead of returning them
    clock = time.thread_time if a.device == "cpu" and a.threads == 1 else time.perf_counter
    if kornia is None: print("kornia is not installed: its column is left out (pip install kornia).")
    rows = []
    for size in a.sizes:
        for name, cells in columns(a.batch, size, a.device).items():
            times = measure(cells, a.rounds, a.device, clock)
            row = {"size": size, "view": name, "ms": {c: round(1e3 * median(t), 3) for c, t in times.items()},
                   "times_faster": {c: round(median([b / o for b, o in zip(t, times["ours"])]), 2) for c, t in times.items() if c != "ours"}}
            rows.append(row)
    print(f"batch {a.batch}, {a.device}, {a.threads} thread(s), medians of {a.rounds} interleaved rounds; in brackets: ours is so many times faster")
    names = ["ours", "torchvision float", "torchvision uint8", "torchvision classes", "kornia"]
    print(f"{'view':40s} {'px':>4s}" + "".join(f"{n:>21s}" for n in names))
    for r in rows:
        faster = {n: f" ({v:.1f}x)" for n, v in r["times_faster"].items()}
        cells = [f"{r['ms'][n]:.2f} ms" + faster.get(n, "") if n in r["ms"] else "-" for n in names]
        print(f"{r['view']:40s} {r['size']:4d}" + "".join(f"{c:>21s}" for c in cells))
    if a.record:
        name = torch.cuda.get_device_name() if a.device == "cuda" else platform.processor() or platform.machine()
        record = {"schema": 1, "benchmark": "augment", "batch": a.batch, "rounds": a.rounds, "calls_per_round": CALLS,
                  "rows": rows, "device": a.device, "device_name": name,
                  "threads": a.threads, "cores": os.cpu_count(), "clock": clock.__name__, "commit": commit(),
                  "versions": {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
                               "kornia": kornia.__version__ if kornia else None},
                  "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
        path = Path(a.out) / ("augment.json" if a.device == "cpu" else f"augment-{a.device}.json")
        atomic_write(path, lambda f: f.write(json.dumps(record, indent=1).encode()))
        print(f"written: {path.name}")


if __name__ == "__main__": main()
