"AdvSemiSeg and s4GAN: who is moved by which loss, what the discriminator may see, and whom it lets through"
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from semiseg_nb import advsemiseg
from semiseg_nb.advsemiseg import (
    FAKE,
    REAL,
    S4GAN,
    AdvSemiSeg,
    FCDiscriminator,
    ImageDiscriminator,
    TagClassifier,
    bce_map,
    diffused,
    feature_distance,
    fresh_masks,
    gate,
    health,
    hide,
    tag_losses,
    through,
    trusted,
)
from semiseg_nb.catalogue import load_task
from semiseg_nb.clock import Clock
from semiseg_nb.core import EMA, IGNORE, UserError, generator, poly, seed_everything
from semiseg_nb.engine import evaluate, fit
from semiseg_nb.losses import cross_entropy, one_hot
from semiseg_nb.models import UNet, count_parameters
from semiseg_nb.supervised import Supervised, view

LN2 = math.log(2)
NOTHING = {"adversarial": 0, "adversarial_u": 0, "self_training": 0}
PLAIN = {"adversarial": 0, "adversarial_u": 0, "trust": "absolute", "threshold": 0}        # plain pseudo-labelling
AT_ONCE = {"warmup": 0.0, "start": 0.0}
BEYOND = {"student": "strong", "mix": 1.0, "teacher": "ema"}


@pytest.fixture(scope="module")
def task(): return load_task("scenes", n_labelled=6, size=32)


def net(task, width=4):
    seed_everything(0)
    return UNet(task.n_classes, width=width)


def method(task, make=AdvSemiSeg, **kw): return make(net(task), task, **{**AT_ONCE, "student": "weak", "mix": 0.0, "teacher": "self", **kw})


def batch(task, n=4):
    lab, unl = task.labelled.__getitems__(list(range(n))), task.unlabelled.__getitems__(list(range(n)))
    return {"image": lab["image"].float() / 255, "mask": lab["mask"].long()}, {"image": unl["image"].float() / 255}


def updates(m, task, step=50): return dict(m.updates(*batch(task), Clock(step, 100)))
def train(m, task, steps=4, **more): return fit(m, task, steps, batch_size=4, seed=3, progress=False, eval_on=False, **more)
def rand(*shape, seed=0): return torch.rand(*shape, generator=generator(seed, "test"))
def randn(*shape, seed=0): return torch.randn(*shape, generator=generator(seed, "test"))


def same(a, b):
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def health_source(): return inspect.getsource(health)


def silent(m):
    "Zero the discriminator's last layer: it knows nothing"
    last = [layer for layer in m.modules() if isinstance(layer, nn.Conv2d | nn.Linear)][-1]
    nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
    return m


# 1
@pytest.mark.parametrize("size", [(64, 64), (65, 65), (96, 128), (321, 321)])
def test_one_logit_per_pixel_and_a_grid_of_halvings(size):
    for n in (3, 5):
        D = FCDiscriminator(4, ndf=2, n_layers=n)
        p = rand(1, 4, *size)
        assert D(p).shape == (1, 1, *size) and D.layers(p).shape[-2:] == tuple(s // 2**n for s in size)


def test_a_map_that_is_halved_to_nothing_is_refused(task):
    with pytest.raises(UserError, match="7x40 to nothing: take at most 2 layers"): FCDiscriminator(4)(rand(1, 4, 7, 40))
    with pytest.raises(UserError, match="6 layers halves a map of 32x32"): method(task, n_layers=6)
    with pytest.raises(UserError, match="halves a map of 8x8"): S4GAN(net(task), load_task("scenes", n_labelled=4, size=32, crop=8))


def test_the_papers_discriminator_by_its_number_of_weights():
    assert count_parameters(FCDiscriminator(21, 64, 5)) == 2_783_169
    assert count_parameters(FCDiscriminator(21, 32, 4)) == 176_865
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm | nn.Sigmoid) for m in FCDiscriminator(21).modules())


def test_height_and_width_are_not_swapped():
    "Defect of the published code: `Upsample(size=(w, h))`"
    D, p = FCDiscriminator(3), torch.zeros(1, 3, 32, 64)
    p[..., :8] = 1
    d = D(p).detach()[0, 0]
    assert d.shape == (32, 64) and d[:, :4].mean() != d[:, -4:].mean() and (d[4:28, -8:] - d[16, -8:]).abs().max() < 1e-5


