"GuidedMix-Net: pairs, mixtures, MITrans, decoupling, and who learns from whom in its profiles"
import copy
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from semiseg_nb.catalogue import load_task
from semiseg_nb.clock import Clock
from semiseg_nb.core import IGNORE, UserError, generator, seed_everything
from semiseg_nb.engine import fit, settings
from semiseg_nb.guidedmix import (
    PAPER,
    Attention,
    GuidedMix,
    JointGuidedMix,
    MITrans,
    WithMITrans,
    decouple,
    deepest_channels,
    distances,
    maps_and_logits,
    mean_answer,
    mean_features,
    mixing_weights,
    mixup,
    squared_gap,
)
from semiseg_nb.models import build_model
from semiseg_nb.networks import UNet, conv_bn_relu, running_statistics  # noqa: F401 (the lesson's cells use one)
from semiseg_nb.supervised import Supervised

LESSON = Path(__file__).resolve().parents[1] / "nbs/30_guidedmix.ipynb"


def lesson() -> dict:
    "What the lesson defines beside its module: subclasses that are forms of the method, and their losses"
    cells = {c["id"]: "".join(c["source"]) for c in json.loads(LESSON.read_text())["cells"]}
    names = dict(globals())
    for i in ("random-partners", "pseudo", "released", "unguided-class"): exec(cells[i], names)
    return names


HERE = lesson()
random_partners, mixed_loss, sigmoid_focal = (HERE[n] for n in ("random_partners", "mixed_loss", "sigmoid_focal"))
FORMS = {"ours": (GuidedMix, {}), "paper": (JointGuidedMix, PAPER), "pseudo": (HERE["PseudoGuidedMix"], PAPER | dict(renorm=True)),
         "released": (HERE["ReleasedGuidedMix"], HERE["RELEASED"]), "no guidance": (HERE["Unguided"], HERE["PLAIN"])}


@pytest.fixture(scope="module")
def task(): return load_task("scenes", n_labelled=6, size=32)


def net(task, kind="unet"):
    seed_everything(0)
    return UNet(task.n_classes, width=4) if kind == "unet" else build_model(kind, task.n_classes, width=4)


def batch(task, n=4):
    lab, unl = task.labelled.__getitems__(list(range(n))), task.unlabelled.__getitems__(list(range(n)))
    return {"image": lab["image"].float() / 255, "mask": lab["mask"].long()}, {"image": unl["image"].float() / 255}


def make(task, form="ours", **kw): return FORMS[form][0](net(task), task, **FORMS[form][1] | kw)


def update(method, task, step=50):
    "Losses and statistics of one step"
    (_, losses, shown), = method.updates(*batch(task), Clock(step, 100))
    return losses, shown


def losses_of(method, task, step=50): return update(method, task, step)[0]
def train(method, task, steps=3, **more): return fit(method, task, steps, batch_size=4, seed=3, progress=False, eval_on=False, **more)


def same(a, b):
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def rand(*shape, seed=0): return torch.randn(*shape, generator=generator(seed, "rand"))
def parts(*values): return torch.tensor(values).view(-1, 1, 1, 1)


# 1 pairing
def test_the_same_images_in_both_batches_pair_with_themselves(task):
    x = batch(task, 6)[0]["image"]
    f = mean_features(net(task).eval().encode(x)[-1])
    assert distances(f, f).argmin(1).tolist() == list(range(6))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.equal(distances(f, f[order]).argmin(1), order.argsort())      # permuted partners, permuted answer


def test_pairing_ignores_the_size_of_the_features_and_carries_no_gradient():
    f_u, f_l = rand(5, 8).requires_grad_(), rand(6, 8, seed=1)
    d = distances(f_u, f_l)
    torch.testing.assert_close(d, distances(10 * f_u, f_l))
    assert torch.equal(d.argmin(1), distances(10 * f_u, 0.1 * f_l).argmin(1)) and not d.requires_grad
    cosine = F.normalize(f_u, dim=1) @ F.normalize(f_l, dim=1).T
    assert torch.equal(d.argmin(1), cosine.argmax(1)) and torch.equal(d.argmax(1), cosine.argmin(1))


