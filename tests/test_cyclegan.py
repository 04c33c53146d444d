"CycleGAN: what a patch can see, what a pool remembers, who is moved by which loss, and masks that keep their gradient"
import importlib.util
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from semiseg_nb.catalogue import load_task
from semiseg_nb.clock import Clock
from semiseg_nb.core import IGNORE, UserError, generator, seed_everything
from semiseg_nb.cyclegan import (
    FAKE,
    REAL,
    CycleGAN,
    MaskCycle,
    PatchDiscriminator,
    Pool,
    Translator,
    across,
    constant_then_linear,
    image_miou,
    instance_norm,
    joined,
    load_across,
    lsgan,
    masks_of,
    moved,
    noisy,
    patch_distance,
    quiet,
    straight_through,
    translate,
    translated,
)
from semiseg_nb.data import Labelled
from semiseg_nb.engine import evaluate, fit, make_accelerator, optimise
from semiseg_nb.losses import one_hot
from semiseg_nb.models import UNet, count_parameters
from semiseg_nb.records import settings_of
from semiseg_nb.supervised import Supervised

SMALL = {"ngf": 4, "ndf": 4, "blocks": 1}
OFF = {"adversarial": 0, "image_cycle": 0, "label_cycle": 0, "regression": 0}


@pytest.fixture(scope="module")
def both(): return load_across("scenes", n_labelled=6, size=32, style="inverted")


@pytest.fixture(scope="module")
def task(both): return both[1]


def net(task, width=4):
    seed_everything(0)
    return UNet(task.n_classes, width=width)


def gan(task, segmenter=True, **kw):
    seed_everything(1)
    return CycleGAN(task, net(task).eval() if segmenter else None, **{**SMALL, "skip": False, **kw})


def mask_cycle(task, **kw): return MaskCycle(net(task), task, **{**SMALL, "start": 0.0, **kw})


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


# 1 translators
@pytest.mark.parametrize("downs, size", [(1, (32, 48)), (2, (32, 20)), (0, (17, 9))])
def test_a_translator_keeps_the_shape_and_stays_inside(downs, size):
    for up in ("resize", "deconv"):
        y = Translator(3, 3, 4, 1, downs, up)(5 * rand(2, 3, *size) - 2)
        assert y.shape == (2, 3, *size) and y.abs().max() < 1


def test_sides_that_do_not_halve_are_refused_with_the_numbers(task):
    with pytest.raises(UserError, match=r"34x32 pixels cannot be halved 2 time\(s\).*multiples of 4"): Translator(downs=2)(rand(1, 3, 34, 32))
    with pytest.raises(UserError, match="32x32 pixels cannot be halved 4"): gan(task, downs=4)


def test_the_papers_networks_by_their_number_of_weights():
    assert count_parameters(Translator(ngf=64, blocks=9, downs=2, up="deconv")) == 11_378_179
    assert count_parameters(Translator(ngf=64, blocks=6, downs=2, up="deconv")) == 7_837_699
    assert count_parameters(PatchDiscriminator(3, 64, 3)) == 2_764_737
    assert PatchDiscriminator(3, 64, 3)(rand(1, 3, 256, 256)).shape == (1, 1, 30, 30)


def test_first_weights_are_normal_with_deviation_002():
    w = torch.cat([m.weight.flatten() for m in Translator(ngf=32).modules() if isinstance(m, nn.Conv2d)])
    assert w.std().item() == pytest.approx(0.02, rel=0.02) and abs(w.mean().item()) < 1e-4
    assert all((m.bias == 0).all() for m in PatchDiscriminator().modules() if isinstance(m, nn.Conv2d))


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


