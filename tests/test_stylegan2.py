"StyleGAN2: sizes, variances, who moves whom, and penalties by hand"
import copy
import json
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import NoMask
from torch import nn

from semiseg_nb.adversarial import d_loss, g_loss, r1_penalty
from semiseg_nb.catalogue import load_task
from semiseg_nb.clock import Clock
from semiseg_nb.core import UserError, generator, seed_everything
from semiseg_nb.engine import evaluate, fit, make_accelerator, optimise, prepare
from semiseg_nb.engine import settings as settings_in_force
from semiseg_nb.ganaugment import augmentation
from semiseg_nb.stylegan2 import (
    FILTER,
    Discriminator,
    EqualConv2d,
    EqualLinear,
    Generator,
    ModulatedConv,
    StyleGAN2,
    channels_for,
    downsample,
    fused_lrelu,
    latents,
    lazy_adam,
    minibatch_std,
    modulated_conv,
    path_penalty,
    styles,
    truncate,
    upfirdn2d,
    upsample,
)

SMALL = {4: 8, 8: 8, 16: 8, 32: 8}
TINY = dict(width=4, d=8, n_map=1, half_life=100.0)


def rng(seed=0): return generator(seed, "test")
def randn(*shape, seed=0, **kw): return torch.randn(*shape, generator=rng(seed), **kw)
def rand(*shape, seed=0): return torch.rand(*shape, generator=rng(seed))


@pytest.fixture(scope="module")
def task(): return load_task("scenes", n_labelled=6, size=32, n_unlabelled=20, n_tune=0)


@pytest.fixture(scope="module")
def G():
    seed_everything(0)
    return Generator(32, d=8, channels=SMALL, heads=(3, 5))


def method(task, **kw):
    seed_everything(0)
    return StyleGAN2(task, **{**TINY, **kw})


def batch(task, n=3):
    lab, unl = task.labelled.__getitems__([0]), task.unlabelled.__getitems__(list(range(n)))
    return {"image": lab["image"].float() / 255}, {"image": unl["image"].float() / 255}


def train(m, task, steps=3, **more):
    return fit(m, task, steps, 1, 3, seed=3, progress=False, eval_on=False, accelerator=make_accelerator("cpu"), **more)


def same(a, b):
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# ---------------------------------------------------------------- equalised layers

@pytest.mark.parametrize("lr_mul", [1.0, 0.01])
@pytest.mark.parametrize("n_in", [3, 64, 900])
def test_equalised_layers_keep_unit_variance(n_in, lr_mul):
    seed_everything(0)
    assert abs(EqualLinear(n_in, 4000, lr_mul=lr_mul)(randn(400, n_in)).std() - 1) < 0.05
    if lr_mul == 1.0 and n_in < 900: assert abs(EqualConv2d(n_in, 500, 3)(randn(30, n_in, 8, 8)).std() - 1) < 0.05


@pytest.mark.parametrize("lr_mul", [1.0, 0.01])
def test_adams_first_step_moves_the_weight_in_use_by_its_scale_times_the_rate(lr_mul):
    seed_everything(0)
    layer = EqualLinear(50, 20, lr_mul=lr_mul).double()
    before = layer.weight.detach() * layer.scale
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.01, eps=1e-20)                  # some gradients are smaller than the usual 1e-8
    layer(randn(8, 50, dtype=torch.float64)).square().sum().backward()
    optimiser.step()
    assert torch.allclose((layer.weight * layer.scale - before).abs(), torch.tensor(lr_mul / math.sqrt(50) * 0.01).double())


def test_the_bias_starts_where_it_is_told_for_every_rate():
    for lr_mul in (1.0, 0.01): assert torch.allclose(EqualLinear(2, 3, bias=1.5, lr_mul=lr_mul)(torch.zeros(1, 2)), torch.tensor(1.5))
    assert EqualLinear(2, 3, bias=None).bias is None


def test_the_activation_keeps_the_second_moment():
    assert abs(fused_lrelu(randn(10**6, 1)).square().mean() - 1.04) < 0.01
    x, bias = randn(2, 3, 4, 4), torch.tensor([1.0, -2, 0])
    assert torch.allclose(fused_lrelu(x, bias), math.sqrt(2) * F.leaky_relu(x + bias.view(1, 3, 1, 1), 0.2))