def test_random_pairs_are_a_permutation():
    keys = torch.rand(5, generator=generator(0, "keys"))
    found = random_partners(keys, 7).tolist()
    assert sorted(found[:5]) == list(range(5)) and found[5:] == found[:2]


def test_the_method_takes_the_nearest_partner(task):
    d = torch.tensor([[0.1, 0.5], [0.2, 0.9], [0.7, 0.3]])
    assert make(task).partners(d, Clock(0, 1)).tolist() == [0, 0, 1]


# 2 lambda
@pytest.mark.parametrize("high", [0.1, 0.3, 0.5])
def test_lambda_is_a_folded_uniform_below_its_limit(high):
    uniform = torch.rand(20000, generator=generator(0, "lam"))
    lam, folded = mixing_weights(uniform, high, 0.0), torch.minimum(uniform, 1 - uniform)
    assert lam.shape == uniform.shape and lam.min() >= 0 and lam.max() <= high
    assert lam.mean().item() == pytest.approx(folded[folded < high].mean().item(), abs=0.004)    # what drawing again until it fits gives


def test_lambda_has_the_mean_of_a_quarter_and_a_floor():
    lam = mixing_weights(torch.rand(20000, generator=generator(0, "lam")))
    assert lam.mean().item() == pytest.approx(0.25, abs=0.01) and lam.min().item() == pytest.approx(0.05) and lam.max() < 0.5
    assert (mixing_weights(torch.rand(9), high=0.01) == torch.tensor(0.01)).all()


def test_lambda_of_two_processes_is_that_of_one(task):
    method = make(task)
    whole, parts_of = method.parts(4, Clock(3, 9, 1)), [method.parts(2, Clock(3, 9, 1, rank, 2)) for rank in (0, 1)]
    assert whole.shape == (4, 1, 1, 1) and torch.equal(whole, torch.cat(parts_of))


# 3 mixing
def test_a_mix_with_nothing_is_the_image_itself_and_constants_are_weighted():
    u, p = torch.rand(3, 3, 5, 5), torch.rand(3, 3, 5, 5)
    assert torch.equal(mixup(u, p, parts(0.0, 0.0, 0.0)), u)
    assert (mixup(torch.full_like(u, 0.5), torch.full_like(u, 0.25), parts(0.25, 0.5, 0.0)) == parts(0.4375, 0.375, 0.5)).all()


def test_a_mix_lies_between_its_images_and_keeps_their_type():
    u, p, lam = torch.rand(64, 3, 8, 8), torch.rand(64, 3, 8, 8), mixing_weights(torch.rand(64, 1, 1, 1))
    x = mixup(u, p, lam)
    assert (x >= torch.minimum(u, p)).all() and (x <= torch.maximum(u, p)).all()
    for kind in (torch.float64, torch.bfloat16): assert mixup(u.to(kind), p.to(kind), lam).dtype == kind
    loop = torch.stack([(1 - v.item()) * a + v.item() * b for a, b, v in zip(u, p, lam)])
    torch.testing.assert_close(x, loop)


def test_mixing_normalised_images_is_normalising_the_mix():
    model, u, p, lam = UNet(5, width=4, mean=(0.2, 0.4, 0.6)), torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8), parts(0.1, 0.4)
    torch.testing.assert_close(model.normalise(mixup(u, p, lam)), mixup(model.normalise(u), model.normalise(p), lam))


# 4 MITrans
def test_mitrans_keeps_the_shape_and_attention_sums_to_one():
    for size in ((4, 4), (3, 5), (1, 1)): assert MITrans(8).eval()(rand(2, 8, *size)).shape == (2, 8, *size)
    block = Attention(8)
    torch.testing.assert_close(block.weights(rand(2, 8, 3, 5)).sum(-1), torch.ones(2, 15), atol=1e-5, rtol=0)


def test_attention_begins_as_the_identity():
    b = rand(2, 8, 4, 4)
    assert torch.equal(Attention(8)(b), b)


