import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch.utils.data import DataLoader

from semiseg_nb import data
from semiseg_nb.core import IGNORE, UserError
from semiseg_nb.data import (
    Files,
    Folder,
    Images,
    Labelled,
    Stream,
    Task,
    check_folder,
    class_palette,
    cut,
    image_mean,
    image_tags,
    load_split,
    load_task,
    loader,
    one_pass,
    random_crop,
    read_image,
    read_mask,
    scene_order,
    split_id,
)

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"


def real(name):
    "A data set beside the repository, or a skipped test"
    if not (SHARED / name / "dataset.json").exists(): pytest.skip(f"../shared/data/{name} is not there")
    return SHARED / name


# ---------------------------------------------------------------- fixtures: a tiny folder of each layout
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


@pytest.fixture
def plain(tmp_path):
    "20 images, the first 10 with a mask"
    for i in range(20):
        picture(tmp_path / "images" / f"p{i:02d}.png", seed=i)
        if i < 10: mask(tmp_path / "masks" / f"p{i:02d}.png", seed=i)
    return tmp_path


@pytest.fixture
def official(tmp_path):
    "train 12, val 3, unlabelled_far 4, ood 2, weak 3, with dataset.json"
    names = {"train": 12, "val": 3, "ood": 2, "unlabelled_far": 4, "weak": 3}
    for s, (split, n) in enumerate(names.items()):
        for i in range(n):
            picture(tmp_path / "images" / split / f"{split[0]}{i}.png", seed=100 * s + i)
            if split in ("train", "val", "ood"): mask(tmp_path / "masks" / split / f"{split[0]}{i}.png", seed=100 * s + i)
    stems = [f"t{i}" for i in range(12)]
    info = {"name": "tiny", "classes": [{"id": i, "name": n, "color": [i, 9 * i, 20]} for i, n in enumerate("abc")],
            "label_order": {"seed0": stems, "seed1": stems[::-1]}, "weak_labels": {"w0": [0, 2], "w1": [0], "w2": [0, 1]}}
    (tmp_path / "dataset.json").write_text(json.dumps(info))
    return tmp_path


def in_memory(n=10, size=(6, 8), n_classes=3):
    g = torch.Generator().manual_seed(0)
    return Labelled([f"i{k}" for k in range(n)], torch.randint(0, 256, (n, 3, *size), generator=g, dtype=torch.uint8),
                    torch.randint(0, n_classes, (n, *size), generator=g, dtype=torch.uint8), n_classes)


# ---------------------------------------------------------------- Stream
def test_stream_is_a_function_of_seed_and_step():
    a, b = Stream(range(10), 4, seed=3), Stream(range(10), 4, seed=3)
    there = [a.batch(k) for k in range(20)]
    assert there == [b.batch(k) for k in reversed(range(20))][::-1]
    assert there != [Stream(range(10), 4, seed=4).batch(k) for k in range(20)]


def test_stream_is_concatenated_permutations():
    flat = sum((Stream(range(10), 4, seed=0).batch(k) for k in range(10)), [])
    passes = [flat[i:i + 10] for i in range(0, 40, 10)]
    assert all(sorted(p) == list(range(10)) for p in passes) and len({tuple(p) for p in passes}) == 4


def test_stream_start_resumes_exactly():
    whole, later = iter(Stream(range(7), 3, seed=1)), iter(Stream(range(7), 3, seed=1, start=5))
    for _ in range(5): next(whole)
    assert [next(whole) for _ in range(9)] == [next(later) for _ in range(9)]


def test_stream_batch_larger_than_the_set():
    assert sorted(Stream(range(3), 6, seed=0).batch(0)) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_stream_cuts_the_global_batch_by_rank(world):
    joint = Stream(range(10), 8, seed=5)
    parts = [Stream(range(10), 8, seed=5, rank=r, world=world) for r in range(world)]
    for k in range(6): assert sum((p.batch(k) for p in parts), []) == joint.batch(k)


def test_stream_refuses_what_it_cannot_do():
    with pytest.raises(UserError, match="empty"): Stream([], 2, seed=0)
    with pytest.raises(UserError, match=r"batch_size 5 .* 2 processes"): Stream(range(4), 5, seed=0, world=2)
    with pytest.raises(UserError, match="batch_size 0"): Stream(range(4), 0, seed=0)


