"Temporal Ensembling and Mean Teacher: the step beside the supervised one, its weight, and a memory that survives a crash"
import copy
import json
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pairs import run_pair
from torch import nn

from semiseg_nb.augment import identity_policy
from semiseg_nb.bank import distribution
from semiseg_nb.catalogue import load_task
from semiseg_nb.clock import Clock
from semiseg_nb.core import EMA, UserError, seed_everything
from semiseg_nb.engine import fit, make_accelerator, settings
from semiseg_nb.losses import consistency, cross_entropy
from semiseg_nb.models import build_model
from semiseg_nb.networks import UNet
from semiseg_nb.policies import flip_crop
from semiseg_nb.supervised import Supervised, view
from semiseg_nb.temporal import MeanTeacher, TemporalEnsembling, temporal_weight


class StudentsMemory(TemporalEnsembling):
    "As in the lesson: what the student said is remembered"
    def opinion(self, x_w, z_s, box): return z_s, ~box


class AsPublished(StudentsMemory):
    def perturb(self, x_w, clock): return x_w


class KLTeacher(MeanTeacher):
    def disagreement(self, z_s, q, valid): return consistency(z_s, q, None, valid, "kl")


@pytest.fixture(scope="module")
def task(): return load_task("scenes", n_labelled=6, size=32)


def few(task, n):
    "The same task with the first n unlabelled images"
    task = copy.copy(task)
    task.unlabelled = type(task.unlabelled)(task.unlabelled.ids[:n], task.unlabelled.images[:n])
    return task


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


def everywhere(p): return torch.ones(len(p), *p.shape[-2:], dtype=torch.bool)


def quiet(method, task, steps, **kwargs):
    return fit(method, task, steps, **{"batch_size": 4, "progress": False, "eval_on": False, "workers": 0} | kwargs)


def same(a, b):
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_the_first_epoch_has_the_gradient_of_the_labelled_images_alone(task):
    "Also where the labelled loss is divided by the whole batch, as in the paper: that is a factor on both sides"
    method = TemporalEnsembling(net(task), task, alpha=0.0)
    lab, unl = batch(task)
    (name, losses, _), = method.updates(lab, unl, Clock(3, 1000))
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


def test_mirrored_epochs_give_the_bank_of_unmirrored_ones(task):
    "With a network that looks at one pixel at a time, the bank does not notice how the image was shown"
    banks = []
    for flip in (0.0, 1.0, 0.5):
        method = AsPublished(net(task, "conv"), task, mix=0.0, alpha=0.6)
        method.weak = flip_crop(scale=(1, 1), shift=0, flip=flip)
        for step in range(3):
            for _ in method.updates(*batch(task), Clock(step, 100)): pass
        banks.append(method.bank.accumulated(torch.arange(4))[0])
    assert banks[0].sum() > 0
    for other in banks[1:]: torch.testing.assert_close(other, banks[0], atol=1e-3, rtol=0)


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
        _, losses, _ = next(method.updates(lab, unl, clock))                        # stops before the bank takes the prediction in
        method.weight, method.warmup = 1.0, 0.0
        _, plain, _ = next(method.updates(lab, unl, clock))
        assert bool(plain["consistency"] > 0) == (share > 0)
        assert losses["consistency"].item() == pytest.approx(2 * share * plain["consistency"].item(), rel=0.02)


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
    method = MeanTeacher(net(task), task, mix=0.0, weight=2.0, warmup=0.0).eval()
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
    method.strong = identity_policy()
    (_, losses), = method.updates(*batch(task), Clock(3, 100))
    assert losses["consistency"] < 1e-9


def test_a_box_of_the_partner_is_not_stored(task):
    method = AsPublished(net(task), task, mix=1.0)
    method.weak = identity_policy()
    clock = Clock(2, 100)
    lab, unl = batch(task)
    for _ in method.updates(lab, unl, clock): pass
    box = clock.boxes(unl["image"], 1.0)
    known = method.bank.read(unl["index"])[1]
    assert torch.equal(known, ~box) and box.any()


