"Seg-GAN continued: what the start keeps, what the warm-up leaves alone, what tags forbid, and the controls"
import copy

import pytest
import torch
import torch.nn.functional as F

from semiseg_nb.catalogue import load_task
from semiseg_nb.cct import CCT, CCTWeak
from semiseg_nb.clock import Clock
from semiseg_nb.continuation import (
    SIGNALS,
    Continuation,
    branches,
    exhibits,
    gated,
    lesson,
    load_start,
    masks_from_tags,
    part,
    passes,
    read_start,
    result_rows,
    result_table,
    row_name,
    self_training,
    start_label,
    tag_loss,
)
from semiseg_nb.core import IGNORE, UserError, generator, seed_everything
from semiseg_nb.engine import evaluate, fit
from semiseg_nb.losses import cross_entropy
from semiseg_nb.models import build_model
from semiseg_nb.records import make_record, settings_of
from semiseg_nb.supervised import Supervised, view
from semiseg_nb.temporal import TemporalEnsembling


@pytest.fixture(scope="module")
def task(): return load_task("scenes", n_labelled=6, size=32, n_unlabelled=24, weak_tags=True)


def net(task, seed=0):
    seed_everything(seed)
    return build_model("unet", task.n_classes, width=4, mean=task.mean)


def trained(task, method, folder, steps=4, **settings):
    "A short run of a method, its checkpoint in a folder"
    made = method(net(task), task, **settings)
    return fit(made, task, steps, batch_size=4, seed=1, out_dir=folder, progress=False), made


@pytest.fixture(scope="module")
def start(task, tmp_path_factory):
    "The folder with a checkpoint of CCT with tags, and the score that its run reported"
    folder = tmp_path_factory.mktemp("start")
    run, _ = trained(task, CCTWeak, folder, kinds="f_noise,dropout", tag_steps=2)
    return folder, run.result["miou"]


def batch(task, n=4):
    lab, unl = task.labelled.__getitems__(list(range(n))), task.unlabelled.__getitems__(list(range(n)))
    return {**lab, "image": lab["image"].float() / 255, "mask": lab["mask"].long()}, {**unl, "image": unl["image"].float() / 255}


def pseudo(task): return torch.randint(0, task.n_classes, (len(task.unlabelled), *task.size), generator=generator(0, "pseudo")).to(torch.uint8)


def run(method, task, steps=4, **more): return fit(method, task, steps, batch_size=4, seed=3, progress=False, **({"eval_on": False} | more))


