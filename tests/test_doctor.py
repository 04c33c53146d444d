"""The doctor: what is used, twins, suspects, groups, the same sentences as training."""
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import mask, official_folder, picture, plain_folder
from PIL import Image

from semiseg_nb import doctor
from semiseg_nb.catalogue import load_task
from semiseg_nb.core import UserError
from semiseg_nb.doctor import check_folder, contact_sheet

LESSON = Path(__file__).resolve().parents[1] / "nbs/50_doctor.ipynb"


@pytest.fixture
def plain(tmp_path): return plain_folder(tmp_path)


@pytest.fixture
def official(tmp_path): return official_folder(tmp_path)


def photo(path, seed, size=(48, 64), **save):
    "A smooth picture, as twins are made of: noise has no twin at half its size"
    r = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    small = Image.fromarray((r.integers(40, 200, (6, 8, 1)) + r.integers(0, 40, (6, 8, 3))).astype(np.uint8))
    out = small.resize(size[::-1], Image.Resampling.BICUBIC)
    out.save(path, **save)
    return out


def photos(root, n=12, n_masks=8):
    for i in range(n):
        photo(root / f"images/p{i:02d}.png", i)
        if i < n_masks: mask(root / f"masks/p{i:02d}.png", (48, 64), seed=i)
    return root


# ---------------------------------------------------------------- the report
def test_the_report_says_what_is_used(official):
    report = check_folder(official)
    text, plain_types = str(report), json.loads(json.dumps(report.as_dict()))
    assert "train: 12 images, 12 masks, 0 unlabelled; width x height 16 x 12 (12); training" in text
    assert "val: 3 images" in text and "unlabelled_far: 4 images, 0 masks, 4 unlabelled; width x height 16 x 12 (4); only where it is named" in text
    train = plain_types["splits"]["train"]
    assert plain_types["ok"] and train["sizes"] == [{"width": 16, "height": 12, "images": 12}] and train["role"] == "training"
    assert sum(c["pixels"] for c in train["classes"]) == 12 * 12 * 16 and [c["images"] for c in train["classes"]] == [12, 12, 12]
    assert sum(c["share"] for c in train["classes"]) == pytest.approx(1)


def test_a_folder_that_cannot_be_read_is_a_report_too(tmp_path):
    report = check_folder(tmp_path / "nowhere")
    assert not report.ok and "does not exist" in str(report) and report.as_dict()["problems"] == report.problems
    with pytest.raises(UserError, match="There is no picture to show"): contact_sheet(report)


SPOILS = [
    lambda r: mask(r / "masks/ood/o1.png", values=(0, 9)), lambda r: (r / "images/weak/w1.png").write_bytes(b"x"), lambda r: (r / "masks/val/v1.png").unlink(),
    lambda r: Image.new("RGB", (16, 12)).save(r / "masks/train/t7.png"), lambda r: (r / "classes.txt").unlink(missing_ok=True) or (r / "dataset.json").write_text("{"),
    lambda r: [p.unlink() for p in (r / "images/train").iterdir()], lambda r: (r / "images/val/v0.png").write_bytes((r / "images/train/t1.png").read_bytes()),
    lambda r: (r / "groups.csv").write_text("t1,a\nt1,b\n"), lambda r: (r / "masks").rename(r / "labels"),
]


@pytest.mark.parametrize("spoil", SPOILS)
def test_training_refuses_what_the_doctor_calls_a_problem_in_its_words(official, spoil):
    spoil(official)
    problems = check_folder(official).problems
    with pytest.raises(UserError) as e: load_task("folder", official, n_labelled=3)
    assert problems and str(e.value) == problems[0] and "\n" not in problems[0]