def test_attention_alone_does_not_know_places():
    block, b, order = Attention(8), rand(2, 8, 3, 5), torch.randperm(15, generator=generator(0, "order"))
    nn.init.normal_(block.out.weight)
    moved = lambda t: t.flatten(2)[:, :, order].view_as(t)
    torch.testing.assert_close(block(moved(b)), moved(block(b)), atol=1e-5, rtol=1e-5)


def test_the_fast_attention_is_the_formula():
    block, b = Attention(8), rand(2, 8, 3, 5)
    nn.init.normal_(block.out.weight)
    heard = (block.weights(b) @ block.value(b).flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (3, 5))
    torch.testing.assert_close(block(b), b + block.out(heard), atol=1e-5, rtol=1e-5)


def test_a_far_place_is_reached_once_attention_has_weights():
    for scale, reached in ((0.0, False), (1.0, True)):
        block, b = Attention(4), rand(1, 4, 9, 9).requires_grad_()
        nn.init.normal_(block.out.weight, std=scale) if scale else None
        block(b)[0, :, 0, 0].sum().backward()
        assert bool(b.grad[0, :, 8, 8].abs().sum() > 0) == reached


def test_many_places_pool_the_keys_and_leave_the_queries():
    q, k, v = Attention(8, max_tokens=16).tokens(rand(1, 8, 9, 7))
    assert q.shape == (1, 63, 4) and k.shape == v.shape == (1, 6, 4)       # 9x7 -> 5x4 is still too many -> 3x2
    assert Attention(8, max_tokens=16)(rand(1, 8, 9, 7)).shape == (1, 8, 9, 7)


@pytest.mark.parametrize("kind", ["unet", "deeplabv3", "psp"])
def test_any_network_gets_mitrans(task, kind):
    model = net(task, kind).eval()
    x = torch.rand(2, 3, 33, 40)
    larger = WithMITrans(copy.deepcopy(model)).eval()
    assert larger(x).shape == model(x).shape and not torch.allclose(larger(x), model(x))
    (f_1, f_2), (z_1, z_2) = maps_and_logits(larger, x[:1], x[1:])
    torch.testing.assert_close(torch.cat([z_1, z_2]), larger(x), atol=1e-4, rtol=1e-4)
    features = model.encode(x)
    torch.testing.assert_close(torch.cat([f_1, f_2]), features[-1], atol=1e-4, rtol=1e-4)
    assert deepest_channels(model) == features[-1].shape[1] and model.training is False


def test_looking_for_the_channels_leaves_the_network_as_it_was(task):
    model, before = net(task), net(task)
    model.head.eval()                                                      # a part that the user froze stays so
    deepest_channels(model)
    assert same(model, before) and model.training and not model.head.training


# 5 decoupling
def test_decoupling_a_mix_with_nothing_changes_nothing():
    z_m, z_l = rand(2, 5, 3, 3), rand(2, 5, 3, 3, seed=1)
    assert torch.equal(decouple(z_m, z_l, parts(0.0, 0.0)), z_m)


def test_below_a_linear_head_decoupling_tells_nothing_new():
    head, f_u, f_l, lam = nn.Conv2d(6, 5, 1), rand(3, 6, 4, 4), rand(3, 6, 4, 4, seed=1), parts(0.1, 0.3, 0.49)
    z_u, z_l, z_m = head(f_u), head(f_l), head(mixup(f_u, f_l, lam))
    torch.testing.assert_close(decouple(z_m, z_l, lam), (1 - lam) * z_u, atol=1e-5, rtol=0)
    torch.testing.assert_close(decouple(z_m, z_l, lam, renorm=True), z_u, atol=1e-5, rtol=0)
    assert torch.equal(decouple(z_m, z_l, lam).argmax(1), z_u.argmax(1))


def test_a_mask_is_a_distribution_and_lambda_belongs_to_its_image():
    z_m, z_l, lam = rand(3, 5, 4, 4), rand(3, 5, 4, 4, seed=1), parts(0.1, 0.3, 0.5)
    torch.testing.assert_close(decouple(z_m, z_l, lam).softmax(1).sum(1), torch.ones(3, 4, 4))
    loop = torch.stack([m - v.item() * z for m, z, v in zip(z_m, z_l, lam)])
    torch.testing.assert_close(decouple(z_m, z_l, lam), loop)
    torch.testing.assert_close(decouple(z_m, z_l, lam, renorm=True), loop / (1 - lam))


