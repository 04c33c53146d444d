"UDA: the properties of the objective, and its step beside the supervised one"
import copy
import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from semiseg_nb.augment import identity_policy
from semiseg_nb.catalogue import load_task
from semiseg_nb.clock import Clock
from semiseg_nb.core import UserError, generator, seed_everything
from semiseg_nb.cutmix import partner, paste
from semiseg_nb.engine import fit, settings
from semiseg_nb.losses import confident, consistency, cross_entropy
from semiseg_nb.networks import UNet
from semiseg_nb.policies import flip_crop, randaugment
from semiseg_nb.supervised import Supervised, jointly, view
from semiseg_nb.uda import UDA, SelfUDA, annealed_labels, follow, sharpen, tsa_threshold

ROOT = Path(__file__).resolve().parents[1]
BOTH = [UDA, SelfUDA]


@pytest.fixture(scope="module")
def task(): return load_task("scenes", n_labelled=6, size=32)


def net(task, kind="unet"):
    seed_everything(0)
    if kind == "unet": return UNet(task.n_classes, width=4)
    return nn.Conv2d(3, task.n_classes, 1)


def batch(task, n=4):
    lab, unl = task.labelled.__getitems__(list(range(n))), task.unlabelled.__getitems__(list(range(n)))
    return ({"image": lab["image"].float() / 255, "mask": lab["mask"].long(), "index": lab["index"]},
            {"image": unl["image"].float() / 255, "index": unl["index"]})


def step_of(method, task, step=50):
    "Losses and statistics of one step"
    (name, losses, *statistics), = method.updates(*batch(task), Clock(step, 100))
    return losses, *statistics


def losses_of(method, task, step=50): return step_of(method, task, step)[0]


def seen_through(strong, make=UDA):
    "The same method with another strong view"
    def made(net, task, **settings):
        method = make(net, task, **settings)
        method.strong = strong
        return method
    return made


def logits(seed=0, c=5): return torch.randn(2, c, 6, 7, generator=generator(seed, "logits"), dtype=torch.float64) * 3


# 1
@pytest.mark.parametrize("make", BOTH)
def test_weight_zero_takes_the_supervised_step_bit_for_bit(task, make):
    for views, tsa in (("weak", "off"), ("strong", "exp")):
        base, uda = Supervised(net(task), task, views=views), make(net(task), task, weight=0.0, views=views, tsa=tsa)
        for method in (base, uda): fit(method, task, 8, batch_size=4, seed=3, progress=False, eval_on=False)
        for a, b in ((base.net, uda.net), (base.ema, uda.ema)):
            one, two = a.state_dict(), b.state_dict()
            assert all(torch.equal(one[k], two[k]) for k in one)


def test_weight_zero_draws_the_same_labelled_views_as_any_weight(task):
    "The labelled views of a run do not depend on the unlabelled branch"
    one, two = UDA(net(task), task, weight=0.0), UDA(net(task), task, weight=1.0)
    one.net.eval(), two.net.eval()
    torch.testing.assert_close(losses_of(one, task)["supervised"], losses_of(two, task)["supervised"])


# 2
@pytest.mark.parametrize("make", BOTH)
def test_identity_views_and_no_sharpening_give_zero_loss_and_gradient(task, make):
    method = seen_through(identity_policy(), make)(net(task), task, temperature=1.0, threshold=0.0, mix=0.0).eval()
    loss = losses_of(method, task)["consistency"]
    assert loss < 1e-6
    loss.backward()
    assert max(p.grad.abs().max() for p in method.net.parameters() if p.grad is not None) < 1e-6


# 3
def test_no_gradient_goes_through_the_target(task):
    model = net(task, "conv")
    x_w, x_s = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    one, = torch.autograd.grad(consistency(model(x_s), sharpen(model(x_w), 0.5)), model.weight)
    fixed = sharpen(model(x_w), 0.5).detach()
    two, = torch.autograd.grad(consistency(model(x_s), fixed), model.weight)
    assert torch.equal(one, two)
    other = copy.deepcopy(model)
    with torch.no_grad(): other.weight.mul_(-0.5)
    assert not torch.equal(consistency(model(x_s), sharpen(other(x_w), 0.5)), consistency(model(x_s), fixed))
    assert torch.autograd.grad(consistency(model(x_s), sharpen(other(x_w), 0.5)), other.weight, allow_unused=True) == (None,)


