"CCT: the seven perturbations, who gets which gradient, the memory-saving loop"
import copy
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from semiseg_nb.catalogue import load_task
from semiseg_nb.cct import (
    CCT,
    ObjectGuide,
    Strengths,
    Sum,
    con_msk,
    dropout,
    f_drop,
    f_noise,
    g_cutout,
    i_vat,
    loss_of,
    make_decoders,
    obj_msk,
    object_boxes,
    objects_of,
    parse_kinds,
    perturb,
    sub_boxes,
    unit,
    vat_direction,
)
from semiseg_nb.clock import Clock
from semiseg_nb.core import UserError, generator, seed_everything
from semiseg_nb.cutmix import paste
from semiseg_nb.engine import fit, settings
from semiseg_nb.losses import consistency, divergence
from semiseg_nb.models import build_model
from semiseg_nb.supervised import Supervised

ALL = "f_noise,f_drop,dropout,con_msk,obj_msk,g_cutout,i_vat"


@pytest.fixture(scope="module")
def task(): return load_task("scenes", n_labelled=6, size=32, n_unlabelled=24, weak_tags=True)


def net(task, model="unet"):
    seed_everything(0)
    return build_model(model, task.n_classes, width=4, mean=task.mean)


def batch(task, n=4):
    lab, unl = task.labelled.__getitems__(list(range(n))), task.unlabelled.__getitems__(list(range(n)))
    return ({**lab, "image": lab["image"].float() / 255, "mask": lab["mask"].long()}, {**unl, "image": unl["image"].float() / 255})


def step_of(method, task, step=50):
    "Losses and statistics of one step"
    (_, losses, means), = list(method.updates(*batch(task), Clock(step, 100)))
    return losses, means


def losses_of(method, task, step=50): return step_of(method, task, step)[0]


class StrongView(CCT):
    "As in the lesson: strong colours and pasted boxes for the encoder, the averaged network as the teacher"
    def student(self, x_w, valid, clock): return paste(clock.boxes(x_w), self.strong_view(x_w, clock), valid)
    @torch.no_grad()
    def target(self, maps, x_w, unl, clock): return paste(clock.boxes(x_w), self.ema(x_w))[0]


class NoStop(CCT):
    "As in the lesson: the main decoder follows, a mistake"
    def target(self, maps, x_w, unl, clock): return self.net.decode(maps, x_w.shape[-2:])
    def distance(self, z_k, q, valid): return torch.where(valid, divergence(z_k, q, "mse"), 0).sum() / valid.sum().clamp(min=1)


def features(seed=0, b=4, d=16, side=8): return torch.rand(b, d, side, side, generator=generator(seed, "e")).sub(0.3).relu()


def rng(seed=0): return generator(seed, "draws")


def guide(objects): return ObjectGuide(torch.stack([~objects, objects], 1).float(), torch.tensor([False, True]), rng())


def grads(loss, params): return torch.autograd.grad(loss, params, allow_unused=True, retain_graph=True)


def zero(found): return all(g is None or not g.any() for g in found)


# 1
def test_weight_zero_takes_the_supervised_step_bit_for_bit(task):
    for views in ("weak", "strong"):
        base, cct = Supervised(net(task), task, views=views), CCT(net(task), task, weight=0.0, views=views)
        before = copy.deepcopy(cct.decoders.state_dict())
        for method in (base, cct): fit(method, task, 5, batch_size=4, seed=3, progress=False, eval_on=False)
        for a, b in ((base.net, cct.net), (base.ema, cct.ema)):
            one, two = a.state_dict(), b.state_dict()
            assert all(torch.equal(one[k], two[k]) for k in one)
        assert all(torch.equal(before[k], v) for k, v in cct.decoders.state_dict().items())
        assert all(p.grad is None for p in cct.decoders.parameters())


