"The failure museum: every exhibit makes its mistake, its healthy neighbour makes none, and `diagnose` reads curves"
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import NoMask

from semiseg_nb.catalogue import load_split, load_task
from semiseg_nb.clock import Clock
from semiseg_nb.core import IGNORE, UserError, generator, seed_everything
from semiseg_nb.engine import Run, evaluate, fit, settings
from semiseg_nb.failures import (
    EXHIBITS,
    MUSEUM,
    OF_CONSISTENCY,
    Diagnosis,
    Healthy,
    SmallNet,
    diagnose,
    features,
    in_spreads,
    kappa,
    leaky,
    signatures,
    visit,
    watch,
)
from semiseg_nb.supervised import Supervised
from semiseg_nb.uda import UDA, SelfUDA, sharpen

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def task(): return load_task("scenes", n_labelled=6, n_unlabelled=12, size=32)


@pytest.fixture(scope="module")
def leak(task): return leaky(task, load_split("scenes", split="train", size=32, ids=task.unlabelled.ids))


def make(cls, task, **changes):
    seed_everything(0)
    return cls(SmallNet(task.n_classes, 4), task, **MUSEUM | {"threshold": 0.0} | changes)


def batches(task, n=4):
    lab, unl = task.labelled.__getitems__(list(range(n))), task.unlabelled.__getitems__(list(range(n)))
    lab = {"image": lab["image"].float() / 255, "mask": lab["mask"].long(), "index": lab["index"]}
    return lab, {"image": unl["image"].float() / 255, "index": unl["index"]} | ({"mask": unl["mask"].long()} if "mask" in unl else {})


def weights(method): return [p.detach().clone() for p in method.net.parameters()]


# ---------------------------------------------------------------- the healthy one
@pytest.mark.parametrize("changes", [{}, {"weight": 0.0}, {"tsa": "linear", "mix": 0.5}], ids=["defaults", "baseline", "annealing"])
def test_the_healthy_exhibit_is_uda_bit_for_bit(task, changes):
    one, two = make(UDA, task, threshold=0.3, **changes), make(Healthy, task, threshold=0.3, **changes)
    for method in (one, two): fit(method, task, 6, batch_size=4, progress=False, eval_on=False)
    for a, b in ((one.net, two.net), (one.ema, two.ema)): assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_the_baseline_exhibit_is_the_supervised_run(task):
    kept = {k: MUSEUM[k] for k in ("lr", "ema_decay")}
    one, two = make(Healthy, task, weight=0.0), Supervised((seed_everything(0), SmallNet(task.n_classes, 4))[1], task, **kept)
    for method in (one, two): fit(method, task, 4, batch_size=4, progress=False, eval_on=False)
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(two)))


@pytest.mark.parametrize("name", [n for n in EXHIBITS if n not in ("healthy", "mask leak")])
def test_no_other_exhibit_reads_a_mask_that_it_must_not(task, name):
    method = make(EXHIBITS[name], task)
    lab, unl = batches(task)
    assert all(torch.isfinite(v) for _, losses, _ in method.updates(lab, NoMask(unl), Clock(60, 100)) for v in losses.values())


def test_exhibits_have_no_settings_of_their_own_and_no_place_in_the_leaderboard(task):
    from semiseg_nb.experiment import methods
    assert not [name for name, what in methods().items() if what.__module__ == "semiseg_nb.failures"]
    for cls in EXHIBITS.values(): assert set(settings(make(cls, task))) == set(settings(make(UDA, task)))


# ---------------------------------------------------------------- each mistake is made
def test_the_leak_learns_masks_of_unlabelled_images(task, leak):
    method = make(EXHIBITS["mask leak"], task)
    lab, unl = batches(leak)
    (_, one, _), = method.updates(lab, unl, Clock(60, 100))
    method = make(EXHIBITS["mask leak"], task)
    (_, two, _), = method.updates(lab, unl | {"mask": torch.full_like(unl["mask"], 2)}, Clock(60, 100))
    assert not torch.equal(one["supervised"], two["supervised"])
    with pytest.raises(AssertionError, match="'mask' of an unlabelled image was read"): list(method.updates(lab, NoMask(unl), Clock(60, 100)))