@pytest.mark.parametrize("name", ["average", "student"])
def test_what_is_remembered(task, name):
    "The first update stores the opinion itself: of the average about the weak view or, in a subclass, of the student; without gradient"
    method = {"average": TemporalEnsembling, "student": StudentsMemory}[name](net(task), task, mix=0.0).eval()
    with torch.no_grad(): next(method.ema.net.parameters()).mul_(0.5)
    method.weak = identity_policy()
    lab, unl = batch(task)
    clock = Clock(2, 100)
    step = method.updates(lab, unl, clock)
    next(step)
    with torch.no_grad(): said = {"student": method.net(method.strong_view(unl["image"], clock)), "average": method.ema(unl["image"])}
    list(step)
    for other, z in said.items(): assert torch.allclose(method.bank.read(unl["index"])[0], z.softmax(1), atol=1e-3) == (other == name), other
    assert not method.bank.read(unl["index"])[0].requires_grad


def test_a_threshold_counts_untrusted_pixels_as_agreement(task):
    def loss(threshold):
        method = TemporalEnsembling(net(task), task, mix=0.0, threshold=threshold, warmup=0.0).eval()
        p = torch.randn(4, 5, 32, 32, generator=torch.Generator().manual_seed(0)).mul(2).softmax(1)
        method.bank.update(torch.arange(4), p, everywhere(p))
        _, losses, statistics = next(method.updates(*batch(task), Clock(500, 1000)))
        return losses["consistency"].item(), statistics["trusted"].item()
    values = [loss(t) for t in (0.0, 0.5, 0.8, 1.0)]
    assert values == sorted(values, reverse=True) and values[0][1] == 1 and values[-1] == (0.0, 0.0) and 0 < values[2][1] < values[1][1] < 1


def test_a_bank_in_ram_stays_there_and_is_no_float(task):
    method = TemporalEnsembling(net(task), task, storage={"place": "ram"})
    data = method.bank.rows.data
    method.to(torch.float64), method.to("meta")
    assert method.bank.rows.data is data and data.dtype == torch.uint8
    beside = TemporalEnsembling(net(task), task)
    assert beside.to("meta").bank.rows.data.device.type == "meta"


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
        method = Killed(net(task, "dropout"), task, warmup=0.1, threshold=0.0, storage=kwargs | files)
        method._at = at
        return method
    task = few(task, 12)                                                         # three steps are an epoch
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


KILLS = """
import os, pickle, signal, sys
from pathlib import Path
import torch
import torch._dynamo  # once, before children are forked: the first optimiser would import it in each
from torch import nn
import semiseg_nb.bank as bank
from semiseg_nb.core import seed_everything
from semiseg_nb.engine import fit
from semiseg_nb.temporal import TemporalEnsembling

torch.set_num_threads(1)
root = Path(sys.argv[1])
task = pickle.loads((root / "task.pickle").read_bytes())

def train(folder, end):
    seed_everything(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(8, task.n_classes, 1))
    method = TemporalEnsembling(net, task, warmup=0.1, threshold=0.0, storage={"file": str(folder / "bank")})
    fit(method, task, 5, batch_size=2, progress=False, eval_on=False, workers=0, out_dir=folder, checkpoint_every=2)
    torch.save(method.net.state_dict() | {"bank": method.bank.accumulated(torch.arange(4))[0]}, end)

def child(f, *args):
    pid = os.fork()
    if pid == 0:
        try:
            f(*args)
            os._exit(0)
        finally: os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def dies(): os.kill(os.getpid(), signal.SIGKILL)

def at_replace(folder, k):
    "Dies at the k-th time that a whole file would take its place"
    true, calls = os.replace, []
    def replace(*args):
        calls.append(args)
        if len(calls) == k: dies()
        true(*args)
    os.replace = replace
    train(folder, folder / "end.pt")

def at_write(folder, k):
    "Dies in the middle of the k-th write of rows"
    true, calls = bank.FileRows.write, []
    def write(self, index, rows):
        calls.append(index)
        if len(calls) < k: return true(self, index, rows)
        half = len(rows) // 2
        true(self, index[:half], rows[:half])
        place = 1 - int(self.file.notes.places[index[half]].clamp(max=1))
        self.file.rows[place * self.n + int(index[half]), :100] = 77
        dies()
    bank.FileRows.write = write
    train(folder, folder / "end.pt")

(root / "whole").mkdir()
assert child(train, root / "whole", root / "whole.pt") == 0
whole = torch.load(root / "whole.pt", weights_only=True)
assert whole["bank"].sum() > 0
killed = 0
for dying, points in ((at_replace, (2, 3, 4, 6, 7)), (at_write, (1, 4))):  # notes, notes, checkpoint, notes, checkpoint
    for k in points:
        folder = root / f"{dying.__name__}-{k}"
        folder.mkdir()
        code = child(dying, folder, k)
        assert code == -signal.SIGKILL, (dying, k, code)
        killed += 1
        assert child(train, folder, folder / "end.pt") == 0, (dying, k)
        end = torch.load(folder / "end.pt", weights_only=True)
        assert end.keys() == whole.keys() and all(torch.equal(end[n], whole[n]) for n in whole), (dying, k)
        assert not [p for p in folder.iterdir() if p.name.startswith(".bank")], (dying, k)
print("killed", killed)
"""


