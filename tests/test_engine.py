"engine: the loop, resume bit for bit, two processes, the guard, and what a user can get wrong"
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

from semiseg_nb.core import EMA, UserError, seed_everything
from semiseg_nb.data import load_task
from semiseg_nb.engine import (
    Clock,
    Method,
    NonFiniteLoss,
    evaluate,
    fit,
    load_weights,
    make_accelerator,
    save_weights,
)
from semiseg_nb.models import UNet
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
        for name, losses, *statistics in super().updates(lab, unl, clock):
            if clock.step == self._at and not self._do: losses["consistency"] = losses["consistency"] + float("nan")
            yield name, losses, *statistics


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
        from semiseg_nb.data import load_task
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
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
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
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    del state["settings"]["strength"]
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="strength = None, but this one has strength = 0.5"): quiet(small(task), task, 2, out_dir=tmp_path)


def test_a_run_does_not_go_on_with_another_network(task, tmp_path):
    quiet(small(task), task, 2, out_dir=tmp_path)
    with pytest.raises(UserError, match="holds other networks than this run"):
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
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
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
    with pytest.raises(UserError, match="is not a whole checkpoint"): quiet(small(task), task, 4, out_dir=tmp_path)


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


def test_weights_round_trip_and_a_wrong_file(task, tmp_path):
    net = UNet(5, width=4)
    path = save_weights(net, tmp_path / "unet", {"model": "unet"})
    other = UNet(5, width=4)
    assert load_weights(other, path) == {"model": "unet"} and same(net, other)
    with pytest.raises(UserError, match="does not fit this network"): load_weights(UNet(5, width=6), path)
    with pytest.raises(UserError, match="There is no weights file"): load_weights(net, tmp_path / "none.safetensors")


def test_clock_draws_are_functions_of_seed_stream_and_step():
    def draw(*a): return torch.rand(3, generator=Clock(*a).rng("labelled"))
    assert torch.equal(draw(5, 10, 0), draw(5, 99, 0)) and not torch.equal(draw(5, 10, 0), draw(6, 10, 0))


def test_schedule_reaches_the_optimiser(task):
    class Half(UDA):
        def lr_factor(self, clock): return 0.5
    method = Half(small(task).net, task, lr=0.01)
    run = quiet(method, task, 2)
    assert method.optimisers["net"].param_groups[0]["lr"] == pytest.approx(0.005) and run.history[-1]["lr"] == pytest.approx(0.005)


PROCESSES = """
import sys
import torch
from torch import nn
from semiseg_nb.augment import flip_crop
from semiseg_nb.core import seed_everything
from semiseg_nb.data import load_task
from semiseg_nb.engine import fit, make_accelerator
from semiseg_nb.uda import UDA

torch.set_num_threads(1)
task = load_task("scenes", n_labelled=6, size=32)
accelerator = make_accelerator()
seed_everything(accelerator.process_index if sys.argv[2] == "different" else 0)
net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, task.n_classes, 1))
method = UDA(net, task, threshold=0.3, warmup=0.0)
whole = flip_crop(scale=(1, 1), shift=0, fill=task.mean)      # no padding: every process has as many valid pixels as the other
method.policies, method.weak = [whole], whole
fit(method, task, 10, batch_size=4, progress=False, eval_on=False, workers=0, accelerator=accelerator)
if accelerator.is_main_process: torch.save(method.state_dict(), sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_equal_one_process_on_the_joint_batch(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(PROCESSES)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    def start(*command): subprocess.run([*command], check=True, env=env, capture_output=True, text=True, timeout=300)
    start(sys.executable, str(script), str(tmp_path / "one.pt"), "equal")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    start(*torchrun, str(script), str(tmp_path / "two.pt"), "equal")
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
