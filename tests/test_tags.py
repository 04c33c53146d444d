"Image-level tags: the classifier and its maps, masks of two thresholds, what tags forbid, the loss on whole images, CCT with tags"
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from semiseg_nb.adversarial import gate
from semiseg_nb.catalogue import load_task
from semiseg_nb.clock import Clock
from semiseg_nb.core import UserError, generator, seed_everything
from semiseg_nb.engine import fit, settings
from semiseg_nb.models import build_model
from semiseg_nb.tags import (
    CAMNet,
    CCTWeak,
    Tagger,
    all_pseudo_masks,
    cams,
    cct_weak,
    possible,
    pseudo_masks,
    tag_loss,
    telling_tags,
)


@pytest.fixture(scope="module")
def task(): return load_task("scenes", n_labelled=6, size=32, n_unlabelled=24, weak_tags=True)


def batch(task, n=4):
    lab, unl = task.labelled.__getitems__(list(range(n))), task.unlabelled.__getitems__(list(range(n)))
    return {**lab, "image": lab["image"].float() / 255}, {**unl, "image": unl["image"].float() / 255}


# the classifier

def test_an_image_without_tags_does_not_train_the_classifier(task):
    seed_everything(0)
    tagger = Tagger(task).eval()
    lab, unl = batch(task)
    def loss(tags, x=unl["image"]):
        return next(tagger.updates({**lab, "tags": torch.zeros(4, 5)}, {**unl, "image": x, "tags": tags}, Clock(0, 1)))[1]["tags"]
    silent = torch.cat([unl["tags"][:2], torch.zeros(2, 5)])
    assert loss(torch.zeros(4, 5)) == 0 and loss(silent) != loss(unl["tags"])
    assert torch.equal(loss(silent), loss(silent, torch.cat([unl["image"][:2], torch.rand(2, 3, 32, 32)])))   # what they show does not matter


def test_a_tag_is_the_mean_of_the_highest_part_of_its_map():
    values = torch.arange(16.0).view(1, 1, 4, 4)
    for pool, expected in ((0.25, 13.5), (1.0, 7.5), (1e-3, 15.0)):
        net = CAMNet(2, width=2, pool=pool)
        net.maps = lambda x: values
        assert net(None).item() == expected


def test_the_classifier_learns_and_makes_masks_of_all_images(task):
    seed_everything(0)
    tagger = Tagger(task)
    run = fit(tagger, task, 40, 8, seed=0, eval_on=False, progress=False)
    assert run.history[-1]["tags"] < run.history[0]["tags"]
    masks = all_pseudo_masks(tagger.net, task.unlabelled)
    assert masks.shape == (24, 32, 32) and masks.dtype == torch.uint8 and masks.device.type == "cpu"
    for mask, tags in zip(masks, task.unlabelled.tags):
        assert set(mask.unique().tolist()) <= {0, 255, *torch.where(tags > 0)[0].tolist()}
    assert tagger.predict(torch.rand(2, 3, 32, 32)).shape == (2, 5, 32, 32)


def test_the_settings_are_attributes(task):
    assert settings(Tagger(task, pool=0.5, lr=1e-3)) == {"pool": 0.5, "lr": 1e-3, "weight_decay": 1e-2}


# masks

def test_pseudo_masks_have_two_thresholds_and_only_tagged_classes():
    net, x = CAMNet(4, width=4).eval(), torch.rand(3, 3, 16, 16)
    tags = torch.tensor([[1.0, 1, 0, 1], [1, 0, 1, 0], [0, 0, 0, 0]])
    cam = cams(net, x, tags, scales=(1.0, 0.5))
    assert cam.shape == (3, 4, 16, 16) and 0 <= cam.min() and cam.max() <= 1 and not cam[tags == 0].any()
    mask = pseudo_masks(cam, tags, high=0.4, low=0.1)
    assert mask.dtype == torch.uint8
    assert set(mask[0].unique().tolist()) <= {0, 1, 3, 255} and set(mask[1].unique().tolist()) <= {0, 2, 255}
    assert (mask[2] == 255).all()                                          # no tags: nothing is known, not even background
    by_hand = torch.tensor([[0.9, 0.9, 0.9], [0.05, 0.3, 0.5], [0.0, 0.1, 0.8]]).view(1, 3, 1, 3)
    assert pseudo_masks(by_hand, torch.ones(1, 3)).tolist() == [[[0, 255, 2]]]


def test_a_tag_of_every_image_has_no_map_and_takes_the_background_away():
    tags = torch.tensor([[1.0, 1, 0, 1], [1, 1, 1, 0], [0, 0, 0, 0]])
    assert telling_tags(tags).tolist() == [False, False, True, True]
    seed_everything(0)
    net = CAMNet(4, width=4, telling=telling_tags(tags)).eval()
    cam = cams(net, torch.rand(3, 3, 16, 16), tags)
    assert not cam[:, 1].any() and cam[0, 3].any()
    assert 0 not in pseudo_masks(cam, tags, telling=net.telling)          # class 1 may be anywhere


