"budget: a power law by hand, nested masks, the curve in the verdict's sentence, what to label next"
import math
import shutil

import numpy as np
import pytest
import torch
from helpers import QUICK, two_methods
from torch import nn

from semiseg_nb.budget import (
    Budget,
    Candidate,
    disagreement,
    fewer_masks,
    label_budget,
    label_sheet,
    opinions,
    power_law,
    read_budget,
    spread_out,
    to_label_next,
)
from semiseg_nb.catalogue import load_task
from semiseg_nb.core import UserError
from semiseg_nb.data import Images
from semiseg_nb.records import read_records
from semiseg_nb.runs import finished_runs
from semiseg_nb.verdict import verdict


@pytest.fixture(scope="module")
def first(tmp_path_factory): return two_methods(tmp_path_factory.mktemp("first"))


@pytest.fixture
def trained(first, tmp_path):
    "A copy that a test may change"
    out, task, data = first
    shutil.copytree(out, tmp_path / "runs")
    return tmp_path / "runs", task, data


# ---------------------------------------------------------------- the budget of labels

def test_a_power_law_is_found_again():
    n = [5, 10, 20]
    assert power_law(n, [0.8 * k ** -0.3 for k in n]) == pytest.approx((0.8, 0.3))
    exact = Budget(n, [[1 - 0.8 * k ** -0.3 for k in n]] * 3).at(40)
    assert exact == pytest.approx([1 - 0.8 * 40 ** -0.3] * 3)
    spread = Budget(n, [[1 - a * k ** -0.3 for k in n] for a in (0.75, 0.8, 0.85)]).at(40)
    logs = np.log([0.75, 0.8, 0.85]) - 0.3 * np.log(40)
    half = 4.3027 * logs.std(ddof=1) / math.sqrt(3)
    assert spread == pytest.approx([1 - math.exp(logs.mean() + d) for d in (0, half, -half)], rel=1e-4)
    one = Budget(n, [[0.3, 0.4, 0.5]]).at(40)
    assert 0.5 < one[0] < 0.65 and math.isnan(one[1]) and math.isnan(one[2])


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


def test_what_differs_from_another_run():
    request = {"steps": 3, "dataset": {"name": "a", "size": [8, 8], "n_labelled": 4}}
    same = Budget([2, 4], [[0.1, 0.2]], {"steps": 3, "name": "a", "size": [8, 8]})
    assert same.differences(request) == []
    assert Budget([2, 5], [[0.1, 0.2]], {"steps": 2, "name": "a", "size": [8, 9]}).differences(request) == ["steps", "size", "n_labelled"]


def test_the_label_budget_is_part_of_the_sentence(trained):
    out, task, data = trained
    found = label_budget(task, out, seeds=(0, 1), fractions=(0.5, 1.0), data=data, **QUICK)
    assert found.n == [2, 4] and np.shape(found.miou) == (2, 2) and read_budget(out) == found
    runs = finished_runs(out)[0]
    assert len(runs) == 6, "runs with fewer masks are none of the comparison; those with all masks were there"
    records, _ = read_records(out)
    full = next(r for r in records if r["method"] == "supervised_ema" and r["seed"] == 1 and r["dataset"]["n_labelled"] == 4)
    assert found.miou[1][1] == full["result"]["miou"]
    text = verdict(out, device="cpu").sentence
    assert "with 8 masks instead of 4 the baseline alone would reach " in text and "on the validation images." in text
    label_budget(task, out, seeds=(0,), fractions=(0.5, 1.0), data=data, **QUICK | {"steps": 1})
    for r in finished_runs(out)[0]:
        if r.request["steps"] == 1: shutil.rmtree(r.folder)
    other = verdict(out, device="cpu")
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
    x = images.__getitems__([0, 1])["image"] / 255
    assert len(opinions(models, x)) == 2 and len(opinions(models[:1], x)) == 4, "one model looks at three more views"
    alone = to_label_next(Says(0.5), images, 2, device="cpu")
    assert len(alone) == 2 and alone[0].score > 0, "views of one model disagree as well"
    fig = label_sheet(found, models, images)
    assert len(fig.axes) == 6
    with pytest.raises(UserError, match="at least one trained method or network is needed"): to_label_next([], images)
    with pytest.raises(UserError, match="no unlabelled image"): to_label_next(models, Images([], torch.zeros(0, 3, 8, 8, dtype=torch.uint8)))