# ---------------------------------------------------------------- data sets and loader
def test_sample_and_batch_contract():
    ds = in_memory()
    one, batch = ds[3], ds.__getitems__([3, 5])
    assert one["image"].dtype == torch.uint8 and one["image"].shape == (3, 6, 8) and one["mask"].shape == (6, 8)
    assert one["index"] == 3 and isinstance(one["index"], int) and ds[-1]["index"] == 9 and ds.size == (6, 8)
    assert torch.equal(batch["image"][0], one["image"]) and batch["index"].tolist() == [3, 5]
    assert torch.equal(one["tags"], image_tags(one["mask"][None], 3)[0])
    with pytest.raises(IndexError): ds[10]
    fetched = next(iter(DataLoader(ds, batch_size=4, collate_fn=lambda b: b)))
    assert torch.equal(fetched["mask"], ds.masks[:4])


def test_loader_gives_floats_and_class_ids():
    ds = in_memory()
    batch = next(loader(ds, 4, seed=2))
    i = batch["index"]
    assert batch["image"].dtype == torch.float32 and batch["mask"].dtype == torch.int64 and i.dtype == torch.int64
    assert torch.equal(batch["image"], ds.images[i].float() / 255) and torch.equal(batch["mask"], ds.masks[i].long())
    white = Images(["w"], torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))
    assert next(loader(white, 1))["image"].max() == 1.0


def test_loader_start_resumes_with_the_same_crops():
    ds = in_memory()
    whole, later = loader(ds, 4, seed=1, crop=4), loader(ds, 4, seed=1, start=3, crop=4)
    for _ in range(3): next(whole)
    for _ in range(4):
        a, b = next(whole), next(later)
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_loader_crops_do_not_depend_on_the_number_of_processes():
    ds = in_memory()
    joint = next(loader(ds, 8, seed=1, crop=(3, 5)))
    parts = [next(loader(ds, 8, seed=1, rank=r, world=2, crop=(3, 5))) for r in range(2)]
    assert all(torch.equal(joint[k], torch.cat([p[k] for p in parts])) for k in joint)


def test_crop_takes_the_same_window_from_image_and_mask():
    place = torch.arange(48, dtype=torch.uint8).view(1, 6, 8).repeat(5, 1, 1)
    batch = {"image": place[:, None].repeat(1, 3, 1, 1), "mask": place}
    corner = torch.tensor([[0, 0], [.9999, .9999], [.5, .5], [0, .9999], [.3, .8]])
    out = random_crop(batch, (4, 5), corner)
    assert out["image"].shape == (5, 3, 4, 5) and torch.equal(out["image"][:, 1], out["mask"])
    assert torch.equal(out["mask"][0], place[0, :4, :5]) and torch.equal(out["mask"][1], place[0, 2:, 3:])


def test_every_crop_position_is_drawn_and_evaluation_stays_whole():
    ds = in_memory()
    ds.crop = (5, 6)
    corners = torch.rand(4000, 2)
    row = torch.arange(6, dtype=torch.uint8)[:, None].expand(6, 8)
    tops = random_crop({"image": row.expand(4000, 3, 6, 8)}, (5, 6), corners)["image"][:, 0, 0, 0]
    assert tops.unique().tolist() == [0, 1]
    assert next(loader(ds, 2))["image"].shape[-2:] == (5, 6)
    assert next(one_pass(ds, 2))["image"].shape[-2:] == (6, 8)
    with pytest.raises(UserError, match=r"crop \(7, 7\) is larger"): loader(ds, 2, crop=7)
    with pytest.raises(UserError, match="crop 'big' is not a size"): loader(ds, 2, crop="big")


def test_one_pass_sees_every_image_once_over_all_processes():
    ds = in_memory()
    assert torch.cat([b["index"] for b in one_pass(ds, 4)]).tolist() == list(range(10))
    seen = sum((b["index"].tolist() for r in range(3) for b in one_pass(ds, 4, rank=r, world=3)), [])
    assert sorted(seen) == list(range(10))


def test_a_batch_in_memory_costs_well_under_a_millisecond():
    task = load_task()
    batches, best = loader(task.labelled, 8), float("inf")
    for _ in range(200):
        start = time.perf_counter()
        next(batches)
        best = min(best, time.perf_counter() - start)
    assert best < 1e-3


