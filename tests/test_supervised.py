"supervised: labelled views, and a baseline that deserves the name"
import pytest
import torch

from semiseg_nb.catalogue import load_task
from semiseg_nb.core import UserError, seed_everything
from semiseg_nb.engine import Clock, evaluate, fit
from semiseg_nb.models import UNet
from semiseg_nb.supervised import Supervised, labelled_views, view


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
