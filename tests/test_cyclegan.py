"CycleGAN: translators, who is moved by which loss, views, pairs and their content, and the recipe"
import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from semiseg_nb.adversarial import FAKE, REAL, PatchDiscriminator, lsgan
from semiseg_nb.catalogue import across, load_across, load_task
from semiseg_nb.clock import Clock
from semiseg_nb.core import IGNORE, UserError, generator, seed_everything
from semiseg_nb.cyclegan import (
    CycleGAN,
    Translator,
    add_noise,
    constant_then_linear,
    cyclegan,
    image_miou,
    passing,
    shift_and_flip,
    translation,
)
from semiseg_nb.engine import evaluate, fit, make_accelerator, optimise, settings
from semiseg_nb.networks import UNet, count_parameters
from semiseg_nb.supervised import Supervised


@pytest.fixture(scope="module")
def both(): return load_across("scenes", n_labelled=6, size=32, style="inverted")


@pytest.fixture(scope="module")
def task(both): return both[1]


def net(task, width=4):
    seed_everything(0)
    return UNet(task.n_classes, width=width)


def gan(task, segmenter=True, translator=None, critic=None, **kw):
    seed_everything(1)
    small = {"translator": {"ngf": 4, "blocks": 1} | (translator or {}), "critic": {"ndf": 4} | (critic or {})}
    return CycleGAN(task, net(task).eval() if segmenter else None, **small, **kw)


def batch(task, n=4):
    lab, unl = task.labelled.__getitems__(list(range(n))), task.unlabelled.__getitems__(list(range(n)))
    return {"image": lab["image"].float() / 255, "mask": lab["mask"].long()}, {"image": unl["image"].float() / 255}


def first_losses(m, task, step=0): return next(m.updates(*batch(task), Clock(step, 10)))[1]
def train(m, task, steps=3, **more): return fit(m, task, steps, batch_size=2, seed=3, progress=False, eval_on=False, **more)
def rand(*shape, seed=0): return torch.rand(*shape, generator=generator(seed, "test"))
def moves(*nets): return any(p.grad is not None and p.grad.abs().sum() > 0 for n in nets for p in n.parameters())
def untouched(*nets): return all(p.grad is None for n in nets for p in n.parameters())


def same(a, b):
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("downs, size", [(1, (32, 48)), (2, (32, 20)), (0, (17, 9))])
def test_a_translator_keeps_the_shape_and_stays_inside(downs, size):
    for up in ("resize", "deconv"):
        y = Translator(3, 3, 4, 1, downs, up)(5 * rand(2, 3, *size) - 2)
        assert y.shape == (2, 3, *size) and y.abs().max() < 1


def test_sides_that_do_not_halve_are_refused_with_the_numbers(task):
    with pytest.raises(UserError, match=r"34x32 pixels cannot be halved 2 time\(s\).*multiples of 4"): Translator(downs=2)(rand(1, 3, 34, 32))
    with pytest.raises(UserError, match="32x32 pixels cannot be halved 4"): gan(task, translator={"downs": 4})


def test_the_papers_networks_by_their_number_of_weights():
    assert count_parameters(Translator(ngf=64, blocks=9, downs=2, up="deconv")) == 11_378_179
    assert count_parameters(Translator(ngf=64, blocks=6, downs=2, up="deconv")) == 7_837_699


def test_first_weights_are_normal_with_deviation_002():
    w = torch.cat([m.weight.flatten() for m in Translator(ngf=32).modules() if isinstance(m, nn.Conv2d)])
    assert w.std().item() == pytest.approx(0.02, rel=0.02) and abs(w.mean().item()) < 1e-4


def test_skip_begins_with_the_image_itself_and_needs_equal_channels():
    x = 2 * rand(2, 3, 32, 32) - 1
    t = Translator(skip=True)
    assert torch.equal(t(x), x)
    t(x).sum().backward()
    assert t.layers[-1].weight.grad.abs().sum() > 0                                        # and can leave it
    with pytest.raises(UserError, match="adds 3 channels to 5"): Translator(5, 3, skip=True)


def test_a_transposed_convolution_starts_with_a_chequerboard_and_resizing_does_not():
    spread = {}
    for up in ("deconv", "resize"):
        seed_everything(3)
        with torch.no_grad(): y = Translator(up=up, blocks=1).layers[:-1](0.3 + 0.02 * rand(1, 3, 32, 32))[0, :, 4:28, 4:28]
        grids = torch.stack([y[:, r::2, c::2].abs().mean((1, 2)) for r in (0, 1) for c in (0, 1)])
        spread[up] = (grids.std(0) / grids.mean(0)).mean().item()
    assert spread["resize"] < 0.5 * spread["deconv"]


