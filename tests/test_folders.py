"""One's own images: reading, layouts, mistakes in one sentence, the doctor, splits."""
import io
import json
import random
import re
import struct
import sys
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import mask, official_folder, picture, plain_folder
from PIL import Image

from semiseg_nb.catalogue import load_split, load_task
from semiseg_nb.core import UserError
from semiseg_nb.doctor import check_folder
from semiseg_nb.folders import PICTURES, cut
from semiseg_nb.pictures import image_size, read_image, read_mask


@pytest.fixture
def plain(tmp_path): return plain_folder(tmp_path)


@pytest.fixture
def official(tmp_path): return official_folder(tmp_path)


# ---------------------------------------------------------------- splits
def test_cut_takes_labels_from_the_front_and_tuning_from_the_end():
    assert cut(list("abcdef"), ["z"], 2, n_tune=1) == (["a", "b"], ["c", "d", "e", "z"], ["f"])
    assert cut(list("abcdef"), [], 2, n_unlabelled=2) == (["a", "b"], ["c", "d"], [])
    assert cut(list("abc"), [], None, n_unlabelled=0) == (["a", "b", "c"], [], [])


@pytest.mark.parametrize("order, options, says", [
    ("abc", {"n_labelled": 4}, "n_labelled is 4, but only 3 .* at most 3"),
    ("abc", {"n_labelled": 3, "n_tune": 1}, "n_labelled is 3, but only 2 .* when 1 are set aside"),
    ("abc", {"n_labelled": 0}, "n_labelled is 0: at least one"),
    ("", {"n_labelled": 1}, "no labelled image"),
    ("abc", {"n_labelled": 3}, "no unlabelled image: all 3"),
    ("abc", {"n_labelled": 1, "n_tune": 4}, "n_tune is 4: choose 0 to 3"),
    ("abc", {"n_labelled": 1, "n_tune": 3}, "no labelled image: 3 .* when 3 are set aside"),
    ("abc", {"n_labelled": 1, "n_unlabelled": 5}, "n_unlabelled is 5, but 2 images are left"),
])
def test_cut_refuses_numbers_that_do_not_fit(order, options, says):
    with pytest.raises(UserError, match=says): cut(list(order), [], **options)


def test_plain_folder_carves_a_validation_set(plain):
    task = load_task("folder", plain, n_labelled=None, split_seed=2)
    assert (len(task.labelled), len(task.unlabelled), len(task.val)) == (8, 10, 2)
    assert task.classes == ("class 0", "class 1", "class 2") and task.size == (12, 16)
    assert task.split_id != load_task("folder", plain, n_labelled=None, split_seed=0).split_id
    (plain / "classes.txt").write_text("sky\n\nroad\ncar\nbike\n")
    assert load_task("folder", plain, n_labelled=3).classes == ("sky", "road", "car", "bike")


# ---------------------------------------------------------------- reading
def test_palette_masks_keep_their_ids(tmp_path):
    truth = mask(tmp_path / "m.png", values=(0, 3, 255))
    assert torch.equal(read_mask(tmp_path / "m.png"), truth)
    assert set(read_mask(tmp_path / "m.png", (5, 7)).unique().tolist()) <= {0, 3, 255}
    table = torch.arange(255, -1, -1).to(torch.uint8)
    assert torch.equal(read_mask(tmp_path / "m.png", table=table), 255 - truth)


def test_other_kinds_of_files(tmp_path):
    a = (np.arange(192).reshape(12, 16) * 300).astype(np.uint16)
    Image.fromarray(a).save(tmp_path / "deep.png")
    deep = read_image(tmp_path / "deep.png")
    assert deep.shape == (3, 12, 16) and deep.max() == round(191 * 300 / 65535 * 255) and torch.equal(deep[0], deep[2])
    assert read_image(tmp_path / "deep.png", stretch=True).max() == 255
    Image.fromarray(a > 9000).save(tmp_path / "one_bit.png")
    assert torch.equal(read_mask(tmp_path / "one_bit.png"), torch.from_numpy(a > 9000).to(torch.uint8))
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (16, 12)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (3, 16, 12) and image_size(tmp_path / "turned.jpg") == (16, 12)


def test_stretch_spreads_a_dark_image(tmp_path):
    a = np.random.default_rng(0).integers(2, 12, (40, 40), dtype=np.uint8)
    Image.fromarray(a).save(tmp_path / "dark.png")
    dark, bright = read_image(tmp_path / "dark.png"), read_image(tmp_path / "dark.png", stretch=True)
    assert dark.max() < 12 and bright.min() == 0 and bright.max() == 255
    low, high = np.percentile(np.repeat(a[..., None], 3, 2).astype(np.float32), (1, 99.8))
    assert np.abs(bright[0].numpy() - np.clip((a - low) / (high - low), 0, 1) * 255).max() <= .5 + 1e-3
    Image.new("L", (4, 4), 7).save(tmp_path / "flat.png")
    assert read_image(tmp_path / "flat.png", stretch=True).unique().tolist() == [7]


# ---------------------------------------------------------------- mistakes: one sentence that names the file
def truncate(path):
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])


def jpeg_truncated(root):
    (root / "images/p15.png").unlink()
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(buffer, "JPEG")
    (root / "images/p15.jpg").write_bytes(buffer.getvalue()[:-40])