def test_disk_and_memory_give_equal_batches(official):
    options = {"dataset": "folder", "data_root": official, "n_labelled": 4, "size": (9, 10), "n_tune": 2, "crop": 8}
    memory, disk = load_task(**options), load_task(**options, memory_limit=0)
    assert disk.labelled.on_disk and not memory.labelled.on_disk and disk.describe() == memory.describe()
    assert disk.mean == pytest.approx(memory.mean)
    for name, workers in (("labelled", 0), ("labelled", 2), ("unlabelled", 1)):
        a, b = (loader(getattr(t, name), 6, seed=1, start=2, workers=w) for t, w in ((memory, 0), (disk, workers)))
        for _ in range(3):
            x, y = next(a), next(b)
            assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    for x, y in zip(one_pass(memory.val, 2), one_pass(disk.val, 2)): assert all(torch.equal(x[k], y[k]) for k in x)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_vanishes_during_training_is_one_sentence(official, workers):
    task = load_task("folder", official, n_labelled=4, memory_limit=0)
    for path in task.labelled.images.paths: path.unlink()
    with pytest.raises(UserError, match=r"^'[^\n]*' does not exist[^\n]*$"): next(loader(task.labelled, 2, workers=workers))


# ---------------------------------------------------------------- no mask leaks
def no_mask(task, n=20):
    batches = [b for _, b in zip(range(n), loader(task.unlabelled, 4))] + list(one_pass(task.unlabelled, 4))
    return all("mask" not in b for b in batches) and "mask" not in task.unlabelled[0]


def test_unlabelled_never_yields_a_mask(plain):
    assert no_mask(load_task()) and no_mask(load_task(weak_tags=True)) and no_mask(load_task("folder", plain, n_labelled=3))
    assert not hasattr(load_task().unlabelled, "masks")


@pytest.mark.parametrize("limit", [0, 2e9])
def test_masks_of_unlabelled_images_are_never_opened(official, limit):
    for i in range(4, 12): (official / "masks/train" / f"t{i}.png").write_bytes(b"not a picture")
    (official / "masks/train/t9.png").unlink()
    task = load_task("folder", official, n_labelled=4, memory_limit=limit)
    assert len(task.unlabelled) == 8 and no_mask(task)


def test_task_refuses_masks_and_overlap():
    a, b = in_memory(4), in_memory(6)
    with pytest.raises(TypeError, match="Labelled"): Task("x", ("a", "b", "c"), class_palette(3), a, b, b)
    c = Labelled([f"v{i}" for i in range(6)], b.images, b.masks, 3)
    with pytest.raises(UserError, match="'i0' is in the task twice"):
        Task("x", ("a", "b", "c"), class_palette(3), a, Images(b.ids, b.images), c)


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


def test_split_id_knows_sets_not_order():
    assert split_id("ab", "cd", "e", "", (4, 4)) == split_id("ba", "dc", "e", "", (4, 4))
    others = [("ac", "bd", "e", "", (4, 4)), ("ab", "cd", "e", "", (4, 5)), ("ab", "cde", "", "", (4, 4))]
    assert len({split_id("ab", "cd", "e", "", (4, 4)), *(split_id(*o) for o in others)}) == 4
    assert len(split_id("a", "b", "c", "", (1, 1))) == 10


def test_label_order_of_dataset_json(official):
    task = load_task("folder", official, n_labelled=3, split_seed=1, n_tune=2)
    assert task.labelled.ids == ("train/t11", "train/t10", "train/t9") and task.tune.ids == ("train/t1", "train/t0")
    assert len(task.unlabelled) == 7 and task.val.ids == ("val/v0", "val/v1", "val/v2")
    assert task.name == "tiny" and task.classes == ("a", "b", "c") and task.palette[1] == (1, 9, 20)
    assert set(task.describe()) == {"name", "n_classes", "split_id", "n_labelled", "n_unlabelled", "n_val", "size"}
    json.dumps(task.describe())


def test_nested_splits_and_their_ids(official):
    few, more = (load_task("folder", official, n_labelled=n) for n in (2, 5))
    assert few.labelled.ids == more.labelled.ids[:2] and few.split_id != more.split_id
    assert few.split_id == load_task("folder", official, n_labelled=2).split_id


