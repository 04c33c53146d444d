"AdvSemiSeg: who is moved by which loss, what the discriminator learns from, and whose labels it lets through"
import copy
import inspect
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import NoMask
from torch import nn

from semiseg_nb import advsemiseg
from semiseg_nb.adversarial import hide, upper_part
from semiseg_nb.advsemiseg import AdvSemiSeg, health, shared_pass
from semiseg_nb.catalogue import load_task
from semiseg_nb.clock import Clock
from semiseg_nb.core import IGNORE, UserError, generator, poly, seed_everything
from semiseg_nb.cutmix import paste
from semiseg_nb.engine import fit, settings
from semiseg_nb.losses import cross_entropy
from semiseg_nb.networks import UNet
from semiseg_nb.supervised import Supervised

LN2 = math.log(2)
NOTHING = {"adversarial": 0, "adversarial_u": 0, "self_training": 0}
CELLS = {c["id"]: "".join(c["source"]) for c in
         json.loads((Path(__file__).resolve().parents[1] / "nbs/20_advsemiseg.ipynb").read_text(encoding="utf-8"))["cells"]}
LESSON = dict(vars(advsemiseg))  # what the lesson's cells see
for name in ("as-published", "alternatives"): exec(CELLS[name], LESSON)
AsPublished, PlainLabels, TrustByConfidence = LESSON["AsPublished"], LESSON["PlainLabels"], LESSON["TrustByConfidence"]
FORMS = [AdvSemiSeg, AsPublished, PlainLabels, TrustByConfidence]


@pytest.fixture(scope="module")
def task(): return load_task("scenes", n_labelled=6, size=32)


def net(task, width=4):
    seed_everything(0)
    return UNet(task.n_classes, width=width)


def method(task, make=AdvSemiSeg, **more): return make(net(task), task, **{"warmup": 0.0, "start": 0.0, **more})


def batch(task, n=4):
    lab, unl = task.labelled.__getitems__(list(range(n))), task.unlabelled.__getitems__(list(range(n)))
    return {"image": lab["image"].float() / 255, "mask": lab["mask"].long()}, NoMask(image=unl["image"].float() / 255)


def updates(m, task, step=50):
    "The step's losses and statistics by optimiser"
    return {name: (losses, found[0] if found else {}) for name, losses, *found in m.updates(*batch(task), Clock(step, 100))}


def train(m, task, steps=4, **more): return fit(m, task, steps, batch_size=4, seed=3, progress=False, eval_on=False, **more)
def randn(*shape, seed=0): return torch.randn(*shape, generator=generator(seed, "test"))


def same(a, b):
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def silent(m):
    "Zero the discriminator's last layer: it knows nothing"
    last = [layer for layer in m.D.modules() if isinstance(layer, nn.Conv2d)][-1]
    nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
    return m


# ---------------------------------------------------------------- who is moved

@pytest.mark.parametrize("make", FORMS)
def test_every_loss_moves_its_own_network_only(task, make):
    m = method(task, make)
    steps = m.updates(*batch(task), Clock(50, 100))
    name, losses, _ = next(steps)
    assert name == "net"
    sum(v for k, v in losses.items() if k != "supervised").backward()                      # also without cross-entropy
    assert all(p.grad is None for p in m.D.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in m.net.parameters())
    before = [None if p.grad is None else p.grad.clone() for p in m.net.parameters()]
    name, losses, _ = next(steps)
    assert name == "discriminator"
    sum(losses.values()).backward()
    assert any(p.grad.abs().sum() > 0 for p in m.D.parameters())
    assert all(a.grad is b or torch.equal(a.grad, b) for a, b in zip(m.net.parameters(), before))
    assert all(p.grad is None for p in m.ema.parameters())


def test_a_discriminator_that_knows_nothing_says_ln2_everywhere(task):
    found = updates(silent(method(task, adversarial=1.0, adversarial_u=1.0)), task)
    for value in (found["net"][0]["adversarial"], found["net"][0]["adversarial unlabelled"], sum(found["discriminator"][0].values())):
        assert value.item() == pytest.approx(LN2, abs=1e-6)
    for threshold, kept in ((0.2, 1.0), (0.6, 0.0)):
        assert updates(silent(method(task, AsPublished, threshold=threshold)), task)["net"][1]["kept"] == kept


def test_a_batch_without_any_label_gives_finite_losses(task):
    m, (lab, unl) = method(task), batch(task)
    lab["mask"].fill_(IGNORE)
    for _, losses, _ in m.updates(lab, unl, Clock(50, 100)):
        assert all(torch.isfinite(v) for v in losses.values())
        assert losses.get("supervised", 0) == 0 and losses.get("adversarial", 0) == 0


