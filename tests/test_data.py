"""The contract: streams, sets, crops, batches, tasks."""
import time

import numpy as np
import pytest
import torch
from helpers import in_memory, picture
from torch.utils.data import DataLoader

from semiseg_nb.catalogue import load_task
from semiseg_nb.core import UserError
from semiseg_nb.data import Files, Images, Labelled, Stream, Task, as_size, image_mean, image_tags, loader, one_pass, random_crop, split_id
from semiseg_nb.folders import class_palette
from semiseg_nb.pictures import read_image


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


def test_files_take_the_place_of_a_tensor(tmp_path):
    for i in range(4): picture(tmp_path / f"{i}.png", seed=i)
    files = Files([tmp_path / f"{i}.png" for i in range(4)], read_image, (3, 12, 16))
    assert files.shape == (4, 3, 12, 16) and torch.equal(files.in_memory()[[2, 0]], files.index_select(0, torch.tensor([2, 0])))


# ---------------------------------------------------------------- tasks
def test_task_refuses_masks_and_overlap():
    a, b = in_memory(4), in_memory(6)
    with pytest.raises(UserError, match="is `Labelled`, but it may have no masks"): Task("x", ("a", "b", "c"), class_palette(3), a, b, b)
    c = Labelled([f"v{i}" for i in range(6)], b.images, b.masks, 3)
    with pytest.raises(UserError, match="'i0' is in the task twice"):
        Task("x", ("a", "b", "c"), class_palette(3), a, Images(b.ids, b.images), c)


def test_split_id_knows_sets_not_order():
    assert split_id("ab", "cd", "e", "", (4, 4)) == split_id("ba", "dc", "e", "", (4, 4))
    others = [("ac", "bd", "e", "", (4, 4)), ("ab", "cd", "e", "", (4, 5)), ("ab", "cde", "", "", (4, 4))]
    assert len({split_id("ab", "cd", "e", "", (4, 4)), *(split_id(*o) for o in others)}) == 4
    assert len(split_id("a", "b", "c", "", (1, 1))) == 10


def test_image_tags_by_hand():
    m = torch.tensor([[[0, 2], [2, 255]], [[1, 1], [1, 1]]], dtype=torch.uint8)
    assert image_tags(m, 3).tolist() == [[1, 0, 1], [0, 1, 0]]


def test_what_is_no_data_set_is_refused_at_once():
    "Floats, other lengths, shapes and class ids, each in one sentence"
    x = torch.randint(0, 256, (4, 3, 6, 8), dtype=torch.uint8)
    y, ids = torch.zeros(4, 6, 8, dtype=torch.uint8), list("abcd")
    for images, masks, says in ((x / 255, y, r"images are float32, but .*uint8.* give \(255 \* x\)"), (x, y.long(), "masks are int64"), (x, y.bool(), "masks are bool"),
                                (x[:3], y, "3 images for 4 names"), (x, y[:2], "2 masks for 4 names"), (x[:, :1], y, r"images have the shape \(4, 1, 6, 8\)"),
                                (x, y[:, :5], r"masks are \(5, 8\) .* images are \(6, 8\)"), (x, y + 7, "mask of 'a' holds the value 7, but with 2 classes the values are 0 to 1"),
                                (x.numpy(), y, "images are of the kind ndarray")):
        with pytest.raises(UserError, match=says) as e: Labelled(ids, images, masks, 2)
        assert "\n" not in str(e.value)
    assert len(Labelled(ids, x, y + 255, np.int64(2))) == 4
    with pytest.raises(UserError, match="tags have the shape"): Images(ids, x, torch.zeros(3, 2))
    with pytest.raises(UserError, match="crop 'big' is not a size"): Images(ids, x, crop="big")


def three_sets(n_classes=3, size=(6, 8), tags=None):
    a = in_memory(6, size, n_classes)
    part = [slice(0, 2), slice(2, 4), slice(4, 6)]
    lab, unl, val = ((a.ids[s], a.images[s], a.masks[s]) for s in part)
    return Labelled(*lab, n_classes), Images(*unl[:2], tags), Labelled(*val, n_classes)


def test_a_task_refuses_sets_that_do_not_fit_together():
    lab, unl, val = three_sets()
    assert Task("x", tuple("abc"), class_palette(3), lab, unl, val).n_classes == 3
    with pytest.raises(UserError, match="'labelled' has 3 classes, but the task names 2"): Task("x", ("a", "b"), class_palette(2), lab, unl, val)
    with pytest.raises(UserError, match=r"Unlabelled images are \(5, 5\)"): Task("x", tuple("abc"), (), lab, three_sets(size=(5, 5))[1], val)
    with pytest.raises(UserError, match="have 2 columns, but there are 3"): Task("x", tuple("abc"), (), lab, three_sets(tags=torch.ones(2, 2))[1], val)


def test_the_fingerprint_changes_with_every_byte_and_with_nothing_else():
    def make(change=None):
        lab, unl, val = three_sets(tags=torch.ones(2, 3))
        if change: change(lab, unl, val)
        return Task("x", tuple("abc"), (), lab, unl, val)
    first = make()
    assert first.fingerprint == make().fingerprint and len(first.fingerprint) == 16 and int(first.fingerprint, 16) >= 0
    changes = [lambda a, b, c: a.masks[1, 0, 0].add_(1).remainder_(3), lambda a, b, c: a.images[0].bitwise_xor_(1), lambda a, b, c: b.images[1, 2, 5].bitwise_xor_(1),
               lambda a, b, c: c.masks[0, 3].fill_(255), lambda a, b, c: b.tags[0, 0].zero_()]
    others = [make(change) for change in changes]
    assert len({first.fingerprint, *(t.fingerprint for t in others)}) == 6 and {t.split_id for t in others} == {first.split_id}
    assert first.describe()["fingerprint"] == first.fingerprint and first.describe()["crop"] is None


def test_loaders_take_nothing_from_the_global_generator(tmp_path):
    for i in range(6): picture(tmp_path / f"{i}.png", seed=i)
    disk = Images(list("abcdef"), Files([tmp_path / f"{i}.png" for i in range(6)], read_image, (3, 12, 16)))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for workers in (0, 1):
        for batches in (loader(disk, 2, workers=workers, crop=8), one_pass(disk, 2, workers=workers)): next(batches)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_mean_does_not_depend_on_where_a_set_lies(tmp_path):
    for i in range(7): picture(tmp_path / f"{i}.png", seed=i)
    files = Files([tmp_path / f"{i}.png" for i in range(7)], read_image, (3, 12, 16))
    disk, memory = Images(range(7), files), Images(range(7), files.in_memory())
    assert image_mean(disk) == image_mean(memory) and image_mean(disk, at_most=2, large=0) == image_mean(memory, at_most=2, large=0) != image_mean(disk)


def test_sizes_may_be_numpy_numbers():
    assert as_size(np.int64(8)) == (8, 8) and as_size((np.int32(4), 5)) == (4, 5) and all(type(v) is int for v in as_size([np.int64(3), 4]))
    for wrong in (True, 0, -4, 1.5, np.float64(8), (1, 2, 3), (4, True), "8"):
        with pytest.raises(UserError, match="is not a size"): as_size(wrong)