def test_a_task_without_masks_cannot_leak(task):
    with pytest.raises(UserError, match="no masks that could leak"): fit(make(EXHIBITS["mask leak"], task), task, 2, batch_size=4, progress=False)
    with pytest.raises(UserError, match="has no mask that could leak"): leaky(task, load_split("scenes", split="val", size=32))


def test_the_leaky_task_has_the_same_images(task, leak):
    assert leak.unlabelled.ids == task.unlabelled.ids and torch.equal(leak.unlabelled.images, task.unlabelled.images)
    assert not hasattr(task.unlabelled, "masks")


def test_void_pixels_cost_something_once_the_ignore_index_is_lost(task):
    z, void = torch.randn(2, task.n_classes, 4, 4, generator=generator(0, "z")), torch.full((2, 4, 4), IGNORE)
    assert make(Healthy, task).supervised_loss(z, void) == 0
    last = torch.full_like(void, task.n_classes - 1)
    lost = make(EXHIBITS["ignore index lost"], task)
    assert lost.supervised_loss(z, void) > 0 and torch.equal(lost.supervised_loss(z, void), lost.supervised_loss(z, last))


def test_a_gradient_reaches_the_target(task):
    z = torch.randn(2, 5, 4, 4, generator=generator(0, "z"))
    valid = torch.ones(2, 4, 4, dtype=torch.bool)
    for cls, reached in ((SelfUDA, False), (EXHIBITS["target not detached"], True)):
        method = make(Healthy if cls is SelfUDA else cls, task)
        logits = torch.randn(2, 5, 4, 4, generator=generator(1, "z")).requires_grad_()
        loss = method.disagreement(z.clone().requires_grad_(), sharpen(logits, 0.5), valid, valid)
        assert (torch.autograd.grad(loss, logits, allow_unused=True)[0] is not None) == reached
        assert cls(SmallNet(5, 4), task).logits(*[torch.rand(2, 3, 8, 8)] * 3)[1].requires_grad == reached


def test_the_average_in_train_mode_looks_at_its_batch(task):
    x = torch.rand(4, 3, 32, 32, generator=generator(0, "x"))
    for name, depends in (("healthy", False), ("EMA in train mode", True)):
        method = make(EXHIBITS[name], task)
        method.train(), method.eval()
        assert torch.allclose(method.predict(x)[:1], method.predict(x[:1]), atol=1e-5) != depends
        assert (watch(task)(method)["company"] > 1e-3) == depends


def test_softmax_twice_cannot_reach_zero(task):
    sure = torch.zeros(1, 5, 2, 2)
    sure[:, 0] = 100
    right = torch.zeros(1, 2, 2, dtype=torch.long)
    assert make(Healthy, task).supervised_loss(sure, right) < 1e-6
    assert make(EXHIBITS["softmax twice"], task).supervised_loss(sure, right).item() == pytest.approx(math.log(1 + 4 / math.e), abs=1e-5)


def test_the_target_is_the_mirror_image_of_what_it_should_be(task):
    target, confidence, valid = torch.rand(2, 5, 4, 6), torch.rand(2, 4, 6), torch.rand(2, 4, 6) > 0.5
    drawn = Clock(0, 10).draw(make(Healthy, task).strong, "strong", torch.rand(2, 3, 4, 6))
    wrong = make(EXHIBITS["views not aligned"], task).align(drawn, target, confidence, valid)
    for a, b, c in zip(wrong, make(Healthy, task).align(drawn, target, confidence, valid), (target, confidence, valid)):
        assert torch.equal(b, c) and torch.equal(a.flip(-1), c)


def test_the_weight_is_whole_and_too_large_from_the_first_step(task):
    healthy, wrong = make(Healthy, task, weight=2.0), make(EXHIBITS["weight without ramp"], task, weight=2.0)
    assert [healthy.weight_at(Clock(s, 100)) for s in (0, 15, 30, 99)] == [0, 1, 2, 2]
    assert [wrong.weight_at(Clock(s, 100)) for s in (0, 99)] == [20, 20]