# 2
def test_the_unlabelled_loss_reaches_encoder_and_auxiliary_decoders_only(task):
    cct = CCT(net(task), task, kinds=ALL)
    loss = losses_of(cct, task)["consistency"]
    assert zero(grads(loss, [*cct.net.up.parameters(), *cct.net.merge.parameters(), *cct.net.head.parameters()]))
    assert all(g.any() for g in grads(loss, [m[0].weight for m in cct.net.down[-1]]))
    for decoder in cct.decoders: assert not zero(grads(loss, list(decoder.parameters())))
    assert all(p.grad is None for p in cct.parameters())


def test_without_the_stop_gradient_the_main_decoder_follows(task):
    cct = NoStop(net(task), task, kinds="dropout")
    assert not zero(grads(losses_of(cct, task)["consistency"], list(cct.net.head.parameters())))


def test_the_averaged_teacher_gets_no_gradient(task):
    cct = StrongView(net(task), task, kinds="dropout,con_msk")
    sum(losses_of(cct, task).values()).backward()
    assert all(p.grad is None for p in cct.ema.parameters()) and all(p.grad is not None for p in cct.net.parameters())


# 3
def test_equal_decoders_without_perturbation_have_no_loss_and_no_gradient(task):
    cct = CCT(net(task, "psp"), task, kinds="f_noise", strengths={"noise": 0.0})
    cct.decoders[0].load_state_dict(cct.net.decoder.state_dict())
    loss = losses_of(cct, task)["consistency"]
    assert loss < 1e-6
    found = grads(loss, [*cct.decoders.parameters(), *cct.net.encoder.parameters()])
    assert max(g.abs().max() for g in found if g is not None) < 1e-6


# 4
def test_f_noise_is_bounded_relative_and_unbiased():
    e = features()
    out = perturb("f_noise", e, guide(torch.ones(4, 32, 32) > 0), None, Strengths(), rng())
    assert ((out - e).abs() <= 0.3 * e + 1e-6).all() and not out[e == 0].any()
    assert (out.sum() / e.sum()).item() == pytest.approx(1, abs=0.02)
    assert torch.equal(f_noise(e, torch.full_like(e, 0.5)), 1.5 * e)
    assert not torch.equal(out[0] / e[0].clamp(min=1e-9), out[1] / e[1].clamp(min=1e-9))      # each image has its own noise


# 5
def test_f_drop_takes_the_most_active_places_with_all_their_channels():
    e, gamma = features(), torch.full((4, 1, 1, 1), 0.8)
    out, activity = f_drop(e, gamma), e.mean(1)
    kept, top = (out == e).all(1), activity.amax((1, 2), keepdim=True)
    assert torch.equal(kept | (activity == 0), activity < 0.8 * top)
    assert not out.flatten(2).gather(2, activity.flatten(1).argmax(1).view(-1, 1, 1).expand(-1, 16, -1)).any()
    assert ((out == 0).all(1) | kept).all()
    assert not f_drop(e, torch.zeros(4, 1, 1, 1)).any() and torch.equal(f_drop(e, torch.full((4, 1, 1, 1), 1.01)), e)


def test_dropout_takes_whole_channels_and_keeps_the_mean():
    e = features(d=512)
    out = perturb("dropout", e, guide(torch.ones(4, 32, 32) > 0), None, Strengths(), rng())
    lost = (out == 0).all((2, 3)) & e.any(-1).any(-1)
    assert torch.equal(out, e * 2 * ~lost[:, :, None, None]) and lost.float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert torch.equal(dropout(e, torch.zeros(4, 512, 1, 1), 0.0), e)


# 6
def test_the_two_masks_share_the_features_between_them():
    e, objects = features(), torch.rand(4, 32, 32, generator=rng()) > 0.5
    assert torch.equal(con_msk(e, objects) + obj_msk(e, objects), e)
    nothing = torch.zeros(4, 32, 32, dtype=torch.bool)
    assert not con_msk(e, nothing).any() and torch.equal(obj_msk(e, nothing), e)