# 2
@pytest.mark.parametrize("make, more", [(AdvSemiSeg, {}), (AdvSemiSeg, BEYOND), (S4GAN, {}), (S4GAN, BEYOND)])
def test_every_loss_moves_its_own_network_only(task, make, more):
    m = method(task, make, **more)
    steps = m.updates(*batch(task), Clock(50, 100))
    name, losses = next(steps)
    assert name == "net"
    sum(v for k, v in losses.items() if k != "supervised").backward()                      # also without cross-entropy
    assert all(p.grad is None for p in m.D.parameters()) and any(p.grad is not None and p.grad.abs().sum() > 0 for p in m.net.parameters())
    before = [None if p.grad is None else p.grad.clone() for p in m.net.parameters()]
    name, losses = next(steps)
    assert name == "discriminator"
    sum(losses.values()).backward()
    assert any(p.grad.abs().sum() > 0 for p in m.D.parameters())
    assert all(a.grad is b or torch.equal(a.grad, b) for a, b in zip(m.net.parameters(), before))
    assert all(p.grad is None for p in m.ema.parameters())


def test_held_is_not_cut():
    D, z = FCDiscriminator(3), randn(1, 3, 16, 16).requires_grad_()
    bce_map(through(D, z.softmax(1)), REAL).backward()
    assert z.grad.abs().sum() > 0 and all(p.grad is None and p.requires_grad for p in D.parameters())


# 3
def test_a_discriminator_that_knows_nothing_says_ln2_everywhere(task):
    m = method(task, adversarial=1.0, adversarial_u=1.0)
    silent(m.D)
    found = updates(m, task)
    for value in (found["net"]["adversarial"], found["net"]["adversarial unlabelled"], sum(found["discriminator"].values())):
        assert value.item() == pytest.approx(LN2, abs=1e-6)
    for threshold, kept in ((0.2, 1.0), (0.6, 0.0)):
        m = method(task, trust="absolute", threshold=threshold)
        silent(m.D)
        updates(m, task)
        assert m.stats["kept"] == kept


# 4
def test_void_pixels_have_no_effect():
    y, d = torch.randint(0, 3, (2, 16, 16), generator=generator(0, "y")), randn(2, 1, 16, 16)
    y[:, :, 10:] = IGNORE
    v, z = y != IGNORE, randn(2, 3, 16, 16, seed=1)
    other, d2 = torch.where(v[:, None], z, z + 5 * randn(2, 3, 16, 16, seed=2)), torch.where(v[:, None], d, d + 3)
    assert torch.equal(cross_entropy(z, y), cross_entropy(other, y)) and torch.equal(bce_map(d, REAL, v), bce_map(d2, REAL, v))
    D = FCDiscriminator(3)
    def adversarial(logits, void): return bce_map(D(hide(logits.softmax(1), v, void)), REAL, v)
    for void in ("match", "uniform"): assert torch.equal(adversarial(z, void), adversarial(other, void))
    assert not torch.equal(adversarial(z, "none"), adversarial(other, "none"))             # the leak: neighbours see void pixels


def test_predictions_carry_the_void_of_masks(task):
    void = torch.full((4, 32, 32), IGNORE)
    void[:, :, :16] = 1
    for how, want in (("match", 0.0), ("uniform", 1 / task.n_classes), ("none", None)):
        m = method(task, void=how)
        lab, unl = batch(task)
        seen = m.passes(lab["image"], unl["image"], Clock(50, 100), weak=True)
        p, known, real, known_real = m.exhibits(seen, void, Clock(50, 100))
        assert torch.equal(known[:4], void != IGNORE) and torch.equal(known[4:], seen.valid)
        if want is None: assert torch.equal(p, torch.cat([seen.z, seen.z_w]).softmax(1))
        else: assert (p.transpose(0, 1)[:, ~known] == want).all()
        if not known_real.all(): assert (real.transpose(0, 1)[:, ~known_real] == (want or 0)).all()


