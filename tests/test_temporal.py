"Temporal Ensembling and Mean Teacher: the properties of the average, a bank that survives a crash, and the step beside the supervised one"
import copy
import math
import os
import signal
import subprocess
import sys

import pytest
import torch
from torch import nn

from semiseg_nb.augment import flip_crop, identity
from semiseg_nb.bank import PredictionBank, TwoPlaces, bank_bytes, row_layout
from semiseg_nb.catalogue import load_task
from semiseg_nb.clock import Clock
from semiseg_nb.core import EMA, UserError, generator, seed_everything
from semiseg_nb.engine import fit
from semiseg_nb.guidedmix import decode, pooled
from semiseg_nb.losses import consistency, cross_entropy
from semiseg_nb.models import UNet
from semiseg_nb.phases import pack, unpack
from semiseg_nb.supervised import Supervised, view
from semiseg_nb.temporal import MeanTeacher, TemporalEnsembling, averaged, encode, last_of_each, temporal_weight, unbiased

STORAGE = {"float32": {"dtype": "float32"}, "float16": {}, "uint8": {"dtype": "uint8"}, "stride 2": {"stride": 2}, "top 2": {"topk": 2},
           "top 2, stride 4, uint8": {"dtype": "uint8", "stride": 4, "topk": 2}, "ram": {"place": "ram"}}
EXACT = {k: v for k, v in STORAGE.items() if k in ("float32", "float16", "ram")}
storages = pytest.mark.parametrize("kwargs", STORAGE.values(), ids=STORAGE)


@pytest.fixture(scope="module")
def task(): return load_task("scenes", n_labelled=6, size=32)


def net(task, kind="unet"):
    seed_everything(0)
    if kind == "unet": return UNet(task.n_classes, width=4)
    if kind == "dropout":
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(8, task.n_classes, 1))
    return nn.Conv2d(3, task.n_classes, 1)


def batch(task, n=4):
    lab, unl = task.labelled.__getitems__(list(range(n))), task.unlabelled.__getitems__(list(range(n)))
    return ({"image": lab["image"].float() / 255, "mask": lab["mask"].long(), "index": lab["index"]},
            {"image": unl["image"].float() / 255, "index": unl["index"]})


def probabilities(seed, n=2, c=5, h=8, w=12): return torch.randn(n, c, h, w, generator=generator(seed, "p"), dtype=torch.float64).mul(2).softmax(1)


def everywhere(p): return torch.ones(len(p), *p.shape[-2:], dtype=torch.bool)


def filled(n_updates=4, n=6, index=(1, 4), **kwargs):
    "A bank with some updates of two of its images, and the predictions"
    bank, given = PredictionBank(n, 5, (8, 12), **kwargs), [probabilities(k) for k in range(n_updates)]
    for p in given: bank.update(torch.tensor(index), p, everywhere(p))
    return bank, given


def quiet(method, task, steps, **kwargs):
    return fit(method, task, steps, **{"batch_size": 4, "progress": False, "eval_on": False, "workers": 0} | kwargs)


def same(a, b):
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


# 1
def test_the_average_is_the_closed_form():
    alpha, z = 0.6, torch.zeros(2, 5, 8, 12, dtype=torch.float64)
    given = [probabilities(k) for k in range(7)]
    for n, p in enumerate(given, 1):
        z = averaged(z, p, everywhere(p), alpha)
        closed = (1 - alpha) * sum(alpha ** (n - k) * q for k, q in enumerate(given[:n], 1))
        torch.testing.assert_close(z, closed, atol=1e-12, rtol=0)
        torch.testing.assert_close(z.sum(1), torch.full_like(z[:, 0], 1 - alpha**n), atol=1e-12, rtol=0)
        torch.testing.assert_close(unbiased(z), closed / (1 - alpha**n), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kwargs", EXACT.values(), ids=EXACT)
def test_a_float16_bank_holds_the_closed_form(kwargs):
    bank, given = filled(7, **kwargs)
    closed = (1 - 0.6) * sum(0.6 ** (7 - k) * p for k, p in enumerate(given, 1)) / (1 - 0.6**7)
    q, valid = bank.read(torch.tensor([1, 4]))
    assert valid.all() and q.dtype == torch.float32
    torch.testing.assert_close(q.double(), closed, atol=2e-3, rtol=0)
    torch.testing.assert_close(q.sum(1), torch.ones(2, 8, 12), atol=1e-6, rtol=0)


# 2
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.6, 0.9, 0.99])
def test_constant_predictions_come_back_unchanged(alpha):
    bank, p, index = PredictionBank(2, 5, (8, 12), alpha=alpha, dtype="float32"), probabilities(0), torch.tensor([0, 1])
    for n in range(1, 6):
        bank.update(index, p, everywhere(p))
        torch.testing.assert_close(bank.read(index)[0].double(), p, atol=1e-5, rtol=0)
        torch.testing.assert_close(bank.accumulated(index)[0].double(), (1 - alpha**n) * p, atol=1e-5, rtol=0)     # without the correction