# ---------------------------------------------------------------- twins
@pytest.mark.parametrize("twin", [{"quality": 70}, {"size": (24, 32)}, {"size": (36, 48), "quality": 70}])
def test_a_picture_saved_anew_is_known(official, twin):
    for i in range(12): photo(official / f"images/train/t{i}.png", i)
    for i in range(12): mask(official / f"masks/train/t{i}.png", (48, 64), seed=i)
    quality = {"quality": twin["quality"]} if "quality" in twin else {}
    x = Image.open(official / "images/train/t5.png").resize(twin.get("size", (48, 64))[::-1], Image.Resampling.LANCZOS)
    (official / "images/val/v0.png").unlink()
    x.save(official / "images/val" / ("v0.jpg" if quality else "v0.png"), **quality)
    mask(official / "masks/val/v0.png", x.size[::-1])
    with pytest.raises(UserError, match=r"t5.png' and '.*v0.*' are the same picture: .* copies_allowed=True"): load_task("folder", official, n_labelled=3, size=(48, 64))
    assert len(load_task("folder", official, n_labelled=3, size=(48, 64), copies_allowed=True).val) == 3


def test_pictures_that_are_only_alike_are_no_twins(tmp_path):
    root = photos(tmp_path)
    x = np.array(Image.open(root / "images/p03.png"))
    x[10:24, 10:30] = 255 - x[10:24, 10:30]                       # the same place, another moment
    Image.fromarray(x).save(root / "images/p09.png")
    assert check_folder(root).notes == []


def test_twins_in_a_plain_folder_stay_on_one_side(tmp_path):
    root = photos(tmp_path)
    for i in range(1, 4): Image.open(root / "images/p00.png").save(root / f"images/p{i:02d}.png", compress_level=i)
    assert "are the same picture, and so are 5 other pairs: they stay on one side" in str(check_folder(root))
    for seed in range(6):
        val = set(load_task("folder", root, n_labelled=2, split_seed=seed).val.ids)
        assert len(val & {f"p{i:02d}" for i in range(4)}) in (0, 4)


# ---------------------------------------------------------------- groups
def held_out(root, seed, **options):
    task = load_task("folder", root, n_labelled=None, split_seed=seed, **options)
    return task, [{i for s in sets if s for i in s.ids} for sets in ((task.labelled, task.unlabelled), (task.val,), (task.tune,))]


def test_groups_stay_together_in_every_split(plain):
    "Twenty images of five patients, of which ten have masks: nothing of a patient is on two sides, unlabelled images neither"
    (plain / "groups.csv").write_text("image,group\n" + "".join(f"p{i:02d}.png,{i % 5}\n" for i in range(20)))
    for seed in range(5):
        task, (train, val, tune) = held_out(plain, seed, n_tune=1)
        patients = [{int(i[1:]) % 5 for i in ids} for ids in (train, val, tune)]
        assert all(patients) and not patients[0] & patients[1] and not patients[0] & patients[2] and not patients[1] & patients[2]
    (plain / "groups.csv").unlink()
    task, (train, val, _) = held_out(plain, 1, groups=r"(\d)$")
    assert not {i[-1] for i in train} & {i[-1] for i in val} and len(task.val) == 2
    by_default, whole = (load_task("folder", plain, n_labelled=3, **o) for o in ({}, {"groups": "^(p..)"}))
    assert len(whole.val) == len(by_default.val) == 2, "a group of one image each is no group"


@pytest.mark.parametrize("text, options, says", [
    ("p01,a\nq99,a\n", {}, "groups.csv' names 'q99', but there is no such image"), ("p01\n", {}, "groups.csv' has the line 'p01': write an image and its group"),
    ("p01,a\np01,b\n", {}, "puts 'p01' into two groups"), ("".join(f"p{i:02d};x\n" for i in range(20)), {}, "belong to the group 'x': at least two groups"),
    (None, {"groups": "("}, r"groups is '\(', which is no regular expression"), (None, {"groups": "zebra"}, "groups 'zebra' is found in no name"),
])
def test_groups_that_make_no_sense(plain, text, options, says):
    if text: (plain / "groups.csv").write_text(text)
    with pytest.raises(UserError, match=says): load_task("folder", plain, n_labelled=2, **options)


def test_a_name_in_two_splits_is_not_guessed(official):
    (official / "images/val/v0.png").rename(official / "images/val/t1.png")
    (official / "masks/val/v0.png").rename(official / "masks/val/t1.png")
    (official / "groups.csv").write_text("t1,a\n")
    with pytest.raises(UserError, match="names 't1', but there are 2 such images: write 'train/t1'"): load_task("folder", official, n_labelled=3)
    (official / "groups.csv").write_text("train/t1,a\ntrain/t2,a\n")
    assert load_task("folder", official, n_labelled=3)


