import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from semiseg_nb import augment, policies
from semiseg_nb import cutmix as boxes
from semiseg_nb.augment import GEO, OPS, PHOTO, fixed, fixed_matrix, identity_policy
from semiseg_nb.core import UserError, generator
from semiseg_nb.cutmix import cutmix, cutmix_boxes
from semiseg_nb.policies import (
    autoaugment,
    flip_crop,
    from_tf_level,
    from_tv_bin,
    randaugment,
    weak_policy,
)

POLICIES = {"flip_crop": flip_crop(), "photo": randaugment(2, 0.7), "geo": randaugment(2, 0.7, GEO), "auto": autoaugment(),
            "all": randaugment(3, 0.6, PHOTO + GEO + ("invert", "solarize_add"))}
MAGNITUDE = {"brightness": (TF.adjust_brightness, 1.4), "contrast": (TF.adjust_contrast, 0.3), "color": (TF.adjust_saturation, 1.7),
             "sharpness": (TF.adjust_sharpness, 1.9), "solarize": (TF.solarize, 0.4), "posterize": (TF.posterize, 5),
             "autocontrast": (TF.autocontrast, None), "equalize": (TF.equalize, None), "invert": (TF.invert, None)}


def smooth(n=8, size=(64, 64), c=3, seed=0, cell=8):
    g = generator(seed, "images")
    x = torch.rand(n, c, size[0] // cell, size[1] // cell, generator=g)
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def labels(n=8, size=(64, 64), classes=5, ignore=True):
    y = smooth(n, size, classes, seed=1, cell=16).argmax(1)
    if ignore: y[:, :3, :5] = 255
    return y


def probabilities(n=8, size=(64, 64), classes=5): return (smooth(n, size, classes, seed=1) * 6).softmax(1)


def draw(policy, n=8, size=(64, 64), seed=0): return policy.sample(n, size, generator(seed, "views"))


# the nine properties of the policy object

@pytest.mark.parametrize("policy", [identity_policy(), randaugment(0, 1.0), randaugment(2, 0.0), randaugment(3, 0.0, PHOTO + GEO + ("cutout", "invert"))])
def test_property_1_strength_zero_or_no_ops_is_bit_equal(policy):
    x, y, p, P = smooth(), labels(), probabilities(), draw(policy)
    assert torch.equal(policy.apply_image(x, P), x) and torch.equal(policy.apply_label(y, P), y)
    for out, valid in (policy.apply_pred(p, P), policy.invert_pred(p, P)): assert torch.equal(out, p) and valid.all()
    assert policy.valid(P).all()


def test_property_2_photo_ops_leave_label_and_prediction_alone():
    policy, y, p = randaugment(3, 1.0, [o for o in OPS if OPS[o].kind == "photo"]), labels(), probabilities()
    P = draw(policy)
    assert torch.equal(policy.apply_label(y, P), y) and torch.equal(policy.apply_pred(p, P)[0], p)
    assert not torch.equal(policy.apply_image(smooth(), P), smooth())


@pytest.mark.parametrize("op", [*GEO, "scale", "hflip"])
def test_property_2_geo_ops_move_label_and_prediction_by_one_matrix(op):
    policy, y = randaugment(1, 0.8, (op,)), labels(ignore=False)
    P = draw(policy)
    near, (soft, valid) = policy.apply_label(y, P), policy.apply_pred(F.one_hot(y, 5).movedim(3, 1).float(), P)
    inner = ~F.max_pool2d(F.pad((~valid).float(), [1] * 4, value=1.0), 3, 1).bool()
    assert ((near == soft.argmax(1)) | ~inner).float().mean() >= 0.99
    assert near[inner].ne(255).all()


def test_property_2_the_image_moves_with_the_label():
    policy, y = randaugment(2, 0.8, GEO), labels(ignore=False)
    P = draw(policy)
    image = policy.apply_image((y / 4.0)[:, None].expand(-1, 3, -1, -1), P)[:, 0]
    near, valid = policy.apply_label(y, P), policy.valid(P)
    assert ((image - near / 4).abs() < 0.13)[valid].float().mean() > 0.93        # all but the pixels that bilinear mixes


@pytest.mark.parametrize("name", POLICIES)
def test_property_3_label_values_stay_and_padding_is_255(name):
    y = labels() + 2                                                              # classes 2 to 6: class 0 does not occur
    y[y > 200] = 255
    out = POLICIES[name].apply_label(y, draw(POLICIES[name]))
    assert set(out.unique().tolist()) <= set(y.unique().tolist()) | {255} and out.dtype == y.dtype


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_property_3_shift_by_a_quarter_leaves_a_quarter_ignored(size):
    P = fixed(["translate_x"], [0.25], size)
    out = identity_policy().apply_label(torch.ones(1, *size, dtype=torch.long), P)
    assert (out == 255).sum() == size[0] * size[1] // 4 and (out == 0).sum() == 0
    assert torch.equal(identity_policy().valid(P), out != 255)
    image = identity_policy().apply_image(torch.zeros(1, 3, *size), P)
    assert torch.equal(image[:, 0] == 0.5, out == 255)                            # padding of the image is `fill`


def test_property_4_hflip_twice_is_the_identity():
    x, y, P = smooth(), labels(), fixed(["hflip"], [[0.0]] * 8, (64, 64))
    policy = identity_policy((0.0, 0.0, 0.0))
    assert torch.equal(policy.apply_image(policy.apply_image(x, P), P), x) and torch.equal(policy.apply_image(x, P), x.flip(3))
    assert torch.equal(policy.apply_label(policy.apply_label(y, P), P), y) and torch.equal(policy.apply_label(y, P), y.flip(2))


def test_property_4_integer_shift_and_back_is_exact_on_the_valid_region():
    p, P = probabilities(2), fixed(["translate_x", "translate_y"], [[5 / 64, -3 / 64]] * 2, (64, 64))
    moved, _ = identity_policy().apply_pred(p, P)
    back, valid = identity_policy().invert_pred(moved, P)
    assert torch.equal(back.movedim(1, 3)[valid], p.movedim(1, 3)[valid]) and valid.sum() == 2 * 59 * 61


def test_property_4_quarter_turn_equals_rot90():
    y, P = labels(), fixed_matrix([[[0, -1, 0], [1, 0, 0], [0, 0, 1]]] * 8, (64, 64))
    assert torch.equal(identity_policy().apply_label(y, P), torch.rot90(y, -1, (1, 2)))
    assert torch.equal(identity_policy((0, 0, 0)).apply_image(smooth(), P), torch.rot90(smooth(), -1, (2, 3)))


@pytest.mark.parametrize("policy", [randaugment(2, 0.5, GEO), flip_crop()])
def test_property_5_invert_undoes_apply_and_rows_sum_to_one(policy):
    p = probabilities()
    P = draw(policy)
    moved, valid = policy.apply_pred(p, P)
    assert torch.allclose(moved.sum(1)[valid], torch.ones(int(valid.sum())), atol=1e-5)
    moved = torch.where(valid[:, None], moved, 0)
    back, seen = policy.invert_pred(moved, P)
    whole = policy.invert_pred(valid[:, None].float(), P)[0][:, 0] > 0.999
    assert (back - p).abs().mean(1)[seen & whole].mean() < 0.02 and (seen & whole).float().mean() > 0.5


@pytest.mark.parametrize("name", POLICIES)
def test_property_6_draws_replay_and_differ_between_rows(name):
    policy, x = POLICIES[name], smooth()
    P, Q = draw(policy), draw(policy)
    assert torch.equal(P.op, Q.op) and torch.equal(P.value, Q.value) and torch.equal(P.matrix, Q.matrix)
    assert torch.equal(policy.apply_image(x, P), policy.apply_image(x, P)) and not torch.equal(draw(policy, seed=1).value, P.value)
    assert len({tuple(r) for r in torch.cat([P.op, P.value], 1).tolist()}) > 4


@pytest.mark.parametrize("name", POLICIES)
def test_property_6_rows_of_a_global_draw_can_be_cut(name):
    policy, x, y, p = POLICIES[name], smooth(), labels(), probabilities()
    P = draw(policy)
    for rows in (slice(0, 4), slice(4, 8), torch.tensor([6, 1])):
        assert torch.allclose(policy.apply_image(x[rows], P[rows]), policy.apply_image(x, P)[rows], atol=1e-6)
        assert torch.equal(policy.apply_label(y[rows], P[rows]), policy.apply_label(y, P)[rows])
        assert torch.allclose(policy.apply_pred(p[rows], P[rows])[0], policy.apply_pred(p, P)[0][rows], atol=1e-6)
    assert torch.equal(policy.apply_image(x, P.to("cpu")), policy.apply_image(x, P))


@pytest.mark.parametrize("op", [o for o in OPS if OPS[o].kind == "photo" and OPS[o].reach])
def test_property_7_stronger_changes_more(op):
    x = 0.8 * smooth(4, seed=3) + 0.2 * torch.rand(4, 3, 64, 64, generator=generator(4))
    for sign in ((1, -1) if OPS[op].signed else (1,)):
        change = []
        for s in (0, 0.25, 0.5, 0.75, 1):
            value = OPS[op].zero + sign * OPS[op].reach * s
            out = x if s == 0 else identity_policy().apply_image(x, fixed([op], [[value]] * 4, (64, 64)))
            change.append((out - x).abs().mean().item())
        assert change == sorted(change) and change[-1] > 0.01, change


def test_property_8_a_label_that_would_stay_behind_is_refused():
    policy, x, y = randaugment(), smooth(), labels()
    with pytest.raises(UserError, match=r"policy\.sample"): policy(x, y)
    with pytest.raises(UserError, match=r"policy\.sample"): policy.apply_label(y, None)
    with pytest.raises(TypeError):                                                # if this stops raising, torchvision has learnt masks
        v2.RandAugment()(tv_tensors.Image((x[0] * 255).byte()), tv_tensors.Mask(y[0]))
    with pytest.raises(TypeError): v2.AutoAugment()(tv_tensors.Image((x[0] * 255).byte()), tv_tensors.Mask(y[0]))


def test_property_9_gradients_flow_through_apply_pred():
    policy = randaugment(2, 0.8, GEO)
    P = policy.sample(2, (8, 8), generator(0))
    p = torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: policy.apply_pred(t, P)[0], (p,))
    assert torch.autograd.gradcheck(lambda t: policy.invert_pred(t, P)[0], (p,))