# ---------------------------------------------------------------- upfirdn2d

def one_axis(v, k, up, down, pad):
    stuffed = np.zeros(len(v) * up)
    stuffed[::up] = v
    stuffed = np.pad(stuffed, [max(p, 0) for p in pad])[max(-pad[0], 0):]
    return np.convolve(stuffed[:len(stuffed) - max(-pad[1], 0)], k, "valid")[::down]


@pytest.mark.parametrize("pad", [(0, 0), (2, 1), (1, 1), (2, 2), (-1, 2), (4, 5)])
@pytest.mark.parametrize("down", [1, 2, 3])
@pytest.mark.parametrize("up", [1, 2, 3])
def test_upfirdn2d_is_stuffing_padding_convolving_skipping(up, down, pad):
    x, k = randn(2, 2, 9, 6, dtype=torch.float64), np.array([0.1, 0.5, -0.3, 0.7])         # a filter that is not symmetric
    wanted = x.numpy()
    for axis in (2, 3): wanted = np.apply_along_axis(one_axis, axis, wanted, k, up, down, pad)
    assert np.allclose(upfirdn2d(x, torch.from_numpy(k), up, down, pad), wanted, atol=1e-12)


def test_upfirdn2d_is_scipys():
    signal = pytest.importorskip("scipy.signal")
    x, k = randn(10, dtype=torch.float64), np.array(FILTER)
    def ours(kernel, **kw): return upfirdn2d(torch.outer(x, x)[None, None], torch.from_numpy(kernel), **kw)[0, 0].numpy()
    up = signal.upfirdn(2 * k, x.numpy(), up=2)[1:21]
    down = signal.upfirdn(k, x.numpy())[2::2][:5]
    assert np.allclose(ours(2 * k, up=2, pad=(2, 1)), np.outer(up, up), atol=1e-12)
    assert np.allclose(ours(k, down=2, pad=(1, 1)), np.outer(down, down), atol=1e-12)


def test_a_constant_image_stays_constant_and_doubling_is_bilinear_inside():
    one, x = torch.ones(1, 2, 8, 8), randn(1, 2, 8, 8)
    for resample, side in ((upsample(), 16), (downsample(), 4)):
        out = resample(one)
        assert out.shape[2:] == (side, side) and torch.allclose(out[..., 1:-1, 1:-1], torch.tensor(1.0), atol=1e-6)
    twin = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    assert torch.allclose(upsample()(x)[..., 1:-1, 1:-1], twin[..., 1:-1, 1:-1], atol=1e-6)
    assert not torch.allclose(upsample()(x), twin, atol=1e-2), "the border sees zeros"


def test_upfirdn2d_has_two_derivatives():
    x, k = randn(1, 2, 4, 4, dtype=torch.float64).requires_grad_(), torch.tensor([0.1, 0.5, -0.3, 0.7], dtype=torch.float64)
    for kw in ({"up": 2, "pad": (2, 1)}, {"down": 2, "pad": (1, 1)}, {"pad": (1, 2)}):
        resample = partial(upfirdn2d, kernel=k, **kw)
        assert torch.autograd.gradcheck(resample, x) and torch.autograd.gradgradcheck(resample, x)


# ---------------------------------------------------------------- modulated convolution