def test_the_threshold_sees_the_sharpened_target(task):
    z = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)  # 73 % : 27 %; sharpened 88 %
    target = sharpen(z, 0.5)
    assert make(Healthy, task).confidence(z, target).item() == pytest.approx(0.731, abs=1e-3)
    assert make(EXHIBITS["threshold after sharpening"], task).confidence(z, target).item() == pytest.approx(0.881, abs=1e-3)


def test_the_wrong_normalisation_is_that_of_batchmean(task):
    z = torch.randn(2, 5, 4, 4, generator=generator(0, "z"))
    target, valid = sharpen(torch.randn(2, 5, 4, 4, generator=generator(1, "z")), 0.5), torch.ones(2, 4, 4, dtype=torch.bool)
    wrong = make(EXHIBITS["wrong normalisation"], task).disagreement(z, target, valid, valid)
    torch.testing.assert_close(wrong, torch.nn.functional.kl_div(z.log_softmax(1), target, reduction="batchmean"))


def test_the_statistics_of_the_average_stay_behind(task):
    for name, moves in (("healthy", True), ("BatchNorm statistics mixed", False)):
        method = make(EXHIBITS[name], task)
        buffers = [b.clone() for b in method.ema.net.buffers()]
        before = [p.clone() for p in method.ema.net.parameters()]
        fit(method, task, 3, batch_size=4, progress=False, eval_on=False)
        assert any(not torch.equal(a, b) for a, b in zip(buffers, method.ema.net.buffers())) == moves
        assert any(not torch.equal(a, b) for a, b in zip(before, method.ema.net.parameters()))


# ---------------------------------------------------------------- numbers in the log
def test_agreement_is_beyond_chance():
    g = generator(0, "kappa")
    a = torch.randint(0, 3, (2, 50, 50), generator=g)
    everywhere = torch.ones_like(a, dtype=torch.bool)
    assert kappa(a, a, everywhere, 3) == pytest.approx(1, abs=1e-6)
    assert abs(kappa(a, torch.randint(0, 3, a.shape, generator=g), everywhere, 3)) < 0.05
    assert torch.isfinite(kappa(a, a, ~everywhere, 3)) and torch.isfinite(kappa(a * 0, a * 0, everywhere, 3))


def test_the_probe_leaves_the_run_as_it_was(task):
    runs = [make(Healthy, task), make(Healthy, task)]
    for method, probe in zip(runs, (None, watch(task))): fit(method, task, 4, batch_size=4, eval_every=2, probe=probe, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(weights(runs[0]), weights(runs[1])))


def test_a_visit_leaves_all_curves_that_a_diagnosis_can_use(task):
    run = visit("healthy", task, steps=5, net=lambda c: SmallNet(c, 4))
    assert all(map(math.isfinite, features(run).values()))
    assert run.history == json.loads(json.dumps(run.history))
    assert run.result["miou"] == evaluate_again(run, task)


def evaluate_again(run, task):
    seed_everything(0)
    method = Healthy(SmallNet(task.n_classes, 4), task, **MUSEUM)
    fit(method, task, 5, batch_size=4, progress=False, eval_on=False)
    return evaluate(method, task.val)["miou"]


# ---------------------------------------------------------------- diagnose
def history(supervised=(1.6, 0.8, 0.4), miou=(0.2, 0.3, 0.4), n_classes=5, **curves):
    rows = [{"step": 10 * i, "supervised": s, "miou": m, "pixel_accuracy": 0.5 + m / 2, "iou_per_class": [m] * n_classes, "ece": 0.1}
            for i, (s, m) in enumerate(zip(supervised, miou))]
    for name, values in curves.items():
        for row, v in zip(rows, values): row[name] = v
    return rows


