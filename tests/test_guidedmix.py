"GuidedMix-Net: pairs, mixtures, MITrans, decoupling, and who learns from whom in its profiles"
import copy
import math
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from semiseg_nb.catalogue import load_task
from semiseg_nb.clock import Clock
from semiseg_nb.core import IGNORE, UserError, generator, seed_everything
from semiseg_nb.engine import fit
from semiseg_nb.guidedmix import (
    PROFILES,
    Attention,
    Bank,
    GuidedMix,
    MITrans,
    WithMITrans,
    decouple,
    deepest_channels,
    distances,
    guided_losses,
    mix,
    mixed_loss,
    mixing_weights,
    pair,
    pair_loss,
    pooled,
    running_statistics,
    sigmoid_focal,
    tags_of,
)
from semiseg_nb.models import UNet, build_model
from semiseg_nb.supervised import Supervised

FORMS = {"paper": "joint", "pseudo": "pseudo", "released": "focal"}


@pytest.fixture(scope="module")
def task(): return load_task("scenes", n_labelled=6, size=32)


def net(task, kind="unet"):
    seed_everything(0)
    return UNet(task.n_classes, width=4) if kind == "unet" else build_model(kind, task.n_classes, width=4)


def batch(task, n=4):
    lab, unl = task.labelled.__getitems__(list(range(n))), task.unlabelled.__getitems__(list(range(n)))
    return {"image": lab["image"].float() / 255, "mask": lab["mask"].long()}, {"image": unl["image"].float() / 255}


def make(task, **kw): return GuidedMix(net(task), task, **kw)
def losses_of(method, task, step=50): return dict(method.updates(*batch(task), Clock(step, 100)))["net"]
def train(method, task, steps=3, **more): return fit(method, task, steps, batch_size=4, seed=3, progress=False, eval_on=False, **more)


def same(a, b):
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def rand(*shape, seed=0): return torch.randn(*shape, generator=generator(seed, "rand"))
def parts(*values): return torch.tensor(values).view(-1, 1, 1, 1)


# 1 pairing
def test_the_same_images_in_both_batches_pair_with_themselves(task):
    x = batch(task, 6)[0]["image"]
    f = pooled(net(task).eval().encode(x)[-1])
    assert pair(distances(f, f)).tolist() == list(range(6))
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.equal(pair(distances(f, f[order])), order.argsort())      # permuted partners, permuted answer


def test_pairing_ignores_the_size_of_the_features_and_carries_no_gradient():
    f_u, f_l = rand(5, 8).requires_grad_(), rand(6, 8, seed=1)
    d = distances(f_u, f_l)
    torch.testing.assert_close(d, distances(10 * f_u, f_l))
    assert torch.equal(pair(d), pair(distances(10 * f_u, 0.1 * f_l))) and not pair(d).requires_grad
    cosine = F.normalize(f_u, dim=1) @ F.normalize(f_l, dim=1).T
    assert torch.equal(pair(d), cosine.argmax(1)) and torch.equal(pair(d, "farthest"), cosine.argmin(1))


def test_one_to_one_is_the_permutation_with_the_smallest_sum():
    d = torch.tensor([[0.1, 0.2, 0.9], [0.1, 0.5, 0.9], [0.1, 0.9, 0.8]])
    found = pair(d, "one2one")
    assert sorted(found.tolist()) == [0, 1, 2]
    assert d[range(3), found].sum() == min(d[range(3), list(p)].sum() for p in permutations(range(3)))
    with pytest.raises(UserError, match="as many labelled images as unlabelled ones, not 2 and 3: give equal batches"): pair(d[:, :2], "one2one")


def test_random_pairs_are_a_permutation_that_does_not_look_at_features():
    keys = torch.rand(5, generator=generator(0, "keys"))
    assert sorted(pair(rand(5, 5), "random", keys).tolist()) == list(range(5))
    assert torch.equal(pair(rand(5, 5), "random", keys), pair(rand(5, 5, seed=1), "random", keys))
    assert pair(rand(7, 5), "random", keys).tolist() == [*pair(rand(5, 5), "random", keys).tolist(), *pair(rand(2, 5), "random", keys).tolist()]


