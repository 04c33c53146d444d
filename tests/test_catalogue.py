"""All data sets through one door: tasks from scenes, portraits, folders and the known sets; splits, tags, two looks; no mask leaks."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import mask, official_folder, picture, plain_folder
from scipy.io import savemat
from torchvision import datasets

from semiseg_nb import catalogue
from semiseg_nb import official as trees
from semiseg_nb.catalogue import joined, load_across, load_split, load_task, portraits, scene_order
from semiseg_nb.core import IGNORE, UserError
from semiseg_nb.data import Images, Labelled, image_mean, image_tags, loader, one_pass
from semiseg_nb.folders import Folder
from semiseg_nb.pictures import Item

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"


def real(name):
    "A data set beside the repository, or a skipped test"
    if not (SHARED / name / "dataset.json").exists(): pytest.skip(f"../shared/data/{name} is not there")
    return SHARED / name


@pytest.fixture
def plain(tmp_path): return plain_folder(tmp_path)


@pytest.fixture
def official(tmp_path): return official_folder(tmp_path)


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
def test_masks_of_unlabelled_images_change_nothing(official, limit):
    "The doctor opens every mask to find mistakes; what a task holds does not depend on those that are left out"
    before = load_task("folder", official, n_labelled=4, memory_limit=limit)
    for i in range(4, 12): mask(official / "masks/train" / f"t{i}.png", values=(2, 1), seed=77 + i)
    task = load_task("folder", official, n_labelled=4, memory_limit=limit)
    assert len(task.unlabelled) == 8 and no_mask(task) and task.describe() == before.describe() and task.mean == before.mean


# ---------------------------------------------------------------- splits
def test_label_order_of_dataset_json(official):
    task = load_task("folder", official, n_labelled=3, split_seed=1, n_tune=2)
    assert task.labelled.ids == ("train/t11", "train/t10", "train/t9") and task.tune.ids == ("train/t1", "train/t0")
    assert len(task.unlabelled) == 7 and task.val.ids == ("val/v0", "val/v1", "val/v2")
    assert task.name == "tiny" and task.classes == ("a", "b", "c") and task.palette[1] == (1, 9, 20)
    assert set(task.describe()) == {"name", "n_classes", "split_id", "n_labelled", "n_unlabelled", "n_val", "size", "crop", "fingerprint"}
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
    monkeypatch.setattr(datasets, "VOCSegmentation", Listed)
    def sbd(n): return {f"s{i}": Item(f"s{i}", Path("x.jpg"), Path("x.png")) for i in range(n)} | {
        f"val{i}": Item(f"val{i}", Path("x.jpg"), Path("x.png")) for i in range(1449)}
    monkeypatch.setattr(trees, "_sbd", lambda root: sbd(9118))
    source = trees._voc(tmp_path, 0, True)
    assert len(source.order) == 10582 and all(i.id.startswith("train") for i in source.order[:1464])
    monkeypatch.setattr(trees, "_sbd", lambda root: sbd(9000))
    with pytest.raises(UserError, match="gives 10464 training images, but VOC with SBD has 10582"): trees._voc(tmp_path, 0, True)


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


# ---------------------------------------------------------------- portraits, and two looks
@pytest.fixture
def few_portraits(monkeypatch):
    monkeypatch.setattr(catalogue, "PORTRAITS", {"train": (30_000, 60), "val": (40_000, 8), "tune": (50_000, 8)})
    portraits.cache_clear()
    yield
    portraits.cache_clear()


def test_portraits_task(few_portraits):
    task, other = (load_task("portraits", n_labelled=5, n_unlabelled=30, size=32, style=s) for s in ("photo", "inverted"))
    assert (len(task.labelled), len(task.unlabelled), len(task.val), len(task.tune)) == (5, 30, 8, 8) and task.size == (32, 32)
    assert torch.equal(task.val.masks, other.val.masks) and not torch.equal(task.val.images, other.val.images)
    assert sorted(int(i[-1]) for i in load_task("portraits", n_labelled=4).labelled.ids) == [1, 2, 3, 4], "four labels show the four kinds"
    everything = load_task("portraits", n_labelled=None)
    assert len(everything.labelled) == 60 and len(everything.unlabelled) == 0
    assert set(load_task("portraits", n_labelled=5, split_seed=1).labelled.ids) != set(task.labelled.ids)
    hidden = load_split("portraits", split="train", size=32, ids=task.unlabelled.ids)
    assert torch.equal(hidden.images, task.unlabelled.images) and torch.equal(load_split("portraits", size=32).masks, task.val.masks)
    for options, says in (({"n_labelled": 61}, "n_labelled is 61, but it should be between 1 and 60"), ({"size": (32, 64)}, "portraits are square"),
                          ({"crop": 16}, "crop is .*, but portraits know style and strength only"), ({"style": "foto"}, "did you mean 'photo'")):
        with pytest.raises(UserError, match=says): load_task("portraits", **options)
    with pytest.raises(UserError, match="split 'test'"): portraits("test")
    with pytest.raises(UserError, match=r"dataset 'portrait' is not known.*did you mean 'portraits'"): load_task("portrait")


def test_the_whole_portraits_are_those_of_the_records():
    "The ids of a stored record: whoever changes the order of the portraits changes what it means"
    assert load_task("portraits", n_labelled=6, size=32).split_id == "0f805cdf75"


def test_masks_of_one_look_images_of_another(official):
    source, there = load_across("scenes", n_labelled=6, size=32)
    assert there.labelled is source.labelled and torch.equal(there.val.masks, source.val.masks)
    assert not torch.equal(there.val.images, source.val.images) and there.unlabelled.ids[0].startswith("inverted/")
    both = joined(source.labelled, there.val)
    assert len(both) == 206 and torch.equal(both.images[6:], there.val.images) and torch.equal(both.masks[:6], source.labelled.masks)
    own, far = load_across("folder", official, n_labelled=4, target_split="unlabelled_far", target_val="ood")
    assert len(own.unlabelled) == 0 and [len(s) for s in (far.labelled, far.unlabelled, far.val)] == [4, 4, 2]
    for options, says in (({"dataset": "scenes", "style": "photo"}, "is the source itself"), ({"dataset": "voc"}, "dataset 'voc' is not known"),
                          ({"dataset": "folder", "data_root": official}, "a folder needs both"),
                          ({"dataset": "folder", "data_root": official, "n_labelled": 4, "target_split": "weak", "target_val": "unlabelled_far"}, "has images without masks")):
        with pytest.raises(UserError, match=says): load_across(**options)
