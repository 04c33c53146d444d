"What adversarial methods share: how far an answer sees, who is moved by asking, what void gives away, whom to believe"
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from semiseg_nb.adversarial import (
    FAKE,
    REAL,
    FCDiscriminator,
    PatchDiscriminator,
    Pool,
    answer,
    bce_map,
    fresh_masks,
    gate,
    hide,
    hinge,
    instance_norm,
    lsgan,
    straight_through,
    upper_part,
    verdicts,
)
from semiseg_nb.catalogue import load_task
from semiseg_nb.clock import Clock
from semiseg_nb.core import IGNORE, UserError, generator, seed_everything
from semiseg_nb.losses import cross_entropy, one_hot
from semiseg_nb.networks import count_parameters

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def task(): return load_task("scenes", n_labelled=6, size=32)


def rand(*shape, seed=0): return torch.rand(*shape, generator=generator(seed, "test"))
def randn(*shape, seed=0): return torch.randn(*shape, generator=generator(seed, "test"))


# ---------------------------------------------------------------- discriminators

@pytest.mark.parametrize("size", [(64, 64), (65, 65), (96, 128), (321, 321)])
def test_one_logit_per_pixel_and_a_grid_of_halvings(size):
    for n in (3, 5):
        D = FCDiscriminator(4, ndf=2, n_layers=n)
        p = rand(1, 4, *size)
        assert D(p).shape == (1, 1, *size) and D.layers(p).shape[-2:] == tuple(s // 2**n for s in size)


def test_the_papers_networks_by_their_number_of_weights():
    assert count_parameters(FCDiscriminator(21, 64, 5)) == 2_783_169
    assert count_parameters(FCDiscriminator(21, 32, 4)) == 176_865
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm | nn.Sigmoid) for m in FCDiscriminator(21).modules())
    assert count_parameters(PatchDiscriminator(3, 64, 3)) == 2_764_737
    assert PatchDiscriminator(3, 64, 3)(rand(1, 3, 256, 256)).shape == (1, 1, 30, 30)


def test_height_and_width_are_not_swapped():
    "Defect of the published code: `Upsample(size=(w, h))`"
    D, p = FCDiscriminator(3), torch.zeros(1, 3, 32, 64)
    p[..., :8] = 1
    d = D(p).detach()[0, 0]
    assert d.shape == (32, 64) and d[:, :4].mean() != d[:, -4:].mean()
    assert (d[4:28, -8:] - d[16, -8:]).abs().max() < 1e-5