def test_a_blend_is_the_mean_of_two_distributions():
    z_d, z_u = rand(2, 5, 4, 4), rand(2, 5, 4, 4, seed=1)
    assert mean_answer(z_d, z_u, 0.0) is z_d
    for part in (0.25, 1.0):
        torch.testing.assert_close(mean_answer(z_d, z_u, part).softmax(1), (1 - part) * z_d.softmax(1) + part * z_u.softmax(1))


# 6 gradients
@pytest.mark.parametrize("form, learns", [("paper", (True, True)), ("pseudo", (True, False)), ("released", (False, True)), ("ours", (True, False))])
def test_who_learns_from_whom(task, form, learns):
    z_u, z_m, z_l = (rand(2, 5, 4, 4, seed=s).requires_grad_() for s in range(3))
    method, everywhere = make(task, form, threshold=0.0), torch.ones(2, 4, 4, dtype=torch.bool)
    z_d = method.remainder(z_m, z_l.detach(), parts(0.2, 0.4))
    method.pair_losses(z_u, z_d, everywhere, z_m, torch.zeros(2, 4, 4, dtype=torch.long), parts(0.2, 0.4))["pairs"].backward()
    assert (z_u.grad is not None, z_m.grad is not None) == learns and z_l.grad is None
    for z in (z_u, z_m): assert z.grad is None or z.grad.abs().sum() > 0


def test_in_pseudo_the_mixed_answer_learns_from_its_own_loss_only():
    z_m, z_u = rand(2, 5, 4, 4).requires_grad_(), rand(2, 5, 4, 4, seed=1).requires_grad_()
    mixed_loss(z_m, torch.zeros(2, 4, 4, dtype=torch.long), z_u.argmax(1), parts(0.2, 0.4)).backward()
    assert z_m.grad.abs().sum() > 0 and z_u.grad is None


def test_a_pseudo_mask_counts_only_where_it_is_believed(task):
    z_s, z_q, valid = rand(2, 5, 4, 4), 3 * rand(2, 5, 4, 4, seed=1), torch.ones(2, 4, 4, dtype=torch.bool)
    valid[:, 3] = False
    believed = (z_q.softmax(1).amax(1) > 0.5) & valid
    by_hand = F.cross_entropy(z_s, z_q.argmax(1), reduction="none")[believed].sum() / 24
    torch.testing.assert_close(make(task, threshold=0.5).pair_losses(z_s, z_q, valid, None, None, None)["pairs"], by_hand)


def test_the_plain_answer_can_take_all_of_the_pseudo_mask(task):
    "Then how the mixture is decoupled has no influence"
    def loss(**kw): return losses_of(make(task, threshold=0.0, **kw), task)["pairs"]
    whole, none = loss(blend=1.0), loss(blend=1.0, renorm=False)
    assert torch.equal(whole, none) and whole > 0
    assert not torch.equal(loss(form="paper"), loss(form="paper", renorm=True))


def test_the_labelled_answer_is_fixed_in_a_whole_step(task):
    "What the losses on pairs send to a network that mixes features goes through the features, never through the partner's logits"
    method = make(task, "paper", mitrans=False, alignment=0.0)
    seen = []
    original = method.net.decode
    def spy(features, size):
        z = original(features, size)
        if z.requires_grad: z.retain_grad()
        seen.append(z)
        return z
    method.net.decode = spy
    losses = losses_of(method, task)
    losses["pairs"].backward()
    assert seen[0].grad[:4].abs().sum() == 0 and seen[0].grad[4:].abs().sum() > 0 and seen[1].grad.abs().sum() > 0