# 3
def test_alpha_zero_keeps_the_last_prediction():
    bank, given = filled(alpha=0.0, dtype="float32")
    torch.testing.assert_close(bank.read(torch.tensor([1, 4]))[0].double(), given[-1], atol=1e-6, rtol=0)


def test_the_first_epoch_has_the_gradient_of_the_labelled_images_alone(task):
    "Also where the labelled loss is divided by the whole batch, as in the paper: that is a factor on both sides"
    method = TemporalEnsembling(net(task), task, alpha=0.0)
    lab, unl = batch(task)
    (name, losses), = method.updates(lab, unl, Clock(3, 1000))
    assert losses["consistency"] == 0
    params = list(method.net.parameters())
    one = torch.autograd.grad(sum(losses.values()), params, retain_graph=True)
    two = torch.autograd.grad(losses["supervised"], params)
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    x, y = view(lab, method.policies, Clock(3, 1000))
    z = torch.randn(len(y), task.n_classes, 32, 32, requires_grad=True)
    paper = nn.functional.cross_entropy(z, y, ignore_index=255, reduction="sum") / ((y != 255).sum() + 4 * 32 * 32)
    share = (y != 255).sum() / ((y != 255).sum() + 4 * 32 * 32)
    torch.testing.assert_close(share * cross_entropy(z, y), paper)


# 4
@storages
def test_a_pixel_that_was_never_valid_is_no_target(kwargs):
    bank, p, index = PredictionBank(3, 5, (8, 12), **kwargs), probabilities(0), torch.tensor([2, 0])
    valid = everywhere(p)
    valid[:, :, 8:] = False
    for k in range(3): bank.update(index, probabilities(k), valid)
    bank.update(index, p, everywhere(p) & (torch.arange(12) < 4))                # the left third once more: other counts
    q, known = bank.read(index)
    assert known[:, :, :6].all() and not known[:, :, 9:].any()
    torch.testing.assert_close(q.sum(1)[known], torch.ones(int(known.sum())), atol=1e-3, rtol=0)
    z = torch.randn(2, 5, 8, 12, requires_grad=True)
    loss = consistency(z, q, None, known, "mse")
    other = q + 100 * (~known)[:, None]
    assert consistency(z, other, None, known, "mse") == loss and torch.isfinite(loss)


@storages
def test_an_empty_bank_gives_a_loss_of_zero_and_finite_gradients(kwargs):
    q, known = PredictionBank(3, 5, (8, 12), **kwargs).read(torch.tensor([0, 1]))
    z = torch.randn(2, 5, 8, 12, requires_grad=True)
    for kind in ("mse", "kl", "js"):
        loss = consistency(z, q, None, known, kind)
        assert loss == 0 and not known.any()
        assert torch.isfinite(torch.autograd.grad(loss, z)[0]).all()


# 5
def test_mirrored_epochs_give_the_bank_of_unmirrored_ones(task):
    "With a network that looks at one pixel at a time, the bank does not notice how the image was shown"
    banks = []
    for flip in (0.0, 1.0, 0.5):
        method = TemporalEnsembling(net(task, "conv"), task, student="weak", mix=0.0, remember="student", alpha=0.6)
        method.weak = flip_crop(scale=(1, 1), shift=0, flip=flip)
        for step in range(3):
            for _ in method.updates(*batch(task), Clock(step, 100)): pass
        banks.append(method.bank.accumulated(torch.arange(4))[0])
    assert banks[0].sum() > 0
    for other in banks[1:]: torch.testing.assert_close(other, banks[0], atol=1e-3, rtol=0)


def test_read_warps_along_with_the_view(task):
    bank, given = filled(1, dtype="float32")
    policy, index = flip_crop(scale=(1, 1), shift=0, flip=1.0), torch.tensor([1, 4])
    drawn = policy.sample(2, (8, 12), generator(0, "view"))
    q, known = bank.read(index, policy, drawn)
    assert known.all()
    torch.testing.assert_close(q, bank.read(index)[0].flip(3), atol=1e-6, rtol=0)
    shift = flip_crop(scale=(1, 1), shift=0.4, flip=0.0)
    drawn = shift.sample(2, (8, 12), generator(0, "view"))
    assert torch.equal(bank.read(index, shift, drawn)[1], shift.valid(drawn)) and not shift.valid(drawn).all()