# 2 discriminators
@pytest.mark.parametrize("n, sees", [(1, 16), (2, 34), (3, 70)])
def test_an_answer_sees_so_many_pixels_and_no_more(n, sees):
    x = rand(1, 1, 128, 128).requires_grad_()
    d = PatchDiscriminator(1, 4, n, norm="none")(x)
    d[0, 0, d.shape[2] // 2, d.shape[3] // 2].backward()
    touched = x.grad.abs().sum((0, 1))
    assert touched.any(0).sum() == touched.any(1).sum() == sees


def test_a_map_that_leaves_no_answer_is_refused(task):
    assert PatchDiscriminator(3, 4, 3)(rand(1, 3, 24, 24)).shape == (1, 1, 1, 1)
    with pytest.raises(UserError, match="3 layers leaves nothing of a map of 23x64.*at least 24"): PatchDiscriminator(3, 4, 3)(rand(1, 3, 23, 64))
    with pytest.raises(UserError, match="4 layers"): gan(task, n_layers=4)
    with pytest.raises(UserError, match="did you mean 'spectral'"): PatchDiscriminator(norm="spektral")


def test_spectral_norm_bounds_every_layer():
    D = PatchDiscriminator(norm="spectral")
    for _ in range(30): D(rand(2, 3, 32, 32))
    for m in D.modules():
        if isinstance(m, nn.Conv2d): assert torch.linalg.matrix_norm(m.weight.flatten(1), 2).item() == pytest.approx(1, abs=0.05)


# 3 pool
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
    with pytest.raises(UserError, match="pool is -1"): Pool(-1, (1, 1, 1))


def test_a_pool_survives_a_checkpoint():
    a, b = Pool(4, (1, 1, 1)), Pool(4, (1, 1, 1))
    for t in range(7): a(torch.full((1, 1, 1, 1), float(t)), generator(t))
    b.load_state_dict(a.state_dict())
    for t in range(7, 12):
        x = torch.full((1, 1, 1, 1), float(t))
        assert torch.equal(a(x, generator(t)), b(x, generator(t)))


# 4 who is moved by which loss
def test_each_step_moves_its_own_networks_only(task):
    m = gan(task)
    steps = m.updates(*batch(task), Clock(5, 10))
    before = {k: v.clone() for k, v in nn.ModuleList([m.D_A, m.D_B]).state_dict().items()}
    name, losses = next(steps)
    assert name == "translators" and m.optimisers[name].param_groups[0]["params"] == [*m.G.parameters(), *m.F.parameters()]
    sum(losses.values()).backward(inputs=m.optimisers[name].param_groups[0]["params"])
    assert moves(m.G) and moves(m.F) and untouched(m.D_A, m.D_B, m.segmenter)
    assert all(torch.equal(v, before[k]) for k, v in nn.ModuleList([m.D_A, m.D_B]).state_dict().items())
    held = [p.grad.clone() for p in (*m.G.parameters(), *m.F.parameters())]
    name, losses = next(steps)
    sum(losses.values()).backward()
    assert name == "discriminators" and moves(m.D_A) and moves(m.D_B)
    assert all(torch.equal(p.grad, h) for p, h in zip((*m.G.parameters(), *m.F.parameters()), held))


@pytest.mark.parametrize("make", [gan, mask_cycle])
@pytest.mark.parametrize("norm", ["instance", "spectral"])
def test_the_first_step_leaves_the_discriminators_bit_identical(task, make, norm):
    m, accelerator = make(task, norm=norm).train(), make_accelerator("cpu")
    critics = nn.ModuleList([m.D_A, m.D_B] if make is gan else [m.D_I, m.D_S])
    before, updates = {k: v.clone() for k, v in critics.state_dict().items()}, m.updates(*batch(task), Clock(5, 10))
    for learn in (False, True):
        name, losses = next(updates)
        optimise(m.optimisers[name], losses, accelerator)
        assert learn != all(torch.equal(v, before[k]) for k, v in critics.state_dict().items())


def test_a_translator_is_reached_by_fooling_alone(task):
    m = gan(task)
    _, losses = next(m.updates(*batch(task), Clock(5, 10)))
    losses["fool B"].backward()
    assert moves(m.G) and untouched(m.F)


# 5 least squares
def test_the_optimum_of_least_squares():
    perfect = lsgan(torch.ones(3), REAL) + lsgan(torch.zeros(3), FAKE)
    assert perfect == 0 and lsgan(torch.zeros(3), REAL) == 1 and lsgan(torch.tensor([0.5, 2.0]), REAL).item() == pytest.approx(0.625)


def test_a_discriminators_loss_is_halved(task):
    m = gan(task)
    for D in (m.D_A, m.D_B):
        nn.init.zeros_(D.layers[-1].weight)
    _, losses = list(m.updates(*batch(task), Clock(0, 10)))[1]
    assert losses["real A"] == losses["real B"] == 0.5 and losses["fake A"] == losses["fake B"] == 0      # answers 0 to everything


# 6 cycle and identity
def test_two_identities_cost_nothing_and_change_nothing(task):
    m = gan(task, skip=True)
    m.stats = {}
    _, losses = next(m.updates(*batch(task), Clock(0, 10)))
    assert all(losses[f"{k} {s}"] == 0 for k in ("cycle", "identity") for s in "AB") and m.stats["change A"] == 0


def test_the_defaults_are_the_papers():
    chosen = settings_of(CycleGAN)
    paper = {"cycle": 10.0, "identity": 0.5, "adversarial": 1.0, "pool": 50, "lr": 2e-4, "decay": 0.5, "norm": "instance"}
    assert {k: chosen[k] for k in paper} == paper


def test_the_script_trains_what_the_notebook_trains():
    root = Path(__file__).resolve().parents[1]
    cells = json.loads((root / "nbs/42_cyclegan.ipynb").read_text(encoding="utf-8"))["cells"]
    cell, = (c for c in cells if "parameters" in c["metadata"].get("tags", []))
    lesson = {}
    exec("".join(cell["source"]), lesson)
    spec = importlib.util.spec_from_file_location("cyclegan_script", root / "scripts/cyclegan.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    a, chosen = script.arguments([]), settings_of(CycleGAN) | script.LESSON
    shared = ("dataset", "n_labelled", "split_seed", "style", "strength", "model", "width", "views", "steps", "batch_size", "least", "seed")
    assert {k: getattr(a, k) for k in shared} == {k: lesson[k] for k in shared}
    assert a.size == 32 and lesson["size"] is None, "which the notebook takes for 32 with scenes"
    assert a.segmenter_steps == lesson["segmenter_part"] * lesson["steps"]
    own = [k for k in lesson if k in chosen]
    assert len(own) > 10 and {k: chosen[k] for k in own} == {k: lesson[k] for k in own}


def test_identity_is_the_other_way_round(task):
    "G is asked about images of B, F about images of A"
    m = gan(task)
    lab, unl = batch(task)
    _, losses = next(m.updates(lab, unl, Clock(0, 10)))
    b = moved(unl["image"] * 2 - 1, Clock(0, 10), "target", m.shift)
    assert losses["identity B"].item() == pytest.approx(5 * F.l1_loss(m.G(b), b).item(), rel=1e-4)
    none = gan(task, identity=0)
    assert "identity A" not in next(none.updates(lab, unl, Clock(0, 10)))[1]


def test_noise_is_added_on_the_way_back_only(task):
    quiet_one, loud = (dict(next(gan(task, noise=s).updates(*batch(task), Clock(0, 10)))[1]) for s in (0.0, 0.5))
    assert loud["fool B"] == quiet_one["fool B"] and loud["cycle A"] != quiet_one["cycle A"]
    x = rand(2, 3, 4, 4)
    assert noisy(x, 0, Clock(0, 1), "s") is x and torch.equal(noisy(x, 1, Clock(0, 1), "s"), noisy(x, 1, Clock(0, 1), "s"))


# 7 schedule
def test_the_rate_is_constant_then_falls_to_one_part():
    factors = [constant_then_linear(s, 200) for s in range(200)]
    assert factors[:100] == [1] * 100 and all(a > b for a, b in zip(factors[99:], factors[100:])) and factors[-1] == pytest.approx(1 / 101)
    assert [constant_then_linear(s, 3, 0) for s in range(3)] == [1] * 3
    assert constant_then_linear(0, 3, 1.0) == 0.75 and constant_then_linear(2, 3, 1.0) == 0.25


# 8 instance normalisation
def test_instance_norm_is_torchs_and_forgets_brightness():
    x = rand(4, 6, 8, 8)
    assert torch.allclose(instance_norm(6)(x), nn.InstanceNorm2d(6)(x), atol=1e-5)
    assert torch.allclose(instance_norm(6)(x + rand(1, 6, 1, 1)), instance_norm(6)(x), atol=1e-4)


def test_images_of_a_batch_do_not_see_each_other():
    for m in (Translator(**{k: SMALL[k] for k in ("ngf", "blocks")}), PatchDiscriminator(3, 4)):
        x = rand(4, 3, 32, 32)
        assert torch.allclose(m(x), torch.cat([m(i[None]) for i in x]), atol=1e-5)


# 9 straight through
def test_straight_through_is_one_hot_forward_and_softmax_backward():
    z = (rand(2, 5, 6, 6) * 4).requires_grad_()
    w = rand(2, 5, 6, 6, seed=1)
    hard = masks_of(z)
    assert torch.equal(hard.detach().unique(), torch.tensor([0.0, 1.0])) and (hard.sum(1) == 1).all() and torch.equal(hard.argmax(1), z.argmax(1))
    found, = torch.autograd.grad((hard * w).sum(), z)
    right, = torch.autograd.grad((z.softmax(1) * w).sum(), z)
    assert torch.equal(found, right)


def test_the_published_argmax_gives_the_segmenter_no_gradient(task):
    "Defect of arnab39/Semi-supervised-segmentation-cycleGAN: masks are argmax-ed before the discriminator sees them"
    for hard, arrives in (("straight_through", True), ("softmax", True), ("argmax", False)):
        m = mask_cycle(task, hard=hard)
        _, losses = next(m.updates(*batch(task), Clock(5, 10)))
        parts = list(m.net.parameters())
        for key in ("fool masks", "image cycle"):
            if not losses[key].requires_grad: reached = [None]
            else: reached = torch.autograd.grad(losses[key], parts, retain_graph=True, allow_unused=True)
            assert any(g is not None and g.abs().sum() > 0 for g in reached) == arrives, (hard, key)


def test_unknown_pixels_are_no_class():
    y = torch.tensor([[[0, 2, IGNORE]]])
    assert one_hot(y, 3)[0, :, 0].T.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0]]
    assert straight_through(one_hot(y.clamp(max=2), 3)).requires_grad is False