def test_the_adversarial_loss_stays_where_nothing_is_trusted(task):
    "Defect of the published code: where nothing is trusted, the unlabelled adversarial loss was dropped as well"
    class Nobody(AsPublished):
        def trusted(self, verdict, z, valid): return torch.zeros_like(valid)
    m, grads = method(task, Nobody, adversarial=0.0, adversarial_u=0.5), []
    for names in (("self training",), ("self training", "adversarial unlabelled"), ("adversarial unlabelled",)):
        m.net.eval()                                                                       # statistics change nothing between the passes
        _, losses, found = next(m.updates(*batch(task), Clock(50, 100)))
        assert losses["self training"] == 0 and found["kept"] == 0
        grads.append(torch.autograd.grad(sum(losses[n] for n in names), m.net.parameters(), allow_unused=True))
    nothing, both, alone = ([g for g in gs if g is not None] for gs in grads)
    assert all((g == 0).all() for g in nothing)
    assert all(torch.equal(a, b) for a, b in zip(both, alone)) and any(g.abs().sum() > 0 for g in alone)


def test_self_training_has_constant_labels_and_a_constant_mask(task):
    m = method(task, AsPublished, adversarial=0.0, adversarial_u=0.0, self_training=1.0)
    m.net.eval()
    lab, unl = batch(task)
    x_w, valid = m.weak_view(unl["image"], Clock(50, 100))
    z = m.net(x_w)
    verdict = m.D(hide(z.softmax(1), valid)).detach().sigmoid()[:, 0]
    m.threshold = verdict[valid].median().item()
    losses = next(m.updates(lab, unl, Clock(50, 100)))[1]
    found = torch.autograd.grad(losses["self training"], m.net.parameters(), allow_unused=True, retain_graph=True)
    assert all(g is None for g in torch.autograd.grad(losses["self training"], m.D.parameters(), allow_unused=True, retain_graph=True))
    target = torch.where((verdict >= m.threshold) & valid, z.detach().argmax(1), IGNORE)
    assert (target != IGNORE).any() and (target == IGNORE)[valid].any()
    want = torch.autograd.grad(F.cross_entropy(z, target, ignore_index=IGNORE), m.net.parameters())
    for a, b in zip(found, want): torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)


# ---------------------------------------------------------------- when

@pytest.mark.parametrize("views", ["weak", "strong"])
def test_all_weights_zero_is_the_supervised_run_bit_for_bit(task, views):
    base, m = Supervised(net(task), task, views=views), AdvSemiSeg(net(task), task, views=views, warmup=0.0, **NOTHING)
    m.D.register_forward_hook(lambda *a: pytest.fail("the discriminator was asked"))
    assert not m.uses_unlabelled
    for one in (base, m): train(one, task, 5)
    assert same(base.net, m.net) and same(base.ema, m.ema)


def test_the_warm_up_is_supervised_and_self_training_begins_later(task):
    m = method(task, warmup=0.2, start=0.5)
    assert set(updates(m, task, 10)) == {"net"} and set(updates(m, task, 10)["net"][0]) == {"supervised"}
    assert "self training" not in updates(m, task, 30)["net"][0] and "adversarial" in updates(m, task, 30)["net"][0]
    assert "self training" in updates(m, task, 50)["net"][0]


def test_both_optimisers_follow_the_schedule_each_from_its_own_rate(task):
    rates = []
    class Noting(AdvSemiSeg):
        def updates(self, lab, unl, clock):
            yield from super().updates(lab, unl, clock)
            rates.append({k: o.param_groups[0]["lr"] for k, o in self.optimisers.items()})
    m = Noting(net(task), task, lr=4e-3, d_lr=2e-4)
    train(m, task, 4)
    for step in range(4): assert rates[step] == pytest.approx({"net": 4e-3 * poly(step / 4), "discriminator": 2e-4 * poly(step / 4)})
    assert m.optimisers["discriminator"].defaults["betas"] == (0.9, 0.99)


# ---------------------------------------------------------------- what the discriminator learns from

def test_smoothing_concerns_the_discriminators_own_step_only(task):
    plain, smooth = (updates(method(task, smooth=s), task) for s in (0.0, 0.1))
    assert torch.equal(plain["net"][0]["adversarial"], smooth["net"][0]["adversarial"])
    assert torch.equal(plain["discriminator"][0]["fake"], smooth["discriminator"][0]["fake"])
    assert not torch.equal(plain["discriminator"][0]["real"], smooth["discriminator"][0]["real"])


def test_the_discriminator_gets_the_predictions_of_before_the_step(task):
    "Stepping the network first changes nothing for the discriminator: it gets the same tensors"
    found = []
    for move in (False, True):
        m = method(task)
        steps = m.updates(*batch(task), Clock(50, 100))
        next(steps)
        if move:
            with torch.no_grad():
                for p in m.net.parameters(): p.add_(1.0)
        found.append(next(steps)[1])
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])


