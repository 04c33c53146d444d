"Pseudo-labels: pasting, the properties of CutMix-Seg, ClassMix, FixMatch and CPS, and what UniMatch and UniMatch V2 share with them"
import copy

import pytest
import torch
import torch.nn.functional as F
from one_step import EVERYTHING, batch, first_update, losses_of, net, same, solved, statistics_of, train, updates
from torch import nn

from semiseg_nb import pseudo_labels
from semiseg_nb.catalogue import load_task
from semiseg_nb.clock import Clock
from semiseg_nb.core import IGNORE, UserError, generator, seed_everything
from semiseg_nb.cutmix import partner, paste
from semiseg_nb.engine import fit
from semiseg_nb.engine import settings as settings_of_method
from semiseg_nb.losses import cross_entropy
from semiseg_nb.models import build_model
from semiseg_nb.networks import UNet
from semiseg_nb.pseudo_labels import (
    CPS,
    ClassMix,
    CutMixSeg,
    FixMatch,
    PlainCPS,
    class_mask,
    class_regions,
    fresh,
    hard_loss,
    kept,
    pseudo_label,
)
from semiseg_nb.supervised import Supervised, view
from semiseg_nb.unimatch import UniMatch, UniMatchV2

ALL = [CutMixSeg, ClassMix, FixMatch, UniMatch, UniMatchV2, CPS, PlainCPS]


@pytest.fixture(scope="module")
def task(): return load_task("scenes", n_labelled=6, size=32)


def settings(make): return {"warmup": 0.0} if issubclass(make, CPS) else EVERYTHING


def maps(n=4, c=5, size=(6, 7), seed=0):
    g = generator(seed, "maps")
    return torch.rand(n, 3, *size, generator=g), 3 * torch.randn(n, c, *size, generator=g), torch.rand(n, *size, generator=g) > 0.2


# 1
def test_an_empty_box_changes_nothing_and_a_whole_one_gives_the_partner():
    images, z, valid = maps()
    empty = torch.zeros_like(valid)
    for m in (images, z.argmax(1), z.softmax(1).amax(1), valid):
        assert torch.equal(paste(empty, m)[0], m) and torch.equal(paste(~empty, m)[0], partner(m))


def test_image_label_confidence_and_valid_are_mixed_with_the_same_mask():
    n, h, w = 4, 6, 7
    number = torch.arange(n)[:, None, None].expand(n, h, w)              # every map says which image it is of
    box = torch.rand(n, h, w, generator=generator(0, "box")) > 0.5
    image, label, belief, valid = paste(box, number[:, None].expand(n, 3, h, w).float(), number, number.float(), number % 2 == 1)
    assert torch.equal(label, torch.where(box, partner(number), number))
    assert torch.equal(image, label[:, None].expand(n, 3, h, w).float()) and torch.equal(belief, label.float()) and torch.equal(valid, label % 2 == 1)


# 2
@pytest.mark.parametrize("make", [FixMatch, UniMatch, UniMatchV2, CutMixSeg, ClassMix])
def test_a_threshold_of_one_leaves_the_whole_supervised_gradient(task, make):
    "The paper's step would be half of it: L = (L_x + L_u) / 2. Here the half is dropped"
    one, two = Supervised(net(task), task), make(net(task), task, threshold=1.0, warmup=0.0)
    for method in (one, two):
        method.net.eval()                                                # so that BatchNorm does not see the other images
        sum(losses_of(method, task).values()).backward()
    assert sum(v for k, v in losses_of(two, task).items() if k != "supervised") == 0 and statistics_of(two, task)["kept"] == 0
    for a, b in zip(one.net.parameters(), two.net.parameters()): torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4)


# 3
def test_cps_is_symmetric_under_swapping_the_networks(task):
    a, b = net(task, 0), net(task, 1)
    one, two = updates(CPS(copy.deepcopy(a), task, net_b=copy.deepcopy(b)), task), updates(CPS(b, task, net_b=a), task)
    for mine, other in (("net", "net_b"), ("net_b", "net")):
        for (_, x), (_, y) in zip(one[mine].items(), two[other].items()): torch.testing.assert_close(x, y)


@pytest.mark.parametrize("make", [CPS, PlainCPS])
def test_a_cps_loss_moves_one_network_only(task, make):
    method = make(net(task), task, warmup=0.0)
    found = updates(method, task)
    for name, loss, own, other in (("net", "cross", method.net, method.net_b), ("net_b", "cross_b", method.net_b, method.net)):
        found[name][loss].backward()
        assert all(p.grad is None for p in other.parameters()) and all(p.grad is not None for p in own.parameters())
        method.zero_grad(set_to_none=True)