# 6
@storages
def test_an_update_leaves_the_other_rows_alone(kwargs):
    bank, _ = filled(**kwargs)
    others = torch.tensor([0, 1, 2, 3, 5])
    before, row = bank.accumulated(others)[0], bank.accumulated(torch.tensor([4]))[0]
    p = probabilities(9, n=1)
    bank.update(torch.tensor([4]), p, everywhere(p))
    assert torch.equal(bank.accumulated(others)[0], before) and not torch.equal(bank.accumulated(torch.tensor([4]))[0], row)


@storages
def test_nbytes_is_the_formula_and_what_is_stored(kwargs, tmp_path):
    settings = {k: v for k, v in kwargs.items() if k != "place"}
    bank = PredictionBank(6, 5, (9, 13), **kwargs)
    assert bank.nbytes == bank_bytes(6, 5, (9, 13), **settings) == bank.rows.data.numel()
    filed = PredictionBank(6, 5, (9, 13), file=str(tmp_path / "bank"), **settings)
    assert filed.nbytes == bank_bytes(6, 5, (9, 13), copies=2, **settings) == (tmp_path / "bank").stat().st_size


@pytest.mark.parametrize("gigabytes, n, classes, size, settings", [
    (91.0, 10582, 21, (320, 320), {"dtype": "float32"}), (45.5, 10582, 21, (320, 320), {}), (2.84, 10582, 21, (320, 320), {"stride": 4}),
    (0.71, 10582, 21, (320, 320), {"stride": 8}), (0.36, 10582, 21, (320, 320), {"stride": 8, "dtype": "uint8"}),
    (474, 2975, 19, (1024, 2048), {"dtype": "float32"}), (14.8, 2975, 19, (1024, 2048), {"stride": 4}), (3.7, 2975, 19, (1024, 2048), {"stride": 8}),
    (0.066, 400, 5, (128, 128), {}), (0.47, 10582, 21, (320, 320), {"stride": 4, "topk": 2})])      # 0.41 without the counts of updates
def test_known_sizes(gigabytes, n, classes, size, settings):
    assert bank_bytes(n, classes, size, **settings) / 1e9 == pytest.approx(gigabytes, rel=0.02)


@storages
def test_a_bank_in_a_file_equals_one_in_memory_and_reopens(kwargs, tmp_path):
    settings = {k: v for k, v in kwargs.items() if k != "place"}
    memory, _ = filled(**settings)
    filed, _ = filled(file=str(tmp_path / "bank"), **settings)
    everyone = torch.arange(6)
    assert torch.equal(memory.accumulated(everyone)[0], filed.accumulated(everyone)[0])
    filed.flush()
    again = PredictionBank(6, 5, (8, 12), file=str(tmp_path / "bank"), **settings)
    assert torch.equal(memory.accumulated(everyone)[0], again.accumulated(everyone)[0])
    assert not PredictionBank(6, 5, (8, 12), file=str(tmp_path / "bank"), fresh=True, **settings).accumulated(everyone)[0].any()


# 7
def test_the_weight_is_zero_in_the_first_epoch_and_then_a_ramp():
    top = 30 * 4000 / 50000
    weights = [temporal_weight(n, 80, top) for n in range(121)]
    assert weights[0] == temporal_weight(0.99, 80, top) == 0 and weights[80] == weights[120] == top
    assert weights == sorted(weights) and weights[40] == pytest.approx(top * math.exp(-1.25))
    assert temporal_weight(1, 0, top) == top


