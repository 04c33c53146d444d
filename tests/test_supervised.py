"supervised: labelled views, and a baseline that deserves the name"
import pytest
import torch

from semiseg_nb.catalogue import load_task
from semiseg_nb.clock import Clock
from semiseg_nb.core import UserError, seed_everything
from semiseg_nb.engine import evaluate, fit
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