def test_each_step_moves_its_own_networks_only(task):
    m = gan(task)
    steps = m.updates(*batch(task), Clock(5, 10))
    before = {k: v.clone() for k, v in nn.ModuleList([m.D_A, m.D_B]).state_dict().items()}
    name, losses, _ = next(steps)
    assert name == "translators" and m.optimisers[name].param_groups[0]["params"] == [*m.G.parameters(), *m.F.parameters()]
    sum(losses.values()).backward(inputs=m.optimisers[name].param_groups[0]["params"])
    assert moves(m.G) and moves(m.F) and untouched(m.D_A, m.D_B, m.segmenter)
    assert all(torch.equal(v, before[k]) for k, v in nn.ModuleList([m.D_A, m.D_B]).state_dict().items())
    held = [p.grad.clone() for p in (*m.G.parameters(), *m.F.parameters())]
    name, losses = next(steps)
    sum(losses.values()).backward()
    assert name == "discriminators" and moves(m.D_A) and moves(m.D_B)
    assert all(torch.equal(p.grad, h) for p, h in zip((*m.G.parameters(), *m.F.parameters()), held))


@pytest.mark.parametrize("norm", ["instance", "spectral"])
def test_the_first_step_leaves_the_discriminators_bit_identical(task, norm):
    m, accelerator = gan(task, critic={"norm": norm}).train(), make_accelerator("cpu")
    critics = nn.ModuleList([m.D_A, m.D_B])
    before, updates = {k: v.clone() for k, v in critics.state_dict().items()}, m.updates(*batch(task), Clock(5, 10))
    for learn in (False, True):
        name, losses, *_ = next(updates)
        optimise(m.optimisers[name], losses, accelerator)
        assert learn != all(torch.equal(v, before[k]) for k, v in critics.state_dict().items())


def test_a_translator_is_reached_by_fooling_alone(task):
    m = gan(task)
    losses = first_losses(m, task)
    losses["fool B"].backward()
    assert moves(m.G) and untouched(m.F)


def test_a_discriminators_loss_is_halved(task):
    m = gan(task)
    for D in (m.D_A, m.D_B):
        nn.init.zeros_(D.layers[-1].weight)
    _, losses = list(m.updates(*batch(task), Clock(0, 10)))[1]
    assert losses["real A"] == losses["real B"] == 0.5 and losses["fake A"] == losses["fake B"] == 0      # answers 0 to everything


def test_two_identities_cost_nothing_and_change_nothing(task):
    _, losses, changes = next(gan(task, translator={"skip": True}).updates(*batch(task), Clock(0, 10)))
    assert all(losses[f"{k} {s}"] == 0 for k in ("cycle", "identity") for s in "AB") and changes["change A"] == changes["change B"] == 0


def test_the_defaults_are_the_papers_and_settings_are_attributes(task):
    m = CycleGAN(task)
    paper = {"cycle": 10.0, "identity": 0.5, "pool": 50, "lr": 2e-4, "decay": 0.5, "semantic": 0.0, "noise": 0.0}
    assert {k: settings(m)[k] for k in paper} == paper and not m.G.skip and any(isinstance(x, nn.GroupNorm) for x in m.D_A.modules())
    other = gan(task, cycle=3.0, critic={"n_layers": 1})
    assert settings(other)["cycle"] == 3.0 and settings(other)["critic"] == {"ndf": 4, "n_layers": 1}


def test_identity_is_the_other_way_round(task):
    "G is asked about images of B, F about images of A"
    m = gan(task)
    _, unl = batch(task)
    losses = first_losses(m, task)
    b = shift_and_flip(unl["image"] * 2 - 1, Clock(0, 10), "target", m.shift)
    assert losses["identity B"].item() == pytest.approx(5 * F.l1_loss(m.G(b), b).item(), rel=1e-4)
    assert "identity A" not in first_losses(gan(task, identity=0), task)


def test_noise_is_added_on_the_way_back_only(task):
    quiet_one, loud = (first_losses(gan(task, noise=s), task) for s in (0.0, 0.5))
    assert loud["fool B"] == quiet_one["fool B"] and loud["cycle A"] != quiet_one["cycle A"]
    x = rand(2, 3, 4, 4)
    assert add_noise(x, 0, Clock(0, 1), "s") is x and torch.equal(add_noise(x, 1, Clock(0, 1), "s"), add_noise(x, 1, Clock(0, 1), "s"))


def test_the_rate_is_constant_then_falls_to_one_part():
    factors = [constant_then_linear(s, 200) for s in range(200)]
    assert factors[:100] == [1] * 100 and all(a > b for a, b in zip(factors[99:], factors[100:])) and factors[-1] == pytest.approx(1 / 101)
    assert [constant_then_linear(s, 3, 0) for s in range(3)] == [1] * 3
    assert constant_then_linear(0, 3, 1.0) == 0.75 and constant_then_linear(2, 3, 1.0) == 0.25