def rgb_mask(root): Image.new("RGB", (16, 12), (255, 0, 0)).save(root / "masks/p03.png")
def tenbit_mask(root): Image.fromarray(np.full((12, 16), 700, np.uint16)).save(root / "masks/p03.png")
def all_255(root):
    for i in range(10): mask(root / "masks" / f"p{i:02d}.png", values=(0, 255))
def shades(root):
    for i in range(10): mask(root / "masks" / f"p{i:02d}.png", values=(0, 85, 170))
def empty_masks(root):
    for i in range(10): mask(root / "masks" / f"p{i:02d}.png", values=(0,))


PLAIN = [  # what is done to the folder, what the sentence must say
    (lambda r: (r / "masks/q99.png").write_bytes(b""), "Mask '.*q99.png' has no image"),
    (lambda r: (r / "images/p03.png").unlink(), "Mask '.*p03.png' has no image"),
    (lambda r: mask(r / "masks/p03.png", size=(12, 15)), "p03.png' is 15 x 12 pixels, but its image 'p03.png' is 16 x 12"),
    (rgb_mask, "Mask '.*p03.png' is a colour picture .mode RGB."),
    (tenbit_mask, "Mask '.*p03.png' holds the value 700"),
    (all_255, "hold only the values 0 and 255.* write 1, not 255"),
    (shades, "value 170.*grey shades"),
    (empty_masks, "only the value 0"),
    (lambda r: truncate(r / "images/p15.png"), "p15.png' cannot be read"),
    (jpeg_truncated, "p15.jpg' cannot be read .*truncated"),
    (lambda r: (r / "images/p15.png").write_bytes(b"hello"), "p15.png' cannot be read"),
    (lambda r: (r / "images/p15.png").write_bytes(b""), "p15.png' cannot be read"),
    (lambda r: truncate(r / "masks/p03.png"), "p03.png' cannot be read"),
    (lambda r: picture(r / "images/p15.jpg"), "'.*p15.png' and 'p15.jpg' have the same name"),
    (lambda r: picture(r / "images/p15.png", size=(9, 9)), "p15.png' is 9 x 9 pixels.* give a size"),
    (lambda r: (r / "masks/p03.png").rename(r / "masks/p03.jpg"), "p03.jpg' is a JPEG .* save it as PNG"),
    (lambda r: (r / "classes.txt").write_text("sky\nroad"), "holds the value 2, but with 2 classes the values are 0 to 1"),
    (lambda r: (r / "classes.txt").write_text("sky"), "classes.txt' names 1 class"),
    (lambda r: [(r / "masks" / f"p{i:02d}.png").unlink() for i in range(9)], "holds 1 mask.s. .* at least two"),
    (lambda r: [p.unlink() for p in (r / "images").iterdir()] + [p.unlink() for p in (r / "masks").iterdir()], "holds no training image"),
    (lambda r: (r / "images").rename(r / "pictures"), "has no folder 'images'"),
    (lambda r: (r / "images/test").mkdir(), "has the folders test, but none called 'train'"),
    (lambda r: (r / "dataset.json").write_text("{"), "dataset.json"),
    (lambda r: (r / "dataset.json").write_text("[1, 2]"), "dataset.json"),
    (lambda r: (r / "dataset.json").write_text('{"classes": [{"id": 1, "name": "a"}, {"id": 0, "name": "b"}]}'), "order of their ids"),
    (lambda r: (r / "dataset.json").write_text('{"classes": ["a", "b"]}'), "with 2 classes the values are 0 to 1"),
]


@pytest.mark.parametrize("limit", [0, 2e9])
@pytest.mark.parametrize("spoil, says", PLAIN)
def test_each_mistake_in_a_plain_folder_is_one_sentence(plain, spoil, says, limit):
    load_task("folder", plain, n_labelled=None, memory_limit=limit)
    spoil(plain)
    with pytest.raises(UserError, match=says) as e: load_task("folder", plain, n_labelled=None, memory_limit=limit)
    assert "\n" not in str(e.value) and e.value.__suppress_context__ | (e.value.__context__ is None)


OFFICIAL = [
    (lambda r: (r / "masks/train/t2.png").unlink(), {}, "Image '.*t2.png' has no mask: expected one at '.*masks/train/t2.png'"),
    (lambda r: (r / "masks/val/v1.png").unlink(), {}, "Image '.*v1.png' has no mask"),
    (lambda r: (r / "images/train/t2.png").unlink() or (r / "masks/train/t2.png").unlink(), {}, "lists 't2'"),
    (lambda r: mask(r / "masks/train/t2.png", values=(0, 1, 7)), {}, "t2.png' holds the value 7, but with 3 classes .* 0 to 2"),
    (lambda r: mask(r / "masks/train/t2.png", values=(0, 76, 150)), {}, "values? 76, 150.*grey shades"),
    (lambda r: [p.unlink() for d in ("images", "masks") for p in (r / d / "val").iterdir()], {}, "val' holds no image"),
    (lambda r: None, {"split_seed": 5}, "split_seed 5 is not in '.*', which has seed0, seed1"),
    (lambda r: None, {"n_labelled": 99}, "n_labelled is 99, but only 12"),
    (lambda r: None, {"n_labelled": 12}, "no unlabelled image"),
    (lambda r: None, {"n_labelled": 0}, "at least one labelled"),
    (lambda r: None, {"size": "big"}, "size 'big' is not a size"),
    (lambda r: None, {"extra_unlabelled": "far"}, "split 'far' is not known"),
    (lambda r: None, {"unlabelled_from": "far"}, "split 'far' is not known"),
    (lambda r: None, {"unlabelled_from": "train"}, "unlabelled_from 'train' .* neither train nor val"),
    (lambda r: None, {"unlabelled_from": "weak", "extra_unlabelled": "ood"}, "exclude each other"),
    (lambda r: None, {"unlabelled_from": "weak", "n_unlabelled": 4}, "n_unlabelled is 4, but 3 images"),
    (lambda r: [p.unlink() for p in (r / "images/weak").iterdir()], {"unlabelled_from": "weak"}, "images/weak' holds no image"),
]


