"verdict: gains by hand, intervals that keep their promise, refusals, the run to deploy"
import json
import math
import shutil

import numpy as np
import pytest
import torch
from helpers import QUICK, photos, two_methods
from torch import nn

from semiseg_nb.catalogue import load_split, load_task
from semiseg_nb.checkpoint import save_weights
from semiseg_nb.core import UserError
from semiseg_nb.data import Labelled
from semiseg_nb.engine import evaluate
from semiseg_nb.experiment import run
from semiseg_nb.records import read_records
from semiseg_nb.runs import finished_runs, rebuild
from semiseg_nb.verdict import (
    Interval,
    counts_of_run,
    estimate,
    image_counts,
    joined_counts,
    scores_of,
    units_of,
    verdict,
    with_ends,
)


def table(hits, pixels=100):
    "Counts (R,N,3,C) of classes of equal size: (R,N,C) hits of so many pixels, and as many answers"
    hits = np.asarray(hits, np.int64)
    return np.stack([hits, np.full_like(hits, pixels), np.full_like(hits, pixels)], 2)


# ---------------------------------------------------------------- counts and scores

class Bright(nn.Module):
    "Bright pixels are class 1"
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, x): return torch.stack([self.w - x[:, 0], x[:, 0]], 1)


def two_images():
    grey = torch.tensor([[0, 0, 255, 255], [0, 255, 255, 255]]).byte()[:, None, None].expand(2, 3, 1, 4)
    return Labelled(["a", "b"], grey, torch.tensor([[[0, 1, 1, 255]], [[0, 1, 1, 1]]]).byte(), 2)


def test_counts_by_hand():
    assert image_counts(Bright(), two_images(), "cpu").tolist() == [[[1, 1], [1, 2], [2, 1]], [[1, 3], [1, 3], [1, 3]]]


def test_the_pooled_score_is_that_of_the_metrics():
    counts = image_counts(Bright(), two_images(), "cpu")
    assert scores_of(counts[None])[0, 0, 0] == pytest.approx(evaluate(Bright(), two_images())["miou"])
    assert scores_of(counts[None])[0, 0].tolist() == pytest.approx([(2 / 3 + 4 / 5) / 2, 2 / 3, 4 / 5])
    assert scores_of(counts[None], np.array([[0, 3]]))[0, 0].tolist() == [1, 1, 1], "three times the second image"


def test_a_class_that_is_nowhere_is_left_out_and_one_that_a_draw_lacks_too():
    counts = np.array([[[[5, 0], [5, 0], [5, 0]], [[4, 3], [5, 5], [6, 4]]]])               # class 1 is on the second image only
    assert scores_of(counts)[0, 0, 2] == pytest.approx(3 / 6)
    first = scores_of(counts, np.array([[2, 0]]))[0, 0]
    assert first[0] == 1 and math.isnan(first[2])
    nowhere = np.zeros_like(counts)
    assert np.isnan(scores_of(nowhere)).all()
    guessed = np.array([[[[5, 0], [5, 0], [5, 2]]]])                                        # answered, never true: 0, as the metrics say
    assert scores_of(guessed)[0, 0].tolist() == [0.5, 1, 0]


# ---------------------------------------------------------------- intervals

def test_the_gain_of_two_tables_by_hand():
    base = table(np.full((3, 10, 2), 50))                                                   # IoU 50/150
    better = table(np.full((3, 10, 2), 60))                                                 # IoU 60/140
    gain = estimate(better, base)[0]
    assert gain.mean == pytest.approx(60 / 140 - 50 / 150) and (gain.low, gain.high) == pytest.approx((gain.mean, gain.mean))
    assert (gain.images, gain.runs) == pytest.approx((0, 0), abs=1e-9) and gain.sure


def test_identical_methods_gain_nothing():
    counts = table(np.random.default_rng(0).integers(20, 90, (3, 40, 2)))
    for g in estimate(counts, counts): assert g[:3] == (0, 0, 0) and not g.sure


def test_two_methods_that_differ_by_luck_have_0_in_the_interval():
    rng = np.random.default_rng(1)
    a, b = (table(rng.integers(20, 90, (3, 40, 2))) for _ in range(2))
    gain = estimate(a, b)[0]
    assert gain.low < 0 < gain.high and gain.images > 0 and gain.runs > 0


