"GAN augmentation: what moves, what stays, how often, and derivatives"
import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from semiseg_nb.clock import Clock
from semiseg_nb.core import UserError, generator
from semiseg_nb.ganaugment import (
    Ada,
    DiffAugment,
    augmentation,
    background,
    bilinear,
    colours,
    cutout,
    geometry,
    jitter,
    pixels_at,
    random_flip,
    slide,
    warp,
)


def rng(seed=0): return generator(seed, "test")
def randn(*shape, seed=0, **kw): return torch.randn(*shape, generator=rng(seed), **kw)
def rand(*shape, seed=0): return torch.rand(*shape, generator=rng(seed))


def one_hot(n=4, k=5, side=16): return F.one_hot(torch.randint(k, (n, side, side), generator=rng()), k).permute(0, 3, 1, 2).float() * 2 - 1


@pytest.mark.parametrize("policy", ["colour", "translation", "cutout", "translation,colour,cutout", ""])
def test_diffaugment_keeps_shape_gradient_and_one_class_per_pixel(policy):
    x, y, T = rand(4, 3, 16, 16).requires_grad_(), one_hot(), augmentation(policy)
    seen, maps = T(x, y, rng())
    assert seen.shape == x.shape and seen.dtype == x.dtype and set(maps.unique().tolist()) == {-1.0, 1.0} and (maps.sum(1) == 2 - 5).all()
    seen.square().sum().backward()
    assert (x.grad.flatten(1).abs().sum(1) > 0).all()
    assert torch.equal(T(x, None, rng()), seen), "the same draws with and without a label map"
    assert torch.equal(seen, x) == (policy == "")


def test_image_and_label_map_move_together():
    "A map that is a picture of the image stays one"
    x = one_hot(6, 3)
    for move in (slide, cutout):
        seen, maps = move(x, x, rand(6, 1, 1), rand(6, 1, 1, seed=1))
        kept = seen.abs().sum(1) > 0
        assert torch.equal(seen[kept[:, None].expand_as(seen)], maps[kept[:, None].expand_as(maps)]) and 0.2 < kept.float().mean() < 1
        assert (maps.argmax(1)[~kept] == 0).all()


def test_colours_leave_labels_alone():
    y = one_hot()
    assert torch.equal(DiffAugment("colour")(rand(4, 3, 16, 16), y, rng())[1], y)


def test_translation_is_at_most_an_eighth_of_the_side():
    x = torch.ones(200, 1, 16, 16)
    moved, _ = slide(x, None, rand(200, 1, 1), rand(200, 1, 1, seed=1))
    lost = 16 - moved[:, 0].amax(2).sum(1)
    assert lost.unique().tolist() == [0, 1, 2]
    assert torch.equal(slide(x[:2], None, torch.tensor([0.0, 0.9999999]).view(2, 1, 1), torch.full((2, 1, 1), 0.5))[0][0, 0, :14], x[0, 0, :14])


def test_cutout_blanks_a_square_of_half_the_side():
    cut, _ = cutout(torch.ones(100, 1, 16, 16), None, rand(100, 1, 1), rand(100, 1, 1, seed=1))
    blank = (cut == 0).sum((1, 2, 3))
    assert 16 <= blank.min() < blank.max() == 64
    assert (cutout(torch.ones(1, 1, 16, 16), None, torch.full((1, 1, 1), 0.5), torch.full((1, 1, 1), 0.5))[0] == 0).sum() == 64


def test_colour_by_hand():
    x, half = rand(2, 3, 4, 4), torch.full((2, 1, 1, 1), 0.5)
    assert torch.allclose(jitter(x, half, half, half), x, atol=1e-6)
    assert torch.allclose(jitter(x, half + 0.25, half, half), x + 0.25, atol=1e-6)
    assert torch.allclose(jitter(x, half, half - 0.5, half), x.mean(1, keepdim=True).expand_as(x), atol=1e-6)
    mean = x.mean((1, 2, 3), keepdim=True)
    assert torch.allclose(jitter(x, half, half, half - 0.5), mean + (x - mean) / 2, atol=1e-6)


def test_an_unknown_augmentation_is_refused():
    with pytest.raises(UserError, match="augmentation 'colors' is not known.*did you mean 'colour'"): DiffAugment("translation,colors")


def test_a_pixel_without_image_is_background():
    assert background(torch.zeros(2, 3, 4, 4)).flatten().tolist() == [1, -1, -1] and background(torch.zeros(2, 1, 4, 4)).item() == -1