def test_extra_unlabelled_and_other_splits(official):
    task = load_task("folder", official, n_labelled=4, extra_unlabelled="unlabelled_far")
    assert len(task.unlabelled) == 8 + 4 and task.unlabelled.ids[-1] == "unlabelled_far/u3"
    ood, far = (load_split("folder", official, s, size=8) for s in ("ood", "unlabelled_far"))
    assert isinstance(ood, Labelled) and ood.size == (8, 8) and not isinstance(far, Labelled) and "mask" not in far[0]
    hidden = load_split("folder", official, "train", ids=task.unlabelled.ids[:8])
    assert hidden.ids == task.unlabelled.ids[:8] and torch.equal(hidden.images, task.unlabelled.images[:8])
    with pytest.raises(UserError, match=r"split 'odd' is not known .did you mean 'ood'"): load_split("folder", official, "odd")
    for wrong in ("val", "train"):
        with pytest.raises(UserError, match="neither train nor val"): load_task("folder", official, extra_unlabelled=wrong)


def test_tags_from_masks_and_from_weak_labels(official):
    task = load_task("folder", official, n_labelled=4)
    assert task.unlabelled.tags is None and torch.equal(task.labelled.tags, image_tags(task.labelled.masks, 3))
    weak = load_split("folder", official, "weak")
    assert weak[0]["tags"].tolist() == [1, 0, 1] and weak[0]["tags"].dtype == torch.float32
    tagged = load_task("folder", official, n_labelled=4, weak_tags=True).unlabelled
    assert torch.equal(tagged.tags, load_split("folder", official, "train", ids=tagged.ids).tags)
    with pytest.raises(UserError, match="no unlabelled image has a mask or an entry"):
        load_task("folder", official, n_labelled=4, weak_tags=True, unlabelled_from="unlabelled_far")


def test_a_row_of_zeros_where_no_tag_is_known(official):
    info = json.loads((official / "dataset.json").read_text())
    del info["weak_labels"]["w1"]
    (official / "dataset.json").write_text(json.dumps(info))
    some = load_task("folder", official, n_labelled=4, extra_unlabelled="weak").unlabelled
    assert some.ids[-3:] == ("weak/w0", "weak/w1", "weak/w2") and some.tags.dtype == torch.float32
    assert some.tags[-3:].tolist() == [[1, 0, 1], [0, 0, 0], [1, 1, 0]] and not some.tags[:8].any(), "masks are not looked at"
    more = load_task("folder", official, n_labelled=4, extra_unlabelled="weak", weak_tags=True).unlabelled
    assert torch.equal(more.tags[:8], load_split("folder", official, "train", ids=more.ids[:8]).tags), "now they are"
    assert torch.equal(more.tags[-3:], some.tags[-3:]), "and what nobody tagged and nobody drew stays unknown"
    far = load_task("folder", official, n_labelled=4, extra_unlabelled="unlabelled_far")
    assert far.unlabelled.tags is None and "tags" not in next(loader(far.unlabelled, 4))
    batch = next(loader(some, 11, device="cpu"))
    assert torch.equal(batch["tags"], some.tags[batch["index"]])


def test_tags_that_somebody_gave_come_before_those_of_a_mask(official):
    info = json.loads((official / "dataset.json").read_text())
    info["weak_labels"]["t9"] = [1]
    (official / "dataset.json").write_text(json.dumps(info))
    tagged = load_task("folder", official, n_labelled=4, weak_tags=True).unlabelled
    assert dict(zip(tagged.ids, tagged.tags.tolist()))["train/t9"] == [0, 1, 0]


def test_a_further_split_in_the_place_of_the_rest(official):
    task = load_task("folder", official, n_labelled=4, unlabelled_from="weak", n_tune=2)
    assert task.unlabelled.ids == ("weak/w0", "weak/w1", "weak/w2") and len(task.labelled) == 4 and len(task.tune) == 2
    assert task.unlabelled.tags.tolist() == [[1, 0, 1], [1, 0, 0], [1, 1, 0]] and no_mask(task)
    assert task.split_id not in {load_task("folder", official, n_labelled=4, n_tune=2, **more).split_id for more in ({}, {"extra_unlabelled": "weak"})}
    assert load_task("folder", official, n_labelled=4, unlabelled_from="weak", n_unlabelled=2).unlabelled.ids == ("weak/w0", "weak/w1")
    every = load_task("folder", official, n_labelled=None, unlabelled_from="weak")
    assert (len(every.labelled), len(every.unlabelled)) == (12, 3), "all masks may be used"