@pytest.mark.parametrize("spoil, options, says", OFFICIAL)
def test_each_mistake_in_an_official_folder_is_one_sentence(official, spoil, options, says):
    spoil(official)
    with pytest.raises(UserError, match=says) as e: load_task("folder", official, **{"n_labelled": 4, **options})
    assert "\n" not in str(e.value)


def test_wrong_names_and_roots(tmp_path):
    with pytest.raises(UserError, match=r"dataset 'scense' is not known .*did you mean 'scenes'"): load_task("scense")
    with pytest.raises(UserError, match="nowhere' does not exist"): load_task("folder", tmp_path / "nowhere")
    with pytest.raises(UserError, match="needs data_root"): load_task("folder")


# ---------------------------------------------------------------- the mask doctor
def test_doctor_on_a_healthy_folder(official):
    report = check_folder(official)
    assert report.ok and "No problem found" in str(report) and report.counts["train"]["images"] == 12
    assert report.shares["train"].sum() == pytest.approx(1) and report.shown["train"].tolist() == [12, 12, 12]


def test_doctor_lists_every_problem_not_only_the_first(plain):
    mask(plain / "masks/p01.png", size=(12, 15))
    rgb_mask(plain)
    truncate(plain / "images/p15.png")
    (plain / "masks/q99.png").write_bytes(b"")
    (plain / "images/p19.png").write_bytes((plain / "images/p18.png").read_bytes())
    report = check_folder(plain)
    for name in ("p01.png", "p03.png", "p15.png", "q99.png"): assert sum(name in p for p in report.problems) == 1
    assert len(report.problems) == 4 and any("same picture" in n for n in report.notes)


def test_doctor_sees_values_and_leaks(official):
    mask(official / "masks/train/t2.png", values=(0, 7))
    mask(official / "masks/train/t5.png", values=(0, 9))
    (official / "masks/val/v1.png").unlink()
    (official / "images/val/v0.png").write_bytes((official / "images/train/t1.png").read_bytes())
    problems = "\n".join(check_folder(official).problems)
    assert "value 7" in problems and "value 9" in problems and "v1.png' has no mask" in problems
    assert "t1.png' and '" in problems and "tested on what it was trained on" in problems
    assert not check_folder(official / "nowhere").ok


def test_doctor_does_not_call_blank_tiles_a_leak(official):
    for path in ("images/train/t1.png", "images/val/v0.png"): Image.new("RGB", (16, 12)).save(official / path)
    report = check_folder(official)
    assert report.ok and sum("one flat colour" in n for n in report.notes) == 2


# ---------------------------------------------------------------- folders as people have them
def refused(root, says, **options):
    "Training and the doctor refuse alike, in one sentence"
    with pytest.raises(UserError, match=says) as e: load_task("folder", root, **{"n_labelled": 3, **options})
    assert "\n" not in str(e.value)
    assert any(re.search(says, p) for p in check_folder(root).problems)


def disc(size=48):
    y, x = np.mgrid[:size, :size]
    return ((x - 20) ** 2 + (y - 25) ** 2 < 150).astype(np.uint8)


def write_masks(root, make, n=10, size=48):
    for i in range(20): picture(root / "images" / f"p{i:02d}.png", (size, size), seed=i)
    (root / "masks").mkdir(exist_ok=True)
    for i in range(n): make(i, root / "masks" / f"p{i:02d}.png")
    return root


def through_jpeg(a):
    buffer = io.BytesIO()
    Image.fromarray(a).save(buffer, "JPEG", quality=20)
    return Image.open(buffer)


def test_blurred_masks_are_refused(tmp_path):
    small = (Image.fromarray(disc() * 255).resize((24, 24), Image.BILINEAR)).resize((48, 48), Image.BILINEAR)
    for name, blurred in (("smooth", small), ("jpeg", through_jpeg(disc() * 255))):
        (tmp_path / name).mkdir()
        refused(write_masks(tmp_path / name, lambda i, p, b=blurred: b.save(p)), r"holds \d+ values, most of them in a few pixels, and so do 9 others.* 0, 255 look like classes")


def test_many_real_classes_are_not_called_blurred(tmp_path):
    r = np.random.default_rng(0)
    def make(i, p): Image.fromarray(np.kron(r.integers(0, 120, (3, 3)), np.ones((16, 16))).astype(np.uint8)).save(p)
    assert load_task("folder", write_masks(tmp_path, make), n_labelled=3).n_classes > 60