def test_borrowed_void_hides_pixels_of_unlabelled_predictions(task):
    lab, unl = batch(task)
    counts = []
    for borrow in (False, True):
        m = method(task, borrow=borrow)
        seen = m.passes(lab["image"], unl["image"], Clock(50, 100), weak=True)
        _, known, _, known_real = m.exhibits(seen, lab["mask"], Clock(50, 100))
        counts.append(known[4:])
    assert torch.equal(counts[1], counts[0] & known_real) and counts[1].sum() < counts[0].sum()
    assert all(torch.isfinite(v) for v in updates(m, task)["net"].values())


@pytest.mark.parametrize("make", [AdvSemiSeg, S4GAN])
def test_a_batch_without_any_label_gives_finite_losses(task, make):
    m, (lab, unl) = method(task, make), batch(task)
    lab["mask"].fill_(IGNORE)
    for _, losses in m.updates(lab, unl, Clock(50, 100)):
        assert all(torch.isfinite(v) for v in losses.values())
        assert losses.get("supervised", 0) == 0 and losses.get("adversarial", 0) == 0
    assert bce_map(randn(1, 1, 4, 4), FAKE, torch.zeros(1, 4, 4, dtype=torch.bool)) == 0


# 5
def test_an_empty_mask_silences_self_training_and_nothing_else(task):
    "Defect of the published code: where nothing is trusted, the unlabelled adversarial loss was dropped as well"
    m = method(task, trust="absolute", threshold=1.1, adversarial=0.0, adversarial_u=0.5)
    grads = []
    for names in (("self training",), ("self training", "adversarial unlabelled"), ("adversarial unlabelled",)):
        m.net.eval()                                                                       # dropout or statistics change nothing between the passes
        losses = next(m.updates(*batch(task), Clock(50, 100)))[1]
        assert losses["self training"] == 0 and m.stats["kept"] == 0
        grads.append(torch.autograd.grad(sum(losses[n] for n in names), m.net.parameters(), allow_unused=True))
    nothing, both, alone = ([g for g in gs if g is not None] for gs in grads)
    assert all((g == 0).all() for g in nothing)
    assert all(torch.equal(a, b) for a, b in zip(both, alone)) and any(g.abs().sum() > 0 for g in alone)
    one = method(task, trust="absolute", threshold=1.1, adversarial=0.0, adversarial_u=0.25)
    one.net.eval()
    half = next(one.updates(*batch(task), Clock(50, 100)))[1]["adversarial unlabelled"]
    torch.testing.assert_close(2 * half, losses["adversarial unlabelled"])


# 6
def test_the_trusted_part_falls_with_the_threshold():
    c, valid = rand(3, 17, 16), rand(3, 17, 16, seed=1) > 0.3
    parts = [trusted(c, "absolute", t).float().mean().item() for t in (0, 0.2, 0.5, 0.9, 1.1)]
    assert parts == sorted(parts, reverse=True) and parts[0] == 1 and parts[-1] == 0
    for q in (0.0, 0.1, 0.5, 0.77, 1.0):
        assert abs(trusted(c, "quantile", q).sum() - (1 - q) * c.numel()) <= 3             # within one pixel per image
        M = trusted(c, "quantile", q, valid)
        assert abs(M.sum() - (1 - q) * valid.sum()) <= 3 and not (M & ~valid).any()
        if M.any() and q: assert c[M].min() > c[valid & ~M].max()                           # the upper part


def test_balanced_trust_takes_the_upper_part_of_each_class():
    c, labels, valid = rand(3, 17, 16), torch.randint(0, 4, (3, 17, 16), generator=generator(0, "y")), rand(3, 17, 16, seed=1) > 0.3
    labels[labels == 2] = 3                                                                # a class that does not occur
    M = trusted(c, "balanced", 0.7, valid, labels, 5)
    assert not (M & ~valid).any()
    for k in (0, 1, 3):
        of = valid & (labels == k)
        assert abs((M & of).sum() - 0.3 * of.sum()) <= 1 and c[M & of].min() > c[of & ~M].max()
    one = torch.zeros_like(labels)
    assert torch.equal(trusted(c, "balanced", 0.7, valid, one, 1), trusted(c, "quantile", 0.7, valid))


