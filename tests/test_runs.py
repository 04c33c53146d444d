"runs: a folder of runs is read again, what is broken is said, and a network answers as on the day of training"
import shutil

import pytest
import torch
from helpers import QUICK, two_methods

from semiseg_nb.catalogue import load_task
from semiseg_nb.core import UserError
from semiseg_nb.experiment import run
from semiseg_nb.runs import check_budget, finished_runs, held_out, read_run, rebuild, tasks_of
from semiseg_nb.verdict import verdict


@pytest.fixture(scope="module")
def first(tmp_path_factory): return two_methods(tmp_path_factory.mktemp("first"), seeds=2)


@pytest.fixture
def trained(first, tmp_path):
    "A copy that a test may change"
    out, task, data = first
    shutil.copytree(out, tmp_path / "runs")
    return tmp_path / "runs", task, data


def test_arms_and_repetitions(first):
    found, notes = finished_runs(first[0])
    assert not notes and len(found) == 4
    assert len({r.arm for r in found}) == 2 and len({(r.arm, r.repetition) for r in found}) == 4
    assert {r.repetition for r in found if r.method == "uda"} == {r.repetition for r in found if r.method == "supervised"}


def test_runs_of_another_budget_are_not_compared(trained):
    out, task, data = trained
    run("uda", task, data=data, out_dir=out, **QUICK | {"steps": 3, "batch_size": 4})
    with pytest.raises(UserError, match=r"cannot be compared, they differ in steps \(supervised, uda: 2; uda: 3\), and in batch_size"): verdict(out, device="cpu")
    few = load_task(**data | {"n_labelled": 5})
    other = out.parent / "other"
    run("supervised", few, data=data, out_dir=other, **QUICK)
    both = finished_runs(out)[0][:1] + finished_runs(other)[0]
    with pytest.raises(UserError, match=r"n_labelled \(supervised: 4; supervised: 5\).*keep each budget in a folder of its own"): check_budget(both, out)




def test_changed_files_are_said(trained):
    out = trained[0]
    r = finished_runs(out)[0][0]
    path = r.folder / "run.json"
    path.write_text(path.read_text().replace('"seed": ', '"seed": 1'))
    assert any("was changed or renamed" in n for n in finished_runs(out)[1])
    path.write_text("{")
    with pytest.raises(UserError, match="no readable JSON .*: train again, or remove its folder"): verdict(out)


def test_one_run(trained):
    out = trained[0]
    r = finished_runs(out)[0][0]
    assert read_run(r.folder) == r
    renamed = r.folder.rename(out / "mine")
    with pytest.raises(UserError, match="mine was changed or renamed: start the same training again"): read_run(renamed)
    other = finished_runs(out)[0][0]
    (other.folder / "weights.safetensors").unlink()
    with pytest.raises(UserError, match="is not finished: start the same training again"): read_run(other.folder)
    with pytest.raises(UserError, match="give a folder that `semiseg train --out` has made"): read_run(out / "nowhere")


def test_data_and_network_are_found_again(trained, tmp_path):
    out, task, data = trained
    runs = finished_runs(out)[0]
    again, = tasks_of(runs).values()
    assert again.fingerprint == task.fingerprint
    r = next(r for r in runs if (r.method, r.request["seed"]) == ("uda", 1))
    method = run("uda", task, seed=1, data=data, out_dir=out, **QUICK).method.eval()
    x = task.val.__getitems__([0, 1])["image"] / 255
    with torch.no_grad(): assert torch.allclose(rebuild(r, again).eval().predict(x), method.predict(x), atol=1e-5)
    assert held_out(data, task).ids == ("test/test0", "test/test1", "test/test2", "test/test3", "test/test4") and held_out({"dataset": "scenes"}, task) is None


def test_a_recipe_is_resumed_and_refused_without_its_checkpoints(tmp_path):
    task = load_task("scenes", n_labelled=2, n_unlabelled=4, size=32)
    data = dict(dataset="scenes", n_labelled=2, n_unlabelled=4, size=32)
    run("continuation", task, data=data, out_dir=tmp_path, settings={"start_steps": 2}, **QUICK)
    r, = finished_runs(tmp_path)[0]
    x = task.val.__getitems__([0])["image"] / 255
    with torch.no_grad(): assert rebuild(r, task).eval().predict(x).shape == (1, 5, 32, 32)
    for path in r.folder.rglob("checkpoint.pt"): path.unlink()
    with pytest.raises(UserError, match="has lost its checkpoints.*train again"): rebuild(r, task)