def weights(module): return {k: v.clone() for k, v in module.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# 1: nothing is lost at the start

@pytest.mark.parametrize("mode", ["adv", "semi", "semi+wsl", "control", "cct"])
def test_at_step_0_the_score_is_that_of_the_checkpoint(task, start, mode):
    method = Continuation(net(task, 5), task, start=start[0], mode=mode, pseudo=pseudo(task))
    assert abs(evaluate(method, task.val)["miou"] - start[1]) < 1e-6
    assert same(method.net.state_dict(), method.ema.net.state_dict())


def test_the_start_may_be_the_file_or_its_folder_and_its_label_names_no_path(task, start):
    label = start_label(start[0])
    assert start_label(start[0] / "checkpoint.pt") == label and label.startswith("CCTWeak, 4 steps, ") and str(start[0]) not in label
    method = Continuation(net(task), task, start=start[0], mode="control")
    assert method.went_on_from == label
    assert str(start[0]) not in str(settings_of(Continuation, start=label, mode="control"))


def test_the_label_is_equal_for_all_seeds_and_not_for_other_settings(task, start, tmp_path):
    fit(CCTWeak(net(task), task, kinds="f_noise,dropout", tag_steps=2), task, 4, batch_size=4, seed=9, out_dir=tmp_path / "a", progress=False, eval_on=False)
    fit(CCTWeak(net(task), task, kinds="f_noise,dropout", tag_steps=2, weight=1.0), task, 4, batch_size=4, seed=1, out_dir=tmp_path / "b", progress=False, eval_on=False)
    assert start_label(tmp_path / "a") == start_label(start[0]) != start_label(tmp_path / "b")


def test_auxiliary_decoders_are_kept_only_where_they_are_used(task, start):
    stored = part(read_start(start[0]), "decoders.")
    for chosen, kept in ((dict(mode="cct"), True), (dict(signal="pseudo"), True), (dict(signal="gate+pseudo"), True), (dict(), False), (dict(mode="adv"), False),
                         (dict(signal="mil"), False), (dict(mode="control"), False)):
        method = Continuation(net(task), task, start=start[0], pseudo=pseudo(task), **chosen)
        assert same(method.decoders.state_dict(), stored if kept else {}), chosen
        trained_ = {id(p) for g in method.optimisers["net"].param_groups for p in g["params"]}
        assert trained_ == {id(p) for p in (*method.net.parameters(), *method.decoders.parameters())}


# 2: the warm-up of the discriminator

@pytest.mark.parametrize("freeze_bn", [True, False])
@pytest.mark.parametrize("mode", ["adv", "semi", "semi+wsl"])
def test_the_warm_up_leaves_every_parameter_and_buffer_of_the_segmenter_alone(task, start, mode, freeze_bn):
    method = Continuation(net(task), task, start=start[0], mode=mode, warmup=1.0, freeze_bn=freeze_bn, student="strong", mix=1.0)
    before, average, d = weights(method.net), weights(method.ema), weights(method.D)
    run(method, task)
    assert same(before, method.net.state_dict()) and same(average, method.ema.state_dict())
    assert not same(d, method.D.state_dict())


def test_after_the_warm_up_both_learn_and_before_it_only_the_discriminator(task):
    method = Continuation(net(task), task, mode="semi", warmup=0.5)
    for step, names in ((0, ["discriminator"]), (4, ["discriminator"]), (5, ["net", "discriminator"])):
        assert [name for name, _ in method.updates(*batch(task), Clock(step, 10))] == names


def test_batchnorm_keeps_the_averages_of_the_start(task, start):
    frozen, free = (Continuation(net(task), task, start=start[0], mode="control", freeze_bn=f, lr=1e-2) for f in (True, False))
    before = weights(frozen.net)
    for method in (frozen, free): run(method, task)
    moved = [{k for k, v in m.net.state_dict().items() if not torch.equal(v, before[k])} for m in (frozen, free)]
    assert not any("running" in k for k in moved[0]) and any("running_mean" in k for k in moved[1])
    assert any(k.endswith("weight") for k in moved[0])
    frozen.train()
    assert frozen.net.training and not any(m.training for m in frozen.net.modules() if isinstance(m, torch.nn.BatchNorm2d))


# 3: the gate

def test_gated_labels_are_tagged_classes_or_background():
    g = generator(0, "gate")
    z, tags = torch.randn(8, 6, 5, 5, generator=g), (torch.rand(8, 6, generator=g) < 0.4).float()
    tags[0, 1:], tags[1] = 0, 0                                                             # nothing but background; nothing known
    tags[0, 0] = 1
    labels = gated(z, tags)
    for y, t in zip(labels, tags):
        allowed = set(range(6)) if not t.any() else {0, *torch.where(t > 0)[0].tolist()}
        assert set(y.flatten().tolist()) <= allowed
    assert not labels[0].any() and torch.equal(labels[1], z[1].argmax(0))


def test_all_tags_reproduce_semi_exactly(task, start):
    ends = []
    for mode in ("semi", "semi+wsl"):
        method = Continuation(net(task), task, start=start[0], mode=mode, student="strong", mix=1.0)
        lab, unl = batch(task)
        for step in range(30, 33):
            for name, losses in method.updates(lab, unl | {"tags": torch.ones(4, task.n_classes)}, Clock(step, 100)):
                method.optimisers[name].zero_grad()
                sum(losses.values()).backward(inputs=[p for g in method.optimisers[name].param_groups for p in g["params"]])
                method.optimisers[name].step()
        ends.append(weights(method))
    assert same(*ends)


def test_a_class_that_was_removed_never_wins_also_when_all_logits_are_negative():
    z = -1 - torch.rand(2, 4, 6, 6, generator=generator(0, "negative"))
    assert gated(z, torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0]])).unique().tolist() == [0, 1, 2]
    assert (gated(z, torch.tensor([[1, 1, 0, 0]] * 2)) < 2).all()


# 4

