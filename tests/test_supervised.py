"supervised: labelled views, and a baseline that deserves the name"
import json
import re
from pathlib import Path

import pytest
import torch

from semiseg_nb.catalogue import load_task
from semiseg_nb.clock import Clock
from semiseg_nb.core import EMA, UserError, seed_everything
from semiseg_nb.data import Images, Labelled, Task
from semiseg_nb.engine import Method, evaluate, fit
from semiseg_nb.experiment import methods, own_settings, run
from semiseg_nb.losses import cross_entropy, dice_loss
from semiseg_nb.networks import UNet
from semiseg_nb.supervised import Supervised, class_counts, labelled_views, pass_rates, view

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def task(): return load_task("scenes", n_labelled=6, size=32)


def batch(task):
    b = task.labelled.__getitems__([0, 1, 2, 3])
    return {"image": b["image"].float() / 255, "mask": b["mask"].long()}


def method(task, **kwargs):
    seed_everything(0)
    return Supervised(UNet(task.n_classes, width=4), task, **kwargs)


def test_strong_views_move_the_same_pixels_as_weak_ones(task):
    (xw, yw), (xs, ys) = (view(batch(task), labelled_views(kind, task.mean), Clock(3, 10, 0)) for kind in ("weak", "strong"))
    assert torch.equal(yw, ys) and not torch.equal(xw, xs)


def test_views_are_a_function_of_seed_and_step(task):
    def at(step, seed): return view(batch(task), labelled_views("strong"), Clock(step, 10, seed))[0]
    assert torch.equal(at(3, 0), at(3, 0)) and not torch.equal(at(3, 0), at(4, 0)) and not torch.equal(at(3, 0), at(3, 1))


def test_padding_of_a_view_is_ignored(task):
    _, y = view(batch(task), labelled_views("weak", task.mean), Clock(1, 10, 0))
    assert set(y.unique().tolist()) <= {*range(task.n_classes), 255} and (y == 255).any()


def test_unknown_views(task):
    with pytest.raises(UserError, match="views 'hard' is not known"): method(task, views="hard")


def test_no_unlabelled_image_is_loaded(task):
    seen = []
    class Spy(Supervised):
        def updates(self, lab, unl, clock):
            seen.append(unl)
            yield from super().updates(lab, unl, clock)
    fit(Spy(UNet(task.n_classes, width=4), task), task, 2, batch_size=2, progress=False, eval_on=False)
    assert seen == [None, None]


def test_it_learns_its_labels_and_predicts_with_the_average(task):
    m = method(task, lr=5e-3)
    before = evaluate(m.net, task.labelled)["pixel_accuracy"]
    run = fit(m, task, 60, batch_size=4, progress=False)
    assert evaluate(m.net, task.labelled)["pixel_accuracy"] > before + 0.2
    assert run.history[-1]["supervised"] < 0.7 * run.history[0]["supervised"]
    x = batch(task)["image"]
    with torch.no_grad(): assert torch.equal(m.predict(x), m.ema(x)) and not torch.equal(m.predict(x), m.net(x))


# what is checked before the first step
class Mixing(Supervised):
    "A method with unlabelled images and a setting `mix`"
    uses_unlabelled = True

    def __init__(self, net, task, *, mix=1.0, **labelled):
        super().__init__(net, task, **labelled)
        self.mix = mix


def test_a_network_with_another_number_of_classes_is_refused_before_the_first_step(task):
    wrong = Supervised(UNet(task.n_classes + 1, width=4), task)
    told = rf"maps an image of 32x32 to \({task.n_classes + 1}, 32, 32\), but this task needs \({task.n_classes}, 32, 32\): build it with n_classes={task.n_classes}\.$"
    with pytest.raises(UserError, match=told) as error: fit(wrong, task, 2, batch_size=2, progress=False)
    assert "\n" not in str(error.value)


def test_a_network_that_shrinks_the_image_is_refused(task):
    half = torch.nn.Conv2d(3, task.n_classes, 2, stride=2)
    with pytest.raises(UserError, match="maps an image of 32x32 to"): fit(Supervised(half, task), task, 2, batch_size=2, progress=False)


def test_a_batch_of_one_is_refused_where_something_is_pasted_and_nowhere_else(task):
    for make, images, refused in ((Supervised, 1, False), (Mixing, 1, True), (lambda n, t: Mixing(n, t, mix=0.0), 1, False), (Mixing, 2, False)):
        m = make(UNet(task.n_classes, width=4), task)
        if not refused: m.check(task, images, images)
        else:
            with pytest.raises(UserError, match="A single unlabelled image has no partner for CutMix"): m.check(task, images, images)


def test_the_check_leaves_weights_statistics_and_modes_as_they_were(task):
    m = method(task)
    m.train()
    still = next(b for b in m.net.modules() if isinstance(b, torch.nn.BatchNorm2d)).eval()
    before = {k: v.clone() for k, v in m.net.state_dict().items()}
    modes = [b.training for b in m.net.modules()]
    m.check(task, 4, 4)
    assert all(torch.equal(v, before[k]) for k, v in m.net.state_dict().items())
    assert [b.training for b in m.net.modules()] == modes and m.net.training and not still.training


@pytest.mark.parametrize("kwargs, text", [({"strength": 1.5}, "strength is 1.5"), ({"lr": 0.0}, "lr is 0.0"), ({"n": -1}, "n is -1"), ({"ema_decay": float("nan")}, "ema_decay is nan"),
                                          ({"weight_decay": -1.0}, "weight_decay is -1.0"), ({"view": "weak"}, "'view' is not known")])
def test_settings_that_make_no_sense_are_refused(task, kwargs, text):
    with pytest.raises(UserError, match=text): method(task, **kwargs)