def test_the_whole_step_leaves_the_teacher_without_gradient(task):
    method = UDA(net(task), task, threshold=0.2)
    sum(losses_of(method, task).values()).backward()
    assert all(p.grad is None for p in method.ema.parameters()) and all(p.grad is not None for p in method.net.parameters())


# 4
def test_sharpening_keeps_the_winner_and_lowers_the_entropy():
    z = logits()
    entropies = []
    for t in (1.0, 0.8, 0.5, 0.2, 1e-3):
        q = sharpen(z, t)
        assert torch.equal(q.argmax(1), z.argmax(1))
        entropies.append(-torch.xlogy(q, q).sum(1))
    assert all((b <= a + 1e-6).all() for a, b in zip(entropies, entropies[1:]))
    torch.testing.assert_close(sharpen(z, 1.0), z.float().softmax(1))
    clear = torch.tensor([1.0, 0.9, -1.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(sharpen(clear, 1e-3)[0, :, 0, 0], torch.tensor([1.0, 0, 0]), atol=1e-3, rtol=0)


# 5
def test_at_a_threshold_of_one_no_pixel_counts_and_the_loss_stays_finite(task):
    method = UDA(net(task), task, threshold=1.0)
    losses, statistics = step_of(method, task)
    assert losses["consistency"] == 0 and statistics["kept"] == 0
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in method.net.parameters())


def test_the_kept_fraction_falls_with_the_threshold_and_ignores_the_temperature(task):
    z = logits()
    kept = [confident(z, t).float().mean() for t in (0, 0.3, 0.5, 0.7, 0.9, 0.99, 1)]
    assert kept == sorted(kept, reverse=True) and kept[0] == 1 and kept[-1] == 0
    stats = []
    for temperature in (1.0, 0.5, 0.1):
        model = net(task, "conv")
        with torch.no_grad(): model.weight.mul_(5)
        method = UDA(model, task, threshold=0.6, temperature=temperature)
        stats.append(step_of(method, task)[1]["kept"])
    assert stats[0] == stats[1] == stats[2] and 0 < stats[0] < 1


# 6
def test_kl_and_soft_cross_entropy_give_the_same_gradient():
    z = logits().requires_grad_()
    q = sharpen(logits(1), 0.5).double()
    trust = confident(logits(1), 0.6)
    kl, = torch.autograd.grad(consistency(z, q, trust), z)
    soft_ce = (-(q * z.log_softmax(1)).sum(1) * trust).mean()
    torch.testing.assert_close(kl, torch.autograd.grad(soft_ce, z)[0], atol=1e-6, rtol=0)


# 7
@pytest.mark.parametrize("schedule, values", [("log", (0.2, 0.771, 0.934, 0.981, 0.995)), ("linear", (0.2, 0.4, 0.6, 0.8, 1)),
                                              ("exp", (0.205, 0.219, 0.266, 0.429, 1))])
def test_tsa_thresholds(schedule, values):
    assert [tsa_threshold(s, 5, schedule) for s in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx(values, abs=6e-4)


def test_tsa_hides_pixels_that_are_surely_right():
    z = torch.tensor([[3.0, 0.0], [0.0, 3.0], [0.1, 0.0]]).T.view(1, 2, 1, 3)
    y = torch.tensor([[[0, 0, 255]]])
    assert annealed_labels(z, y, 0.5).tolist() == [[[255, 0, 255]]]      # sure: hidden; wrong: kept; ignored: stays ignored
    assert torch.equal(annealed_labels(z, y, 1.0), y)                    # at 1 nothing is hidden
    assert cross_entropy(z, annealed_labels(z, torch.tensor([[[0, 1, 0]]]), 0.3)) == 0      # all hidden: 0, not nan


def test_tsa_off_and_tsa_linear_at_the_end_are_plain_cross_entropy(task):
    plain, annealed, early = (losses_of(UDA(net(task), task, tsa=t), task, step)["supervised"] for t, step in (("off", 100), ("linear", 100), ("exp", 0)))
    assert torch.equal(plain, annealed) and not torch.equal(plain, early)


# 8
def test_a_warped_target_is_aligned_and_a_missing_warp_is_not(task):
    "A 1x1 convolution is exactly equivariant: with the target warped along, nothing is left to disagree about"
    flip = flip_crop(scale=(1, 1), shift=0, flip=1.0)
    class LeftBehind(SelfUDA):
        def align(self, drawn, target, confidence, valid): return target, confidence, valid
    for make, check in ((SelfUDA, lambda v: v < 1e-6), (LeftBehind, lambda v: v > 1e-4)):
        method = seen_through(flip, make)(net(task, "conv"), task, temperature=1.0, threshold=0.0, mix=0.0)
        assert check(losses_of(method, task)["consistency"]), make


def test_follow_of_a_photometric_view_changes_nothing(task):
    policy = randaugment(n=2, strength=0.5)
    drawn = policy.sample(2, (6, 7), generator(0, "views"))
    q, confidence, valid = logits().softmax(1).float(), torch.rand(2, 6, 7), torch.rand(2, 6, 7) > 0.5
    for a, b in zip(follow(policy, drawn, q, confidence, valid), (q, confidence, valid)): assert torch.equal(a, b)


# 9
def test_padding_has_no_effect_on_the_loss():
    z, q = logits(), sharpen(logits(1), 0.5)
    valid = torch.ones(2, 6, 7, dtype=torch.bool)
    valid[:, :, 4:] = False
    before = consistency(z, q, confident(logits(1), 0.3), valid)
    z[:, :, :, 4:] += 10
    assert consistency(z, q, confident(logits(1), 0.3), valid) == before


# the rest
def test_partner_is_never_the_image_itself():
    for n in (2, 3, 4, 7, 8): assert (partner(torch.arange(n)) != torch.arange(n)).all()


def test_the_weight_ramps_up(task):
    def value(step): return losses_of(UDA(net(task), task, threshold=0.2, warmup=0.5, mix=0.0), task, step)["consistency"].item()
    assert value(0) == 0 and value(10) > 0
    method = UDA(net(task), task, threshold=0.2, warmup=0.5, weight=3.0)
    method.net.eval()
    once = UDA(method.net, task, threshold=0.2, warmup=0.5, weight=1.0)
    assert losses_of(method, task)["consistency"].item() == pytest.approx(3 * losses_of(once, task)["consistency"].item(), rel=1e-5)


@pytest.mark.parametrize("kwargs, text", [
    ({"tsa": "cubic"}, "tsa 'cubic' is not known"), ({"temperature": 0.0}, "temperature is 0.0, but it should be more than 0"),
    ({"weight": -1.0}, "weight is -1.0"), ({"weight": math.nan}, "weight is nan"), ({"mix": 2.0}, "mix is 2.0"), ({"warmup": -0.1}, "warmup is -0.1"),
    ({"threshold": 80}, "threshold is 80, but it should be between 0 and 1"), ({"views": "hard"}, "views 'hard' is not known"),
    ({"treshold": 0.5}, r"setting of UDA 'treshold' is not known \(did you mean 'threshold'\?\)")])
def test_settings_that_make_no_sense_are_refused_before_training(task, kwargs, text):
    with pytest.raises(UserError, match=text): UDA(net(task), task, **kwargs)


@pytest.mark.parametrize("make", BOTH)
def test_settings_are_attributes_of_their_own_names(task, make):
    chosen = {"weight": 2.0, "threshold": 0.6, "temperature": 0.4, "tsa": "log", "mix": 0.5, "warmup": 0.2, "views": "strong", "n": 1,
              "strength": 0.3, "lr": 1e-3, "weight_decay": 0.0, "ema_decay": 0.9, "class_weights": 5.0, "dice": 0.5}
    assert settings(make(net(task), task, **chosen)) == chosen


@pytest.mark.parametrize("make", BOTH)
def test_a_single_unlabelled_image_is_refused_before_the_first_step_unless_nothing_is_pasted(task, make):
    def start(**chosen): return fit(make(net(task), task, **chosen), task, 2, batch_size=1, progress=False, eval_on=False)
    with pytest.raises(UserError, match="A single unlabelled image has no partner for CutMix.*or mix=0"): start()
    assert start(mix=0.0).history[-1]["step"] == 2


def test_unlabelled_truth_never_reaches_a_method(task):
    seen = []
    class Spy(UDA):
        def updates(self, lab, unl, clock):
            seen.append(set(unl))
            yield from super().updates(lab, unl, clock)
    fit(Spy(net(task), task), task, 3, batch_size=4, progress=False, eval_on=False)
    assert all("mask" not in keys for keys in seen) and len(seen) == 3


@pytest.mark.parametrize("make", BOTH)
def test_a_few_steps_lower_the_supervised_loss(task, make):
    method = make(net(task), task, threshold=0.5, lr=5e-3)
    run = fit(method, task, 40, batch_size=4, progress=False, eval_on=False)
    assert run.history[-1]["supervised"] < 0.8 * run.history[0]["supervised"] and math.isfinite(run.history[-1]["consistency"])


# the lesson
def lesson(): return {c["id"]: "".join(c["source"]) for c in json.loads((ROOT / "nbs/11_uda.ipynb").read_text(encoding="utf-8"))["cells"]}


def test_the_page_is_the_papers_form_of_the_library(task):
    "The plain page and `SelfUDA` make the same losses and the same gradients"
    names = {"Supervised": Supervised, "view": view, "paste": paste, "jointly": jointly, "cross_entropy": cross_entropy}
    exec(lesson()["plain"], names)
    found = []
    for make in (names["PlainUDA"], lambda net, task: SelfUDA(net, task, threshold=0.8)):
        model = net(task, "conv")
        with torch.no_grad(): model.weight.mul_(8)  # confident here and there
        losses = losses_of(make(model, task), task, step=5)
        found.append((losses, torch.autograd.grad(sum(losses.values()), model.weight)[0]))
    (one, slope), (two, other) = found
    assert two["consistency"] > 1e-3
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(slope, other, rtol=1e-3, atol=1e-5)


def test_an_ablation_overrides_a_hook(task):
    class Doubled(UDA):
        def weight_at(self, clock): return 2 * super().weight_at(clock)
    class Nowhere(UDA):
        def confidence(self, z_w, target): return torch.zeros_like(z_w[:, 0])
    class Logged(UDA):
        def statistics(self, *maps): return super().statistics(*maps) | {"more": maps[0].mean()}
    plain, double, nothing = (losses_of(make(net(task), task, threshold=0.2), task)["consistency"] for make in (UDA, Doubled, Nowhere))
    assert double == 2 * plain > 0 == nothing
    assert set(step_of(Logged(net(task), task), task)[1]) == {"kept", "more"}


def test_the_solutions_of_the_exercises(task):
    cells = lesson()
    code, = re.findall(r"```python\n(.*?)```", cells["solutions"], re.S)
    names = {"torch": torch, "sharpen": sharpen, "UDA": UDA}
    exec(code, names)
    empty = [cells[f"exercise-{i}"].removeprefix("# ").strip() for i in (1, 2, 3)]
    assert all(name in names for name in empty)
    z = logits().float()
    method = names["SharpStudent"](net(task), task)
    everywhere = torch.ones(2, 6, 7, dtype=torch.bool)
    assert method.disagreement(z, sharpen(z, method.temperature), everywhere, everywhere).abs() < 1e-5, "nothing is left to learn"
    assert UDA(net(task), task).disagreement(z, sharpen(z, 0.5), everywhere, everywhere) > 1e-2