def test_threshold_zero_is_plain_pseudo_labelling_without_a_discriminator(task):
    m = method(task, **PLAIN, self_training=0.7)
    calls = []
    m.D.register_forward_hook(lambda *a: calls.append(1))
    (name, losses), = m.updates(*batch(task), Clock(50, 100))
    assert name == "net" and not calls and not m.judged
    m = method(task, **PLAIN, self_training=0.7)
    lab, unl = batch(task)
    x, _ = view(lab, m.policies, Clock(50, 100))
    seen = m.passes(x, unl["image"], Clock(50, 100), weak=False)
    labels = torch.where(seen.valid, seen.z_w.argmax(1), IGNORE)
    torch.testing.assert_close(losses["self training"], 0.7 * F.cross_entropy(seen.z_w, labels, ignore_index=IGNORE))


# 7
def test_self_training_has_constant_labels_and_a_constant_mask(task):
    m = method(task, adversarial=0.0, adversarial_u=0.0, trust="quantile", threshold=0.5)
    m.net.eval()
    lab, unl = batch(task)
    losses = next(m.updates(lab, unl, Clock(50, 100)))[1]
    found = torch.autograd.grad(losses["self training"], m.net.parameters(), allow_unused=True, retain_graph=True)
    of_D = torch.autograd.grad(losses["self training"], m.D.parameters(), allow_unused=True, retain_graph=True)
    assert all(g is None for g in of_D)
    x_w, valid = m.weak_view(unl["image"], Clock(50, 100))
    z = m.net(x_w)
    sure = m.D(hide(z.softmax(1), valid)).detach().sigmoid()[:, 0]
    target = torch.where(trusted(sure, "quantile", 0.5, valid), z.detach().argmax(1), IGNORE)
    want = torch.autograd.grad(F.cross_entropy(z, target, ignore_index=IGNORE), m.net.parameters())
    for a, b in zip(found, want): torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)


# 8
@pytest.mark.parametrize("views", ["weak", "strong"])
@pytest.mark.parametrize("make, off", [(AdvSemiSeg, NOTHING), (S4GAN, {"feature_matching": 0, "self_training": 0})])
def test_all_weights_zero_is_the_supervised_run_bit_for_bit(task, make, off, views):
    base, m = Supervised(net(task), task, views=views), make(net(task), task, views=views, warmup=0.0, **off)
    m.D.register_forward_hook(lambda *a: pytest.fail("the discriminator was asked"))
    for one in (base, m): train(one, task, 5)
    assert same(base.net, m.net) and same(base.ema, m.ema)


def test_the_warm_up_is_supervised_and_self_training_begins_later(task):
    m = method(task, warmup=0.2, start=0.5)
    assert set(updates(m, task, 10)) == {"net"} and set(updates(m, task, 10)["net"]) == {"supervised"}
    assert "self training" not in updates(m, task, 30)["net"] and "adversarial" in updates(m, task, 30)["net"]
    assert "self training" in updates(m, task, 50)["net"]


# 9
def test_one_hot_sums_to_one_on_labels_and_to_nothing_on_void():
    y = torch.randint(0, 4, (2, 9, 8), generator=generator(0, "y"))
    y[0, :3] = IGNORE
    v = y != IGNORE
    for soften in (0.0, 0.3):
        hot = one_hot(y, 4, soften=soften)
        torch.testing.assert_close(hot.sum(1), v.float())
        assert torch.equal(hot.argmax(1)[v], y[v])
    torch.testing.assert_close(one_hot(y, 4, fill=0.25).sum(1), torch.ones(2, 9, 8))
    p = (4 * randn(2, 4, 9, 8)).softmax(1)
    blend = diffused(y, p, 0.7)
    torch.testing.assert_close(blend.sum(1), v.float(), atol=1e-5, rtol=0)
    assert torch.equal(blend.argmax(1)[v], y[v]) and blend.max(1).values[v].min() > 0.7 - 1e-6 and (blend >= 0).all()


# 10
def test_both_optimisers_follow_the_schedule_each_from_its_own_rate(task):
    m = method(task, lr=4e-3, d_lr=2e-4)
    assert [m.lr_factor(Clock(step, 10)) for step in (0, 5, 10)] == [1, poly(0.5), 0]
    train(m, task, 4)
    rates = {k: o.param_groups[0]["lr"] for k, o in m.optimisers.items()}
    assert rates["discriminator"] == pytest.approx(2e-4 * poly(0.75)) and rates["net"] == pytest.approx(4e-3 * poly(0.75))
    assert m.optimisers["discriminator"].defaults["betas"] == (0.9, 0.99)


