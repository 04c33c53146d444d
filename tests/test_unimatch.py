"UniMatch and UniMatch V2: channel masks, streams and their weights; what they share with the methods of `pseudo_labels` is tested there"
import copy

import pytest
import torch
from one_step import EVERYTHING, batch, first_update, losses_of, net, solved, train

from semiseg_nb.catalogue import load_task
from semiseg_nb.clock import Clock
from semiseg_nb.core import UserError, generator
from semiseg_nb.models import build_model
from semiseg_nb.pseudo_labels import FixMatch, hard_loss, pseudo_label
from semiseg_nb.unimatch import UniMatch, UniMatchV2, complementary, scale_channels


@pytest.fixture(scope="module")
def task(): return load_task("scenes", n_labelled=6, size=32)


# 5
@pytest.mark.parametrize("n", [2, 5, 8])
def test_complementary_masks_sum_to_two_and_spare_half_of_the_images(n):
    first, second = complementary(n, 64, generator(0, "drop"))
    assert torch.equal(first + second, torch.full((n, 64), 2.0))
    spared = (first == 1).all(1)
    assert spared.sum() == n // 2 and torch.equal(spared, (second == 1).all(1))
    assert set(first[~spared].unique().tolist()) == {0.0, 2.0}


def test_the_mean_of_both_views_is_the_undropped_feature():
    features = [torch.rand(2 + 4, c, 3, 3) for c in (4, 8)]
    features = [torch.cat([f, f[2:]]) for f in features]                 # two labelled images, then the same four twice
    dropped = scale_channels(features, torch.cat(complementary(4, 12, generator(0, "drop"))))
    for f, d in zip(features, dropped):
        assert torch.equal(d[:2], f[:2]) and not torch.equal(d[2:6], f[2:6])
        torch.testing.assert_close((d[2:6] + d[6:]) / 2, f[2:6])


# 6
class SecondStream(Clock):
    "Gives those who ask for the first strong view and its box the second ones"
    def rng(self, stream): return super().rng(f"{stream} 2" if stream in ("strong", "cutmix") else stream)


def test_the_three_streams_of_unimatch_have_the_weights_of_the_paper(task):
    "1/4, 1/4 and 1/2, against 1 for the labelled images; each strong stream alone is FixMatch"
    def at(make, clock=None, **kw):
        method = make(net(task), task, **EVERYTHING, **kw)
        method.net.eval()                                                # or BatchNorm sees other images in FixMatch
        torch.manual_seed(0)
        return first_update(method, task, clock)[1]
    first, second = (at(FixMatch, clock)["strong"] for clock in (Clock(50, 100), SecondStream(50, 100)))
    assert not torch.equal(first, second)
    both, pixels, feature = at(UniMatch), at(UniMatch, feature=0.0), at(UniMatch, feature=1.0)
    torch.testing.assert_close(both["strong"], 0.25 * first + 0.25 * second)
    torch.testing.assert_close(pixels["strong"], 0.5 * first + 0.5 * second)
    torch.testing.assert_close(both["feature"], 0.5 * feature["feature"])
    assert pixels["feature"] == feature["strong"] == 0


def test_the_feature_stream_without_dropout_repeats_the_weak_view(task):
    method = UniMatch(net(task), task, drop=0.0, feature=1.0, **EVERYTHING)
    method.net.eval()
    x_w, valid = method.weak_view(batch(task)[1]["image"], Clock(50, 100))
    z_w = method.net(x_w)
    own = hard_loss(z_w, pseudo_label(z_w, 0.2, valid), valid)
    torch.testing.assert_close(losses_of(method, task)["feature"], own)


def test_feature_streams_work_on_library_encoders(task):
    "Whatever maps an encoder gives, and whichever of them the decoder reads"
    model = build_model("deeplabv3plus", task.n_classes, encoder="mobilenetv3_small_050")
    for make in (UniMatch, UniMatchV2):
        _, losses, statistics = first_update(make(copy.deepcopy(model), task, threshold=0.0, warmup=0.0), task)
        assert all(torch.isfinite(v) and v > 0 for v in losses.values()) and statistics["kept"] == 1


@pytest.mark.parametrize("make, kwargs, text", [
    (UniMatch, {"feature": 1.5}, "feature is 1.5"), (UniMatch, {"drop": -0.5}, "drop is -0.5"), (UniMatchV2, {"warmup": 2.0}, "warmup is 2.0")])
def test_settings_that_make_no_sense_are_refused_before_training(task, make, kwargs, text):
    with pytest.raises(UserError, match=text): make(net(task), task, **kwargs)


def test_a_few_steps_of_unimatch_lower_the_supervised_loss(task):
    run = train(UniMatch(net(task), task, threshold=0.5, lr=5e-3), task, 30)
    assert run.history[-1]["supervised"] < 0.8 * run.history[0]["supervised"]


def test_the_solutions_of_the_lesson_pass_its_check_and_empty_cells_do_not():
    empty, filled = solved("14_unimatch", {})
    assert empty == ["1: not yet", "2: not yet"] and len(filled) == 2 and all(line[3:].startswith("right") for line in filled)
