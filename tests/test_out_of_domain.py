"Out of domain: shifts that change the look and nothing else, what a curve can undo, and two problems that are never mixed"
import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from semiseg_nb import out_of_domain
from semiseg_nb.augment import PHOTO, Policy, Slot
from semiseg_nb.catalogue import load_split, load_task
from semiseg_nb.clock import Clock
from semiseg_nb.core import UserError, generator, seed_everything
from semiseg_nb.data import Labelled
from semiseg_nb.engine import evaluate
from semiseg_nb.inversion import IntensityMap
from semiseg_nb.networks import UNet
from semiseg_nb.out_of_domain import (
    KEPT,
    STRENGTHS,
    TARGETS,
    at_source,
    at_target,
    colour_views,
    curve,
    explained,
    fall,
    recolour,
    scores,
    shifts,
    styled,
    with_statistics,
    with_target,
)
from semiseg_nb.scenes import make_scenes
from semiseg_nb.supervised import Supervised


def rand(*shape, seed=0): return torch.rand(*shape, generator=generator(seed, "test"))
def pixels(ds): return ds.__getitems__(list(range(len(ds))))["image"].float() / 255
def masks(ds): return ds.__getitems__(list(range(len(ds))))["mask"]


@pytest.fixture(scope="module")
def sets(): return shifts("scenes", n=12)


@pytest.fixture(scope="module")
def task(): return load_task("scenes", n_labelled=6, size=32)


def net(task, width=4):
    seed_everything(0)
    return UNet(task.n_classes, width=width, mean=task.mean)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Two domains: dark ground with bright squares, and the negative of it"
    root, rng = tmp_path_factory.mktemp("two_domains"), np.random.default_rng(0)
    for split, n, masked in (("train", 6, True), ("val", 3, True), ("other", 4, True), ("other_unlabelled", 5, False)):
        for kind in ("images", "masks")[:1 + masked]: (root / kind / split).mkdir(parents=True)
        for i in range(n):
            y = np.zeros((16, 16), np.uint8)
            y[4:10, 4:12] = 1
            x = 40 + 150 * y + rng.integers(0, 20, y.shape, dtype=np.uint8)
            x = 255 - x if split.startswith("other") else x
            Image.fromarray(x.astype(np.uint8)).save(root / "images" / split / f"{split}{i}.png")
            if masked: Image.fromarray(y).save(root / "masks" / split / f"{split}{i}.png")
    return root


# ---------------------------------------------------------------- shifts

def test_the_same_layouts_in_every_style_have_the_same_masks_and_other_pixels(sets):
    source = sets[TARGETS[0]][0.0]
    for target, by_strength in sets.items():
        assert list(by_strength) == list(STRENGTHS)
        for strength, ds in by_strength.items():
            assert torch.equal(masks(ds), masks(source)), (target, strength)
            assert torch.equal(pixels(ds), pixels(source)) == (strength == 0), (target, strength)


@pytest.mark.parametrize("target", TARGETS)
def test_strength_0_is_the_source_bit_for_bit(sets, target):
    drawn = make_scenes(range(10000, 10012), 32, target, strength=0.0)[0]
    assert torch.equal(drawn, load_split("scenes", split="val", size=32, ids=range(10000, 10012)).images)
    assert torch.equal(drawn.float() / 255, pixels(sets[target][0.0]))


@pytest.mark.parametrize("target", TARGETS)
def test_more_strength_is_further_from_the_source(sets, target):
    away = [(pixels(ds) - pixels(sets[target][0.0])).abs().mean().item() for ds in sets[target].values()]
    assert away[0] == 0 and all(b > a for a, b in zip(away, away[1:]))


def test_portraits_change_their_look_and_neither_their_masks_nor_their_order():
    by = shifts("portraits", targets=["palette"], strengths=(0.5, 1.0), n=8)["palette"]
    away = [(pixels(ds) - pixels(by[0.0])).abs().mean().item() for ds in by.values()]
    assert 0 == away[0] < away[1] < away[2]
    for ds in by.values(): assert torch.equal(masks(ds), masks(by[0.0])) and ds.ids == by[0.0].ids
    assert torch.equal(pixels(styled("portraits", "val", "palette", 0.0, 32, 8)), pixels(by[0.0]))