# 11
@pytest.mark.slow
def test_a_discriminator_alone_learns_to_tell_uniform_from_one_hot():
    seed_everything(0)
    D, fake = FCDiscriminator(4), torch.full((4, 4, 32, 32), 0.25)
    optimiser = torch.optim.Adam(D.parameters(), 1e-3, betas=(0.9, 0.99))
    for i in range(100):
        real = one_hot(torch.randint(0, 4, (4, 8, 8), generator=generator(i, "y")).repeat_interleave(4, 1).repeat_interleave(4, 2), 4)
        loss = bce_map(D(fake), FAKE) / 2 + bce_map(D(real), REAL) / 2
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.1


# what the discriminator learns from
def test_smoothing_concerns_the_discriminators_own_step_only(task):
    plain, smooth = (updates(method(task, smooth=s), task) for s in (0.0, 0.1))
    assert torch.equal(plain["net"]["adversarial"], smooth["net"]["adversarial"])
    assert torch.equal(plain["discriminator"]["fake"], smooth["discriminator"]["fake"])
    assert not torch.equal(plain["discriminator"]["real"], smooth["discriminator"]["real"])


def test_the_discriminator_sees_the_predictions_of_before_the_step(task):
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


def test_fakes_labelled_leaves_unlabelled_predictions_out(task):
    lab, unl = batch(task)
    values = []
    for fakes in ("both", "labelled"):
        for image in (unl["image"], unl["image"].flip(0) * 0.3):
            m = method(task, fakes=fakes, self_training=0.0, adversarial_u=0.0)
            m.net.eval()
            values.append(dict(m.updates(lab, {"image": image}, Clock(50, 100)))["discriminator"]["fake"])
    assert values[0] != values[1] and torch.equal(values[2], values[3])


def test_the_discriminator_may_learn_in_some_steps_only(task):
    assert set(updates(method(task, d_every=4), task, 8)) == {"net", "discriminator"}
    assert set(updates(method(task, d_every=4), task, 9)) == {"net"}


def test_without_unlabelled_images_the_adversarial_part_still_trains():
    "Defect of the published code: with all images labelled it used a prediction that did not exist"
    task = load_task("scenes", n_labelled=6, size=32, n_unlabelled=0)
    m = method(task, adversarial_u=0, self_training=0, fakes="labelled")
    assert not m.uses_unlabelled and {"adversarial", "fake", "real"} <= set(train(m, task, 2).history[-1])
    with pytest.raises(UserError): train(method(task), task, 2)


def test_no_step_waits_for_the_device():
    "Defect of the published code: predictions went through NumPy in every step"
    source = inspect.getsource(advsemiseg)
    assert not [word for word in (".item()", ".cpu()", ".numpy()", ".tolist()") if word in source.replace(health_source(), "")]


def test_fresh_masks_are_a_stream_of_their_own(task):
    clock = Clock(7, 100, seed=1)
    y = fresh_masks(task.labelled, 4, clock)
    assert y.dtype == torch.int64 and torch.equal(y, fresh_masks(task.labelled, 4, clock))
    halves = [fresh_masks(task.labelled, 2, Clock(7, 100, seed=1, rank=r, world=2)) for r in (0, 1)]
    assert torch.equal(torch.cat(halves), y)
    cropped = load_task("scenes", n_labelled=4, size=32, crop=(16, 24))
    assert fresh_masks(cropped.labelled, 3, clock).shape == (3, 16, 24)


def test_unlabelled_truth_never_reaches_the_methods(task):
    seen = []
    class Spy(AdvSemiSeg):
        def updates(self, lab, unl, clock):
            seen.append(set(unl))
            yield from super().updates(lab, unl, clock)
    train(Spy(net(task), task, **AT_ONCE), task, 2)
    assert all("mask" not in keys for keys in seen) and len(seen) == 2


