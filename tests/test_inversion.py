"Inversion: an encoder that stays in train mode, codes that are found, distances, and labels read off"
import copy
import json
import math
import re
from pathlib import Path

import pytest
import torch
from test_semanticgan import SMALL, TINY, batch, gan, rand, randn, second, state, task, train, unchanged
from torch import nn
from torchmetrics.image import lpip

from semiseg_nb.catalogue import load_task
from semiseg_nb.checkpoint import save_weights
from semiseg_nb.clock import Clock
from semiseg_nb.core import IGNORE, UserError, frozen, seed_everything
from semiseg_nb.engine import evaluate, fit
from semiseg_nb.engine import settings as settings_in_force
from semiseg_nb.inversion import (
    Encoder,
    FeatureDistance,
    IntensityMap,
    Lpips,
    SemanticEncoder,
    edges,
    hats,
    inversion_lr,
    invert,
    load_semantic,
    noise_penalty,
    sharp_cross_entropy,
    slot_level,
    squared_dice_loss,
    standard_noise,
    unit_features,
)
from semiseg_nb.inversion import semanticgan as recipe
from semiseg_nb.semanticgan import SemanticGenerator, encode_labels
from semiseg_nb.stylegan2 import Discriminator

ROOT = Path(__file__).resolve().parents[1]
__all__ = ["task"]  # a fixture


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_a_code_for_every_slot_at_any_size(size):
    "Defect of the published code: heads reshape to (-1, 512), so for other sizes places become images of the batch"
    n_w = 2 * int(math.log2(size)) - 2
    w_mean = randn(6)
    E = Encoder(size, n_w, 6, w_mean)
    assert E(rand(3, 3, size, size)).shape == (3, n_w, 6)
    for head in E.heads: nn.init.zeros_(head.out.weight)
    assert torch.equal(E(rand(2, 3, size, size)), w_mean.expand(2, n_w, 6)), "it predicts the way from the mean"


def test_slots_are_read_from_the_published_levels():
    assert [slot_level(i, 14) for i in range(14)] == [2] * 3 + [1] * 4 + [0] * 7
    for n_w in (6, 8, 10): assert {slot_level(i, n_w) for i in range(n_w)} == {0, 1, 2}


def test_the_encoder_goes_on_in_train_mode_after_a_validation(task):
    "Defect of the published code: `encoder.eval()` in the first validation, `encoder.train()` nowhere"
    m = second(task).train()
    before = state(m)
    evaluate(m, task.val)
    m.inversion(batch(task)[0]["image"]), m.ensemble(batch(task)[0]["image"])
    assert m.E.training and unchanged(m, before)
    fit(m, task, 4, 4, seed=0, eval_every=1, eval_on=task.val, progress=False)
    counted = {int(v) for k, v in m.E.state_dict().items() if k.endswith("num_batches_tracked")}
    assert counted == {4}, "BatchNorm learnt from every step, also after the first validation"


def test_gradients_pass_through_the_frozen_generator(task):
    m = second(task)
    (name, losses), = m.updates(*batch(task), Clock(0, 10))
    assert name == "encoder" and set(losses) == {"labelled image", "label", "unlabelled image", "generated"}
    before = state(m.G)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in m.E.parameters()) and all(h.out.weight.grad.any() for h in m.E.heads)
    assert all(p.grad is None for p in (*m.G.parameters(), *m.distance.parameters()))
    train(m, task)
    assert unchanged(m.G, before) and not m.G.training


def test_the_papers_losses_are_a_switch_away(task):
    (_, losses), = second(task, generated=0).updates(*batch(task), Clock(0, 10))
    assert set(losses) == {"labelled image", "label", "unlabelled image"}


@pytest.fixture(scope="module")
def world():
    "A generator, a distance and four of its own images"
    seed_everything(0)
    G, look = frozen(SemanticGenerator(16, 2, d=8, width=8)), FeatureDistance(Discriminator(16, 3, TINY))
    with torch.no_grad():
        w = G.mapping(randn(4, 8))[:, None].expand(-1, G.n_w, -1).contiguous()
        return G, look, w, G.synthesis(w, "const")[0]


