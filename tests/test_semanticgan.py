"SemanticGAN: what each loss moves, what the discriminators may see, penalties when due, and stored generators"
import json
import re
from pathlib import Path

import pytest
import torch
from helpers import NoMask
from torch import nn

from semiseg_nb.catalogue import load_task
from semiseg_nb.clock import Clock
from semiseg_nb.core import IGNORE, UserError, generator, seed_everything
from semiseg_nb.data import Images, Labelled, Task
from semiseg_nb.engine import evaluate, fit
from semiseg_nb.engine import settings as settings_in_force
from semiseg_nb.experiment import run
from semiseg_nb.ganaugment import augmentation
from semiseg_nb.inversion import SemanticEncoder
from semiseg_nb.semanticgan import (
    PatchDiscriminators,
    SemanticGAN,
    SemanticGenerator,
    agreement,
    encode_labels,
    feature_matching,
    first_edition,
    hinge_d,
    hinge_g,
    hinge_wrong,
    load_gan,
    pair_r1,
    real_images,
    share_distance,
)

ROOT = Path(__file__).resolve().parents[1]
SMALL = {"generator": {"d": 8, "width": 8}, "discriminator": {"ndf": 4}}
TINY = {4: 8, 8: 8, 16: 4}


def rand(*shape, seed=0): return torch.rand(*shape, generator=generator(seed, "test"))
def randn(*shape, seed=0): return torch.randn(*shape, generator=generator(seed, "test"))


def discs(n, seed):
    "Images (n,3,16,16) uint8 with one bright disc each, and their masks"
    g, at = generator(seed, "discs"), torch.arange(16)
    cx, cy, r = (torch.randint(low, high, (n, 1, 1), generator=g) for low, high in ((5, 11), (5, 11), (3, 5)))
    mask = (at[None, :, None] - cx) ** 2 + (at[None, None, :] - cy) ** 2 < r**2
    noise = torch.randint(0, 20, (n, 3, 16, 16), generator=g)
    return (torch.where(mask[:, None], 220, 20) + noise).to(torch.uint8), mask.to(torch.uint8)


def disc_task(n_labelled=8, n_unlabelled=24):
    sets, start = [], 0
    for n in (n_labelled, n_unlabelled, 6):
        x, y = discs(n, start)
        ids = [f"{start}/{i}" for i in range(n)]
        sets.append(Images(ids, x) if start == 1 else Labelled(ids, x, y, 2))
        start += 1
    return Task("discs", ("ground", "disc"), ((0, 0, 0), (255, 255, 255)), *sets)


@pytest.fixture(scope="module")
def task(): return disc_task()


class HeadAlone(SemanticGAN):
    "D_m moves the label branch and nothing before it"
    held = (1,)


class Softmax(SemanticGAN):
    "D_m sees probabilities as 2p - 1"
    def label_view(self, logits): return 2 * logits.softmax(1) - 1


def gan(task, cls=SemanticGAN, **kw):
    seed_everything(0)
    return cls(task, **SMALL | kw)


def losses_of(m, task, name, step=1):
    "The losses of one optimiser's first update in a step"
    return next(losses for n, losses, *_ in m.updates(*batch(task), Clock(step, 10)) if n == name)


def second(task, m=None, **kw):
    m = m or gan(task)
    seed_everything(1)
    return SemanticEncoder(m, task, **{"inversion_steps": 2} | kw)


def batch(task, n=4):
    lab, unl = task.labelled.__getitems__(list(range(n))), task.unlabelled.__getitems__(list(range(n)))
    return {"image": lab["image"].float() / 255, "mask": lab["mask"].long(), "index": lab["index"]}, {"image": unl["image"].float() / 255}


def state(net): return {k: v.clone() for k, v in net.state_dict().items()}
def unchanged(net, before): return all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
def train(m, task, steps=4, **more): return fit(m, task, steps, batch_size=4, seed=3, progress=False, eval_on=False, **more)


def blocks(G):
    return {"map": G.map, "const": [G.const], "convs": G.convs, "image": G.to_map[0], "label": G.to_map[1]}