def test_bilinear_sampling_has_two_derivatives_and_mirrors_the_border():
    x = randn(1, 1, 3, 4, dtype=torch.float64).requires_grad_()
    row, col = (rand(1, 5, 2, seed=i).double() * 6 - 2 for i in range(2))
    assert torch.autograd.gradcheck(lambda x: bilinear(x, row, col), x) and torch.autograd.gradgradcheck(lambda x: bilinear(x, row, col).square(), x)
    at = torch.tensor([[[-1.0, 0.0, 4.0, 3.0]]]).double()
    assert torch.allclose(bilinear(x, 0 * at + 1, at)[0, 0, 0], x[0, 0, 1, [1, 0, 2, 3]])
    grid = torch.stack([col / 3 * 2 - 1, row / 2 * 2 - 1], 3)
    assert torch.allclose(bilinear(x, row, col), F.grid_sample(x, grid, padding_mode="reflection", align_corners=True))
    assert torch.equal(pixels_at(x, torch.tensor([[[2]]]), torch.tensor([[[3]]])).flatten(), x[0, 0, 2, 3:])


def test_ada_at_zero_is_the_identity_bit_for_bit():
    x, y, T = rand(4, 3, 16, 16), one_hot(), Ada()
    seen, maps = T(x, y, rng())
    assert torch.equal(seen, x) and torch.equal(maps, y)


def test_ada_at_one_changes_every_image_and_moves_labels_along():
    x, T = one_hot(6, 3), Ada()
    T.p.fill_(1.0)
    matrix = geometry(6, 16, T.p, rng())
    _, maps = T(x, x, rng())
    assert torch.equal(maps, warp(x, matrix)) and all(not torch.allclose(a, b, atol=1e-2) for a, b in zip(maps, x))


@pytest.mark.parametrize("p", [0.2, 0.7])
def test_ada_changes_as_often_as_it_says(p):
    n, eye = 4000, torch.eye(2, 3)
    changed = (geometry(n, 32, torch.tensor(p), rng()) - eye).abs().amax((1, 2)) > 1e-6
    nothing = (1 - p / 2) * (1 - 3 * p / 4) * (1 - p) ** 5             # half of the flips and a quarter of the quarter turns do nothing
    assert abs(1 - changed.float().mean() - nothing) < 0.02
    coloured = (colours(n, torch.tensor(p), rng()) - torch.eye(3, 4)).abs().amax((1, 2)) > 1e-6
    assert abs(1 - coloured.float().mean() - (1 - p) ** 4 * (1 - p / 2)) < 0.02


def test_ada_follows_the_discriminator():
    T = Ada(kimg=1)
    for step in range(4): T.watch(torch.ones(25, 1), step)
    assert abs(T.p - 0.1) < 1e-6
    for step in range(4): T.watch(-torch.ones(25, 1), step)
    assert T.p == 0
    for step in range(200): T.watch(torch.ones(25, 1), step)
    assert abs(T.p - 0.8) < 1e-6, "it stops at 0.8; published code lets it grow beyond 1"


def test_ada_keeps_p_in_the_checkpoint(): assert {"p", "signs"} == set(Ada().state_dict())


def test_what_watches_returns_what_is_logged():
    assert DiffAugment().watch(torch.ones(4, 1), 0) == {}
    logged = Ada(kimg=0.01, every=1).watch(torch.ones(4, 1), 0)
    assert logged["p"] == pytest.approx(0.4)


@pytest.mark.parametrize(("settings", "text"), [({"kimg": 0}, "kimg is 0.*more than 0"), ({"p_max": 2.0}, "p_max is 2.0"), ({"every": 0}, "every is 0")])
def test_an_ada_that_cannot_work_is_refused(settings, text):
    with pytest.raises(UserError, match=text): Ada(**settings)


def test_a_flip_turns_half_and_takes_all_maps_along():
    x, y = rand(40, 3, 4, 6), torch.arange(40 * 24).view(40, 4, 6)
    x2, y2 = random_flip(Clock(3, 9), "flip", x, y)
    turned = [torch.equal(a, b.flip(-1)) for a, b in zip(x2, x)]
    assert turned == [torch.equal(a, b.flip(-1)) for a, b in zip(y2, y)] and 10 < sum(turned) < 30
    assert all(torch.equal(a, b) for a, b, t in zip(x2, x, turned) if not t)
    halves = [random_flip(Clock(3, 9, rank=r, world=2), "flip", part)[0] for r, part in enumerate(x.chunk(2))]
    assert torch.equal(torch.cat(halves), x2), "two processes turn what one would"


def test_the_solutions_of_the_exercises():
    lesson = json.loads((Path(__file__).resolve().parents[1] / "nbs/39_ganaugment.ipynb").read_text(encoding="utf-8"))
    cells = {c["id"]: "".join(c["source"]) for c in lesson["cells"]}
    code, = re.findall(r"```python\n(.*?)```", cells["solutions"], re.S)
    names = {"torch": torch, "math": math, "Ada": Ada, "after_T": lambda directions, p: (1 - p) * directions + p * directions.mean()}
    exec(code, names)
    asked = {cells[f"exercise-{i}"].removeprefix("# ") for i in (1, 2)}
    assert asked == {"steps_to", "leaks"} <= set(names) and code.count("assert") == 3