def test_resume_after_a_kill_at_any_point_is_bit_exact(task, tmp_path):
    "In the middle of a row, and whenever notes or checkpoint are about to take their place"
    (tmp_path / "kills.py").write_text(KILLS)
    (tmp_path / "task.pickle").write_bytes(pickle.dumps(few(task, 4)))                # two steps are an epoch
    done = subprocess.run([sys.executable, str(tmp_path / "kills.py"), str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split("killed")[-1]) == 7


@pytest.mark.parametrize("method_class", [TemporalEnsembling, MeanTeacher])
def test_weight_zero_takes_the_supervised_step_bit_for_bit(task, method_class):
    for views in ("weak", "strong"):
        base, method = Supervised(net(task, "dropout"), task, views=views), method_class(net(task, "dropout"), task, weight=0.0, views=views)
        for m in (base, method): quiet(m, task, 6, seed=3)
        assert same(base.net, method.net) and same(base.ema, method.ema)


@pytest.mark.parametrize("method_class", [TemporalEnsembling, AsPublished, MeanTeacher, KLTeacher])
def test_a_few_steps_stay_finite_and_learn(task, method_class):
    task = few(task, 8)
    trusting = {"threshold": 0.0} if issubclass(method_class, TemporalEnsembling) else {}
    method = method_class(net(task), task, warmup=0.0, lr=5e-3, **trusting)
    run = quiet(method, task, 30)
    assert run.history[-1]["supervised"] < 0.9 * run.history[0]["supervised"] and 0 < run.history[-1]["consistency"] < 100


@pytest.mark.parametrize("method_class", [TemporalEnsembling, MeanTeacher])
def test_the_step_runs_under_bfloat16_autocast_and_the_bank_keeps_its_precision(task, method_class):
    method = method_class(net(task), task)
    for step in (0, len(task.unlabelled) // 4 + 1):
        with torch.autocast("cpu", dtype=torch.bfloat16): (_, losses, *_), = method.updates(*batch(task), Clock(step, 1000))
        assert all(v.dtype == torch.float32 and torch.isfinite(v) for v in losses.values())
    if method_class is MeanTeacher: return
    z = method.bank.accumulated(torch.arange(4))[0]
    assert z.dtype == torch.float32 and (distribution(z).sum(1)[method.bank.read(torch.arange(4))[1]] - 1).abs().max() < 1e-5


def test_unlabelled_truth_never_reaches_the_bank(task):
    seen = []
    class Spy(TemporalEnsembling):
        def updates(self, lab, unl, clock):
            seen.append(set(unl))
            yield from super().updates(lab, unl, clock)
    quiet(Spy(net(task), task), task, 2)
    assert seen == [{"image", "index"}] * 2


@pytest.mark.parametrize("kwargs, text", [
    ({"weight": -1.0}, "weight is -1.0"), ({"weight": float("nan")}, "weight is nan"), ({"mix": 2.0}, "mix is 2.0"), ({"alpha": 1.0}, "alpha is 1.0"),
    ({"warmup": 2.0}, "warmup is 2.0"), ({"threshold": -0.5}, "threshold is -0.5"), ({"threshold": 80}, "threshold is 80"), ({"views": "hard"}, "views 'hard'"),
    ({"storage": {"dtype": "float8"}}, "dtype 'float8' is not known"), ({"storage": {"stride": 0}}, "stride is 0"), ({"storage": {"alpha": 0.1}}, "storage setting 'alpha'"),
    ({"storage": "uint8"}, "storage is 'uint8'"), ({"wieght": 1.0}, "'wieght' is not known .did you mean 'weight'")])
def test_settings_that_make_no_sense_are_refused_before_training(task, kwargs, text):
    with pytest.raises(UserError, match=text): TemporalEnsembling(net(task), task, **kwargs)
    if not kwargs.keys() <= {"weight", "mix", "warmup", "views", "wieght"}: return
    with pytest.raises(UserError, match=text): MeanTeacher(net(task), task, **kwargs)


def test_settings_are_attributes(task):
    te = TemporalEnsembling(net(task), task, alpha=0.5, storage={"stride": 2}, views="strong")
    assert settings(te) == {"weight": 1.0, "alpha": 0.5, "warmup": 0.6, "mix": 1.0, "threshold": 0.8, "storage": {"stride": 2}, "views": "strong",
                            "n": 2, "strength": 0.5, "lr": 2e-3, "weight_decay": 1e-2, "ema_decay": 0.99, "class_weights": None, "dice": None}
    assert {k: v for k, v in settings(MeanTeacher(net(task), task)).items() if k in ("weight", "warmup", "mix")} == {"weight": 3.0, "warmup": 0.2, "mix": 1.0}


@pytest.mark.parametrize("method_class", [TemporalEnsembling, MeanTeacher])
def test_one_unlabelled_image_has_no_partner_for_cutmix(task, method_class):
    with pytest.raises(UserError, match="no partner for CutMix"): quiet(method_class(net(task), task), task, 2, unlabelled_batch=1)
    quiet(method_class(net(task), task, mix=0.0), task, 2, unlabelled_batch=1)


def test_random_crops_are_refused(task):
    cropped = copy.copy(task)
    cropped.unlabelled = type(task.unlabelled)(task.unlabelled.ids, task.unlabelled.images, crop=(16, 16))
    with pytest.raises(UserError, match="Temporal Ensembling remembers whole images, but this task cuts random crops"): TemporalEnsembling(net(task), cropped)


def train_jointly(path):
    task = load_task("scenes", n_labelled=6, size=32)
    task.unlabelled = type(task.unlabelled)(task.unlabelled.ids[:16], task.unlabelled.images[:16])
    accelerator = make_accelerator("cpu")
    seed_everything(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, task.n_classes, 1))
    method = TemporalEnsembling(net, task, warmup=0.0, mix=0.0, threshold=0.0, storage={"dtype": "float32"})
    whole = flip_crop(scale=(1, 1), shift=0, fill=task.mean)      # no padding: every process has as many valid pixels as the other
    method.policies, method.weak = [whole], whole
    fit(method, task, 10, batch_size=4, progress=False, eval_on=False, workers=0, accelerator=accelerator)
    torch.save(method.state_dict() | {"bank": method.bank.accumulated(torch.arange(16))[0]}, f"{path}{accelerator.process_index}")


@pytest.mark.slow
def test_two_processes_share_one_bank(tmp_path):
    train_jointly(tmp_path / "one")
    run_pair(train_jointly, tmp_path / "two")
    one, first, second = (torch.load(tmp_path / n, weights_only=True) for n in ("one0", "two0", "two1"))
    assert torch.equal(first["bank"], second["bank"]) and first["bank"].sum() > 0
    for name in one:
        if one[name].is_floating_point(): torch.testing.assert_close(one[name], first[name], atol=1e-6, rtol=0)


def test_the_solutions_of_the_exercises(task):
    lesson = json.loads((Path(__file__).resolve().parents[1] / "nbs/12_temporal.ipynb").read_text(encoding="utf-8"))
    cells = {c["id"]: "".join(c["source"]) for c in lesson["cells"]}
    code, = re.findall(r"```python\n(.*?)```", cells["solutions"], re.S)
    lab, unl = batch(task)
    names = {"torch": torch, "TemporalEnsembling": TemporalEnsembling, "build_model": build_model, "Clock": Clock, "task": task, "lab": lab, "unl": unl}
    exec(code, names)
    empty = [cells[f"exercise-{i}"].removeprefix("# ").strip() for i in (1, 2, 3)]
    assert set(empty) == {"share", "teacher_age", "NetworksMemory"} <= set(names) and code.count("assert") == 4
