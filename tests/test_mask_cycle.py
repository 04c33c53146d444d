"CycleGAN of images and masks: a decision with a gradient, who learns from what, and the baseline at weight 0"
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from semiseg_nb.adversarial import straight_through
from semiseg_nb.catalogue import load_task
from semiseg_nb.clock import Clock
from semiseg_nb.core import IGNORE, UserError, generator, seed_everything
from semiseg_nb.engine import fit, make_accelerator, optimise, settings
from semiseg_nb.losses import one_hot
from semiseg_nb.mask_cycle import MaskCycle, known_l1
from semiseg_nb.networks import UNet
from semiseg_nb.supervised import Supervised

OFF = {"adversarial": 0, "image_cycle": 0, "label_cycle": 0, "regression": 0}


class SoftMasks(MaskCycle):
    def mask(self, z): return z.float().softmax(1)


class Argmax(MaskCycle):
    def mask(self, z): return one_hot(z.argmax(1), z.shape[1])


@pytest.fixture(scope="module")
def task(): return load_task("scenes", n_labelled=6, size=32)


def net(task, width=4):
    seed_everything(0)
    return UNet(task.n_classes, width=width)


def mask_cycle(task, make=MaskCycle, critic=None, **kw):
    small = {"renderer": {"ngf": 4, "blocks": 1}, "critic": {"ndf": 4} | (critic or {}), "start": 0.0}
    return make(net(task), task, **small | kw)


def batch(task, n=4):
    lab, unl = task.labelled.__getitems__(list(range(n))), task.unlabelled.__getitems__(list(range(n)))
    return {"image": lab["image"].float() / 255, "mask": lab["mask"].long()}, {"image": unl["image"].float() / 255}


def train(m, task, steps=3, **more): return fit(m, task, steps, batch_size=2, seed=3, progress=False, eval_on=False, **more)
def rand(*shape, seed=0): return torch.rand(*shape, generator=generator(seed, "test"))
def moves(*nets): return any(p.grad is not None and p.grad.abs().sum() > 0 for n in nets for p in n.parameters())
def untouched(*nets): return all(p.grad is None for n in nets for p in n.parameters())


def same(a, b):
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_the_published_argmax_gives_the_segmenter_no_gradient(task):
    "Defect of arnab39/Semi-supervised-segmentation-cycleGAN: masks are argmax-ed before the discriminator sees them"
    for make, arrives in ((MaskCycle, True), (SoftMasks, True), (Argmax, False)):
        m = mask_cycle(task, make)
        _, losses = next(m.updates(*batch(task), Clock(5, 10)))
        parts = list(m.net.parameters())
        for key in ("fool masks", "image cycle"):
            if not losses[key].requires_grad: reached = [None]
            else: reached = torch.autograd.grad(losses[key], parts, retain_graph=True, allow_unused=True)
            assert any(g is not None and g.abs().sum() > 0 for g in reached) == arrives, (make, key)


def test_unknown_pixels_are_no_class():
    y = torch.tensor([[[0, 2, IGNORE]]])
    assert one_hot(y, 3)[0, :, 0].T.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]
    assert straight_through(one_hot(y.clamp(max=2), 3)).requires_grad is False


def test_every_weight_zero_is_the_supervised_run_bit_for_bit(task):
    one, two = Supervised(net(task), task), mask_cycle(task, **OFF)
    assert not two.uses_unlabelled
    for m in (one, two): train(m, task)
    assert all(torch.equal(v, two.net.state_dict()[k]) for k, v in one.net.state_dict().items())
    assert all(torch.equal(v, two.ema.state_dict()[k]) for k, v in one.ema.state_dict().items())


def test_before_its_start_the_cycle_is_the_supervised_step(task):
    m = mask_cycle(task, start=0.5)
    assert [n for n, _ in m.updates(*batch(task), Clock(4, 10))] == ["net"]
    assert [n for n, _ in m.updates(*batch(task), Clock(5, 10))] == ["net", "discriminators"]


def test_segmenter_and_renderer_share_one_step_and_the_discriminators_have_their_own(task):
    m = mask_cycle(task)
    steps = m.updates(*batch(task), Clock(5, 10))
    name, losses = next(steps)
    params = [p for g in m.optimisers[name].param_groups for p in g["params"]]
    sum(losses.values()).backward(inputs=params)
    assert moves(m.net) and moves(m.R) and untouched(m.D_I, m.D_S)
    assert {id(p) for p in params} == {id(p) for n in (m.net, m.R) for p in n.parameters()}
    assert m.optimisers["net"].param_groups[1]["betas"] == (0.5, 0.999) and m.optimisers["net"].param_groups[1]["weight_decay"] == 0
    before = [p.grad.clone() for p in params]
    _, losses = next(steps)
    sum(losses.values()).backward()
    assert moves(m.D_I) and moves(m.D_S) and all(torch.equal(p.grad, b) for p, b in zip(params, before))


