"engine: the loop, resume bit for bit, two processes, the guard, and what a user can get wrong"
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest
import torch
from pairs import run_pair
from torch import nn

from semiseg_nb.catalogue import load_task
from semiseg_nb.checkpoint import fingerprint, read_state, write_state
from semiseg_nb.clock import Clock
from semiseg_nb.core import EMA, UserError, frozen, seed_everything
from semiseg_nb.data import Images, Labelled
from semiseg_nb.engine import Method, NonFiniteLoss, evaluate, fit, images_at_once, make_accelerator, settings
from semiseg_nb.networks import UNet
from semiseg_nb.policies import flip_crop
from semiseg_nb.supervised import Supervised
from semiseg_nb.temporal import TemporalEnsembling
from semiseg_nb.uda import UDA


@pytest.fixture(scope="module")
def task(): return load_task("scenes", n_labelled=6, size=32)


def small(task, dropout=0.2, **kwargs):
    "A UDA method on a tiny network with dropout, so that the global random state matters"
    seed_everything(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(dropout), nn.Conv2d(8, task.n_classes, 1))
    return UDA(net, task, **kwargs)


def quiet(method, task, steps, **kwargs):
    return fit(method, task, steps, **{"batch_size": 4, "progress": False, "eval_on": False, "workers": 0} | kwargs)


def same(a, b):
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


class Broken(UDA):
    "Does something bad at one step"
    _at, _do = 7, None

    def updates(self, lab, unl, clock):
        if clock.step == self._at and self._do: self._do()
        for name, losses, *more in super().updates(lab, unl, clock):
            if clock.step == self._at and not self._do: losses["consistency"] = losses["consistency"] + float("nan")
            yield name, losses, *more


def broken(task, at=7, do=None):
    method = Broken(small(task).net, task)
    method._at, method._do = at, do
    return method


def test_two_runs_of_the_same_seed_are_equal_and_another_seed_is_not(task):
    a, b, c = small(task), small(task), small(task)
    quiet(a, task, 6), quiet(b, task, 6), quiet(c, task, 6, seed=1)
    assert same(a, b) and not same(a, c)