# against torchvision, per sample

@pytest.mark.parametrize("op", MAGNITUDE)
@pytest.mark.parametrize("size", [(64, 64), (45, 60)])
def test_photo_op_equals_torchvision_per_sample(op, size):
    x = torch.cat([torch.rand(3, 3, *size, generator=generator(0)), F.interpolate(smooth(2), size), torch.full((1, 3, *size), 0.3)])
    reference, value = MAGNITUDE[op]
    want = torch.stack([reference(i) if value is None else reference(i, value) for i in x])
    got = identity_policy().apply_image(x, fixed([op], [[value or 0.0]] * 6, size))
    assert torch.allclose(got, want, atol=2e-6), (got - want).abs().max()


def test_solarize_add_by_hand():
    x = torch.tensor([0.0, 0.3, 0.45, 0.6]).view(1, 1, 1, 4).expand(1, 3, 1, 4).clone()
    out = identity_policy().apply_image(x, fixed(["solarize_add"], [0.2], (1, 4)))
    assert torch.allclose(out[0, 0, 0], torch.tensor([0.2, 0.5, 0.65, 0.6]))


def test_photo_ops_run_in_drawn_order():
    x = smooth(2)
    P = fixed(["brightness", "posterize"], [[0.5, 4], [0.5, 4]], (64, 64))
    want = TF.posterize(TF.adjust_brightness(x, 0.5), 4)
    other = TF.adjust_brightness(TF.posterize(x, 4), 0.5)
    assert torch.allclose(identity_policy().apply_image(x, P), want, atol=1e-6) and not torch.allclose(want, other, atol=1e-3)