def test_the_regression_asks_known_pixels_only(task):
    lab, unl = batch(task)
    lab["mask"].fill_(IGNORE)
    _, losses = next(mask_cycle(task).updates(lab, unl, Clock(5, 10)))
    assert losses["regression"] == losses["supervised"] == losses["label cycle"] == 0 and all(torch.isfinite(v) for v in losses.values())


@pytest.mark.parametrize("norm", ["instance", "spectral"])
def test_the_first_step_leaves_the_discriminators_bit_identical(task, norm):
    m, accelerator = mask_cycle(task, critic={"norm": norm}).train(), make_accelerator("cpu")
    critics = nn.ModuleList([m.D_I, m.D_S])
    before, updates = {k: v.clone() for k, v in critics.state_dict().items()}, m.updates(*batch(task), Clock(5, 10))
    for learn in (False, True):
        name, losses = next(updates)
        optimise(m.optimisers[name], losses, accelerator)
        assert learn != all(torch.equal(v, before[k]) for k, v in critics.state_dict().items())


def test_a_hook_hands_masks_on(task):
    z = rand(2, 5, 6, 6) * 4
    hard = mask_cycle(task).mask(z)
    assert torch.equal(hard.unique(), torch.tensor([0.0, 1.0])) and torch.equal(hard.argmax(1), z.argmax(1))
    assert torch.equal(mask_cycle(task, Argmax).mask(z), hard) and torch.equal(mask_cycle(task, SoftMasks).mask(z), z.softmax(1))


def test_a_run_that_is_resumed_ends_bit_for_bit_alike(task, tmp_path):
    whole, parts = mask_cycle(task, pool=4), mask_cycle(task, pool=4)
    train(whole, task, 4)
    class Stop(Exception): pass
    updates = parts.updates
    def until(lab, unl, clock):
        if clock.step == 2: raise Stop
        yield from updates(lab, unl, clock)
    parts.updates = until
    with pytest.raises(Stop): train(parts, task, 4, out_dir=tmp_path, checkpoint_every=2)
    again = mask_cycle(task, pool=4)
    train(again, task, 4, out_dir=tmp_path, checkpoint_every=2)
    assert same(whole, again) and not same(whole, mask_cycle(task, pool=4))


def test_known_pixels_alone_are_compared():
    made, x, known = torch.ones(1, 3, 1, 2), torch.zeros(1, 3, 1, 2), torch.tensor([[[True, False]]])
    made[..., 1] = 9
    assert known_l1(made, x, known) == 1 and known_l1(made, x, known & False) == 0


def test_settings_are_attributes_and_what_cannot_work_is_refused(task):
    assert settings(mask_cycle(task, image_cycle=0.3))["image_cycle"] == 0.3 and mask_cycle(task).D_S.n_layers == 1
    with pytest.raises(UserError, match="image_cycle is -1"): mask_cycle(task, image_cycle=-1)
    with pytest.raises(UserError, match="start is 1.5"): mask_cycle(task, start=1.5)
    with pytest.raises(UserError, match="setting of MaskCycle 'hard' is not known"): mask_cycle(task, hard="softmax")
    with pytest.raises(UserError, match="32x32 pixels cannot be halved 4"): mask_cycle(task, renderer={"downs": 4})


def test_the_solutions_of_the_exercises():
    lesson = json.loads((Path(__file__).resolve().parents[1] / "nbs/46_mask_cycle.ipynb").read_text(encoding="utf-8"))
    cells = {c["id"]: "".join(c["source"]) for c in lesson["cells"]}
    code, = re.findall(r"```python\n(.*?)```", cells["solutions"], re.S)
    names = {"torch": torch, "one_hot": one_hot, "straight_through": straight_through, "MaskCycle": MaskCycle}
    exec(code, names)
    empty = [cells[f"exercise-{i}"].removeprefix("# ") for i in (1, 2, 3)]
    assert set(empty) == {"straight_through_at", "Tempered", "renamed"} <= set(names) and code.count("assert") == 5