def test_no_step_waits_for_the_device():
    "Defect of the published code: predictions went through NumPy in every step"
    source = inspect.getsource(AdvSemiSeg.updates) + inspect.getsource(shared_pass)
    assert not [word for word in (".item()", ".cpu()", ".numpy()", ".tolist()") if word in source]


# ---------------------------------------------------------------- views, labels, trust

def test_a_view_that_is_given_twice_passes_once():
    sizes = []
    def counting(x):
        sizes.append(len(x))
        return 2 * x
    a, b = randn(2, 3, 4, 4), randn(3, 3, 4, 4)
    one, two, again = shared_pass(counting, a, b, b)
    assert sizes == [5] and two is again and torch.equal(one, 2 * a) and torch.equal(two, 2 * b)


def test_labels_move_with_the_students_box(task):
    m = method(task, adversarial=0.0, adversarial_u=0.0, threshold=0.0)
    m.net.eval()
    lab, unl = batch(task)
    clock = Clock(50, 100)
    found = next(m.updates(lab, unl, clock))[1]["self training"]
    x_w, valid = m.weak_view(unl["image"], clock)
    box = clock.boxes(x_w, 1.0)
    labels = torch.where(valid, m.ema(x_w).argmax(1), IGNORE)
    x_s, labels = paste(box, m.strong_view(x_w, clock), labels)
    assert box.any()
    torch.testing.assert_close(found, cross_entropy(m.net(x_s), labels))


def test_a_part_of_every_class_is_left_out(task):
    m, seen = method(task, threshold=0.3), []
    original = m.trusted
    m.trusted = lambda verdict, z, valid: seen.append((verdict, z, valid)) or original(verdict, z, valid)
    kept = updates(m, task)["net"][1]["kept"]
    (verdict, z, valid), = seen
    labels, M = z.argmax(1), original(verdict, z, valid)
    assert kept.item() == pytest.approx(0.7, abs=0.01) and not verdict.requires_grad and not z.requires_grad
    for k in labels[valid].unique():
        of = valid & (labels == k)
        assert abs((M & of).sum() - 0.7 * of.sum()) <= 1


def test_the_lessons_forms_are_trusted_as_they_say(task):
    verdict, z, valid = randn(2, 8, 8).sigmoid(), randn(2, task.n_classes, 8, 8, seed=1), randn(2, 8, 8, seed=2) > -1
    def chosen(make, **more): return method(task, make, **more).trusted(verdict, z, valid)
    assert torch.equal(chosen(AsPublished, threshold=0.4), (verdict >= 0.4) & valid)
    confident = upper_part(z.softmax(1).amax(1), 0.4, valid, z.argmax(1), task.n_classes)
    assert torch.equal(chosen(TrustByConfidence, threshold=0.4), confident)
    assert torch.equal(chosen(PlainLabels), valid)


def test_the_published_form_learns_on_the_view_that_gives_the_label(task):
    m = method(task, AsPublished)
    assert (m.mix, m.self_training, m.smooth, m.threshold) == (0, 0.1, 0, 0.2) and m.name == "advsemiseg_published"
    passes = []
    m.net.register_forward_hook(lambda module, args, out: passes.append(len(args[0])))
    m.ema.register_forward_hook(lambda *a: pytest.fail("the average was asked"))
    updates(m, task)
    assert passes == [8]                                                                   # four labelled, four weak views, nothing twice


def test_without_its_push_the_discriminator_has_no_say_in_plain_pseudo_labelling(task):
    ends = []
    for bias in (-9.0, 9.0):                                                               # D calls everything a prediction, or a mask
        m = method(task, PlainLabels, adversarial=0.0, adversarial_u=0.0)
        nn.init.constant_([layer for layer in m.D.modules() if isinstance(layer, nn.Conv2d)][-1].bias, bias)
        sum(updates(m, task)["net"][0].values()).backward()
        ends.append([p.grad for p in m.net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends))


# ---------------------------------------------------------------- runs

@pytest.mark.parametrize("make", [AdvSemiSeg, AsPublished])
def test_every_form_trains_and_resumes_exactly(task, make, tmp_path):
    whole, first, second = (make(net(task), task, warmup=0.2, start=0.4) for _ in range(3))
    train(whole, task, 6)
    class Stop(Exception): ...
    def stop(m): raise Stop
    with pytest.raises(Stop):
        fit(first, task, 6, batch_size=4, seed=3, progress=False, out_dir=tmp_path, checkpoint_every=3, eval_every=4, eval_on=task.tune, probe=stop)
    fit(second, task, 6, batch_size=4, seed=3, progress=False, eval_on=False, out_dir=tmp_path)
    assert same(whole.net, second.net) and same(whole.D, second.D)