# ---------------------------------------------------------------- rare classes

def two_classes(share=0.125):
    "A task of two classes, the second on one eighth of the pixels"
    masks = torch.zeros(4, 8, 8, dtype=torch.uint8)
    masks[:, :, :int(8 * share)] = 1
    masks[0, 0] = 255
    x = torch.randint(0, 256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    lab, val = Labelled(list("abcd"), x, masks, 2), Labelled(list("efgh"), x, masks, 2)
    return Task("two", ("plain", "rare"), ((0, 0, 0), (255, 0, 0)), lab, Images(list("ijkl"), x), val)


def test_class_weights_come_from_the_labelled_histogram_with_a_cap():
    task = two_classes()
    assert class_counts(task.labelled).tolist() == [4 * 56 - 7, 4 * 8 - 1]
    net = UNet(2, width=4)
    assert Supervised(net, task, class_weights=100.0).class_weight.tolist() == pytest.approx([1, 217 / 31])
    assert Supervised(net, task, class_weights=3).class_weight.tolist() == [1, 3] and Supervised(net, task).class_weight is None
    assert "class_weight" not in Supervised(net, task, class_weights=3).state_dict(), "a checkpoint holds networks"
    with pytest.raises(UserError, match="class_weights is 0.5, but it should be at least 1"): Supervised(net, task, class_weights=0.5)
    with pytest.raises(UserError, match="dice is -1, but it should be at least 0"): Supervised(net, task, dice=-1)


def test_the_supervised_loss_is_the_sum_of_its_parts():
    task, net = two_classes(), UNet(2, width=4)
    z, y = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(1)), task.labelled.masks[:2].long()
    both = Supervised(net, task, class_weights=5.0, dice=0.5)
    want = cross_entropy(z, y, torch.tensor([1.0, 5.0])) + 0.5 * dice_loss(z, y)
    torch.testing.assert_close(both.supervised_loss(z, y), want)
    assert torch.equal(Supervised(net, task).supervised_loss(z, y), cross_entropy(z, y))
    assert torch.equal(Supervised(net, task, dice=0.0).supervised_loss(z, y), cross_entropy(z, y))


OBEY = sorted(name for name, what in methods().items() if isinstance(what, type) and issubclass(what, Supervised))
TAGS = {"continuation_weak", "cct_weak"}  # need image tags or pseudo-masks


@pytest.mark.parametrize("name", [n for n in OBEY if n not in TAGS])
def test_every_method_obeys_the_settings_of_the_labelled_loss(task, name):
    "Its first update learns from labels with other gradients than without the settings, and the loss is that of `supervised_loss`"
    what = methods()[name]
    def supervised(**more):
        seed_everything(0)
        m = what(UNet(task.n_classes, width=4), task, **more).train()
        for group in m.optimisers.values():
            for g in group.param_groups: g["initial_lr"] = g["lr"]
        b = batch(task)
        unl = {"image": b["image"].flip(0), "index": torch.arange(4)} if m.uses_unlabelled else None
        found = {}
        for _, losses, *_ in m.updates(b, unl, Clock(9, 10, 0)): found |= {k: v.item() for k, v in losses.items() if k.startswith("supervised")}
        return found
    plain, weighted, dice = supervised(), supervised(class_weights=20.0), supervised(dice=2.0)
    assert plain and plain.keys() == weighted.keys()
    for k in plain: assert weighted[k] != plain[k]
    if name != "phase1":                                                   # has a Dice loss of its own, logged apart
        for k in plain: assert dice[k] > plain[k]


def test_methods_without_a_cross_entropy_of_labels_refuse_the_settings():
    for name in set(methods()) - set(OBEY):
        if name in {"supervised"} or "class_weights" in own_settings(methods()[name]): continue
        with pytest.raises(UserError, match="class_weights' is not known"): run(name, two_classes(), settings={"class_weights": 5.0})


# ---------------------------------------------------------------- who passes the threshold

class Brightness(Method):
    title = "Brightness"

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor(10.0))

    def predict(self, x): return torch.stack([0 * x[:, 0], self.w * (x[:, 0] - 0.5)], 1)


def test_pass_rates_by_hand():
    grey = torch.tensor([0, 255, 140, 255]).byte().expand(1, 3, 1, 4)          # class 0 surely; 1 surely; 1 with doubt; 1 surely
    known = Labelled(["a"], grey, torch.tensor([[[0, 1, 1, 0]]]).byte(), 2)
    rates = pass_rates(Brightness(), known, 0.8)
    assert rates == {"answered": [0.25, 0.75], "of answers": [1.0, pytest.approx(2 / 3)], "of truth": [1.0, 0.5], "right": [0.5, 1.0]}
    free = pass_rates(Brightness(), Images(["a"], grey), 0.8)
    assert free["of answers"] == rates["of answers"] and all(v != v for v in free["of truth"])
    with pytest.raises(UserError, match="Brightness has no threshold of confidence: give threshold=0.8"): pass_rates(Brightness(), known)


def test_the_solutions_of_the_exercises(task):
    cells = {c["id"]: "".join(c["source"]) for c in json.loads((ROOT / "nbs/10_supervised.ipynb").read_text(encoding="utf-8"))["cells"]}
    code, = re.findall(r"```python\n(.*?)```", cells["solutions"], re.S)
    names = {"torch": torch, "nn": torch.nn, "EMA": EMA, "task": task, "seed": 0, "Clock": Clock, "view": view, "labelled_views": labelled_views,
             "cross_entropy": cross_entropy}
    exec(code, names)
    assert all(cells[f"exercise-{i}"].removeprefix("# ").strip() in names for i in (1, 2))
    assert 0 < names["training_loss"](method(task)) < 5