# the gate

def test_labels_are_tagged_classes_or_background():
    g = generator(0, "gate")
    z, tags = torch.randn(8, 6, 5, 5, generator=g), (torch.rand(8, 6, generator=g) < 0.4).float()
    tags[0, 1:], tags[1] = 0, 0                                            # nothing but background; nothing known
    tags[0, 0] = 1
    labels = gate(z, possible(tags)).argmax(1)
    for y, t in zip(labels, tags):
        assert set(y.flatten().tolist()) <= (set(range(6)) if not t.any() else {0, *torch.where(t > 0)[0].tolist()})
    assert not labels[0].any() and torch.equal(labels[1], z[1].argmax(0))


def test_a_class_that_was_removed_never_wins_also_when_all_logits_are_negative():
    z = -1 - torch.rand(2, 4, 6, 6, generator=generator(0, "negative"))
    assert gate(z, possible(torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0]]))).argmax(1).unique().tolist() == [0, 1, 2]
    assert (gate(z, possible(torch.tensor([[1, 1, 0, 0]] * 2))).argmax(1) < 2).all()


def test_a_true_gate_never_makes_a_right_pixel_wrong():
    g = generator(0, "truth")
    truth, z = torch.randint(0, 6, (16, 8, 8), generator=g), torch.randn(16, 6, 8, 8, generator=g)
    truth = torch.where(truth < 1 + torch.arange(16)[:, None, None] % 6, truth, 0)
    tags = F.one_hot(truth, 6).amax((1, 2))
    right, still = z.argmax(1) == truth, gate(z, possible(tags)).argmax(1) == truth
    assert not (right & ~still).any() and still.sum() > right.sum()


# the loss on whole images

def test_the_tag_loss_is_blind_to_a_constant_on_all_logits_and_to_padding():
    g = generator(0, "mil")
    z, tags = torch.randn(3, 4, 6, 6, generator=g), (torch.rand(3, 4, generator=g) < 0.5).float()
    valid = torch.rand(3, 6, 6, generator=g) < 0.7
    tags[:, 0] = 1
    loss = tag_loss(z, tags, valid)
    assert torch.allclose(tag_loss(z + torch.randn(3, 1, 6, 6, generator=g), tags, valid), loss, atol=1e-5)
    assert torch.allclose(tag_loss(torch.where(valid[:, None], z, 9 * z), tags, valid), loss, atol=1e-5)
    assert tag_loss(z, torch.zeros(3, 4), valid) == 0 and torch.isfinite(tag_loss(50 * z, tags, torch.zeros_like(valid)))


def test_the_soft_maximum_lies_between_mean_and_maximum_of_the_log_odds():
    z = torch.randn(2, 3, 5, 5, generator=generator(0, "pool"))
    p = z.softmax(1)
    odds = (p.log() - (1 - p).log())[:, 1:].flatten(2)
    for r, pooled in ((1e-3, odds.mean(2)), (200.0, odds.amax(2))):
        expected = F.binary_cross_entropy_with_logits(pooled, torch.ones(2, 2))
        assert torch.allclose(tag_loss(z, torch.ones(2, 3), torch.ones(2, 5, 5) > 0, r), expected, atol=2e-2)


# CCT with tags

ALL = "f_noise,f_drop,dropout,con_msk,obj_msk,g_cutout,i_vat"


def net(task):
    seed_everything(0)
    return build_model("unet", task.n_classes, width=4, mean=task.mean)


def step_of(method, task, step=50):
    "Losses and statistics of one step"
    lab, unl = batch(task)
    (_, losses, means), = list(method.updates({**lab, "mask": lab["mask"].long()}, unl, Clock(step, 100)))
    return losses, means


def losses_of(method, task, step=50): return step_of(method, task, step)[0]


def drive(stages, task, seed=0, batch_size=4, **more):
    "Run a recipe: fit every stage, seeded anew; what it returns, and the stages"
    done, made = None, []
    while True:
        seed_everything(seed)
        try: stage = stages.send(done)
        except StopIteration as end: return end.value, made
        fit(stage.method, task, stage.steps, stage.batch_size or batch_size, seed=seed, eval_on=False, progress=False, **more)
        made.append(stage)
        done = stage.method


def test_the_weak_loss_has_its_own_weight_and_trains_no_main_decoder(task):
    pseudo = torch.randint(0, 5, (24, 32, 32), generator=generator(0, "pseudo")).to(torch.uint8)
    cct = CCTWeak(net(task), task, weight=0.0, kinds="con_msk,dropout", pseudo=pseudo, weak_weight=0.4)
    losses, means = step_of(cct, task, 100)
    loss = losses["consistency"]
    assert loss.item() == pytest.approx(0.4 * means["weak"].item(), rel=1e-4)
    def grads(module): return torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, retain_graph=True)
    assert not any(g is not None for g in grads(cct.net.head)) and all(g.any() for g in grads(cct.decoders[0]))
    cct.pseudo.fill_(255)
    assert losses_of(cct, task, 100)["consistency"] == 0                   # nothing known: 0, not nan


