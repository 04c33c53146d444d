"s4GAN: scores of whole images, features that are matched, and images that teach or do not"
import copy
import json
import math
import re
from pathlib import Path

import pytest
import torch
from helpers import NoMask

from semiseg_nb.catalogue import load_task
from semiseg_nb.clock import Clock
from semiseg_nb.core import IGNORE, UserError, generator, seed_everything
from semiseg_nb.engine import fit, settings
from semiseg_nb.networks import UNet
from semiseg_nb.s4gan import S4GAN, ImageDiscriminator, distance_of_means
from semiseg_nb.supervised import Supervised


@pytest.fixture(scope="module")
def task(): return load_task("scenes", n_labelled=6, size=32)


def net(task, width=4):
    seed_everything(0)
    return UNet(task.n_classes, width=width)


def method(task, make=S4GAN, **more): return make(net(task), task, **{"warmup": 0.0, "start": 0.0, **more})


def batch(task, n=4):
    lab, unl = task.labelled.__getitems__(list(range(n))), task.unlabelled.__getitems__(list(range(n)))
    return {"image": lab["image"].float() / 255, "mask": lab["mask"].long()}, NoMask(image=unl["image"].float() / 255)


def train(m, task, steps=4, **more): return fit(m, task, steps, batch_size=4, seed=3, progress=False, eval_on=False, **more)
def rand(*shape, seed=0): return torch.rand(*shape, generator=generator(seed, "test"))
def randn(*shape, seed=0): return torch.randn(*shape, generator=generator(seed, "test"))


def same(a, b):
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# ---------------------------------------------------------------- pieces

def test_image_scores_and_features_for_any_size():
    D = ImageDiscriminator(4, ndf=2).eval()
    for size in ((16, 16), (33, 48)):
        d, phi = D(rand(3, 4, *size), rand(3, 3, *size))
        assert d.shape == (3, 1) and phi.shape == (3, 16)
    with pytest.raises(UserError, match="nothing of a map of 15x40"): D(rand(1, 4, 15, 40), rand(1, 3, 15, 40))


def test_the_distance_compares_batches_not_images():
    a, b = randn(4, 8), randn(5, 8, seed=1)
    assert distance_of_means(a, a) == 0 and distance_of_means(a, b) > 0
    assert torch.equal(distance_of_means(a, b), distance_of_means(b, a))
    torch.testing.assert_close(distance_of_means(a[[2, 0, 3, 1]], b), distance_of_means(a, b))


# ---------------------------------------------------------------- the step

def test_every_loss_moves_its_own_network_only(task):
    m = method(task)
    steps = m.updates(*batch(task), Clock(50, 100))
    name, losses, _ = next(steps)
    assert name == "net"
    sum(v for k, v in losses.items() if k != "supervised").backward()
    assert all(p.grad is None for p in m.D.parameters())
    before = [None if p.grad is None else p.grad.clone() for p in m.net.parameters()]
    assert any(g is not None and g.abs().sum() > 0 for g in before)
    name, losses, _ = next(steps)
    assert name == "discriminator"
    sum(losses.values()).backward()
    assert any(p.grad.abs().sum() > 0 for p in m.D.parameters())
    assert all(a.grad is b or torch.equal(a.grad, b) for a, b in zip(m.net.parameters(), before))


@pytest.mark.parametrize("views", ["weak", "strong"])
def test_all_weights_zero_is_the_supervised_run_bit_for_bit(task, views):
    base = Supervised(net(task), task, views=views)
    m = S4GAN(net(task), task, views=views, warmup=0.0, feature_matching=0, self_training=0)
    m.D.register_forward_hook(lambda *a: pytest.fail("the discriminator was asked"))
    for one in (base, m): train(one, task, 5)
    assert same(base.net, m.net) and same(base.ema, m.ema)


def test_whole_images_teach_the_better_half_of_the_batch(task):
    m, (lab, unl) = method(task, self_training=1.0), batch(task)
    scores, original = [], m.trusted
    m.trusted = lambda score: scores.append(score) or original(score)
    _, _, found = next(m.updates(lab, unl, Clock(50, 100)))
    score, = scores
    assert score.shape == (4, 1, 1) and original(score).sum() == 2
    better = original(score).flatten()
    assert score[better].min() >= score[~better].max() and not score.requires_grad
    _, valid = m.weak_view(unl["image"], Clock(50, 100))
    assert found["kept"].item() == pytest.approx((valid[better].sum() / valid.sum()).item())


def test_no_image_that_teaches_is_no_self_training(task):
    class Nobody(S4GAN):
        def trusted(self, score): return score > 1
    _, losses, found = next(method(task, Nobody).updates(*batch(task), Clock(50, 100)))
    assert losses["self training"] == 0 and found["kept"] == 0 and losses["feature matching"] > 0


