"Phases: what is frozen stays bit-identical, what is unlabelled stays unlabelled, and files of different families are refused"
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import NoMask
from torch import nn

from semiseg_nb import phases
from semiseg_nb.catalogue import load_task
from semiseg_nb.clock import Clock
from semiseg_nb.core import IGNORE, UserError, generator, seed_everything
from semiseg_nb.cyclegan import asked, straight_through
from semiseg_nb.data import Images
from semiseg_nb.engine import fit, make_accelerator, optimise
from semiseg_nb.losses import one_hot
from semiseg_nb.models import UNet
from semiseg_nb.phases import (
    ARMS,
    Pairs,
    Phase1,
    Phase2,
    Phase3,
    Plan,
    Renderer,
    StyleEncoder,
    as_bytes,
    bends,
    bent,
    dice_loss,
    fingerprint,
    hinge,
    pack,
    painted,
    painter_scores,
    pair,
    patch_critic,
    phase0,
    phase1,
    phase2,
    phase3,
    read_artefact,
    recombined,
    run_arm,
    run_phases,
    save_artefact,
    signed,
    styles_of,
    unpack,
    unsigned,
    whole_run,
)
from semiseg_nb.supervised import Supervised

K = 5
BARE = {"adversarial": 0.0, "self_training": 0.0, "cycle": 0.0}
SMALL = {"blocks": 1, "ngf": 4, "ndf": 4}


class Unmasked(Images):
    "Unlabelled images that raise as soon as anybody asks for a mask"
    @property
    def masks(self): raise AssertionError("somebody asked an unlabelled image for its mask")


@pytest.fixture(scope="module")
def task(): return load_task("scenes", n_labelled=6, size=32, n_unlabelled=12, n_tune=4)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return Plan(tmp_path_factory.mktemp("phases"), steps=(1, 2, 2, 2), batch_size=2, n_painted=20, net={"width": 4}, cyclegan=SMALL)


@pytest.fixture(scope="module")
def left(task, plan): return run_phases(task, plan)


def batch(task, n=4, size=2):
    lab, unl = task.labelled.__getitems__(list(range(n))), task.unlabelled.__getitems__(list(range(n)))
    return {"image": lab["image"].float() / 255, "mask": lab["mask"].long()}, NoMask(image=unl["image"].float() / 255, index=unl["index"])


def net(width=4):
    seed_everything(0)
    return UNet(K, width=width)


def some_pairs(task, n=4): return Pairs(task.labelled.images[:n].clone(), task.labelled.masks[:n].clone())
def second(task, **more): return Phase2(task, net(), **more).train()
def third(task, **more): return Phase3(net(), task, Renderer(K), StyleEncoder(), some_pairs(task), some_pairs(task), **more).train()
def randn(*shape, seed=0): return torch.randn(*shape, generator=generator(seed, "test"))


def steps(method, task, n=2):
    "Make n steps as the engine does"
    accelerator = make_accelerator()
    lab, unl = batch(task)
    for i in range(n):
        for name, losses in method.updates(lab, unl if method.uses_unlabelled else None, Clock(5 + i, 10)):
            optimise(method.optimisers[name], losses, accelerator)


def parameters_held(method): return {id(p) for o in method.optimisers.values() for g in o.param_groups for p in g["params"]}


def same(a, b):
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# 1
def test_phase_2_leaves_every_parameter_and_buffer_of_g1_bit_identical(task):
    m = second(task, S=some_pairs(task))
    before = {k: v.clone() for k, v in m.G1.state_dict().items()}
    assert any("running_mean" in k for k in before) and any("num_batches_tracked" in k for k in before)
    others = [fingerprint(n) for n in (m.G2, m.E_s, m.D_r, m.D_m)]
    steps(m, task)
    assert all(torch.equal(v, before[k]) for k, v in m.G1.state_dict().items())
    assert all(fingerprint(n) != was for n, was in zip((m.G2, m.E_s, m.D_r, m.D_m), others))