def test_the_error_from_images_is_that_of_a_mean_and_from_runs_that_of_theirs():
    rng = np.random.default_rng(2)
    hits = np.repeat(rng.integers(45, 55, (1, 400, 1)), 4, 0)
    hits = np.concatenate([hits, hits], 2)                                                  # the four runs say the same
    found = estimate(table(hits))[0]
    per_image = hits[0, :, 0]
    slope = 200 / (200 - per_image.mean()) ** 2                                             # of the IoU h / (200 - h)
    assert found.images == pytest.approx(slope * per_image.std(ddof=1) / 20, rel=0.06) and found.runs == 0
    shifted = table(hits + np.array([-6, -2, 2, 6])[:, None, None])
    per_run = scores_of(shifted)[0, :, 0]
    assert estimate(shifted)[0].runs == pytest.approx(per_run.std(ddof=1) / 2)


def test_runs_of_one_split_are_one_unit():
    hits = np.full((4, 30, 1), 50) + np.array([-5, -5, 5, 5])[:, None, None]
    alone, splits = estimate(table(hits))[0], estimate(table(hits), splits=["a", "a", "b", "b"])[0]
    assert splits.runs > 1.5 * alone.runs, "two splits with two seeds each say less than four splits"
    assert units_of(["a", "b", "a"]) == [[0, 2], [1]] and units_of(["a", "a"]) == [[0], [1]]


def test_one_run_has_an_interval_over_images_only():
    rng = np.random.default_rng(3)
    found = estimate(table(rng.integers(20, 90, (1, 40, 2))))[0]
    assert math.isnan(found.runs) and found.low < found.mean < found.high
    nothing = estimate(table(rng.integers(20, 90, (1, 1, 2))))[0]
    assert math.isnan(nothing.low) and nothing.text() == f"{100 * nothing.mean:.1f}", "one image of one run: no interval at all"


def test_student_counts_runs_and_images_by_their_part():
    mean, v = 0.02, 1e-4
    few = with_ends(mean, [(v, 3)], 0.95)
    assert few[1] - mean == pytest.approx(4.303 * 0.01, rel=1e-3)                           # t with two degrees of freedom
    many = with_ends(mean, [(v, 2000), (0.0, 3)], 0.95)
    assert many[1] - mean == pytest.approx(1.961 * 0.01, rel=1e-3)
    assert with_ends(mean, [(math.nan, 3)], 0.95)[0] != with_ends(mean, [(math.nan, 3)], 0.95)[0]


@pytest.mark.parametrize("runs,by_run,least", [(2, 0.02, 0.84), (4, 0.02, 0.9), (4, 0.0, 0.9)])
def test_the_interval_covers_the_true_gain_as_often_as_it_says(runs, by_run, least):
    "Studies whose true gain is known: each image and each run adds its own luck. 1,500 of them gave 0.91, 0.94, 0.95; three standard errors of 200 are 5 points"
    rng = np.random.default_rng(0)

    def study(R, N):
        luck = rng.normal(0, 0.06, N) + rng.normal(0, by_run, (R, 1)) + rng.normal(0, 0.01, (R, N))
        middle = 0.7 + rng.normal(0, 0.05, N)
        return tuple(table((500 * np.clip(x, 0, 1)).astype(int)[..., None], 500) for x in (middle + 0.02 + luck, middle + np.zeros((R, N))))
    truth = np.mean([np.subtract(*(scores_of(c)[0, :, 0].mean() for c in study(20, 2000))) for _ in range(20)])
    found = [estimate(*study(runs, 40), draws=100)[0] for _ in range(200)]
    kept = np.mean([f.low <= truth <= f.high for f in found])
    assert least <= kept <= 0.995, kept
    if by_run:
        alone = np.mean([abs(f.mean - truth) <= 1.96 * f.images for f in found])
        assert alone < kept - 0.05, "images alone promise too much"


def test_scores_stay_between_0_and_100():
    found = estimate(table([[[99], [0]], [[0], [99]], [[0], [0]]]))[0]
    assert found.low == 0 and found.high <= 1


def test_an_interval_as_text():
    assert Interval(0.014, 0.005, 0.0231).text() == "1.4 [0.5, 2.3]" and Interval(0.004, -0.01, 0.018).text("+") == "+0.4 [-1.0, +1.8]"
    assert Interval(math.nan, math.nan, math.nan).text() == "-" and Interval(-0.02, -0.03, -0.01).size() == "2.0 [1.0, 3.0]"


