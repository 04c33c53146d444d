"""The contract: streams, sets, crops, batches, tasks."""
import time

import pytest
import torch
from helpers import in_memory, picture
from torch.utils.data import DataLoader

from semiseg_nb.catalogue import load_task
from semiseg_nb.core import UserError
from semiseg_nb.data import Files, Images, Labelled, Stream, Task, image_tags, loader, one_pass, random_crop, split_id
from semiseg_nb.folders import class_palette, read_image


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
    with pytest.raises(TypeError, match="Labelled"): Task("x", ("a", "b", "c"), class_palette(3), a, b, b)
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