def test_a_true_gate_never_makes_a_right_pixel_wrong():
    g = generator(0, "truth")
    truth, z = torch.randint(0, 6, (16, 8, 8), generator=g), torch.randn(16, 6, 8, 8, generator=g)
    truth = torch.where(truth < 1 + torch.arange(16)[:, None, None] % 6, truth, 0)
    tags = F.one_hot(truth, 6).amax((1, 2))
    right, still = z.argmax(1) == truth, gated(z, tags) == truth
    assert not (right & ~still).any() and still.sum() > right.sum()


# 5

def test_mode_adv_and_the_control_never_touch_the_unlabelled_images(task, start):
    class Forbidden:
        "Unlabelled images that complain when they are read"
        tags, crop = None, None
        def __len__(self): return 24
        def __getitem__(self, i): raise AssertionError("an unlabelled image was read")
        def __getitems__(self, i): raise AssertionError("unlabelled images were read")
    blind = copy.copy(task)
    blind.unlabelled = Forbidden()
    for mode in ("adv", "control"): assert run(Continuation(net(task), blind, start=start[0], mode=mode, warmup=0.5), blind).images == 4 * 4
    with pytest.raises((AssertionError, AttributeError)): run(Continuation(net(task), blind, start=start[0], mode="semi"), blind)


# 6

@pytest.mark.parametrize("chosen", [dict(mode="control"), dict(mode="adv", adversarial=0.0), dict(mode="semi", adversarial=0.0, adversarial_u=0.0, self_training=0.0),
                                    dict(adversarial=0.0, adversarial_u=0.0, self_training=0.0),
                                    dict(signal="pseudo", adversarial=0.0, adversarial_u=0.0, self_training=0.0, weak_weight=0.0),
                                    dict(signal="mil", adversarial=0.0, adversarial_u=0.0, self_training=0.0, mil_weight=0.0)], ids=str)
def test_with_all_weights_0_it_is_plain_fine_tuning_bit_for_bit(task, start, chosen):
    network = net(task)
    load_start(network, start[0], task)
    plain = Supervised(network, task, views="strong", lr=2e-4)
    method = Continuation(net(task), task, start=start[0], views="strong", freeze_bn=False, pseudo=pseudo(task), **chosen)
    for m in (plain, method): run(m, task)
    assert same(plain.net.state_dict(), method.net.state_dict()) and same(plain.ema.state_dict(), method.ema.state_dict())
    assert "discriminator" not in method.optimisers


def test_mode_cct_goes_on_with_the_losses_of_the_start(task, start):
    method = Continuation(net(task), task, start=start[0], mode="cct", lr=1e-3)
    assert method.kinds == "f_noise,dropout" and method.ramp_up == 0 and method.pseudo is not None and len(method.decoders) == 2
    rows = run(method, task).history
    assert {"consistency", "weak", "f_noise"} <= set(rows[-1])
    assert Continuation(net(task), task, start=None, mode="cct").threshold == 0            # CCT's own settings, not those of the trust map


# 7

def record(mode, miou, seed=0, lr=2e-4, split="a", **more):
    params = {"steps": 9, "start": "CCT, 9 steps, 0", "lr": lr, "mode": mode, "signal": "gate", "student": "weak", "mix": 0.0, "teacher": "self", "adversarial": 0.01,
              "trust": "quantile", "threshold": 0.5}
    return {"method": "continuation", "seed": seed, "model": "unet", "encoder": None, "dataset": {"split_id": split}, "params": params | more,
            "result": {"miou": miou}, "start": {"miou": 0.5}}


def test_the_result_table_has_start_control_difference_and_seed():
    records = [record("semi", 0.54), record("control", 0.51), record("semi", 0.6, seed=1), record("semi", 0.7, lr=1e-3), record("semi", 0.7, split="b")]
    rows = result_rows([*records, {**record("adv", 0.9), "start": None}])
    assert [r["delta"] for r in rows if r["seed"] == 0 and r["miou"] == 0.54] == [pytest.approx(0.03)]
    assert [r["delta"] for r in rows if r["miou"] in (0.6, 0.7)] == [None] * 3             # another seed, rate or split: no control of theirs
    assert len(rows) == 5 and {"row", "seed", "start", "control", "miou", "delta"} == set(rows[0])
    head, _, first, *_ = result_table(rows).splitlines()
    assert [c.strip() for c in head.strip("|").split("|")] == ["row", "seed", "start", "control", "mIoU", "over the start", "over the control"]
    assert [c.strip() for c in first.strip("|").split("|")] == ["control", "0", "50.0", "51.0", "51.0", "+1.0", ""]