def test_tables_on_different_images_are_joined():
    counts, ids = joined_counts([np.ones((2, 3, 1), int), 2 * np.ones((2, 3, 1), int)], [["a", "b"], ["c", "b"]])
    assert ids == ["a", "b", "c"] and counts[:, :, 0, 0].tolist() == [[1, 1, 0], [0, 2, 2]]


# ---------------------------------------------------------------- folders of runs

@pytest.fixture(scope="module")
def first(tmp_path_factory): return two_methods(tmp_path_factory.mktemp("first"))


@pytest.fixture
def trained(first, tmp_path):
    "A copy that a test may change"
    out, task, data = first
    shutil.copytree(out, tmp_path / "runs")
    return tmp_path / "runs", task, data


def rig(out, task, tables, split="val"):
    "Put tables in the place of what the networks say: method -> (R,N,3,C), in the order of the seeds"
    runs = {(r.request["method"], r.request["seed"]): r for r in finished_runs(out)[0]}
    images = {"val": task.val}.get(split) or load_split("folder", task_root(out), split="test", size=task.size, classes=task.classes)
    for (name, seed), r in runs.items():
        counts_of_run(r, task, images, split, "cpu")
        path = r.folder / f"counts-{split}.npz"
        with np.load(path) as kept: key = kept["key"]
        np.savez_compressed(path, key=key, counts=tables[name][seed])


def task_root(out): return finished_runs(out)[0][0].request["data"]["data_root"]


def flat(values, n): return table(np.broadcast_to(np.asarray(values)[:, None, None], (len(values), n, 3)))


def test_a_verdict_on_runs_as_they_are(trained):
    out, task, _ = trained
    found = verdict(out, device="cpu")
    assert found.split == "test" and found.n_images == 5 and found.baseline.method == "supervised"
    assert len(found.rows) == 1 and len(found.rows[0].repetitions) == 3
    records, _ = read_records(out)
    uda = [r for r in records if r["method"] == "uda"]
    assert found.rows[0].seconds == pytest.approx(np.mean([r["seconds"] for r in uda]))
    runs = finished_runs(out)[0]
    for r in runs:                                                                          # the weights say what the records say
        counts = counts_of_run(r, task, task.val, "val", "cpu")
        name = {"supervised": "supervised_ema"}.get(r.request["method"], r.request["method"])
        record, = (x for x in records if (x["method"], x["seed"]) == (name, r.request["seed"]))
        assert scores_of(counts[None])[0, 0, 0] == pytest.approx(record["result"]["miou"], abs=1e-9)
    json.dumps(found.as_dict(), allow_nan=False)
    for word in ("On 5 test images, 1 split", "5 images are few: below 30", "gain in points", "UDA"): assert word in str(found)


def test_the_sentence_says_gain_cost_and_loss(trained):
    out, task, _ = trained
    base = np.full((3, 5, 3), 50)
    better = base + np.array([20, 20, -10])                                                 # two classes gain, the third loses
    for split, n in (("val", 6), ("test", 5)):
        one, two = (np.broadcast_to(x[:, :1], (3, n, 3)).copy() for x in (base, better))
        rig(out, task, {"supervised": table(one), "uda": table(two)}, split)
    found = verdict(out, device="cpu")
    gain = (2 * 70 / 130 + 40 / 160 - 3 * 50 / 150) / 3
    assert found.rows[0].gain[0].mean == pytest.approx(gain)
    text = found.sentence
    assert text.startswith(f"UDA gains {100 * gain:.1f} points of mIoU".replace("points", f"[{100 * gain:.1f}, {100 * gain:.1f}] points")), text
    assert "over Supervised for" in text and "times the time" in text
    lost = 100 * (50 / 150 - 40 / 160)
    assert f"for `{task.classes[2]}` it loses {lost:.1f} [{lost:.1f}, {lost:.1f}]" in text and text.endswith(".")
    for split, n in (("val", 6), ("test", 5)): rig(out, task, {"supervised": table(np.full((3, n, 3), 60)), "uda": table(np.full((3, n, 3), 50))}, split)
    assert verdict(out, device="cpu").sentence.startswith("UDA loses 9.5 [9.5, 9.5] points of mIoU against Supervised")
    for split, n in (("val", 6), ("test", 5)):
        rng = np.random.default_rng(n)
        rig(out, task, {"supervised": table(rng.integers(20, 90, (3, n, 3))), "uda": table(rng.integers(20, 90, (3, n, 3)))}, split)
    unsure = verdict(out, device="cpu")
    assert unsure.sentence.startswith("These runs cannot tell UDA from Supervised: ")
    assert any("contains 0, so these runs show no clear difference" in n for n in unsure.notes)