def test_a_first_generator_that_is_not_frozen_moves(task):
    "The counter-experiment: without freezing, weights and BatchNorm both move"
    m = second(task, freeze=False)
    before = {k: v.clone() for k, v in m.G1.state_dict().items()}
    steps(m, task)
    moved = {k for k, v in m.G1.state_dict().items() if not torch.equal(v, before[k])}
    assert any("weight" in k for k in moved) and any("running_mean" in k for k in moved)


# 2
def test_phase_3_leaves_the_painter_and_the_style_encoder_bit_identical(task):
    m = third(task)
    before = fingerprint(m.G2), fingerprint(m.E_s), fingerprint(m.S), fingerprint(m.S2)
    start = fingerprint(m.net), fingerprint(m.D_m)
    steps(m, task)
    assert (fingerprint(m.G2), fingerprint(m.E_s), fingerprint(m.S), fingerprint(m.S2)) == before
    assert fingerprint(m.net) != start[0] and fingerprint(m.D_m) != start[1]


# 3
def test_the_judges_loss_reaches_the_painter_and_not_the_judge(task):
    m = second(task)
    name, losses = next(m.updates(*batch(task), Clock(0, 10)))
    assert name == "painter"
    losses["keep mask"].backward()
    assert all(p.grad is None for p in m.G1.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in m.G2.parameters())
    assert all(p.grad is None or not p.grad.any() for p in m.E_s.parameters())              # the style was drawn


@pytest.mark.parametrize(("loss", "reached"), [("reconstruct", {"G2", "E_s"}), ("keep style", {"G2", "E_s"}), ("please D_r", {"G2"}),
                                               ("please D_m", {"G2"}), ("small styles", {"E_s"})])
def test_each_loss_of_phase_2_moves_whom_it_should(task, loss, reached):
    m = second(task)
    _, losses = next(m.updates(*batch(task), Clock(0, 10)))
    held = [p for g in m.optimisers["painter"].param_groups for p in g["params"]]
    grads = dict(zip(map(id, held), torch.autograd.grad(losses[loss], held, allow_unused=True)))
    def moved(n): return any(grads[id(p)] is not None and grads[id(p)].abs().sum() > 0 for p in n.parameters())
    assert {k for k in ("G2", "E_s") if moved(getattr(m, k))} == reached


# 4
def test_no_optimiser_holds_a_frozen_parameter(task):
    two, three = second(task, S=some_pairs(task)), third(task)
    assert not parameters_held(two) & {id(p) for p in two.G1.parameters()}
    assert parameters_held(second_moving := second(task, freeze=False)) >= {id(p) for p in second_moving.G1.parameters()}
    assert not parameters_held(three) & {id(p) for n in (three.G2, three.E_s, three.ema) for p in n.parameters()}


# 5
def test_phase_1_never_touches_an_unlabelled_image(task, tmp_path):
    class Untouchable:
        ids, on_disk = task.unlabelled.ids, False
        def __getattr__(self, name): raise AssertionError(f"asked for {name}")
        def __getitems__(self, index): raise AssertionError("asked for a batch")
    other = replace(task)
    other.unlabelled = Untouchable()
    phase1(other, Plan(tmp_path, steps=(1, 2, 1, 1), batch_size=2, net={"width": 4}))
    assert Phase1.uses_unlabelled is False


def test_no_phase_reads_a_mask_of_an_unlabelled_image(task, tmp_path):
    guarded = replace(task, unlabelled=Unmasked(task.unlabelled.ids, task.unlabelled.images))
    run_phases(guarded, Plan(tmp_path, steps=(1, 1, 1, 1), batch_size=2, n_painted=8, net={"width": 4}, cyclegan=SMALL))
    for m in (second(task), third(task)):
        lab, unl = batch(task)
        with pytest.raises(AssertionError): unl["mask"]
        for _ in m.updates(lab, unl, Clock(5, 10)): continue