def test_from_the_right_code_there_is_nowhere_to_go(world):
    G, look, w, x = world
    found = invert(G, look, x, w, steps=5)
    assert found.losses[0].abs().max() < 1e-6 and found.losses.max() < 1e-4 and found.losses.shape == (6, 4)


def test_an_inversion_never_ends_worse_than_it_began(world):
    G, look, w, x = world
    before = state(G)
    found = invert(G, look, x, w + randn(*w.shape), steps=25, film=(0, 25))
    assert (found.loss <= found.losses[0]).all() and found.loss.mean() < 0.8 * found.losses[0].mean()
    assert torch.equal(found.loss, found.losses.min(0).values) and set(found.film) == {0, 25}
    assert torch.allclose(G.synthesis(found.w, "const")[0], found.image, atol=1e-5)
    assert unchanged(G, before) and all(p.grad is None for p in G.parameters())


def test_an_image_has_the_same_fate_alone_and_in_company(world):
    G, look, w, x = world
    start = w + randn(*w.shape)
    together, alone = invert(G, look, x, start, steps=6), invert(G, look, x[2:3], start[2:3], steps=6)
    assert torch.allclose(together.losses[:, 2:3], alone.losses, atol=1e-4) and torch.allclose(together.image[2:3], alone.image, atol=1e-3)


def test_predict_works_inside_no_grad_and_zero_steps_is_the_encoder(task):
    m = second(task).eval()
    x = batch(task)[0]["image"]
    with torch.no_grad(): w, logits = m.E(x * 2 - 1), m.predict(x)
    assert logits.shape == (4, 2, 16, 16) and not logits.requires_grad
    m.inversion_steps = 0
    assert torch.allclose(m.predict(x), m.G.synthesis(w, "const")[1] / m.tau, atol=1e-5)
    assert 0 <= evaluate(m, task.val)["miou"] <= 1


def test_restarts_average_answers_and_tell_where_they_disagree(task):
    m = second(task, restarts=3, spread=2.0).eval()
    logits, disagreement = m.ensemble(batch(task)[0]["image"])
    assert torch.allclose(logits.exp().sum(1), torch.ones(4, 16, 16), atol=1e-4)
    assert set((3 * disagreement).round().unique().tolist()) <= {0.0, 1.0, 2.0}
    m.restarts = 1
    assert (m.ensemble(batch(task)[0]["image"])[1] == 0).all()


def test_noise_maps_are_optimised_only_when_asked_and_stay_white(world):
    G, look, w, _ = world
    G = copy.deepcopy(G)
    with torch.no_grad():
        for c in G.convs: c.strength.fill_(0.5)
        x = G.synthesis(w, "const")[0]
    kept = state(G)
    still, moving = (invert(G, look, x, w + 1, steps=6, noise=n) for n in (False, True))
    with torch.no_grad(): redrawn = [G.synthesis(found.w, "const")[0] for found in (still, moving)]
    assert torch.allclose(redrawn[0], still.image, atol=1e-5) and not torch.allclose(redrawn[1], moving.image, atol=1e-3)
    assert unchanged(G, kept)
    n = standard_noise(5 + 3 * randn(2, 1, 8, 8))
    assert n.mean((1, 2, 3)).abs().max() < 1e-6 and torch.allclose(n.square().mean((1, 2, 3)), torch.ones(2), atol=1e-5)


def test_the_schedule_of_an_inversion():
    assert inversion_lr(0) == 0 and inversion_lr(1) == pytest.approx(0) and inversion_lr(0.025) == pytest.approx(0.05)
    for t in (0.05, 0.3, 0.75): assert inversion_lr(t) == pytest.approx(0.1)
    assert inversion_lr(0.875, 1.0) == pytest.approx(0.5)