def test_classes_that_nobody_shows_and_rare_ones_are_named(trained):
    out, task, _ = trained
    counts = table(np.full((3, 5, 3), 50))
    counts[:, :, :, 2] = 0
    counts[:, 1:, :, 1] = 0
    rig(out, task, {"supervised": counts, "uda": counts}, "test")
    found = verdict(out, device="cpu")
    assert found.shown == [5, 1, 0]
    assert any(f"No image shows {task.classes[2]}" in n for n in found.notes) and any(f"{task.classes[1]} (1)" in n for n in found.notes)
    assert math.isnan(found.rows[0].gain[3].mean)
    json.dumps(found.as_dict(), allow_nan=False)


def test_the_deployed_run_is_the_median_of_the_best_arm_on_validation_images(trained):
    "And the test images have no say in it"
    out, task, _ = trained
    rig(out, task, {"supervised": flat([50, 50, 50], 6), "uda": flat([80, 40, 60], 6)}, "val")
    rig(out, task, {"supervised": flat([90, 90, 90], 5), "uda": flat([20, 70, 10], 5)}, "test")
    found = verdict(out, device="cpu")
    assert (found.best["method"], found.best["seed"]) == ("uda", 2) and found.best["miou"] == pytest.approx(60 / 140)
    best = out / "best"
    source = out / found.best["run"]
    assert (best / "weights.safetensors").read_bytes() == (source / "weights.safetensors").read_bytes()
    assert json.loads((best / "run.json").read_text())["seed"] == 2
    kept = json.loads((best / "verdict.json").read_text())
    assert "median" in kept["best"]["rule"] and kept["sentence"] == found.sentence
    assert sorted(p.name for p in best.iterdir()) == ["run.json", "verdict.json", "weights.safetensors"], "no checkpoints, no counts"
    again = verdict(out, device="cpu")                                           # best/ is no run of its own
    assert [len(r.repetitions) for r in (again.baseline, *again.rows)] == [3, 3] and again.as_dict() == found.as_dict()
    records, refused = read_records(out)
    assert not refused and len(records) == 3 * 2 + 3
    assert not list(out.glob(".*"))


def test_of_an_even_number_of_runs_the_lower_middle_one_is_deployed(trained):
    out, task, _ = trained
    for r in finished_runs(out)[0]:
        if r.request["seed"] == 2: shutil.rmtree(r.folder)
    rig(out, task, {"supervised": flat([60, 80, 0], 6), "uda": flat([10, 20, 0], 6)}, "val")
    found = verdict(out, device="cpu")
    assert (found.best["method"], found.best["seed"]) == ("supervised", 0)


def test_a_folder_best_that_is_not_ours_stays(trained):
    out = trained[0]
    (out / "best").mkdir()
    (out / "best" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="best was not made by a verdict, so it is not replaced: rename it"): verdict(out, device="cpu")
    assert (out / "best" / "notes.txt").read_text() == "mine"


def test_without_a_test_split_the_validation_images_are_scored(first, tmp_path):
    root = photos(tmp_path / "photos")
    data = dict(dataset="folder", data_root=str(root), n_labelled=4)
    task = load_task(**data)
    for name in ("supervised", "uda"): run(name, task, data=data, out_dir=tmp_path / "runs", **QUICK)
    found = verdict(tmp_path / "runs", device="cpu")
    assert found.split == "val" and found.n_images == 6 and any("single run of a method" in n for n in found.notes)
    given = verdict(tmp_path / "runs", device="cpu", test=first[1].val)
    assert given.split == "test" and given.n_images == 6


def test_a_task_of_ones_own_is_handed_over(first, tmp_path):
    task = first[1]
    for name in ("supervised", "uda"): run(name, task, out_dir=tmp_path, **QUICK)
    with pytest.raises(UserError, match="does not say where they are: train again, or give tasks="): verdict(tmp_path, device="cpu")
    assert verdict(tmp_path, tasks=[task], device="cpu").n_images == 6