def test_zero_and_one_beside_zero_and_255_are_refused(tmp_path):
    refused(write_masks(tmp_path, lambda i, p: Image.fromarray(disc() * (255 if i % 2 else 1)).save(p)), r"holds 0 and 1, but .* hold 0 and 255")


def test_unknown_pixels_beside_one_class_are_not(tmp_path):
    def make(i, p):
        a = disc()
        a[:3] = 255
        Image.fromarray(a).save(p)
    assert load_task("folder", write_masks(tmp_path, make), n_labelled=3).n_classes == 2


def test_palettes_that_number_their_colours_anew_are_refused(tmp_path):
    def make(i, p):
        a = Image.fromarray(1 - disc() if i % 2 else disc())
        a.putpalette([0, 0, 0, 240, 180, 40][:: 1] if i % 2 == 0 else [240, 180, 40, 0, 0, 0])
        a.save(p)
    refused(write_masks(tmp_path, make), r"The colour \(.*\) is the value . in .*, but . in .*: the palettes number")


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "webp"])
def test_upright_masks_of_turned_pictures(tmp_path, ending):
    for flag in (1, 3, 6, 8):
        root, exif = tmp_path / str(flag), Image.Exif()
        exif[274] = flag
        for i in range(8):
            picture(root / "images" / f"p{i}.{ending}", seed=i)
            x = Image.open(root / "images" / f"p{i}.{ending}").convert("RGB")
            x.save(root / "images" / f"p{i}.{ending}", exif=exif)
            if i < 4: mask(root / "masks" / f"p{i}.png", size=(16, 12) if flag > 4 else (12, 16), seed=i)
        task = load_task("folder", root, n_labelled=2)
        assert task.size == ((16, 12) if flag > 4 else (12, 16)) and check_folder(root).ok
        if flag < 5: continue
        for i in range(4): mask(root / "masks" / f"p{i}.png", seed=i)
        refused(root, "the camera held the picture on its side", n_labelled=2)