@pytest.mark.parametrize("ids", [[0, 3], [-1], ["a"], 2, "02"])
def test_tags_that_are_no_classes_are_refused(official, ids):
    info = json.loads((official / "dataset.json").read_text())
    info["weak_labels"]["w1"] = ids
    (official / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"dataset.json' gives 'w1' the weak_labels .*0 to 2"): load_task("folder", official, n_labelled=4, unlabelled_from="weak")


def test_image_tags_by_hand():
    m = torch.tensor([[[0, 2], [2, 255]], [[1, 1], [1, 1]]], dtype=torch.uint8)
    assert image_tags(m, 3).tolist() == [[1, 0, 1], [0, 1, 0]]


def test_plain_folder_carves_a_validation_set(plain):
    task = load_task("folder", plain, n_labelled=None, split_seed=2)
    assert (len(task.labelled), len(task.unlabelled), len(task.val)) == (8, 10, 2)
    assert task.classes == ("class 0", "class 1", "class 2") and task.size == (12, 16)
    assert task.split_id != load_task("folder", plain, n_labelled=None, split_seed=0).split_id
    (plain / "classes.txt").write_text("sky\n\nroad\ncar\nbike\n")
    assert load_task("folder", plain, n_labelled=3).classes == ("sky", "road", "car", "bike")


def test_label_order_from_a_file(plain, tmp_path):
    held = load_task("folder", plain, n_labelled=None).val.ids
    wanted = [f"p{i:02d}" for i in range(9, -1, -1) if f"p{i:02d}" not in held][:4]
    (tmp_path / "order.txt").write_text("\n".join(wanted))
    task = load_task("folder", plain, n_labelled=3, label_order=tmp_path / "order.txt")
    assert list(task.labelled.ids) == wanted[:3] and len(task.unlabelled) == 15
    for order, says in ((["nobody"], "names 'nobody'"), (wanted + wanted[:1], "twice"), ("gone.txt", "'gone.txt' does not exist")):
        with pytest.raises(UserError, match=says): load_task("folder", plain, n_labelled=2, label_order=order)


def test_resizing_keeps_class_ids_and_mean(plain):
    task = load_task("folder", plain, n_labelled=4, size=(6, 9))
    assert task.size == (6, 9) and set(task.labelled.masks.unique().tolist()) <= {0, 1, 2}
    whole = torch.cat([task.labelled.images, task.unlabelled.images]).double().mean((0, 2, 3)) / 255
    assert task.mean == pytest.approx(tuple(whole.tolist()))
    assert image_mean(Images(["a"], torch.full((1, 3, 2, 2), 51, dtype=torch.uint8))) == pytest.approx((.2, .2, .2))


# ---------------------------------------------------------------- scenes
def test_scenes_task():
    task = load_task()
    assert (len(task.labelled), len(task.unlabelled), len(task.val), len(task.tune)) == (12, 588, 200, 200)
    assert task.n_classes == 5 and task.size == (64, 64) and len(task.palette) == 5 and all(0 < m < 1 for m in task.mean)
    assert set(task.labelled.ids) | set(task.unlabelled.ids) == {f"photo/{i}" for i in range(600)}
    again = load_task()
    assert again.split_id == task.split_id and torch.equal(again.labelled.images, task.labelled.images)


@pytest.mark.parametrize("seed", range(5))
def test_first_six_scenes_show_every_class(seed):
    assert load_task(n_labelled=6, split_seed=seed).labelled.tags.amax(0).all()
    assert sorted(scene_order(seed)) == list(range(600)) and scene_order(seed) != scene_order(seed + 1)