def test_label_warp_agrees_with_grid_sample_nearest():
    y, P = labels(), draw(randaugment(3, 0.93, GEO))                              # at 1.0 shears meet exact ties
    shifted = torch.where(y == 255, -1, y)[:, None].float() + 1
    want = F.grid_sample(shifted, F.affine_grid(P.warp, shifted.shape, align_corners=False), mode="nearest", align_corners=False)[:, 0] - 1
    want = torch.where(want < 0, 255, want).long()
    assert (identity_policy().apply_label(y, P) == want).float().mean() > 0.9999


def test_geo_matches_torchvision_rotation():
    x, y = smooth(1), labels(1, ignore=False)
    P = fixed(["rotate"], [12.0], (64, 64))
    want = TF.rotate(tv_tensors.Mask(y), -12, fill=255)
    assert (identity_policy().apply_label(y, P) == want).float().mean() > 0.999
    want = TF.rotate(x, -12, interpolation=TF.InterpolationMode.BILINEAR)
    got, valid = identity_policy().apply_pred(x, P)
    assert (got - want).abs().amax(1)[valid].max() < 1e-3


def test_inputs_are_not_changed():
    x, y = smooth(), labels()
    x0, y0 = x.clone(), y.clone()
    for policy in POLICIES.values():
        P = draw(policy)
        policy.apply_image(x, P), policy.apply_label(y, P)
    assert torch.equal(x, x0) and torch.equal(y, y0)


