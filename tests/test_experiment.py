"""The runner: any method, class or recipe; what it writes, how it goes on, and what it refuses before training."""
import json

import pytest
import torch

from semiseg_nb.catalogue import load_task
from semiseg_nb.checkpoint import fingerprint, load_weights, read_weights
from semiseg_nb.core import Fraction, UserError, Whole, checked
from semiseg_nb.data import Labelled
from semiseg_nb.engine import Stage, fit, make_accelerator, recipe
from semiseg_nb.experiment import find_method, licence_of, methods, miou_interval, needs_net, own_settings, run, without_files
from semiseg_nb.models import build_model
from semiseg_nb.records import read_records
from semiseg_nb.supervised import Supervised
from semiseg_nb.tags import Tagger
from semiseg_nb.uda import UDA

QUICK = dict(steps=4, batch_size=4, width=4, progress=False, device="cpu")


@pytest.fixture(scope="module")
def task(): return load_task("scenes", n_labelled=6, size=32, n_unlabelled=12, n_tune=4)


class Noisy(UDA):
    name, title = "noisy", "UDA with a name of its own"


class Interrupted(UDA):
    name, title, stop = "interrupted", "UDA that is cut", False
    def updates(self, lab, unl, clock):
        if self.stop and clock.step == 3: raise KeyboardInterrupt
        yield from super().updates(lab, unl, clock)


@recipe("pair", "Two stages", "arXiv 0000.00000")
@checked
def pair(net, task, steps, *, first_steps: Whole = 2, threshold: Fraction = 0.2):
    first = yield Stage("first", Supervised(net, task, views="strong"), first_steps)
    torch.rand(3)
    return (yield Stage("second", Interrupted(first.net, task, threshold=threshold), steps, scored=True))


def by_hand(task, method, steps, **more): return fit(method, task, steps, 4, progress=False, eval_on=False, **more)


# ---------------------------------------------------------------- what can be run

def test_the_registry_is_on_the_classes():
    known = methods()
    assert list(known) == sorted(known) and {"supervised", "uda", "cct_weak", "phases", "semanticgan", "cyclegan"} <= set(known)
    assert all(what.name == name and what.title for name, what in known.items())
    assert Tagger not in known.values(), "a stage is no method"
    assert known["uda"] is UDA and find_method("uda") is UDA is find_method(UDA) and find_method(pair) is pair
    assert needs_net(UDA) and not needs_net(known["semanticgan"])
    assert own_settings(pair) == {"first_steps": 2, "threshold": 0.2} and own_settings(UDA)["threshold"] == 0.8


@pytest.mark.parametrize("what, said", [
    ("udda", "method 'udda' is not known.*did you mean 'uda'"), (3, "3 is no method"), (len, "is no method"),
    (type("Nameless", (UDA,), {"name": ""}), "Nameless has no name for its record")], ids=str)
def test_what_is_no_method_is_refused(task, what, said):
    with pytest.raises(UserError, match=said): run(what, task, **QUICK)


@pytest.mark.parametrize("more, said", [
    (dict(settings={"treshold": 0.5}), "setting of UDA 'treshold' is not known.*did you mean 'threshold'"),
    (dict(settings={"threshold": 80}), "threshold is 80"), (dict(model="unett"), "did you mean 'unet'"),
    (dict(seed=-1), "seed is -1"), (dict(steps=0), "steps is 0"), (dict(score_on="test"), "score_on 'test'"), (dict(treshold=1), "treshold")], ids=str)
def test_a_wrong_value_is_refused_before_training(task, tmp_path, more, said):
    with pytest.raises((UserError, TypeError), match=said): run("uda", task, **QUICK | more, out_dir=tmp_path)
    assert not list(tmp_path.rglob("*.pt")) and not list(tmp_path.rglob("*.safetensors"))


def test_no_tune_images_to_score_on():
    task = load_task("scenes", n_labelled=6, size=32, n_unlabelled=6, n_tune=0)
    with pytest.raises(UserError, match="score_on is 'tune', but this task has no tune images"): run("uda", task, **QUICK, score_on="tune")


# ---------------------------------------------------------------- what it does is what `fit` does

def test_a_name_and_its_class_are_the_same_run(task, tmp_path):
    one = run("uda", task, **QUICK, settings={"threshold": 0.2}, seed=3)
    two = run(UDA, task, **QUICK, settings={"threshold": 0.2}, seed=3)
    torch.manual_seed(3)
    hand = UDA(build_model("unet", task.n_classes, width=4, mean=task.mean), task, threshold=0.2)
    by_hand(task, hand, 4, seed=3)
    assert fingerprint(one.method) == fingerprint(two.method) == fingerprint(hand)
    assert one.path is None and one.folder is None and one.record["result"] == two.record["result"]
    assert one.record["params"]["threshold"] == 0.2 and one.record["params"]["scored_on"] == "val"