def test_rows_are_called_by_what_they_do():
    assert row_name(record("semi+wsl", 0.5, signal="mil")) == "semi+wsl, mil"
    assert row_name(record("semi", 0.5, student="strong", mix=1.0, teacher="ema")) == "semi, strong view, CutMix, averaged teacher"
    assert row_name(record("semi+wsl", 0.5, adversarial=0.0, trust="absolute", threshold=0.0)) == "semi+wsl, no discriminator"
    assert row_name(record("adv", 0.5, student="strong")) == "adv" and row_name({"method": "temporal", "params": {}}) == "temporal, continued"


def test_a_record_holds_the_label_and_no_path(task, start):
    method = Continuation(net(task), task, start=start[0], mode="control")
    done = run(method, task, eval_on=None)
    made = make_record("continuation", done, task, done.result, settings_of(Continuation, start=start_label(start[0]), mode="control"))
    assert str(start[0]) not in str(made) and made["params"]["start"] == method.went_on_from


# the signals, and who learns from what

def test_the_tag_loss_is_blind_to_a_constant_on_all_logits_and_to_padding():
    g = generator(0, "mil")
    z, tags, valid = torch.randn(3, 4, 6, 6, generator=g), (torch.rand(3, 4, generator=g) < 0.5).float(), torch.rand(3, 6, 6, generator=g) < 0.7
    tags[:, 0] = 1
    loss = tag_loss(z, tags, valid)
    assert torch.allclose(tag_loss(z + torch.randn(3, 1, 6, 6, generator=g), tags, valid), loss, atol=1e-5)
    assert torch.allclose(tag_loss(torch.where(valid[:, None], z, 9 * z), tags, valid), loss, atol=1e-5)
    assert tag_loss(z, torch.zeros(3, 4), valid) == 0 and torch.isfinite(tag_loss(50 * z, tags, torch.zeros_like(valid)))


def test_the_soft_maximum_lies_between_mean_and_maximum_of_the_log_odds():
    z = torch.randn(2, 3, 5, 5, generator=generator(0, "pool"))
    p = z.softmax(1)
    odds = (p.log() - (1 - p).log())[:, 1:].flatten(2)
    for r, pooled in ((1e-3, odds.mean(2)), (200.0, odds.amax(2))):
        expected = F.binary_cross_entropy_with_logits(pooled, torch.ones(2, 2))
        assert torch.allclose(tag_loss(z, torch.ones(2, 3), torch.ones(2, 5, 5) > 0, r), expected, atol=2e-2)


@pytest.mark.parametrize("signal", SIGNALS)
def test_every_signal_gives_the_network_a_gradient_and_the_discriminator_none(task, start, signal):
    method = Continuation(net(task), task, start=start[0], signal=signal, pseudo=pseudo(task))
    updates = method.updates(*batch(task), Clock(50, 100))
    name, losses = next(updates)
    sum(losses.values()).backward(inputs=[p for g in method.optimisers["net"].param_groups for p in g["params"]])
    assert name == "net" and all(p.grad is None for p in method.D.parameters()) and any(p.grad is not None and p.grad.any() for p in method.net.parameters())
    before = [p.grad.clone() for p in method.net.parameters() if p.grad is not None]
    name, losses = next(updates)
    sum(losses.values()).backward()
    assert name == "discriminator" and all(p.grad is not None for p in method.D.parameters())
    assert all(torch.equal(a, p.grad) for a, p in zip(before, (p for p in method.net.parameters() if p.grad is not None)))
    assert ("pseudo" in signal) == any(p.grad is not None for p in method.decoders.parameters())


def test_pseudo_masks_without_auxiliary_decoders_teach_the_main_one_at_half_weight(task):
    masks = pseudo(task)
    method = Continuation(net(task), task, signal="pseudo", pseudo=masks, weak_weight=0.4, warmup=0.0)
    lab, unl = batch(task)
    clock = Clock(50, 100)
    x, y = view(lab, method.policies, clock)
    _, losses, _ = branches(method, x, y, unl, clock)
    seen = passes(method, x, unl, clock)
    y_p = method.weak.apply_label(masks[unl["index"]].long(), seen["drawn"])
    torch.testing.assert_close(losses["weak"], 0.2 * cross_entropy(seen["z_w"], y_p))


