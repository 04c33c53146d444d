"""One's own images: reading, layouts, mistakes in one sentence, the doctor, splits."""
import io

import numpy as np
import pytest
import torch
from helpers import mask, official_folder, picture, plain_folder
from PIL import Image

from semiseg_nb import folders
from semiseg_nb.catalogue import load_task
from semiseg_nb.core import UserError
from semiseg_nb.folders import check_folder, cut, read_image, read_mask


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
    assert read_image(tmp_path / "turned.jpg").shape == (3, 16, 12) and folders._image_size(tmp_path / "turned.jpg") == (16, 12)


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
    (lambda r: (r / "dataset.json").write_text("{"), "dataset.json' is not valid JSON"),
    (lambda r: (r / "dataset.json").write_text("[1, 2]"), "dataset.json' is not valid JSON"),
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
