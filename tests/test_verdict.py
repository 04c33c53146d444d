"verdict: gains by hand, intervals that keep their promise, refusals, the run to deploy, the label budget, what to label next"
import json
import math
import shutil

import numpy as np
import pytest
import torch
from helpers import mask, picture
from torch import nn

from semiseg_nb.catalogue import load_split, load_task
from semiseg_nb.checkpoint import save_weights
from semiseg_nb.core import UserError
from semiseg_nb.data import Images, Labelled
from semiseg_nb.engine import evaluate
from semiseg_nb.experiment import run
from semiseg_nb.records import read_records
from semiseg_nb.verdict import (
    Budget,
    Candidate,
    Interval,
    check_budget,
    counts_of_run,
    disagreement,
    estimate,
    fewer_masks,
    finished_runs,
    image_counts,
    joined_counts,
    label_budget,
    label_sheet,
    power_law,
    read_budget,
    rebuild,
    scores_of,
    spread_out,
    to_label_next,
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
    assert Interval(math.nan, math.nan, math.nan).text() == "-"


def test_tables_on_different_images_are_joined():
    counts, ids = joined_counts([np.ones((2, 3, 1), int), 2 * np.ones((2, 3, 1), int)], [["a", "b"], ["c", "b"]])
    assert ids == ["a", "b", "c"] and counts[:, :, 0, 0].tolist() == [[1, 1, 0], [0, 2, 2]]


# ---------------------------------------------------------------- folders of runs

BUDGET = dict(steps=2, batch_size=2, width=4, device="cpu", progress=False)


def photos(root, test=False):
    "8 training images with masks, 6 for validation, of 3 classes; on request a split `test` of 5"
    sizes = {"train": 8, "val": 6} | ({"test": 5} if test else {})
    for s, (split, n) in enumerate(sizes.items()):
        for i in range(n):
            picture(root / "images" / split / f"{split}{i}.png", (32, 32), 100 * s + i)
            mask(root / "masks" / split / f"{split}{i}.png", (32, 32), seed=100 * s + i)
    return root


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    "A folder with two steps of the baseline and of UDA, three seeds each, and its data"
    root = photos(tmp_path_factory.mktemp("photos"), test=True)
    data = dict(dataset="folder", data_root=str(root), n_labelled=4)
    task, out = load_task(**data), tmp_path_factory.mktemp("runs")
    for seed in range(3):
        for name in ("supervised", "uda"): run(name, task, seed=seed, data=data, out_dir=out, **BUDGET)
    return out, task, data


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
    found = verdict(out, device="cpu", draws=100)
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
    found = verdict(out, device="cpu", draws=100)
    gain = (2 * 70 / 130 + 40 / 160 - 3 * 50 / 150) / 3
    assert found.rows[0].gain[0].mean == pytest.approx(gain)
    text = found.sentence
    assert text.startswith(f"UDA gains {100 * gain:.1f} points of mIoU".replace("points", f"[{100 * gain:.1f}, {100 * gain:.1f}] points")), text
    assert "over Supervised for" in text and "times the time" in text
    lost = 100 * (50 / 150 - 40 / 160)
    assert f"for `{task.classes[2]}` it loses {lost:.1f} [{lost:.1f}, {lost:.1f}]" in text and text.endswith(".")
    for split, n in (("val", 6), ("test", 5)): rig(out, task, {"supervised": table(np.full((3, n, 3), 60)), "uda": table(np.full((3, n, 3), 50))}, split)
    assert verdict(out, device="cpu", draws=100).sentence.startswith("UDA loses 9.5 [9.5, 9.5] points of mIoU against Supervised")
    for split, n in (("val", 6), ("test", 5)):
        rng = np.random.default_rng(n)
        rig(out, task, {"supervised": table(rng.integers(20, 90, (3, n, 3))), "uda": table(rng.integers(20, 90, (3, n, 3)))}, split)
    unsure = verdict(out, device="cpu", draws=100)
    assert unsure.sentence.startswith("These runs cannot tell UDA from Supervised: ")
    assert any("contains 0, so these runs show no clear difference" in n for n in unsure.notes)


def test_classes_that_nobody_shows_and_rare_ones_are_named(trained):
    out, task, _ = trained
    counts = table(np.full((3, 5, 3), 50))
    counts[:, :, :, 2] = 0
    counts[:, 1:, :, 1] = 0
    rig(out, task, {"supervised": counts, "uda": counts}, "test")
    found = verdict(out, device="cpu", draws=100)
    assert found.shown == [5, 1, 0]
    assert any(f"No image shows {task.classes[2]}" in n for n in found.notes) and any(f"{task.classes[1]} (1)" in n for n in found.notes)
    assert math.isnan(found.rows[0].gain[3].mean)
    json.dumps(found.as_dict(), allow_nan=False)


def test_the_deployed_run_is_the_median_of_the_best_arm_on_validation_images(trained):
    "And the test images have no say in it"
    out, task, _ = trained
    rig(out, task, {"supervised": flat([50, 50, 50], 6), "uda": flat([80, 40, 60], 6)}, "val")
    rig(out, task, {"supervised": flat([90, 90, 90], 5), "uda": flat([20, 70, 10], 5)}, "test")
    found = verdict(out, device="cpu", draws=100)
    assert (found.best["method"], found.best["seed"]) == ("uda", 2) and found.best["miou"] == pytest.approx(60 / 140)
    best = out / "best"
    source = out / found.best["run"]
    assert (best / "weights.safetensors").read_bytes() == (source / "weights.safetensors").read_bytes()
    assert json.loads((best / "run.json").read_text())["seed"] == 2
    kept = json.loads((best / "verdict.json").read_text())
    assert "median" in kept["best"]["rule"] and kept["sentence"] == found.sentence
    assert sorted(p.name for p in best.iterdir()) == ["run.json", "verdict.json", "weights.safetensors"], "no checkpoints, no counts"
    again = verdict(out, device="cpu", draws=100)                                           # best/ is no run of its own
    assert [len(r.repetitions) for r in (again.baseline, *again.rows)] == [3, 3] and again.as_dict() == found.as_dict()
    records, refused = read_records(out)
    assert not refused and len(records) == 3 * 2 + 3
    assert not list(out.glob(".*"))


def test_of_an_even_number_of_runs_the_lower_middle_one_is_deployed(trained):
    out, task, _ = trained
    for r in finished_runs(out)[0]:
        if r.request["seed"] == 2: shutil.rmtree(r.folder)
    rig(out, task, {"supervised": flat([60, 80, 0], 6), "uda": flat([10, 20, 0], 6)}, "val")
    found = verdict(out, device="cpu", draws=100)
    assert (found.best["method"], found.best["seed"]) == ("supervised", 0)


def test_a_folder_best_that_is_not_ours_stays(trained):
    out = trained[0]
    (out / "best").mkdir()
    (out / "best" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="best was not made by a verdict, so it is not replaced: rename it"): verdict(out, device="cpu", draws=100)
    assert (out / "best" / "notes.txt").read_text() == "mine"


def test_without_a_test_split_the_validation_images_are_scored(first, tmp_path):
    root = photos(tmp_path / "photos")
    data = dict(dataset="folder", data_root=str(root), n_labelled=4)
    task = load_task(**data)
    for name in ("supervised", "uda"): run(name, task, data=data, out_dir=tmp_path / "runs", **BUDGET)
    found = verdict(tmp_path / "runs", device="cpu", draws=100)
    assert found.split == "val" and found.n_images == 6 and any("single run of a method" in n for n in found.notes)
    given = verdict(tmp_path / "runs", device="cpu", draws=100, test=first[1].val)
    assert given.split == "test" and given.n_images == 6


def test_a_task_of_ones_own_is_handed_over(first, tmp_path):
    task = first[1]
    for name in ("supervised", "uda"): run(name, task, out_dir=tmp_path, **BUDGET)
    with pytest.raises(UserError, match="does not say where they are: train again, or give tasks="): verdict(tmp_path, device="cpu")
    assert verdict(tmp_path, tasks=[task], device="cpu", draws=100).n_images == 6


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
    for seed in range(2): run("supervised", task, seed=seed, settings={"views": "strong", "dice": 1.0}, data=data, out_dir=out, **BUDGET)
    runs = {(r.request["method"], r.request["settings"]["views"], r.request["seed"]): r for r in finished_runs(out)[0]}
    def say(method, views, seed, hits):
        for split, n, images in (("val", 6, task.val), ("test", 5, load_split("folder", data["data_root"], split="test", size=task.size, classes=task.classes))):
            r = runs[method, views, seed]
            counts_of_run(r, task, images, split, "cpu")
            with np.load(r.folder / f"counts-{split}.npz") as kept: key = kept["key"]
            np.savez_compressed(r.folder / f"counts-{split}.npz", key=key, counts=flat([hits], n)[0])
    for seed in range(3): say("uda", "weak", seed, 40), say("supervised", "weak", seed, 50)
    for seed in range(2): say("supervised", "strong", seed, 60)
    found = verdict(out, device="cpu", draws=100)
    assert found.baseline.title == "Supervised (views strong, dice 1)" and [r.title for r in found.rows] == ["UDA", "Supervised"]
    assert found.rows[0].gain[0].mean == pytest.approx(40 / 160 - 60 / 140) and found.best["method"] == "supervised"
    assert any("Two runs of a method are few" in n for n in found.notes) and not any("The best of" in n for n in found.notes)


# ---------------------------------------------------------------- refusals

def test_runs_of_another_budget_are_not_compared(trained):
    out, task, data = trained
    run("uda", task, data=data, out_dir=out, **BUDGET | {"steps": 3, "batch_size": 4})
    with pytest.raises(UserError, match=r"cannot be compared, they differ in steps \(supervised, uda: 2; uda: 3\), and in batch_size"): verdict(out, device="cpu")
    few = load_task(**data | {"n_labelled": 5})
    other = out.parent / "other"
    run("supervised", few, data=data, out_dir=other, **BUDGET)
    both = finished_runs(out)[0][:1] + finished_runs(other)[0]
    with pytest.raises(UserError, match=r"n_labelled \(supervised: 4; supervised: 5\).*keep each budget in a folder of its own"): check_budget(both, out)


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
    found = verdict(out, device="cpu", draws=100)
    assert any("1 runs of UDA have no partner" in n for n in found.notes) and len(found.rows[0].repetitions) == 3
    for r in finished_runs(out)[0]:
        if (r.request["method"], r.request["seed"]) in {("uda", 1), ("uda", 2)}: shutil.rmtree(r.folder)
    with pytest.raises(UserError, match="UDA and Supervised .* share no split and seed"): verdict(out, device="cpu")


def test_changed_files_are_said(trained):
    out = trained[0]
    r = finished_runs(out)[0][0]
    path = r.folder / "run.json"
    path.write_text(path.read_text().replace('"seed": ', '"seed": 1'))
    assert any("was changed or renamed" in n for n in finished_runs(out)[1])
    path.write_text("{")
    with pytest.raises(UserError, match="no readable JSON .*: train again, or remove its folder"): verdict(out)


# ---------------------------------------------------------------- the budget of labels

def test_a_power_law_is_found_again():
    n = [5, 10, 20]
    assert power_law(n, [0.8 * k ** -0.3 for k in n]) == pytest.approx((0.8, 0.3))
    exact = Budget("supervised", n, [[1 - 0.8 * k ** -0.3 for k in n]] * 3).at(40)
    assert exact[:3] == pytest.approx([1 - 0.8 * 40 ** -0.3] * 3)
    spread = Budget("supervised", n, [[1 - a * k ** -0.3 for k in n] for a in (0.75, 0.8, 0.85)]).at(40)
    logs = np.log([0.75, 0.8, 0.85]) - 0.3 * np.log(40)
    half = 4.3027 * logs.std(ddof=1) / math.sqrt(3)
    assert spread[:3] == pytest.approx([1 - math.exp(logs.mean() + d) for d in (0, half, -half)], rel=1e-4)
    one = Budget("supervised", n, [[0.3, 0.4, 0.5]]).at(40)
    assert 0.5 < one.mean < 0.65 and math.isnan(one.low)


@pytest.mark.parametrize("memory_limit", [2e9, 0])
def test_fewer_masks_are_nested_and_the_others_become_unlabelled(first, memory_limit):
    task = load_task(**first[2], memory_limit=memory_limit)
    sets = [fewer_masks(task, n, 0) for n in (1, 2, 3, 4)]
    for small, large in zip(sets, sets[1:]): assert set(small.labelled.ids) < set(large.labelled.ids)
    assert sets[-1] is task and sets[0].mean == task.mean and sets[0].val is task.val
    assert set(sets[0].labelled.ids) | set(sets[0].unlabelled.ids) == set(task.labelled.ids) | set(task.unlabelled.ids)
    place = {i: k for k, i in enumerate(task.labelled.ids)}
    two = sets[1].labelled
    for i, name in enumerate(two.ids):
        assert torch.equal(two[i]["image"], task.labelled[place[name]]["image"]) and torch.equal(two[i]["mask"], task.labelled[place[name]]["mask"])
    free = next(i for i in sets[1].unlabelled.ids if i in place)
    assert torch.equal(sets[1].unlabelled[sets[1].unlabelled.ids.index(free)]["image"], task.labelled[place[free]]["image"])
    assert any(set(fewer_masks(task, 2, s).labelled.ids) != set(two.ids) for s in range(1, 6)), "another seed, another choice"


def test_the_label_budget_is_part_of_the_sentence(trained):
    out, task, data = trained
    found = label_budget(task, out, seeds=(0, 1), fractions=(0.5, 1.0), data=data, **BUDGET)
    assert found.n == [2, 4] and np.shape(found.miou) == (2, 2) and read_budget(out) == found
    runs = finished_runs(out)[0]
    assert len(runs) == 6, "runs with fewer masks are none of the comparison; those with all masks were there"
    records, _ = read_records(out)
    full = next(r for r in records if r["method"] == "supervised_ema" and r["seed"] == 1 and r["dataset"]["n_labelled"] == 4)
    assert found.miou[1][1] == full["result"]["miou"]
    text = verdict(out, device="cpu", draws=100).sentence
    assert "with 8 masks instead of 4 the baseline alone would reach " in text and "on the validation images." in text
    label_budget(task, out, seeds=(0,), fractions=(0.5, 1.0), data=data, **BUDGET | {"steps": 1})
    for r in finished_runs(out)[0]:
        if r.request["steps"] == 1: shutil.rmtree(r.folder)
    other = verdict(out, device="cpu", draws=100)
    assert "masks" not in other.sentence and any("is of other runs (another steps)" in n for n in other.notes)


def test_a_label_budget_that_makes_no_curve_is_refused(first, tmp_path):
    task = first[1]
    with pytest.raises(UserError, match=r"fractions are \(0.5, 2\), but each should be more than 0"): label_budget(task, tmp_path, fractions=(0.5, 2))
    with pytest.raises(UserError, match=r"curve through \[4\] of 4 masks"): label_budget(task, tmp_path, fractions=(1.0,))
    (tmp_path / "label-budget").mkdir()
    (tmp_path / "label-budget" / "budget.json").write_text('{"n": 3}')
    with pytest.raises(UserError, match="budget.json is no label budget"): read_budget(tmp_path)


# ---------------------------------------------------------------- what to label next

def test_disagreement_is_what_a_label_could_teach():
    sure = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(2, 1, 2, 1, 1)
    assert disagreement(sure).item() == pytest.approx(math.log(2))
    assert disagreement(torch.full_like(sure, 0.5)) == 0, "all are equally unsure"
    assert disagreement(sure[:1]) == 0, "one alone cannot disagree"


def test_centres_are_far_from_each_other():
    line = torch.tensor([[0.0], [0.1], [5.0], [10.0], [50.0]])
    scores = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    assert spread_out(line[:4], scores[:4], 3) == [0, 3, 2]
    assert spread_out(line, scores, 1) == [0] and spread_out(torch.arange(9.0)[:, None], torch.arange(9.0), 2)[1] == 1, "only the 4 n most disputed are asked"
    assert sorted(spread_out(torch.zeros(3, 2), torch.arange(3.0), 5)) == [0, 1, 2]


class Says(nn.Module):
    "Class 1 where the red is above a threshold"
    def __init__(self, threshold):
        super().__init__()
        self.t = nn.Parameter(torch.tensor(threshold))

    def forward(self, x): return torch.stack([0 * x[:, 0], 50 * (x[:, 0] - self.t)], 1)


def test_the_disputed_images_are_labelled_next():
    red = torch.tensor([0, 120, 255, 128, 10, 250]).byte()                                  # only 120 and 128 lie between the two thresholds
    images = Images([f"i{k}" for k in range(6)], red[:, None, None, None].expand(6, 3, 8, 8).contiguous())
    models = [Says(0.3), Says(0.7)]
    found = to_label_next(models, images, 2, device="cpu")
    assert found[0].id in ("i1", "i3") and found[0].score == pytest.approx(math.log(2), abs=0.01) and len({c.id for c in found}) == 2
    assert found == to_label_next(models, images, 2, device="cpu") and isinstance(found[0], Candidate)
    alone = to_label_next(Says(0.5), images, 2, device="cpu")
    assert len(alone) == 2 and alone[0].score > 0, "views of one model disagree as well"
    fig = label_sheet(found, models, images)
    assert len(fig.axes) == 6
    with pytest.raises(UserError, match="needs at least one trained method"): to_label_next([], images)
    with pytest.raises(UserError, match="no unlabelled image"): to_label_next(models, Images([], torch.zeros(0, 3, 8, 8, dtype=torch.uint8)))