def test_views_stay_in_the_unit_interval():
    for policy in POLICIES.values():
        for seed in range(3):
            out = policy.apply_image(smooth(), draw(policy, seed=seed))
            assert out.min() >= 0 and out.max() <= 1 and out.dtype == torch.float32


def test_a_draw_serves_a_smaller_map_of_the_same_proportions():
    p, policy = probabilities(), flip_crop()
    P = draw(policy)
    small, valid = policy.apply_pred(F.avg_pool2d(p, 4), P)
    large, seen = policy.apply_pred(p, P)
    inside = F.avg_pool2d(seen[:, None].float(), 4)[:, 0] == 1
    assert (small - F.avg_pool2d(large, 4)).abs().mean(1)[valid & inside].mean() < 0.02


# erasing

def test_cutout_fills_the_image_and_is_invalid_for_predictions():
    P, x, y, p = fixed(["cutout"], [0.5], (64, 64)), smooth(1), labels(1), probabilities(1)
    policy = identity_policy((0.1, 0.2, 0.3))
    hole = torch.zeros(1, 64, 64, dtype=torch.bool)
    hole[:, 16:48, 16:48] = True
    assert torch.equal(policy.apply_image(x, P)[:, 1] == 0.2, hole) and torch.equal(policy.valid(P), ~hole)
    assert torch.equal(policy.apply_label(y, P), y) and torch.equal(policy.apply_pred(p, P)[1], ~hole)
    assert torch.equal(policy.invert_pred(p, P)[1], ~hole)
    ignoring = randaugment(1, 1.0, ("cutout",), erased_label="ignore")
    assert torch.equal(ignoring.apply_label(y, P), y.masked_fill(hole, 255))


def test_cutout_after_a_warp_is_taken_back_to_its_place():
    policy = randaugment(2, 0.8, (*GEO, "cutout"))
    P, p = draw(policy), probabilities()
    assert torch.equal(policy.apply_pred(p, P)[1], policy.valid(P))
    back, valid = policy.invert_pred(torch.where(policy.valid(P)[:, None], policy.apply_pred(p, P)[0], 0), P)
    assert valid.float().mean() < 1 and (back - p).abs().mean(1)[valid].mean() < 0.02


# the policies

def test_autoaugment_has_25_sub_policies_of_two_ops():
    policy = autoaugment()
    assert len(policy.programs) == 25 and all(len(p) == 2 for p in policy.programs)
    first = policy.programs[0]                                                    # Posterize 0.4 8, Rotate 0.6 9
    assert first[0].ops == ("posterize",) and first[0].p == 0.4 and math.isclose(first[0].low, 8 / 9)
    assert first[1].ops == ("rotate",) and first[1].p == 0.6 and first[1].low == 1.0
    bits = v2.AutoAugment._AUGMENTATION_SPACE["Posterize"][0](10, 64, 64)
    pairs = [(s, t) for p, q in zip(policy.programs, v2.AutoAugment()._policies) for s, t in zip(p, q)]
    assert len(pairs) == 50 and all(s.p == t[1] for s, t in pairs)
    assert all(math.floor(8 - 4 * s.low + 0.5) == bits[t[2]] for s, t in pairs if t[0] == "Posterize")


def test_autoaugment_draws_at_the_stated_rates():
    P = autoaugment().sample(20000, (64, 64), generator(0))
    share = lambda name: (P.op == list(OPS).index(name)).any(1).float().mean().item()
    programs = autoaugment().programs
    for name in ("equalize", "rotate", "invert"):
        want = sum(1 - math.prod(1 - s.p for s in p if s.ops == (name,)) for p in programs) / 25
        assert abs(share(name) - want) < 0.015


def test_randaugment_draws_uniformly_with_replacement():
    P = randaugment(2, 0.5).sample(9000, (64, 64), generator(0))
    counts = torch.bincount(P.op.flatten(), minlength=len(OPS))
    assert all(abs(counts[list(OPS).index(o)].item() / 18000 - 1 / 9) < 0.012 for o in PHOTO) and counts.sum() == 18000
    assert (P.op[:, 0] == P.op[:, 1]).float().mean() > 0.08
    bright = P.value[P.op == list(OPS).index("brightness")]
    assert set(bright.mul(100).round().int().tolist()) == {55, 145}


