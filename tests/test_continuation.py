"Seg-GAN continued: what the start keeps, what the warm-up leaves alone, what tags forbid, and the controls"
import copy
import json
import random
import re
from pathlib import Path

import pytest
import torch

from semiseg_nb import experiment
from semiseg_nb.adversarial import answer, gate, hide, upper_part
from semiseg_nb.catalogue import load_task
from semiseg_nb.cct import CCT
from semiseg_nb.clock import Clock
from semiseg_nb.continuation import (
    Continuation,
    SemiContinuation,
    WeakContinuation,
    continuation,
    judge_losses,
    load_start,
    part,
    read_start,
    result_rows,
    result_table,
    row_name,
    start_label,
)
from semiseg_nb.core import IGNORE, UserError, seed_everything
from semiseg_nb.engine import evaluate, fit, settings
from semiseg_nb.losses import cross_entropy
from semiseg_nb.models import build_model
from semiseg_nb.networks import batch_norms
from semiseg_nb.records import make_record, settings_of
from semiseg_nb.supervised import Supervised
from semiseg_nb.tags import cct_weak, possible
from semiseg_nb.temporal import TemporalEnsembling

LESSON = Path(__file__).resolve().parents[1] / "nbs/21_continuation.ipynb"
FAMILY = [Continuation, SemiContinuation, WeakContinuation]


@pytest.fixture(scope="module")
def task(): return load_task("scenes", n_labelled=6, size=32, n_unlabelled=24, weak_tags=True)


def net(task, seed=0):
    seed_everything(seed)
    return build_model("unet", task.n_classes, width=4, mean=task.mean)


def drive(stages, task, seed=0, folder=None):
    "Run a recipe: fit every stage, seeded anew; what it returns, the stages, and the last run"
    done, made, run = None, [], None
    while True:
        seed_everything(seed)
        try: stage = stages.send(done)
        except StopIteration as end: return end.value, made, run
        run = fit(stage.method, task, stage.steps, stage.batch_size or 4, seed=seed, progress=False, eval_on=None if stage.scored else False,
                  out_dir=folder / stage.name if folder else None)
        made.append(stage)
        done = stage.method


@pytest.fixture(scope="module")
def start(task, tmp_path_factory):
    "The folder with a checkpoint of CCT with tags, and the score that its run reported"
    folder = tmp_path_factory.mktemp("start")
    _, _, run = drive(cct_weak(net(task), task, 4, tag_steps=2, tag_batch=4, cct={"kinds": "f_noise,dropout"}), task, 1, folder)
    return folder / "cct", run.result["miou"]


def begun(cls, task, start, seed=0, freeze=True, **chosen):
    "A method around the network of the start"
    network = net(task, seed)
    load_start(network, start[0], task, freeze)
    return cls(network, task, **chosen)


def batch(task, n=4):
    lab, unl = task.labelled.__getitems__(list(range(n))), task.unlabelled.__getitems__(list(range(n)))
    return {**lab, "image": lab["image"].float() / 255, "mask": lab["mask"].long()}, {**unl, "image": unl["image"].float() / 255}


