"""What a task says about flips and turns is obeyed by every method: all draws of two steps are looked at."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_numbers import ROWS, task_of

from semiseg_nb import cyclegan, ganaugment, inversion, mask_cycle, semanticgan, stylegan2
from semiseg_nb.augment import Policy
from semiseg_nb.catalogue import load_task
from semiseg_nb.clock import Clock
from semiseg_nb.core import UserError, seed_everything
from semiseg_nb.engine import fit
from semiseg_nb.tags import cams


def handedness(maps):
    "Which images (B,C,H,W) of a picture that is bright at the right were mirrored"
    return (maps[..., maps.shape[-1] // 2:].float().mean((1, 2, 3)) < maps[..., : maps.shape[-1] // 2].float().mean((1, 2, 3))).tolist()


@pytest.fixture
def draws(monkeypatch):
    "Every view that is drawn from here on: was it mirrored?"
    seen = []
    ramp = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
    sample, geometry = Policy.sample, ganaugment.geometry

    def sampled(self, n, size, generator):
        P = sample(self, n, size, generator)
        seen.extend((np.linalg.det(P.matrix.numpy()[:, :2, :2]) < 0).tolist())
        return P

    def flipped(function):
        def call(clock, stream, *maps, **lawful):
            seen.extend(handedness(function(clock, stream, ramp.expand(len(maps[0]), -1, -1, -1), **lawful)[0]) if len(maps[0]) else [])
            return function(clock, stream, *maps, **lawful)
        return call

    def shifted(x, clock, stream, shift=0.1, y=None, **lawful):
        seen.extend(handedness(shift_and_flip(ramp.expand(len(x), -1, -1, -1), clock, stream, shift, **lawful)))
        return shift_and_flip(x, clock, stream, shift, y, **lawful)

    def moved(*a, **k):
        matrix = geometry(*a, **k)
        seen.extend((torch.linalg.det(matrix[:, :, :2]) < 0).tolist())
        return matrix

    monkeypatch.setattr(Policy, "sample", sampled)
    monkeypatch.setattr(ganaugment, "geometry", moved)
    shift_and_flip = cyclegan.shift_and_flip
    for module in (cyclegan, mask_cycle): monkeypatch.setattr(module, "shift_and_flip", shifted)
    for module in (stylegan2, semanticgan, inversion): monkeypatch.setattr(module, "random_flip", flipped(ganaugment.random_flip))
    return seen


@pytest.mark.parametrize("name", ROWS)
def test_no_method_mirrors_where_the_task_forbids_it(name, draws):
    data, make = ROWS[name]
    found = {}
    for flip in ("none", "horizontal"):
        seed_everything(0)
        draws.clear()
        task = replace(task_of(data), flip=flip)
        fit(make(task), task, 2, 6, seed=0, eval_on=False, progress=False)
        found[flip] = list(draws)
    assert len(found["none"]) >= 12 and not any(found["none"])
    assert any(found["horizontal"]), "the test would see a mirror image"


def test_a_policy_that_forgets_the_task_is_seen(draws):
    from semiseg_nb.policies import flip_crop
    flip_crop(fill=(0, 0, 0)).sample(64, (8, 8), torch.Generator().manual_seed(0))
    assert any(draws) and not all(draws)


def test_gan_pictures_grow_with_the_lawful_views(draws):
    clock, x = Clock(0, 1), torch.arange(12.).view(1, 1, 3, 4).expand(64, 1, 3, 4)
    def kinds(x, **lawful): return len(ganaugment.random_flip(clock, "s", x, **lawful)[0].flatten(1).unique(dim=0))
    assert [kinds(x, flip=f) for f in ("none", "horizontal", "both")] == [1, 2, 4]
    assert kinds(x, flip="none", rotate=90) == 2 and kinds(x[..., :3], flip="both", rotate=90) == 8
    a, b = ganaugment.random_flip(clock, "s", x, x[:, 0], flip="both", rotate=90)
    assert torch.equal(a[:, 0], b), "all maps of an image move alike"
    square = torch.arange(9.).view(1, 1, 3, 3).expand(64, 1, 3, 3)
    many = cyclegan.shift_and_flip(square, clock, "c", 0.0, flip="none", rotate=90)
    assert len(many.flatten(1).unique(dim=0)) == 4


def test_class_maps_show_no_mirror_image_where_it_is_forbidden():
    from semiseg_nb.tags import Tagger
    x, shown = torch.rand(1, 3, 16, 16), []
    for flip in ("none", "horizontal"):
        net = Tagger(replace(task_of("tags"), flip=flip)).net
        shown.append(0)
        net.body.register_forward_pre_hook(lambda *_: shown.__setitem__(-1, shown[-1] + 1))
        cams(net, x, torch.ones(1, 6)[:, : net.head.out_channels])
    assert shown == [1, 2]


def test_views_are_said_once_and_stand_in_the_record():
    task = load_task("scenes", n_labelled=6, size=32, flip="none", rotate=90)
    assert (task.flip, task.rotate) == ("none", 90) and task.describe().items() >= {"flip": "none", "rotate": 90}.items()
    assert not {"flip", "rotate"} & set(load_task("scenes", n_labelled=6, size=32).describe()), "the default leaves old records their names"
    for wrong, says in (({"flip": "vertical"}, "flip 'vertical' is not known"), ({"rotate": 45}, "rotate '45' is not known")):
        with pytest.raises(UserError, match=says): load_task("scenes", n_labelled=6, size=32, **wrong)
    with pytest.raises(UserError, match="flip is 'up', but it should be one of horizontal, none, both"): replace(task, flip="up")