@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("up", [False, True])
def test_one_kernel_for_all_equals_a_loop_over_images(up, demodulate):
    seed_everything(0)
    layer = ModulatedConv(5, 7, 3, 8, demodulate, up).double()
    x, w = randn(3, 5, 6, 6, dtype=torch.float64), randn(3, 8, dtype=torch.float64)
    s, weight, looped = layer.style(w), layer.weight * layer.scale, []
    for i in range(3):
        kernel = weight * s[i].view(1, -1, 1, 1)
        if demodulate: kernel = kernel / (kernel.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        out = F.conv_transpose2d(x[i:i + 1], kernel.transpose(0, 1), stride=2) if up else F.conv2d(x[i:i + 1], kernel, padding=1)
        looped.append(layer.blur(out) if up else out)
    assert torch.allclose(modulated_conv(x, weight, s, demodulate, layer.blur), torch.cat(looped), atol=1e-12)
    assert torch.allclose(layer(x, w), torch.cat(looped), atol=1e-12)


def test_an_image_does_not_feel_the_others():
    seed_everything(0)
    layer, x, w = ModulatedConv(4, 6, 3, 8), randn(3, 4, 5, 5), randn(3, 8)
    x2, w2 = x.clone(), w.clone()
    x2[1:], w2[1:] = 9.0, -9.0
    one, two = layer(x, w), layer(x2, w2)
    assert torch.allclose(one[0], two[0], atol=1e-5) and not torch.allclose(one[1], two[1], atol=1e-1)


def test_demodulation_gives_unit_variance_and_forgets_the_size_of_styles():
    seed_everything(0)
    layer, x, w = ModulatedConv(64, 48, 3, 16), randn(8, 64, 30, 30), randn(8, 16)
    y = layer(x, w)[..., 1:-1, 1:-1]
    assert abs(y.var() - 1) < 0.05
    layer.demodulate = False
    plain = layer(x, w)
    with torch.no_grad():
        for p in layer.style.parameters(): p.mul_(5)
    assert torch.allclose(layer(x, w), 5 * plain, rtol=1e-4, atol=1e-4)
    layer.demodulate = True
    assert torch.allclose(layer(x, w)[..., 1:-1, 1:-1], y, atol=1e-3)


# ---------------------------------------------------------------- generator

@pytest.mark.parametrize("size", [8, 32, 64])
def test_every_head_draws_a_map_of_full_size(size):
    G = Generator(size, d=4, channels=dict.fromkeys(channels_for(size), 4), heads=(3, 1, 6))
    maps = G(randn(2, 4))
    assert [m.shape for m in maps] == [(2, k, size, size) for k in (3, 1, 6)]
    assert G.n_w == 2 * int(math.log2(size)) - 2 and len(G.convs) == len(G.noise_shapes) == G.n_w - 1


@pytest.mark.parametrize("size", [4, 31, 48, 100])
def test_a_side_that_is_no_power_of_two_is_refused(size):
    with pytest.raises(UserError, match=f"size is {size}.*take 8, 16, 32"): Generator(size)


def test_widths():
    assert channels_for(32) == {4: 64, 8: 64, 16: 48, 32: 24} and channels_for(128)[128] == 64 and channels_for(256)[4] == 256
    assert channels_for(64, 16) == {4: 16, 8: 16, 16: 16, 32: 16, 64: 8} and channels_for(64, 1)[64] == 1


def test_the_mapping_sees_directions_only_and_starts_at_unit_size():
    seed_everything(0)
    G, z = Generator(32, d=64, channels=SMALL), randn(500, 64)
    assert torch.allclose(G.mapping(z), G.mapping(7 * z), atol=1e-4)
    assert 0.9 < G.mapping(z).square().mean().sqrt() < 1.2


def test_truncation_ends_in_one_image_and_starts_from_none(G):
    w, mean = G.mapping(randn(3, 8)), G.mean_w(100, rng())
    none, full = (G.synthesis(truncate(w, psi, mean), "const")[0] for psi in (0.0, 1.0))
    assert torch.equal(none[0], none[1]) and torch.allclose(full, G.synthesis(w, "const")[0], atol=1e-5)
    assert not torch.allclose(full[0], full[1], atol=1e-2)
    assert torch.equal(mean, G.mean_w(100, rng())) and not mean.requires_grad


def test_noise_does_nothing_until_it_has_strength(G):
    G, w = copy.deepcopy(G), G.mapping(randn(2, 8)).detach()
    assert torch.equal(G.synthesis(w)[0], G.synthesis(w)[0])
    with torch.no_grad():
        for c in G.convs: c.strength.fill_(1.0)
    assert not torch.equal(G.synthesis(w)[0], G.synthesis(w)[0])
    maps = G.noise(2)
    assert torch.equal(G.synthesis(w, maps)[0], G.synthesis(w, maps)[0])
    assert torch.equal(G.synthesis(w, "const")[0], G.synthesis(w, "const")[0])
    assert torch.equal(G.synthesis(w, rng())[0], G.synthesis(w, rng())[0])
    with pytest.raises(UserError, match="noise 'fixed' is not known"): G.synthesis(w, "fixed")


def test_mixing_cuts_between_slots_and_every_slot_counts(G):
    z, z2 = randn(2, 8), randn(2, 8, seed=1)
    w, w2 = G.mapping(z), G.mapping(z2)
    for cut in (1, 3, G.n_w):
        mixed = G.mixed(z, z2, cut)
        assert torch.equal(mixed[:, :cut], w[:, None].expand(-1, cut, -1)) and torch.equal(mixed[:, cut:], w2[:, None].expand(-1, G.n_w - cut, -1))
    own = G.mixed(z, z2, torch.tensor([2, G.n_w]))
    assert torch.equal(own[0, 2], w2[0]) and torch.equal(own[1, -1], w[1])
    assert torch.allclose(G.synthesis(G.mixed(z, z2, G.n_w), "const")[0], G.synthesis(w, "const")[0])
    slots = w[:, None].repeat(1, G.n_w, 1).detach().requires_grad_()
    G.synthesis(slots, "const")[0].square().sum().backward()
    assert (slots.grad.abs().sum((0, 2)) > 0).all()


def test_a_head_reads_the_slot_of_the_next_convolution(G):
    w = G.mapping(randn(1, 8)).detach()[:, None].repeat(1, G.n_w, 1)
    seen = []
    hooks = [m.register_forward_hook(lambda _, given, out: seen.append(float(given[1][0, 0]))) for m in (*G.convs, *G.to_map[0])]
    w[0, :, 0] = torch.arange(G.n_w)
    G.synthesis(w, "const")
    for h in hooks: h.remove()
    assert seen == [0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7]                                       # conv, head; conv, conv, head; ...


@pytest.mark.parametrize(("head", "held", "moved"), [
    (0, (), {"map", "const", "convs", "to_map.0"}), (1, (), {"map", "const", "convs", "to_map.1"}),
    (1, (1,), {"to_map.1"}), (0, (1,), {"map", "const", "convs", "to_map.0"}),
])
def test_which_part_a_loss_on_a_head_moves(G, head, held, moved):
    G = copy.deepcopy(G)
    maps = G(randn(4, 8), held=held)
    maps[head].square().mean().backward()
    trained = [n.split(".") for n, p in G.named_parameters() if p.grad is not None and p.grad.any()]
    assert {".".join(n[:2]) if n[0] == "to_map" else n[0] for n in trained} == moved


def test_held_changes_no_map(G):
    z = randn(2, 8)
    assert all(torch.equal(a, b) for a, b in zip(G(z), G(z, held=(1,))))


# ---------------------------------------------------------------- discriminator

def test_the_minibatch_deviation_is_one_channel():
    x = randn(8, 3, 4, 4)
    y = minibatch_std(x)
    assert y.shape == (8, 4, 4, 4) and torch.equal(y[:, :3], x)
    by_hand = [(x[j::2].var(0, correction=0) + 1e-8).sqrt().mean() for j in range(2)]      # groups of four: every second image
    assert torch.allclose(y[:, 3, 0, 0], torch.stack(by_hand).repeat(4))
    assert torch.allclose(minibatch_std(x[[2, 1, 6, 3, 0, 5, 4, 7]])[:, 3], y[:, 3], atol=1e-6), "the order within a group does not matter"


def test_the_minibatch_deviation_of_equal_images_is_zero_with_a_finite_gradient():
    x = randn(1, 3, 4, 4).repeat(4, 1, 1, 1).requires_grad_()
    y = minibatch_std(x)[:, 3]
    assert y.max() <= 1.001e-4                                                             # the root of 1e-8
    y.sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(("n", "group"), [(1, 1), (2, 2), (5, 5), (6, 3), (7, 7), (10, 2), (12, 4), (25, 25)])
def test_any_number_of_images_can_be_judged_and_compared(n, group):
    "Published code stops when the group does not divide the batch; a batch without a divisor from 2 to 4 is one group"
    D, x = Discriminator(16, channels={4: 4, 8: 4, 16: 4}), randn(n, 2, 4, 4)
    assert D(randn(n, 3, 16, 16)).shape == (n, 1)
    deviation = minibatch_std(x)[:, 2, 0, 0]
    by_hand = [(x[j::n // group].var(0, correction=0) + 1e-8).sqrt().mean() for j in range(n // group)]
    assert torch.allclose(deviation, torch.stack(by_hand).repeat(group)), f"groups of {group}"
    assert n == 1 or deviation.min() > 0.1, "the statistic is there"


def test_features_of_the_discriminator():
    D = Discriminator(32, n_in=8, channels=SMALL)
    assert [m.shape for m in D.features(randn(2, 8, 32, 32))] == [(2, 8, s, s) for s in (16, 8, 4)]


# ---------------------------------------------------------------- losses and penalties

def test_losses_by_hand():
    zero, one = torch.zeros(4, 1), torch.ones(4, 1)
    assert abs(d_loss(zero, zero) - 2 * math.log(2)) < 1e-6 and abs(g_loss(zero) - math.log(2)) < 1e-6
    assert abs(d_loss(one, -2 * one) - math.log(1 + math.exp(-1)) - math.log(1 + math.exp(-2))) < 1e-6
    assert abs(g_loss(one) - math.log(1 + math.exp(-1))) < 1e-6


@pytest.mark.parametrize("n", [1, 5])
def test_r1_of_a_linear_discriminator(n):
    "Does not depend on the size of the batch: averaging D over the batch first would divide by its square"
    a = randn(12)
    assert torch.allclose(r1_penalty(lambda x: (x.flatten(1) @ a)[:, None], randn(n, 3, 2, 2), 0.6), 0.3 * a.square().sum())


@pytest.mark.parametrize("kind", ["translation,colour,cutout", "ada"])
def test_r1_reaches_the_weights_through_every_augmentation(kind):
    D, T = Discriminator(16, channels={4: 4, 8: 4, 16: 4}), augmentation(kind)
    if kind == "ada": T.p.fill_(0.8)
    r1_penalty(lambda x: D(T(x, None, rng())), rand(4, 3, 16, 16), 1.0).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in D.parameters()) and D.first.weight.grad.any()


def test_r1_is_computed_in_float32_under_autocast():
    seen = []
    def D(x):
        seen.append(F.linear(x.flatten(1), torch.ones(1, 12)).dtype)
        return x.flatten(1).sum(1, keepdim=True)
    with torch.autocast("cpu", torch.bfloat16): loss = r1_penalty(D, randn(2, 3, 2, 2).bfloat16(), 1.0)
    assert seen == [torch.float32] and loss.dtype == torch.float32 and loss == 6


def test_path_length_of_a_linear_generator():
    A, direction, w = randn(12, 5), randn(3, 3, 2, 2, seed=1), randn(3, 1, 5).requires_grad_()
    image = (w[:, 0] @ A.T).view(3, 3, 2, 2)
    length = (direction.flatten(1) @ A / 2).norm(dim=1)                                    # over the root of 2 * 2 pixels
    penalty, mean = path_penalty(image, w, torch.tensor(2.0), direction)
    assert torch.allclose(mean, 2 + 0.01 * (length.mean() - 2)) and not mean.requires_grad
    assert torch.allclose(penalty, (length - mean).square().mean(), rtol=1e-4)


def test_no_path_penalty_when_all_lengths_are_the_mean():
    w = randn(4, 1, 3).requires_grad_()
    penalty, mean = path_penalty(w.view(4, 3, 1, 1) * 1, w, torch.tensor(math.sqrt(3)), torch.ones(4, 3, 1, 1))
    assert penalty < 1e-12 and abs(mean - math.sqrt(3)) < 1e-6


def test_a_lazy_optimiser_is_corrected_for_its_extra_steps():
    for every, c in ((16, 16 / 17), (4, 4 / 5), (0, 1.0)):
        group = lazy_adam(nn.Linear(2, 2), 0.002, every).param_groups[0]
        assert (group["lr"], group["betas"], group["eps"]) == (0.002 * c, (0.0, 0.99**c), 1e-8)
        assert isinstance(group["betas"][0], float)


# ---------------------------------------------------------------- the method

def names(m, task, step): return [(name, *losses) for name, losses, *_ in m.updates(*batch(task), Clock(step, 100, 1))]


def test_lazy_penalties_come_when_they_are_due(task):
    m = method(task, path_weight=2.0, path_every=4)
    seen = [u for step in range(16) for u in names(m, task, step)]
    assert [seen.count(u) for u in (("discriminator", "d"), ("discriminator", "r1"), ("generator", "g"), ("generator", "path"))] == [16, 1, 16, 4]
    assert names(m, task, 16) == [("discriminator", "d"), ("discriminator", "r1"), ("generator", "g"), ("generator", "path")]
    assert names(method(task, gamma=0.0), task, 0) == [("discriminator", "d"), ("generator", "g")]


def test_penalties_are_multiplied_by_their_interval(task):
    def r1(every):
        return next(losses["r1"] for _, losses, *_ in method(task, r1_every=every).updates(*batch(task), Clock(0, 10)) if "r1" in losses)
    assert torch.allclose(r1(16), 16 * r1(1))


def test_each_update_moves_its_own_network(task):
    m = method(task, path_weight=2.0)
    prepare(m, task, 2, 2, accelerator := make_accelerator("cpu"))
    for name, losses, *_ in m.updates(*batch(task), Clock(0, 10)):
        before = {n: {k: v.clone() for k, v in getattr(m, n).state_dict().items()} for n in "GD"}
        optimise(m.optimisers[name], losses, accelerator)
        moved = {n for n in "GD" if any(not torch.equal(v, before[n][k]) for k, v in getattr(m, n).state_dict().items())}
        assert moved == {{"generator": "G", "discriminator": "D"}[name]}


def test_a_generators_step_goes_through_the_discriminator_without_touching_it(task):
    m = method(task)
    m.zero_grad()
    losses = {name: losses for name, losses, *_ in m.updates(*batch(task), Clock(1, 10))}["generator"]
    losses["g"].backward(inputs=list(m.G.parameters()))
    assert all(p.grad is None for p in m.D.parameters()) and m.G.const.grad.any() and m.G.map[0].weight.grad.any()


def test_the_average_follows(task):
    m = method(task, half_life=40.0)
    m.ema._t = 10**6                                                                      # far beyond its warm-up
    before = {k: v.clone() for k, v in m.ema.net.state_dict().items()}
    with torch.no_grad():
        for p in m.G.parameters(): p.add_(1)
    list(m.updates(*batch(task), Clock(1, 10)))
    beta = 0.5 ** (4 / 40)                                                                # a batch of four images
    for k, v in m.ema.net.named_parameters():
        assert not v.requires_grad and torch.allclose(v, beta * before[k] + (1 - beta) * m.G.get_parameter(k), atol=1e-5)


@pytest.mark.parametrize("kw", [{"augment": "ada", "ada_kimg": 0.02, "path_weight": 2.0, "path_every": 2}, {}])
def test_a_run_that_is_resumed_ends_bit_identical(task, tmp_path, kw):
    whole, part, resumed = (method(task, **kw) for _ in range(3))
    train(whole, task, 5)
    def updates(lab, unl, clock):
        if clock.step == 3: raise KeyboardInterrupt
        yield from StyleGAN2.updates(part, lab, unl, clock)
    part.updates = updates
    with pytest.raises(KeyboardInterrupt): train(part, task, 5, out_dir=tmp_path, checkpoint_every=1)
    train(resumed, task, 5, out_dir=tmp_path)
    assert same(whole, resumed) and not same(whole, part)


def test_p_is_logged_as_it_was(task):
    m = method(task, augment="ada", ada_kimg=0.01)
    logged, = (stats["p"] for _, _, *more in m.updates(*batch(task), Clock(0, 10)) for stats in more if "p" in stats)
    m.T.p.fill_(0.5)
    assert logged == 0


def test_settings_are_attributes_of_their_own_names(task):
    chosen = dict(TINY, gamma=0.1, r1_every=4, mixing=0.9, augment="ada", ada_kimg=2.0, mirror=False, path_weight=2.0, path_every=4, lr=1e-3)
    assert settings_in_force(method(task, **chosen)) == chosen


def test_styles_of_two_codes_are_as_frequent_as_asked(G):
    for mixing in (0.0, 0.5, 1.0):
        w = styles(G, 200, mixing, Clock(0, 10, 1), "g")
        assert (w[:, 0] != w[:, -1]).any(1).float().mean() == pytest.approx(mixing, abs=0.1)


def test_no_mask_is_looked_at(task):
    m = method(task)
    lab, unl = batch(task)
    assert list(m.updates(NoMask(lab, mask=None), NoMask(unl), Clock(0, 10)))


def test_the_discriminator_sees_everything_augmented(task, monkeypatch):
    m, seen = method(task), []
    monkeypatch.setattr(m, "view", lambda x, clock, stream: seen.append(stream) or x)
    list(m.updates(*batch(task), Clock(0, 10)))
    assert seen == ["real", "fake", "r1", "g"]


@pytest.mark.parametrize("make", [lambda: EqualConv2d(6, 5, 3), lambda: ModulatedConv(6, 5, 3, 8, demodulate=False)], ids=["plain", "modulated"])
def test_convolutions_are_equalised_like_linear_layers(make):
    seed_everything(0)
    layer, x, w = make().double(), randn(2, 6, 8, 8, dtype=torch.float64), randn(2, 8, dtype=torch.float64)
    assert layer.scale == pytest.approx(54**-0.5)
    before = layer.weight.detach() * layer.scale
    adam = torch.optim.Adam([layer.weight], lr=0.01, eps=1e-20)
    (layer(x, w) if isinstance(layer, ModulatedConv) else layer(x)).square().sum().backward()
    adam.step()
    assert torch.allclose((layer.weight * layer.scale - before).abs(), torch.tensor(0.01 * layer.scale).double())


def test_a_modulated_convolution_starts_at_unit_variance_without_demodulation():
    seed_everything(0)
    layer = ModulatedConv(64, 200, 3, 16, demodulate=False)
    with torch.no_grad(): layer.style.weight.zero_()                                      # style 1 everywhere
    assert abs(layer(randn(8, 64, 16, 16), randn(8, 16))[..., 1:-1, 1:-1].std() - 1) < 0.05


def test_a_path_length_is_a_mean_over_slots():
    w = randn(2, 4, 3).requires_grad_()
    _, mean = path_penalty(w.sum(1).view(2, 3, 1, 1), w, torch.tensor(0.0), torch.ones(2, 3, 1, 1))
    assert torch.allclose(mean, torch.tensor(0.01 * math.sqrt(3)))                        # a sum over the slots would double it


def test_each_network_has_the_correction_of_its_own_penalty(task):
    m = method(task, lr=0.01, r1_every=16, path_weight=2.0, path_every=4)
    for name, net, c in (("discriminator", m.D, 16 / 17), ("generator", m.G, 4 / 5)):
        group, = m.optimisers[name].param_groups
        assert group["lr"] == pytest.approx(0.01 * c) and group["betas"][1] == pytest.approx(0.99**c)
        assert {id(p) for p in group["params"]} == {id(p) for p in net.parameters()}
    assert [o.param_groups[0]["lr"] for o in method(task, lr=0.01, gamma=0.0).optimisers.values()] == [0.01, 0.01]


def reals(m, lab, unl, monkeypatch):
    "What the discriminator is shown as real"
    seen = {}
    monkeypatch.setattr(m, "view", lambda x, clock, stream: seen.setdefault(stream, x))
    list(m.updates(lab, unl, Clock(0, 10)))
    return seen["real"]


def test_labelled_images_are_real_images_too(task, monkeypatch):
    m = method(task, mirror=False)
    lab, unl = batch(task)
    assert torch.allclose(reals(m, lab, unl, monkeypatch), torch.cat([lab["image"], unl["image"]]) * 2 - 1)
    assert torch.equal(reals(m, lab, None, monkeypatch), lab["image"] * 2 - 1)


def test_mirroring_turns_half_of_the_images(task, monkeypatch):
    m, (lab, unl) = method(task), batch(task, 20)
    x, plain = reals(m, lab, unl, monkeypatch), torch.cat([lab["image"], unl["image"]]) * 2 - 1
    kept, turned = ([torch.equal(a, b) for a, b in zip(x, v)] for v in (plain, plain.flip(3)))
    assert all(a or b for a, b in zip(kept, turned)) and 4 < sum(turned) < 17


def test_random_numbers_belong_to_a_step_and_its_processes():
    clocks = [Clock(5, 10, 1, rank=r, world=2) for r in range(2)]
    both = torch.cat([latents(3, 4, c, "g", "cpu") for c in clocks])
    assert torch.equal(both, latents(6, 4, Clock(5, 10, 1), "g", "cpu")) and not torch.equal(both, latents(6, 4, Clock(6, 10, 1), "g", "cpu"))


def test_samples_are_images_and_repeat(task):
    m = method(task)
    one = m.sample(4, psi=0.7, seed=2)
    assert one.shape == (4, 3, 32, 32) and 0 <= one.min() and one.max() <= 1 and torch.equal(one, m.sample(4, psi=0.7, seed=2))
    assert torch.equal(m.sample(2, psi=0.0)[0], m.sample(2, psi=0.0)[1])


def test_it_labels_nothing(task):
    with pytest.raises(UserError, match="StyleGAN2 draws images and labels none.*eval_on=False"): evaluate(method(task), task.val)


@pytest.mark.parametrize(("kw", "text"), [
    ({"gamma": -1.0}, "gamma is -1.0.*at least 0"), ({"mixing": 2.0}, "mixing is 2.0.*between 0 and 1"),
    ({"augment": "blur"}, "augmentation 'blur' is not known"),
    ({"width": 0}, "width is 0.*at least 1"), ({"half_life": 0.0}, "half_life is 0.0.*more than 0"), ({"r1_every": 0}, "r1_every is 0.*at least 1"),
    ({"gama": 1.0}, "setting of StyleGAN2 'gama' is not known.*did you mean 'gamma'"), ({"mirror": 1}, "mirror is 1.*True or False"),
    ({"lr": math.nan}, "lr is nan"),
])
def test_a_setting_that_cannot_work_is_refused(task, kw, text):
    with pytest.raises(UserError, match=text): method(task, **kw)


def test_images_that_are_no_squares_or_no_power_of_two_are_refused(task):
    class Odd: labelled, size = type("L", (), {"crop": None}), (32, 64)
    with pytest.raises(UserError, match="images are 32x64, but a StyleGAN2 draws squares"): StyleGAN2(Odd)
    Odd.size = (48, 48)
    with pytest.raises(UserError, match="size is 48.*take 8, 16, 32, 64"): StyleGAN2(Odd)


def test_a_few_steps_of_training_change_the_images(task):
    m = method(task)
    before = m.sample(2)
    run = train(m, task, 3)
    assert not torch.equal(before, m.sample(2)) and all(math.isfinite(v) for row in run.history for v in row.values())


def test_bf16_gives_finite_float32_losses(task):
    m = method(task, augment="ada", path_weight=2.0)
    m.T.p.fill_(0.8)
    with torch.autocast("cpu", torch.bfloat16):
        losses = {k: v for _, ls, *_ in m.updates(*batch(task), Clock(0, 10)) for k, v in ls.items()}
    assert set(losses) == {"d", "r1", "g", "path"} and all(torch.isfinite(v) and v.dtype == torch.float32 for v in losses.values())


def test_the_solutions_of_the_exercises():
    lesson = json.loads((Path(__file__).resolve().parents[1] / "nbs/40_stylegan2.ipynb").read_text(encoding="utf-8"))
    cells = {c["id"]: "".join(c["source"]) for c in lesson["cells"]}
    code, = re.findall(r"```python\n(.*?)```", cells["solutions"], re.S)
    names = {"torch": torch, "F": F, "Generator": Generator, "channels_for": channels_for, "modulated_conv": modulated_conv}
    exec(code, names)
    asked = {cells[f"exercise-{i}"].removeprefix("# ") for i in (1, 2, 3)}
    assert asked == {"slots", "kernel_of", "gap"} <= set(names) and code.count("assert") == 3