def ends(end, shift=1.0): return history((1.6, 1.0, end * shift), consistency=(0, 0.1, 0.1), kept=(0.2, 0.5, 0.6))


def reference():
    "Healthy runs and two exhibits, told apart by the end of the supervised loss alone; all losses of data b are higher"
    runs, random = [], np.random.default_rng(0)
    for condition, shift in (("a", 1.0), ("b", 1.3)):
        for name, end in (("healthy", 0.3), ("softmax twice", 0.95), ("views not aligned", 0.5)):
            for _ in range(4):
                rows = ends(end * (1 + 0.02 * random.standard_normal()), shift)
                runs.append({"exhibit": name, "condition": condition, "features": features(rows)})
    return runs


def healthy(shift=1.0): return [ends(end, shift) for end in (0.295, 0.3, 0.303, 0.306)]


def test_a_run_gets_the_name_of_the_nearest_signature():
    for end, name in ((0.3, "healthy"), (0.95, "softmax twice"), (0.5, "views not aligned")):
        found = diagnose(ends(end), healthy(), reference())
        assert found.verdict == found.answer == name and found.confidence == max(found.answers.values()) > 0.5
        assert sum(found.answers.values()) == pytest.approx(1) and next(iter(found.answers)) == name
        if name != "healthy": assert next(iter(found.reasons)).startswith("loss") and next(iter(found.reasons.values()))[2] > 5


def test_a_baseline_is_never_accused_of_a_mistake_in_the_consistency_loss():
    found = diagnose(history((1.6, 1.0, 0.5)), [history((1.6, 1.0, end)) for end in (0.29, 0.3, 0.31)], reference())
    assert set(found.answers) == {"healthy", "softmax twice"} and not OF_CONSISTENCY & set(found.answers)


def test_a_shift_of_the_data_does_not_count():
    "All losses are four times as high, for reasons of the data: beside healthy runs of the same data the run is healthy, alone it looks wrong"
    assert diagnose(ends(0.3, 4), healthy(4), reference()).verdict == "healthy"
    assert diagnose(ends(0.5, 4), healthy(4), reference()).verdict == "views not aligned"
    alone = diagnose(ends(0.3, 4), reference=reference())
    assert alone.answers == diagnose(ends(0.3, 4), [], reference()).answers and alone.answer != "healthy"


def test_far_from_all_signatures_nobody_can_tell():
    found = diagnose(history((1.6, 1.0, 0.01), (0.2, 0.1, 0.01), consistency=(0, 9, 9), kept=(0.2, 0.1, 0.0)), healthy(), reference())
    assert found.nearest > 4 and found.verdict == "cannot tell" and abs(next(iter(found.reasons.values()))[2]) > 20


def test_a_verdict_asks_for_more_confidence_with_few_runs_beside_it():
    assert [diagnose(ends(0.5), healthy()[:n], reference()).sure for n in (0, 1, 2, 3, 4)] == [0.8, 0.8, 0.8, 0.5, 0.5]
    for answers, nearest, sure, z, verdict in (
            ({"healthy": 0.6, "mask leak": 0.4}, 1, 0.5, 1.0, "healthy"), ({"mask leak": 0.7}, 1, 0.5, -3.0, "mask leak"),
            ({"mask leak": 0.7}, 1, 0.8, 3.0, "cannot tell"), ({"mask leak": 0.9}, 5, 0.5, 3.0, "cannot tell"),
            ({"healthy": 0.4, "mask leak": 0.3}, 1, 0.5, 1.0, "cannot tell"), ({"mask leak": 0.9}, 1, 0.5, 2.4, "cannot tell")):
        assert Diagnosis(answers, nearest, sure, {"kept": (0.5, 0.4, z)}).verdict == verdict