@pytest.mark.parametrize("factor, white", [(1, 255), (16, 4095), (257, 65535)])
def test_every_depth_reaches_training_with_its_contrast(plain, factor, white):
    for p in (plain / "images").glob("*.png"): Image.fromarray(np.asarray(Image.open(p).convert("L")).astype(np.uint16) * factor).save(p)
    dark = plain / "images/p03.png"
    Image.fromarray((np.asarray(Image.open(dark)) // 8).astype(np.uint16)).save(dark)
    task, report = load_task("folder", plain, n_labelled=None), check_folder(plain)
    assert len(task.labelled.images.unique()) > 150 and task.unlabelled.images.max() > 240
    assert not any("flat" in n for n in report.notes) and any(f"the value {white} becomes white" in n for n in report.notes)
    every = dict(zip(task.labelled.ids + task.val.ids, [*task.labelled.images, *task.val.images]))
    assert every["p03"].max() < 40, "the same white for the whole folder: a dark picture stays dark"


def test_nan_is_unknown_and_fractions_are_refused(plain):
    for p in list((plain / "masks").glob("*.png")):
        a = np.asarray(Image.open(p)).astype(np.float32)
        a[:3] = np.nan
        p.unlink()
        Image.fromarray(a).save(p.with_suffix(".tif"))
    task = load_task("folder", plain, n_labelled=3)
    assert task.labelled.masks[:, :3].unique().tolist() == [255] and task.n_classes == 3
    Image.fromarray(np.full((12, 16), 0.5, np.float32)).save(plain / "masks/p01.tif")
    refused(plain, r"p01.tif' holds the value 0.5, which is no whole number")


def test_classes_come_from_all_masks_of_the_folder(plain):
    mask(plain / "masks/p07.png", values=(0, 1, 2, 3))
    assert {load_task("folder", plain, n_labelled=3, split_seed=s).n_classes for s in range(6)} == {4}
    assert load_split("folder", plain, "train", ids=["p01", "p02"]).n_classes == 4


def test_what_is_not_used_is_noted_with_number_and_reason(official):
    for i in range(3):
        picture(official / f"images/train/extra{i}.png")
        (official / f"images/train/extra{i}.png").rename(official / f"images/train/extra{i}.heic")
        picture(official / f"images/loose{i}.png")
        picture(official / f"images/train/camera/n{i}.png")
        (official / f"images/train/gone{i}.png").symlink_to("/nowhere/x.png")
        mask(official / f"masks/test/t{i}.png")
    (official / "images/train/Thumbs.db").write_bytes(b"")
    with pytest.warns(UserWarning) as said: task = load_task("folder", official, n_labelled=4)
    notes = check_folder(official).notes
    assert len(task.unlabelled) == 8 and len(notes) == 5 and all(n.startswith("3 file(s) in ") and n in str(said[0].message) for n in notes)
    for reason in (r"'\.heic', which is not read", "lie in the folder 'camera'", "links to files that do not exist", "beside the folders of the splits", "no folder 'images/test'"):
        assert sum(bool(re.search(reason, n)) for n in notes) == 1, reason


def test_names_that_look_alike_match(plain):
    for kind, form in (("images", "NFD"), ("masks", "NFC")):
        for p in (plain / kind).glob("*.png"): p.rename(p.with_name(unicodedata.normalize(form, "é " + p.name)))
    names = [unicodedata.normalize("NFD", f"é p{i:02d}") for i in range(9)]
    held = load_task("folder", plain, n_labelled=None).val.ids
    task = load_task("folder", plain, n_labelled=3, label_order=[n for n in names if unicodedata.normalize("NFC", n) not in held])
    assert len(task.labelled) == 3 and len(task.unlabelled) == 15 and check_folder(plain).ok


def test_layouts_that_are_not_known(tmp_path, plain):
    (plain / "masks").rename(plain / "labels")
    refused(plain, r"has no folder 'masks', only images, labels.*known layouts are")
    archive = tmp_path / "data.zip"
    archive.write_bytes(b"PK")
    refused(archive, "is a file: unpack it")
    (tmp_path / "outer").mkdir()
    (plain / "images").rename(tmp_path / "outer/images")
    refused(tmp_path, r"has no folder 'images' \(is it '.*outer'\?\)")


def test_a_picture_that_trains_and_tests_is_refused_or_allowed(official):
    (official / "images/val/v0.png").write_bytes((official / "images/train/t1.png").read_bytes())
    refused(official, "are the same picture: a model would be tested on what it was trained on")
    assert len(load_task("folder", official, n_labelled=3, copies_allowed=True).val) == 3


def test_small_things_of_data_folders(tmp_path, plain):
    (plain / "classes.txt").write_bytes(b"\xef\xbb\xbfsky\nroad\ncar\n")
    assert load_task("folder", plain, n_labelled=3).classes == ("sky", "road", "car")
    info = {"classes": [{"id": 0}, {"id": 1, "name": "b", "color": "#ff8000"}, "c"]}
    (plain / "dataset.json").write_text(json.dumps(info), encoding="utf-8-sig")
    task = load_task("folder", plain, n_labelled=3)
    assert task.classes == ("class 0", "b", "c") and task.palette[1] == (255, 128, 0)
    (plain / "2024").mkdir()
    for kind in ("images", "masks"): (plain / kind).rename(plain / "2024" / kind)
    assert load_task("folder", plain / "2024", n_labelled=3).name == "2024"
    for p in [*(plain / "2024").rglob("*.png")]: p.rename(p.with_name(p.name.replace("p", "img ", 1)))
    order = tmp_path / "order.txt"
    held = load_task("folder", plain / "2024", n_labelled=None).val.ids
    order.write_text("\n".join(f"img {i:02d}" for i in range(9) if f"img {i:02d}" not in held))
    assert len(load_task("folder", plain / "2024", n_labelled=2, label_order=order).labelled) == 2


def test_forbidden_is_not_called_broken(plain, monkeypatch):
    "No advice to remove a file that only may not be read"
    def forbidden(*a, **k): raise PermissionError(13, "Permission denied", str(plain / "images/p03.png"))
    for spoil in ((Image, "open"), (Path, "iterdir"), (Path, "read_bytes")):
        (plain / "classes.txt").write_text("a\nb\nc\n")
        with monkeypatch.context() as m:
            m.setattr(*spoil, forbidden)
            with pytest.raises(UserError, match=r"permission denied\): give your account the right") as e: load_task("folder", plain, n_labelled=3)
            assert "remove" not in str(e.value)


# ---------------------------------------------------------------- odd manifests: a seeded fuzz
DEEP = "[" * 3000 + "]" * 3000
ODD = ["null", "true", "0", "-1", "1e999", "1" + "0" * 400, "9" * 5000, '""', '"a"', '"\\u0000"', '"../x"', "[]", "{}", "[[]]", '[{"id": 0}]', '{"seed0": 5}', '{"seed0": [1, null]}',
       '{"seed0": ["t0", "t0"]}', '["a", "a"]', '["a", 5]', '[{"id": true, "name": "a"}, {"id": 1}]', '[{"id": 0, "name": "a", "color": [1, 2]}, "b"]', '[{"id": 0, "color": "red"}, "b"]',
       '{"w0": [true]}', '{"w0": [1.5]}', '{"w0": {"a": 1}}', '{"w0": [[0]]}', "NaN", DEEP, '"' + "x" * 5000 + '"']
ENTRIES = ["name", "classes", "label_order", "weak_labels", "loading_hint"]


def mutated(kind, raw, r):
    "One manifest gone wrong: an entry of another kind, bytes flipped, cut, doubled, or no text at all"
    how = r.choice(["entry", "entry", "flip", "cut", "binary", "whole"] if kind == "json" else ["flip", "cut", "binary", "whole"])
    if how == "entry":
        name, odd = r.choice(ENTRIES), r.choice(ODD)
        rest = {k: v for k, v in json.loads(raw).items() if k != name}
        return (json.dumps(rest)[:-1] + f', "{name}": {odd}}}').encode()
    if how == "whole": return r.choice(ODD).encode()
    if how == "cut": return raw[: r.randrange(len(raw))]
    if how == "binary": return bytes(r.randrange(256) for _ in range(r.randrange(200)))
    raw = bytearray(raw)
    for _ in range(r.randrange(1, 6)): raw[r.randrange(len(raw))] = r.randrange(256)
    return bytes(raw)


def test_any_odd_manifest_is_one_sentence_that_names_it(official):
    "200 mutations of dataset.json, classes.txt and lists: a task, or a UserError, and the doctor never stops"
    r, orders = random.Random(0), official / "order.txt"
    good = {"dataset.json": (official / "dataset.json").read_bytes(), "classes.txt": b"sky\nroad\ncar\n",
            "order.txt": b"t3\nt5\nt1\nt0\n", "order.json": b'["t3", "t5", "t1", "t0"]'}
    refusals = 0
    for k in range(200):
        name = r.choice(list(good))
        for other, raw in good.items(): (official / other).write_bytes(raw)
        if name == "classes.txt": (official / "dataset.json").unlink()
        (official / name).write_bytes(mutated("json" if name == "dataset.json" else "text", good[name], r))
        orders = official / name if name.startswith("order") else None
        try: load_task("folder", official, n_labelled=2, unlabelled_from="weak", label_order=orders).describe()
        except UserError as e:
            refusals += 1
            assert "\n" not in str(e) and len(str(e)) < 1200, (k, str(e)[:300])
            assert name in str(e) or any(w in str(e) for w in ("label_order names", "with 2 classes", "training images", "no labelled image", "split_seed")), (k, name, str(e)[:300])
        if not name.startswith("order") and k % 10 == 0: str(check_folder(official))
    assert 100 < refusals < 200


# ---------------------------------------------------------------- reading: kinds of files
def every(task): return dict(zip(task.labelled.ids + task.val.ids, [*task.labelled.images, *task.val.images]))


def png16(path, a):
    "A PNG file of 16 bits in each of three colours, which PIL does not write"
    def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", a.shape[1], a.shape[0], 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in a)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_sixteen_bits_in_each_colour_keep_their_levels(plain, ending):
    "A camera of 12 bits in colour: PIL alone would keep the upper byte, 16 levels"
    for p in sorted((plain / "images").glob("*.png")):
        a = np.asarray(Image.open(p)).astype(np.uint16) * 16
        p.unlink()
        if ending == "png": png16(p, a)
        else:
            rasterio = pytest.importorskip("rasterio")
            with rasterio.open(p.with_suffix(".tif"), "w", driver="GTiff", width=16, height=12, count=3, dtype="uint16") as f: f.write(a.transpose(2, 0, 1))
    task = load_task("folder", plain, n_labelled=3)
    assert task.reading == {"white": 4095} and len(task.labelled.images.unique()) > 150 and task.unlabelled.images.max() > 240
    assert not torch.equal(task.labelled.images[:, 0], task.labelled.images[:, 2])


@pytest.mark.parametrize("flag", range(1, 9))
def test_orientation_of_what_pil_cannot_hold(tmp_path, flag):
    rasterio = pytest.importorskip("rasterio")
    picture(tmp_path / "a.png")
    exif = Image.Exif()
    exif[274] = flag
    Image.open(tmp_path / "a.png").save(tmp_path / "turned.png", exif=exif)
    a = np.asarray(Image.open(tmp_path / "a.png")).astype(np.uint16) * 257
    with rasterio.open(tmp_path / "deep.tif", "w", driver="GTiff", width=16, height=12, count=3, dtype="uint16") as f: f.write(a.transpose(2, 0, 1))
    raw = bytearray((tmp_path / "deep.tif").read_bytes())
    at = struct.unpack("<I", raw[4:8])[0]                        # the last entry of the directory becomes the flag (274, one short)
    n = struct.unpack("<H", raw[at:at + 2])[0]
    tags = [raw[at + 2 + 12 * i: at + 14 + 12 * i] for i in range(n)]
    keep = [t for t in tags if struct.unpack("<H", t[:2])[0] < 320][:-1] if n > 12 else tags
    new = sorted([*keep, struct.pack("<HHIHH", 274, 3, 1, flag, 0)], key=lambda t: struct.unpack("<H", t[:2])[0])
    raw[4:8] = struct.pack("<I", len(raw))
    raw += struct.pack("<H", len(new)) + b"".join(bytes(t) for t in new) + b"\0\0\0\0"
    (tmp_path / "deep.tif").write_bytes(bytes(raw))
    assert torch.equal(read_image(tmp_path / "deep.tif", white=65535), read_image(tmp_path / "turned.png"))


def test_many_channels_are_refused_or_chosen(plain):
    rasterio = pytest.importorskip("rasterio")
    r = np.random.default_rng(0)
    for p in sorted((plain / "images").glob("*.png")):
        a = r.integers(0, 250, (5, 12, 16)).astype(np.uint8)
        p.unlink()
        with rasterio.open(p.with_suffix(".tif"), "w", driver="GTiff", width=16, height=12, count=5, dtype="uint8") as f: f.write(a)
    refused(plain, r"p00.tif' has 5 channels.*choose three, such as bands=\[1, 2, 3\]")
    task, other = (load_task("folder", plain, n_labelled=3, bands=b) for b in ([5, 1, 2], [4, 1, 2]))
    with rasterio.open(plain / "images" / f"{task.labelled.ids[0]}.tif") as f: truth = f.read([5, 1, 2])
    assert np.array_equal(task.labelled.images[0].numpy(), truth) and task.reading == {"bands": [5, 1, 2]} and task.fingerprint != other.fingerprint
    assert torch.equal(load_split("folder", plain, "train", ids=task.labelled.ids, bands=[5, 1, 2]).images, task.labelled.images)
    for bands, says in (([1, 2, 9], "but '.*p00.tif' has 5 channel"), ([0, 1, 2], r"bands is \[0, 1, 2\]: give three"), ([1, 2], "give three"), ("rgb", "bands is 'rgb'")):
        with pytest.raises(UserError, match=says): load_task("folder", plain, n_labelled=3, bands=bands)
    with pytest.raises(UserError, match="only the dataset 'folder'"): load_task("scenes", bands=[1, 2, 3])


def test_without_rasterio_the_remedy_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rasterio", None)
    (tmp_path / "a.tif").write_bytes(b"II*\0" + b"\0" * 40)
    with pytest.raises(UserError, match=r"a.tif' .*rasterio reads: pip install semiseg_nb\[geo\]"): read_image(tmp_path / "a.tif")


def test_transparency_that_hides_colours_is_refused_and_a_whole_one_dropped(plain):
    path = plain / "images/p03.png"
    x = Image.open(path).convert("RGBA")
    x.save(path)
    assert torch.equal(every(load_task("folder", plain, n_labelled=None))["p03"], torch.from_numpy(np.array(x.convert("RGB"))).permute(2, 0, 1))
    x.putpixel((0, 0), (1, 2, 3, 0))
    x.save(path)
    refused(plain, "p03.png' has 4 channels")
    assert every(load_task("folder", plain, n_labelled=None, bands=[1, 2, 3]))["p03"][:, 0, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("spoil, says", [
    (lambda a, p: Image.fromarray(np.where(a > np.median(a), np.nan, a).astype(np.float32)).save(p.with_suffix(".tif")), r"p03.tif' holds NaN or infinity in \d+ places"),
    (lambda a, p: Image.fromarray(a).save(p.with_suffix(".gif"), save_all=True, append_images=[Image.fromarray(255 - a)]), "p03.gif' holds 2 pictures"),
    (lambda a, p: Image.fromarray(a).save(p.with_suffix(".tif"), save_all=True, append_images=[Image.fromarray(255 - a)] * 3), "p03.tif' holds 4 pictures"),
])
def test_images_that_are_no_single_picture(plain, spoil, says):
    path = plain / "images/p03.png"
    a = np.asarray(Image.open(path).convert("L"))
    path.unlink()
    spoil(a, path)
    refused(plain, says)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_a_mask_that_is_a_jpeg_behind_another_ending(plain, kind):
    buffer = io.BytesIO()
    Image.open(plain / "masks/p03.png").convert("L").save(buffer, kind, **({"quality": 90} if kind == "JPEG" else {"lossless": False}))
    (plain / "masks/p03.png").write_bytes(buffer.getvalue())
    refused(plain, f"p03.png' is a {kind} file, which blurs|p03.png' is a colour picture")


def test_one_blurred_mask_among_sharp_ones_is_found(tmp_path):
    def make(i, p): (through_jpeg(disc() * 200) if i == 4 else Image.fromarray(disc())).save(p)
    refused(write_masks(tmp_path, make), r"p04.png' holds \d+ values, most of them in a few pixels")


def test_negative_values_keep_their_place(plain):
    for p in sorted((plain / "images").glob("*.png")):
        a = np.asarray(Image.open(p).convert("L")).astype(np.float32) * 12 - 1000      # Hounsfield units
        p.unlink()
        Image.fromarray(a).save(p.with_suffix(".tif"))
    task = load_task("folder", plain, n_labelled=None)
    assert task.reading["black"] <= -950 and task.reading["white"] == 4095 and len(task.labelled.images.unique()) > 60
    assert torch.equal(read_image(plain / f"images/{task.labelled.ids[0]}.tif", **task.reading), task.labelled.images[0])


@pytest.mark.parametrize("ending", [".jfif", ".gif", ".avif", ".webp", ".bmp", ".JPG"])
def test_endings_that_pillow_reads(plain, ending):
    if ending not in PICTURES | {".JPG"}: pytest.skip("this Pillow reads no AVIF")
    for p in (plain / "images").glob("p1*.png"):
        Image.open(p).save(p.with_suffix(ending), format="JPEG" if ending == ".jfif" else None)
        p.unlink()
    assert len(load_task("folder", plain, n_labelled=3).unlabelled) == 15


# ---------------------------------------------------------------- the shape of a folder
@pytest.mark.parametrize("val, more", [("valid", "unlabelled"), ("Validation", "unlabeled"), ("VAL", "Unlabelled")])
def test_splits_by_their_common_names(official, val, more):
    for kind in ("images", "masks"):
        (official / kind / "val").rename(official / kind / val)
        (official / kind / "train").rename(official / kind / "Train")
    (official / "images/unlabelled_far").rename(official / "images" / more)
    for kind in ("images", "masks"): (official / kind / "ood").rename(official / kind / "test")
    task = load_task("folder", official, n_labelled=4)
    assert task.val.ids[0] == f"{val}/v0" and [i for i in task.unlabelled.ids if i.startswith(more)] == [f"{more}/u{i}" for i in range(4)]
    assert not any("test" in i for i in task.unlabelled.ids) and load_split("folder", official, "test").ids == ("test/o0", "test/o1")
    assert len(load_split("folder", official, "val")) == len(load_split("folder", official, val)) == 3 and "kept for scoring" in str(check_folder(official))
    (official / "images/validation2").mkdir()
    (official / "images/valid" if val != "valid" else official / "images/val").mkdir()
    refused(official, "mean the same: put all into one of them")


def test_what_servers_and_people_leave_behind(plain):
    for name in ("@eaDir", ".@__thumb", "__MACOSX", "#recycle"): picture(plain / "images" / name / "p01.png")
    picture(plain / "images/.hidden.png")
    (plain / "images/._p01.png").write_bytes(b"\0" * 200)
    (plain / "images/.DS_Store").write_bytes(b"\0")
    picture(plain / "thumbs/a.png")
    picture(plain / "preview.png")
    task, notes = load_task("folder", plain, n_labelled=3), check_folder(plain).notes
    assert len(task.unlabelled) == 15 and len(notes) == 3
    assert any("5 file(s)" in n and "hidden, or belong to a file server" in n for n in notes)
    assert any("lie neither in images nor in masks" in n and "thumbs" in n for n in notes) and any("'preview.png'" in n for n in notes)


def test_a_home_folder(plain, monkeypatch):
    monkeypatch.setenv("HOME", str(plain.parent))
    assert load_task("folder", f"~/{plain.name}", n_labelled=3).size == (12, 16)
    with pytest.raises(UserError, match="nobody-here"): load_task("folder", "~nobody-here/x")


# ---------------------------------------------------------------- text as Windows writes it
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
def test_text_in_every_encoding(plain, encoding):
    (plain / "classes.txt").write_bytes("# our classes\r\nHimmel\r\nStraße\r\n\r\nMüll\r\n".encode(encoding))
    assert load_task("folder", plain, n_labelled=3).classes == ("Himmel", "Straße", "Müll")
    info = {"classes": [{"id": 0, "name": "Bäume", "color": "#f80"}, {"id": 1, "name": "b", "color": "00ff00"}, {"id": 2, "name": "c", "color": [1, 2, 3]}]}
    (plain / "dataset.json").write_bytes(json.dumps(info, ensure_ascii=False).encode(encoding))
    task = load_task("folder", plain, n_labelled=3)
    assert task.classes == ("Bäume", "b", "c") and task.palette == ((255, 136, 0), (0, 255, 0), (1, 2, 3))


def test_what_is_no_text_is_said(plain):
    (plain / "classes.txt").write_bytes(bytes(range(256)))
    refused(plain, "classes.txt' is no text: save it as text in UTF-8")


# ---------------------------------------------------------------- images of other shapes
def three_shapes(root):
    for i, size in enumerate([(12, 16), (24, 32), (20, 20), (30, 16)] * 3):
        picture(root / f"images/p{i:02d}.png", size, seed=i)
        if i < 8: mask(root / f"masks/p{i:02d}.png", size, seed=i)
    return root


def test_other_shapes_are_cropped_unless_told(tmp_path):
    root = three_shapes(tmp_path)
    with pytest.raises(UserError, match="give a size"): load_task("folder", root, n_labelled=3)
    with pytest.warns(UserWarning, match="other shapes than .16, 16.* the middle of each is used"): task = load_task("folder", root, n_labelled=None, size=16)
    assert task.reading == {"size": [16, 16], "fit": "crop"} and not (task.labelled.masks == 255).any()
    boxed, bent = (load_task("folder", root, n_labelled=None, size=16, fit=f) for f in ("letterbox", "squash"))
    border = {i: (m == 255).float().mean().item() for i, m in zip(boxed.labelled.ids, boxed.labelled.masks)}
    assert max(border.values()) > 0.2 and boxed.reading["fit"] == "letterbox" and "fit" not in bent.reading
    for i, x, m in zip(boxed.labelled.ids, boxed.labelled.images, boxed.labelled.masks): assert (m == 255).sum() == (x == 128).all(0).sum() or border[i] == 0
    assert not (boxed.unlabelled.images == 128).all(1).flatten(1).float().mean(1).gt(.1).any(), "no mask says where a border would be: unlabelled images are cropped"
    assert len({t.fingerprint for t in (task, boxed, bent)}) == 3
    for t in (task, boxed, bent):
        path = root / f"images/{t.labelled.ids[0]}.png"
        assert torch.equal(read_image(path, **t.reading), t.labelled.images[0]), "`reading` is how the files were read"


def test_one_shape_is_never_cropped(plain):
    task = load_task("folder", plain, n_labelled=3, size=10)
    assert task.reading == {"size": [10, 10]} and torch.equal(task.labelled.images[0], read_image(plain / f"images/{task.labelled.ids[0]}.png", (10, 10)))
    with pytest.raises(UserError, match="fit 'stretch' is not known"): load_task("folder", plain, n_labelled=3, size=10, fit="stretch")


def test_a_crop_shows_image_and_mask_in_one_place(tmp_path):
    y, x = np.mgrid[:40, :64]
    square = ((x > 30) & (x < 45) & (y > 10) & (y < 25)).astype(np.uint8)
    Image.fromarray(square).save(tmp_path / "m.png")
    Image.fromarray(np.repeat(square[..., None] * 255, 3, 2)).save(tmp_path / "i.png")
    for fit in ("crop", "letterbox", "squash"):
        i, m = read_image(tmp_path / "i.png", (20, 20), fit=fit)[0], read_mask(tmp_path / "m.png", (20, 20), fit=fit)
        assert ((i > 128) == (m == 1)).float().mean() > 0.95 and (m == 1).sum() > 10
