"Metrics: the same numbers as a plain count by hand, 255 left out everywhere, clear errors"
import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_jaccard_index

from semiseg_nb.core import UserError
from semiseg_nb.metrics import SegmentationMetrics, block_features, frechet


def batch(seed=0, n=6, c=5, size=(24, 20), ignore=0.1):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, c, (n, *size), generator=g)
    logits = 2 * torch.randn(n, c, *size, generator=g) + 3 * torch.eye(c)[labels].permute(0, 3, 1, 2)
    labels[torch.rand(n, *size, generator=g) < ignore] = 255
    return logits, labels


def by_hand(logits, labels, bins=15):
    p = torch.softmax(logits.double(), 1).numpy()
    y, guess, conf = labels.numpy().ravel(), p.argmax(1).ravel(), p.max(1).ravel()
    known = y != 255
    y, guess, conf = y[known], guess[known], conf[known]
    iou = []
    for c in range(p.shape[1]):
        union = ((y == c) | (guess == c)).sum()
        iou.append(((y == c) & (guess == c)).sum() / union if union else math.nan)
    which = np.minimum((conf * bins).astype(int), bins - 1)
    ece = sum(abs(conf[which == b].sum() - (y == guess)[which == b].sum()) for b in range(bins)) / len(y)
    return {"miou": np.nanmean(iou), "iou_per_class": iou, "pixel_accuracy": (y == guess).mean(), "ece": ece}


def same(a, b):
    assert a.keys() == b.keys()
    for k in a: np.testing.assert_allclose(a[k], b[k], atol=1e-6, err_msg=k)


def score(*pairs, c=5, **options):
    metrics = SegmentationMetrics(c, **options)
    for logits, labels in pairs: metrics.update(logits, labels)
    return metrics.compute()


def test_numbers_equal_a_count_by_hand():
    logits, labels = batch()
    same(score((logits, labels)), by_hand(logits, labels))


def test_cutting_into_batches_changes_nothing():
    logits, labels = batch()
    same(score((logits, labels)), score(*[(logits[i:i + 2], labels[i:i + 2]) for i in (0, 2, 4)]))


def test_pixels_of_255_change_nothing():
    logits, labels = batch(ignore=0.3)
    other = torch.where((labels == 255)[:, None], torch.randn_like(logits) * 9, logits)
    same(score((logits, labels)), score((other, labels)))


def test_a_batch_without_a_known_pixel_is_fine():
    logits, labels = batch()
    same(score((logits, labels), (logits, torch.full_like(labels, 255))), score((logits, labels)))
    nothing = score((logits, torch.full_like(labels, 255)))
    assert math.isnan(nothing["miou"]) and math.isnan(nothing["pixel_accuracy"]) and all(map(math.isnan, nothing["iou_per_class"]))
    assert math.isnan(score()["miou"]) and len(score()["iou_per_class"]) == 5


def test_absent_class_is_nan_and_not_in_the_mean():
    labels = torch.tensor([[[0, 0], [1, 255]]])
    logits = 9.0 * torch.eye(3)[torch.tensor([[0, 1], [1, 2]])].permute(2, 0, 1)[None]  # class 2 only where nobody knows
    result = score((logits, labels), c=3)
    assert result["iou_per_class"][:2] == [0.5, 0.5] and math.isnan(result["iou_per_class"][2]) and result["miou"] == 0.5


def test_counts_stay_exact_beyond_float_precision():
    metrics = SegmentationMetrics(2)
    metrics.matrix += torch.tensor([[2**60, 0], [0, 2**60]])
    metrics.update(torch.tensor([[[[0.0]], [[9.0]]]]), torch.zeros(1, 1, 1, dtype=torch.long))
    assert int(metrics.matrix[0, 1]) == 1 and int(metrics.matrix[0, 0]) == 2**60


def test_small_logits_are_not_taken_for_probabilities():
    logits = torch.tensor([0.9, 0.1]).view(1, 2, 1, 1)  # inside [0,1], yet logits
    confidence = float(torch.softmax(torch.tensor([0.9, 0.1]), 0)[0])
    assert score((logits, torch.zeros(1, 1, 1, dtype=torch.long)), c=2)["ece"] == pytest.approx(1 - confidence, abs=1e-6)


def test_numbers_equal_those_of_torchmetrics():
    (logits, labels), theirs = batch(), {"ignore_index": 255, "num_classes": 5}
    p, ours = logits.softmax(1), score((logits, labels))
    assert ours["miou"] == pytest.approx(float(multiclass_jaccard_index(p, labels, **theirs)), abs=1e-6)
    assert ours["ece"] == pytest.approx(float(multiclass_calibration_error(p, labels, n_bins=15, **theirs)), abs=1e-6)


def test_calibration_sums_in_64_bits():
    metrics = SegmentationMetrics(2)
    wide = torch.zeros(4, 2, 1000, 1000)
    wide[:, 0] = math.log(0.99 / 0.01)
    labels = (torch.arange(10**6).view(1, 1000, 1000) % 100 == 0).long().expand(4, -1, -1)  # right in exactly 99 %
    metrics.update(wide, labels)
    assert metrics.compute()["ece"] < 1e-6


def test_update_after_compute_goes_on_counting():
    (a, b), metrics = (batch(0), batch(1)), SegmentationMetrics(5)
    metrics.update(*a)
    metrics.compute()
    metrics.update(*b)
    same(metrics.compute(), score(a, b))


def test_small_types_are_counted_as_well():
    logits, labels = batch()
    same(score((logits, labels.to(torch.uint8))), score((logits, labels)))
    result = score((logits.bfloat16(), labels))
    assert result["miou"] == pytest.approx(score((logits, labels))["miou"], abs=0.02)


@pytest.mark.parametrize("logits, labels, match", [
    ((2, 5, 8, 8), (2, 8, 9), r"\(2, 5, 8, 8\).*\(2, 8, 9\)"), ((2, 4, 8, 8), (2, 8, 8), "5 classes"), ((5, 8, 8), (8, 8), "would be right")])
def test_shapes_that_do_not_go_together(logits, labels, match):
    with pytest.raises(UserError, match=match): SegmentationMetrics(5).update(torch.zeros(logits), torch.zeros(labels, dtype=torch.long))


@pytest.mark.parametrize("value", [5, 254, -1])
def test_a_label_that_is_no_class_is_named(value):
    logits, labels = batch()
    labels[0, 0, 0] = value
    metrics = SegmentationMetrics(5)
    with pytest.raises(UserError, match=f"value {value}, but with 5 classes only 0 to 4 and 255"): metrics.update(logits, labels)
    assert int(metrics.matrix.sum()) == 0


def test_frechet_distance_by_hand():
    x = torch.randn(3000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert abs(frechet(x, x)) < 1e-9 and abs(frechet(x, x + torch.tensor([3.0, 0, 4, 0])) - 25) < 1e-8
    assert abs(frechet(x, 3 * x) - (4 * x.mean(0).square().sum() + 4 * torch.cov(x.T).trace())) < 1e-8      # (3 - 1)² of the variance
    assert torch.allclose(frechet(x, x[:99] ** 2), frechet(x[:99] ** 2, x))


def test_block_features_are_mean_and_spread_of_sixteen_squares():
    x = torch.zeros(1, 3, 8, 8)
    x[0, 1, 2:4, 6:8] = torch.tensor([[1.0, 0], [1, 0]])
    s = block_features(x)[0]
    assert s.shape == (96,) and s[16 + 4 + 3] == 0.5 and abs(s[48 + 16 + 4 + 3] - math.sqrt(1 / 3)) < 1e-9 and s.count_nonzero() == 2