def test_a_foreground_list_says_what_an_object_is(task):
    logits = torch.eye(5)[torch.tensor([[[0, 1], [2, 4]]])].movedim(-1, 1)
    cct = CCT(net(task), task, foreground=[2, 4])
    assert objects_of(logits, cct.is_object).tolist() == [[[False, False], [True, True]]]
    assert objects_of(logits, CCT(net(task), task).is_object).tolist() == [[[False, True], [True, True]]]


# 7
def test_g_cutout_erases_one_box_inside_each_object():
    objects = torch.zeros(2, 64, 64, dtype=torch.bool)
    objects[0, 4:30, 6:40], objects[0, 40:60, 40:62], objects[1, 10:30, 10:30] = True, True, True
    objects[1, 50:53, 50:53] = True                                     # too small to count
    boxes = object_boxes(objects)
    assert sorted(map(tuple, boxes.tolist())) == [(0, 4, 30, 6, 40), (0, 40, 60, 40, 62), (1, 10, 30, 10, 30)]
    cut = sub_boxes(boxes, torch.rand(3, 2, generator=rng()))
    out = g_cutout(torch.ones(2, 3, 64, 64), cut, (64, 64))
    assert not (out != out[:, :1]).any()
    erased, inside = out[:, 0] == 0, torch.zeros(2, 64, 64, dtype=torch.bool)
    for i, top, bottom, left, right in boxes:
        part = erased[i, top:bottom, left:right]
        assert 0.10 <= part.float().mean() <= 0.16 and len(object_boxes(part[None])) == 1
        inside[i, top:bottom, left:right] = True
    assert not (erased & ~inside).any()


def test_g_cutout_without_objects_changes_nothing_and_small_boxes_survive_the_stride():
    e = features()
    none = object_boxes(torch.zeros(4, 64, 64, dtype=torch.bool))
    assert none.shape == (0, 5) and torch.equal(g_cutout(e, sub_boxes(none, torch.rand(0, 2)), (64, 64)), e)
    out = g_cutout(torch.ones(1, 2, 8, 8), np.array([[0, 17, 20, 41, 44]]), (64, 64))      # 3 pixels wide, inside one cell of 8
    assert (out == 0).nonzero().tolist() == [[0, 0, 2, 5], [0, 1, 2, 5]]


# 8
def test_i_vat_has_the_right_length_finds_the_bad_direction_and_leaves_no_trace():
    seed_everything(0)
    decoder, e, random = nn.Sequential(nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 5, 1)), features(), rng()
    p = decoder(e).softmax(1).detach()
    def change(r): return divergence(decoder(e + r), p).mean().item()
    found, chance = [], []
    for _ in range(20):
        start = torch.rand(e.shape, generator=random) - 0.5
        r = vat_direction(e, decoder, start)
        assert torch.allclose(r.square().sum((1, 2, 3)).sqrt(), torch.tensor(2.0), rtol=1e-3) and not r.requires_grad
        found.append(change(r)), chance.append(change(2 * unit(start)))
    assert np.mean(found) > 2 * np.mean(chance)
    assert all(p.grad is None for p in decoder.parameters())
    e.requires_grad_()
    i_vat(e, decoder, torch.rand(e.shape, generator=random) - 0.5).sum().backward()
    assert torch.equal(e.grad, torch.ones_like(e))                      # the disturbance is a constant


def test_i_vat_at_the_published_probe_is_noise_in_single_precision():
    seed_everything(0)
    decoder, e = nn.Sequential(nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 5, 1)), features()
    start = torch.rand(e.shape, generator=rng()) - 0.5
    def cosine(a, b): return (unit(a) * unit(b)).sum((1, 2, 3)).mean().item()
    exact = vat_direction(e, decoder, start, xi=0.1)
    assert cosine(vat_direction(e, decoder, start, xi=0.3), exact) > 0.95
    assert abs(cosine(vat_direction(e, decoder, start, xi=1e-6), exact)) < 0.5