def test_a_group_on_both_sides_of_given_splits_is_a_leak(official):
    (official / "groups.csv").write_text("train/t1\tx\nval/v1\tx\n")
    with pytest.raises(UserError, match="t1.png' and '.*v1.png' both belong to the group 'x'"): load_task("folder", official, n_labelled=3)
    assert load_task("folder", official, n_labelled=3, copies_allowed=True)


# ---------------------------------------------------------------- notes and suspects
def test_sides_in_the_names_of_classes_give_a_note(plain):
    for names, said in (("background\nleft_kidney\nRight kidney\n", True), ("ground\nNiere links\nleber\n", True), ("bright\nleftover\nupright\n", False)):
        (plain / "classes.txt").write_text(names)
        assert any("flip=\"none\"" in n for n in check_folder(plain).notes) == said, names


def test_suspicious_masks_come_first(tmp_path):
    root = photos(tmp_path, 16, 12)
    Image.new("RGB", (64, 48), (9, 9, 9)).save(root / "images/p02.png")
    Image.new("L", (64, 48), 255).save(root / "masks/p05.png")
    Image.new("L", (64, 48), 1).save(root / "masks/p07.png")
    photo(root / "images/p09.png", 99, (50, 70))
    mask(root / "masks/p09.png", (50, 70))
    report = check_folder(root)
    assert [(i.id, why) for i, why in report.suspects] == [("p02", "flat image"), ("p05", "all 255"), ("p07", "a single class"), ("p09", "rare size")]
    titles = [ax.get_title() for ax in contact_sheet(report, n=8).axes if ax.has_data()]
    assert len(titles) == 8 and [t.split("\n")[0] for t in titles[:4]] == ["p02", "p05", "p07", "p09"] and "rare size" in titles[3]


def test_turned_squares_are_noted(tmp_path):
    root, exif = tmp_path, Image.Exif()
    exif[274] = 6
    for i in range(8):
        photo(root / f"images/p{i}.jpg", i, (40, 40), **({"exif": exif} if i in (1, 2) else {}))
        mask(root / f"masks/p{i}.png", (40, 40), seed=i) if i < 6 else None
    assert any(n.startswith("2 image(s) hold a camera's rotation flag") and "'p1.jpg'" in n for n in check_folder(root).notes)


def test_one_hot_pixel_does_not_darken_a_folder_unseen(plain):
    for i, p in enumerate(sorted((plain / "images").glob("*.png"))):
        a = np.asarray(Image.open(p).convert("L")).astype(np.uint16) * 4
        if i == 3: a[0, 0] = 65535
        Image.fromarray(a).save(p)
    notes = " ".join(check_folder(plain).notes)
    assert "the value 65535 becomes white" in notes and 'give that as "white" in dataset.json' in notes
    (plain / "dataset.json").write_text(json.dumps({"white": 1023}))
    task = load_task("folder", plain, n_labelled=3)
    assert task.reading == {"white": 1023} and task.labelled.images.max() > 240 and len(torch.unique(task.labelled.images)) > 100
    (plain / "dataset.json").write_text(json.dumps({"white": 10, "black": 20}))
    with pytest.raises(UserError, match="gives black 20 and white 10"): load_task("folder", plain, n_labelled=3)
    picture(plain / "images/p00.png")


# ---------------------------------------------------------------- the lesson
def test_the_solutions_of_the_lesson(tmp_path):
    cells = {c["id"]: "".join(c["source"]) for c in json.loads(LESSON.read_text(encoding="utf-8"))["cells"]}
    solutions = [code for k in range(1, 5) for code in re.findall(r"```python\n(.*?)```", cells[f"solution-{k}"], re.S)]
    assert len(solutions) == 4 and all("assert" in code for code in solutions)
    names = vars(doctor) | {"__name__": "lesson"}
    for code in (cells["notebook-imports"], cells["twins-check"], *solutions): exec(code, names)
    names["temporary"].cleanup()