@pytest.mark.parametrize("n, sees", [(1, 16), (2, 34), (3, 70)])
def test_an_answer_sees_so_many_pixels_and_no_more(n, sees):
    x = rand(1, 1, 128, 128).requires_grad_()
    d = PatchDiscriminator(1, 4, n, norm="none")(x)
    d[0, 0, d.shape[2] // 2, d.shape[3] // 2].backward()
    touched = x.grad.abs().sum((0, 1))
    assert touched.any(0).sum() == touched.any(1).sum() == sees


def test_a_map_that_leaves_no_answer_is_refused():
    with pytest.raises(UserError, match="3 layers leaves nothing of a map of 7x40.*at least 8"): FCDiscriminator(4)(rand(1, 4, 7, 40))
    assert PatchDiscriminator(3, 4, 3)(rand(1, 3, 24, 24)).shape == (1, 1, 1, 1)
    with pytest.raises(UserError, match="3 layers leaves nothing of a map of 23x64.*at least 24"): PatchDiscriminator(3, 4, 3)(rand(1, 3, 23, 64))


@pytest.mark.parametrize("make, text", [
    (lambda: PatchDiscriminator(norm="spektral"), "did you mean 'spectral'"), (lambda: PatchDiscriminator(n_layers=0), "n_layers is 0"),
    (lambda: FCDiscriminator(4, ndf=0), "ndf is 0"), (lambda: FCDiscriminator(4, n_layers=2.5), "n_layers is 2.5"), (lambda: Pool(-1, (1, 1, 1)), "pool is -1"),
])
def test_settings_that_make_no_sense_are_refused(make, text):
    with pytest.raises(UserError, match=text): make()


def test_spectral_norm_bounds_every_layer():
    D = PatchDiscriminator(norm="spectral")
    for _ in range(30): D(rand(2, 3, 32, 32))
    for m in D.modules():
        if isinstance(m, nn.Conv2d): assert torch.linalg.matrix_norm(m.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.05)


def test_first_weights_are_normal_with_deviation_002():
    convs = [m for m in PatchDiscriminator(3, 64, 3).modules() if isinstance(m, nn.Conv2d)]
    w = torch.cat([m.weight.flatten() for m in convs])
    assert w.std().item() == pytest.approx(0.02, rel=0.02) and abs(w.mean().item()) < 1e-4
    assert all((m.bias == 0).all() for m in convs)


def test_instance_norm_is_torchs_and_forgets_brightness():
    x = rand(4, 6, 8, 8)
    assert torch.allclose(instance_norm(6)(x), nn.InstanceNorm2d(6)(x), atol=1e-5)
    assert torch.allclose(instance_norm(6)(x + rand(1, 6, 1, 1)), instance_norm(6)(x), atol=1e-4)


def test_images_of_a_batch_do_not_see_each_other():
    x = rand(4, 3, 32, 32)
    for D in (PatchDiscriminator(3, 4), FCDiscriminator(3, 4)):
        assert torch.allclose(D(x), torch.cat([D(i[None]) for i in x]), atol=1e-5)


# ---------------------------------------------------------------- asking

@pytest.mark.parametrize("make", [lambda: FCDiscriminator(3), lambda: PatchDiscriminator(3, norm="spectral")], ids=["plain", "spectral norm"])
def test_held_is_not_cut(make):
    D, z = make(), randn(1, 3, 16, 16).requires_grad_()
    before = {k: v.clone() for k, v in D.state_dict().items()}
    answer(D, z.softmax(1)).mean().backward()
    assert z.grad.abs().sum() > 0 and all(p.grad is None and p.requires_grad for p in D.parameters())
    assert D.training and all(torch.equal(v, before[k]) for k, v in D.state_dict().items())
    assert all(m.training for m in D.modules())


def test_what_was_frozen_before_stays_frozen_and_an_error_leaves_nothing_behind():
    D = FCDiscriminator(3)
    D.layers[0].requires_grad_(False)
    answer(D, rand(1, 3, 16, 16))
    assert [p.requires_grad for p in D.parameters()] == [False, False, True, True, True, True]
    with pytest.raises(UserError): answer(D, rand(1, 3, 4, 4))
    assert [p.requires_grad for p in D.parameters()] == [False, False, True, True, True, True]


# ---------------------------------------------------------------- losses

def test_no_idea_is_ln2_and_no_pixel_is_nothing():
    zero, d = torch.zeros(1, 1, 4, 4), randn(1, 1, 4, 4)
    for target in (REAL, FAKE): assert bce_map(zero, target).item() == pytest.approx(math.log(2))
    for t in (REAL, FAKE, 0.9): torch.testing.assert_close(bce_map(d, t), F.binary_cross_entropy_with_logits(d, torch.full_like(d, t)))
    assert bce_map(d, FAKE, torch.zeros(1, 4, 4, dtype=torch.bool)) == 0


def test_the_optimum_of_least_squares():
    assert lsgan(torch.ones(3), REAL) + lsgan(torch.zeros(3), FAKE) == 0
    assert lsgan(torch.zeros(3), REAL) == 1 and lsgan(torch.tensor([0.5, 2.0]), REAL).item() == pytest.approx(0.625)


def test_a_hinge_is_one_for_a_critic_that_knows_nothing_and_zero_for_one_that_is_sure():
    assert hinge(torch.zeros(2, 1, 3, 3), torch.zeros(2, 1, 3, 3)) == 1 and hinge(torch.ones(4), -torch.ones(4)) == 0
    assert hinge(torch.tensor([0.4]), torch.tensor([-0.2])).item() == pytest.approx(0.7)


# ---------------------------------------------------------------- void

def test_void_pixels_have_no_effect():
    y, d = torch.randint(0, 3, (2, 16, 16), generator=generator(0, "y")), randn(2, 1, 16, 16)
    y[:, :, 10:] = IGNORE
    v, z = y != IGNORE, randn(2, 3, 16, 16, seed=1)
    other, d2 = torch.where(v[:, None], z, z + 5 * randn(2, 3, 16, 16, seed=2)), torch.where(v[:, None], d, d + 3)
    assert torch.equal(cross_entropy(z, y), cross_entropy(other, y)) and torch.equal(bce_map(d, REAL, v), bce_map(d2, REAL, v))
    D = FCDiscriminator(3)
    hidden, shown = ([bce_map(D(look(t.softmax(1))), REAL, v) for t in (z, other)] for look in (lambda p: hide(p, v), lambda p: p))
    assert torch.equal(*hidden) and not torch.equal(*shown)                                # the leak: neighbours see void pixels


def test_a_prediction_is_hidden_as_a_mask_is():
    y, p = torch.tensor([[[0, 2, IGNORE]]]), rand(1, 3, 1, 3)
    assert one_hot(y, 3)[0, :, 0].T.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]
    h = hide(p, y != IGNORE)
    assert torch.equal(h[..., :2], p[..., :2]) and (h[..., 2] == 0).all()