def test_a_few_steps_lower_the_supervised_loss(task):
    run = train(AdvSemiSeg(net(task), task, lr=5e-3, warmup=0.2, start=0.5), task, 30)
    assert run.history[-1]["supervised"] < 0.8 * run.history[0]["supervised"] and math.isfinite(run.history[-1]["self training"])
    assert {"kept", "right on fakes", "fake", "real"} <= set(run.history[-1])


def test_bfloat16_autocast_gives_finite_losses(task):
    with torch.autocast("cpu", torch.bfloat16):
        for _, losses, _ in method(task).updates(*batch(task), Clock(50, 100)):
            for value in losses.values(): assert torch.isfinite(value) and value.dtype == torch.float32


def test_settings_are_attributes_and_a_method_can_be_copied(task):
    m = AdvSemiSeg(net(task), task, threshold=0.4, lr=1e-3)
    told = settings(m)
    assert told["threshold"] == 0.4 and told["lr"] == 1e-3 and told["adversarial_u"] == 0.001
    assert same(m, AdvSemiSeg(net(task), task, **told)) and same(m, copy.deepcopy(m))


# ---------------------------------------------------------------- a user's mistakes

@pytest.mark.parametrize("given, text", [
    ({"adversarial": -1.0}, "adversarial is -1.0"), ({"adversarial_u": float("nan")}, "adversarial_u is nan"), ({"self_training": float("inf")}, "self_training is inf"),
    ({"threshold": 1.1}, "threshold is 1.1.*between 0 and 1"), ({"threshold": 80}, "threshold is 80"), ({"threshold": "0.5"}, "threshold is '0.5'"),
    ({"mix": 2.0}, "mix is 2.0"), ({"smooth": 0.9}, "smooth is 0.9.*between 0 and 0.5"), ({"start": 3}, "start is 3"), ({"warmup": -0.1}, "warmup is -0.1"),
    ({"ndf": 0}, "ndf is 0"), ({"n_layers": 2.5}, "n_layers is 2.5"), ({"d_lr": 0}, "d_lr is 0"), ({"views": "hard"}, "views 'hard'"),
    ({"treshold": 0.5}, "did you mean 'threshold'"), ({"n_layers": 6}, "6 layers leaves nothing of a map of 32x32"),
])
def test_settings_that_make_no_sense_are_refused_before_training(task, given, text):
    with pytest.raises(UserError, match=text): AdvSemiSeg(net(task), task, **given)


def test_a_single_unlabelled_image_has_no_partner_for_cutmix(task):
    m = AdvSemiSeg(net(task), task)
    before = copy.deepcopy(m.net)
    with pytest.raises(UserError, match="no partner"): fit(m, task, 20, 2, unlabelled_batch=1, progress=False, eval_on=False)
    assert same(before, m.net)
    fit(AdvSemiSeg(net(task), task, mix=0.0), task, 2, 2, unlabelled_batch=1, progress=False, eval_on=False)


def test_health_says_what_the_curves_mean():
    assert "wins too easily" in health([{"fake": 0.01, "real": 0.17}], 0.1) and "guessing" in health([{"fake": 0.34, "real": 0.35}])
    assert "healthy" in health([{"fake": 0.2, "real": 0.25}]) and "No discriminator" in health([{"supervised": 1.0}])


def test_the_solutions_of_the_lesson_pass_its_check_and_empty_cells_do_not(capsys):
    names = {"torch": torch, "F": F, "math": math}
    for i in (1, 2, 3): exec(CELLS[f"exercise-{i}"], names)
    exec(CELLS["exercise-check"], names)
    assert capsys.readouterr().out.split("\n")[:-1] == ["not yet"] * 3
    for solution in re.findall(r"```python\n(.*?)```", CELLS["answers"], re.S): exec(solution, names)
    exec(CELLS["exercise-check"], names)
    assert capsys.readouterr().out.split("\n")[:-1] == ["right"] * 3


def test_the_page_trains_the_same_networks_as_the_class(task):
    "One update for the network, which D does not feel, and one for D, which the network does not feel"
    names = dict(LESSON)
    exec(CELLS["plain"], names)
    m = names["PlainAdvSemiSeg"](net(task), task)
    (name, losses, _), (other, d_losses) = m.updates(*batch(task), Clock(50, 100))
    assert (name, other) == ("net", "D") and {"adversarial", "own labels"} < set(losses)
    assert not any(g.any() for g in torch.autograd.grad(sum(losses.values()), list(m.D.parameters()), allow_unused=True) if g is not None)
    reach = torch.autograd.grad(sum(d_losses.values()), list(m.net.parameters()), allow_unused=True)
    assert all(g is None for g in reach)