def test_the_bank_remembers_the_latest_and_finds_what_the_batch_lacks(task):
    bank = Bank(4, 2, (1, 1))
    for step in range(3): bank.push(torch.full((2, 3, 1, 1), step / 4), torch.full((2, 1, 1), step), torch.full((2, 2), float(step)), step)
    assert bank.y.flatten().tolist() == [2, 2, 1, 1] and bank.x[:, 0, 0, 0].tolist() == [0.5, 0.5, 0.25, 0.25] and not bank.empty.any()
    method = make(task, profile="paper", pairing="bank", memory=8)
    method.net.eval()
    losses_of(method, task, 0)
    assert method.bank.empty.tolist() == [False] * 4 + [True] * 4
    losses_of(method, task, 1)
    assert not method.bank.empty.any() and (method.bank.y[:4] != IGNORE).any()


# 2 lambda
@pytest.mark.parametrize("high", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("alpha", [0.3, 1.0, 4.0])
def test_lambda_is_a_folded_beta_below_its_limit(high, alpha):
    lam = mixing_weights(20000, generator(0, "lam"), high, 0.0, alpha)
    assert lam.shape == (20000, 1, 1, 1) and lam.min() >= 0 and lam.max() <= high
    assert torch.equal(lam, mixing_weights(20000, generator(0, "lam"), high, 0.0, alpha))      # the same generator, the same numbers
    torch.manual_seed(0)
    drawn = torch.distributions.Beta(alpha, alpha).sample((100_000,))
    drawn = torch.minimum(drawn, 1 - drawn)
    assert lam.mean().item() == pytest.approx(drawn[drawn < high].mean().item(), abs=0.004)    # what drawing again until it fits gives


def test_lambda_has_the_mean_of_a_quarter_and_a_floor():
    lam = mixing_weights(20000, generator(0, "lam"))
    assert lam.mean().item() == pytest.approx(0.25, abs=0.01) and lam.min().item() == pytest.approx(0.05) and lam.max() < 0.5
    assert mixing_weights(20000, generator(0, "lam"), high=0.4, low=0.0).mean().item() == pytest.approx(0.2, abs=0.01)


# 3 mixing
def test_a_mix_with_nothing_is_the_image_itself_and_constants_are_weighted():
    u, p = torch.rand(3, 3, 5, 5), torch.rand(3, 3, 5, 5)
    assert torch.equal(mix(u, p, parts(0.0, 0.0, 0.0)), u)
    assert (mix(torch.full_like(u, 0.5), torch.full_like(u, 0.25), parts(0.25, 0.5, 0.0)) == parts(0.4375, 0.375, 0.5)).all()


def test_a_mix_lies_between_its_images_and_keeps_their_type():
    u, p, lam = torch.rand(64, 3, 8, 8), torch.rand(64, 3, 8, 8), mixing_weights(64, generator(0, "lam"))
    x = mix(u, p, lam)
    assert (x >= torch.minimum(u, p)).all() and (x <= torch.maximum(u, p)).all()
    for kind in (torch.float64, torch.bfloat16): assert mix(u.to(kind), p.to(kind), lam).dtype == kind
    loop = torch.stack([(1 - v.item()) * a + v.item() * b for a, b, v in zip(u, p, lam)])
    torch.testing.assert_close(x, loop)


def test_mixing_normalised_images_is_normalising_the_mix():
    model, u, p, lam = UNet(5, width=4, mean=(0.2, 0.4, 0.6)), torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8), parts(0.1, 0.4)
    torch.testing.assert_close(model.normalise(mix(u, p, lam)), mix(model.normalise(u), model.normalise(p), lam))


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
    everywhere, only_mix = WithMITrans(copy.deepcopy(model)).eval(), WithMITrans(copy.deepcopy(model), "mix").eval()
    assert everywhere(x).shape == model(x).shape and torch.equal(only_mix(x), model(x))
    features = model.encode(x)
    last = only_mix.decode(features, (33, 40), mixed=1)
    torch.testing.assert_close(last[:1], model(x)[:1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(last[1:], model(x)[1:])
    assert deepest_channels(model) == features[-1].shape[1] and model.training is False


def test_looking_for_the_channels_leaves_the_network_as_it_was(task):
    model, before = net(task), net(task)
    deepest_channels(model)
    assert same(model, before) and model.training


# 5 decoupling
@pytest.mark.parametrize("how", ["soft", "none"])
def test_decoupling_a_mix_with_nothing_changes_nothing(how):
    z_m, z_l = rand(2, 5, 3, 3), rand(2, 5, 3, 3, seed=1)
    assert torch.equal(decouple(z_m, z_l, parts(0.0, 0.0), how), z_m)


def test_below_a_linear_head_decoupling_tells_nothing_new():
    head, f_u, f_l, lam = nn.Conv2d(6, 5, 1), rand(3, 6, 4, 4), rand(3, 6, 4, 4, seed=1), parts(0.1, 0.3, 0.49)
    z_u, z_l, z_m = head(f_u), head(f_l), head(mix(f_u, f_l, lam))
    torch.testing.assert_close(decouple(z_m, z_l, lam), (1 - lam) * z_u, atol=1e-5, rtol=0)
    torch.testing.assert_close(decouple(z_m, z_l, lam, "hard"), (1 - lam) * (z_u - z_l), atol=1e-5, rtol=0)
    torch.testing.assert_close(decouple(z_m, z_l, lam, renorm=True), z_u, atol=1e-5, rtol=0)
    assert torch.equal(decouple(z_m, z_l, lam).argmax(1), z_u.argmax(1))


def test_a_mask_is_a_distribution_and_lambda_belongs_to_its_image():
    z_m, z_l, lam = rand(3, 5, 4, 4), rand(3, 5, 4, 4, seed=1), parts(0.1, 0.3, 0.5)
    torch.testing.assert_close(decouple(z_m, z_l, lam).softmax(1).sum(1), torch.ones(3, 4, 4))
    loop = torch.stack([m - v.item() * z for m, z, v in zip(z_m, z_l, lam)])
    torch.testing.assert_close(decouple(z_m, z_l, lam), loop)
    torch.testing.assert_close(decouple(z_m, z_l, lam, renorm=True), loop / (1 - lam))


# 6 gradients
@pytest.mark.parametrize("profile, learns", [("paper", (True, True)), ("pseudo", (True, False)), ("released", (False, True))])
def test_who_learns_from_whom(profile, learns):
    z_u, z_m, z_l = (rand(2, 5, 4, 4, seed=s).requires_grad_() for s in range(3))
    pair_loss(FORMS[profile], z_u, decouple(z_m, z_l.detach(), parts(0.2, 0.4)), torch.ones(2, 4, 4, dtype=torch.bool), threshold=0.0).backward()
    assert (z_u.grad is not None, z_m.grad is not None) == learns and z_l.grad is None
    for z in (z_u, z_m): assert z.grad is None or z.grad.abs().sum() > 0


def test_in_pseudo_the_mixed_answer_learns_from_its_own_loss_only():
    z_m, z_u = rand(2, 5, 4, 4).requires_grad_(), rand(2, 5, 4, 4, seed=1).requires_grad_()
    y_p, valid = torch.zeros(2, 4, 4, dtype=torch.long), torch.ones(2, 4, 4, dtype=torch.bool)
    mixed_loss(z_m, y_p, z_u.argmax(1), valid, parts(0.2, 0.4)).backward()
    assert z_m.grad.abs().sum() > 0 and z_u.grad is None


def test_a_second_opinion_can_only_take_labels_away():
    z_u, z_d, valid = rand(2, 5, 4, 4), 3 * rand(2, 5, 4, 4, seed=1), torch.ones(2, 4, 4, dtype=torch.bool)
    agree = z_u.argmax(1) == z_d.argmax(1)
    whole, part = (pair_loss("pseudo", z_u, z_d, valid, 0.5, t) for t in (None, agree))
    assert 0 < part < whole and torch.equal(whole, pair_loss("pseudo", z_u, z_d, valid, 0.5, valid))
    believed = z_d.softmax(1).amax(1) > 0.5
    by_hand = F.cross_entropy(z_u, z_d.argmax(1), reduction="none")[agree & believed].sum() / 32
    torch.testing.assert_close(part, by_hand)


def test_the_plain_answer_can_take_any_part_of_the_pseudo_mask(task):
    "All of it: then how the mixture is decoupled has no influence; and the weight of L_mix is a factor"
    def losses(**kw): return losses_of(make(task, threshold=0.0, **kw), task)
    soft = dict(profile="paper", student="strong", teacher="ema")
    whole, none = losses(**soft, blend=1.0), losses(**soft, blend=1.0, decoupling="none")
    assert torch.equal(whole["pairs"], none["pairs"]) and whole["pairs"] > 0
    assert not torch.equal(losses(**soft, blend=0.5)["pairs"], losses(**soft, blend=0.5, decoupling="none")["pairs"])
    torch.testing.assert_close(losses(mixed=0.25)["mixed"], 0.25 * losses(mixed=1.0)["mixed"])
    assert "mixed" not in losses(mixed=0.0)


def test_agreement_is_asked_of_the_decoupled_answer_and_not_of_the_blend(task):
    def loss(agree):
        method, rng = make(task, threshold=0.0, blend=1.0, agree=agree), generator(0, "weights")
        with torch.no_grad(): [p.add_(torch.randn(p.shape, generator=rng)) for p in method.ema.parameters()]       # it has opinions now
        return losses_of(method, task)["pairs"]
    assert 0 < loss(True) < loss(False)


def test_the_labelled_answer_is_fixed_in_a_whole_step(task):
    "What the losses on pairs send to a network that mixes features goes through the features, never through the partner's logits"
    method = make(task, profile="paper", mitrans="off", alignment=0.0)
    seen = []
    original = method.net.decode
    def spy(features, size):
        z = original(features, size)
        if z.requires_grad: z.retain_grad()
        seen.append(z)
        return z
    method.net.decode = spy
    (x, y), u = (batch(task)[0]["image"], batch(task)[0]["mask"]), batch(task)[1]["image"]
    _, losses = guided_losses(method, x, y, u, Clock(50, 100))
    losses["pairs"].backward()
    assert seen[0].grad[:4].abs().sum() == 0 and seen[0].grad[4:].abs().sum() > 0 and seen[1].grad.abs().sum() > 0


# 7 weight
def test_the_weight_ramps_up_like_a_bell(task):
    def factor(step, **kw):
        method = make(task, profile="paper", alignment=0.0, **kw)
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
@pytest.mark.parametrize("profile", PROFILES)
def test_weight_zero_takes_the_supervised_step_bit_for_bit(task, profile, views):
    base, method = Supervised(net(task), task, views=views), make(task, profile=profile, weight=0.0, views=views)
    def refuse(*_, **__): raise AssertionError("an unlabelled image was looked at")
    method.weak_view = refuse
    for m in (base, method): train(m, task, 3)
    assert same(base.net, method.net) and same(base.ema, method.ema)


def test_weight_zero_with_mitrans_is_the_supervised_step_of_that_network(task):
    method = make(task, weight=0.0, mitrans="all")
    base = Supervised(copy.deepcopy(method.net), task)
    for m in (base, method): train(m, task, 3)
    assert same(base.net, method.net)


# 8 inference
@pytest.mark.parametrize("profile", PROFILES)
def test_prediction_needs_one_image_and_no_luck(task, profile):
    method = make(task, profile=profile)
    train(method, task, 2)
    x = batch(task)[1]["image"]
    with torch.no_grad():
        assert torch.equal(method.predict(x), method.predict(x))
        torch.testing.assert_close(method.predict(x)[2:3], method.predict(x[2:3]), atol=1e-4, rtol=1e-4)


# 9 oracle
def test_a_perfect_network_is_decoupled_perfectly():
    g = generator(0, "oracle")
    y_u, y_l = (torch.randint(0, 5, (4, 8, 8), generator=g) for _ in range(2))
    onehot, lam = lambda y: 4.0 * F.one_hot(y, 5).permute(0, 3, 1, 2), mixing_weights(4, g)
    z_m = mix(onehot(y_u), onehot(y_l), lam)
    assert torch.equal(decouple(z_m, onehot(y_l), lam).argmax(1), y_u)
    hard, agree = decouple(z_m, onehot(y_l), lam, "hard"), y_u == y_l
    assert torch.equal(hard.argmax(1)[~agree], y_u[~agree])
    assert agree.any() and hard.permute(0, 2, 3, 1)[agree].abs().max() < 1e-5


# the defects of the published code
def test_focal_targets_are_classes_on_every_device():
    z = rand(2, 5, 3, 3)
    with pytest.raises(TypeError, match="wants integer classes: take the argmax first"): sigmoid_focal(z, z[:, 0])
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
    for loss in FORMS.values():
        before = pair_loss(loss, z_u, z_m, valid, 0.0)
        away = torch.where(valid[:, None], 0.0, 9.0 * rand(2, 5, 4, 4, seed=2))
        torch.testing.assert_close(pair_loss(loss, z_u + away, z_m - away, valid, 0.0), before)
        assert pair_loss(loss, z_u, z_m, ~valid & valid, 0.0) == 0
    y = torch.where(valid, z_u.argmax(1), IGNORE)
    torch.testing.assert_close(mixed_loss(z_m + away, y, y, valid, parts(0.1, 0.3)), mixed_loss(z_m, y, y, valid, parts(0.1, 0.3)))
    assert mixed_loss(z_m, torch.full_like(y, IGNORE), torch.full_like(y, IGNORE), valid, parts(0.1, 0.3)) == 0


def test_the_mixed_loss_weighs_both_images_by_their_parts():
    z, y_p, y_u, lam = rand(2, 5, 4, 4), torch.full((2, 4, 4), 1), torch.full((2, 4, 4), 2), parts(0.1, 0.4)
    each = [(v * F.cross_entropy(z[i:i + 1], y_p[i:i + 1]), (1 - v) * F.cross_entropy(z[i:i + 1], y_u[i:i + 1])) for i, v in enumerate((0.1, 0.4))]
    loop = sum(a + b for a, b in each) / 2
    valid = torch.ones(2, 4, 4, dtype=torch.bool)
    torch.testing.assert_close(mixed_loss(z, y_p, y_u, valid, lam), loop)
    y_u[:, :2] = IGNORE                                                    # half of the pixels are not believed: half of the sum, the same count
    only_u = mixed_loss(z, torch.full_like(y_p, IGNORE), y_u, valid, lam)
    by_hand = sum((1 - v) * F.cross_entropy(z[i:i + 1, :, 2:], y_u[i:i + 1, 2:]) for i, v in enumerate((0.1, 0.4))) / 4
    torch.testing.assert_close(only_u, by_hand)


@pytest.mark.parametrize("profile", FORMS)
def test_a_step_logs_what_tells_whether_it_is_healthy(task, profile):
    method = make(task, profile=profile)
    losses_of(method, task)
    stats = {k: float(v) for k, v in method.stats.items()}
    assert {"w", "lambda", "distance", "entropy", "agreement"} == set(stats)
    assert 0 < stats["entropy"] <= math.log(task.n_classes) + 1e-5 and 0 <= stats["agreement"] <= 1 and 0 <= stats["distance"] <= 2


def test_every_step_draws_new_pairs_and_lambdas(task):
    method, found = make(task, profile="paper", pairing="random"), []
    for step in (10, 11, 10):
        losses_of(method, task, step)
        found.append(method.stats["lambda"].item())
    assert found[0] == found[2] != found[1]


def test_running_statistics_keep_mixtures_out_of_the_averages(task):
    model = net(task)
    before = copy.deepcopy(model)
    with running_statistics(model, True): model(torch.rand(4, 3, 16, 16))
    assert same(model, before) and all(m.training for m in model.modules())
    with running_statistics(model, False): model(torch.rand(4, 3, 16, 16))
    assert not same(model, before)


@pytest.mark.parametrize("mix_bn", ["batch", "eval"])
def test_running_statistics_fit_the_weights(task, mix_bn):
    "Normalising held-out images by their own statistics instead of the running ones changes few of the answers"
    method = make(task, profile="paper", mix_bn=mix_bn, lr=5e-3)
    train(method, task, 25)
    x = task.val.__getitems__(list(range(32)))["image"].float() / 255
    with torch.no_grad(): running, own = method.net.eval()(x), method.net.train()(x)
    assert (running.argmax(1) == own.argmax(1)).float().mean() > 0.6


def test_the_second_head_has_no_idle_weights_and_is_dropped_for_prediction(task):
    method = make(task, profile="released")
    sum(losses_of(method, task).values()).backward()
    assert all(p.grad is not None for p in (*method.net.parameters(), *method.second.parameters()))
    assert not any("second" in name for name in method.ema.state_dict())


# all profiles
@pytest.mark.parametrize("kw", [*(dict(profile=p) for p in PROFILES), dict(mitrans="mix", mixed=1.0), dict(profile="plain", teacher="self"),
                                dict(student="weak", box=0)])
def test_every_weight_gets_a_gradient_and_the_average_none(task, kw):
    method = make(task, threshold=0.0, **kw)
    for _ in range(2):                                                     # the zeros of MITrans hold back its inside in the first step
        losses = losses_of(method, task)
        assert all(torch.isfinite(v) and v > 0 for v in losses.values())
        method.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        with torch.no_grad(): [p.sub_(0.01 * p.grad) for p in method.parameters() if p.grad is not None]
    assert all(p.grad is None for p in method.ema.parameters())
    assert all(p.grad is not None for g in method.optimisers["net"].param_groups for p in g["params"])


@pytest.mark.parametrize("kw", [dict(), dict(profile="paper", pairing="bank", memory=6), dict(profile="released")])
def test_resume_is_bit_exact(task, tmp_path, kw):
    whole, part, resumed = make(task, **kw), make(task, **kw), make(task, **kw)
    train(whole, task, 4)

    class Killed(Exception): pass
    def dies(lab, unl, clock, updates=part.updates):
        if clock.step == 3: raise Killed
        yield from updates(lab, unl, clock)
    part.updates = dies
    with pytest.raises(Killed): train(part, task, 4, out_dir=tmp_path, checkpoint_every=2)
    train(resumed, task, 4, out_dir=tmp_path)
    assert same(whole, resumed)


@pytest.mark.parametrize("profile", PROFILES)
def test_bfloat16_autocast_and_another_network(task, profile):
    method = GuidedMix(net(task, "deeplabv3"), task, profile=profile)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for losses in dict(method.updates(*batch(task), Clock(50, 100))).values():
            assert all(v.dtype == torch.float32 and torch.isfinite(v) for v in losses.values())


def test_other_batch_sizes_and_a_library_encoder(task):
    fit(make(task), task, 2, batch_size=2, unlabelled_batch=3, progress=False, eval_on=False)
    model = build_model("deeplabv3plus", task.n_classes, encoder="mobilenetv3_small_050")
    losses = losses_of(GuidedMix(model, task, profile="paper"), task)
    assert all(torch.isfinite(v) for v in losses.values())


def test_plain_is_the_control_without_a_partner(task):
    "No labelled image has any influence on what the unlabelled ones are asked"
    method = make(task, profile="plain", threshold=0.0)
    method.net.eval()
    lab, unl = batch(task)
    one = dict(method.updates(lab, unl, Clock(50, 100)))["net"]["pairs"]
    two = dict(method.updates({k: v.flip(0) for k, v in lab.items()}, unl, Clock(50, 100)))["net"]["pairs"]
    torch.testing.assert_close(one, two)
    assert method.stats["agreement"] == 1 and "lambda" not in method.stats


def test_tags_are_the_classes_of_a_mask():
    y = torch.tensor([[[0, 2], [2, IGNORE]], [[1, 1], [1, 1]]])
    assert tags_of(y, 4).tolist() == [[1, 0, 1, 0], [0, 1, 0, 0]]


@pytest.mark.parametrize("kw, text", [
    (dict(profile="papers"), "profile 'papers' is not known .did you mean 'paper'"), (dict(pairing="closest"), "pairing 'closest' is not known"),
    (dict(lam_max=0.0), "lam_max is 0.0, but it should be between 0.001 and 0.5"), (dict(lam_max=0.6), "lam_max is 0.6"),
    (dict(alpha=0.0), "alpha is 0.0"), (dict(weight=-1.0), "weight is -1.0"), (dict(ramp=2.0), "ramp is 2.0"), (dict(memory=0), "memory is 0"),
    (dict(mitrans="on"), "mitrans 'on' is not known"), (dict(decoupling="half"), "decoupling 'half' is not known"),
    (dict(mix_bn="none"), "mix_bn 'none' is not known"), (dict(mix_at="features"), "mix_at='features' needs the maps of this very pass"),
    (dict(profile="paper", box=0.5), "only a strong view gets one: take student='strong', or box=0"),
    (dict(profile="released", teacher="ema"), "profile 'released' does not go with teacher='ema'"),
    (dict(profile="plain", mitrans="all"), "mitrans='all' does not go with profile 'plain'"),
    (dict(profile="paper", teacher="ema", mitrans="mix"), "mitrans='mix' would never be trained"),
    (dict(mitrans="mix"), "mitrans='mix' would never be trained"), (dict(blend=1.5), "blend is 1.5"), (dict(mixed=-1.0), "mixed is -1.0")])
def test_settings_that_make_no_sense_are_refused_before_training(task, kw, text):
    with pytest.raises(UserError, match=text): make(task, **kw)


def test_a_single_unlabelled_image_has_nobody_to_paste_from(task):
    lab, unl = batch(task)
    with pytest.raises(UserError, match="no partner to paste from: give an unlabelled batch of at least 2"):
        list(make(task).updates(lab, {"image": unl["image"][:1]}, Clock(50, 100)))


def test_a_few_steps_lower_the_supervised_loss(task):
    run = train(make(task, profile="paper", lr=5e-3), task, 30)
    assert run.history[-1]["supervised"] < 0.8 * run.history[0]["supervised"]