def test_two_identical_networks_give_pure_self_training(task):
    method = PlainCPS(net(task), task, net_b=net(task), warmup=0.0)
    found, (lab, unl), clock = updates(method, task), batch(task), Clock(50, 100)
    (x, y), (u, valid) = view(lab, method.policies, clock), method.weak_view(unl["image"], clock)
    z = net(task)(torch.cat([x, u]))
    own = cross_entropy(z, torch.where(torch.cat([y != IGNORE, valid]), z.argmax(1), IGNORE))
    for loss in (found["net"]["cross"], found["net_b"]["cross_b"]): torch.testing.assert_close(loss, own)
    assert statistics_of(PlainCPS(net(task), task, net_b=net(task), warmup=0.0), task)["disagree"] == 0


# 4
def test_classmix_pastes_half_of_the_classes_and_exactly_their_pixels():
    g = generator(0, "labels")
    labels, keys = torch.randint(0, 6, (64, 5, 5), generator=g), torch.rand(64, 6, generator=g)
    labels = torch.where(labels < 1 + torch.arange(64)[:, None, None] % 6, labels, 0)     # 1 to 6 classes per image
    labels[torch.rand(64, 5, 5, generator=g) < 0.1] = IGNORE
    for y, m in zip(labels, class_mask(labels, keys)):
        present, chosen = set(y[y != IGNORE].tolist()), set(y[m].tolist())
        assert chosen <= present and len(chosen) == len(present) // 2
        assert torch.equal(m, torch.isin(y, torch.tensor(sorted(chosen), dtype=y.dtype)))


def test_classmix_draws_every_class_and_pastes_nothing_of_a_single_one():
    labels = torch.tensor([[[0, 1], [2, 3]]]).expand(500, 2, 2)
    share = class_mask(labels, torch.rand(500, 4, generator=generator(0, "keys"))).float().mean(0)
    assert ((share - 0.5).abs() < 0.1).all()
    assert not class_mask(torch.full((3, 2, 2), 2), torch.rand(3, 4)).any()
    assert not class_mask(torch.full((3, 2, 2), IGNORE), torch.rand(3, 4)).any()


def test_classmix_takes_its_pixels_from_the_partner():
    labels = torch.arange(4)[:, None, None].expand(4, 8, 8)
    labels = torch.stack([torch.where(torch.arange(64).view(8, 8) % 2 == 0, y, 6) for y in labels])
    region = class_regions(labels, 7, Clock(0, 1))
    for y, r in zip(partner(labels), region):                            # one of two classes: even pixels or odd ones
        assert torch.equal(r, y == y[r][0])
    assert not class_regions(labels, 7, Clock(0, 1), part=0.0).any()


def test_the_regions_of_two_processes_are_those_of_one():
    labels = torch.randint(0, 5, (4, 6, 7), generator=generator(0, "labels"))
    halves = [class_regions(labels[2 * r:2 * r + 2], 5, Clock(3, 10, rank=r, world=2)) for r in (0, 1)]
    assert torch.equal(torch.cat(halves), class_regions(labels, 5, Clock(3, 10)))


# 7
def test_the_cutmix_seg_loss_is_linear_in_the_confidence_rate(task):
    model, ratios, rates = net(task), [], []
    with torch.no_grad(): model.head.weight.mul_(300)                    # so that beliefs differ
    for threshold in (0.0, 0.4, 0.5):
        method = CutMixSeg(copy.deepcopy(model), task, threshold=threshold, warmup=0.0)
        _, losses, statistics = first_update(method, task)
        rates.append(statistics["kept"])
        ratios.append(losses["consistency"] / rates[-1])
    assert rates[0] == 1 and rates[0] > rates[1] > rates[2] > 0
    torch.testing.assert_close(ratios[0], ratios[1])
    torch.testing.assert_close(ratios[0], ratios[2])


# 8
def test_nobody_is_mixed_with_itself_in_odd_and_even_batches(task):
    for n in (2, 3, 4, 5, 7, 8): assert (partner(torch.arange(n)) != torch.arange(n)).all()