# 10
def test_the_weights_follow_the_sigmoid_ramp(task):
    cct = CCT(net(task), task, weight=30.0, kinds="con_msk")
    ratio = {}
    for step in (0, 5, 10, 100):
        losses, means = step_of(cct, task, step)
        ratio[step] = (losses["consistency"] / means["con_msk"]).item()
    assert ratio[0] == pytest.approx(30 * math.exp(-5), rel=1e-4) and ratio[0] == pytest.approx(0.202, abs=1e-3)
    assert [ratio[s] for s in (5, 10, 100)] == pytest.approx([30 * math.exp(-5 / 4), 30, 30], rel=1e-4)


def test_one_decoder_has_a_distance_and_a_cross_entropy():
    decoder, e = nn.Conv2d(3, 5, 1), torch.rand(2, 3, 8, 8)
    class Decoder(nn.Module):
        def forward(self, e, size): return decoder(e)
    q, valid = torch.randn(2, 5, 8, 8).softmax(1), torch.ones(2, 8, 8) > 0
    def distance(z_k, q, valid): return consistency(z_k, q, valid=valid, kind="mse")
    loss_u, loss_w = loss_of(Decoder(), e, q, valid, distance)
    assert torch.isclose(loss_u, (decoder(e).softmax(1) - q).square().sum(1).mean()) and loss_w == 0
    _, loss_w = loss_of(Decoder(), e, q, valid, distance, torch.zeros(2, 8, 8, dtype=torch.long))
    assert torch.isclose(loss_w, -decoder(e).log_softmax(1)[:, 0].mean())


# 11
@pytest.mark.parametrize("method, model", [(CCT, "unet"), (StrongView, "deeplabv3"), (CCT, "psp")])
def test_the_memory_saving_loop_has_the_same_loss_and_gradients(task, method, model):
    both = []
    for saver in (False, True):
        cct = method(net(task, model), task, kinds=ALL, saver=saver, views="weak")
        cct.net.eval(), cct.decoders.eval()                                # batch statistics would amplify rounding
        losses = losses_of(cct, task)
        params = [*cct.net.parameters(), *cct.decoders.parameters()]
        both.append((losses["consistency"], grads(sum(losses.values()), params)))
    assert torch.allclose(both[0][0], both[1][0], atol=1e-6)
    for a, b in zip(both[0][1], both[1][1]):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=1e-6))


def test_the_memory_saving_loop_works_around_a_frozen_encoder(task):
    cct = CCT(net(task), task, kinds="dropout", saver=True)
    cct.net.requires_grad_(False)
    loss = losses_of(cct, task)["consistency"]
    assert not zero(grads(loss, list(cct.decoders.parameters())))


@pytest.mark.parametrize("saver", [False, True])
def test_the_step_runs_in_half_precision(task, saver):
    cct = CCT(net(task), task, kinds=ALL, saver=saver)
    with torch.autocast("cpu", torch.bfloat16): losses = losses_of(cct, task)
    sum(losses.values()).backward()
    assert all(torch.isfinite(v) for v in losses.values()) and all(torch.isfinite(p.grad).all() for p in cct.net.parameters())


def test_the_memory_saving_loop_scales_with_the_gradient_from_above():
    decoders, ends = nn.ModuleList(nn.Linear(3, 2) for _ in range(2)), []
    for saver in (False, True):
        e = torch.ones(4, 3, requires_grad=True)
        decoders.zero_grad()
        total = Sum(e * 2, saver)
        for d in decoders: total.add(d(total.e).square().sum(), d)
        (3 * total.total()).backward()
        ends.append((e.grad, decoders[1].weight.grad.clone()))
    assert all(torch.allclose(a, b) for a, b in zip(*ends))


# 12
def test_predictions_do_not_depend_on_the_auxiliary_decoders(task):
    x = batch(task)[0]["image"]
    few, many = CCT(net(task), task, kinds="f_drop").eval(), CCT(net(task), task, kinds="f_drop:4,dropout:4").eval()
    with torch.no_grad(): assert torch.equal(few.predict(x), many.predict(x))