def test_strength_can_be_a_range():
    P = randaugment(1, (0.2, 0.6), ("brightness",)).sample(2000, (64, 64), generator(0))
    reach = (P.value - 1).abs() / 0.9
    assert reach.min() >= 0.199 and reach.max() <= 0.601 and reach.std() > 0.1


def test_flip_crop_ranges():
    P = flip_crop((0.9, 1.3), 0.05, 0.5).sample(4000, (60, 80), generator(0))
    zoom = P.matrix[:, 1, 1]
    assert 0.9 <= zoom.min() < 0.91 and 1.28 < zoom.max() <= 1.3 + 1e-5
    assert abs((P.matrix[:, 0, 0] < 0).float().mean() - 0.5) < 0.03
    assert P.matrix[:, 0, 2].abs().max() <= 4 + 1e-4 and P.matrix[:, 1, 2].abs().max() <= 3 + 1e-4


def test_converters():
    assert from_tv_bin(9, 31) == 0.3 and from_tf_level(9, 10) == 0.9 and from_tv_bin(30) == 1


# CutMix

def test_cutmix_property_1_one_box_for_image_label_confidence_and_valid():
    a, b = smooth(4), smooth(4, seed=5)
    nothing, whole = torch.zeros(4, 64, 64, dtype=torch.bool), torch.ones(4, 64, 64, dtype=torch.bool)
    assert torch.equal(cutmix(a, b, nothing), a) and torch.equal(cutmix(a, b, whole), b)
    box = cutmix_boxes(4, (64, 64), generator(0))
    one, two = torch.zeros(4, 64, 64), torch.ones(4, 64, 64)
    for t in (lambda m: m.long(), lambda m: m, lambda m: m.bool(), lambda m: m[:, None].expand(-1, 3, -1, -1)):
        mixed = cutmix(t(one), t(two), box)
        assert torch.equal(mixed.bool() if mixed.dim() == 3 else mixed[:, 1].bool(), box)
    assert cutmix(one.long(), two.long(), box).dtype == torch.long


def test_cutmix_boxes_cover_what_was_asked_and_stay_inside():
    box = cutmix_boxes(500, (64, 96), generator(0), area=(0.25, 0.5), aspect=(0.3, 3))
    part = box.float().mean((1, 2))
    assert part.min() > 0.23 and part.max() < 0.52 and part.std() > 0.05
    rows, cols = box.any(2).sum(1), box.any(1).sum(1)
    assert torch.equal(rows * cols, box.sum((1, 2)))                              # rectangles
    assert not cutmix_boxes(3, (64, 64), generator(0), area=(0, 0)).any() and cutmix_boxes(3, (64, 64), generator(0), area=(1, 1)).all()
    assert torch.equal(cutmix_boxes(4, (64, 64), generator(0)), cutmix_boxes(4, (64, 64), generator(0)))


# mistakes end in one sentence

@pytest.mark.parametrize("make, words", [
    (lambda: randaugment(2, 1.5), "strength 1.5"), (lambda: randaugment(2, (0.6, 0.2)), "strength"), (lambda: randaugment(-1), "n is -1"),
    (lambda: randaugment(2, 0.5, ("brightnes",)), "did you mean 'brightness'"), (lambda: randaugment(2, 0.5, ()), "ops is empty"),
    (lambda: randaugment(1, erased_label="drop"), "erased_label 'drop'"), (lambda: flip_crop(scale=(0, 1)), "scale"),
    (lambda: flip_crop(shift=2), "shift 2"), (lambda: flip_crop(flip=2), "flip 2"), (lambda: from_tv_bin(31), "magnitude 31"),
    (lambda: from_tf_level(11), "level 11"), (lambda: fixed(["rotate"], [[1, 2]], (8, 8)), "one value per op"),
    (lambda: cutmix_boxes(1, (8, 8), generator(0), area=(0.5, 0.2)), "area"), (lambda: cutmix_boxes(1, (8, 8), generator(0), aspect=(0, 1)), "aspect"),
    (lambda: cutmix(torch.zeros(1, 8, 8), torch.zeros(1, 8, 9), torch.zeros(1, 8, 8).bool()), "CutMix of shapes"),
    (lambda: cutmix(torch.zeros(1, 8, 8), torch.zeros(1, 8, 8), torch.zeros(1, 8, 8)), "box is torch.float32"),
    (lambda: randaugment().sample(2, (8, 8), None), "torch.Generator on the CPU"),
])
def test_wrong_arguments(make, words):
    with pytest.raises(UserError, match=words): make()