# 6
def test_masks_pass_hard_and_the_gradient_passes_all_the_same(task):
    seen = []
    class Spy(Renderer):
        def forward(self, m, s):
            seen.append(m)
            return super().forward(m, s)
    for hard in (True, False):
        m = Phase3(net(), task, Spy(K), StyleEncoder(), hard=hard).train()
        _, losses = next(m.updates(*batch(task), Clock(9, 10)))
        mask = seen.pop().detach()
        assert (set(mask.unique().tolist()) == {0.0, 1.0}) is hard and torch.allclose(mask.sum(1), torch.ones(()), atol=1e-5)
        losses["cycle"].backward()
        assert sum(p.grad.abs().sum() for p in m.net.parameters() if p.grad is not None) > 0
        assert all(p.grad is None for p in (*m.G2.parameters(), *m.E_s.parameters()))


def test_argmax_in_the_place_of_straight_through_would_cut_the_gradient():
    z = randn(1, 3, 4, 4).requires_grad_()
    assert not one_hot(z.argmax(1), 3).requires_grad and straight_through(z.softmax(1)).requires_grad


def test_a_soft_mask_can_hide_an_image_and_a_hard_one_cannot():
    y = torch.randint(0, 3, (1, 8, 8), generator=generator(0, "y"))
    hot, secret = one_hot(y, 3), torch.rand(1, 1, 8, 8, generator=generator(1, "secret"))
    soft = (0.9 * hot + 0.1 * secret * hot.roll(1, 1))
    assert torch.equal(soft.argmax(1), y) and torch.allclose((soft * hot.roll(1, 1)).sum(1) * 10, secret[:, 0], atol=1e-5)
    assert torch.equal(straight_through(soft), hot)


# 7
def test_the_style_has_no_place(task):
    E, x = StyleEncoder(), signed(batch(task)[0]["image"])
    f = E.features(x)
    assert E(x).shape == (4, 8) and f.ndim == 4 and f.shape[-1] > 1
    shuffled = f.flatten(2)[:, :, torch.randperm(f.shape[-1] * f.shape[-2], generator=generator(0, "p"))].view_as(f)
    assert torch.allclose(E.pooled(f), E.pooled(shuffled), atol=1e-5)
    assert not torch.allclose(E.pooled(f), E.pooled(f * 2))


# 8
def test_synthetic_masks_are_those_of_their_sources_after_the_declared_warp(task, left):
    card, S = left["phase0"].card, left["phase0"].pairs("S")
    assert torch.equal(S.mask, task.labelled.masks[card["source"]]) and not torch.equal(S.image, task.labelled.images[card["source"]])
    S2 = left["phase2"].pairs("S2")
    y, recipe = recombined(task.labelled.masks, len(S2), K, generator(0, "painted"))
    under, over = (bent(task.labelled.masks[recipe[k]], g) for k, g in zip(("base", "donor"), recipe["warps"]))
    laid = over == recipe["class"][:, None, None]
    assert torch.equal(S2.mask[laid], over[laid]) and torch.equal(S2.mask[~laid], under[~laid]) and laid.any() and not laid.all()


def test_a_warp_that_does_nothing_changes_nothing_and_others_invent_no_class():
    y = torch.randint(0, 3, (2, 16, 16), generator=generator(0, "y")).byte()
    still = torch.nn.functional.affine_grid(torch.eye(2, 3).expand(2, -1, -1), (2, 1, 16, 16), align_corners=False)
    assert torch.equal(bent(y, still), y)
    y[y == 1] = 2                                                          # no class between 0 and 2 may appear
    assert set(bent(y, bends(2, (16, 16), generator(1, "w"))).unique().tolist()) <= {0, 2}
    y[0, 3:6] = IGNORE
    assert set(bent(y, bends(2, (16, 16), generator(1, "w"))).unique().tolist()) <= {0, 2, IGNORE}


def test_rare_classes_are_met_more_often_in_recombined_masks():
    masks = torch.zeros(10, 16, 16, dtype=torch.uint8)
    masks[:, :8], masks[0, 12:, 12:] = 1, 2                                # class 2 stands in one mask of ten
    y, recipe = recombined(masks, 200, 4, generator(0, "r"))
    share = (recipe["class"] == 2).float().mean()
    assert 0.35 < share < 0.65 and set(recipe["donor"][recipe["class"] == 2].tolist()) == {0} and 3 not in recipe["class"]
    assert (y == 2).flatten(1).any(1).float().mean() > 0.3