def reached(G, loss):
    "Which blocks of the generator a loss sends a gradient to"
    parts = {k: list(v.parameters()) if isinstance(v, nn.Module) else v for k, v in blocks(G).items()}
    grads = {k: torch.autograd.grad(loss, v, retain_graph=True, allow_unused=True) for k, v in parts.items()}
    return {k for k, gs in grads.items() if any(g is not None and g.abs().sum() > 0 for g in gs)}


# 1
@pytest.mark.parametrize("k", [1, 2, 5])
def test_image_and_label_come_from_one_code(k):
    G = SemanticGenerator(16, k, d=8, width=8)
    x, y = G(randn(3, 8))
    assert x.shape == (3, 3, 16, 16) and y.shape == (3, k, 16, 16)
    assert len(G.to_map[0]) == len(G.to_map[1]) == 3


# 2
@pytest.mark.parametrize("cls, moved", [(SemanticGAN, {"map", "const", "convs", "label"}), (HeadAlone, {"label"})])
def test_the_pair_discriminator_never_reaches_the_image_branch(task, cls, moved):
    m = gan(task, cls)
    losses = losses_of(m, task, "G")
    assert reached(m.G, losses["G label"]) == moved and reached(m.G, losses["matching"]) == moved
    assert reached(m.G, losses["G image"]) == {"map", "const", "convs", "image"}                   # D_r never reaches the label branch


# 3
def test_an_update_moves_its_own_network_only(task):
    m = gan(task)
    networks = {"D_r": m.D_r, "D_m": m.D_m, "G": m.G}
    m.train()
    lab, unl = batch(task)
    seen = []
    before = {k: state(v) for k, v in networks.items()}
    for name, losses, *_ in m.updates(lab, unl, Clock(0, 10)):
        for other, net in networks.items():
            if other not in (name, "D_m"): assert unchanged(net, before[other]), (name, other)
        m.optimisers[name].zero_grad()
        sum(losses.values()).backward(inputs=[p for g in m.optimisers[name].param_groups for p in g["params"]])
        m.optimisers[name].step()
        assert not unchanged(networks[name], before[name])
        if name == "G": assert unchanged(m.D_r, before["D_r"]) and unchanged(m.D_m, before["D_m"])
        before = {k: state(v) for k, v in networks.items()}
        seen.append(name)
    assert seen == ["D_r", "D_m", "D_r", "D_m", "G"]


def test_the_generators_step_leaves_the_power_iteration_alone(task):
    m, seen = gan(task), {}
    assert any("_u" in k for k in m.D_m.state_dict()), "spectral norm keeps its vectors in buffers"
    for name, *_ in m.updates(*batch(task), Clock(1, 10)): seen[name] = state(m.D_m)
    assert all(torch.equal(v, seen["G"][k]) for k, v in seen["D_m"].items()), "asked while it stands still"
    assert m.D_m.training and all(p.requires_grad for p in m.D_m.parameters())


# 4
def test_a_real_label_is_plus_and_minus_one():
    y = torch.tensor([[[0, 3], [2, IGNORE]]])
    e = encode_labels(y, 4)
    assert set(e.unique().tolist()) == {-1.0, 1.0} and (e.sum(1) == 2 - 4).all()
    assert e.argmax(1).tolist() == [[[0, 3], [2, 0]]], "unknown pixels count as background"


def test_how_labels_are_shown_is_a_hook(task):
    z = randn(1, 2, 4, 4)
    assert gan(task).label_view(z) is z and torch.allclose(gan(task, Softmax).label_view(z).sum(1), torch.zeros(1, 4, 4), atol=1e-6)
    m = gan(task, Softmax)
    assert m.draw(2, Clock(0, 9), "x")[1].abs().max() <= 1


# 5
def maps(*answers): return [[torch.full((2, 3, 4, 4), float(a)), torch.full((2, 1, 4, 4), float(a))] for a in answers]