def test_scenes_options():
    other = load_task(style="inverted", strength=.5, size=32, n_unlabelled=20, n_tune=0)
    assert other.size == (32, 32) and len(other.unlabelled) == 20 and other.tune is None
    assert other.labelled.ids[0].startswith("inverted@0.5/") and len(load_task(n_labelled=600, n_unlabelled=0).unlabelled) == 0
    task = load_task(weak_tags=True)
    hidden = load_split(split="train", ids=task.unlabelled.ids)
    assert torch.equal(hidden.images, task.unlabelled.images) and torch.equal(hidden.tags, task.unlabelled.tags)
    same = load_split(split="val", style="textures")
    assert torch.equal(same.masks, load_task().val.masks) and not torch.equal(same.images, load_task().val.images)
    for options, says in (({"style": "foto"}, "did you mean 'photo'"), ({"size": (32, 64)}, "not square"), ({"n_tune": 999}, "n_tune is 999"),
                          ({"label_order": ["1"]}, "split_seed instead"), ({"n_labelled": 601}, "only 600"), ({"size": 0}, "not a size")):
        with pytest.raises(UserError, match=says): load_task(**options)


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
    assert read_image(tmp_path / "turned.jpg").shape == (3, 16, 12) and data._image_size(tmp_path / "turned.jpg") == (16, 12)


def test_stretch_spreads_a_dark_image(tmp_path):
    a = np.random.default_rng(0).integers(2, 12, (40, 40), dtype=np.uint8)
    Image.fromarray(a).save(tmp_path / "dark.png")
    dark, bright = read_image(tmp_path / "dark.png"), read_image(tmp_path / "dark.png", stretch=True)
    assert dark.max() < 12 and bright.min() == 0 and bright.max() == 255
    low, high = np.percentile(np.repeat(a[..., None], 3, 2).astype(np.float32), (1, 99.8))
    assert np.abs(bright[0].numpy() - np.clip((a - low) / (high - low), 0, 1) * 255).max() <= .5 + 1e-3
    Image.new("L", (4, 4), 7).save(tmp_path / "flat.png")
    assert read_image(tmp_path / "flat.png", stretch=True).unique().tolist() == [7]


def test_files_take_the_place_of_a_tensor(tmp_path):
    for i in range(4): picture(tmp_path / f"{i}.png", seed=i)
    files = Files([tmp_path / f"{i}.png" for i in range(4)], read_image, (3, 12, 16))
    assert files.shape == (4, 3, 12, 16) and torch.equal(files.in_memory()[[2, 0]], files.index_select(0, torch.tensor([2, 0])))


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


# ---------------------------------------------------------------- known data sets, as tiny copies of their trees
def voc_tree(root, train=("a", "b"), val=("v",)):
    base = root / "VOCdevkit/VOC2012"
    (base / "ImageSets/Segmentation").mkdir(parents=True)
    for split, names in (("train", train), ("val", val)):
        (base / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names))
        for i, name in enumerate(names):
            picture(base / "JPEGImages" / f"{name}.jpg", seed=i)
            mask(base / "SegmentationClass" / f"{name}.png", values=(0, 15, 255), seed=i)
    return base


def test_voc_with_the_augmented_folder(tmp_path):
    base = voc_tree(tmp_path)
    for name in ("a", "b", "v", "s1", "s2"):
        mask(base / "SegmentationClassAug" / f"{name}.png", values=(0, 20), mode="L")
        if name[0] == "s": picture(base / "JPEGImages" / f"{name}.jpg")
    task = load_task("voc", tmp_path, n_labelled=2)
    assert set(task.labelled.ids) == {"a", "b"} and set(task.unlabelled.ids) == {"s1", "s2"} and task.val.ids == ("v",)
    assert task.n_classes == 21 and task.palette[15] == (192, 128, 128) and 255 in task.labelled.masks
    assert len(load_task("voc", tmp_path, n_labelled=3).labelled) == 3
    assert len(load_task("voc", tmp_path, n_labelled=1, augmented=False).unlabelled) == 1
    assert set(load_split("voc", tmp_path, "train").ids) == {"a", "b", "s1", "s2"}


def test_voc_with_sbd_mat_files(tmp_path):
    voc_tree(tmp_path)
    for split, names in (("train", ("a", "s1")), ("val", ("v", "s2"))):
        (tmp_path / "sbd").mkdir(exist_ok=True)
        (tmp_path / f"sbd/{split}.txt").write_text("\n".join(names))
        for name in names:
            picture(tmp_path / "sbd/img" / f"{name}.jpg")
            (tmp_path / "sbd/cls").mkdir(exist_ok=True)
            segmentation = np.full((12, 16), 7, np.uint8)
            savemat(tmp_path / "sbd/cls" / f"{name}.mat", {"GTcls": {"Segmentation": segmentation}})
    task = load_task("voc", tmp_path, n_labelled=3)
    assert {"a", "b"} < set(task.labelled.ids) and set(task.labelled.ids) | set(task.unlabelled.ids) == {"a", "b", "s1", "s2"}
    assert task.labelled.masks[2].unique().tolist() == [7]  # the third is the first that comes from SBD
    (tmp_path / "sbd/cls/s1.mat").write_bytes(b"junk")
    (tmp_path / "sbd/cls/s2.mat").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"s[12].mat' cannot be read as an SBD mask"): load_task("voc", tmp_path, n_labelled=3)