def test_an_empty_trust_map_leaves_the_adversarial_gradient(task):
    method = Continuation(net(task), task, mode="semi", trust="absolute", threshold=1.1, warmup=0.0)
    lab, unl = batch(task)
    x, y = view(lab, method.policies, Clock(50, 100))
    _, losses, _ = branches(method, x, y, unl, Clock(50, 100))
    assert losses["self training"] == 0 and method.stats["kept"] == 0
    assert any(g.any() for g in torch.autograd.grad(losses["adversarial unlabelled"], list(method.net.parameters()), allow_unused=True) if g is not None)


def test_the_own_labels_move_with_the_pasted_box_and_stop_at_the_teacher(task):
    method = Continuation(net(task), task, mode="semi", adversarial=0.0, adversarial_u=0.0, threshold=0.0, teacher="self")
    assert not method.judges and method.active
    lab, unl = batch(task)
    x, _ = view(lab, method.policies, Clock(50, 100))
    seen = passes(method, x, unl, Clock(50, 100))
    box, own = seen["box"], torch.where(seen["valid"], seen["z_w"].argmax(1), IGNORE)
    swapped = own[[1, 0, 3, 2]]
    torch.testing.assert_close(self_training(method, seen, None, unl), cross_entropy(seen["z_s"], torch.where(box, swapped, own)))
    assert box.any() and not torch.equal(seen["z_s"], seen["z_w"])


def test_confidence_as_judge_needs_no_discriminator_and_reads_the_gated_belief(task):
    method = Continuation(net(task), task, adversarial=0.0, adversarial_u=0.0, threshold=0.9, teacher="self")
    assert not method.judges and method.active and not hasattr(method, "D")
    z = torch.tensor([5.0, 0.0, 0.0, 0.0, 6.0]).view(1, 5, 1, 1).expand(2, 5, 4, 4)
    seen = {"z_w": z, "z_s": z, "valid": torch.ones(2, 4, 4) > 0, "box": None}
    loss = self_training(method, seen, None, {"tags": torch.tensor([[1.0, 1, 1, 1, 0], [1, 1, 1, 1, 1]])})
    assert method.stats["kept"] == 0.5                                                     # class 4 struck: 0 is sure; else 0 and 4 rival
    torch.testing.assert_close(loss, -z[:1].log_softmax(1)[0, 0, 0, 0])
    assert Continuation(net(task), task, judge="confidence").judges                        # still pushed by a discriminator


def test_the_discriminator_learns_from_detached_predictions_and_hidden_padding(task):
    method = Continuation(net(task), task, mode="semi")
    z, y = torch.randn(4, task.n_classes, 32, 32, requires_grad=True), torch.zeros(4, 32, 32, dtype=torch.long)
    y[:, :8] = IGNORE
    p, known = exhibits(method, z, y)
    assert not p[:, :, :8].any() and not known[:, :8].any() and torch.allclose(p[:, :, 8:].sum(1), torch.ones(4, 24, 32))
    losses = lesson(method, p.detach(), known, Clock(3, 10), 4)
    assert set(losses) == {"fake", "real"} and all(torch.isfinite(v) for v in losses.values())
    sum(losses.values()).backward()
    assert z.grad is None


def test_a_run_that_is_cut_and_resumed_ends_alike(task, start, tmp_path):
    def make(): return Continuation(net(task), task, start=start[0], student="strong", mix=1.0, teacher="ema", warmup=0.3)
    whole, cut = make(), make()
    run(whole, task, steps=6)
    run(cut, task, steps=6, out_dir=tmp_path, checkpoint_every=3)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["settings"]["went_on_from"] == start_label(start[0]) and same(weights(whole), weights(cut))
    again = make()
    run(again, task, steps=6, out_dir=tmp_path)
    assert same(weights(whole), weights(again))


def test_temporal_ensembling_goes_on_from_the_same_start(task, start):
    network = net(task, 5)
    label = load_start(network, start[0], task)
    method = TemporalEnsembling(network, task, lr=2e-4)
    assert label == start_label(start[0]) and abs(evaluate(method, task.val)["miou"] - start[1]) < 1e-6
    assert run(method, task, steps=8).history[-1]["step"] == 8