# 9
def test_phase_3_without_its_sources_is_plain_supervised_training_step_for_step(task):
    def trained(make, **more):
        m = make(net(), task, views="strong", **more)
        fit(m, task, 3, 2, seed=4, eval_on=False, progress=False)
        return m
    plain = trained(Supervised)
    for other in (trained(Phase3, dice=0.0, **BARE), trained(Phase1, dice=0.0, adversarial=0.0)):
        assert same(plain.net, other.net) and same(plain.ema, other.ema)
    assert same(trained(Phase1, adversarial=0.0).net, trained(Phase3, **BARE).net)
    assert not same(plain.net, trained(Phase1, adversarial=0.0).net)


# 10
def test_manifests_chain_and_a_partner_of_another_family_is_refused(task, plan, left, tmp_path):
    one, zero, two, three = (left[f"phase{i}"].card for i in (1, 0, 2, 3))
    assert two["through"] == two["parents"]["G1"] == three["parents"]["G1"] == one["nets"]["G1"] == zero["parents"]["G1"]
    assert three["parents"]["G2"] == two["nets"]["G2"] and three["parents"]["S"] == two["parents"]["S"] == zero["nets"]["S"]
    stranger = phase1(task, replace(plan, out=tmp_path, seed=9))
    with pytest.raises(UserError, match=f"trained through the first generator {two['through']}, but .* holds {stranger.card['nets']['G1']}"):
        phase3(task, replace(plan, out=tmp_path), stranger, left["phase2"], left["phase0"])
    other = load_task("scenes", n_labelled=6, size=32, split_seed=1, n_unlabelled=12)
    elsewhere = phase1(other, replace(plan, out=tmp_path / "other"))
    with pytest.raises(UserError, match=f"split {task.split_id}.* run all phases on one split"): phase2(other, plan, elsewhere, left["phase0"])


def test_a_file_that_was_changed_lost_or_belongs_to_another_network_is_named(plan, left, tmp_path):
    card = dict(left["phase1"].card)
    net_ = plan.segmenter(load_task("scenes", n_labelled=6, size=32))
    left["phase1"].load(G1=net_)
    with torch.no_grad(): net_.head.bias[0] += 1
    forged = save_artefact(tmp_path / "forged", {"G1": net_}, {"phase": 1})
    forged.card["nets"] = card["nets"]
    with pytest.raises(UserError, match="is not what its manifest says"): forged.load(G1=UNet(K, width=4))
    with pytest.raises(UserError, match="does not fit"): left["phase1"].load(G1=UNet(K, width=6))
    with pytest.raises(UserError, match="network 'G3' is not known"): left["phase1"].load(G3=net_)
    with pytest.raises(UserError, match="There is no .*nothing.safetensors with its manifest"): read_artefact(tmp_path / "nothing")
    forged.path.write_bytes(b"no weights")
    with pytest.raises(UserError, match="forged.safetensors cannot be read"): forged.load(G1=net_)


def test_a_fingerprint_sees_parameters_buffers_and_names_but_not_memory_layout():
    a = UNet(K, width=4)
    before = fingerprint(a)
    assert fingerprint(a.to(memory_format=torch.channels_last)) == before and len(before) == 16
    a.train()(torch.rand(2, 3, 16, 16))
    moved = fingerprint(a)
    assert moved != before                                                 # BatchNorm alone
    assert fingerprint(nn.ModuleDict({"x": nn.Linear(1, 1)})) != fingerprint(nn.ModuleDict({"y": nn.Linear(1, 1)}))


# 11
def test_one_round_is_the_plain_schedule_and_a_second_one_goes_on_from_it(task, plan, left, tmp_path):
    mine = replace(plan, out=tmp_path)
    one = phase1(task, mine)
    zero = phase0(task, mine, one)
    two = phase2(task, mine, one, zero)
    three = phase3(task, mine, one, two, zero)
    plain = {"phase1": one, "phase0": zero, "phase2": two, "phase3": three}
    assert list(left) == list(plain) and all(left[k].card["nets"] == plain[k].card["nets"] for k in plain)
    again = run_phases(task, mine, rounds=2)
    assert again["phase3"].card["nets"] == three.card["nets"] and again["phase2-round2"].card["through"] == three.card["nets"]["G1"]
    with pytest.raises(UserError, match="rounds is 0"): run_phases(task, mine, rounds=0)