def test_a_recipe_is_its_stages_one_after_the_other(task, tmp_path):
    result = run(pair, task, **QUICK, settings={"first_steps": 3}, out_dir=tmp_path)
    assert list(result.runs) == ["first", "second"] and [r.steps for r in result.runs.values()] == [3, 4]
    assert sorted(p.name for p in result.folder.iterdir()) == ["first", "run.json", "second", "weights.safetensors"] or \
        {"first", "second", "run.json", "weights.safetensors"} <= {p.name for p in result.folder.iterdir()}
    record = result.record
    assert record["params"]["first_steps"] == 3 and record["params"]["first views"] == "strong" and record["params"]["first steps"] == 3
    assert [row["step"] for row in record["curve"]] == sorted(row["step"] for row in record["curve"]) and record["curve"][-1]["step"] == 7
    assert record["params"]["class"] == "Interrupted"
    assert record["method"] == "pair" and record["title"] == "Two stages", "the recipe's name, not that of its last stage"


def test_a_recipe_that_is_cut_goes_on_in_the_right_stage(task, tmp_path, monkeypatch):
    whole = run(pair, task, **QUICK)
    monkeypatch.setattr(Interrupted, "stop", True)
    with pytest.raises(KeyboardInterrupt, match="the last good checkpoint is step 2"): run(pair, task, **QUICK, out_dir=tmp_path, checkpoint_every=2)
    monkeypatch.setattr(Interrupted, "stop", False)
    torch.rand(5)
    again = run(pair, task, **QUICK, out_dir=tmp_path, checkpoint_every=2)
    assert fingerprint(again.method) == fingerprint(whole.method) and again.record["result"] == whole.record["result"]
    assert len(list(tmp_path.glob("pair-*"))) == 1


def test_another_first_stage_is_another_run(task, tmp_path):
    one = run(pair, task, **QUICK, out_dir=tmp_path)
    two = run(pair, task, **QUICK, out_dir=tmp_path, settings={"first_steps": 1})
    assert one.folder != two.folder and one.path != two.path and fingerprint(one.method) != fingerprint(two.method)


def test_weights_are_those_that_predict(task, tmp_path):
    result = run("uda", task, **QUICK, out_dir=tmp_path)
    net = build_model("unet", task.n_classes, width=4)
    load_weights(net, result.folder / "weights")
    x = task.val.images[:2].float() / 255
    with torch.no_grad(): torch.testing.assert_close(net.eval()(x), result.method.eval().predict(x))


# ---------------------------------------------------------------- records

def test_the_same_run_replaces_its_record_and_variants_stand_beside_it(task, tmp_path):
    paths = [run("supervised", task, **QUICK | more, records=tmp_path).path for more in ({}, {}, {"seed": 1}, {"variant": "wide"}, {"score_on": "tune"})]
    assert paths[0] == paths[1] and len(set(paths)) == 4
    known = [json.loads(p.read_text()) for p in paths]
    assert known[3]["params"]["variant"] == "wide" and known[4]["params"]["scored_on"] == "tune"


def test_the_baseline_has_two_rows(task, tmp_path):
    result = run("supervised", task, **QUICK, records=tmp_path)
    records, refused = read_records(tmp_path)
    assert {r["method"] for r in records} == {"supervised", "supervised_ema"} and not refused
    assert result.record["method"] == "supervised_ema" and len({r["result"]["miou"] for r in records}) >= 1
    strong = run("supervised", task, **QUICK, records=tmp_path, settings={"views": "strong"})
    assert "supervised_strong" in {r["method"] for r in read_records(tmp_path)[0]} and strong.record["params"]["views"] == "strong"


def test_a_file_of_one_machine_is_not_in_the_record(task, tmp_path):
    def with_bank(name):
        storage = {"stride": 2, "file": str(tmp_path / name)}
        return run("temporal", task, **QUICK, settings={"storage": storage}, records=tmp_path / "records")
    one, two = with_bank("one"), with_bank("two")
    assert one.record["params"]["storage"] == {"stride": 2} and str(tmp_path) not in one.path.read_text()
    assert one.path == two.path, "the same run, wherever its bank lies"
    assert one.method.storage["file"] == str(tmp_path / "one"), "the method keeps its setting"
    assert without_files({"later": {"storage": {"file": "a", "topk": 3}}, "steps": 4}) == {"later": {"storage": {"topk": 3}}, "steps": 4}


