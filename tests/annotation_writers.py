"""What annotation tools would have written for given masks: small writers for the tests of the importers."""
import base64
import json
from pathlib import Path
from xml.sax.saxutils import quoteattr

import numpy as np
from PIL import Image
from scipy import ndimage

from semiseg_nb.rasters import rle_text, run_lengths, trace_outlines
from semiseg_nb.scenes import CLASSES, make_scenes

NAMES = list(CLASSES)


def scene_pictures(n=5, size=48):
    "name -> (uint8 (H,W,3), uint8 (H,W)): scenes, one of them with a class 4 ring whose hole is background, a pinched pair and single pixels"
    images, masks = make_scenes(range(n), size=size)
    masks = masks.numpy().copy()
    masks[0, 2:9, 2:9], masks[0, 4:7, 4:7], masks[0, 5, 5] = 4, 0, 2
    masks[1, 0, 0], masks[1, 1, 1], masks[1, -1, -1] = 3, 3, 1
    return {f"scene {i}": (images[i].permute(1, 2, 0).numpy(), masks[i]) for i in range(n)}


def bits(value, n): return f"{int(value):0{n}b}"


def brush_rle(mask):
    "A mask in Label Studio's brush format: runs where a value repeats, else values one by one"
    flat = np.repeat(np.asarray(mask, bool).ravel(), 4).astype(int) * 255
    stream = bits(len(flat), 32) + bits(7, 5) + "".join(bits(n - 1, 4) for n in (3, 4, 8, 16))
    starts = np.flatnonzero(np.diff(flat, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(flat)]):
        for first in range(start, end, 2**16):
            n = min(2**16, end - first)
            size = next(i for i, b in enumerate((3, 4, 8, 16)) if n <= 2**b)
            if n > 2: stream += "1" + bits(size, 2) + bits(n - 1, (3, 4, 8, 16)[size]) + bits(flat[first], 8)
            else: stream += "0" + bits(0, 2) + bits(n - 1, 3) + bits(flat[first], 8) * n
    stream += "0" * (-len(stream) % 8)
    return [int(stream[i:i + 8], 2) for i in range(0, len(stream), 8)]


def objects(mask):
    "(class, bool (H,W)) of each connected piece that is no background"
    for v in np.unique(mask[mask > 0]).tolist():
        pieces, n = ndimage.label(mask == v)
        yield from ((v, pieces == k) for k in range(1, n + 1))


def keyhole(piece):
    "One outline for a piece with holes, as tools without holes write it: to the hole along a line, and back along the same line"
    first, *holes = sorted(trace_outlines(piece), key=lambda o: -np.ptp(o, 0).prod())
    points = [*first.tolist(), first[0].tolist()]
    for hole in holes: points += [*hole.tolist(), hole[0].tolist(), first[0].tolist()]
    return points


def save_images(folder, pictures, ending=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for name, (image, _) in pictures.items(): Image.fromarray(image).save(folder / f"{name}{ending}")


def coco(root, pictures, names=NAMES, form="polygon"):
    save_images(root / "images", pictures)
    images, rows = [], []
    for i, (name, (_, mask)) in enumerate(pictures.items(), 11):
        h, w = mask.shape
        images.append({"id": i, "file_name": f"{name}.png", "height": h, "width": w})
        for v, piece in objects(mask):
            shape = {"polygon": lambda p: [o.ravel().tolist() for o in trace_outlines(p)], "rle": lambda p: {"size": list(p.shape), "counts": run_lengths(p)},
                     "text": lambda p: {"size": list(p.shape), "counts": rle_text(run_lengths(p))}}[form](piece)
            y, x = np.nonzero(piece)
            rows.append({"id": len(rows) + 1, "image_id": i, "category_id": 10 * v, "segmentation": shape, "iscrowd": 0, "area": int(piece.sum()),
                         "bbox": [int(x.min()), int(y.min()), int(np.ptp(x)) + 1, int(np.ptp(y)) + 1]})
    categories = [{"id": 10 * v, "name": names[v]} for v in range(len(names) - 1, 0, -1)]
    (root / "annotations").mkdir()
    (root / "annotations/instances.json").write_text(json.dumps({"images": images, "annotations": rows, "categories": categories}))


def panoptic(root, pictures, names=NAMES):
    save_images(root / "images", pictures)
    (root / "panoptic_train").mkdir()
    images, rows = [], []
    for i, (name, (_, mask)) in enumerate(pictures.items(), 1):
        ids = np.zeros(mask.shape, np.int64)
        segments = [{"id": 300 * (v + 1) + 70000, "category_id": v + 1} for v in np.unique(mask).tolist()]
        for s in segments: ids[mask == s["category_id"] - 1] = s["id"]
        Image.fromarray(np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)).save(root / f"panoptic_train/{name}.png")
        images.append({"id": i, "file_name": f"{name}.png", "height": mask.shape[0], "width": mask.shape[1]})
        rows.append({"image_id": i, "file_name": f"{name}.png", "segments_info": segments})
    categories = [{"id": v + 1, "name": n, "isthing": 1, "color": [10 * v, 20, 30]} for v, n in enumerate(names)]
    (root / "panoptic_train.json").write_text(json.dumps({"images": images, "annotations": rows, "categories": categories}))