# 10 translated pairs
def test_masks_of_translated_pairs_are_the_sources_bit_for_bit(both, task):
    m = gan(task)
    pairs, score = translated(m, both[0].labelled)
    again, _ = translated(m, both[0].labelled, batch_size=2)
    assert torch.equal(pairs.masks, both[0].labelled.masks) and len(score) == len(pairs) == 6 and pairs.images.dtype == torch.uint8
    assert (pairs.images.int() - again.images.int()).abs().max() <= 1                      # rounding at most: a pair does not depend on its batch
    assert not torch.equal(pairs.images, both[0].labelled.images) and [i.split("/", 1)[1] for i in pairs.ids] == list(both[0].labelled.ids)
    assert torch.equal(translated(m, both[0].labelled)[0].images, pairs.images) and m.training


def test_the_content_check_keeps_what_passes(both, task):
    m = gan(task)
    _, score = translated(m, both[0].labelled)
    edge = score.sort().values[3].item()
    kept, _ = translated(m, both[0].labelled, least=edge)
    rows = (score >= edge).nonzero()[:, 0]
    assert len(kept) == len(rows) < 6 and torch.equal(kept.masks, both[0].labelled.masks[rows])
    with pytest.raises(UserError, match="No translated image passes.*least=1.1"): translated(m, both[0].labelled, least=1.1)
    with pytest.raises(UserError, match="without a segmenter nothing checks"): translated(gan(task, segmenter=False), both[0].labelled, least=0.5)
    assert translated(gan(task, segmenter=False), both[0].labelled)[1].isnan().all()