def test_counts_are_kept_until_weights_or_images_change(trained, monkeypatch):
    out, task, _ = trained
    r = finished_runs(out)[0][0]
    counts = counts_of_run(r, task, task.val, "val", "cpu")
    monkeypatch.setattr("semiseg_nb.verdict.image_counts", lambda *a: counts + 1)
    assert (counts_of_run(r, task, task.val, "val", "cpu") == counts).all()
    fewer = Labelled(task.val.ids[:6], task.val.images.index_select(0, torch.arange(6)).flip(3), task.val.masks.index_select(0, torch.arange(6)), 3)
    assert (counts_of_run(r, task, fewer, "val", "cpu") == counts + 1).all(), "other images"
    monkeypatch.setattr("semiseg_nb.verdict.image_counts", lambda *a: counts + 2)
    method = rebuild(r, task)
    with torch.no_grad(): next(method.ema.net.parameters()).add_(1)
    save_weights(method.ema.net, r.folder / "weights", {})
    assert (counts_of_run(r, task, fewer, "val", "cpu") == counts + 2).all(), "other weights"
    (r.folder / "counts-val.npz").write_bytes(b"PK broken")
    monkeypatch.setattr("semiseg_nb.verdict.image_counts", lambda *a: counts + 3)
    assert (counts_of_run(r, task, fewer, "val", "cpu") == counts + 3).all(), "a broken file is made again"


def test_several_arms_have_titles_and_the_best_baseline_is_the_one(trained):
    out, task, data = trained
    for seed in range(2): run("supervised", task, seed=seed, settings={"views": "strong", "dice": 1.0}, data=data, out_dir=out, **QUICK)
    runs = {(r.request["method"], r.request["settings"]["views"], r.request["seed"]): r for r in finished_runs(out)[0]}
    def say(method, views, seed, hits):
        for split, n, images in (("val", 6, task.val), ("test", 5, load_split("folder", data["data_root"], split="test", size=task.size, classes=task.classes))):
            r = runs[method, views, seed]
            counts_of_run(r, task, images, split, "cpu")
            with np.load(r.folder / f"counts-{split}.npz") as kept: key = kept["key"]
            np.savez_compressed(r.folder / f"counts-{split}.npz", key=key, counts=flat([hits], n)[0])
    for seed in range(3): say("uda", "weak", seed, 40), say("supervised", "weak", seed, 50)
    for seed in range(2): say("supervised", "strong", seed, 60)
    found = verdict(out, device="cpu")
    assert found.baseline.title == "Supervised (views strong, dice 1)" and [r.title for r in found.rows] == ["UDA", "Supervised"]
    assert found.rows[0].gain[0].mean == pytest.approx(40 / 160 - 60 / 140) and found.best["method"] == "supervised"
    assert any("Two runs of a method are few" in n for n in found.notes) and not any("The best of" in n for n in found.notes)


# ---------------------------------------------------------------- refusals

def test_what_is_missing_is_said(trained, tmp_path):
    out = trained[0]
    with pytest.raises(UserError, match="There is no folder .*nowhere"): verdict(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no finished run: train with out_dir="): verdict(tmp_path / "empty")
    with pytest.raises(UserError, match="level is 1.0, but it should be between 0 and 1"): verdict(out, level=1)
    for r in finished_runs(out)[0]:
        if r.request["method"] == "supervised": (r.folder / "weights.safetensors").unlink()
    assert sum("is not finished and is left out" in n for n in finished_runs(out)[1]) == 3
    with pytest.raises(UserError, match="holds no run of the baseline, only of uda: train 'supervised'"): verdict(out, device="cpu")


def test_runs_without_a_partner(trained):
    out = trained[0]
    for r in finished_runs(out)[0]:
        if (r.request["method"], r.request["seed"]) == ("supervised", 0): shutil.rmtree(r.folder)
    found = verdict(out, device="cpu")
    assert any("1 of 3 runs of UDA have no partner" in n for n in found.notes) and len(found.rows[0].repetitions) == 3
    for r in finished_runs(out)[0]:
        if (r.request["method"], r.request["seed"]) in {("uda", 1), ("uda", 2)}: shutil.rmtree(r.folder)
    with pytest.raises(UserError, match="UDA and Supervised share no split and seed: train both"): verdict(out, device="cpu")