def test_distances_are_in_spreads_of_healthy_runs():
    one, four, usual = np.array([[0.0]]), np.array([[-1.0], [1.0], [-1.0], [1.0]]), np.array([1.0])
    assert in_spreads(np.array([3.0]), one, usual)[0] == pytest.approx(3 / math.sqrt(2))
    assert in_spreads(np.array([3.0]), four, usual)[0] == pytest.approx(3 / math.sqrt(10 / 9 * 5 / 4))
    assert np.isnan(in_spreads(np.array([np.nan]), four, usual)[0])
    z = signatures(rows := reference())
    assert np.nanmax(np.abs(z[[r["exhibit"] == "healthy" for r in rows]])) < 4 and z.shape == (len(rows), len(rows[0]["features"]))


def test_features_are_as_good_as_the_run_and_as_a_record_holds_them():
    stored = [json.loads(json.dumps(features(r)).replace("NaN", "null")) for r in (ends(0.5), *healthy())]
    assert diagnose(stored[0], stored[1:], reference()).answers == diagnose(ends(0.5), healthy(), reference()).answers


@pytest.mark.parametrize("beside", [Run(3, 0, 4, ends(0.3)), ends(0.3)], ids=["run", "history"])
def test_one_run_beside_is_refused_in_one_sentence(beside):
    with pytest.raises(UserError, match=r"^'beside' is one run, but a list of healthy runs is needed: .*\.$"): diagnose(ends(0.5), beside, reference())


def test_features_depend_on_no_scale_of_the_steps_and_know_the_floor_of_softmax_twice():
    floor = math.log(1 + 4 / math.e)
    found = features(history((1.6, 1.2, floor)))
    assert found["loss / floor of softmax twice"] == 0
    far = [row | {"step": 100 * row["step"]} for row in history((1.6, 1.2, floor))]
    np.testing.assert_equal(features(far), found)


@pytest.mark.parametrize("name", ["supervised", "miou"])
def test_a_run_without_the_needed_curves_is_refused_in_one_sentence(name):
    rows = [{k: v for k, v in row.items() if k != name} for row in history()]
    with pytest.raises(UserError, match=rf"^This history has no curve '{name}': .*\.$"): diagnose(rows, reference=reference())
    with pytest.raises(UserError, match="has no curve 'supervised'"): diagnose([], reference=reference())


def test_the_stored_reference_knows_every_exhibit():
    record = json.loads((ROOT / "results/benchmarks/failures_reference.json").read_text())
    assert {r["exhibit"] for r in record["runs"]} == set(EXHIBITS) == set(record["curves"])


def test_the_stored_verdicts_are_made_from_other_data_and_rarely_accuse_a_healthy_run():
    reference, tested = (json.loads((ROOT / f"results/benchmarks/{n}.json").read_text())["runs"] for n in ("failures_reference", "failures"))
    assert len(tested) >= 200 and [r["condition"] for r in tested] == [r["condition"] for r in reference]
    for condition in {r["condition"] for r in tested}:
        assert sum((r["condition"], r["exhibit"], r["baseline"]) == (condition, "healthy", False) for r in tested) >= 5, "seeds differ"
    for r, stored in list(zip(reference, tested))[::23]:
        others = [o["features"] for o in reference if (o["condition"], o["exhibit"], o["baseline"]) == (r["condition"], "healthy", r["baseline"])
                  and o["repeat"] != r["repeat"]]
        known = [o for o in reference if o["condition"] != r["condition"]]
        assert diagnose(r["features"], others[:4], known).verdict == stored["beside healthy runs"]["verdict"]
        assert diagnose(r["features"], reference=known).verdict == stored["alone"]["verdict"]
    for kind in ("beside healthy runs", "alone"):
        verdicts = [r[kind]["verdict"] for r in tested if r["exhibit"] == "healthy"]
        assert sum(v not in ("healthy", "cannot tell") for v in verdicts) <= len(verdicts) / 10


def test_the_solutions_of_the_exercises_run(task):
    cells = json.loads((ROOT / "nbs/15_failures.ipynb").read_text())["cells"]
    text, = ("".join(c["source"]) for c in cells if c["id"] == "solutions")
    solutions = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(solutions) == 2
    for code in solutions: exec(code, {"math": math, "Healthy": Healthy, "SmallNet": SmallNet, "Clock": Clock, "task": task})