# 12
def test_belief_lies_between_one_over_k_and_one_and_labels_are_believed_wholly(task):
    m = second(task, S=some_pairs(task))
    lab, unl = batch(task)
    x, y, belief = m.pictures(lab, unl, Clock(0, 10))
    assert len(x) == len(y) == len(belief) == 4 + 4 + 2
    assert (belief[:4] == 1).all() and (belief[8:] == 1).all() and (1 / K - 1e-6 <= belief).all() and (belief <= 1 + 1e-6).all()
    assert (belief[4:8] < 1).any() and y.max() < K                         # the views zoom in: no padding


def test_no_loss_and_no_nan_where_nothing_is_believed(task):
    m = third(task, threshold=1.0)
    _, losses = next(m.updates(*batch(task), Clock(9, 10)))
    assert losses["own labels"].item() == 0 and all(torch.isfinite(v) for v in losses.values()) and m.stats["kept"] == 0


def test_own_labels_are_those_of_the_average_and_come_from_the_view_without_strong_colours(task):
    m, (_, unl) = third(task, threshold=0.0), batch(task)
    before = m.own_labels(unl["image"])
    with torch.no_grad(): m.net.head.bias[(before[0, 0, 0] + 1) % K] += 100
    assert torch.equal(m.own_labels(unl["image"]), before)                 # the network has changed its mind, the average has not
    m.ema.net.head.bias[3] += 100
    assert (m.own_labels(unl["image"]) == 3).all()


# the pieces
def test_dice_counts_classes_and_not_pixels():
    y = torch.tensor([[[0, 0, 0, 1]]])
    z = 60 * one_hot(torch.tensor([[[0, 0, 0, 0]]]), 3)                    # the small class is missed: 1 - 6/7 and 1
    assert dice_loss(z, y).item() == pytest.approx((1 / 7 + 1) / 2, abs=1e-5)
    assert dice_loss(60 * one_hot(y, 3), y) < 1e-6 and dice_loss(z, torch.full_like(y, IGNORE)) == 0
    half = torch.tensor([[[0, IGNORE]]])
    assert dice_loss(torch.zeros(1, 2, 1, 2), half).item() == pytest.approx(1 - 2 * 0.5 / 1.5)


def test_a_hinge_is_one_for_a_critic_that_knows_nothing_and_zero_for_one_that_is_sure():
    assert hinge(torch.zeros(2, 1, 3, 3), torch.zeros(2, 1, 3, 3)) == 1 and hinge(torch.ones(4), -torch.ones(4)) == 0
    assert hinge(torch.tensor([0.4]), torch.tensor([-0.2])).item() == pytest.approx(0.7)


def test_a_critic_that_is_asked_does_not_move_and_one_that_learns_does():
    D = patch_critic(3 + K)
    before, x = fingerprint(D), randn(2, 3, 32, 32).requires_grad_()
    m = one_hot(torch.zeros(2, 32, 32, dtype=torch.long), K)
    asked(D, pair(x, m)).mean().backward()
    assert fingerprint(D) == before and D.training and x.grad.abs().sum() > 0
    D(pair(x.detach(), m))
    assert fingerprint(D) != before                                        # one step of the power iteration: why it is asked in eval mode


def test_void_looks_alike_on_both_sides_of_the_pair_critic(task):
    m = Phase1(net(), task, adversarial=1.0).train()
    shown = []
    m.D_m.register_forward_pre_hook(lambda _, maps: shown.append(maps[0].detach()))
    lab, _ = batch(task)
    lab["mask"] = lab["mask"].clone()
    lab["mask"][:, :, :16] = IGNORE
    for _ in m.updates(lab, None, Clock(0, 10)): continue
    made, real, fake = shown
    assert len(shown) == 3 and torch.equal(made, fake)
    empty = (real[:, 3:] == -1).all(1)
    assert empty.any() and torch.equal(empty, (made[:, 3:] == -1).all(1)) and torch.equal(real[:, :3], made[:, :3])