def test_voc_count_of_the_augmented_list(tmp_path, monkeypatch):
    "1,464 + 9,118 = 10,582; an incomplete copy beside the full official lists is refused"
    class Listed:
        def __init__(self, root, image_set):
            names = [f"{image_set}{i}" for i in range({"train": 1464, "val": 1449}[image_set])]
            self.images, self.masks = [f"{n}.jpg" for n in names], [f"{n}.png" for n in names]
    monkeypatch.setattr(data, "VOCSegmentation", Listed)
    def sbd(n): return {f"s{i}": data.Item(f"s{i}", Path("x.jpg"), Path("x.png")) for i in range(n)} | {
        f"val{i}": data.Item(f"val{i}", Path("x.jpg"), Path("x.png")) for i in range(1449)}
    monkeypatch.setattr(data, "_sbd", lambda root: sbd(9118))
    source = data._voc(tmp_path, 0, True)
    assert len(source.order) == 10582 and all(i.id.startswith("train") for i in source.order[:1464])
    monkeypatch.setattr(data, "_sbd", lambda root: sbd(9000))
    with pytest.raises(UserError, match="gives 10464 training images, but VOC with SBD has 10582"): data._voc(tmp_path, 0, True)


def test_context_has_background_and_59_classes(tmp_path):
    base = tmp_path / "VOCdevkit/VOC2010"
    (base / "ImageSets/SegmentationContext").mkdir(parents=True)
    for split, names in (("train", ("2008_1", "2008_2", "2008_3")), ("val", ("2008_4",))):
        (base / f"ImageSets/SegmentationContext/{split}.txt").write_text("".join(f"{n}\n" for n in names))
        for name in names:
            picture(base / "JPEGImages" / f"{name}.jpg")
            truth = mask(base / "SegmentationClassContext" / f"{name}.png", values=(0, 1, 37, 59), mode="L")
    task = load_task("context", tmp_path, n_labelled=1)
    assert task.n_classes == 60 and [task.classes[i] for i in (0, 1, 37, 59)] == ["background", "aeroplane", "person", "wood"]
    assert len(task.unlabelled) == 2 and task.val.ids == ("2008_4",) and torch.equal(task.val.masks[0], truth)
    mask(base / "SegmentationClassContext/2008_4.png", values=(0, 60), mode="L")
    with pytest.raises(UserError, match=r"2008_4.png'.* 60"): load_task("context", tmp_path, n_labelled=1)