def test_the_warm_up_is_supervised_and_self_training_begins_later(task):
    m = method(task, warmup=0.2, start=0.5)
    def losses(step): return {k: set(v) for k, v, *_ in m.updates(*batch(task), Clock(step, 100))}
    assert losses(10) == {"net": {"supervised"}}
    assert losses(30)["net"] == {"supervised", "feature matching"} and "self training" in losses(50)["net"]


def test_a_batch_without_any_label_gives_finite_losses(task):
    m, (lab, unl) = method(task), batch(task)
    lab["mask"].fill_(IGNORE)
    for _, losses, _ in m.updates(lab, unl, Clock(50, 100)): assert all(torch.isfinite(v) for v in losses.values())


# ---------------------------------------------------------------- runs

def test_it_trains_and_resumes_exactly(task, tmp_path):
    whole, first, second = (S4GAN(net(task), task, warmup=0.2, start=0.4) for _ in range(3))
    train(whole, task, 6)
    class Stop(Exception): ...
    def stop(m): raise Stop
    with pytest.raises(Stop):
        fit(first, task, 6, batch_size=4, seed=3, progress=False, out_dir=tmp_path, checkpoint_every=3, eval_every=4, eval_on=task.tune, probe=stop)
    fit(second, task, 6, batch_size=4, seed=3, progress=False, eval_on=False, out_dir=tmp_path)
    assert same(whole.net, second.net) and same(whole.D, second.D)


def test_a_few_steps_lower_the_supervised_loss(task):
    run = train(S4GAN(net(task), task, lr=5e-3, warmup=0.2, start=0.5), task, 30)
    assert run.history[-1]["supervised"] < 0.8 * run.history[0]["supervised"] and math.isfinite(run.history[-1]["self training"])
    assert {"kept", "right on fakes", "fake", "real"} <= set(run.history[-1])


def test_bfloat16_autocast_gives_finite_losses(task):
    with torch.autocast("cpu", torch.bfloat16):
        for _, losses, _ in method(task).updates(*batch(task), Clock(50, 100)):
            for value in losses.values(): assert torch.isfinite(value) and value.dtype == torch.float32


def test_settings_are_attributes_and_a_method_can_be_copied(task):
    m = S4GAN(net(task), task, threshold=0.4, lr=1e-3)
    own = settings(m)
    assert own["threshold"] == 0.4 and own["lr"] == 1e-3 and own["feature_matching"] == 0.1
    assert same(m, S4GAN(net(task), task, **own)) and same(m, copy.deepcopy(m))


# ---------------------------------------------------------------- a user's mistakes

@pytest.mark.parametrize("given, text", [
    ({"feature_matching": -1}, "feature_matching is -1"), ({"feature_matching": float("nan")}, "feature_matching is nan"), ({"threshold": 1.1}, "threshold is 1.1"),
    ({"mix": 2.0}, "mix is 2.0"), ({"smooth": 0.9}, "smooth is 0.9"), ({"start": 3}, "start is 3"), ({"ndf": 0}, "ndf is 0"), ({"d_lr": -1e-4}, "d_lr is -0.0001"),
    ({"views": "hard"}, "views 'hard'"), ({"mlmt": True}, "'mlmt' is not known"),
])
def test_settings_that_make_no_sense_are_refused_before_training(task, given, text):
    with pytest.raises(UserError, match=text): S4GAN(net(task), task, **given)


def test_images_that_are_too_small_are_refused(task):
    with pytest.raises(UserError, match="nothing of a map of 8x8"): S4GAN(net(task), load_task("scenes", n_labelled=4, size=32, crop=8))


def test_a_single_unlabelled_image_has_no_partner_for_cutmix(task):
    with pytest.raises(UserError, match="no partner"):
        fit(S4GAN(net(task), task), task, 20, 2, unlabelled_batch=1, progress=False, eval_on=False)
    fit(S4GAN(net(task), task, mix=0.0), task, 2, 2, unlabelled_batch=1, progress=False, eval_on=False)


# ---------------------------------------------------------------- the lesson

def cells():
    lesson = json.loads((Path(__file__).resolve().parents[1] / "nbs/22_s4gan.ipynb").read_text(encoding="utf-8"))
    return {c["id"]: "".join(c["source"]) for c in lesson["cells"]}


def test_the_solutions_of_the_exercises():
    code, = re.findall(r"```python\n(.*?)```", cells()["solutions"], re.S)
    names = {"torch": torch, "distance_of_means": distance_of_means, "S4GAN": S4GAN}
    exec(code, names)
    empty = [cells()[f"exercise-{i}"].removeprefix("# ").strip() for i in (1, 2, 3)]
    assert empty == ["matched", "removed_wins", "BestImage"] and set(empty) <= set(names) and code.count("assert") == 3