def test_synthetic_images_leave_the_running_averages_alone_and_real_ones_do_not(task):
    m = third(task)
    def averages(): return torch.cat([v.flatten() for k, v in m.net.state_dict().items() if "running" in k])
    before = averages()
    for pairs in (m.S, m.S2): m.synthetic(pairs, 2, Clock(9, 10), "S").backward()
    assert torch.equal(averages(), before) and m.net.head.weight.grad.abs().sum() > 0
    m.net(batch(task)[0]["image"])
    assert not torch.equal(averages(), before)


def test_painted_pixels_that_the_average_contradicts_are_ignored(task):
    m, clock = third(task, threshold=0.5), Clock(9, 10)
    m.ema.net.head.bias[1] += 100                                          # sure of class 1 everywhere
    plain, checked = (m.synthetic(m.S2, 2, clock, "S2", check=c) for c in (False, True))
    assert not torch.equal(plain, checked) and 0 < m.stats["contradicted"] < 1


def test_the_painter_paints_by_mask_and_by_style():
    G2, m = Renderer(K), one_hot(torch.randint(0, K, (2, 16, 24), generator=generator(0, "y")), K)
    a, b = G2(m, randn(2, 8)), G2(m, randn(2, 8, seed=1))
    assert a.shape == (2, 3, 16, 24) and a.abs().max() <= 1 and not torch.allclose(a, b)
    assert torch.allclose(a[:1], G2(m[:1], randn(2, 8)[:1]), atol=1e-5)    # no image depends on another
    with pytest.raises(UserError, match="18x16 cannot be halved 2 times: take sides that are multiples of 4"): G2(torch.zeros(1, K, 18, 16), randn(1, 8))


def test_paintings_take_the_styles_of_real_images_where_these_are_given(task):
    G2, E = Renderer(K), StyleEncoder()
    styles = styles_of(E, task.unlabelled, at_most=5)
    assert styles.shape == (5, 8) and torch.allclose(styles[:1], E(signed(task.unlabelled.images[:1].float() / 255)), atol=1e-5)
    one, same_, drawn = (painted(G2, task.labelled, 6, 3, s) for s in (styles[:1], styles[:1].expand(7, -1), None))
    assert torch.equal(one.image, same_.image) and torch.equal(one.mask, drawn.mask) and not torch.equal(one.image, drawn.image)


def test_signs_and_bytes_are_there_and_back():
    x = torch.rand(2, 3, 4, 4)
    assert torch.allclose(unsigned(signed(x)), x, atol=1e-6) and as_bytes(torch.tensor([-1.0, 0.5, 2.0])).tolist() == [0, 128, 255]
    assert torch.equal(as_bytes(as_bytes(x).float() / 255), as_bytes(x))


def test_two_processes_share_one_batch_of_pairs(task):
    P = some_pairs(task)
    parts = [P.draw(2, Clock(3, 10, 1, rank=r, world=2), "S")["image"] for r in (0, 1)]
    assert torch.equal(torch.cat(parts), P.draw(4, Clock(3, 10, 1), "S")["image"])
    assert not torch.equal(P.draw(8, Clock(4, 10, 1), "S")["mask"], P.draw(8, Clock(3, 10, 1), "S")["mask"])


def test_the_ramp_starts_at_nothing_and_ends_at_the_weight(task):
    m = third(task, ramp=0.5, self_training=2.0)
    at = {step: dict(next(m.updates(*batch(task), Clock(step, 10)))[1]) for step in (0, 9)}
    assert "cycle" not in at[0] and "own labels" not in at[0] and {"cycle", "own labels", "pair critic", "S", "S2"} <= at[9].keys()