def test_cityscapes_maps_to_the_scored_classes(tmp_path):
    for split, city, n in (("train", "ulm", 3), ("val", "lindau", 1)):
        for i in range(n):
            name = f"{city}_{i:06d}_000019"
            picture(tmp_path / f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png")
            truth = mask(tmp_path / f"gtFine/{split}/{city}/{name}_gtFine_labelIds.png", values=(0, 7, 8, 26, 33), mode="L")
    task = load_task("cityscapes", tmp_path, n_labelled=1)
    assert task.n_classes == 19 and task.classes[0] == "road" and task.palette[13] == (0, 0, 142)
    assert len(task.unlabelled) == 2
    ids = {0: IGNORE, 7: 0, 8: 1, 26: 13, 33: 18}
    assert torch.equal(task.val.masks[0], torch.tensor([ids[v] for v in truth.flatten().tolist()]).view(12, 16).to(torch.uint8))


def test_pet_trimaps_become_three_classes(tmp_path):
    base = tmp_path / "oxford-iiit-pet"
    (base / "annotations").mkdir(parents=True)
    for part, names in (("trainval", ("Cat_1", "Cat_2", "dog_3")), ("test", ("dog_4",))):
        (base / f"annotations/{part}.txt").write_text("".join(f"{n} 1 1 1\n" for n in names))
        for name in names:
            picture(base / "images" / f"{name}.jpg")
            truth = mask(base / "annotations/trimaps" / f"{name}.png", values=(1, 2, 3), mode="L")
    task = load_task("pet", tmp_path, n_labelled=1)
    assert task.classes == ("background", "pet", "border") and len(task.unlabelled) == 2 and task.val.ids == ("dog_4",)
    assert torch.equal(task.val.masks[0].long(), torch.tensor([9, 1, 0, 2])[truth.long()])


@pytest.mark.parametrize("name, page", [("voc", "host.robots.ox.ac.uk/pascal/VOC/voc2012"), ("pet", "robots.ox.ac.uk/~vgg/data/pets"),
                                        ("context", "cs.stanford.edu/~roozbeh/pascal-context"),
                                        ("cityscapes", "www.cityscapes-dataset.com/downloads")])
def test_an_absent_data_set_says_where_it_comes_from(tmp_path, name, page):
    with pytest.raises(UserError, match=page) as e: load_task(name, tmp_path, n_labelled=1)
    assert "unpack it so that there is" in str(e.value) and "\n" not in str(e.value)


def test_absent_sbd_says_so_and_offers_the_small_list(tmp_path):
    voc_tree(tmp_path)
    with pytest.raises(UserError, match=r"SBD .augmented=False does without.*SegmentationClassAug"): load_task("voc", tmp_path, n_labelled=1)


def test_a_missing_file_of_a_known_set_is_named(tmp_path):
    (voc_tree(tmp_path) / "JPEGImages/v.jpg").unlink()
    with pytest.raises(UserError, match=r"v.jpg' does not exist"): load_task("voc", tmp_path, n_labelled=1, augmented=False)


# ---------------------------------------------------------------- real folders, and the committed lists
LISTS = sorted((ROOT / "nbs" / "splits").glob("*_seed*.txt"))


@pytest.mark.parametrize("path", LISTS, ids=lambda p: p.stem)
def test_committed_lists_agree_with_dataset_json(path):
    name, seed = path.stem.rsplit("_", 1)
    ids = path.read_text().split()
    assert len(set(ids)) == len(ids) > 0
    order = json.loads((real(name) / "dataset.json").read_text())["label_order"][seed]
    assert ids == order[: -(-len(order) // 8)]


def test_lists_are_committed():
    assert {p.stem for p in LISTS} == {f"{n}_seed{s}" for n in ("camvid", "ccp", "nuclei") for s in range(3)}


def test_camvid():
    task = load_task("folder", real("camvid"), n_labelled=46, size=(48, 64))
    assert (len(task.labelled), len(task.unlabelled), len(task.val)) == (46, 321, 101) and task.n_classes == 11
    statistics = json.loads((SHARED / "camvid/dataset.json").read_text())["statistics"]["train"]
    assert task.mean == pytest.approx(statistics["rgb_mean"], abs=2e-3) and task.labelled.tags.amax(0).all()
    listed = load_task("folder", SHARED / "camvid", n_labelled=46, size=(48, 64), label_order=ROOT / "nbs/splits/camvid_seed0.txt")
    assert listed.split_id == task.split_id


def test_ccp_photos_with_real_tags_and_no_masks():
    task = load_task("folder", real("ccp"), n_labelled=41, unlabelled_from="weak", size=(48, 32))
    assert (len(task.labelled), len(task.unlabelled), len(task.val), task.n_classes) == (41, 1085, 100, 13) and no_mask(task)
    known = json.loads((SHARED / "ccp/dataset.json").read_text())["weak_labels"]
    for name, tags in zip(task.unlabelled.ids, task.unlabelled.tags): assert tags.nonzero().flatten().tolist() == known[name.removeprefix("weak/")]
    assert task.labelled.tags.amax(0).all()


def test_nuclei_stretched_crops():
    task = load_task("folder", real("nuclei"), n_labelled=8, crop=128, stretch=True, n_unlabelled=8)
    assert next(loader(task.labelled, 4))["image"].shape == (4, 3, 128, 128) and task.val.size == (256, 256)
    assert min(task.mean) > .09  # 0.05 before stretching
    assert len(Folder(SHARED / "nuclei").split("unlabelled_histology")) == 40