def test_absent_classes_are_struck_from_the_target(task):
    cct = CCTWeak(net(task), task, kinds=ALL, rule_out=True)
    losses, means = step_of(cct, task)
    sum(losses.values()).backward()
    assert all(torch.isfinite(v) for v in losses.values()) and all(torch.isfinite(p.grad).all() for p in cct.net.parameters())
    assert "weak" not in means and losses_of(CCTWeak(net(task), task, kinds=ALL), task)["consistency"] != losses["consistency"]
    lab, unl = batch(task)
    unl["tags"][0] = 0                                                     # nobody has tagged the first image
    with torch.no_grad(): z_m = cct.target(cct.net.encode(unl["image"]), unl["image"], unl, Clock(0, 1))
    absent = (unl["tags"] == 0)[:, :, None, None] & unl["tags"].any(1).view(-1, 1, 1, 1)
    assert torch.equal(z_m == -math.inf, absent.expand_as(z_m))


def test_cct_with_tags_has_two_stages_and_keeps_its_masks_in_the_frame_of_the_view(task):
    seed_everything(0)
    method, stages = drive(cct_weak(net(task), task, 2, tag_steps=2, tag_batch=4, cct={"kinds": "dropout,con_msk"}), task)
    assert [(s.name, s.steps, s.scored) for s in stages] == [("tags", 2, False), ("cct", 2, True)] and stages[0].batch_size == 4
    assert method.pseudo.shape == (24, 32, 32) and not any("pseudo" in k or "tagger" in k for k in method.state_dict())
    assert torch.isfinite(step_of(method, task)[1]["weak"])
    lab, unl = batch(task)
    clock = Clock(5, 10)
    drawn = clock.draw(method.weak, "weak", unl["image"])
    assert torch.equal(method.labels(unl, clock), method.weak.apply_label(method.pseudo[unl["index"]].long(), drawn))


def test_without_a_classifier_there_is_one_stage_and_no_mask(task):
    method, stages = drive(cct_weak(net(task), task, 1, tag_steps=0, rule_out=True, cct={"kinds": "dropout"}), task)
    assert [s.name for s in stages] == ["cct"] and method.pseudo is None


# mistakes

@pytest.mark.parametrize("make, words", [
    (lambda task: telling_tags(torch.zeros(3, 4)), "No unlabelled image has a tag"), (lambda task: telling_tags(torch.ones(3, 4)), "tags tell nothing"),
    (lambda task: Tagger(load_task("scenes", n_labelled=6, size=32, n_unlabelled=8)), "weak_tags=True"), (lambda task: Tagger(task, pool=0), "pool is 0"),
    (lambda task: Tagger(task, pol=1), "did you mean 'pool'"), (lambda task: Tagger(task, lr=0), "lr is 0"),
    (lambda task: all_pseudo_masks(CAMNet(5), load_task("scenes", n_labelled=6, size=48, n_unlabelled=8, crop=32, weak_tags=True).unlabelled), "whole images"),
    (lambda task: next(cct_weak(net(task), load_task("scenes", n_labelled=6, size=32), 3)), "weak_tags=True"),
    (lambda task: next(cct_weak(net(task), task, 3, tag_steps=0)), "rule_out=True"),
    (lambda task: cct_weak(net(task), task, 0), "steps is 0"), (lambda task: cct_weak(net(task), task, 3, high=40), "high is 40"),
    (lambda task: CCTWeak(net(task), task, pseudo=torch.zeros(3, 32, 32)), "3 masks for 24 unlabelled images"),
    (lambda task: CCTWeak(net(task), load_task("scenes", n_labelled=6, size=32), rule_out=True), "weak_tags=True"),
    (lambda task: next(cct_weak(net(task), load_task("scenes", n_labelled=6, crop=32, weak_tags=True), 3)), "crop=None")])
def test_a_mistake_is_answered_in_one_sentence(task, make, words):
    with pytest.raises(UserError, match=words): make(task)


# the lesson

def test_the_solutions_of_the_exercises():
    lesson = json.loads((Path(__file__).resolve().parents[1] / "nbs/17_tags.ipynb").read_text(encoding="utf-8"))
    cells = {c["id"]: "".join(c["source"]) for c in lesson["cells"]}
    code, = re.findall(r"```python\n(.*?)```", cells["solutions"], re.S)
    g = generator(0, "exercises")
    def gated(z, tags): return gate(z, possible(tags)).argmax(1)
    names = {"torch": torch, "possible": possible, "pseudo_masks": pseudo_masks, "gated": gated, "z": torch.randn(3, 4, 6, 6, generator=g),
             "some": {"tags": torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]])}, "cam": torch.rand(3, 4, 6, 6, generator=g)}
    exec(code, names)
    empty = [cells[f"exercise-{i}"].removeprefix("# ").strip() for i in (1, 2, 3)]
    assert set(empty) == {"struck", "forget", "decided"} <= set(names) and code.count("assert") == 3