# 7 weight
def test_the_weight_ramps_up_like_a_bell(task):
    def factor(step, **kw):
        method = make(task, "paper", alignment=0.0, **kw)
        method.net.eval()
        return losses_of(method, task, step)["pairs"].item()
    whole = factor(40)
    assert Clock(0, 100).ramp(0.4, "sigmoid") == pytest.approx(0.0067, abs=1e-4)
    assert [Clock(s, 100).ramp(0.4, "sigmoid") for s in (40, 70, 99)] == [1, 1, 1]
    climb = [Clock(s, 100).ramp(0.4, "sigmoid") for s in range(0, 41, 5)]
    assert climb == sorted(climb)
    assert factor(40, weight=3.0) == pytest.approx(3 * whole, rel=1e-4)
    assert factor(40, ramp=0.8) == pytest.approx(math.exp(-5 / 4) * whole, rel=1e-4)


@pytest.mark.parametrize("views", ["weak", "strong"])
@pytest.mark.parametrize("form", FORMS)
def test_weight_zero_takes_the_supervised_step_bit_for_bit(task, form, views):
    base, method = Supervised(net(task), task, views=views), make(task, form, weight=0.0, views=views)
    def refuse(*_, **__): raise AssertionError("an unlabelled image was looked at")
    method.weak_view = refuse
    for m in (base, method): train(m, task, 3)
    assert same(base.net, method.net) and same(base.ema, method.ema)


# 8 inference
@pytest.mark.parametrize("form", FORMS)
def test_prediction_needs_one_image_and_no_luck(task, form):
    method = make(task, form)
    train(method, task, 2)
    x = batch(task)[1]["image"]
    with torch.no_grad():
        assert torch.equal(method.predict(x), method.predict(x))
        torch.testing.assert_close(method.predict(x)[2:3], method.predict(x[2:3]), atol=1e-4, rtol=1e-4)


# 9 oracle
def test_a_perfect_network_is_decoupled_perfectly():
    g = generator(0, "oracle")
    y_u, y_l = (torch.randint(0, 5, (4, 8, 8), generator=g) for _ in range(2))
    onehot, lam = lambda y: 4.0 * F.one_hot(y, 5).permute(0, 3, 1, 2), mixing_weights(torch.rand(4, 1, 1, 1, generator=g))
    z_m = mixup(onehot(y_u), onehot(y_l), lam)
    assert torch.equal(decouple(z_m, onehot(y_l), lam).argmax(1), y_u)


# the defects of the published code
def test_the_focal_loss_is_bounded_below_and_finite():
    z = rand(2, 5, 3, 3)
    assert sigmoid_focal(z, z.argmax(1)) >= 0 and torch.isfinite(sigmoid_focal(1e3 * z, z.argmin(1)))


def test_the_focal_loss_is_that_of_torchvision_and_leaves_255_out():
    from torchvision.ops import sigmoid_focal_loss
    z, y = rand(2, 5, 3, 4), torch.randint(0, 5, (2, 3, 4), generator=generator(0, "y"))
    theirs = sigmoid_focal_loss(z, F.one_hot(y, 5).permute(0, 3, 1, 2).float(), alpha=0.5, gamma=0.5, reduction="mean")
    torch.testing.assert_close(sigmoid_focal(z, y), theirs)
    y[1] = IGNORE
    torch.testing.assert_close(sigmoid_focal(z, y), sigmoid_focal(z[:1], y[:1]))
    assert sigmoid_focal(z, torch.full_like(y, IGNORE)) == 0


def test_the_unknown_rim_and_padding_have_no_effect():
    z_m, z_u, valid = rand(2, 5, 4, 4), rand(2, 5, 4, 4, seed=1), torch.ones(2, 4, 4, dtype=torch.bool)
    valid[:, 3] = False
    before, away = squared_gap(z_u, z_m, valid), torch.where(valid[:, None], 0.0, 9.0 * rand(2, 5, 4, 4, seed=2))
    torch.testing.assert_close(squared_gap(z_u + away, z_m - away, valid), before)
    assert squared_gap(z_u, z_m, ~valid & valid) == 0
    y = torch.where(valid, z_u.argmax(1), IGNORE)
    torch.testing.assert_close(mixed_loss(z_m + away, y, y, parts(0.1, 0.3)), mixed_loss(z_m, y, y, parts(0.1, 0.3)))
    assert mixed_loss(z_m, torch.full_like(y, IGNORE), torch.full_like(y, IGNORE), parts(0.1, 0.3)) == 0