# options beyond the paper
def test_labels_move_with_the_students_box(task):
    m = method(task, **{**PLAIN, **BEYOND})
    lab, unl = batch(task)
    clock = Clock(50, 100)
    seen = m.passes(lab["image"], unl["image"], clock, weak=False)
    assert seen.z_w is None and seen.box.any() and torch.equal(seen.box, clock.boxes(unl["image"], 1.0))
    labels = torch.where(seen.valid, seen.z_t.argmax(1), IGNORE)
    swapped = labels.unflatten(0, (2, 2)).flip(1).flatten(0, 1)
    want = cross_entropy(seen.z_s, torch.where(seen.box, swapped, labels))
    torch.testing.assert_close(m.learn(seen, unl, seen.valid), want)


def test_norm_all_weighs_by_the_trusted_part(task):
    chosen, everything = (updates(method(task, norm=n, threshold=0.75), task)["net"]["self training"] for n in ("selected", "all"))
    assert everything.item() == pytest.approx(0.25 * chosen.item(), rel=1e-2)


def test_confidence_can_be_the_judge(task):
    m = method(task, judge="confidence", trust="quantile", threshold=0.5, adversarial=0, adversarial_u=0)
    assert not m.judged and set(updates(m, task)) == {"net"} and m.stats["kept"].item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("more", [{}, BEYOND, {"void": "uniform", "borrow": True, "soften": 0.05}, {"diffuse": 0.8, "norm": "all", "d_every": 2, "trust": "balanced"}])
def test_every_form_trains_and_resumes_exactly(task, more, tmp_path):
    whole, first, second = (AdvSemiSeg(net(task), task, warmup=0.2, start=0.4, **more) for _ in range(3))
    train(whole, task, 6)
    class Stop(Exception): ...
    def stop(m): raise Stop
    with pytest.raises(Stop):
        fit(first, task, 6, batch_size=4, seed=3, progress=False, out_dir=tmp_path, checkpoint_every=3, eval_every=4, eval_on=task.tune, probe=stop)
    fit(second, task, 6, batch_size=4, seed=3, progress=False, eval_on=False, out_dir=tmp_path)
    assert same(whole.net, second.net) and same(whole.D, second.D)


# s4GAN
def test_image_scores_and_features_for_any_size():
    D = ImageDiscriminator(4, ndf=2).eval()
    for size in ((16, 16), (33, 48)):
        d, phi = D(rand(3, 4, *size), rand(3, 3, *size))
        assert d.shape == (3, 1) and phi.shape == (3, 16) and ((d.sigmoid() > 0) & (d.sigmoid() < 1)).all()
    with pytest.raises(UserError, match="15x40 to nothing"): D(rand(1, 4, 15, 40), rand(1, 3, 15, 40))


def test_feature_distance_compares_batches_not_images():
    a, b = randn(4, 8), randn(5, 8, seed=1)
    assert feature_distance(a, a) == 0 and feature_distance(a, b) > 0 and torch.equal(feature_distance(a, b), feature_distance(b, a))
    torch.testing.assert_close(feature_distance(a[[2, 0, 3, 1]], b), feature_distance(a, b))


def test_a_high_gamma_removes_self_training_and_a_low_one_takes_whole_images(task):
    m = method(task, S4GAN, trust="absolute", threshold=1.0)
    assert updates(m, task)["net"]["self training"] == 0 and m.stats["kept"] == 0
    m = method(task, S4GAN, trust="quantile", threshold=0.5)
    m.eval()
    lab, unl = batch(task)
    kept = []
    learn = m.learn
    m.learn = lambda seen, unl, believed: kept.append((believed, seen.valid)) or learn(seen, unl, believed)
    next(m.updates(lab, unl, Clock(50, 100)))
    (believed, valid), = kept
    per_image = [torch.equal(b, v) if b.any() else False for b, v in zip(believed, valid)]
    assert sum(per_image) == 2 and believed.any((1, 2)).sum() == 2


def test_gating_keeps_the_background_and_obeys_also_when_all_logits_are_negative():
    z = randn(2, 4, 5, 5) - 20
    keep = torch.tensor([[False, True, False, True], [True, True, True, True]])
    out = gate(z, keep)
    assert set(out[0].argmax(0).unique().tolist()) <= {0, 1, 3} and torch.equal(out[1], z[1])
    assert (gate(z, torch.zeros(2, 4, dtype=torch.bool)).argmax(1) == 0).all()
    assert torch.equal(gate(z, torch.ones(2, 4, dtype=torch.bool)), z) and torch.equal(out[0, [0, 1, 3]], z[0, [0, 1, 3]])