def test_the_targets_share_one_source(sets): assert len({id(by[0.0]) for by in sets.values()}) == 1


def test_only_the_first_n_images_are_taken():
    few, all_ = (shifts("scenes", targets=["textures"], strengths=(1.0,), n=n) for n in (3, None))
    assert len(few["textures"][1.0]) == 3 and len(all_["textures"][1.0]) == 200
    assert torch.equal(pixels(few["textures"][1.0]), pixels(all_["textures"][1.0])[:3])


def test_a_folder_has_its_validation_set_at_0_and_the_other_domain_at_1(folder):
    found = shifts("folder", folder, ["other"], size=16, n=2)
    assert list(found) == ["other"] and list(found["other"]) == [0.0, 1.0]
    assert [len(ds) for ds in found["other"].values()] == [2, 2]
    assert pixels(found["other"][0.0]).mean() < .5 < pixels(found["other"][1.0]).mean()


@pytest.mark.parametrize("wrong, says", [
    (dict(targets=["inverse"]), "target 'inverse' is not known (did you mean 'inverted'?)"), (dict(strengths=(0.5, 1.5)), "strength is 1.5"),
    (dict(dataset="voc"), "dataset 'voc' has no second domain here: use portraits, scenes, or a folder"), (dict(dataset="folder", targets=None), "targets is empty"),
    (dict(dataset="folder", targets=["other_unlabelled"]), "split 'other_unlabelled' has images without a mask"),
    (dict(dataset="folder", targets=["ather"]), "did you mean 'other'"),
])
def test_a_mistake_is_one_sentence(folder, wrong, says):
    options = {"dataset": "scenes"} | ({"data_root": folder} if wrong.get("dataset") == "folder" else {}) | wrong
    with pytest.raises(UserError) as error: shifts(**options)
    assert says in str(error.value) and str(error.value).endswith(".")


# ---------------------------------------------------------------- what a curve can undo

@pytest.mark.parametrize("change", [lambda x: 1 - x, lambda x: .2 + .5 * x, lambda x: x[:, [2, 0, 1]], lambda x: .3 * x + .2 * x[:, [1, 1, 1]], lambda x: x],
                         ids=["inverted", "gain and offset", "channels changed", "a matrix", "unchanged"])
def test_recolour_finds_a_change_that_is_a_curve(change):
    x = rand(3, 3, 16, 16)
    assert (recolour(x, change(x)) - change(x)).abs().max() < 1e-3 and explained(x, change(x)) > .999


def test_the_intensity_map_of_semanticgan_is_a_special_case():
    x, tone = rand(2, 3, 16, 16), IntensityMap(2)
    with torch.no_grad():
        tone.curve.copy_(rand(2, 8, seed=1) - .5)
        tone.matrix.copy_(torch.eye(3) * .5 + .2 * (rand(2, 3, 3, seed=2) - .5))
        goal = tone(x * 2 - 1) / 2 + .5
    assert 0 < goal.min() and goal.max() < 1 and (recolour(x, goal) - goal).abs().max() < 1e-3


def test_recolour_treats_each_image_alone():
    x, goal = rand(3, 3, 12, 12), rand(3, 3, 12, 12, seed=1)
    assert torch.allclose(recolour(x, goal)[1:2], recolour(x[1:2], goal[1:2]), atol=1e-6)


def test_recolour_stays_in_range_for_a_picture_that_is_nearly_flat():
    flat = torch.full((1, 3, 8, 8), .5)
    found = recolour(flat, rand(1, 3, 8, 8))
    assert torch.isfinite(found).all() and 0 <= found.min() and found.max() <= 1


def test_fresh_noise_is_no_curve(): assert explained(rand(2, 3, 24, 24), rand(2, 3, 24, 24, seed=1)) < .6