def test_the_mixed_loss_weighs_both_images_by_their_parts():
    z, y_p, y_u, lam = rand(2, 5, 4, 4), torch.full((2, 4, 4), 1), torch.full((2, 4, 4), 2), parts(0.1, 0.4)
    each = [(v * F.cross_entropy(z[i:i + 1], y_p[i:i + 1]), (1 - v) * F.cross_entropy(z[i:i + 1], y_u[i:i + 1])) for i, v in enumerate((0.1, 0.4))]
    loop = sum(a + b for a, b in each) / 2
    torch.testing.assert_close(mixed_loss(z, y_p, y_u, lam), loop)
    y_u[:, :2] = IGNORE                                                    # half of the pixels are padding
    only_u = mixed_loss(z, torch.full_like(y_p, IGNORE), y_u, lam)
    by_hand = sum((1 - v) * F.cross_entropy(z[i:i + 1, :, 2:], y_u[i:i + 1, 2:]) for i, v in enumerate((0.1, 0.4))) / 2
    torch.testing.assert_close(only_u, by_hand)


@pytest.mark.parametrize("form", FORMS)
def test_a_step_shows_whether_it_is_healthy(task, form):
    shown = {k: float(v) for k, v in update(make(task, form), task)[1].items()}
    assert {"w", "lambda", "distance", "entropy", "agreement"} == set(shown)
    assert 0 < shown["entropy"] <= math.log(task.n_classes) + 1e-5 and 0 <= shown["agreement"] <= 1 and 0 <= shown["distance"] <= 2


def test_every_step_draws_new_lambdas(task):
    method = make(task, "paper")
    found = [update(method, task, step)[1]["lambda"].item() for step in (10, 11, 10)]
    assert found[0] == found[2] != found[1]


def test_settings_are_attributes_and_a_profile_is_a_dict(task):
    method = make(task, "paper", lam_max=0.4, views="strong")
    assert {k: settings(method)[k] for k in PAPER} == PAPER | dict(lam_max=0.4) and settings(method)["views"] == "strong"


def test_running_statistics_fit_the_weights(task):
    "Normalising held-out images by their own statistics instead of the running ones changes few of the answers"
    method = make(task, "paper", lr=5e-3)
    train(method, task, 25)
    x = task.val.__getitems__(list(range(32)))["image"].float() / 255
    with torch.no_grad(): running, own = method.net.eval()(x), method.net.train()(x)
    assert (running.argmax(1) == own.argmax(1)).float().mean() > 0.6


def test_a_hook_keeps_mixtures_out_of_the_averages(task):
    class Keeps(JointGuidedMix):
        def mixed_logits(self, net, *rest):
            with running_statistics(net): return super().mixed_logits(net, *rest)
    for cls, passes in ((JointGuidedMix, 2), (Keeps, 1)):
        method = cls(net(task), task, **PAPER)
        losses_of(method, task)
        assert all(b.num_batches_tracked == passes for b in method.net.modules() if isinstance(b, nn.BatchNorm2d))


def test_the_second_head_has_no_idle_weights_and_is_dropped_for_prediction(task):
    method = make(task, "released")
    sum(losses_of(method, task).values()).backward()
    assert all(p.grad is not None for p in (*method.net.parameters(), *method.second.parameters()))
    assert not any("second" in name for name in method.ema.state_dict())


# all forms
@pytest.mark.parametrize("form, kw", [*((f, {}) for f in FORMS), ("ours", dict(mix=0.0, mitrans=False))])
def test_every_weight_gets_a_gradient_and_the_average_none(task, form, kw):
    method = make(task, form, threshold=0.0, **kw)
    for _ in range(2):                                                     # the zeros of MITrans hold back its inside in the first step
        losses = losses_of(method, task)
        assert all(torch.isfinite(v) and v > 0 for v in losses.values())
        method.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        with torch.no_grad(): [p.sub_(0.01 * p.grad) for p in method.parameters() if p.grad is not None]
    assert all(p.grad is None for p in method.ema.parameters())
    assert all(p.grad is not None for g in method.optimisers["net"].param_groups for p in g["params"])