def test_hinge_and_feature_matching_by_hand():
    assert hinge_d(maps(0, 0), maps(0, 0)) == 1 and hinge_d(maps(1, 3), maps(-1, -2)) == 0
    assert hinge_d(maps(2), maps(1)) == 1 and hinge_d(maps(-1), maps(-1)) == 1
    assert hinge_g(maps(1, 4)) == -2.5 and hinge_d(maps(0), maps(0), 0.5) == 0.75
    assert hinge_wrong(maps(0, 2), torch.tensor([True, False])) == 2 and hinge_wrong(maps(1), torch.tensor([False, False])) == 0
    assert feature_matching(maps(1, 2), maps(1, 2)) == 0 and feature_matching(maps(0, 0), maps(1, 3)) == 2
    real = [[randn(1, 2).requires_grad_(), torch.zeros(1)]]
    fake = [[randn(1, 2, seed=1).requires_grad_(), torch.zeros(1)]]
    feature_matching(real, fake).backward()
    assert real[0][0].grad is None and fake[0][0].grad is not None


def test_a_wrong_pair_is_a_real_image_with_the_label_of_another(task, monkeypatch):
    m, looked = gan(task, augment_pairs="", flip=False, r1_m=0.0), []
    monkeypatch.setattr(m.D_m, "forward", lambda p: looked.append(p) or [[torch.zeros(len(p), 1, 2, 2)]])
    lab, unl = batch(task)
    def first(index): return next(losses for n, losses, *_ in m.updates(lab | {"index": torch.tensor(index)}, unl, Clock(1, 10)) if n == "D_m")
    losses = first([0, 1, 2, 2])
    pair, _, wrong = looked
    assert torch.equal(pair[:, :3], lab["image"] * 2 - 1) and torch.equal(pair[:, 3:], encode_labels(lab["mask"], 2))
    assert torch.equal(wrong[:, :3], pair[:, :3]) and torch.equal(wrong[:, 3:], pair[:, 3:].roll(1, 0))
    assert losses["D_m"] == 0.75 and losses["D_m mismatched"] == 0.25 and first([3, 3, 3, 3])["D_m mismatched"] == 0
    m.mismatched = 0.0
    assert first([0, 1, 2, 3]) == {"D_m": 1}


# 6
def test_patches_of_the_published_sizes():
    def sides(D, c, s): return [m[-1].shape[-1] for m in D(rand(1, c, s, s))]
    assert sides(PatchDiscriminators(6, 2, 4, n_layers=2), 6, 32) == [11, 7]
    assert sides(PatchDiscriminators(9, 2, 4, n_layers=2), 9, 32) == [11, 7], "whatever the number of classes"
    assert sides(PatchDiscriminators(11, 3, 2, n_layers=3), 11, 256) == [35, 19, 11]
    paper = PatchDiscriminators(3 + 8, 3, 64, 3, "instance")
    assert sum(p.numel() for p in paper.parameters()) == 3 * (11 * 64 * 16 + 64 + 16 * (64 * 128 + 128 * 256 + 256 * 512) + 512 * 16 + 1)