def test_white_noise_is_cheap_and_constant_noise_is_not():
    white = noise_penalty([standard_noise(randn(16, 1, 32, 32))])
    assert white.shape == (16,) and white.mean() < 1e-2 and (noise_penalty([torch.ones(2, 1, 32, 32)]) > 5).all()


def test_dice_and_cross_entropy_by_hand():
    y = torch.tensor([[[0, 1], [2, 1]]])
    sure = 20 * encode_labels(y, 3)
    assert squared_dice_loss(sure, y) < 1e-6 and sharp_cross_entropy(sure, y) < 1e-6
    swapped = sure.clone()
    swapped[:, 0] *= -1
    assert squared_dice_loss(swapped, y) < 1e-6, "the background is left out"
    zero = torch.zeros(1, 2, 1, 2)
    assert squared_dice_loss(zero, torch.tensor([[[0, 1]]])).item() == pytest.approx(1 - 2 * 0.5 / 1.5)
    assert sharp_cross_entropy(zero, torch.tensor([[[0, IGNORE]]])).item() == pytest.approx(math.log(2))
    assert sharp_cross_entropy(zero, torch.full((1, 1, 2), IGNORE)) == 0, "nothing known: 0, not nan"


def test_distance_of_features_by_hand():
    a, b = torch.zeros(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)
    a[:, 0], b[:, 1] = 3, 7
    look = FeatureDistance(Discriminator(8, 3, {4: 2, 8: 2}))
    one, two = [unit_features(a), torch.zeros(1, 1, 1, 1)], [unit_features(b), torch.ones(1, 1, 1, 1)]
    assert look.compare(one, two).item() == pytest.approx(2.5)
    x = randn(2, 3, 8, 8)
    assert torch.allclose(edges(x), edges(-x)) and torch.isfinite(unit_features(torch.zeros(1, 2, 1, 1))).all()
    zero = torch.zeros(1, 3, 8, 8, requires_grad=True)
    edges(zero).sum().backward()
    assert torch.isfinite(zero.grad).all()


def test_the_distance_is_frozen_and_named(task):
    m = gan(task)
    look = second(task, m).distance
    assert look.name == "feature_distance" and not any(p.requires_grad for p in look.parameters()) and look.D is not m.D_r


def test_without_its_weights_lpips_says_what_to_do(monkeypatch):
    def offline(*a, **k): raise OSError("no route to host")
    monkeypatch.setattr(lpip, "LearnedPerceptualImagePatchSimilarity", offline)
    with pytest.raises(UserError, match="no route to host.*FeatureDistance"): Lpips()


def test_hats_add_up_to_1_and_interpolate_linearly():
    v = rand(5, 7)
    assert torch.allclose(hats(v).sum(-1), torch.ones(5, 7), atol=1e-6) and (hats(v) > 0).sum(-1).max() <= 2
    heights = torch.tensor([0.0, 1.0, 0.5])
    assert torch.allclose(hats(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]), 3) @ heights, torch.tensor([0.0, 0.5, 1.0, 0.75, 0.5]))


def test_the_intensity_map_starts_as_nothing_and_can_invert(world):
    x = rand(2, 3, 4, 4) * 2 - 1
    tone = IntensityMap(2)
    assert torch.allclose(tone(x), x, atol=1e-6)
    with torch.no_grad(): tone.curve[1] *= -1
    assert torch.allclose(tone(x)[0], x[0], atol=1e-6) and torch.allclose(tone(x)[1], -x[1], atol=1e-6)
    with torch.no_grad(): tone.matrix[0], tone.bias[0] = torch.eye(3).flip(0), 0.5
    assert torch.allclose(tone(x)[0], x[0].flip(0) + 0.5, atol=1e-6)
    G, look, w, image = world
    plain, toned = (invert(G, look, -image.clamp(-1, 1), w, steps=30, intensity=i) for i in (False, True))
    assert toned.loss.mean() < plain.loss.mean()