def test_miou_of_single_images():
    y = torch.tensor([[[0, 0, 1, IGNORE]], [[0, 0, 0, 0]], [[IGNORE] * 4]])
    p = torch.tensor([[[0, 1, 1, 2]], [[0, 0, 0, 0]], [[1, 1, 1, 1]]])
    assert image_miou(p, y, 3).tolist() == [0.5, 1.0, 0.0]


# 11 semantic loss
def test_the_semantic_loss_moves_translators_and_not_the_segmenter(task):
    m = gan(task, semantic=1.0)
    before = {k: v.clone() for k, v in m.segmenter.state_dict().items()}
    _, losses = next(m.updates(*batch(task), Clock(5, 10)))
    losses["semantic"].backward()
    assert moves(m.G) and moves(m.F) and untouched(m.segmenter) and not any(p.requires_grad for p in m.segmenter.parameters())
    train(m, task, 2)
    assert all(torch.equal(v, before[k]) for k, v in m.segmenter.state_dict().items())     # buffers too
    with pytest.raises(UserError, match="semantic is 1.0, but there is no segmenter"): gan(task, segmenter=False, semantic=1.0)


# views
def test_views_move_image_and_mask_alike_and_invent_nothing():
    y = (rand(4, 16, 16) * 200).long()
    x = y[:, None].float().expand(-1, 3, -1, -1)
    for step in range(8):
        x_m, y_m = moved(x, Clock(step, 10), "views", 0.2, y)
        assert torch.equal(x_m[:, 1], y_m.float()) and set(y_m.unique().tolist()) <= set(y.unique().tolist())
    assert not torch.equal(y_m, y) and torch.equal(moved(x, Clock(3, 10), "a"), moved(x, Clock(3, 10), "a"))
    still = [moved(x, Clock(s, 20), "none", 0.0) for s in range(20)]
    assert all(torch.equal(v[i], x[i]) or torch.equal(v[i], x[i].flip(-1)) for v in still for i in range(4))


def test_two_processes_share_one_draw():
    x = rand(4, 3, 8, 8)
    parts = [moved(x[2 * r:2 * r + 2], Clock(0, 1, rank=r, world=2), "s") for r in (0, 1)]
    assert torch.equal(torch.cat(parts), moved(x, Clock(0, 1), "s"))