@pytest.mark.parametrize("n_layers, side", [(1, 16), (2, 34), (3, 70)])
def test_what_one_answer_sees(n_layers, side):
    pair = rand(1, 3, 128, 128).requires_grad_()
    answers = PatchDiscriminators(3, 1, 2, n_layers, norm="none")(pair)[0][-1]
    answers[0, 0, answers.shape[2] // 2, answers.shape[3] // 2].backward()
    assert int((pair.grad.abs().sum((0, 1)) > 0).any(0).sum()) == side


def test_r1_of_pairs_does_not_shrink_with_the_batch():
    "Defect of the published code: the mean over the batch comes before the gradient, which makes the penalty B^2 weaker"
    class Linear(nn.Module):
        def forward(self, pair): return [[(2 * pair).sum((1, 2, 3)).view(-1, 1, 1, 1).expand(-1, 1, 3, 3)]]
    for b in (1, 4): assert pair_r1(Linear(), rand(b, 2, 4, 4), 0.5).item() == pytest.approx(0.25 * 4 * 32)
    D = PatchDiscriminators(4, 2, 4, norm="none").eval()
    pair = rand(3, 4, 16, 16)
    assert pair_r1(D, pair, 1.0).item() == pytest.approx(sum(pair_r1(D, p[None], 1.0).item() for p in pair) / 3, rel=1e-4)


# 13
def test_no_mask_of_an_unlabelled_image_is_ever_read(task):
    lab, unl = batch(task)
    unl = NoMask(unl | {"mask": torch.zeros(4, 16, 16)})
    for _ in gan(task).updates(lab, unl, Clock(0, 10)): pass
    for _ in second(task).updates(lab, unl, Clock(0, 10)): pass


def test_both_kinds_of_images_are_real_to_d_r(task, monkeypatch):
    x, u = torch.zeros(4, 3, 16, 16), torch.ones(4, 3, 16, 16)
    drawn = torch.cat([real_images(x, u, gan(task).share, Clock(i, 100))[:, 0, 0, 0] for i in range(50)])
    assert set(drawn.tolist()) == {0.0, 1.0} and (drawn < 0.5).float().mean() == pytest.approx(8 / 32, abs=0.07)
    assert real_images(x[:1], u, 1.0, Clock(0, 9))[:, 0, 0, 0].tolist() == [0, 1, 1, 1], "as many as there are unlabelled ones"
    m, seen = gan(task, flip=False), {}
    monkeypatch.setattr(m, "image_view", lambda images, clock, stream: seen.setdefault(stream, images))
    lab, _ = batch(task)
    list(m.updates(lab, None, Clock(1, 9)))
    assert torch.equal(seen["real"], lab["image"] * 2 - 1), "alone, labelled images are all there is"


def test_a_pair_moves_as_one_and_only_images_change_colour(task):
    m, (lab, _) = gan(task), batch(task)
    pair = torch.cat([2 * lab["mask"][:, None].expand(-1, 3, -1, -1).float() - 1, encode_labels(lab["mask"], 2)], 1)    # the image is its mask
    seen = m.pair_view(pair, Clock(5, 9), "x")
    assert torch.equal(seen[:, 0] > 0, seen[:, 4] > 0) and not torch.equal(seen, pair)
    assert (seen[:, 3:].sum(1) == 0).all(), "one class for every pixel, padding is background"
    m.t_m = augmentation("colour")
    seen = m.pair_view(pair, Clock(5, 9), "x")
    assert torch.equal(seen[:, 3:], pair[:, 3:]) and not torch.equal(seen[:, :3], pair[:, :3])


def test_a_pair_is_mirrored_as_one(task, monkeypatch):
    m, (lab, unl), seen = gan(task), batch(task), {}
    lab["image"] = lab["mask"][:, None].expand(-1, 3, -1, -1).float()
    monkeypatch.setattr(m, "pair_view", lambda pair, clock, stream: seen.setdefault(stream, pair))
    list(m.updates(lab, unl, Clock(3, 9)))
    assert torch.equal(seen["real pair"][:, 0] > 0, seen["real pair"][:, 4] > 0)
    assert not torch.equal(seen["real pair"][:, :3] > 0, lab["image"] > 0), "some of them"


# 14
@pytest.fixture(scope="module")
def trained(task):
    m = gan(task, lr=5e-3, half_life=200.0)
    before = agreement(m.G, rule, 64)
    train(m, task, 150)
    return m, before


def rule(x):
    "An oracle for discs: bright is disc"
    bright = x.mean(1, keepdim=True) - 0.5
    return torch.cat([-bright, bright], 1) * 20


def test_a_short_training_brings_class_shares_closer(trained, task):
    m, before = trained
    after = agreement(m.ema.net, rule, 64)
    assert share_distance(after["shares"], task.labelled.masks) < share_distance(before["shares"], task.labelled.masks)
    assert after["miou"] > before["miou"]


def test_a_trained_generator_can_be_turned_round(trained, task):
    m = second(task, trained[0], inversion_steps=10)
    run = train(m, task, 60)
    first, last = (sum(run.history[i][k] for k in ("labelled image", "unlabelled image")) for i in (0, -1))
    assert last < 0.8 * first


# training goes on
@pytest.mark.parametrize("make", [gan, second])
def test_a_resumed_run_ends_bit_identical(task, tmp_path, make):
    "Defect of the published code: its checkpoint lacks the optimisers that resuming asks for"
    whole = make(task)
    train(whole, task, 4)
    broken = make(task)
    class Stop(KeyboardInterrupt): pass
    def updates(lab, unl, clock):
        if clock.step == 3: raise Stop
        yield from type(broken).updates(broken, lab, unl, clock)
    broken.updates = updates
    with pytest.raises(KeyboardInterrupt): train(broken, task, 4, out_dir=tmp_path, checkpoint_every=2)
    again = make(task)
    train(again, task, 4, out_dir=tmp_path)
    assert unchanged(again, state(whole))
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["optimisers"]
    assert set(saved) == set(again.optimisers) and all(o["state"] for o in saved.values())


def test_penalties_come_when_due_with_corrected_adam(task):
    class Often(SemanticGAN): r1_every, path_every = 4, 2
    m = gan(task, Often, path=2.0)
    found = [[(n, *ls) for n, ls, *_ in m.updates(*batch(task), Clock(i, 20))] for i in range(8)]
    counts = [sum(update[1] == name for step in found for update in step) for name in ("R1 of D_r", "R1 of D_m", "path length")]
    assert counts == [2, 2, 4]
    group = m.optimisers["D_m"].param_groups[0]
    assert group["lr"] == pytest.approx(1e-3 * 4 / 5) and group["betas"] == (0.0, 0.99 ** (4 / 5))
    assert m.path_mean > 0


def test_the_average_follows_the_generator(task):
    m = gan(task, half_life=8.0)
    train(m, task, 3)
    assert m.ema.decay == pytest.approx(0.5 ** (4 / 8)) and not any(p.requires_grad for p in m.ema.parameters())
    assert not unchanged(m.ema.net, state(m.G))


@pytest.mark.parametrize("more", [{"cls": Softmax, "discriminator": {"ndf": 4, "norm": "instance", "n_scales": 1}}, {"augment": "", "augment_pairs": ""},
                                  {"augment": "ada", "augment_pairs": "cutout", "flip": False}, {"r1": 0, "r1_m": 0, "fm": 0, "mismatched": 0}])
def test_every_option_trains(task, more):
    m = gan(task, **more)
    train(m, task, 2)
    assert all(torch.isfinite(p).all() for p in m.parameters())


# distance, intensity, agreement
def test_agreement_counts_what_the_oracle_says(task):
    G = gan(task).G
    with torch.no_grad():
        for m in G.to_map[1]: m.bias += torch.tensor([100.0, 0])
    always = {k: (lambda x, k=k: torch.eye(2)[k].view(1, 2, 1, 1).expand(len(x), -1, 16, 16) * 9) for k in (0, 1)}
    assert agreement(G, always[0], 8)["miou"] == 1 and agreement(G, always[1], 8)["miou"] == 0
    assert agreement(G, always[0], 8)["shares"] == [1, 0] and agreement(G, always[0], 8)["sure"] > 0.99
    assert share_distance([1.0, 0.0], torch.tensor([[[0, 1, IGNORE, 1, 1]]])) == pytest.approx(1.5)
    assert agreement(G, rule, 8, seed=1) == agreement(G, rule, 8, seed=1)


# mistakes
def test_batches_of_unequal_size_are_matched_as_far_as_they_go(task):
    real, fake = ([[torch.full((n, 1, 2, 2), v), torch.zeros(n, 1, 1, 1)]] for n, v in ((1, 0.0), (3, 2.0)))
    assert feature_matching(real, fake).item() == 2


@pytest.mark.parametrize("more, text", [
    ({"discriminator": {"norm": "batch"}}, "norm 'batch'"), ({"generator": {"dd": 4}}, "setting of SemanticGenerator 'dd' is not known"),
    ({"generator": 64}, "generator is 64, but it should be a dict"), ({"label_act": "softmax"}, "setting of SemanticGAN 'label_act' is not known"),
    ({"mixing": 1.5}, "mixing is 1.5, but it should be between 0 and 1"), ({"r1_m": -1}, "r1_m is -1"), ({"half_life": 0}, "half_life is 0"),
    ({"discriminator": {"n_layers": 0}}, "n_layers is 0"), ({"augment_pairs": "rotation"}, "augmentation 'rotation'"),
    ({"augment_pairs": "ada"}, "watches D_r"),
])
def test_a_setting_that_cannot_work_is_refused(task, more, text):
    with pytest.raises(UserError, match=text): SemanticGAN(task, **SMALL | more)


def test_settings_are_attributes_of_their_own_names(task):
    own = dict(SMALL, lr=1e-3, dm_lr=2e-3, r1=0.1, r1_m=0.2, path=1.0, mixing=0.9, half_life=10.0, augment="colour", augment_pairs="",
               mismatched=0.25, fm=1.0, flip=False)
    assert settings_in_force(gan(task, **own)) == own and len(own) == 14


def test_it_labels_no_given_image(task):
    with pytest.raises(UserError, match="labels no given image.*SemanticEncoder"): evaluate(gan(task), task.val)


def test_the_runner_refuses_what_labels_nothing(task):
    with pytest.raises(UserError, match="SemanticGAN is no whole method: run a recipe"): run(SemanticGAN, task, steps=1)


# files
def test_a_stored_generator_comes_back_with_its_discriminator(task, tmp_path):
    m = gan(task, mixing=0.9)
    train(m, task, 2)
    again, card = load_gan(m.save(tmp_path / "g", dataset={"name": "discs"}, note="here"), task)
    assert card["note"] == "here" and again.mixing == 0.9 and unchanged(again.ema.net, state(m.ema.net)) and unchanged(again.D_r, state(m.D_r))
    with pytest.raises(UserError, match="There is no weights file"): load_gan(tmp_path / "none", task)
    with pytest.raises(UserError, match="does not hold a SemanticGAN for 'discs' .its card says 'faces'"):
        load_gan(m.save(tmp_path / "f", dataset={"name": "faces"}), task)
    with pytest.raises(UserError, match="does not fit this network"):
        load_gan(m.save(tmp_path / "h", dataset={"name": "scenes"}), load_task("scenes", n_labelled=4, size=32))


def test_the_stored_generator_of_the_first_edition_is_read():
    path = ROOT / "nbs/weights/41_semanticgan.safetensors"
    m, card = load_gan(path, load_task("portraits", n_labelled=4, size=32))
    assert m.G.d == 64 and m.discriminator == {"ndf": 24, "n_layers": 1, "n_scales": 2, "norm": "none"} and card["steps"] == 2500
    old = card["gan"]
    assert first_edition(first_edition(old)) == first_edition(old) and not {"label_act", "ndf", "d"} & set(first_edition(old))


def test_images_that_are_no_squares_are_refused():
    x, y = torch.zeros(4, 3, 16, 32, dtype=torch.uint8), torch.zeros(4, 16, 32, dtype=torch.uint8)
    wide = Task("wide", ("a", "b"), ((0, 0, 0),) * 2, Labelled(["a"], x[:1], y[:1], 2), Images(["b"], x[1:2]), Labelled(["c"], x[2:3], y[2:3], 2))
    with pytest.raises(UserError, match="16x32"): SemanticGAN(wide)


# the lesson
def test_the_solutions_of_the_exercises():
    lesson = json.loads((ROOT / "nbs/41_semanticgan.ipynb").read_text(encoding="utf-8"))
    cells = {c["id"]: "".join(c["source"]) for c in lesson["cells"]}
    code, = re.findall(r"```python\n(.*?)```", cells["solutions"], re.S)
    names = {"torch": torch}
    exec(code, names)
    empty = [cells[f"exercise-{i}"].removeprefix("# ").strip() for i in (1, 2)]
    assert set(empty) == {"sees_second", "accuracy_of_each"} <= set(names) and code.count("assert") == 2