def test_a_second_stage_that_cannot_work_is_refused(task):
    with pytest.raises(UserError, match="inversion_steps is -1"): second(task, inversion_steps=-1)
    with pytest.raises(UserError, match="restarts is 0"): second(task, restarts=0)


def test_a_copy_of_a_method_is_independent(task):
    m = second(task)
    other = copy.deepcopy(m.E)
    train(m, task, 2)
    assert not unchanged(m.E, state(other))


def test_stored_weights_come_back_with_their_settings(task, tmp_path):
    m = second(task, restarts=2)
    path = m.save(tmp_path / "w", note="here")
    again, card = load_semantic(tmp_path / "w", task)
    x = batch(task)[0]["image"]
    assert card["note"] == "here" and again.restarts == 2 and unchanged(again, state(m)) and settings_in_force(again) == settings_in_force(m)
    assert torch.equal(again.predict(x), m.eval().predict(x)) and path.suffix == ".safetensors"
    with pytest.raises(UserError, match="There is no weights file"): load_semantic(tmp_path / "none", task)
    with pytest.raises(UserError, match="does not fit this network"): load_semantic(path, load_task("scenes", n_labelled=4, size=32))
    with pytest.raises(UserError, match="does not hold a SemanticGAN"):
        load_semantic(gan(task).save(tmp_path / "first stage alone"), task)
    save_weights(m, tmp_path / "unet", {"method": "uda"})
    with pytest.raises(UserError, match="does not hold a SemanticGAN"): load_semantic(tmp_path / "unet", task)


def test_weights_of_the_first_edition_are_read():
    portraits = load_task("portraits", n_labelled=4, size=32)
    m, card = load_semantic(ROOT / "nbs/weights/41_semanticgan.safetensors", portraits)
    with torch.no_grad(): logits = m.inversion(portraits.val.images[:32].float() / 255, steps=0).logits
    assert card["encoder_steps"] == 416 and (logits.argmax(1) == portraits.val.masks[:32]).float().mean() > 0.8


def test_the_distance_is_a_hook(task):
    class Plain(nn.Module):
        name = "pixels"
        def describe(self, x): return [x]
        def compare(self, a, b): return (a[0] - b[0]).abs().mean((1, 2, 3))
    class ByPixels(SemanticEncoder):
        def perceptual_distance(self, D_r): return Plain()
    m = ByPixels(gan(task), task)
    train(m, task, 1)
    assert m.distance.name == "pixels" and m.inversion(batch(task)[0]["image"], steps=1).losses.shape == (2, 4)


def test_the_recipe_trains_a_generator_then_an_encoder_into_it(task):
    stages = recipe(task, 12, gan=SMALL, encoder={"inversion_steps": 1})
    first = next(stages)
    train(first.method, task, 2)
    stage = stages.send(first.method)
    assert [(s.name, s.steps) for s in (first, stage)] == [("gan", 12), ("encoder", 2)] and stage.method.inversion_steps == 1
    assert unchanged(stage.method.G, state(first.method.ema.net))
    with pytest.raises(StopIteration) as end: stages.send(stage.method)
    assert end.value.value is stage.method and recipe.name == "semanticgan"
    with pytest.raises(UserError, match="encoder_steps is 0"): recipe(task, 12, encoder_steps=0)


# the lesson
def test_the_solutions_of_the_exercises():
    lesson = json.loads((ROOT / "nbs/45_inversion.ipynb").read_text(encoding="utf-8"))
    cells = {c["id"]: "".join(c["source"]) for c in lesson["cells"]}
    code, = re.findall(r"```python\n(.*?)```", cells["solutions"], re.S)
    names = {"torch": torch, "SemanticEncoder": SemanticEncoder, "Lpips": Lpips}
    exec(code, names)
    empty = [cells[f"exercise-{i}"].removeprefix("# ").strip() for i in (1, 2)]
    assert set(empty) == {"near_the_mean", "WithLpips"} <= set(names) and code.count("assert") == 2