def test_a_folded_curve_goes_forwards_and_not_back():
    x = rand(2, 3, 24, 24)
    folded = 1 - (2 * x - 1).abs()
    assert explained(x, folded, knots=15) > .99 and explained(folded, x, knots=15) < .6


def test_inversion_is_a_curve_and_new_textures_are_not(sets):
    part = {t: explained(pixels(by[0.0]), pixels(by[1.0])) for t, by in sets.items()}
    assert part["inverted"] > .9 and part["textures"] < .6 and min(part.values()) == part["textures"]


# ---------------------------------------------------------------- scoring

def test_scores_are_those_of_evaluate_and_the_source_is_scored_once(task, sets, monkeypatch):
    method, seen = Supervised(net(task), task), []
    def counted(*args, **kw):
        seen.append(args[1])
        return evaluate(*args, **kw)
    monkeypatch.setattr(out_of_domain, "evaluate", counted)
    rows = scores(method, sets)
    assert [(r["target"], r["strength"]) for r in rows] == [(t, s) for t in TARGETS for s in STRENGTHS]
    assert len(seen) == 1 + len(TARGETS) * (len(STRENGTHS) - 1) and len({id(ds) for ds in seen}) == len(seen)
    expected = evaluate(method, sets["palette"][0.5])
    found, = (r for r in rows if (r["target"], r["strength"]) == ("palette", 0.5))
    assert {k: found[k] for k in KEPT} == expected
    assert len({r["miou"] for r in rows if r["strength"] == 0}) == 1


def test_curve_fall_and_level_by_hand():
    record = {"out_of_domain": [{"target": t, "strength": s, "miou": m} for t, s, m in
                                (("b", 1.0, .1), ("a", .5, .5), ("a", 0.0, .7), ("b", 0.0, .7), ("a", 1.0, .4), ("b", .5, .3))]}
    assert list(curve(record, "a").items()) == [(0.0, .7), (.5, .5), (1.0, .4)]
    assert at_source(record) == pytest.approx(.7) and at_target(record) == pytest.approx(.25) and at_target(record, .5) == pytest.approx(.4)
    assert fall(record) == pytest.approx(.45)
    with pytest.raises(UserError, match=r"target 'c', only on a, b"): curve(record, "c")
    with pytest.raises(UserError, match=r"strength 0\.3"): at_target(record, .3)


# ---------------------------------------------------------------- views

def test_a_left_out_operation_is_never_drawn():
    strong = colour_views(without=("solarize", "equalize"))[1]
    names = {name for program in strong.programs for slot in program for name in slot.ops}
    assert names == set(PHOTO) - {"solarize", "equalize"}


def test_colour_views_with_nothing_left_out_are_the_strong_views_of_the_baseline(task):
    lab = task.labelled.__getitems__(list(range(6)))
    lab = {"image": lab["image"].float() / 255, "mask": lab["mask"].long()}
    one, two = Supervised(net(task), task, views="strong"), Supervised(net(task), task, views="weak")
    two.policies = colour_views(task.mean)
    losses = [dict(m.updates(lab, None, Clock(3, 10)))["net"]["supervised"].item() for m in (one, two)]
    assert losses[0] == losses[1]


def test_an_operation_that_does_not_exist_is_named():
    with pytest.raises(UserError, match="operation 'solarise' is not known.*did you mean 'solarize'"): colour_views(without=("solarise",))


def test_solarize_is_the_inverted_style_at_half_strength_but_for_its_field(sets):
    x_0, x_s = pixels(sets["inverted"][0.0]), pixels(sets["inverted"][0.5])
    policy = Policy("solarize", ((Slot(("solarize",), 1.0, .5, .5),),), (.5,) * 3)
    solarised = policy.apply_image(x_0, policy.sample(len(x_0), (32, 32), generator(0, "solarize")))
    assert (solarised - x_s).abs().mean() < (x_0 - x_s).abs().mean() / 2


# ---------------------------------------------------------------- block 2

