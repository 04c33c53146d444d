"""Folders as people have them, and worse: each is loaded right or refused in one sentence when it is loaded.

    python tests/mutated_folders.py            1,000 folders; prints the counts and writes results/benchmarks/mutated_folders.json
    python tests/mutated_folders.py 50 7       50 folders with seed 7; writes nothing

Every folder starts healthy: grey values tell the class, so that a loaded image can be compared with its mask, wherever it came from. One to three mutations follow.
Each says what must happen: "load" (and rightly), "refuse", or "either" (a load must be right even then, where image and mask are still pictures of one scene).
"""
import io
import json
import random
import shutil
import struct
import sys
import tempfile
import time
import traceback
import unicodedata
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from semiseg_nb.catalogue import load_split, load_task
from semiseg_nb.core import UserError, atomic_write
from semiseg_nb.doctor import check_folder
from semiseg_nb.folders import class_palette
from semiseg_nb.pictures import read_image

ROOT = Path(__file__).resolve().parents[1]
H, W = 36, 48
PALETTE = [c for rgb in class_palette(256) for c in rgb]


# ---------------------------------------------------------------- a healthy folder
def scene(seed):
    "An image (H,W,3) whose brightness tells the class, and its mask (H,W)"
    r = np.random.default_rng(seed)
    y, x = np.mgrid[:H, :W]
    mask = np.zeros((H, W), np.uint8)
    for c in (1, 2):
        top, left = r.integers(2, H - 16), r.integers(2, W - 18)
        mask[(y >= top) & (y < top + 12) & (x >= left) & (x < left + 14)] = c
    shade = r.integers(-15, 15) + r.integers(-8, 8) * np.sin(x / r.integers(4, 12))[..., None] + r.normal(0, 4, (H, W, 3))
    return (50 + 85 * mask[..., None] + shade + r.integers(-6, 6, 3)).clip(0, 255).astype(np.uint8), mask


def healthy(root, layout):
    "A plain folder of 12 images and 8 masks, or one with splits; returns the stems that have masks"
    parts = {"": (12, 8)} if layout == "plain" else {"train": (8, 8), "val": (3, 3), "unlabelled": (3, 0), "test": (2, 2)}
    seed = 0
    for split, (n, n_masks) in parts.items():
        for kind in ("images", "masks"): (root / kind / split).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            seed += 1
            a, m = scene(seed)
            Image.fromarray(a).save(root / "images" / split / f"{split[:1]}{i:02d}.png")
            if i >= n_masks: continue
            mask = Image.fromarray(m)
            mask.putpalette(PALETTE)
            mask.save(root / "masks" / split / f"{split[:1]}{i:02d}.png")


# ---------------------------------------------------------------- mutations
def images(root): return sorted(p for p in (root / "images").rglob("*") if p.is_file() and not p.is_symlink())
def masks(root): return sorted(p for p in (root / "masks").rglob("*") if p.is_file())
def labelled(root): return [p for p in images(root) if mask_of(root, p)]
def mask_of(root, path):
    found = [m for m in masks(root) if m.stem == path.stem and m.parent.name in (path.parent.name, "masks")]
    return found[0] if found else None


def open_rgb(path): return Image.open(path).convert("RGB")
def resave(path, picture, ending, **more):
    path.unlink()
    picture.save(path.with_suffix(ending), **more)


def png16(path, a):
    def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in a)
    head = struct.pack(">IIBBBBB", a.shape[1], a.shape[0], 16, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def all_grey(root, kind, factor):
    for p in images(root):
        a = np.asarray(Image.open(p).convert("L")).astype(np.float64) * factor
        p.unlink()
        Image.fromarray(a.astype(kind)).save(p.with_suffix(".png" if kind == np.uint16 else ".tif"))


def turn(path, flag, into=".png"):
    "Store an image as a camera would that was held otherwise: upright it is what it was"
    back = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}[flag]
    exif = Image.Exif()
    exif[274] = flag
    resave(path, open_rgb(path).transpose(back), into, exif=exif)


def jpeg(picture, quality=25):
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer


def write_mask(path, a): Image.fromarray(a).save(path)
def a_mask(path): return np.asarray(Image.open(path)).copy()
def rename_all(root, name):
    for p in [*images(root), *masks(root)]: p.rename(p.with_name(name(p)))