def test_verdicts_count_what_they_are_told_to_count():
    d, counts = torch.tensor([[[[-1.0, 2.0]]]]), torch.tensor([[[True, False]]])
    found = verdicts(d, counts, d, counts)
    assert found["right on fakes"] == 1 and found["right on real"] == 0 and found["verdict on fakes"] == torch.sigmoid(d[0, 0, 0, 0])
    whole = verdicts(d.flatten()[:, None], None, d.flatten()[:, None], None)               # one answer per image
    assert whole["right on fakes"] == whole["right on real"] == 0.5
    assert not verdicts(d.requires_grad_(), counts, d, counts)["verdict on real"].requires_grad


# ---------------------------------------------------------------- whom to believe

def test_the_upper_part_is_the_part_asked_for():
    c, valid = rand(3, 17, 16), rand(3, 17, 16, seed=1) > 0.3
    for q in (0.0, 0.1, 0.5, 0.77, 1.0):
        M = upper_part(c, q, valid)
        assert abs(M.sum() - (1 - q) * valid.sum()) <= 1 and not (M & ~valid).any()
        if M.any() and q: assert c[M].min() > c[valid & ~M].max()


def test_groups_are_ordered_each_by_itself():
    c, valid = rand(3, 17, 16), rand(3, 17, 16, seed=1) > 0.3
    labels = torch.randint(0, 4, (3, 17, 16), generator=generator(0, "y"))
    labels[labels == 2] = 3                                                                # a class that does not occur
    M = upper_part(c, 0.7, valid, labels, 5)
    assert not (M & ~valid).any()
    for k in (0, 1, 3):
        of = valid & (labels == k)
        assert abs((M & of).sum() - 0.3 * of.sum()) <= 1 and c[M & of].min() > c[of & ~M].max()
    assert torch.equal(upper_part(c, 0.7, valid, torch.zeros_like(labels), 1), upper_part(c, 0.7, valid))


def test_gating_keeps_the_background_and_obeys_also_when_all_logits_are_negative():
    z = randn(2, 4, 5, 5) - 20
    keep = torch.tensor([[False, True, False, True], [True, True, True, True]])
    out = gate(z, keep)
    assert set(out[0].argmax(0).unique().tolist()) <= {0, 1, 3} and torch.equal(out[1], z[1])
    assert (gate(z, torch.zeros(2, 4, dtype=torch.bool)).argmax(1) == 0).all()
    assert torch.equal(gate(z, torch.ones(2, 4, dtype=torch.bool)), z) and torch.equal(out[0, [0, 1, 3]], z[0, [0, 1, 3]])