# tasks
def test_a_task_across_takes_masks_from_one_side_only(both):
    source, task = both
    assert task.labelled is source.labelled and isinstance(task.val, Labelled) and not isinstance(task.unlabelled, Labelled)
    scene = {i.split("/")[-1] for i in source.labelled.ids}
    assert not scene & {i.split("/")[-1] for i in task.unlabelled.ids}                     # not even the same layouts
    assert torch.equal(task.val.masks, source.val.masks) and not torch.equal(task.val.images, source.val.images)
    two = joined(source.labelled, Labelled(["x"], source.val.images[:1], source.val.masks[:1], source.n_classes))
    assert len(two) == 7 and torch.equal(two.masks[6], source.val.masks[0])


def test_a_target_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="style 'photo' at strength 1.0 is the source itself"): load_across(style="photo")
    with pytest.raises(UserError, match="strength 0 is the source itself"): load_across(style="inverted", strength=0)
    with pytest.raises(UserError, match="dataset 'voc' is not known.*scenes, folder"): load_across("voc")
    for split in ("images", "masks"): (tmp_path / split / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no training image"): load_across("folder", tmp_path)


def test_settings_that_cannot_work_are_refused_before_training(task):
    for name in ("cycle", "identity", "adversarial", "semantic", "noise", "lr"):
        with pytest.raises(UserError, match=f"{name} is -1"): gan(task, **{name: -1})
    with pytest.raises(UserError, match="shift is 0.7, but it should be between 0 and 0.5"): gan(task, shift=0.7)
    with pytest.raises(UserError, match="decay is 2"): gan(task, decay=2)
    with pytest.raises(UserError, match="image_cycle is -1"): mask_cycle(task, image_cycle=-1)
    with pytest.raises(UserError, match="did you mean 'softmax'"): mask_cycle(task, hard="soft_max")
    with pytest.raises(UserError, match="no segmenter to predict with"): gan(task, segmenter=False).predict(rand(1, 3, 32, 32))


# methods
def test_prediction_goes_through_the_source(task):
    m = gan(task).eval()
    x = rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(m.predict(x), m.segmenter(translate(m.F, x))) and m.to_target(x).min() >= 0 and m.to_target(x).max() <= 1
    assert 0 <= evaluate(m, task.val)["miou"] <= 1


@pytest.mark.parametrize("make", [lambda t: gan(t, semantic=0.1, noise=0.02, pool=4), lambda t: gan(t, segmenter=False, skip=True, norm="spectral"),
                                  lambda t: mask_cycle(t, pool=4)])
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


def test_every_weight_zero_is_the_supervised_run_bit_for_bit(both):
    one, two = Supervised(net(both[0]), both[0]), mask_cycle(both[0], **OFF)
    assert not two.uses_unlabelled
    for m in (one, two): train(m, both[0])
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


def test_drawings_do_not_colour_the_statistics_of_images(task):
    m = net(task).train()
    x = rand(2, 3, 32, 32)
    before = {k: v.clone() for k, v in m.state_dict().items()}
    with quiet(m): inside = m(x)
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    assert torch.equal(inside, m(x)) and not torch.equal(m.down[0][0][1].running_mean, before["down.0.0.1.running_mean"])


def test_patch_statistics():
    x = rand(8, 3, 16, 16)
    assert patch_distance(x, x) == 0 and patch_distance(torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)) == 3
    assert patch_distance(x, x.flip(-1)).item() == pytest.approx(0, abs=1e-9)              # places do not matter


def test_a_short_run_learns_to_darken():
    "Two sets of plain noise, one half as bright: after a few dozen steps G darkens and F brightens"
    source = load_task("scenes", n_labelled=12, size=32)
    dark = source.unlabelled.images // 3
    task = across(source, replace_images(source.unlabelled, dark), source.val)
    seed_everything(0)
    m = CycleGAN(task, ngf=4, blocks=1, ndf=8, n_layers=1, norm="none", skip=True, identity=0.0, cycle=2.0, lr=3e-3, decay=0.0)
    fit(m, task, 40, 4, seed=0, progress=False, eval_on=False)
    x = source.val.images[:16].float() / 255
    with torch.no_grad(): assert m.to_target(x).mean() < 0.85 * x.mean() and m.to_source(x / 3).mean() > 1.15 * (x / 3).mean()


def replace_images(images, tensor):
    "The same set with other pictures"
    return type(images)(images.ids, tensor)