def run(method, task, steps=4, **more): return fit(method, task, steps, batch_size=4, seed=3, progress=False, **({"eval_on": False} | more))
def weights(module): return {k: v.clone() for k, v in module.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def step_of(method, task, unl=None, step=50):
    "The updates of one step, by the name of the optimiser: losses and statistics"
    lab, own = batch(task)
    return {name: (losses, more[0] if more else {}) for name, losses, *more in method.updates(lab, unl or own, Clock(step, 100))}


# the start

@pytest.mark.parametrize("cls", [*FAMILY, Supervised, CCT, TemporalEnsembling])
def test_at_step_0_the_score_is_that_of_the_checkpoint(task, start, cls):
    method = begun(cls, task, start, seed=5)
    assert abs(evaluate(method, task.val)["miou"] - start[1]) < 1e-6
    assert same(method.net.state_dict(), method.ema.net.state_dict())


def test_the_start_may_be_the_file_or_its_folder_and_its_label_names_no_path(task, start):
    label = start_label(start[0])
    assert start_label(start[0] / "checkpoint.pt") == label and label.startswith("CCTWeak, 4 steps, ") and str(start[0]) not in label
    assert load_start(net(task), start[0], task) == load_start(net(task), read_start(start[0])) == label


def test_the_label_is_equal_for_all_seeds_and_not_for_other_settings(task, tmp_path):
    for name, seed, weight in (("a", 1, 1.43), ("b", 9, 1.43), ("c", 1, 1.0)):
        fit(CCT(net(task), task, kinds="f_noise", weight=weight), task, 2, 4, seed=seed, out_dir=tmp_path / name, progress=False, eval_on=False)
    a, b, c = (start_label(tmp_path / name) for name in "abc")
    assert a == b != c


def test_auxiliary_decoders_can_be_kept_for_the_control(task, start):
    method = begun(CCT, task, start, kinds=read_start(start[0])["identity"]["kinds"], ramp_up=0.0)
    method.decoders.load_state_dict(part(read_start(start[0]), "decoders."))
    assert {"consistency", "f_noise"} <= set(run(method, task).history[-1])


# the warm-up of the discriminator

@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("cls", FAMILY)
def test_the_warm_up_leaves_every_parameter_and_buffer_of_the_segmenter_alone(task, start, cls, freeze):
    method = begun(cls, task, start, freeze=freeze, warmup=1.0)
    before, average, d = weights(method.net), weights(method.ema), weights(method.D)
    run(method, task)
    assert same(before, method.net.state_dict()) and same(average, method.ema.state_dict())
    assert not same(d, method.D.state_dict())


@pytest.mark.parametrize("cls", FAMILY)
def test_after_the_warm_up_both_learn_and_before_it_only_the_discriminator(task, cls):
    method = cls(net(task), task, warmup=0.5)
    for step, names in ((0, ["discriminator"]), (49, ["discriminator"]), (50, ["net", "discriminator"])):
        assert list(step_of(method, task, step=step)) == names


def test_batchnorm_keeps_the_averages_of_the_start(task, start):
    frozen, free = (begun(Continuation, task, start, freeze=f, adversarial=0.0, lr=1e-2) for f in (True, False))
    before = weights(frozen.net)
    for method in (frozen, free): run(method, task)
    moved = [{k for k, v in m.net.state_dict().items() if not torch.equal(v, before[k])} for m in (frozen, free)]
    assert not any("running" in k for k in moved[0]) and any("running_mean" in k for k in moved[1])
    assert any(k.endswith("weight") for k in moved[0])
    frozen.train()
    assert frozen.net.training and not any(m.training for m in batch_norms(frozen.net))


# tags

def test_all_tags_reproduce_own_labels_exactly(task, start):
    ends = []
    for cls in (SemiContinuation, WeakContinuation):
        method = begun(cls, task, start)
        lab, unl = batch(task)
        for step in range(30, 33):
            for name, losses, *_ in method.updates(lab, unl | {"tags": torch.ones(4, task.n_classes)}, Clock(step, 100)):
                method.optimisers[name].zero_grad()
                sum(losses.values()).backward(inputs=[p for g in method.optimisers[name].param_groups for p in g["params"]])
                method.optimisers[name].step()
        ends.append(weights(method))
    assert same(*ends)


def test_the_belief_that_counts_is_that_of_the_gated_answer(task):
    method = WeakContinuation(net(task), task, threshold=0.9)
    z = torch.tensor([5.0, 0.0, 0.0, 0.0, 6.0]).view(1, 5, 1, 1).expand(2, 5, 4, 4)
    z_t = method.candidates(z, {"tags": torch.tensor([[1.0, 1, 1, 1, 0], [1, 1, 1, 1, 1]])})
    believed = method.trusted(z_t, torch.ones(2, 4, 4) > 0)
    assert believed[0].all() and not believed[1].any() and not z_t.argmax(1)[0].any()      # class 4 struck: 0 is sure; else 0 and 4 rival


# who is touched

def test_the_push_alone_and_the_control_never_touch_the_unlabelled_images(task, start):
    class Forbidden:
        "Unlabelled images that complain when they are read"
        tags, crop, fingerprint = None, None, task.unlabelled.fingerprint
        def __len__(self): return 24
        def __getitem__(self, i): raise AssertionError("an unlabelled image was read")
        def __getitems__(self, i): raise AssertionError("unlabelled images were read")
    blind = copy.copy(task)
    blind.unlabelled = Forbidden()
    for cls, chosen in ((Continuation, dict(warmup=0.5)), (Supervised, {})): assert run(begun(cls, blind, start, **chosen), blind).images == 4 * 4
    with pytest.raises((AssertionError, AttributeError)): run(begun(SemiContinuation, blind, start), blind)


@pytest.mark.parametrize("cls", FAMILY)
def test_with_all_weights_0_it_is_plain_fine_tuning_bit_for_bit(task, start, cls):
    off = dict(adversarial=0.0) | ({} if cls is Continuation else dict(adversarial_u=0.0, self_training=0.0))
    plain = begun(Supervised, task, start, freeze=False, views="strong", lr=2e-4)
    method = begun(cls, task, start, freeze=False, views="strong", **off)
    for m in (plain, method): run(m, task)
    assert same(plain.net.state_dict(), method.net.state_dict()) and same(plain.ema.state_dict(), method.ema.state_dict())


# records

def record(mode, miou, seed=0, lr=2e-4, split="a", method="continuation", **more):
    params = {"steps": 9, "start": "CCT, 9 steps, 0", "lr": lr, "mode": mode, "signal": "gate", "adversarial": 0.01, "judge": "confidence"}
    return {"method": method, "seed": seed, "model": "unet", "encoder": None, "dataset": {"split_id": split}, "params": params | more,
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
    assert row_name(record("semi+wsl", 0.5, adversarial=0.0)) == "semi+wsl, no discriminator"
    assert row_name(record("semi", 0.5, judge="discriminator")) == "semi, D judges"
    assert row_name(record("adv", 0.5, judge="discriminator")) == "adv" and row_name({"method": "mean_teacher", "params": {}}) == "mean_teacher, continued"
    assert row_name({"method": "continuation", "params": {"adversarial": 0.01}}) == "semi+wsl"
    assert row_name({"method": "continuation_control", "params": {}}) == "control"


def test_a_record_holds_the_label_and_no_path(task, start):
    done = run(begun(SemiContinuation, task, start), task, eval_on=None)
    made = make_record("continuation", done, task, done.result, settings_of(SemiContinuation) | {"start": start_label(start[0])})
    assert str(start[0]) not in str(made) and made["params"]["start"].startswith("CCTWeak, 4 steps")


# who learns from what

@pytest.mark.parametrize("cls", FAMILY)
def test_the_network_gets_a_gradient_and_the_discriminator_none(task, start, cls):
    method = begun(cls, task, start)
    updates = method.updates(*batch(task), Clock(50, 100))
    name, losses, *_ = next(updates)
    sum(losses.values()).backward(inputs=list(method.net.parameters()))
    assert name == "net" and all(p.grad is None for p in method.D.parameters()) and all(p.grad is None for p in method.ema.parameters())
    assert any(p.grad is not None and p.grad.any() for p in method.net.parameters())
    before = [p.grad.clone() for p in method.net.parameters()]
    name, losses, _ = next(updates)
    sum(losses.values()).backward()
    assert name == "discriminator" and all(p.grad is not None for p in method.D.parameters())
    assert all(torch.equal(a, p.grad) for a, p in zip(before, method.net.parameters()))


def test_without_trusted_pixels_the_push_remains(task):
    method = SemiContinuation(net(task), task, warmup=0.0, threshold=1.0)
    losses, means = step_of(method, task)["net"]
    assert losses["self training"] == 0 and means["kept"] == 0
    assert any(g.any() for g in torch.autograd.grad(losses["adversarial unlabelled"], list(method.net.parameters()), allow_unused=True) if g is not None)


def test_the_own_labels_move_with_the_pasted_box(task):
    class Plain(SemiContinuation):
        "The network labels its own weak view, everywhere"
        def student(self, x_w, clock): return (self.boxed(x_w, clock),)
        def teacher(self, x_w, z_w): return z_w.detach()
    method = Plain(net(task), task, adversarial=0.0, adversarial_u=0.0, threshold=0.0).eval()
    lab, unl = batch(task)
    clock = Clock(50, 100)
    (name, losses, means), = method.updates(lab, unl, clock)
    x_w, valid = method.weak_view(unl["image"], clock)
    box, own = clock.boxes(x_w), torch.where(valid, method.net(x_w).argmax(1), IGNORE)
    pasted = torch.where(box, own[[1, 0, 3, 2]], own)
    x_s = torch.where(box[:, None], x_w[[1, 0, 3, 2]], x_w)
    torch.testing.assert_close(losses["self training"], cross_entropy(method.net(x_s), pasted))
    assert box.any() and means["kept"] == 1 and set(losses) == {"supervised", "self training"}      # nobody judges


def test_the_papers_form_is_three_overridden_methods(task):
    class ByDiscriminator(SemiContinuation):
        "Labels of the network itself, on the weak view, where the discriminator believes them"
        def student(self, x_w, clock): return ()
        def teacher(self, x_w, z_w): return z_w.detach()
        @torch.no_grad()
        def trusted(self, z_t, valid):
            return upper_part(answer(self.D, hide(z_t.float().softmax(1), valid)).sigmoid()[:, 0], 0.5, valid)
    losses, means = step_of(ByDiscriminator(net(task), task, mix=0.0, warmup=0.0), task)["net"]
    assert means["kept"].item() == pytest.approx(0.5, abs=1e-3) and losses["self training"] > 0


def test_the_discriminator_learns_from_hidden_padding_and_counts_known_pixels(task):
    method = Continuation(net(task), task)
    known = torch.ones(4, 32, 32) > 0
    known[:, :8] = False
    p = hide(torch.randn(4, task.n_classes, 32, 32).softmax(1), known)
    assert not p[:, :, :8].any() and torch.allclose(p[:, :, 8:].sum(1), torch.ones(4, 24, 32))
    y = method.masks(torch.rand(4, 3, 32, 32), Clock(3, 10))
    losses, means = judge_losses(method.D, p, known, y)
    assert y.shape == (4, 32, 32) and set(losses) == {"fake", "real"} and all(torch.isfinite(v) for v in (*losses.values(), *means.values()))


# recipes and runs

def test_the_recipe_trains_a_start_and_goes_on(task):
    network = net(task)
    method, stages, _ = drive(continuation(network, task, 2, start_steps=2, tag_steps=2, cct={"kinds": "dropout"}, later={"warmup": 0.5}), task)
    assert [s.name for s in stages] == ["tags", "cct", "continued"] and isinstance(method, WeakContinuation) and method.warmup == 0.5
    assert method.net is network and not any(m.train().training for m in batch_norms(network)) and method.start is None


def test_with_a_start_the_recipe_has_one_stage_and_without_tags_no_gate(task, start):
    method, stages, _ = drive(continuation(net(task), task, 2, start=str(start[0])), task)
    assert [s.name for s in stages] == ["continued"] and stages[0].scored and method.start == start_label(start[0])
    untagged = load_task("scenes", n_labelled=6, size=32, n_unlabelled=24)
    method, stages, _ = drive(continuation(net(untagged), untagged, 1, start_steps=1, cct=dict(kinds="dropout")), untagged)
    assert [s.name for s in stages] == ["cct", "continued"] and type(method) is SemiContinuation


def test_a_run_that_is_cut_and_resumed_ends_alike(task, start, tmp_path):
    def make(): return begun(WeakContinuation, task, start, warmup=0.3)
    whole, cut, again = make(), make(), make()
    run(whole, task, steps=6)
    run(cut, task, steps=6, out_dir=tmp_path, checkpoint_every=3)
    run(again, task, steps=6, out_dir=tmp_path)
    assert same(weights(whole), weights(cut)) and same(weights(whole), weights(again))


def test_a_step_runs_under_bfloat16(task, start):
    method = begun(WeakContinuation, task, start, warmup=0.0)
    updates = method.updates(*batch(task), Clock(50, 100))
    while True:
        with torch.autocast("cpu", dtype=torch.bfloat16): name, losses, *_ = next(updates, (None, {}))
        if name is None: break
        sum(losses.values()).backward(inputs=[p for g in method.optimisers[name].param_groups for p in g["params"]])
        assert all(v.dtype == torch.float32 and torch.isfinite(v) for v in losses.values())


def test_the_settings_are_attributes(task):
    chosen = dict(adversarial=0.1, start="CCT", adversarial_u=0.0, threshold=0.5, warmup=0.0, ndf=4, lr=1e-3, views="strong")
    assert chosen.items() <= settings(WeakContinuation(net(task), task, **chosen)).items()


# mistakes

def test_a_missing_start_says_how_to_make_one(task, tmp_path):
    with pytest.raises(UserError, match=r"There is no checkpoint .*13_cct"): load_start(net(task), tmp_path / "nowhere", task)
    with pytest.raises(UserError, match="There is no checkpoint"): next(continuation(net(task), task, 2, start=str(tmp_path / "nowhere")))


def test_a_strange_start_is_one_sentence(task, start, tmp_path):
    path = tmp_path / "checkpoint.pt"
    whole = (start[0] / "checkpoint.pt").read_bytes()
    for content in (b"", b"steps: 3", whole[:500], b"{}", b"\x80\x04K\x01."):
        path.write_bytes(content)
        with pytest.raises(UserError, match="checkpoint"): read_start(path)
    state = torch.load(start[0] / "checkpoint.pt", weights_only=True)
    odd = [{k: v for k, v in state.items() if k != gone} for gone in ("method", "identity", "step", "run")] + [
        {"method": {"net.w": torch.zeros(1)}}, state | {"step": "4"}, state | {"identity": [1]}, state | {"method": {"net.w": torch.zeros(1)}},
        state | {"method": {"ema.net.w": 3}}, state | {"method": {1: torch.zeros(1)}}, [state], torch.zeros(2)]
    for content in odd:
        torch.save(content, path)
        with pytest.raises(UserError, match="give (one|the checkpoint)"): read_start(path)
    for content in (state | {"identity": {}}, state | {"method": {"ema.net.w": torch.zeros(1)}}):
        torch.save(content, path)
        with pytest.raises(UserError): load_start(net(task), path, task)


def test_a_checkpoint_of_the_first_edition_is_a_start(task, start, tmp_path):
    state = read_start(start[0])
    old = {"settings": {"method": "CCTWeak", "split_id": task.split_id, "seed": 3}} | {k: v for k, v in state.items() if k != "identity"}
    torch.save(old, tmp_path / "checkpoint.pt")
    network = net(task, 5)
    assert load_start(network, tmp_path, task).startswith("CCTWeak, 4 steps, ")
    assert same(network.state_dict(), part(state, "ema.net."))


def test_bytes_that_were_changed_never_end_in_another_error(start, tmp_path):
    whole, rng = (start[0] / "checkpoint.pt").read_bytes(), random.Random(0)
    for _ in range(40):
        content = bytearray(whole)
        for _ in range(rng.randint(1, 200)): content[rng.randrange(len(content))] = rng.randrange(256)
        (tmp_path / "checkpoint.pt").write_bytes(content)
        try: start_label(tmp_path)
        except UserError: pass


def test_a_start_of_another_form_or_split_is_refused(task, start):
    with pytest.raises(UserError, match="model, encoder and width"): load_start(build_model("unet", task.n_classes, width=8), start[0], task)
    with pytest.raises(UserError, match="trained on the split .* n_labelled and split_seed"):
        load_start(net(task), start[0], load_task("scenes", n_labelled=5, size=32, n_unlabelled=24))


@pytest.mark.parametrize("cls, chosen, text", [
    (WeakContinuation, dict(mode="semi"), "'mode' is not known"), (Continuation, dict(threshold=0.5), "setting of Continuation 'threshold'"),
    (Continuation, dict(warmup=1.5), "warmup is 1.5"), (Continuation, dict(adversarial=-1), "adversarial is -1"), (SemiContinuation, dict(threshold=80), "threshold is 80"),
    (SemiContinuation, dict(mix=2), "mix is 2"), (Continuation, dict(n_layers=6), "at least 64 pixels"), (Continuation, dict(lr=0), "lr is 0")])
def test_a_wrong_setting_is_named(task, cls, chosen, text):
    with pytest.raises(UserError, match=text): cls(net(task), task, **chosen)


def test_tags_are_asked_for_where_they_are_needed():
    untagged = load_task("scenes", n_labelled=6, size=32, n_unlabelled=8)
    with pytest.raises(UserError, match="no tags.*weak_tags=True"): run(WeakContinuation(net(untagged), untagged), untagged)
    run(SemiContinuation(net(untagged), untagged), untagged, steps=1)


def test_a_single_unlabelled_image_has_no_partner(task):
    with pytest.raises(UserError, match="no partner for CutMix"): run(SemiContinuation(net(task), task), task, unlabelled_batch=1)


def test_temporal_ensembling_goes_on_from_a_start_and_its_record_names_it(task, start, tmp_path):
    made = experiment.run("temporal_continued", task, steps=2, batch_size=4, width=4, settings={"start": str(start[0]), "later": {"mix": 0.0}},
                          out_dir=tmp_path, progress=False)
    assert type(made.method) is TemporalEnsembling and made.method.mix == 0 and made.method.lr == 2e-4 and list(made.runs) == ["continued"]
    assert made.record["start"]["name"] == made.record["params"]["start"] == start_label(start[0]) and str(start[0]) not in str(made.record)
    row, = result_rows([made.record])
    assert row["row"] == "temporal, continued" and row["start"] == made.record["start"]["miou"]


def test_the_solutions_of_the_exercises():
    cells = {c["id"]: "".join(c["source"]) for c in json.loads(LESSON.read_text(encoding="utf-8"))["cells"]}
    code, = re.findall(r"```python\n(.*?)```", cells["solutions"], re.S)
    names = {"torch": torch, "gated": lambda z, tags: gate(z, possible(tags)).argmax(1)}
    exec(code, names)
    assert set(cells["exercise"].removeprefix("# ").strip().split(", ")) == {"steps_of", "struck", "forgetful"} <= set(names)