def test_mlmt_trains_a_classifier_whose_average_starts_as_its_copy(task):
    student = TagClassifier(task.n_classes, width=4)
    teacher = EMA(student, 0.99)
    nn.init.ones_(student.layers[-1].bias)
    teacher.update(student)
    assert same(teacher.net, student)
    lab, unl = batch(task)
    bce, apart = tag_losses(student, teacher, lab["image"], lab["mask"], unl["image"], unl["image"], task.n_classes)
    assert bce > 0 and 0 <= apart <= 2
    (bce + apart).backward()
    assert all(p.grad is not None for p in student.parameters()) and all(p.grad is None for p in teacher.parameters())


def test_mlmt_adds_an_update_and_gates_the_prediction(task):
    m = method(task, S4GAN, mlmt=True)
    found = updates(m, task, 5)
    assert set(found) == {"net", "discriminator", "classifier"} and found["classifier"]["tags apart"] == 0      # agreement after a tenth
    m.eval()
    nn.init.constant_(m.tag_teacher.net.layers[-1].bias, -50.0)                            # rules out everything
    x = batch(task)[0]["image"]
    assert (m.predict(x).argmax(1) == 0).all() and 0 <= evaluate(m, task.val)["miou"] <= 1


@pytest.mark.parametrize("make", [AdvSemiSeg, S4GAN])
def test_a_few_steps_lower_the_supervised_loss(task, make):
    run = train(make(net(task), task, lr=5e-3, warmup=0.2, start=0.5), task, 30)
    assert run.history[-1]["supervised"] < 0.8 * run.history[0]["supervised"] and math.isfinite(run.history[-1]["self training"])


def test_bfloat16_autocast_gives_finite_losses(task):
    for make in (AdvSemiSeg, S4GAN):
        m = method(task, make)
        with torch.autocast("cpu", torch.bfloat16):
            for _, losses in m.updates(*batch(task), Clock(50, 100)):
                for value in losses.values(): assert torch.isfinite(value) and value.dtype == torch.float32


# a user's mistakes
@pytest.mark.parametrize("make, kwargs, text", [
    (AdvSemiSeg, {"adversarial": -1.0}, "adversarial is -1.0"), (AdvSemiSeg, {"threshold": 1.1}, "a part of the pixels.* is 1.1"),
    (AdvSemiSeg, {"trust": "quantil"}, "did you mean 'quantile'"), (AdvSemiSeg, {"judge": "me"}, "judge 'me' is not known"),
    (AdvSemiSeg, {"void": "zero"}, "void 'zero'"), (AdvSemiSeg, {"student": "both"}, "student 'both'"), (AdvSemiSeg, {"mix": 2.0}, "mix is 2.0"),
    (S4GAN, {"trust": "balanced"}, "trust is 'balanced'"), (AdvSemiSeg, {"smooth": 0.9}, "smooth is 0.9"), (AdvSemiSeg, {"d_every": 0}, "d_every is 0"), (AdvSemiSeg, {"start": 3}, "start is 3"),
    (S4GAN, {"keep": -0.1}, "keep is -0.1"), (S4GAN, {"feature_matching": -1}, "feature_matching is -1"), (S4GAN, {"views": "hard"}, "views 'hard'"),
])
def test_settings_that_make_no_sense_are_refused_before_training(task, make, kwargs, text):
    with pytest.raises(UserError, match=text): make(net(task), task, **kwargs)


def test_a_single_unlabelled_image_has_no_partner_for_cutmix(task):
    with pytest.raises(UserError, match="no partner"): fit(AdvSemiSeg(net(task), task, mix=1.0), task, 20, 2, unlabelled_batch=1, progress=False, eval_on=False)


def test_health_says_what_the_curves_mean():
    assert "wins too easily" in health([{"fake": 0.01, "real": 0.17}], 0.1) and "guessing" in health([{"fake": 0.34, "real": 0.35}])
    assert "healthy" in health([{"fake": 0.2, "real": 0.25}]) and "No discriminator" in health([{"supervised": 1.0}])