def test_the_target_task_has_target_images_without_masks_in_other_layouts(task):
    other = with_target(task, "inverted", dataset="scenes")
    assert other.labelled is task.labelled and other.val is task.val and other.split_id != task.split_id
    assert not isinstance(other.unlabelled, Labelled) and not {"mask", "tags"} & set(other.unlabelled[0])
    def scene(i): return i.rsplit("/", 1)[-1]
    assert list(map(scene, other.unlabelled.ids)) == list(map(scene, task.unlabelled.ids))
    assert not {scene(i) for i in other.unlabelled.ids} & {scene(i) for i in other.labelled.ids}
    index = [int(scene(i)) for i in other.unlabelled.ids[:4]]
    assert torch.equal(other.unlabelled.images[:4], make_scenes(index, 32, "inverted")[0])


def test_masks_of_a_real_target_are_dropped(folder):
    source = load_task("folder", folder, n_labelled=2)
    for split, n in (("other", 4), ("other_unlabelled", 5)):
        other = with_target(source, split, dataset="folder", data_root=folder)
        assert len(other.unlabelled) == n and not isinstance(other.unlabelled, Labelled) and "mask" not in other.unlabelled[0]


def test_an_unknown_target_of_block_2_is_named(task):
    with pytest.raises(UserError, match="target 'invert' is not known"): with_target(task, "invert", dataset="scenes")


def test_statistics_are_those_of_the_target_and_no_weight_moves(task):
    method = Supervised(net(task), task)                                       # its averaged network is frozen: `.train()` does nothing
    before = copy.deepcopy(method.ema.net.state_dict())
    images = with_target(task, "inverted", dataset="scenes").unlabelled
    counted = with_statistics(method.ema.net, images)
    assert all(torch.equal(a, b) for a, b in zip(counted.parameters(), method.ema.net.parameters()))
    assert all(torch.equal(v, before[k]) for k, v in method.ema.net.state_dict().items()), "the network itself stays as it is"
    assert not torch.equal(counted.down[0][0][1].running_mean, before["down.0.0.1.running_mean"])
    assert not any(m.training for m in counted.modules())
    x = pixels(task.val)[:4]
    with torch.no_grad(): assert torch.allclose(counted(x)[:2], counted(x[:2]), atol=1e-5), "the answer does not depend on the rest of the batch"


def test_statistics_by_hand():
    one = nn.BatchNorm2d(3)
    bytes_ = (rand(8, 3, 8, 8) * 255).to(torch.uint8)
    images = Labelled([str(i) for i in range(8)], bytes_, torch.zeros(8, 8, 8, dtype=torch.uint8), 2)
    whole, parts = with_statistics(one, images, 8), with_statistics(one, images, 4)
    x = bytes_.float() / 255
    assert torch.allclose(whole.running_mean, x.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(whole.running_var, x.transpose(0, 1).flatten(1).var(1), atol=1e-5)
    assert torch.allclose(parts.running_mean, whole.running_mean, atol=1e-5) and parts.num_batches_tracked == 2


def test_a_network_without_batchnorm_has_no_statistics(task):
    with pytest.raises(UserError, match="Conv2d has no BatchNorm layer"): with_statistics(nn.Conv2d(3, 2, 1), task.unlabelled)


def test_the_own_splits_are_no_target():
    with pytest.raises(UserError, match="source's own train or val"): shifts("folder", "anywhere", ["val"])


# ---------------------------------------------------------------- the lesson

def test_the_solutions_of_the_exercises():
    lesson = json.loads((Path(__file__).resolve().parents[1] / "nbs/44_out_of_domain.ipynb").read_text(encoding="utf-8"))
    cells = {c["id"]: "".join(c["source"]) for c in lesson["cells"]}
    code, = re.findall(r"```python\n(.*?)```", cells["solutions"], re.S)
    names = dict(vars(out_of_domain))
    exec(code, names)
    empty = [cells[f"exercise-{i}"].removeprefix("# ").strip() for i in (1, 2, 3)]
    assert empty == ["choices", "match_statistics", "bent"] and set(empty) <= set(names) and code.count("assert") == 3