@pytest.mark.parametrize("call, words", [
    (lambda p, P: p.apply_image((smooth() * 255).byte(), P), "uint8"), (lambda p, P: p.apply_label(labels().float(), P), "apply_pred"),
    (lambda p, P: p.apply_label(smooth(), P), "shape"), (lambda p, P: p.apply_image(smooth()[0], P), "shape"),
    (lambda p, P: p.apply_image(smooth()[:, :1], P), "1 channels"), (lambda p, P: p.apply_image(smooth(4), P), "8 rows"),
    (lambda p, P: p.apply_image(smooth(8, (64, 96)), P), "64x64"), (lambda p, P: p.apply_pred(labels()[:, None], P), "apply_label"),
])
def test_wrong_tensors(call, words):
    policy = randaugment()
    with pytest.raises(UserError, match=words): call(policy, draw(policy))


def test_padding_is_never_class_zero_in_any_policy():
    y = torch.ones(16, 32, 32, dtype=torch.long)
    for policy in (flip_crop(), randaugment(3, 1.0, GEO), autoaugment()):
        out = policy.apply_label(y, policy.sample(16, (32, 32), generator(0)))
        assert set(out.unique().tolist()) <= {1, 255}


def test_module_needs_no_notebook_packages():
    for room in (augment, boxes, policies): assert not {"nbdev", "IPython", "ipywidgets", "matplotlib"} & set(vars(room))


def test_uint8_labels_keep_their_values():
    y, P = labels(), draw(randaugment(2, 0.7, GEO))
    out = identity_policy().apply_label(y.byte(), P)
    assert out.dtype == torch.uint8 and torch.equal(out.long(), identity_policy().apply_label(y, P))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(dtype):
    policy, x, p = POLICIES["all"], smooth(), probabilities()
    P = draw(policy)
    image, (soft, valid) = policy.apply_image(x.to(dtype), P), policy.apply_pred(p.to(dtype), P)
    assert image.dtype == soft.dtype == dtype and torch.equal(valid, policy.valid(P))
    assert (soft.float() - policy.apply_pred(p, P)[0]).abs().max() < 0.02


# ---------------------------------------------------------------- lawful views
def task_with(flip="horizontal", rotate=0): return SimpleNamespace(mean=(0.0, 0.0, 0.0), flip=flip, rotate=rotate)


def kinds_of_views(flip, rotate, size=(4, 4), n=400):
    "Which of the eight symmetries of a picture are drawn: (flipped?, quarter turns)"
    policy = weak_policy(task_with(flip, rotate), scale=(1, 1), shift=0)
    x = (torch.arange(size[0] * size[1]) / size[0] / size[1]).view(1, 1, *size).expand(1, 3, *size)
    P = policy.sample(n, size, generator(0, flip, rotate))
    views = policy.apply_image(x.expand(n, 3, *size).contiguous(), P)
    symmetries = {(m, k): (x.flip(-1) if m else x).rot90(k, (-2, -1)) for m in (False, True) for k in range(4)}
    symmetries = {key: v for key, v in symmetries.items() if v.shape == x.shape}
    seen = [[key for key, v in symmetries.items() if torch.allclose(row[None], v, atol=1e-5)] for row in views]
    assert all(len(s) == 1 for s in seen), "a view is one of the symmetries, to the pixel: no padding"
    y = (x[:, 0] * 255).round().to(torch.uint8).expand(n, *size).contiguous()
    assert torch.equal(policy.apply_label(y, P), (views[:, 0] * 255).round().to(torch.uint8)) and policy.valid(P).all()
    return {s[0] for s in seen}


@pytest.mark.parametrize("flip, rotate, kinds", [
    ("none", 0, {(False, 0)}), ("horizontal", 0, {(False, 0), (True, 0)}),
    ("both", 0, {(False, 0), (True, 0), (True, 2), (False, 2)}), ("none", 90, {(False, k) for k in range(4)}),
    ("both", 90, {(m, k) for m in (False, True) for k in range(4)})])
def test_only_lawful_views_are_drawn(flip, rotate, kinds): assert kinds_of_views(flip, rotate) == kinds


def test_oblong_images_turn_by_half(): assert kinds_of_views("none", 90, (3, 5)) == {(False, 0), (False, 2)}


def test_the_default_view_is_that_of_flip_crop():
    a, b = (p.sample(50, (20, 30), generator(1, "x")) for p in (weak_policy(task_with()), flip_crop()))
    assert torch.equal(a.op, b.op) and torch.equal(a.value, b.value) and torch.equal(a.warp, b.warp)
