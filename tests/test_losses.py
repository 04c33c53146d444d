"losses: values by hand, the denominator, gradients"
import math

import pytest
import torch
import torch.nn.functional as F

from semiseg_nb.core import UserError, generator
from semiseg_nb.losses import capped_weights, consistency, cross_entropy, dice_loss, divergence

KINDS = ("mse", "kl", "js", "ce")


def maps(seed=0, dtype=torch.float64):
    g = generator(seed, "maps")
    return torch.randn(2, 4, 5, 6, generator=g, dtype=dtype), torch.randn(2, 4, 5, 6, generator=g, dtype=dtype).softmax(1)


def test_cross_entropy_equals_pytorch_where_something_is_labelled():
    z, y = torch.randn(2, 4, 5, 6), torch.randint(0, 4, (2, 5, 6))
    y[0, :2] = 255
    torch.testing.assert_close(cross_entropy(z, y), F.cross_entropy(z, y, ignore_index=255))


def test_cross_entropy_of_nothing_is_zero_with_a_finite_gradient():
    z = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = cross_entropy(z, torch.full((1, 4, 4), 255))
    loss.backward()
    assert loss == 0 and torch.equal(z.grad, torch.zeros_like(z))


def test_cross_entropy_weighs_pixels_not_images():
    z, y = torch.zeros(2, 2, 1, 4), torch.zeros(2, 1, 4, dtype=torch.long)
    z[0, 0] = 3
    y[0, 0, 1:] = 255
    expected = (F.softplus(torch.tensor(-3.0)) + 4 * math.log(2)) / 5
    torch.testing.assert_close(cross_entropy(z, y), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_divergence_is_zero_at_the_target_and_not_negative(kind):
    z, q = maps()
    assert (divergence(z, q, kind) >= 0).all()
    same = divergence(z, z.softmax(1), kind)
    if kind != "ce": torch.testing.assert_close(same, torch.zeros_like(same), atol=1e-5, rtol=0)


def test_values_by_hand():
    p, q = torch.tensor([0.8, 0.2]).view(1, 2, 1, 1), torch.tensor([0.5, 0.5]).view(1, 2, 1, 1)
    assert divergence(p.log(), q, "mse").item() == pytest.approx(0.18)
    assert divergence(p.log(), q, "kl").item() == pytest.approx(0.5 * math.log(0.5 / 0.8) + 0.5 * math.log(0.5 / 0.2))
    assert divergence(p.log(), p, "ce").item() == pytest.approx(-math.log(0.8))


def test_js_is_symmetric_and_bounded_by_log_two():
    z, q = maps()
    torch.testing.assert_close(divergence(z, q, "js"), divergence(q.log(), z.softmax(1), "js"), atol=1e-5, rtol=1e-4)
    hard = F.one_hot(torch.zeros(1, 2, 2, dtype=torch.long), 2).permute(0, 3, 1, 2).float()
    far = divergence((hard.flip(1) * 1e4), hard, "js")
    assert (far <= math.log(2) + 1e-6).all() and (far > 0.69).all() and torch.isfinite(far).all()


def test_kl_and_soft_cross_entropy_have_equal_gradients():
    z, q = maps()
    z.requires_grad_()
    kl, = torch.autograd.grad(consistency(z, q, kind="kl"), z)
    ce, = torch.autograd.grad(-(q * z.log_softmax(1)).sum(1).mean(), z)
    torch.testing.assert_close(kl, ce, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hard_target_gives_finite_values_and_gradients(kind):
    z = torch.tensor([[30.0, -30.0]]).view(1, 2, 1, 1).requires_grad_()
    q = torch.tensor([[0.0, 1.0]]).view(1, 2, 1, 1)
    loss = consistency(z, q, kind=kind)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(z.grad).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_denominator_counts_valid_pixels_trusted_or_not(kind):
    z, q = maps()
    valid = torch.zeros(2, 5, 6, dtype=torch.bool)
    valid[:, :3] = True
    trust = torch.zeros(2, 5, 6)
    trust[:, 0] = 1
    by_hand = divergence(z, q, kind)[:, 0].sum() / valid.sum()
    torch.testing.assert_close(consistency(z, q, trust, valid, kind), by_hand)


def test_padding_has_no_effect_and_nothing_valid_is_zero():
    z, q = maps()
    valid = torch.zeros(2, 5, 6, dtype=torch.bool)
    valid[:, :3] = True
    loss = consistency(z, q, valid=valid)
    z[:, :, 3:] = float("nan")
    assert consistency(z, q, valid=valid) == loss
    assert consistency(z, q, valid=torch.zeros_like(valid)) == 0


def test_no_gradient_reaches_the_target():
    z, q = maps()
    z.requires_grad_(), q.requires_grad_()
    consistency(z, q).backward()
    assert q.grad is None and z.grad is not None


def test_unknown_kind():
    with pytest.raises(UserError, match="divergence 'cosine' is not known"): divergence(*maps(), "cosine")


# ---------------------------------------------------------------- rare classes

def test_weights_are_inverse_frequencies_up_to_the_cap():
    w = capped_weights(torch.tensor([900, 100, 1, 0]), 20)
    torch.testing.assert_close(w, torch.tensor([1.0, 9.0, 20.0, 1.0]))
    assert capped_weights(torch.tensor([5, 5]), 100).tolist() == [1, 1] and capped_weights(torch.tensor([900, 1]), 1).tolist() == [1, 1]


def test_weighted_cross_entropy_is_that_of_pytorch():
    g = torch.Generator().manual_seed(0)
    z, y, w = torch.randn(2, 3, 4, 4, generator=g), torch.randint(0, 3, (2, 4, 4), generator=g), torch.tensor([1.0, 3.0, 7.5])
    y[0, :2] = 255
    torch.testing.assert_close(cross_entropy(z, y, w), F.cross_entropy(z, y, w, ignore_index=255))
    assert cross_entropy(z, torch.full_like(y, 255), w) == 0
    assert torch.equal(cross_entropy(z, y), cross_entropy(z, y, None))


def test_dice_by_hand():
    z, y = torch.zeros(1, 2, 1, 3), torch.tensor([[[0, 1, 1]]])            # p = 1/2: 1 - 2 * .5 / (1.5 + 1) and 1 - 2 * 1 / (1.5 + 2)
    assert dice_loss(z, y).item() == pytest.approx((0.6 + 3 / 7) / 2)
    assert dice_loss(z, torch.full_like(y, 255)) == 0