def test_images_of_a_batch_do_not_see_each_other():
    for m in (Translator(ngf=4, blocks=1), PatchDiscriminator(3, 4)):
        x = rand(4, 3, 32, 32)
        assert torch.allclose(m(x), torch.cat([m(i[None]) for i in x]), atol=1e-5)


def test_masks_of_translated_pairs_are_the_sources_bit_for_bit(both, task):
    m, source = gan(task), both[0].labelled
    pairs, score = m.pairs(source)
    again, _ = m.pairs(source, batch_size=2)
    assert torch.equal(pairs.masks, source.masks) and len(score) == len(pairs) == 6 and pairs.images.dtype == torch.uint8
    assert (pairs.images.int() - again.images.int()).abs().max() <= 1                      # rounding at most: a pair does not depend on its batch
    assert not torch.equal(pairs.images, source.images) and [i.split("/", 1)[1] for i in pairs.ids] == list(source.ids)
    assert torch.equal(m.pairs(source)[0].images, pairs.images) and m.training
    assert gan(task, segmenter=False).pairs(source)[1].isnan().all()


def test_the_content_check_keeps_what_passes_and_at_least_the_better_half(both):
    pairs, score = both[0].labelled, torch.tensor([0.9, 0.1, 0.6, 0.7, 0.2, 0.8])
    kept = passing(pairs, score, 0.15)
    assert list(kept.ids) == [pairs.ids[i] for i in (0, 2, 3, 4, 5)] and torch.equal(kept.masks, pairs.masks[[0, 2, 3, 4, 5]])
    assert len(passing(pairs, score, 0.95)) == 4                                           # the lower one of the two in the middle stays
    assert len(passing(pairs, score, 0.0)) == 6


def test_miou_of_single_images():
    y = torch.tensor([[[0, 0, 1, IGNORE]], [[0, 0, 0, 0]], [[IGNORE] * 4]])
    p = torch.tensor([[[0, 1, 1, 2]], [[0, 0, 0, 0]], [[1, 1, 1, 1]]])
    assert image_miou(p, y, 3).tolist() == [0.5, 1.0, 0.0]


def test_the_semantic_loss_moves_translators_and_not_the_segmenter(task):
    m = gan(task, semantic=1.0)
    before = {k: v.clone() for k, v in m.segmenter.state_dict().items()}
    losses = first_losses(m, task, 5)
    losses["semantic"].backward()
    assert moves(m.G) and moves(m.F) and untouched(m.segmenter) and not any(p.requires_grad for p in m.segmenter.parameters())
    train(m, task, 2)
    assert all(torch.equal(v, before[k]) for k, v in m.segmenter.state_dict().items())     # buffers too
    with pytest.raises(UserError, match="semantic is 1.0, but there is no segmenter"): gan(task, segmenter=False, semantic=1.0)


def test_views_move_image_and_mask_alike_and_invent_nothing():
    y = (rand(4, 16, 16) * 200).long()
    x = y[:, None].float().expand(-1, 3, -1, -1)
    for step in range(8):
        x_m, y_m = shift_and_flip(x, Clock(step, 10), "views", 0.2, y)
        assert torch.equal(x_m[:, 1], y_m.float()) and set(y_m.unique().tolist()) <= set(y.unique().tolist())
    assert not torch.equal(y_m, y) and torch.equal(shift_and_flip(x, Clock(3, 10), "a"), shift_and_flip(x, Clock(3, 10), "a"))
    still = [shift_and_flip(x, Clock(s, 20), "none", 0.0) for s in range(20)]
    assert all(torch.equal(v[i], x[i]) or torch.equal(v[i], x[i].flip(-1)) for v in still for i in range(4))


def test_two_processes_share_one_draw():
    x = rand(4, 3, 8, 8)
    parts = [shift_and_flip(x[2 * r:2 * r + 2], Clock(0, 1, rank=r, world=2), "s") for r in (0, 1)]
    assert torch.equal(torch.cat(parts), shift_and_flip(x, Clock(0, 1), "s"))


def test_settings_that_cannot_work_are_refused_before_training(task):
    for name in ("cycle", "identity", "semantic", "noise", "lr"):
        with pytest.raises(UserError, match=f"{name} is -1"): gan(task, **{name: -1})
    with pytest.raises(UserError, match="shift is 0.7, but it should be between 0 and 0.5"): gan(task, shift=0.7)
    with pytest.raises(UserError, match="decay is 2"): gan(task, decay=2)
    with pytest.raises(UserError, match="setting of Translator 'block' is not known .did you mean 'blocks'"): gan(task, translator={"block": 1})
    with pytest.raises(UserError, match="at least 96 pixels"): gan(task, critic={"n_layers": 5})
    with pytest.raises(UserError, match="no segmenter to predict with"): gan(task, segmenter=False).predict(rand(1, 3, 32, 32))