@pytest.mark.parametrize("make", [second, third])
def test_a_resumed_run_ends_bit_identical(task, make, tmp_path):
    def run(total, out, **more):
        m = make(task, **({"S": some_pairs(task)} if make is second else {}))
        fit(m, task, 4, 2, seed=3, eval_on=False, progress=False, out_dir=out, checkpoint_every=2, **more)
        return m
    whole = run(4, tmp_path / "whole")
    class Stop(Exception): ...
    m = make(task, **({"S": some_pairs(task)} if make is second else {}))
    original = type(m).updates
    def broken(lab, unl, clock):
        if clock.step == 2: raise Stop
        return original(m, lab, unl, clock)
    m.updates = broken
    with pytest.raises(Stop): fit(m, task, 4, 2, seed=3, eval_on=False, progress=False, out_dir=tmp_path / "cut", checkpoint_every=2)
    resumed = run(4, tmp_path / "cut")
    assert same(whole, resumed)


def test_a_phase_that_was_finished_is_not_run_again(task, plan, left, monkeypatch):
    monkeypatch.setattr(phases.Phase3, "updates", lambda *a: pytest.fail("it trains again"))
    assert phase3(task, plan, left["phase1"], left["phase2"], left["phase0"]).card["nets"] == left["phase3"].card["nets"]


def test_what_a_phase_leaves_is_the_average(task, plan, tmp_path, monkeypatch):
    seen, original = [], Plan.train
    def spied(self, method, *a, **k):
        seen.append(method)
        return original(self, method, *a, **k)
    monkeypatch.setattr(Plan, "train", spied)
    mine = replace(plan, out=tmp_path)
    one = phase1(task, mine)
    three = phase3(task, mine, one)
    for made, m in zip((one, three), seen, strict=True): assert made.card["nets"]["G1"] == fingerprint(m.ema.net) != fingerprint(m.net)


@pytest.mark.parametrize(("arm", "phases_of_it"), [("phase 1", [1]), ("phase 1, steps of 1 and 3", [1]), ("self-training only", [1, 3]),
                                                  ("S only", [1, 0, 3]), ("without S", [1, 2, 3]), ("G1 moves in phase 2", [1, 0, 2, 3])])
def test_an_arm_is_made_of_what_it_says(task, plan, left, arm, phases_of_it):
    made = run_arm(arm, task, plan)
    assert [a.card["phase"] for a in made] == phases_of_it
    final = made[-1].card
    total = plan.steps[1] + plan.steps[3]
    assert final["steps"] == (total if "steps of" in arm else plan.steps[1] if arm == "phase 1" else plan.steps[3])
    if arm == "self-training only": assert final["parents"].keys() == {"G1"} and "D_m" not in final["nets"]
    if arm == "without S": assert "S" not in final["parents"] and "G2" in final["parents"]
    if arm == "S only": assert "G2" not in final["parents"] and "S" in final["parents"]
    if arm == "G1 moves in phase 2": assert final["parents"]["G1"] == made[2].card["nets"]["G1"] != made[0].card["nets"]["G1"]


def test_there_are_ten_arms_and_a_misspelt_one_is_named(task, plan):
    assert len(ARMS) == 10
    with pytest.raises(UserError, match="arm 'ful' is not known .did you mean 'full'"): run_arm("ful", task, plan)


def test_soft_masks_and_a_start_from_scratch_differ_from_the_full_system(task, plan, left):
    full = left["phase3"].card["nets"]["G1"]
    for arm in ("soft masks", "phase 3 from scratch"): assert run_arm(arm, task, plan)[-1].card["nets"]["G1"] != full


def test_the_painters_score_is_one_number_for_g1_and_one_for_the_oracle(task, plan, left):
    oracle = UNet(K, width=4).eval()
    found = painter_scores(left["phase2"], task, plan, oracle)
    assert list(found) == ["loss of G1", "mIoU of G1", "mIoU of the oracle"] and found["loss of G1"] > 0
    assert 0 <= found["mIoU of G1"] <= 1 and 0 <= found["mIoU of the oracle"] <= 1


def test_a_record_counts_the_steps_of_the_first_generator_and_the_seconds_of_all(left):
    run = whole_run(*left.values())
    assert run.steps == 4 and run.seconds == pytest.approx(sum(a.run.seconds for a in left.values()))
    assert [r["step"] for r in run.history] == sorted(r["step"] for r in run.history) and {r["phase"] for r in run.history} == {0, 1, 2, 3}
    with pytest.raises(UserError, match="a record needs one"): whole_run(read_artefact(left["phase1"].path))