def labelme(root, pictures, names=NAMES, embedded=False, form="polygon"):
    save_images(root, pictures)
    for name, (_, mask) in pictures.items():
        shapes = []
        for v, piece in objects(mask):
            shape = {"label": names[v], "shape_type": form, "points": keyhole(piece), "group_id": None, "flags": {}}
            if form == "mask":
                y, x = np.nonzero(piece)
                box = piece[y.min():y.max() + 1, x.min():x.max() + 1]
                Image.fromarray(box).save(root / "crop.png")
                shape |= {"points": [[float(x.min()), float(y.min())], [float(x.max()), float(y.max())]], "mask": base64.b64encode((root / "crop.png").read_bytes()).decode()}
                (root / "crop.png").unlink()
            shapes.append(shape)
        path = root / f"{name}.png"
        data = base64.b64encode(path.read_bytes()).decode() if embedded else None
        if embedded: path.unlink()
        (root / f"{name}.json").write_text(json.dumps({"version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": f"..\\photos\\{name}.png", "imageData": data,
                                                       "imageHeight": mask.shape[0], "imageWidth": mask.shape[1]}))


def cvat(root, pictures, names=NAMES, form="polygon"):
    save_images(root / "images", pictures)
    lines = ['<?xml version="1.0" encoding="utf-8"?>', "<annotations><version>1.1</version><meta><task><labels>"]
    lines += [f"<label><name>{n}</name><color>#{40 * i:02x}8040</color></label>" for i, n in enumerate(names) if i] + ["</labels></task></meta>"]
    for i, (name, (_, mask)) in enumerate(pictures.items()):
        h, w = mask.shape
        lines.append(f"<image id=\"{i}\" name={quoteattr(name + '.png')} width=\"{w}\" height=\"{h}\">")
        for v, piece in objects(mask):
            if form == "polygon":
                points = ";".join(f"{x:.2f},{y:.2f}" for x, y in keyhole(piece))
                lines.append(f'<polygon label="{names[v]}" source="manual" occluded="0" points="{points}" z_order="0"></polygon>')
            else:
                y, x = np.nonzero(piece)
                box = piece[y.min():y.max() + 1, x.min():x.max() + 1]
                lines.append(f'<mask label="{names[v]}" rle="{", ".join(map(str, run_lengths(box, "C")))}" left="{x.min()}" top="{y.min()}" width="{box.shape[1]}" '
                             f'height="{box.shape[0]}" z_order="0"></mask>')
        lines.append("</image>")
    (root / "annotations.xml").write_text("\n".join([*lines, "</annotations>"]))


def yolo(root, pictures, names=NAMES, splits=None):
    "`splits`: name -> folder; None: images/ and labels/ without splits"
    for name, (image, mask) in pictures.items():
        part = splits[name] if splits else ""
        save_images(root / "images" / part, {name: (image, mask)})
        (root / "labels" / part).mkdir(parents=True, exist_ok=True)
        h, w = mask.shape
        lines = [f"{v - 1} " + " ".join(f"{x / w:.6f} {y / h:.6f}" for x, y in keyhole(piece)) for v, piece in objects(mask)]
        (root / "labels" / part / f"{name}.txt").write_text("\n".join(lines) + "\n")
    listed = "\n".join(f"  {i}: {n}" for i, n in enumerate(names[1:]))
    (root / "data.yaml").write_text(f"path: .\ntrain: images/train\nval: images/val\nnames:\n{listed}\n")


def studio(root, pictures, names=NAMES, form="polygonlabels"):
    tasks = []
    for i, (name, (image, mask)) in enumerate(pictures.items()):
        h, w = mask.shape
        result = []
        for v, piece in objects(mask):
            value = {"points": [[100 * x / w, 100 * y / h] for x, y in keyhole(piece)], "closed": True} if form == "polygonlabels" else {"format": "rle", "rle": brush_rle(piece)}
            result.append({"type": form, "original_width": w, "original_height": h, "image_rotation": 0, "value": value | {form: [names[v]]}, "id": str(len(result))})
        stored = f"{i:08x}-{name.replace(' ', '_')}.png"
        save_images(root / "upload", {Path(stored).stem if i % 2 else name.replace(" ", "_"): (image, mask)})
        tasks.append({"id": i, "data": {"image": f"/data/upload/1/{stored}"}, "annotations": [{"id": i, "was_cancelled": False, "result": result}]})
    (root / "project-1.json").write_text(json.dumps(tasks))


PALETTE = np.array([(0, 0, 0), (128, 64, 128), (70, 130, 180), (220, 20, 60), (107, 142, 35)], np.uint8)


def colours(root, pictures, names=NAMES, table=True):
    save_images(root / "photos", pictures)
    (root / "masks").mkdir()
    for name, (_, mask) in pictures.items(): Image.fromarray(PALETTE[mask]).save(root / f"masks/{name}.png")
    lines = [f"{n}:{','.join(map(str, c.tolist()))}::" for n, c in zip(names, PALETTE)]
    if table: (root / "labelmap.txt").write_text("\n".join(["# label:color_rgb:parts:actions", *lines]) + "\n")


def ids(root, pictures, scale=1, suffix=""):
    "Masks beside their images with a suffix, or in masks/; values times `scale`"
    save_images(root if suffix else root / "images", pictures, ".jpg")
    folder = root if suffix else root / "masks"
    folder.mkdir(parents=True, exist_ok=True)
    for name, (_, mask) in pictures.items(): Image.fromarray(mask * np.uint8(scale)).save(folder / f"{name}{suffix}.png")