@pytest.mark.parametrize("make", ALL)
def test_a_single_unlabelled_image_is_refused_before_the_first_step_unless_nothing_is_pasted(task, make):
    def start(**chosen): return fit(make(net(task), task, **chosen), task, 2, batch_size=1, progress=False, eval_on=False)
    if make is not PlainCPS:
        with pytest.raises(UserError, match="A single unlabelled image has no partner for CutMix.*or mix=0"): start()
    assert start(mix=0.0).history[-1]["step"] == 2


@pytest.mark.parametrize("make", ALL)
def test_a_network_with_other_classes_is_refused_before_the_first_step(task, make):
    other = UNet(task.n_classes - 1, width=4)
    with pytest.raises(UserError, match=f"build it with n_classes={task.n_classes}"): train(make(other, task), task, 2)


# pseudo-labels
def test_a_pseudo_label_by_hand():
    z = torch.tensor([[3.0, 0, 0], [0.0, 3, 0.1]]).view(1, 2, 1, 3)      # beliefs 0.95, 0.95, 0.52
    valid = torch.tensor([[[True, False, True]]])
    assert pseudo_label(z, 0.9, valid).tolist() == [[[0, IGNORE, IGNORE]]]
    assert pseudo_label(z, 0.5, valid).tolist() == [[[0, IGNORE, 1]]]
    assert kept(pseudo_label(z, 0.9, valid), valid) == 0.5


def test_pixels_without_a_pseudo_label_count_in_the_mean_and_padding_does_not():
    _, z, valid = maps()
    labels = pseudo_label(maps(seed=1)[1], 0.7, valid)
    by_hand = F.cross_entropy(z, labels, ignore_index=IGNORE, reduction="sum") / valid.sum()
    torch.testing.assert_close(hard_loss(z, labels, valid), by_hand)
    moved = torch.where(valid[:, None], z, z + 10 * torch.randn(1, 5, 1, 1))
    torch.testing.assert_close(hard_loss(moved, labels, valid), by_hand)


def test_nothing_trusted_is_zero_with_finite_gradients():
    z, valid = torch.randn(2, 5, 4, 4, requires_grad=True), torch.ones(2, 4, 4, dtype=torch.bool)
    for v in (valid, ~valid):
        loss = hard_loss(z, torch.full((2, 4, 4), IGNORE), v)
        loss.backward()
        assert loss == 0 and not z.grad.any()


# all methods
@pytest.mark.parametrize("make", ALL)
@pytest.mark.parametrize("views", ["weak", "strong"])
def test_weight_zero_takes_the_supervised_step_bit_for_bit(task, make, views):
    base, method = Supervised(net(task), task, views=views), make(net(task), task, weight=0.0, views=views)
    for m in (base, method): train(m, task, 3)
    assert same(base.net, method.net) and same(base.ema, method.ema)


@pytest.mark.parametrize("make", ALL)
def test_resume_is_bit_exact(task, tmp_path, make):
    def method(): return make(net(task), task, **settings(make))
    whole, part, resumed = method(), method(), method()
    train(whole, task, 4)

    class Killed(Exception): pass
    def dies(lab, unl, clock, updates=part.updates):
        if clock.step == 3: raise Killed
        yield from updates(lab, unl, clock)
    part.updates = dies
    with pytest.raises(Killed): train(part, task, 4, out_dir=tmp_path, checkpoint_every=2)
    train(resumed, task, 4, out_dir=tmp_path)
    assert same(whole, resumed)
    for name, optimiser in whole.optimisers.items():
        one, two = optimiser.state_dict()["state"], resumed.optimisers[name].state_dict()["state"]
        assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in zip(one.values(), two.values()))


@pytest.mark.parametrize("make", ALL)
def test_every_weight_gets_a_gradient_and_the_average_none(task, make):
    method = make(net(task), task, **settings(make))
    for name, losses in updates(method, task).items():
        assert all(torch.isfinite(v) and v > 0 for v in losses.values()), name
        sum(losses.values()).backward()
    assert all(p.grad is None for p in method.ema.parameters())
    assert all(p.grad is not None for o in method.optimisers.values() for g in o.param_groups for p in g["params"])


@pytest.mark.parametrize("make", ALL)
def test_bfloat16_autocast_and_another_network(task, make):
    seed_everything(0)
    method = make(build_model("deeplabv3", task.n_classes, width=4), task, **settings(make))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for losses in updates(method, task).values():
            assert all(v.dtype == torch.float32 and torch.isfinite(v) for v in losses.values())