def test_a_packed_checkpoint_comes_back_with_its_fingerprints(task, plan, left, tmp_path):
    packed = pack(tmp_path / "all", left)
    assert packed.stat().st_size < 5e6 and json.loads(packed.with_suffix(".json").read_text()).keys() == left.keys()
    there = replace(plan, out=tmp_path / "there")
    unpack(packed, there, task)
    n, G2 = plan.segmenter(task), Renderer(K)
    read_artefact(there.out / "phase3").load(G1=n)
    read_artefact(there.out / "phase2").load(G2=G2)
    assert fingerprint(n) == left["phase3"].card["nets"]["G1"]
    assert torch.equal(painted(G2, task.labelled, plan.n_painted).mask, left["phase2"].pairs("S2").mask)         # what is not stored can be painted again
    with pytest.raises(UserError, match="was made on the split"): unpack(packed, there, load_task("scenes", n_labelled=4, size=32))


@pytest.mark.parametrize(("make", "text"), [
    (lambda t: Phase3(net(), t), "cycle is 0.5, but there is no G2"), (lambda t: Phase3(net(), t, cycle=0, threshold=1.5), "threshold is 1.5"),
    (lambda t: Phase1(net(), t, dice=-1), "dice is -1"), (lambda t: Phase2(t, net(), reconstruct=-2), "reconstruct is -2"),
    (lambda t: Plan("x", steps=(1, 2, 3)), "there are four phases"), (lambda t: Phase3(net(), t, cycle=0, mix=2), "mix is 2"),
])
def test_a_mistake_is_one_sentence_before_training(task, make, text):
    with pytest.raises(UserError, match=text): make(task)


def script():
    "scripts/phases.py as a module"
    spec = importlib.util.spec_from_file_location("phases_script", Path(__file__).resolve().parents[1] / "scripts/phases.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ask(monkeypatch, folder, *options):
    "Run the script with these options"
    small = ["--width", "4", "--batch-size", "2", "--steps", "1", "1", "1", "1", "--seeds", "3", "--n-labelled", "6", "--cyclegan", "ngf=4", "--n-painted", "16"]
    monkeypatch.setattr(sys, "argv", ["phases.py", *small, "--out", str(folder / "out"), "--work", str(folder / "work"), *options])
    s = script()
    s.main(s.arguments())


def test_the_script_writes_one_record_for_each_arm_and_seed(monkeypatch, tmp_path):
    ask(monkeypatch, tmp_path, "--arms", "all labels", "full", "phase 1")
    records = {r["params"]["variant"]: r for r in (json.loads(p.read_text()) for p in (tmp_path / "out").rglob("*.json"))}
    assert records.keys() == {"all labels", "full", "phase 1"} and all(r["method"] == "phases" and r["profile"] == "smoke" for r in records.values())
    assert {r["params"]["of_n_labelled"] for r in records.values()} == {6} and records["all labels"]["dataset"]["n_labelled"] == 600
    assert records["full"]["params"]["steps_by_phase"] == {"0": 1, "1": 1, "2": 1, "3": 1} and records["full"]["params"]["steps"] == 2
    assert records["full"]["painter"].keys() == {"loss of G1", "mIoU of G1", "mIoU of the oracle"} and "painter" not in records["phase 1"]
    assert records["full"]["params"]["cyclegan ngf"] == 4 and records["full"]["params"]["render freeze"] and records["full"]["params"]["hard"]
    assert {r["params"]["views"] for r in records.values()} == {r["params"]["first views"] for r in records.values()} == {"strong"}
    assert all(r["seed"] == 3 and r["params"]["split_seed"] == 3 and r["params"]["scored_on"] == "val" and "device" in r for r in records.values())


@pytest.mark.parametrize(("options", "text"), [(("--arms", "ful"), "arm 'ful' is not known"), (("--again", "cicle=1"), "setting of Phase3 'cicle' is not known")])
def test_the_script_stops_at_a_mistake_before_it_trains(monkeypatch, tmp_path, options, text):
    with pytest.raises(UserError, match=text): ask(monkeypatch, tmp_path, *options)
    assert not list(tmp_path.rglob("*.safetensors"))