@pytest.mark.parametrize("form", ["ours", "paper", "released"])
def test_resume_is_bit_exact(task, tmp_path, form):
    whole, part, resumed = (make(task, form) for _ in range(3))
    train(whole, task, 4)

    class Killed(Exception): pass
    def dies(lab, unl, clock, updates=part.updates):
        if clock.step == 3: raise Killed
        yield from updates(lab, unl, clock)
    part.updates = dies
    with pytest.raises(Killed): train(part, task, 4, out_dir=tmp_path, checkpoint_every=2)
    train(resumed, task, 4, out_dir=tmp_path)
    assert same(whole, resumed)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_autocast_and_another_network(task, form):
    method = FORMS[form][0](net(task, "deeplabv3"), task, **FORMS[form][1])
    with torch.autocast("cpu", dtype=torch.bfloat16): losses = losses_of(method, task)
    assert all(v.dtype == torch.float32 and torch.isfinite(v) for v in losses.values())


def test_other_batch_sizes_and_a_library_encoder(task):
    fit(make(task), task, 2, batch_size=2, unlabelled_batch=3, progress=False, eval_on=False)
    model = build_model("deeplabv3plus", task.n_classes, encoder="mobilenetv3_small_050")
    losses = losses_of(JointGuidedMix(model, task, **PAPER), task)
    assert all(torch.isfinite(v) for v in losses.values())


def test_the_control_has_no_partner(task):
    "No labelled image has any influence on what the unlabelled ones are asked"
    method = make(task, "no guidance", threshold=0.0)
    method.net.eval()
    lab, unl = batch(task)
    (_, one, shown), = method.updates(lab, unl, Clock(50, 100))
    (_, two, _), = method.updates({k: v.flip(0) for k, v in lab.items()}, unl, Clock(50, 100))
    torch.testing.assert_close(one["pairs"], two["pairs"])
    assert shown["agreement"] == 1


@pytest.mark.parametrize("kw, text", [
    (dict(profile="paper"), "setting of GuidedMix 'profile' is not known"),
    (dict(lam_max=0.0), "lam_max is 0.0, but it should be between 0.001 and 0.5"), (dict(lam_max=0.6), "lam_max is 0.6"),
    (dict(weight=-1.0), "weight is -1.0"), (dict(ramp=2.0), "ramp is 2.0"), (dict(threshold=80), "threshold is 80"),
    (dict(mitrans="on"), "mitrans is 'on', but it should be True or False"), (dict(blend=1.5), "blend is 1.5"),
    (dict(teacher="me"), "teacher 'me' is not known"),
    (dict(teacher="self"), "only a strong view gets a box, and there is none with teacher='self': take mix=0, or teacher='ema'")])
def test_settings_that_make_no_sense_are_refused_before_training(task, kw, text):
    with pytest.raises(UserError, match=text): make(task, **kw)


def test_a_single_unlabelled_image_has_nobody_to_paste_from(task):
    lab, unl = batch(task)
    with pytest.raises(UserError, match="has no partner"): fit(make(task), task, 2, batch_size=4, unlabelled_batch=1, progress=False)
    (_, losses, _), = make(task, mix=0.0).updates(lab, {"image": unl["image"][:1]}, Clock(50, 100))
    assert losses["pairs"] >= 0


def test_a_few_steps_lower_the_supervised_loss(task):
    run = train(make(task, "paper", lr=5e-3), task, 30)
    assert run.history[-1]["supervised"] < 0.8 * run.history[0]["supervised"]


def test_the_solutions_of_the_exercises():
    cells = {c["id"]: "".join(c["source"]) for c in json.loads(LESSON.read_text(encoding="utf-8"))["cells"]}
    code, = re.findall(r"```python\n(.*?)```", cells["solutions"], re.S)
    names = dict(globals())
    exec(code, names)
    empty = set(cells["exercise"].removeprefix("# ").strip().split(", "))
    assert empty == {"factor", "nearest_by_cosine", "KeepsAverages"} <= set(names) and code.count("assert") == 2