def test_resume_after_a_kill_is_bit_exact(task, tmp_path):
    code = textwrap.dedent(f"""
        import os, signal, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_engine import broken, quiet
        from semiseg_nb.catalogue import load_task
        task = load_task("scenes", n_labelled=6, size=32)
        method = broken(task, at=8, do=lambda: os.kill(os.getpid(), signal.SIGKILL))
        quiet(method, task, 12, out_dir={str(tmp_path)!r}, checkpoint_every=5)
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL, done.stderr
    torch.set_num_threads(1)
    whole, resumed = broken(task, at=-1), broken(task, at=-1)
    quiet(whole, task, 12)
    torch.rand(100)                      # whatever happened to the global random state in between
    run = quiet(resumed, task, 12, out_dir=tmp_path, checkpoint_every=5)
    assert same(whole, resumed)
    state = read_state(tmp_path / "checkpoint.pt")
    assert state["step"] == 12 and run.images == 12 * 8
    for (ka, va), (kb, vb) in zip(whole.optimisers["net"].state_dict()["state"].items(), resumed.optimisers["net"].state_dict()["state"].items()):
        assert ka == kb and all(torch.equal(va[n], vb[n]) for n in va)


def test_a_finished_run_is_not_run_again(task, tmp_path):
    method = small(task)
    first = quiet(method, task, 6, out_dir=tmp_path)
    again = small(task)
    second = quiet(again, task, 6, out_dir=tmp_path)
    assert same(method, again) and second.history == first.history and second.seconds == pytest.approx(first.seconds)


@pytest.mark.parametrize("other, told", [(dict(strength=0.3), "strength = 0.5, but this one has strength = 0.3"), (dict(lr=0.1), "lr = 0.1")])
def test_a_run_does_not_go_on_with_another_setting_that_is_no_attribute(task, tmp_path, other, told):
    quiet(small(task), task, 2, out_dir=tmp_path)
    with pytest.raises(UserError, match=told): quiet(UDA(small(task).net, task, **other), task, 2, out_dir=tmp_path)


def test_a_checkpoint_that_does_not_know_a_setting_is_refused(task, tmp_path):
    quiet(small(task), task, 2, out_dir=tmp_path)
    state = read_state(tmp_path / "checkpoint.pt")
    del state["identity"]["strength"]
    write_state(tmp_path / "checkpoint.pt", state)
    with pytest.raises(UserError, match="strength = None, but this one has strength = 0.5"): quiet(small(task), task, 2, out_dir=tmp_path)


def test_a_run_does_not_go_on_with_another_network(task, tmp_path):
    quiet(small(task), task, 2, out_dir=tmp_path)
    with pytest.raises(UserError, match="hash|initial weights|other networks"):
        quiet(UDA(UNet(task.n_classes, width=4), task), task, 2, out_dir=tmp_path)


def test_an_interrupted_run_says_where_it_can_go_on(task, tmp_path):
    def interrupt(): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt, match=r"Interrupted at step 7 of 12; the last good checkpoint is step 5 .*resume=True"):
        quiet(broken(task, do=interrupt), task, 12, out_dir=tmp_path, checkpoint_every=5)
    whole, resumed = broken(task, at=-1), broken(task, at=-1)
    quiet(whole, task, 12), quiet(resumed, task, 12, out_dir=tmp_path)
    assert same(whole, resumed)


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_the_good_checkpoint(task, tmp_path):
    with pytest.raises(NonFiniteLoss, match=r"'consistency' became nan at step 7; the last good checkpoint is step 5"):
        quiet(broken(task), task, 12, out_dir=tmp_path, checkpoint_every=5)
    state = read_state(tmp_path / "checkpoint.pt")
    assert state["step"] == 5 and all(torch.isfinite(v).all() for v in state["method"].values() if v.is_floating_point())


def test_a_weight_that_is_not_finite_is_never_saved(task, tmp_path):
    method = small(task)
    def poison():
        with torch.no_grad(): method.net[0].bias[0] = float("inf")
    bad = Broken(method.net, task)
    bad._at, bad._do = 4, poison
    with pytest.raises(NonFiniteLoss): quiet(bad, task, 12, out_dir=tmp_path, checkpoint_every=5)
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_full_disk_keeps_the_older_checkpoint(task, tmp_path, monkeypatch):
    quiet(small(task), task, 12, out_dir=tmp_path, checkpoint_every=6)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    def full(state, f):
        f.write(b"half")
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"Could not write .*checkpoint\.pt \(No space left on device\); the older file is untouched"):
        quiet(small(task), task, 12, out_dir=tmp_path, resume=False)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before and os.listdir(tmp_path) == ["checkpoint.pt"]


def test_the_checkpoint_of_another_run_or_a_truncated_one_is_refused(task, tmp_path):
    quiet(small(task), task, 4, out_dir=tmp_path)
    with pytest.raises(UserError, match=r"belongs to a run with seed = 0, but this one has seed = 1"): quiet(small(task), task, 4, out_dir=tmp_path, seed=1)
    with pytest.raises(UserError, match=r"belongs to a run with threshold = 0.8, but this one has threshold = 0.9"):
        quiet(small(task, threshold=0.9), task, 4, out_dir=tmp_path)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="is no whole checkpoint"): quiet(small(task), task, 4, out_dir=tmp_path)


@pytest.mark.parametrize("kwargs, text", [
    ({"steps": 0}, "steps is 0, but"), ({"steps": 2.5}, "steps is 2.5"), ({"steps": 2, "batch_size": 0}, "batch_size is 0"),
    ({"steps": 2, "eval_every": -1}, "eval_every is -1"), ({"steps": 2, "checkpoint_every": 0}, "checkpoint_every is 0"),
])
def test_settings_that_cannot_work(task, kwargs, text):
    with pytest.raises(UserError, match=text): quiet(small(task), task, **kwargs)


class Toy(Method):
    "Two networks that play against each other"
    def __init__(self):
        super().__init__()
        self.g, self.d = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 1, 1)
        self.optimisers = {"g": torch.optim.SGD(self.g.parameters(), lr=0.1), "d": torch.optim.SGD(self.d.parameters(), lr=0.1)}
        self.seen = []

    def updates(self, lab, unl, clock):
        x = unl["image"]
        before, old = self.g.weight.detach().clone(), self.d.weight.grad
        yield "g", {"adversarial": self.d(self.g(x)).mean()}
        assert not torch.equal(before, self.g.weight) and self.d.weight.grad is old
        fake = self.g(x).detach()
        yield "d", {"real": self.d(x).mean(), "fake": -self.d(fake).mean()}
        self.seen.append((clock.step, sorted(unl), self.d.weight.grad is not None))


def test_a_method_with_two_optimisers(task):
    method = Toy()
    run = quiet(method, task, 3)
    assert method.seen == [(i, ["image", "index"], True) for i in range(3)]
    assert {"adversarial", "real", "fake"} <= run.history[-1].keys()


def test_a_method_without_optimiser_is_told():
    class Empty(Method):
        def __init__(self):
            super().__init__()
            self.net = nn.Conv2d(3, 2, 1)
    with pytest.raises(UserError, match="Empty has no optimiser"): quiet(Empty(), load_task("scenes", n_labelled=6, size=32), 1)


def test_history_has_losses_statistics_and_scores(task):
    run = quiet(small(task), task, 20, eval_on=task.val, eval_every=10)
    assert [r["step"] for r in run.history if "miou" in r] == [10, 20]
    assert {"supervised", "consistency", "kept", "lr", "seconds"} <= run.history[-1].keys()
    assert run.result["miou"] == run.history[-1]["miou"] and run.images_per_second > 0 and run.peak_memory_mb > 10


def test_evaluation_does_not_touch_the_run(task):
    a, b = small(task), small(task)
    quiet(a, task, 6), quiet(b, task, 6, eval_on=task.val, eval_every=2, probe=lambda m: {"norm": float(m.net[0].weight.detach().norm())})
    assert same(a, b)


def test_evaluate_scores_a_perfect_and_a_constant_prediction(task):
    class Oracle(Method):
        def __init__(self):
            super().__init__()
            self.p = nn.Parameter(torch.zeros(1))
            self.at = 0
        def predict(self, x):
            masks = torch.stack([task.val[i]["mask"] for i in range(self.at, self.at + len(x))]).long()
            self.at += len(x)
            return torch.nn.functional.one_hot(masks, task.n_classes).permute(0, 3, 1, 2).float() * 20
    scores = evaluate(Oracle(), task.val)
    assert scores["miou"] == pytest.approx(1) and scores["pixel_accuracy"] == pytest.approx(1) and scores["ece"] < 1e-3


def test_clock_draws_are_functions_of_seed_stream_and_step():
    def draw(*a): return torch.rand(3, generator=Clock(*a).rng("labelled"))
    assert torch.equal(draw(5, 10, 0), draw(5, 99, 0)) and not torch.equal(draw(5, 10, 0), draw(6, 10, 0))


def test_schedule_reaches_the_optimiser(task):
    class Half(UDA):
        def lr_factor(self, clock): return 0.5
    method = Half(small(task).net, task, lr=0.01)
    run = quiet(method, task, 2)
    assert run.history[-1]["lr"] == pytest.approx(0.005) and method.optimisers["net"].param_groups[0]["lr"] == 0.01


def train_jointly(path):
    task = load_task("scenes", n_labelled=6, size=32)
    accelerator = make_accelerator("cpu")
    seed_everything(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, task.n_classes, 1))
    method = UDA(net, task, threshold=0.3, warmup=0.0)
    whole = flip_crop(scale=(1, 1), shift=0, fill=task.mean)      # no padding: every process has as many valid pixels as the other
    method.policies, method.weak = [whole], whole
    fit(method, task, 10, batch_size=4, progress=False, eval_on=False, workers=0, accelerator=accelerator)
    if accelerator.is_main_process: torch.save(method.state_dict(), path)


@pytest.mark.slow
def test_two_processes_equal_one_process_on_the_joint_batch(tmp_path):
    train_jointly(tmp_path / "one.pt")
    run_pair(train_jointly, tmp_path / "two.pt")
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in ("one", "two"))
    moved = 0.0
    for name in one:
        if one[name].is_floating_point(): torch.testing.assert_close(one[name], two[name], atol=1e-6, rtol=0)
        moved += float(one[name].float().abs().sum())
    assert moved > 0


def test_the_average_follows_the_step_of_the_engine(task):
    method = small(task)
    quiet(method, task, 1)
    assert isinstance(method.ema, EMA) and same(method.ema.net, method.net)      # the first update copies


def test_one_accelerator_is_enough(task):
    accelerator = make_accelerator()
    assert accelerator.num_processes == 1 and accelerator.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


# ---------------------------------------------------------------- what the user sets is honoured or refused

def baseline(task, **kwargs):
    seed_everything(0)
    return Supervised(UNet(task.n_classes, width=4), task, **kwargs)


@pytest.mark.parametrize("freeze", [lambda m: m.requires_grad_(False), frozen], ids=["requires_grad", "frozen"])
def test_frozen_parameters_stay_and_the_others_move(task, freeze):
    method = baseline(task)
    freeze(method.net.down)
    still, moving = fingerprint(dict(method.net.down.named_parameters())), fingerprint(method.net.head)
    quiet(method, task, 3)
    assert fingerprint(dict(method.net.down.named_parameters())) == still and fingerprint(method.net.head) != moving


def test_a_network_that_is_wholly_frozen_is_refused(task):
    method = baseline(task)
    method.net.requires_grad_(False)
    with pytest.raises(UserError, match="Every parameter of optimiser 'net' is frozen"): quiet(method, task, 3)


def test_batch_norm_in_eval_mode_keeps_its_averages_in_every_later_fit(task):
    method = baseline(task)
    norm = next(m for m in method.net.modules() if isinstance(m, nn.BatchNorm2d))
    norm.eval()
    before = norm.running_mean.clone()
    for _ in range(2): quiet(method, task, 3)
    others = [m for m in method.net.modules() if isinstance(m, nn.BatchNorm2d) and m is not norm]
    assert torch.equal(norm.running_mean, before) and all(m.running_mean.abs().sum() > 0 for m in others)


def test_a_learning_rate_changed_between_two_calls_is_used(task):
    method = baseline(task, lr=1e-2)
    assert quiet(method, task, 4).history[0]["lr"] == 1e-2
    for group in method.optimisers["net"].param_groups: group["lr"] = 1e-5
    assert quiet(method, task, 4).history[0]["lr"] == 1e-5


@pytest.mark.parametrize("lr", [0.0, -1.0, float("nan"), float("inf")])
def test_a_learning_rate_that_is_none_is_refused_wherever_it_is_set(task, lr):
    with pytest.raises(UserError, match="lr is"): baseline(task, lr=lr)
    method = baseline(task)
    method.optimisers["net"].param_groups[0]["lr"] = lr
    with pytest.raises(UserError, match="learning rate of optimiser 'net'"): quiet(method, task, 4)


@pytest.mark.parametrize("seed", [-1, None, 1.5, "one"])
def test_a_seed_is_a_whole_number(task, seed):
    with pytest.raises(UserError, match="seed is"): quiet(baseline(task), task, 2, seed=seed)


OWN = """
import torch
from accelerate import Accelerator
from semiseg_nb.catalogue import load_task
from semiseg_nb.core import UserError
from semiseg_nb.engine import evaluate, fit
from semiseg_nb.networks import UNet
from semiseg_nb.supervised import Supervised
task = load_task("scenes", n_labelled=4, size=32)
method = Supervised(UNet(task.n_classes, width=4), task)
try: fit(method, task, 2, 2, progress=False, accelerator=Accelerator(cpu=True, gradient_accumulation_steps=4, mixed_precision="bf16"))
except UserError as e: print(e)
fit(method, task, 2, 2, progress=False, accelerator=Accelerator(cpu=True, mixed_precision="bf16"))
print(round(evaluate(method, task.val)["miou"], 3) >= 0, method.accelerator.mixed_precision)
"""


def test_an_accelerator_of_ones_own_is_used_everywhere_and_accumulation_refused():
    done = subprocess.run([sys.executable, "-c", OWN], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "accumulates gradients over 4 batches" in done.stdout and done.stdout.endswith("True bf16\n")


# ---------------------------------------------------------------- nothing is lost

def test_the_checkpoint_is_written_before_anything_that_can_fail(task, tmp_path):
    def probe(method): raise MemoryError("validation ran out of memory")
    method = baseline(task)
    with pytest.raises(MemoryError): quiet(method, task, 4, eval_on=task.val, probe=probe, out_dir=tmp_path)
    assert read_state(tmp_path / "checkpoint.pt")["step"] == 4
    run = quiet(baseline(task), task, 4, eval_on=task.val, out_dir=tmp_path)            # the evaluation that is missing is made up for
    assert "miou" in run.history[-1] and "miou" in read_state(tmp_path / "checkpoint.pt")["run"]["history"][-1]


def test_what_is_written_can_be_read_back(task, tmp_path):
    for _ in range(2):
        run = quiet(baseline(task, lr=np.float64(1e-3)), task, 4, eval_on=task.val, out_dir=tmp_path, probe=lambda m: {"dice": np.mean([.1, .3])})
    assert run.history[-1]["dice"] == pytest.approx(.2)


def test_a_method_can_be_pickled_after_training(task, tmp_path):
    method = baseline(task)
    quiet(method, task, 2)
    torch.save(method, tmp_path / "method.pt")
    again = torch.load(tmp_path / "method.pt", weights_only=False)
    assert same(method, again) and settings(again) == settings(method) and not again.train().ema.net.training
    quiet(again, task, 2)


def test_an_out_dir_that_cannot_be_written_stops_before_the_first_step(task, tmp_path):
    (tmp_path / "file").write_text("")
    method = baseline(task)
    before = fingerprint(method)
    for folder in (tmp_path / "file", tmp_path / "file" / "sub", "/proc/none"):
        with pytest.raises(UserError, match="Could not write .*choose"): quiet(method, task, 2, out_dir=folder)
    assert fingerprint(method) == before


def test_stale_temporary_files_are_cleared_and_an_interrupt_leaves_none(task, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs): raise KeyboardInterrupt
    quiet(baseline(task), task, 2, out_dir=tmp_path)
    import semiseg_nb.checkpoint
    monkeypatch.setattr(semiseg_nb.checkpoint.torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt): quiet(baseline(task), task, 4, out_dir=tmp_path, resume=False)
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


# ---------------------------------------------------------------- whose checkpoint it is

@pytest.mark.parametrize(("change", "said"), [
    (dict(clip=1.0), "clip = None, but this one has clip = 1.0"), (dict(batch_size=2), "batch_size = 4"), (dict(parents=("abc",)), "parents"),
])
def test_what_changes_the_numbers_is_another_run(task, tmp_path, change, said):
    quiet(baseline(task), task, 4, out_dir=tmp_path)
    with pytest.raises(UserError, match=said): quiet(baseline(task), task, 4, out_dir=tmp_path, **change)


def test_other_initial_weights_and_frozen_parts_are_another_run(task, tmp_path):
    quiet(baseline(task), task, 4, out_dir=tmp_path)
    seed_everything(1)
    other = Supervised(UNet(task.n_classes, width=4), task)
    with pytest.raises(UserError, match="initial weights"): quiet(other, task, 4, out_dir=tmp_path)
    still = baseline(task)
    still.net.down.requires_grad_(False)
    with pytest.raises(UserError, match="frozen"): quiet(still, task, 4, out_dir=tmp_path)


def test_the_same_object_may_go_on_after_an_interrupt_and_be_run_again_when_it_is_finished(task, tmp_path):
    def interrupt(): raise KeyboardInterrupt
    method = broken(task, do=interrupt)
    with pytest.raises(KeyboardInterrupt): quiet(method, task, 12, out_dir=tmp_path, checkpoint_every=5)
    method._at = -1
    quiet(method, task, 12, out_dir=tmp_path, checkpoint_every=5)
    done = fingerprint(method)
    quiet(method, task, 12, out_dir=tmp_path, checkpoint_every=5)
    assert fingerprint(method) == done


def test_a_checkpoint_is_never_replaced_without_a_word(task, tmp_path, capsys):
    quiet(baseline(task), task, 4, out_dir=tmp_path)
    quiet(baseline(task, lr=1e-3), task, 4, out_dir=tmp_path, resume=False)
    assert "of another run (lr = 0.002, but this one has lr = 0.001) will be replaced" in capsys.readouterr().out


@pytest.mark.parametrize(("change", "said"), [
    (lambda s: s.pop("rng"), "lacks 'rng'"), (lambda s: s.update(step=99), "is at step 99, outside of this run of 4"), (lambda s: s.update(step=-1), "is at step -1"),
    (lambda s: s.update(step="4"), "lacks 'step'"), (lambda s: s["run"].pop("history"), "lacks 'history'"), (lambda s: s["run"].update(history=[3]), "no history"),
    (lambda s: s.update(rng=[]), "random states of 0 processes"), (lambda s: s.update(rng=[{"torch": 1}]), "other networks"),
    (lambda s: s["optimisers"].clear(), "other networks"), (lambda s: s["method"].clear(), "other networks"),
    (lambda s: s["optimisers"]["net"]["state"].pop(3), "has forgotten a weight"), (lambda s: s["optimisers"]["net"]["state"][3].pop("exp_avg"), "'exp_avg' is in one only"),
    (lambda s: s["optimisers"]["net"]["state"][3].update(exp_avg=torch.zeros(1)), "'exp_avg' is of another type or shape"),
    (lambda s: s["method"].update({"net.head.bias": s["method"]["net.head.bias"].double()}), "of another type or shape"),
    (lambda s: s["method"]["net.head.bias"].fill_(float("nan")), "a number that cannot be"), (lambda s: s["method"]["ema.t"].fill_(-1), "a number that cannot be"),
    (lambda s: s["run"]["history"][-1].update(miou=7.0), "no history"), (lambda s: s["run"].update(seconds=float("nan")), "no history"),
])
def test_a_checkpoint_that_lacks_something_is_refused_in_one_sentence(task, tmp_path, change, said):
    quiet(baseline(task), task, 4, out_dir=tmp_path)
    state = read_state(tmp_path / "checkpoint.pt")
    change(state)
    write_state(tmp_path / "checkpoint.pt", state)
    with pytest.raises(UserError, match=said): quiet(baseline(task), task, 4, out_dir=tmp_path)


class Answers(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 1)
    def forward(self, x): return {"out": self.conv(x)}


def test_a_network_that_returns_no_tensor_is_refused(task):
    with pytest.raises(UserError, match="returns a dict, but it should return logits"): quiet(Supervised(Answers(), task), task, 2)


def test_a_run_with_a_bank_in_a_file_goes_on_bit_for_bit(task, tmp_path):
    def method(name):
        seed_everything(0)
        return TemporalEnsembling(UNet(task.n_classes, width=4), task, warmup=0.0, threshold=0.0, storage={"file": str(tmp_path / name)})
    task = replace(task, unlabelled=Images(task.unlabelled.ids[:8], task.unlabelled.images[:8]))
    whole = method("whole")
    quiet(whole, task, 8)
    cut, done = method("cut"), []
    own = cut.updates
    def updates(*args):
        done.append(1)
        if len(done) == 6: raise KeyboardInterrupt
        return own(*args)
    cut.updates = updates
    with pytest.raises(KeyboardInterrupt): quiet(cut, task, 8, out_dir=tmp_path, checkpoint_every=4)
    again = method("cut")
    quiet(again, task, 8, out_dir=tmp_path, checkpoint_every=4)
    assert fingerprint(again.net) == fingerprint(whole.net)


def test_an_optimiser_whose_memory_is_infinite_stops_the_run(task):
    class Huge(Supervised):
        def updates(self, lab, unl, clock):
            for name, losses in super().updates(lab, unl, clock): yield name, {"supervised": losses["supervised"] * 1e25}
    with pytest.raises(NonFiniteLoss, match="exp_avg_sq of .* is not finite"): quiet(Huge(baseline(task).net, task), task, 4)


def test_evaluation_takes_as_many_images_as_fit_into_memory():
    assert images_at_once((64, 64), 6) == 32 and images_at_once((512, 1024), 19) == 3 and images_at_once((4096, 4096), 200) == 1


def score_three(folder):
    task = load_task("scenes", n_labelled=4, size=32)
    few = Labelled(task.val.ids[:3], task.val.images[:3], task.val.masks[:3], task.n_classes)
    accelerator = make_accelerator("cpu")
    seed_everything(0)
    method = Supervised(UNet(task.n_classes, width=4), task)
    (folder / f"{accelerator.num_processes}-{accelerator.process_index}").write_text(str(evaluate(method, few, accelerator=accelerator)["miou"]))


@pytest.mark.slow
def test_a_process_without_a_validation_batch_joins(tmp_path):
    score_three(tmp_path)
    run_pair(score_three, tmp_path)
    scores = {name: (tmp_path / name).read_text() for name in ("1-0", "2-0", "2-1")}
    assert len(set(scores.values())) == 1, scores