def test_fresh_masks_are_a_stream_of_their_own(task):
    clock = Clock(7, 100, seed=1)
    y = fresh_masks(task.labelled, 4, clock)
    assert y.dtype == torch.int64 and torch.equal(y, fresh_masks(task.labelled, 4, clock))
    halves = [fresh_masks(task.labelled, 2, Clock(7, 100, seed=1, rank=r, world=2)) for r in (0, 1)]
    assert torch.equal(torch.cat(halves), y)
    cropped = load_task("scenes", n_labelled=4, size=32, crop=(16, 24)).labelled
    whole = fresh_masks(cropped, 4, clock)
    assert whole.shape == (4, 16, 24)
    assert torch.equal(torch.cat([fresh_masks(cropped, 2, Clock(7, 100, seed=1, rank=r, world=2)) for r in (0, 1)]), whole)


# ---------------------------------------------------------------- pool

def test_the_pool_gives_back_the_first_ones_and_then_half_old_ones():
    pool, shown = Pool(50, (1, 1, 1)), []
    for t in range(1050):
        shown.append(pool(torch.full((1, 1, 1, 1), float(t)), generator(0, "pool", t)).item())
        assert pool.n <= 50 and pool.images.shape[0] == 50
    assert shown[:50] == list(range(50))
    late = shown[50:]
    old = sum(s < t for t, s in enumerate(late, 50))
    assert 450 < old < 550 and all(s <= t for t, s in enumerate(late, 50))
    assert len(set(late)) == len(late)                                                     # an old one is shown once: its place is taken


def test_a_batch_that_fills_the_pool_half_way():
    pool, x = Pool(3, (1, 1, 1)), torch.arange(5.).view(5, 1, 1, 1)
    assert torch.equal(pool(x[:2], generator(0)), x[:2])
    shown = pool(x[2:4], generator(0))
    assert shown[0] == 2 and pool.n == 3
    assert sorted([*pool.images.flatten().tolist(), shown[1].item()]) == [0, 1, 2, 3]      # nothing is lost, nothing is doubled


def test_what_the_pool_gives_has_no_history_and_size_0_is_no_pool():
    x = rand(2, 3, 4, 4).requires_grad_()
    for size in (0, 2, 8): assert not Pool(size, (3, 4, 4))(x * 1, generator(0)).requires_grad
    assert torch.equal(Pool(0, (3, 4, 4))(x, generator(0)), x)
    with pytest.raises(UserError, match="batch of 3 does not fit into a pool of 2"): Pool(2, (1, 1, 1))(rand(3, 1, 1, 1), generator(0))


def test_a_pool_survives_a_checkpoint():
    a, b = Pool(4, (1, 1, 1)), Pool(4, (1, 1, 1))
    for t in range(7): a(torch.full((1, 1, 1, 1), float(t)), generator(t))
    b.load_state_dict(a.state_dict())
    for t in range(7, 12):
        x = torch.full((1, 1, 1, 1), float(t))
        assert torch.equal(a(x, generator(t)), b(x, generator(t)))


# ---------------------------------------------------------------- straight through

def test_straight_through_is_one_hot_forward_and_softmax_backward():
    z = (rand(2, 5, 6, 6) * 4).requires_grad_()
    w = rand(2, 5, 6, 6, seed=1)
    hard = straight_through(z.softmax(1))
    assert torch.allclose(hard, one_hot(z.argmax(1), 5), atol=1e-6, rtol=0) and torch.equal(hard.argmax(1), z.argmax(1))
    found, = torch.autograd.grad((hard * w).sum(), z)
    right, = torch.autograd.grad((z.softmax(1) * w).sum(), z)
    assert torch.equal(found, right)
    assert not straight_through(one_hot(z.argmax(1), 5)).requires_grad


# ---------------------------------------------------------------- a discriminator learns, and the lesson's solutions are right

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


def test_the_solution_of_the_lesson_passes_its_check(capsys):
    cells = {c["id"]: "".join(c["source"]) for c in json.loads((ROOT / "nbs/19_adversarial.ipynb").read_text())["cells"]}
    solution, = re.findall(r"```python\n(.*?)```", cells["solutions"], re.S)
    stub, rest = cells["exercise-check"].split("\n", 1)
    assert stub.startswith("def straight_through_at") and "yours" in stub
    exec(solution + rest, {"torch": torch, "straight_through": straight_through})
    assert capsys.readouterr().out == "right\n"
    assert hinge(torch.tensor([0.5]), torch.tensor([0.5])) == 1                            # exercise 4