def as_text(root, r, name, text):
    (root / name).write_bytes(text.encode(r.choice(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])))


def twice_across(root, r):
    (root / "images/val").is_dir() or _to_splits(root)
    resave(root / "images/val/v00.png" if (root / "images/val/v00.png").exists() else images(root)[-1], open_rgb(labelled(root)[0]), ".png")


def _to_splits(root):
    shutil.rmtree(root / "images")
    shutil.rmtree(root / "masks")
    healthy(root, "splits")


def flip_bytes(path, r):
    raw = bytearray(path.read_bytes())
    for _ in range(r.randrange(1, 8)): raw[r.randrange(len(raw))] = r.randrange(256)
    path.write_bytes(bytes(raw))


def one(of, change): return lambda root, r: change(r.choice(of(root)), r)
def every(of, change): return lambda root, r: [change(p, r) for p in of(root)]


LOAD = {  # must load, and rightly
    "endings jfif": every(images, lambda p, r: resave(p, open_rgb(p), ".jfif", format="JPEG", quality=90)),
    "endings JPG": every(images, lambda p, r: resave(p, open_rgb(p), ".JPG", quality=90)),
    "an image as gif": one(images, lambda p, r: resave(p, open_rgb(p), ".gif")), "an image as webp": one(images, lambda p, r: resave(p, open_rgb(p), ".webp")),
    "an image as bmp": one(images, lambda p, r: resave(p, open_rgb(p), ".bmp")), "a CMYK image": one(images, lambda p, r: resave(p, open_rgb(p).convert("CMYK"), ".jpg", quality=95)),
    "a progressive JPEG": one(images, lambda p, r: resave(p, open_rgb(p), ".jpg", quality=95, progressive=True)), "a palette image": one(images, lambda p, r: resave(p, open_rgb(p).quantize(64), ".png")),
    "JPEG bytes in an image.png": one(images, lambda p, r: p.write_bytes(jpeg(open_rgb(p), 95).getvalue())), "opaque RGBA": one(images, lambda p, r: resave(p, open_rgb(p).convert("RGBA"), ".png")),
    "grey images": every(images, lambda p, r: resave(p, open_rgb(p).convert("L"), ".png")), "grey with opaque alpha": one(images, lambda p, r: resave(p, open_rgb(p).convert("LA"), ".png")),
    "8 in 16 bits": lambda root, r: all_grey(root, np.uint16, 1), "12 in 16 bits": lambda root, r: all_grey(root, np.uint16, 16), "16 bits": lambda root, r: all_grey(root, np.uint16, 257),
    "floats to 1": lambda root, r: all_grey(root, np.float32, 1 / 255), "floats to 255": lambda root, r: all_grey(root, np.float32, 1), "32-bit integers": lambda root, r: all_grey(root, np.int32, 200),
    "12 in 16 bits of colour": every(images, lambda p, r: png16(p, np.asarray(open_rgb(p)).astype(np.uint16) * 16)),
    "turned images": every(images, lambda p, r: turn(p, r.randrange(2, 9), r.choice([".png", ".jpg", ".tif", ".webp"]))),
    "hidden files": lambda root, r: [(root / "images" / n).write_bytes(b"x") for n in (".DS_Store", "Thumbs.db", "._a.png", ".a.png")],
    "folder of a server": lambda root, r: [(root / k / n).mkdir() or (root / k / n / "a.png").write_bytes(b"x") for k in ("images", "masks") for n in ("@eaDir", ".@__thumb", "__MACOSX")],
    "dead link among the images": lambda root, r: (images(root)[0].parent / "zz.png").symlink_to("/nowhere/a.png"), "unknown ending": lambda root, r: (images(root)[0].parent / "a.heic").write_bytes(b"x"),
    "notes beside the images": lambda root, r: (images(root)[0].parent / "readme.txt").write_text("x"), "pictures beside the folders": lambda root, r: shutil.copytree(root / "images", root / "originals"),
    "linked image": one(images, lambda p, r: p.rename(p.parents[1 if p.parent.name == "images" else 2] / f"real_{p.name}") and p.symlink_to(p.parents[1 if p.parent.name == "images" else 2] / f"real_{p.name}")),
    "spaces and accents": lambda root, r: rename_all(root, lambda p: f"é ü {p.name}"), "numbers": lambda root, r: rename_all(root, lambda p: f"{ord(p.stem[0])}{p.stem[-2:]}{p.suffix}"),
    "decomposed names of images": lambda root, r: rename_all(root, lambda p: unicodedata.normalize("NFD" if "images" in p.parts else "NFC", f"é{p.name}")),
    "classes in some encoding": lambda root, r: as_text(root, r, "classes.txt", "# Klassen\r\nHintergrund\r\nStraße\r\nMüll\r\n"),
    "dataset.json in some encoding": lambda root, r: as_text(root, r, "dataset.json", json.dumps({"classes": [{"id": 0, "name": "Bäume", "color": "#0a0"}, "b", "c"]}, ensure_ascii=False)),
    "grey masks": every(masks, lambda p, r: write_mask(p, a_mask(p))), "masks as tif": every(masks, lambda p, r: resave(p, Image.fromarray(a_mask(p)), ".tif")),
    "masks as gif": every(masks, lambda p, r: resave(p, Image.fromarray(a_mask(p)), ".gif")), "masks of 16 bits": every(masks, lambda p, r: write_mask(p, a_mask(p).astype(np.uint16))),
    "masks of floats": every(masks, lambda p, r: resave(p, Image.fromarray(a_mask(p).astype(np.float32)), ".tif")),
    "NaN in a mask": one(masks, lambda p, r: resave(p, Image.fromarray(np.where(np.arange(W) < 5, np.nan, a_mask(p)).astype(np.float32)), ".tif")),
    "unknown borders": one(masks, lambda p, r: write_mask(p, np.where(np.arange(W) < 5, 255, a_mask(p)).astype(np.uint8))),
    "groups": lambda root, r: (root / "groups.csv").write_text("image;group\n" + "".join(f"{p.relative_to(root / 'images').with_suffix('').as_posix()};{i // 2 if p.parent.name == 'images' else p.parent.name}\n" for i, p in enumerate(images(root)))),
    "a flat image": lambda root, r: Image.new("RGB", (W, H), (9, 9, 9)).save(images(root)[0].parent / "zz.png") if (root / "images/train").is_dir() is False else None,
    "a one-colour mask": one(masks, lambda p, r: write_mask(p, np.full((H, W), 255, np.uint8))),
}
REFUSE = {  # must be refused
    "a colour mask": one(masks, lambda p, r: Image.open(p).convert("RGB").save(p)), "RGBA masks": every(masks, lambda p, r: Image.open(p).convert("RGBA").save(p)),
    "a smoothed mask": one(masks, lambda p, r: Image.fromarray(a_mask(p) * 100).resize((24, 18), Image.Resampling.BILINEAR).resize((W, H), Image.Resampling.BILINEAR).save(p)),
    "a mask through JPEG": one(masks, lambda p, r: Image.open(jpeg(Image.fromarray(a_mask(p) * 100))).save(p)), "JPEG masks": every(masks, lambda p, r: resave(p, Image.open(p).convert("L"), ".jpg")),
    "JPEG bytes in a mask.png": one(masks, lambda p, r: p.write_bytes(jpeg(Image.fromarray(a_mask(p))).getvalue())), "0 and 255": every(masks, lambda p, r: write_mask(p, (a_mask(p) > 0).astype(np.uint8) * 255)),
    "0 and 1 beside 0 and 255": lambda root, r: [write_mask(p, (a_mask(p) > 0).astype(np.uint8) * (255 if i % 2 else 1)) for i, p in enumerate(masks(root))],
    "empty masks": every(masks, lambda p, r: write_mask(p, np.zeros((H, W), np.uint8))), "grey shades": every(masks, lambda p, r: write_mask(p, a_mask(p) * 85)),
    "a mask of another size": one(masks, lambda p, r: Image.open(p).resize((W - 1, H), Image.Resampling.NEAREST).save(p)), "fractions in a mask": one(masks, lambda p, r: resave(p, Image.fromarray(a_mask(p) * np.float32(0.4)), ".tif")),
    "a mask beyond 255": one(masks, lambda p, r: write_mask(p, a_mask(p).astype(np.uint16) * 300)), "a negative mask": one(masks, lambda p, r: resave(p, Image.fromarray(a_mask(p).astype(np.int32) - 1), ".tif")),
    "palettes anew": lambda root, r: [_new_palette(p, i) for i, p in enumerate(masks(root))], "a mask without image": lambda root, r: shutil.copy(masks(root)[0], masks(root)[0].with_name("zz.png")),
    "an image twice, two endings": one(labelled, lambda p, r: open_rgb(p).save(p.with_suffix(".bmp" if p.suffix != ".bmp" else ".png"))), "no masks folder": lambda root, r: (root / "masks").rename(root / "labels"),
    "no images folder": lambda root, r: (root / "images").rename(root / "photos"), "an empty image": one(images, lambda p, r: p.write_bytes(b"")), "an empty mask": one(masks, lambda p, r: p.write_bytes(b"")),
    "an image cut off": one(images, lambda p, r: p.write_bytes(p.read_bytes()[:len(p.read_bytes()) // 2])), "text in an image": one(images, lambda p, r: p.write_text("hello")),
    "NaN in an image": one(images, lambda p, r: resave(p, Image.fromarray(np.where(np.arange(W) < 5, np.nan, np.asarray(Image.open(p).convert("L"))).astype(np.float32)), ".tif")),
    "transparency": one(images, lambda p, r: _hole(p)), "a film": one(images, lambda p, r: resave(p, open_rgb(p), ".gif", save_all=True, append_images=[Image.new("RGB", (W, H), (200, 9, 9))])),
    "pages": one(images, lambda p, r: resave(p, open_rgb(p), ".tif", save_all=True, append_images=[Image.new("RGB", (W, H))])), "too few classes": lambda root, r: (root / "classes.txt").write_text("a\nb\n"),
    "one class": lambda root, r: (root / "classes.txt").write_text("a\n"), "classes twice": lambda root, r: (root / "classes.txt").write_text("a\nb\na\n"), "classes of bytes": lambda root, r: (root / "classes.txt").write_bytes(bytes(range(256))),
    "broken dataset.json": lambda root, r: (root / "dataset.json").write_text('{"classes": ['), "a list as dataset.json": lambda root, r: (root / "dataset.json").write_text("[1]"),
    "a colour that is none": lambda root, r: (root / "dataset.json").write_text('{"classes": [{"id": 0, "color": "red"}, "b", "c"]}'), "the same picture trains and tests": twice_across,
    "unknown name in groups": lambda root, r: (root / "groups.csv").write_text("nobody,1\n"), "a group on both sides": lambda root, r: (root / "groups.csv").write_text("".join(f"{p.name},1\n" for p in images(root))),
    "masks as stored of a turned image": lambda root, r: [Image.open(m).transpose(Image.Transpose.ROTATE_90).save(m) for p in labelled(root)[:1] for m in [mask_of(root, p)] if turn(p, 6) is None],
    "a split that is no train": lambda root, r: [(root / k / "train").rename(root / k / "first") if (root / k / "train").is_dir() else (root / k / "first").mkdir() for k in ("images", "masks")],
}


def _new_palette(path, i):
    a = a_mask(path)
    out = Image.fromarray(a if i % 2 else (2 - a.astype(np.uint8)))
    colours = [10, 10, 10, 240, 180, 40, 30, 200, 90]
    out.putpalette(colours if i % 2 else [c for k in (2, 1, 0) for c in colours[3 * k:3 * k + 3]])
    out.save(path)


def _hole(path):
    x = open_rgb(path).convert("RGBA")
    ImageDraw.Draw(x).rectangle((0, 0, 5, 5), (255, 0, 255, 0))
    resave(path, x, ".png")


EITHER = {  # whatever happens, no traceback
    "bytes of an image": one(images, flip_bytes), "bytes of a mask": one(masks, flip_bytes), "an image cut somewhere": one(images, lambda p, r: p.write_bytes(p.read_bytes()[:r.randrange(len(p.read_bytes()))])),
    "a mask cut somewhere": one(masks, lambda p, r: p.write_bytes(p.read_bytes()[:r.randrange(len(p.read_bytes()))])), "random bytes": one(images, lambda p, r: p.write_bytes(bytes(r.randrange(256) for _ in range(r.randrange(400))))),
    "a header alone": one(images, lambda p, r: p.write_bytes(r.choice([b"II*\0", b"MM\0*", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"RIFF\0\0\0\0WEBP", b"BM"]) + bytes(r.randrange(256) for _ in range(r.randrange(60))))),
    "classes.txt of bytes": lambda root, r: (root / "classes.txt").write_bytes(bytes(r.randrange(256) for _ in range(r.randrange(60)))),
    "dataset.json of odd things": lambda root, r: (root / "dataset.json").write_text(json.dumps({r.choice(["name", "classes", "label_order", "weak_labels", "loading_hint", "white", "black"]): r.choice(
        [None, True, 0, -1, 1e30, "", "a", "../x", [], {}, [[]], [{"id": 0}], {"seed0": 5}, {"seed0": ["t00", "t00"]}, ["a", "b", "c"], {"w": [9]}, 3.5])})),
    "groups.csv of odd things": lambda root, r: (root / "groups.csv").write_bytes(bytes(r.choice(b"p0123,;\t\n\"at") for _ in range(r.randrange(50)))),
    "a file gone": lambda root, r: r.choice([*images(root), *masks(root)]).unlink(), "a name changed": one(lambda root: [*images(root), *masks(root)], lambda p, r: p.rename(p.with_name(r.choice(["x", "ÄÖ", "a b", "-", "'", "%s", "{0}", "a" * 100]) + p.suffix))),
    "a folder named like a picture": lambda root, r: (root / r.choice(["images", "masks"]) / "x.png").mkdir(), "an empty folder more": lambda root, r: (root / r.choice(["images", "masks"]) / r.choice(["valid", "val", "extra", "train"])).mkdir(exist_ok=True),
    "one image of another size": one(images, lambda p, r: resave(p, open_rgb(p).resize((r.randrange(1, 90), r.randrange(1, 90))), ".png")),
    "pairs of other sizes": lambda root, r: [_resize_pair(root, p, r) for p in labelled(root)], "one pixel": one(images, lambda p, r: resave(p, open_rgb(p).resize((1, 1)), ".png")),
    "an image in an odd mode": one(images, lambda p, r: resave(p, open_rgb(p).convert(r.choice(["1", "P", "LAB", "YCbCr", "HSV", "CMYK", "I", "F", "LA", "RGBX"])), ".tif")),
    "a mask in an odd mode": one(masks, lambda p, r: resave(p, Image.open(p).convert(r.choice(["1", "P", "L", "I", "F", "LA", "CMYK"])), ".tif")),
    "a link in a circle": lambda root, r: (images(root)[0].parent / "loop.png").symlink_to(images(root)[0].parent / "loop.png"), "a link to its own folder": lambda root, r: (root / "images/up").symlink_to(root),
    "masks for all images but one": lambda root, r: masks(root)[-1].unlink(), "few masks": lambda root, r: [p.unlink() for p in masks(root)[r.randrange(3):]],
}


def _resize_pair(root, path, r):
    w, h = r.randrange(20, 90), r.randrange(20, 90)
    m = mask_of(root, path)
    small = Image.fromarray(a_mask(m)).resize((w, h), Image.Resampling.NEAREST)
    small.save(m)
    resave(path, open_rgb(path).resize((w, h), Image.Resampling.BILINEAR), ".png")


# ---------------------------------------------------------------- one folder
def agreement(task):
    "Least correlation of brightness with class over the images with masks; 1 where a mask shows one class"
    least = 1.0
    for s in (task.labelled, task.val):
        for i in range(len(s)):
            batch = s.__getitems__([i])
            x, y = batch["image"][0].float().mean(0), batch["mask"][0]
            known = y != 255
            if known.sum() < 2 or len(y[known].unique()) < 2 or x[known].std() == 0: continue
            least = min(least, torch.corrcoef(torch.stack([x[known], y[known].float()]))[0, 1].item())
    return least


def trial(seed):
    "One mutated folder: (expectation, outcome, mutations, what was said)"
    r = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / r.choice(["data", "my data", "2024", "Ümlaut"])
        healthy(root, r.choice(["plain", "splits"]))
        chosen = []
        for _ in range(r.choice([1, 1, 2, 3])):
            kind = r.choice(["load", "load", "refuse", "either"])
            what = r.choice(sorted({"load": LOAD, "refuse": REFUSE, "either": EITHER}[kind]))
            before = shutil.copytree(root, Path(name) / "before", symlinks=True)
            try: {"load": LOAD, "refuse": REFUSE, "either": EITHER}[kind][what](root, r)
            except Exception:                                      # the mutations before it have left nothing to change
                shutil.rmtree(root)
                before.rename(root)
                continue
            shutil.rmtree(before)
            chosen.append((kind, what))
        kinds = [k for k, _ in chosen]
        expected = kinds[0] if len(chosen) == 1 else "load" if set(kinds) == {"load"} and not _clash(chosen) else "either"
        options = {"n_labelled": 2, "split_seed": r.randrange(3), "memory_limit": r.choice([0, 2e9]), "n_unlabelled": r.choice([None, 0])}
        if r.random() < 0.5: options |= {"size": r.choice([24, (30, 40)]), "fit": r.choice([None, "crop", "letterbox", "squash"])}
        said, outcome = "", "loaded"
        try:
            problems = check_folder(root).problems
            str(check_folder(root))
        except Exception: return expected, "traceback", chosen, traceback.format_exc()
        try:
            task = load_task("folder", root, **options)
            if problems: outcome, said = "wrong", f"the doctor said: {problems[0]}"
            worst = agreement(task)
            if worst < 0.6 and not any(k != "load" for k in kinds): outcome, said = "wrong", f"image and mask agree by {worst:.2f}"
            whole = load_split("folder", root, "val" if "val" in task.val.ids[0] else "train", size=options.get("size"), ids=task.val.ids, classes=task.classes, fit=task.reading.get("fit", "squash"))
            if not torch.equal(whole.images.index_select(0, torch.arange(len(whole))), task.val.images.index_select(0, torch.arange(len(task.val)))): outcome, said = "wrong", "load_split reads otherwise"
            path = next(i for i in check_folder(root).folder.items if i.id == task.labelled.ids[0]).image
            if not torch.equal(read_image(path, **task.reading), task.labelled.images.index_select(0, torch.tensor([0]))[0]): outcome, said = "wrong", "reading does not say how it was read"
        except UserError as e:
            outcome, said = "refused", str(e)
            if "\n" in said or len(said) > 1500 or not said.rstrip().endswith((".", ")", "?")): outcome = "wrong"
            if problems and said != problems[0]: outcome, said = "wrong", f"the doctor said: {problems[0]}; training: {said}"
        except Exception: return expected, "traceback", chosen, traceback.format_exc()
        return expected, outcome, chosen, said


def _clash(chosen):
    "Harmless things that are none together: 16 bits beside 8, two changes of all names or formats"
    return len({w for _, w in chosen}) > 1


def good(expected, outcome): return outcome in ("loaded", "refused") and (expected == "either" or (expected == "load") == (outcome == "loaded"))


def main(n=1000, first=0):
    warnings.simplefilter("ignore")
    start, counts, sentences, bad = time.time(), Counter(), set(), []
    for seed in range(first, first + n):
        expected, outcome, chosen, said = trial(seed)
        counts[f"{expected}: {outcome}"] += 1
        if outcome == "refused": sentences.add(" ".join(w for w in said.split() if "/" not in w and not any(c.isdigit() for c in w))[:60])
        if not good(expected, outcome):
            bad.append(seed)
            print(seed, expected, outcome, [w for _, w in chosen], said[-700:], flush=True)
    print(f"{n} folders in {time.time() - start:.0f} s: {dict(sorted(counts.items()))}; {len(bad)} bad: {bad}; about {len(sentences)} different sentences")
    return {"folders": n, "first_seed": first, "counts": dict(sorted(counts.items())), "tracebacks": sum(v for k, v in counts.items() if "traceback" in k),
            "bad": bad, "sentences": len(sentences), "mutations": {"load": len(LOAD), "refuse": len(REFUSE), "either": len(EITHER)}}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = main(*map(int, sys.argv[1:]))
    if len(sys.argv) == 1:
        from semiseg_nb.records import commit, versions
        text = json.dumps(found | {"commit": commit(), "versions": versions()}, indent=1) + "\n"
        atomic_write(ROOT / "results/benchmarks/mutated_folders.json", lambda f: f.write(text.encode()))