def test_a_step_runs_under_bfloat16(task, start):
    method = Continuation(net(task), task, start=start[0], signal="gate+pseudo", pseudo=pseudo(task), student="strong", mix=1.0, teacher="ema", warmup=0.0)
    updates = method.updates(*batch(task), Clock(50, 100))
    while True:
        with torch.autocast("cpu", dtype=torch.bfloat16): name, losses = next(updates, (None, {}))
        if name is None: break
        sum(losses.values()).backward(inputs=[p for g in method.optimisers[name].param_groups for p in g["params"]])
        assert all(v.dtype == torch.float32 and torch.isfinite(v) for v in losses.values())


# mistakes

def test_a_missing_start_says_how_to_make_one(task, tmp_path):
    with pytest.raises(UserError, match=r"There is no checkpoint .*13_cct.*scripts/train.py cct_weak"): Continuation(net(task), task, start=tmp_path / "nowhere")


def test_a_broken_or_strange_start_is_one_sentence(task, start, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes((start[0] / "checkpoint.pt").read_bytes()[:500])
    with pytest.raises(UserError, match="not a whole checkpoint"): read_start(tmp_path)
    torch.save({"method": {"net.w": torch.zeros(1)}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="holds no averaged network"): read_start(tmp_path / "other.pt")


def test_a_start_of_another_form_or_split_is_refused(task, start):
    with pytest.raises(UserError, match="model, encoder and width"): load_start(build_model("unet", task.n_classes, width=8), start[0], task)
    with pytest.raises(UserError, match="trained on the split .* n_labelled and split_seed"):
        Continuation(net(task), load_task("scenes", n_labelled=5, size=32, n_unlabelled=24), start=start[0], mode="adv")


def test_the_losses_of_cct_need_a_start_of_cct(task, tmp_path):
    trained(task, Supervised, tmp_path, steps=2)
    with pytest.raises(UserError, match="is a checkpoint of Supervised"): Continuation(net(task), task, start=tmp_path, mode="cct")
    assert Continuation(net(task), task, start=tmp_path, mode="semi", signal="gate").went_on_from.startswith("Supervised, 2 steps")


def test_a_cct_without_tags_may_be_the_start(task, tmp_path):
    trained(task, CCT, tmp_path, steps=2, kinds="f_noise")
    method = Continuation(net(task), task, start=tmp_path, mode="cct")
    assert method.pseudo is None and len(method.decoders) == 1


@pytest.mark.parametrize("chosen, text", [
    (dict(mode="sem"), "mode 'sem' is not known .did you mean 'semi'"), (dict(signal="gates"), "signal 'gates'"), (dict(trust="some"), "trust 'some'"),
    (dict(warmup=1.5), "warmup is 1.5"), (dict(adversarial=-1), "adversarial is -1"), (dict(trust="quantile", threshold=1.5), "threshold is 1.5"), (dict(mix=2), "mix is 2"),
    (dict(n_layers=6), "at least 64 pixels"), (dict(teacher="cat"), "teacher 'cat'"), (dict(judge="me"), "judge 'me'"), (dict(freeze_bn="True"), "freeze_bn 'True'"),
])
def test_a_wrong_setting_is_named(task, chosen, text):
    with pytest.raises(UserError, match=text): Continuation(net(task), task, **chosen)


def test_tags_are_asked_for_where_they_are_needed():
    untagged = load_task("scenes", n_labelled=6, size=32, n_unlabelled=8)
    with pytest.raises(UserError, match="needs tags.*weak_tags=True"): Continuation(net(untagged), untagged)
    Continuation(net(untagged), untagged, mode="semi")
    cropped = load_task("scenes", n_labelled=6, size=48, n_unlabelled=8, crop=32, weak_tags=True)
    with pytest.raises(UserError, match="whole images"): masks_from_tags(cropped)


def test_a_single_unlabelled_image_has_no_partner(task):
    method = Continuation(net(task), task, mode="semi", student="strong", mix=1.0, warmup=0.0)
    lab, unl = batch(task)
    with pytest.raises(UserError, match="no partner for CutMix"): next(method.updates(lab, {k: v[:1] for k, v in unl.items()}, Clock(5, 10)))
