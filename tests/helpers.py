"""What several test files need."""
import json

import numpy as np
import torch
from PIL import Image

from semiseg_nb.catalogue import load_task
from semiseg_nb.data import Labelled
from semiseg_nb.experiment import run
from semiseg_nb.folders import class_palette


class NoMask(dict):
    "A batch that raises as soon as anybody asks for its mask, or whether it has one"
    def __getitem__(self, key):
        assert key not in ("mask", "tags"), f"'{key}' of an unlabelled image was read"
        return super().__getitem__(key)

    def get(self, key, default=None): return self[key] if key in self else default

    def __contains__(self, key):
        assert key not in ("mask", "tags"), f"'{key}' of an unlabelled image was looked for"
        return super().__contains__(key)


# ---------------------------------------------------------------- a tiny folder of each layout
def picture(path, size=(12, 16), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def mask(path, size=(12, 16), values=(0, 1, 2), seed=0, mode="P"):
    path.parent.mkdir(parents=True, exist_ok=True)
    a = np.random.default_rng(seed).choice(np.array(values, np.uint8), size).astype(np.uint8)
    a.flat[: len(values)] = values
    out = Image.fromarray(a)
    if mode == "P":
        out = out.convert("P")
        out.putpalette([c for rgb in class_palette(256) for c in rgb])
    out.save(path)
    return torch.from_numpy(a)


def plain_folder(root):
    "20 images, the first 10 with a mask"
    for i in range(20):
        picture(root / "images" / f"p{i:02d}.png", seed=i)
        if i < 10: mask(root / "masks" / f"p{i:02d}.png", seed=i)
    return root


def official_folder(root):
    "train 12, val 3, unlabelled_far 4, ood 2, weak 3, with dataset.json"
    names = {"train": 12, "val": 3, "ood": 2, "unlabelled_far": 4, "weak": 3}
    for s, (split, n) in enumerate(names.items()):
        for i in range(n):
            picture(root / "images" / split / f"{split[0]}{i}.png", seed=100 * s + i)
            if split in ("train", "val", "ood"): mask(root / "masks" / split / f"{split[0]}{i}.png", seed=100 * s + i)
    stems = [f"t{i}" for i in range(12)]
    info = {"name": "tiny", "classes": [{"id": i, "name": n, "color": [i, 9 * i, 20]} for i, n in enumerate("abc")],
            "label_order": {"seed0": stems, "seed1": stems[::-1]}, "weak_labels": {"w0": [0, 2], "w1": [0], "w2": [0, 1]}}
    (root / "dataset.json").write_text(json.dumps(info))
    return root


def awkward_folder(root, hidden_masks=False):
    """Two classes without names, no two pictures of one size: 4 with masks and 5 unlabelled ones (which have masks all the same, if so wished), one of 2,000 pixels;
    4 to validate, from 7 x 5 pixels on; and another domain: 3 pictures without masks, 3 with masks"""
    sizes = {"train": [(40, 60), (64, 48), (33, 33), (50, 120), (48, 48), (30, 70), (90, 40), (64, 64), (2000, 1600)],
             "val": [(7, 5), (60, 80), (300, 200), (21, 240)], "unlabelled_far": [(40, 41), (42, 43), (44, 45)], "ood_far": [(39, 50), (60, 38), (51, 52)]}
    for s, (split, of_split) in enumerate(sizes.items()):
        for i, size in enumerate(of_split):
            picture(root / f"images/{split}/{split[0]}{i}.png", size, seed=20 * s + i)
            if split in ("val", "ood_far") or (split == "train" and (i < 4 or hidden_masks)): mask(root / f"masks/{split}/{split[0]}{i}.png", size, (0, 1), seed=20 * s + i)
    return root


def in_memory(n=10, size=(6, 8), n_classes=3):
    g = torch.Generator().manual_seed(0)
    return Labelled([f"i{k}" for k in range(n)], torch.randint(0, 256, (n, 3, *size), generator=g, dtype=torch.uint8),
                    torch.randint(0, n_classes, (n, *size), generator=g, dtype=torch.uint8), n_classes)


# ---------------------------------------------------------------- a folder of runs
QUICK = dict(steps=2, batch_size=2, width=4, device="cpu", progress=False)


def photos(root, test=False):
    "8 training images with masks, 6 for validation, of 3 classes; on request a split `test` of 5"
    sizes = {"train": 8, "val": 6} | ({"test": 5} if test else {})
    for s, (split, n) in enumerate(sizes.items()):
        for i in range(n):
            picture(root / "images" / split / f"{split}{i}.png", (32, 32), 100 * s + i)
            mask(root / "masks" / split / f"{split}{i}.png", (32, 32), seed=100 * s + i)
    return root


def two_methods(root, seeds=3):
    "A folder with two steps of the baseline and of UDA, its task, and the arguments that load it"
    data = dict(dataset="folder", data_root=str(photos(root / "photos", test=True)), n_labelled=4)
    task = load_task(**data)
    for seed in range(seeds):
        for name in ("supervised", "uda"): run(name, task, seed=seed, data=data, out_dir=root / "runs", **QUICK)
    return root / "runs", task, data