# the whole step
def test_a_resumed_run_and_a_whole_one_are_equal(task, tmp_path):
    ends = []
    for stops in ((4,), (2, 4)):
        for stop in stops:
            cct = CCT(net(task), task, kinds=ALL)
            if len(stops) == 2 and stop == 2:
                with pytest.raises(KeyboardInterrupt):
                    fit(Stopping(cct, 2), task, 4, 4, seed=1, eval_on=False, progress=False, out_dir=tmp_path, checkpoint_every=2)
            else: fit(cct, task, 4, 4, seed=1, eval_on=False, progress=False, out_dir=tmp_path if len(stops) == 2 else None)
        ends.append(cct.state_dict())
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


def Stopping(method, at):
    "The method, interrupted at a step"
    plain = method.updates
    def updates(lab, unl, clock):
        if clock.step == at: raise KeyboardInterrupt
        yield from plain(lab, unl, clock)
    method.updates = updates
    return method


def test_training_reads_no_mask_of_an_unlabelled_image(task):
    lab, unl = batch(task)
    assert set(unl) == {"image", "index", "tags"}
    list(CCT(net(task), task, kinds=ALL).updates(lab, {k: v for k, v in unl.items() if k == "image"}, Clock(5, 10)))


@pytest.mark.parametrize("model, kw", [("unet", {"encoder": "resnet18"}), ("psp", {"encoder": "mobilenetv3_small_050"}),
                                       ("psp", {"encoder": "convnext_atto"}), ("deeplabv3", {})])
def test_light_decoders_fit_any_network_and_any_size(model, kw):
    model = build_model(model, 3, width=4, **kw)
    decoders, x = make_decoders(model, 2), torch.rand(2, 3, 41, 50)
    assert decoders[0](model.encode(x)[-1], (41, 50)).shape == (2, 3, 41, 50)
    assert model.training and all(p.grad is None for p in model.parameters())


def test_the_settings_are_attributes(task):
    chosen = dict(weight=2.0, kinds="f_drop:2", strengths={"noise": 0.1}, foreground=[1], saver=True, lr=1e-3)
    assert chosen.items() <= settings(CCT(net(task), task, **chosen)).items()


# mistakes of the user
@pytest.mark.parametrize("make, words", [
    (lambda task: parse_kinds("f_nois:2"), "did you mean 'f_noise'"), (lambda task: parse_kinds("f_noise:two"), "f_noise:two"),
    (lambda task: parse_kinds("f_noise:0"), "f_noise:0"), (lambda task: CCT(net(task), task, kind="kl"), "setting of CCT 'kind' is not known"),
    (lambda task: CCT(net(task), task, weight=-1.0), "weight"), (lambda task: CCT(net(task), task, weight=math.nan), "weight"),
    (lambda task: CCT(net(task), task, foreground=[7]), "foreground"), (lambda task: CCT(net(task), task, ramp_up=80), "ramp_up is 80"),
    (lambda task: CCT(net(task), task, strengths={"nois": 1}), "did you mean 'noise'")])
def test_a_mistake_is_answered_in_one_sentence(task, make, words):
    with pytest.raises(UserError, match=words): make(task)


# the lesson
def test_the_solutions_of_the_exercises():
    lesson = json.loads((Path(__file__).resolve().parents[1] / "nbs/13_cct.ipynb").read_text(encoding="utf-8"))
    cells = {c["id"]: "".join(c["source"]) for c in lesson["cells"]}
    code, = re.findall(r"```python\n(.*?)```", cells["solutions"], re.S)
    names = {"torch": torch, "nn": nn, "f_drop": f_drop}
    exec(code, names)
    empty = [cells[f"exercise-{i}"].removeprefix("# ").strip() for i in (1, 2, 3)]
    assert set(empty) == {"per_pixel", "keep_active", "does_nothing"} <= set(names) and code.count("assert") == 3