@pytest.mark.parametrize("make", ALL)
def test_an_odd_batch_and_another_number_of_unlabelled_images(task, make):
    method = make(net(task), task, **settings(make))
    run = fit(method, task, 2, batch_size=2, unlabelled_batch=3, progress=False, eval_on=False)
    assert run.history


@pytest.mark.parametrize("make", ALL)
def test_the_weight_ramps_up_and_scales(task, make):
    def unlabelled(step, **kw):
        torch.manual_seed(0)
        losses = losses_of(make(net(task), task, **{**settings(make), **kw}), task, step)
        return sum(v for k, v in losses.items() if k != "supervised").item()
    assert unlabelled(0, warmup=0.5) == 0
    assert unlabelled(50, weight=3.0) == pytest.approx(3 * unlabelled(50, weight=1.0), rel=1e-4)
    assert unlabelled(50, warmup=1.0) == pytest.approx(unlabelled(50) / 2, rel=1e-4)


# the second network of CPS
def test_the_second_network_starts_elsewhere_and_reproducibly(task):
    first, seconds = net(task), []
    for _ in range(2):
        seed_everything(7)
        seconds.append(fresh(first))
    assert same(*seconds) and not any(torch.equal(a, b) for a, b in zip(first.parameters(), seconds[0].parameters()) if a.dim() == 4)
    assert torch.equal(first.mean, seconds[0].mean), "the mean colour is no weight"
    given = net(task, 1)
    assert CPS(first, task, net_b=given).net_b is given


def test_a_library_encoder_keeps_its_weights_and_the_rest_is_drawn_anew(task):
    first = build_model("unet", task.n_classes, encoder="mobilenetv3_small_050")
    second = fresh(first)
    assert same(first.net.encoder, second.net.encoder)
    assert not any(torch.equal(a, b) for a, b in zip(first.net.decoder.parameters(), second.net.decoder.parameters()) if a.dim() == 4)


def test_a_network_without_layers_to_draw_anew_needs_a_second_one(task):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(task.n_classes, 3, 1, 1))
        def forward(self, x): return F.conv2d(x, self.w)
    with pytest.raises(UserError, match="Plain has no layer that can be initialised anew: give a second network as net_b"): CPS(Plain(), task)
    CPS(Plain(), task, net_b=Plain())


@pytest.mark.parametrize("make, kwargs, text", [
    (FixMatch, {"teacher": "ema"}, "setting of FixMatch 'teacher' is not known"), (FixMatch, {"weight": -1.0}, "weight is -1.0"),
    (FixMatch, {"threshold": 80}, "threshold is 80, but it should be between 0 and 1"), (CutMixSeg, {"threshold": -0.1}, "threshold is -0.1"),
    (ClassMix, {"mix": 2.0}, "mix is 2.0"), (ClassMix, {"weight": float("nan")}, "weight is nan"),
    (FixMatch, {"warmup": 2.0}, "warmup is 2.0"),
    (CPS, {"mix": -1.0}, "mix is -1.0"), (CPS, {"weight": -2.0}, "weight is -2.0"), (PlainCPS, {"mix": 1.0}, "mix '1.0' is not known: choose one of 0"),
    (CutMixSeg, {"views": "hard"}, "views 'hard' is not known")])
def test_settings_that_make_no_sense_are_refused_before_training(task, make, kwargs, text):
    with pytest.raises(UserError, match=text): make(net(task), task, **kwargs)


@pytest.mark.parametrize("make", ALL)
def test_settings_are_attributes_of_their_own_names(task, make):
    chosen = {"weight": 2.0, "warmup": 0.2, "views": "strong", "n": 1, "strength": 0.3, "lr": 1e-3, "weight_decay": 0.0, "ema_decay": 0.9, "class_weights": 5.0, "dice": 0.5}
    chosen |= {"mix": 0 if make is PlainCPS else 0.5} | ({"net_b": net(task, 1)} if issubclass(make, CPS) else {"threshold": 0.6})
    chosen |= {"feature": 0.3, "drop": 0.4} if make is UniMatch else {}
    assert settings_of_method(make(net(task), task, **chosen)) == chosen
    assert make.name and make.title and make.paper.startswith("arXiv ")


def test_the_solutions_of_the_lesson_pass_its_check_and_empty_cells_do_not():
    empty, filled = solved("14_pseudo_labels", vars(pseudo_labels).copy())
    assert empty == ["1: not yet", "2: not yet"] and len(filled) == 2 and all(line[3:].startswith("right") for line in filled)