def test_an_unlabelled_batch_of_its_own(task):
    big, small = run("uda", task, **QUICK, unlabelled_batch=6), run("uda", task, **QUICK)
    assert big.record["params"]["unlabelled_batch"] == 6 and small.record["params"]["unlabelled_batch"] == 4
    assert next(iter(big.runs.values())).images == 4 * (4 + 6) and fingerprint(big.method) != fingerprint(small.method)
    with pytest.raises(UserError, match="no partner for CutMix"): run("uda", task, **QUICK, unlabelled_batch=1)


def test_a_class_of_ones_own_and_a_network_of_ones_own(task, tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Conv2d(3, task.n_classes, 3, padding=1)
    result = run(Noisy, task, **QUICK, net=net, records=tmp_path)
    assert result.record["method"] == "noisy" and result.method.net is net and result.path.name.startswith("noisy-")


def test_the_run_says_what_it_was_told(task, tmp_path):
    result = run("uda", task, **QUICK, out_dir=tmp_path, settings={"threshold": 0.5}, data={"dataset": "scenes"})
    told = json.loads((result.folder / "run.json").read_text())
    assert told["method"] == "uda" and told["settings"]["threshold"] == 0.5 and told["data"] == {"dataset": "scenes"} and told["steps"] == 4
    assert not list(tmp_path.rglob(".*")), "nothing is left over"


def test_a_folder_of_records_that_cannot_be_written_stops_before_training(task, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("semiseg_nb.experiment.fit", lambda *a, **k: pytest.fail("it trains"))
    for place in ({"records": tmp_path / "file"}, {"out_dir": tmp_path / "file" / "sub"}):
        with pytest.raises(UserError, match="Could not write .*a file stands where a folder should be"):
            run("supervised", task, steps=2, batch_size=4, width=4, progress=False, **place)


# ---------------------------------------------------------------- the card beside the weights

def test_the_card_says_all_that_a_reader_must_know(task, tmp_path):
    result = run("uda", task, **QUICK, out_dir=tmp_path, data={"dataset": "scenes", "size": 32})
    _, card = read_weights(result.folder / "weights")
    assert card["classes"] == list(task.classes) and card["palette"] == [list(c) for c in task.palette]
    assert card["network"] == {"model": "unet", "encoder": None, "width": 4, "n_classes": 5, "mean": list(task.mean)} and card["why not"] is None
    assert card["size"] == {"rule": "resize", "training": [32, 32]} and card["reading"] == {} and card["licence"] == "trained from scratch"
    assert card["title"] == "UDA" and card["steps"] == 4 and card["seed"] == 0 and card["settings"]["threshold"] == 0.8
    assert card["record"]["fingerprint"] == task.fingerprint and card["versions"]["semiseg_nb"] and "commit" in card
    low, high = card["scores"]["interval"]
    assert low < result.record["result"]["miou"] < high and card["scores"]["images"] == len(task.val) and "200 images" in card["limits"]
    told = json.loads((result.folder / "run.json").read_text())
    assert {k: v for k, v in told.items() if k not in ("dataset", "data")}.items() <= card.items(), "all that was asked for is still there"
    assert str(tmp_path) not in json.dumps(card)


def test_the_interval_is_that_of_a_bootstrap_over_images():
    "Two images, one all right and one all wrong: a quarter of the draws holds twice the good one, a quarter twice the bad one"
    x = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    y = torch.stack([torch.zeros(4, 4), torch.ones(4, 4)]).byte()
    net = torch.nn.Conv2d(3, 2, 1)
    torch.nn.init.zeros_(net.weight)
    net.bias.data = torch.tensor([1.0, 0.0])
    assert miou_interval(net, Labelled(["a", "b"], x, y, 2), make_accelerator("cpu")) == [0.0, 1.0]
    assert miou_interval(net, Labelled(["a"], x[:1], y[:1], 2), make_accelerator("cpu")) == [1.0, 1.0]


def test_a_card_says_what_it_cannot_rebuild(task, tmp_path):
    result = run(Noisy, task, **QUICK, net=torch.nn.Conv2d(3, task.n_classes, 3, padding=1), out_dir=tmp_path)
    card = read_weights(result.folder / "weights")[1]
    assert card["network"] is None and "net=" in card["why not"] and "interval" not in card["scores"]
    assert licence_of("tu-convnext_atto.d2_in1k", True, None) == "apache-2.0" and "see their page" in licence_of("resnet18", True, None)
    assert "old.pth" in licence_of("resnet18", False, "/somewhere/old.pth")