def test_the_step_uses_that_weight(task):
    "An epoch is a pass over the unlabelled images, whatever the batch"
    n = len(task.unlabelled)
    for step, share in ((n // 4 - 1, 0.0), (n // 4 + 1, math.exp(-5 * (1 - (n // 4 + 1) / (5 * n / 4)) ** 2))):
        method = TemporalEnsembling(net(task), task, weight=2.0, warmup=0.5, mix=0.0, threshold=0.0)
        p = torch.rand(4, task.n_classes, 32, 32).softmax(1)
        method.bank.update(torch.arange(4), p, everywhere(p))
        method.eval()                                                            # so that the second pass below says the same
        lab, unl = batch(task)
        clock = Clock(step, 10 * n // 4)
        _, losses = next(method.updates(lab, unl, clock))                        # stops before the bank takes the prediction in
        method.weight, method.warmup = 1.0, 0.0
        _, plain = next(method.updates(lab, unl, clock))
        assert bool(plain["consistency"] > 0) == (share > 0)
        assert losses["consistency"].item() == pytest.approx(2 * share * plain["consistency"].item(), rel=0.02)


# 8
def test_the_teacher_is_the_average_of_the_student():
    first, last = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 5, 1)
    ema = EMA(first, decay=0.9)
    assert torch.equal(ema.net.weight, first.weight)
    ema._t = 1000                                                                # beyond the rule for the first steps
    for t in range(1, 6):
        ema.update(last)
        torch.testing.assert_close(ema.net.weight, last.weight + 0.9**t * (first.weight - last.weight))
    ema = EMA(first, decay=0.9)
    ema.update(last)
    assert torch.equal(ema.net.weight, last.weight)                              # a_0 = 0: the teacher is the student after one step


def test_the_teacher_has_averaged_buffers_no_gradient_and_no_optimiser(task):
    method = MeanTeacher(net(task), task, mix=0.0)
    def running(): return [b.clone() for name, b in method.ema.net.named_buffers() if "running" in name]
    before = running()
    quiet(method, task, 3)
    assert before and all(not torch.equal(a, b) for a, b in zip(before, running()))
    owned = {id(p) for o in method.optimisers.values() for g in o.param_groups for p in g["params"]}
    for p in method.ema.parameters(): assert id(p) not in owned and p.grad is None and not p.requires_grad
    assert not any(m.training for m in method.ema.modules())


def test_the_target_of_the_mean_teacher_is_the_averaged_network(task):
    lab, unl = batch(task)
    method = MeanTeacher(net(task), task, mix=0.0, kind="mse", weight=2.0, warmup=0.0).eval()
    with torch.no_grad(): next(method.ema.net.parameters()).mul_(0.5)
    clock = Clock(3, 100)
    _, losses = next(method.updates(lab, unl, clock))
    x_w, valid = method.weak_view(unl["image"], clock)
    with torch.no_grad(): p, q = method.net(method.strong_view(x_w, clock)).softmax(1), method.ema(x_w).softmax(1)
    by_hand = 2 * (p - q).square().sum(1)[valid].mean()
    assert losses["consistency"].item() == pytest.approx(by_hand.item(), rel=1e-5) and by_hand > 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in method.net.parameters()) and all(p.grad is None for p in method.ema.parameters())


def test_a_mean_teacher_that_sees_the_same_agrees_with_itself(task):
    method = MeanTeacher(net(task), task, mix=0.0, warmup=0.0).eval()
    method.strong = identity()
    (_, losses), = method.updates(*batch(task), Clock(3, 100))
    assert losses["consistency"] < 1e-9


# what is stored
@storages
@pytest.mark.parametrize("n, size", [(2, (8, 12)), (1, (9, 13)), (3, (1, 1))])
def test_what_is_packed_comes_back(kwargs, n, size):
    settings = {k: v for k, v in kwargs.items() if k != "place"}
    settings |= {"stride": min(settings.get("stride", 1), min(size))}
    layout = row_layout(5, size, **settings)
    topk, dtype, (h, w) = settings.get("topk", 0), settings.get("dtype", "float16"), layout[0][1][-2:]
    p, count = probabilities(0, n=n, h=h, w=w).float() * (1 - 0.6**3), torch.full((n, h, w), 3, dtype=torch.uint8)
    fields = encode(p, count, dtype, topk)
    rows = pack(fields)
    assert rows.dtype == torch.uint8 and len(rows) == n
    for a, b in zip(fields, unpack(rows, layout)): assert torch.equal(a, b) and a.dtype == b.dtype
    z, _ = decode(unpack(rows, layout), 5, 0.6)
    torch.testing.assert_close(z.sum(1), p.sum(1), atol=5 / 510, rtol=0)
    kept = p.topk(topk or 5, 1).indices
    torch.testing.assert_close(z.gather(1, kept), p.gather(1, kept), atol=1 / 510 + 1e-6 if dtype == "uint8" else 2**-11, rtol=0)


def test_top_k_spreads_the_rest_evenly():
    p = torch.tensor([0.6, 0.2, 0.1, 0.1, 0.0]).view(1, 5, 1, 1) * 0.4                # after one update at alpha .6
    z, count = decode(encode(p, torch.ones(1, 1, 1, dtype=torch.uint8), "float32", 2), 5, 0.6)
    torch.testing.assert_close(unbiased(z)[0, :, 0, 0], torch.tensor([0.6, 0.2, 0.2 / 3, 0.2 / 3, 0.2 / 3]), atol=1e-6, rtol=0)


def test_small_steps_stall_in_eight_bits():
    "An increment below half of 1/255 is lost: the known price of uint8"
    bank = PredictionBank(1, 2, (1, 1), alpha=0.99, dtype="uint8")
    fine = PredictionBank(1, 2, (1, 1), alpha=0.99, dtype="float32")
    for b in (bank, fine):
        for value in [0.5] * 400 + [0.6] * 400:
            p = torch.tensor([value, 1 - value]).view(1, 2, 1, 1)
            b.update(torch.tensor([0]), p, everywhere(p))
    assert fine.read(torch.tensor([0]))[0][0, 0] > 0.595 and bank.read(torch.tensor([0]))[0][0, 0] < 0.58


def test_low_resolution_averages_the_valid_pixels():
    p = torch.arange(16.0).view(1, 1, 4, 4)
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    valid[0, 0, 0], valid[0, 2:, 2:] = False, False
    small, seen = pooled(p, valid, (2, 2))
    assert small[0, 0, 0, 0] == pytest.approx((1 + 4 + 5) / 3) and seen.tolist() == [[[True, True], [True, False]]]


def test_an_image_that_comes_twice_in_a_batch_is_stored_once():
    assert last_of_each(torch.tensor([3, 1, 3, 3, 1])).tolist() == [3, 4, 3, 3, 4]
    bank, p = PredictionBank(4, 5, (8, 12), dtype="float32"), probabilities(0, n=3)
    bank.update(torch.tensor([2, 0, 2]), p, everywhere(p))
    torch.testing.assert_close(bank.read(torch.tensor([2, 0]))[0].double(), p[[2, 1]], atol=1e-6, rtol=0)


def test_one_update_at_once_or_at_the_end_of_the_epoch_is_the_same():
    "Every image comes once in an epoch, so nobody reads a row between its update and the end"
    now, later = (PredictionBank(6, 5, (8, 12), dtype="float32") for _ in range(2))
    for epoch in range(3):
        staged, targets = [], []
        for index in torch.randperm(6, generator=generator(epoch, "order")).split(2):
            p = probabilities(100 * epoch + int(index[0]))
            targets.append((now.read(index)[0], later.read(index)[0]))
            now.update(index, p, everywhere(p))
            staged.append((index, p))
        for index, p in staged: later.update(index, p, everywhere(p))
        assert all(torch.equal(a, b) for a, b in targets)
    assert same(now, later)


def test_a_box_of_the_partner_is_not_stored(task):
    method = TemporalEnsembling(net(task), task, student="weak", mix=1.0, remember="student")
    method.weak = identity()
    clock = Clock(2, 100)
    lab, unl = batch(task)
    for _ in method.updates(lab, unl, clock): pass
    box = clock.boxes(unl["image"], 1.0)
    known = method.bank.read(unl["index"])[1]
    assert torch.equal(known, ~box) and box.any()


@pytest.mark.parametrize("remember", ["student", "net", "ema"])
def test_what_is_remembered(task, remember):
    "The first update stores the prediction itself: of the student's view, or what network or average say of the weak view; in either case without gradient"
    method = TemporalEnsembling(net(task), task, mix=0.0, remember=remember).eval()
    with torch.no_grad(): next(method.ema.net.parameters()).mul_(0.5)
    method.weak = identity()
    lab, unl = batch(task)
    clock = Clock(2, 100)
    step = method.updates(lab, unl, clock)
    next(step)
    with torch.no_grad():
        said = {"student": method.net(method.strong_view(unl["image"], clock)), "net": method.net(unl["image"]), "ema": method.ema(unl["image"])}
    list(step)
    for name, z in said.items():
        assert torch.allclose(method.bank.read(unl["index"])[0], z.softmax(1), atol=1e-3) == (name == remember), name
    assert not method.bank.read(unl["index"])[0].requires_grad


def test_a_threshold_counts_untrusted_pixels_as_agreement(task):
    def loss(threshold):
        method = TemporalEnsembling(net(task), task, mix=0.0, threshold=threshold, warmup=0.0).eval()
        p = probabilities(0, n=4, h=32, w=32).float()
        method.bank.update(torch.arange(4), p, everywhere(p))
        _, losses = next(method.updates(*batch(task), Clock(500, 1000)))
        return losses["consistency"].item(), method.stats["trusted"].item()
    values = [loss(t) for t in (0.0, 0.5, 0.8, 1.0)]
    assert values == sorted(values, reverse=True) and values[0][1] == 1 and values[-1] == (0.0, 0.0) and 0 < values[2][1] < values[1][1] < 1


def test_a_bank_in_ram_stays_there_and_is_no_float(task):
    method = TemporalEnsembling(net(task), task, place="ram")
    data = method.bank.rows.data
    method.to(torch.float64), method.to("meta")
    assert method.bank.rows.data is data and data.dtype == torch.uint8
    beside = TemporalEnsembling(net(task), task)
    assert beside.to("meta").bank.rows.data.device.type == "meta"


# crash, resume
def test_a_torn_write_leaves_the_old_row(tmp_path):
    file = TwoPlaces(tmp_path / "bank", 3, 8)
    index, row = torch.tensor([1]), torch.full((1, 8), 7, dtype=torch.uint8)
    file.write(index, row), file.flush()
    file.write(index, torch.full((1, 8), 9, dtype=torch.uint8))
    assert file.read(index)[0, 0] == 9
    file.rows[1 + 3 * int(file.live[1]), 4:] = 3                          # the second half never arrived
    file.map.flush()
    again = TwoPlaces(tmp_path / "bank", 3, 8)
    assert torch.equal(again.read(index), row) and not again.read(torch.tensor([0, 2])).any()


def test_a_process_killed_in_the_middle_of_a_write_leaves_whole_rows(tmp_path):
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            file, everyone = TwoPlaces(tmp_path / "bank", 64, 512), torch.arange(64)
            for value in range(1, 6): file.write(everyone, torch.full((64, 512), value, dtype=torch.uint8))
            file.flush()
            for value in range(6, 10):
                for i in everyone.split(1):
                    file.write(i, torch.full((1, 512), value, dtype=torch.uint8))
                    if value < 9 or i < 40: continue
                    file.rows[int(file.live[40]) * 64 + 40, :100] = 77           # a part of the row
                    os.kill(os.getpid(), signal.SIGKILL)
        finally: os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert (TwoPlaces(tmp_path / "bank", 64, 512).read(torch.arange(64)) == 5).all()       # the last flush, whole


class Killed(TemporalEnsembling):
    "Stops at one step, in the middle of it"
    _at = -1

    def updates(self, lab, unl, clock):
        yield from super().updates(lab, unl, clock)
        if clock.step == self._at: raise KeyboardInterrupt


@pytest.mark.parametrize("kwargs", [{}, {"topk": 2, "stride": 2}, {"place": "ram"}, {"file": "bank"}], ids=["device", "small", "ram", "file"])
def test_resume_after_an_interruption_is_bit_exact(task, tmp_path, kwargs):
    "Step 9 is past the checkpoint of step 5: these updates of the bank must not count twice"
    def make(name, at=-1):
        files = {"file": str(tmp_path / name / "bank")} if "file" in kwargs else {}
        method = Killed(net(task, "dropout"), task, warmup=0.1, threshold=0.0, **kwargs | files)
        method._at = at
        return method
    task_small = copy.copy(task)
    task_small.unlabelled = type(task.unlabelled)(task.unlabelled.ids[:12], task.unlabelled.images[:12])       # three steps are an epoch
    task = task_small
    whole = make("whole")
    run = quiet(whole, task, 12)
    assert run.history[-1]["consistency"] > 0
    with pytest.raises(KeyboardInterrupt, match="last good checkpoint is step 5"):
        quiet(make("resumed", at=9), task, 12, out_dir=tmp_path / "resumed", checkpoint_every=5)
    torch.rand(100)
    resumed = make("resumed")
    quiet(resumed, task, 12, out_dir=tmp_path / "resumed", checkpoint_every=5)
    assert same(whole.net, resumed.net) and same(whole.ema, resumed.ema)
    assert torch.equal(whole.bank.accumulated(torch.arange(12))[0], resumed.bank.accumulated(torch.arange(12))[0])


def test_a_bank_file_that_has_moved_on_is_refused(tmp_path):
    def make(**kwargs): return PredictionBank(6, 5, (8, 12), file=str(tmp_path / "bank"), **kwargs)
    bank, p, index = make(), probabilities(0), torch.tensor([0, 1])
    bank.update(index, p, everywhere(p))
    early = copy.deepcopy(bank.state_dict())
    at_early = bank.accumulated(index)[0]
    bank.update(index, p, everywhere(p))
    late = copy.deepcopy(bank.state_dict())
    again = make(fresh=True)
    again.load_state_dict(early)                                          # its successor was noted, but nothing was written after it
    assert torch.equal(again.accumulated(index)[0], at_early)
    bank = make(fresh=True)
    bank.load_state_dict(late)
    bank.update(index, p, everywhere(p))
    with pytest.raises(UserError, match=r"state 1 of the bank .*bank, which is at state 2 by now: begin again with resume=False\."):
        make(fresh=True).load_state_dict(early)
    make(fresh=True).load_state_dict(late)


def test_a_fresh_run_protects_the_checkpoint_of_the_old_one(tmp_path):
    def make(): return PredictionBank(6, 5, (8, 12), file=str(tmp_path / "bank"), fresh=True)
    bank, p, index = make(), probabilities(0), torch.tensor([0, 1])
    bank.update(index, p, everywhere(p))
    state, rows = copy.deepcopy(bank.state_dict()), bank.accumulated(index)[0]
    other = make()
    assert not other.accumulated(index)[0].any()
    other.update(index, probabilities(1), everywhere(p))                  # it begins, and dies before its first checkpoint
    old = make()
    old.load_state_dict(state)
    assert torch.equal(old.accumulated(index)[0], rows)


# the step
@pytest.mark.parametrize("method_class", [TemporalEnsembling, MeanTeacher])
def test_weight_zero_takes_the_supervised_step_bit_for_bit(task, method_class):
    for views in ("weak", "strong"):
        base, method = Supervised(net(task, "dropout"), task, views=views), method_class(net(task, "dropout"), task, weight=0.0, views=views)
        for m in (base, method): quiet(m, task, 6, seed=3)
        assert same(base.net, method.net) and same(base.ema, method.ema)


@pytest.mark.parametrize("method_class", [TemporalEnsembling, MeanTeacher])
@pytest.mark.parametrize("kind", ["mse", "kl", "js"])
def test_a_few_steps_stay_finite_and_learn(task, method_class, kind):
    task = copy.copy(task)
    task.unlabelled = type(task.unlabelled)(task.unlabelled.ids[:8], task.unlabelled.images[:8])
    trusting = {"threshold": 0.0} if method_class is TemporalEnsembling else {}
    method = method_class(net(task), task, kind=kind, warmup=0.0, lr=5e-3, **trusting)
    run = quiet(method, task, 30)
    assert run.history[-1]["supervised"] < 0.9 * run.history[0]["supervised"] and 0 < run.history[-1]["consistency"] < 100


@pytest.mark.parametrize("method_class", [TemporalEnsembling, MeanTeacher])
def test_the_step_runs_under_bfloat16_autocast_and_the_bank_keeps_its_precision(task, method_class):
    method = method_class(net(task), task)
    for step in (0, len(task.unlabelled) // 4 + 1):
        with torch.autocast("cpu", dtype=torch.bfloat16): (_, losses), = method.updates(*batch(task), Clock(step, 1000))
        assert all(v.dtype == torch.float32 and torch.isfinite(v) for v in losses.values())
    if method_class is MeanTeacher: return
    z = method.bank.accumulated(torch.arange(4))[0]
    assert z.dtype == torch.float32 and (unbiased(z).sum(1)[method.bank.read(torch.arange(4))[1]] - 1).abs().max() < 1e-5


def test_unlabelled_truth_never_reaches_the_bank(task):
    seen = []
    class Spy(TemporalEnsembling):
        def updates(self, lab, unl, clock):
            seen.append(set(unl))
            yield from super().updates(lab, unl, clock)
    quiet(Spy(net(task), task), task, 2)
    assert seen == [{"image", "index"}] * 2


# a user's mistakes
@pytest.mark.parametrize("kwargs, text", [
    ({"weight": -1.0}, "weight is -1.0"), ({"mix": 2.0}, "mix is 2.0"), ({"kind": "ce"}, "kind 'ce' is not known"), ({"alpha": 1.0}, "alpha is 1.0"),
    ({"student": "hard"}, "student 'hard' is not known"), ({"dtype": "float8"}, "dtype 'float8' is not known"), ({"stride": 0}, "stride is 0"),
    ({"topk": 9}, "topk is 9"), ({"place": "cloud"}, "place 'cloud' is not known"), ({"warmup": 2.0}, "warmup is 2.0"), ({"threshold": -0.5}, "threshold is -0.5"), ({"remember": "all"}, "remember 'all' is not known"), ({"views": "hard"}, "views 'hard'")])
def test_settings_that_make_no_sense_are_refused_before_training(task, kwargs, text):
    with pytest.raises(UserError, match=text): TemporalEnsembling(net(task), task, **kwargs)
    if not kwargs.keys() <= {"weight", "mix", "kind", "warmup", "views"}: return
    with pytest.raises(UserError, match=text): MeanTeacher(net(task), task, **kwargs)


def test_a_bank_larger_than_the_memory_is_refused():
    with pytest.raises(UserError, match=r"The bank would take .* GB, but this computer has .* GB of memory: stride=4 makes it .*or keep it in a file\."):
        PredictionBank(10**7, 21, (320, 320))


def test_random_crops_are_refused(task):
    cropped = copy.copy(task)
    cropped.unlabelled = type(task.unlabelled)(task.unlabelled.ids, task.unlabelled.images, crop=(16, 16))
    with pytest.raises(UserError, match="Temporal Ensembling remembers whole images, but this task cuts random crops"): TemporalEnsembling(net(task), cropped)


def test_a_file_of_another_bank_or_a_bad_folder_is_refused(tmp_path):
    PredictionBank(6, 5, (8, 12), file=str(tmp_path / "bank"))
    with pytest.raises(UserError, match=r"has 11520 bytes where 13440 are expected"): PredictionBank(7, 5, (8, 12), file=str(tmp_path / "bank"))
    PredictionBank(6, 5, (8, 12), file=str(tmp_path / "bank")).flush()
    filed, _ = filled(file=str(tmp_path / "six"))
    filed.flush()
    with pytest.raises(UserError, match="is of 6 images, not of 3"): PredictionBank(3, 5, (16, 12), file=str(tmp_path / "six"))      # the same number of bytes
    (tmp_path / "plain").write_text("a file, not a folder")
    with pytest.raises(UserError, match="cannot be opened"): PredictionBank(6, 5, (8, 12), file=str(tmp_path / "plain" / "bank"))


def test_a_full_disk_is_told_at_the_start(tmp_path, monkeypatch):
    def full(*args): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match=r"The bank .*bank of 0\.0 GB cannot be opened \(No space left on device\)"):
        PredictionBank(6, 5, (8, 12), file=str(tmp_path / "bank"))
    assert not list(tmp_path.iterdir())


def test_a_file_is_for_one_process(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="A bank in a file is for one process"): PredictionBank(6, 5, (8, 12), file=str(tmp_path / "bank"))


PROCESSES = """
import sys
import torch
from torch import nn
from semiseg_nb.augment import flip_crop
from semiseg_nb.catalogue import load_task
from semiseg_nb.core import seed_everything
from semiseg_nb.engine import fit, make_accelerator
from semiseg_nb.temporal import TemporalEnsembling

torch.set_num_threads(1)
task = load_task("scenes", n_labelled=6, size=32)
task.unlabelled = type(task.unlabelled)(task.unlabelled.ids[:16], task.unlabelled.images[:16])
accelerator = make_accelerator()
seed_everything(0)
net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, task.n_classes, 1))
method = TemporalEnsembling(net, task, warmup=0.0, mix=0.0, threshold=0.0, dtype="float32")
whole = flip_crop(scale=(1, 1), shift=0, fill=task.mean)      # no padding: every process has as many valid pixels as the other
method.policies, method.weak = [whole], whole
fit(method, task, 10, batch_size=4, progress=False, eval_on=False, workers=0, accelerator=accelerator)
state = method.state_dict() | {"bank": method.bank.accumulated(torch.arange(16))[0]}
torch.save(state, sys.argv[1] + str(accelerator.process_index))
"""


@pytest.mark.slow
def test_two_processes_share_one_bank(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(PROCESSES)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    def start(*command): subprocess.run([*command], check=True, env=env, capture_output=True, text=True, timeout=300)
    start(sys.executable, str(script), str(tmp_path / "one"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    start(*torchrun, str(script), str(tmp_path / "two"))
    one, first, second = (torch.load(tmp_path / n, weights_only=True) for n in ("one0", "two0", "two1"))
    assert torch.equal(first["bank"], second["bank"]) and first["bank"].sum() > 0
    for name in one:
        if one[name].is_floating_point(): torch.testing.assert_close(one[name], first[name], atol=1e-6, rtol=0)