def test_prediction_goes_through_the_source(task):
    m = gan(task).eval()
    x = rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(m.predict(x), m.segmenter(translation(m.F, x))) and m.to_target(x).min() >= 0 and m.to_target(x).max() <= 1
    assert 0 <= evaluate(m, task.val)["miou"] <= 1


@pytest.mark.parametrize("make", [lambda t: gan(t, semantic=0.1, noise=0.02, pool=4),
                                  lambda t: gan(t, segmenter=False, translator={"skip": True}, critic={"norm": "spectral"})])
def test_a_run_that_is_resumed_ends_bit_for_bit_alike(task, make, tmp_path):
    whole, parts = make(task), make(task)
    train(whole, task, 4)
    class Stop(Exception): pass
    updates = parts.updates
    def until(lab, unl, clock):
        if clock.step == 2: raise Stop
        yield from updates(lab, unl, clock)
    parts.updates = until
    with pytest.raises(Stop): train(parts, task, 4, out_dir=tmp_path, checkpoint_every=2)
    again = make(task)
    train(again, task, 4, out_dir=tmp_path, checkpoint_every=2)
    assert same(whole, again) and not same(whole, make(task))


def test_the_recipe_trains_source_translators_and_a_segmenter_on_the_pairs(both, task):
    story, trained, names = cyclegan(net(task), task, 2, translation_steps=1, oracle=both[0].val, gan={"translator": {"ngf": 4, "blocks": 1}}), None, []
    seed_everything(0)
    while True:
        try: stage = story.send(trained)
        except StopIteration as end:
            assert end.value is trained
            break
        trained = stage.method
        names.append(stage.name)
        fit(trained, stage.task or task, stage.steps, stage.batch_size or 2, seed=0, eval_on=False, progress=False)
        if stage.name == "translation": assert stage.batch_size == 4 and isinstance(trained, CycleGAN)
    assert names == ["source", "oracle", "translation", "segmenter"] and isinstance(trained, Supervised)
    assert all(i.startswith("translated/") for i in stage.task.labelled.ids) and stage.task.val is task.val and len(stage.task.labelled) >= 3


def test_a_misspelt_setting_of_the_recipe_stops_it_before_the_first_stage(task):
    with pytest.raises(UserError, match="did you mean 'cycle'"): next(cyclegan(net(task), task, 1, gan={"cicle": 1}))
    with pytest.raises(UserError, match="least is 1.5"): cyclegan(net(task), task, 1, least=1.5)


def test_a_short_run_learns_to_darken():
    "Two sets of plain noise, one half as bright: after a few dozen steps G darkens and F brightens"
    source = load_task("scenes", n_labelled=12, size=32)
    dark = source.unlabelled.images // 3
    task = across(source, replace_images(source.unlabelled, dark), source.val)
    seed_everything(0)
    m = CycleGAN(task, translator={"ngf": 4, "blocks": 1, "skip": True}, critic={"ndf": 8, "n_layers": 1, "norm": "none"}, identity=0.0, cycle=2.0, lr=3e-3, decay=0.0)
    fit(m, task, 40, 4, seed=0, progress=False, eval_on=False)
    x = source.val.images[:16].float() / 255
    with torch.no_grad(): assert m.to_target(x).mean() < 0.85 * x.mean() and m.to_source(x / 3).mean() > 1.15 * (x / 3).mean()


def replace_images(images, tensor):
    "The same set with other pictures"
    return type(images)(images.ids, tensor)


def test_the_solutions_of_the_exercises(task):
    lesson = json.loads((Path(__file__).resolve().parents[1] / "nbs/42_cyclegan.ipynb").read_text(encoding="utf-8"))
    cells = {c["id"]: "".join(c["source"]) for c in lesson["cells"]}
    code, = re.findall(r"```python\n(.*?)```", cells["solutions"], re.S)
    names = {"torch": torch, "F": F, "lsgan": lsgan, "REAL": REAL, "FAKE": FAKE, "CycleGAN": CycleGAN, "task": task}
    exec(code, names)
    asked = {name for i in (1, 2, 3) for name in cells[f"exercise-{i}"].removeprefix("# ").split(", ")}
    assert asked == {"loss_D", "loss_G", "cycle_loss", "identity_loss", "Bare"} <= set(names) and code.count("assert") == 3
