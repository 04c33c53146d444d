"""The command `semiseg`: names go where they belong, and every mistake is one line and exit status 1."""
import json
import subprocess
import sys
from itertools import permutations
from pathlib import Path

import pytest
import yaml
from helpers import plain_folder
from PIL import Image

from semiseg_nb.annotations import export_coco
from semiseg_nb.command import describe_method, lessons_home, main, nested, one_by_one, parse, read_parameters, sort_names
from semiseg_nb.core import UserError
from semiseg_nb.experiment import methods
from semiseg_nb.scenes import CLASSES, make_scenes
from semiseg_nb.uda import UDA

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["steps=3", "batch_size=4", "width=4", "size=32", "n_labelled=6", "n_unlabelled=8"]


def fails(*words):
    "The one line with which the command ends"
    with pytest.raises(SystemExit) as end: main([*map(str, words)])
    text = str(end.value.code)
    assert text.startswith("error: ") and "\n" not in text.strip(), text
    return text


# ---------------------------------------------------------------- names

def test_names_are_sorted_into_data_run_and_settings():
    data, arguments, settings = sort_names({"n_labelled": 6, "steps": 3, "threshold": 0.5, "settings": {"mix": 0}, "data.size": 16}, UDA)
    assert (data, arguments, settings) == ({"n_labelled": 6, "size": 16}, {"steps": 3}, {"threshold": 0.5, "mix": 0})


def test_a_dotted_name_reaches_into_a_setting():
    assert sort_names({"gan.lr": 1e-3, "gan.translator.skip": True}, methods()["cyclegan"])[2] == {"gan": {"lr": 1e-3, "translator": {"skip": True}}}
    into = {}
    nested(into, "a.b.c", 1)
    assert into == {"a": {"b": {"c": 1}}}


def test_names_that_nobody_knows_or_that_two_know():
    with pytest.raises(UserError, match="parameter or setting of 'uda' 'treshold' is not known.*did you mean 'threshold'"): sort_names({"treshold": 1}, UDA)
    with pytest.raises(UserError, match="is not known"): sort_names({"accelerator": 1}, UDA)


def test_a_parameter_file(tmp_path):
    (tmp_path / "a.yaml").write_text("steps: 3\nsize: [16, 16]\n")
    assert read_parameters(tmp_path / "a.yaml") == {"steps": 3, "size": [16, 16]}
    for text, said in (("- 1\n", "holds no names"), ("a: [1", "is no readable YAML"), ("3", "holds no names")):
        (tmp_path / "b.yaml").write_text(text)
        with pytest.raises(UserError, match=said): read_parameters(tmp_path / "b.yaml")
    with pytest.raises(UserError, match=r"c\.yaml cannot be read \(No such file"): read_parameters(tmp_path / "c.yaml")


# ---------------------------------------------------------------- the order of the words

def same_in_any_order(command, parts):
    "What is parsed of some parts, each of which keeps its own words together, in whatever order they stand"
    found = [vars(parse([command, *(word for part in order for word in part.split())])) for order in permutations(parts)]
    for space in found:
        for name, value in space.items():
            if name == "values": value.sort()
            assert value == found[0][name], (name, value)
    return found[0]


def test_train_takes_its_words_in_any_order():
    found = same_in_any_order("train", ["uda", "steps=3", "--seeds 0 1", "size=32", "--alone", "--device cpu"])
    assert (found["method"], found["values"], found["seeds"], found["alone"], found["device"]) == ("uda", ["size=32", "steps=3"], [0, 1], True, "cpu")
    found = same_in_any_order("train", ["uda", "-f p.yaml", "--seeds 7", "--data mine", "threshold=0.5"])
    assert (found["file"], found["seeds"], found["data"]) == ("p.yaml", [7], "mine")


def test_options_may_stand_between_pictures():
    found = same_in_any_order("predict", ["model a.png b.png out", "--flip", "--tile 32", "--device cpu"])
    assert (found["model"], found["places"], found["flip"], found["tile"]) == ("model", ["a.png", "b.png", "out"], True, 32)
    found = vars(parse("predict model a.png --flip b.png --batch-size 2 out".split()))
    assert (found["places"], found["batch_size"]) == (["a.png", "b.png", "out"], 2)


@pytest.mark.parametrize("command", ["report", "verdict"])
def test_a_folder_that_may_be_left_out_stands_anywhere(command):
    option = {"report": "--all", "verdict": "--json"}[command]
    assert same_in_any_order(command, ["mine", option])["folder"] == "mine" and vars(parse([command, option]))["folder"] == "runs"


def test_several_numbers_are_several_options():
    assert one_by_one("--seeds 0 1 steps=3 --seeds 2 x 4".split()) == "--seeds 0 --seeds 1 steps=3 --seeds 2 x 4".split()
    assert vars(parse("train uda --seeds 0 1 --seed 2 --seeds=3".split()))["seeds"] == [0, 1, 2, 3]


@pytest.mark.parametrize("words", ["train uda --seed", "train uda --seeds one", "train uda --sides 3", "score a b", "predict model a.png --flop out"])
def test_a_strange_word_stops_the_command(words, capsys):
    with pytest.raises(SystemExit) as end: parse(words.split())
    assert end.value.code == 2 and "error: " in capsys.readouterr().err


# ---------------------------------------------------------------- train, score, report

def test_train_score_and_report(tmp_path, capsys):
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"threshold": 0.5, "steps": 100}))
    main(["train", "--seeds", "0", "1", "uda", "-f", str(tmp_path / "p.yaml"), *QUICK, "--out", str(tmp_path / "runs"), "--device", "cpu"])
    said = [line for line in capsys.readouterr().out.splitlines() if "mIoU" in line and "seed" in line]
    assert [f"seed {k}" in line for k, line in enumerate(said)] == [True, True]
    records = [json.loads(p.read_text()) for p in (tmp_path / "runs").rglob("uda-*.json")]
    assert sorted(r["seed"] for r in records) == [0, 1] and {r["params"]["steps"] for r in records} == {3}, "a word weighs more than the file"
    assert {r["params"]["threshold"] for r in records} == {0.5}
    folder, = [p.parent for p in (tmp_path / "runs").rglob("run.json") if json.loads(p.read_text())["seed"] == 0]
    main(["score", str(folder)])
    first = next(r for r in records if r["seed"] == 0)["result"]["miou"]
    assert f"mIoU {first:.4f}" in capsys.readouterr().out
    main(["score", str(folder), "--split", "tune"])
    assert "calibration error" in capsys.readouterr().out
    main(["report", str(tmp_path / "runs"), "--all"])
    assert "2 runs" in capsys.readouterr().out
    main(["report", str(tmp_path / "runs")])
    assert "no records of runs long enough" in capsys.readouterr().out
    (folder / "weights.safetensors").unlink()
    assert "is not finished: start the same training again" in fails("score", folder)


def test_a_folder_of_ones_own(tmp_path, capsys):
    plain_folder(tmp_path / "mine")
    main(["train", "supervised", "steps=2", "batch_size=2", "width=4", "size=16", "n_labelled=4",
          "--data", str(tmp_path / "mine"), "--out", str(tmp_path / "runs"), "--device", "cpu"])
    assert "seed 0" in capsys.readouterr().out
    record = json.loads(next((tmp_path / "runs").rglob("supervised_ema-*.json")).read_text())
    assert record["dataset"]["n_labelled"] == 4 and record["dataset"]["name"] != "scenes"


@pytest.mark.parametrize("words, said", [
    (["train", "udda"], "method 'udda' is not known (did you mean 'uda'?)"), (["train", "uda", "steps"], "'steps' has no value: write NAME=VALUE"),
    (["train", "uda", "threshold=80"], "threshold is 80"), (["train", "uda", "stepz=3"], "did you mean 'steps'"),
    (["train", "uda", "--data", "nowhere"], "nowhere"), (["train", "uda", "-f", "nowhere.yaml"], "nowhere.yaml cannot be read"),
    (["score", "nowhere"], "nowhere"), (["report", "nowhere"], "There is no folder nowhere"), (["methods", "udda"], "did you mean 'uda'"),
    (["train", "uda", "model=unett"], "did you mean 'unet'"), (["train", "uda", "dataset=scene"], "did you mean 'scenes'")],
    ids=lambda v: "-".join(v) if isinstance(v, list) else "")
def test_a_mistake_is_one_line(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in fails(*words)


def test_a_mistake_is_exit_status_1_and_no_traceback():
    done = subprocess.run([sys.executable, "-m", "semiseg_nb", "train", "udda"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr.startswith("error: method 'udda'") and len(done.stderr.splitlines()) == 1 and not done.stdout


# ---------------------------------------------------------------- methods, lessons

def test_methods_are_listed_with_their_papers(capsys):
    main(["methods"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(methods()) and any("arXiv 1904.12848" in line for line in lines)


@pytest.mark.parametrize("what", methods().values(), ids=methods())
def test_every_setting_has_a_meaning(what):
    lines = describe_method(what).splitlines()
    assert lines[0].startswith(f"{what.name}: {what.title}")
    assert "threshold = 0.8" in describe_method(UDA)
    ours = [line for line in lines[2:] if not line.split("=")[1].strip()]
    assert not ours


def test_lessons_are_copied_and_never_replaced(tmp_path, capsys):
    main(["lessons", str(tmp_path / "mine")])
    copied = {p.name for p in (tmp_path / "mine/nbs").glob("*.ipynb")}
    assert copied == {p.name for p in (lessons_home() / "nbs").glob("*.ipynb")} and (tmp_path / "mine/nbs/params/smoke.yaml").exists()
    (tmp_path / "mine/nbs/00_core.ipynb").write_text("mine")
    capsys.readouterr()
    main(["lessons", str(tmp_path / "mine")])
    assert "0 files copied" in capsys.readouterr().out and (tmp_path / "mine/nbs/00_core.ipynb").read_text() == "mine"
    (tmp_path / "file").write_text("x")
    assert "choose another folder" in fails("lessons", tmp_path / "file")


# ---------------------------------------------------------------- a day with images of one's own

def test_six_commands_from_an_export_to_a_model(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, masks = make_scenes(range(10), 40)
    Path("export/images").mkdir(parents=True)
    for i, x in enumerate(images): Image.fromarray(x.permute(1, 2, 0).numpy()).save(f"export/images/p{i}.png")
    export_coco({f"p{i}": masks[i].numpy() for i in range(6)}, "export/instances.json", CLASSES, images="export/images")
    main(["import", "export", "mine", "--map", "kite=flag"])
    assert "10 images, 6 with a mask" in capsys.readouterr().out
    main(["check", "mine", "--sheet", "sheet.png"])
    assert "No problem found." in capsys.readouterr().out and Path("sheet.png").exists()
    main(["check", "mine", "--json"])
    assert json.loads(capsys.readouterr().out)["problems"] == []
    main(["train", "uda", "steps=3", "batch_size=2", "width=4", "--data", "mine", "--out", "runs", "--seeds", "0", "1", "--device", "cpu"])
    said = capsys.readouterr().out
    assert said.count("Supervised, averaged weights seed") == 2 and said.count("UDA") >= 2, "the baseline has the same budget"
    main(["verdict", "runs"])
    said = capsys.readouterr().out
    assert "UDA" in said and "points of mIoU" in said and "runs/best" in said
    main(["verdict", "runs", "--json"])
    assert json.loads(capsys.readouterr().out)
    main(["predict", "runs/best", "export/images/p0.png", "export/images/p9.png", "out", "--device", "cpu"])
    assert sorted(p.name for p in Path("out/masks").iterdir()) == ["p0.png", "p9.png"]
    main(["export", "runs/best", "model.onnx"])
    assert "agree with PyTorch" in capsys.readouterr().out and Path("model.onnx").stat().st_size > 1000


def test_a_check_that_finds_a_problem_is_exit_status_1(tmp_path, capsys):
    plain_folder(tmp_path / "mine")
    path = next((tmp_path / "mine/masks").rglob("*.png"))
    path.rename(path.with_name("another.png"))
    with pytest.raises(SystemExit) as end: main(["check", str(tmp_path / "mine")])
    assert end.value.code == 1 and "another.png' has no image" in capsys.readouterr().out


@pytest.mark.parametrize("words, said", [
    (["import", "nowhere", "target"], "'nowhere' does not exist"), (["import", ".", "target", "--map", "tree"], "'tree' is no NAME=VALUE"),
    (["verdict", "nowhere"], "There is no folder nowhere"), (["predict", "nowhere", "a.png", "out"], "nowhere"),
    (["predict", "runs/best", "out"], "Give pictures"), (["export", "nowhere", "a.onnx"], "nowhere")], ids=lambda v: "-".join(v) if isinstance(v, list) else "")
def test_a_mistake_with_ones_own_images_is_one_line(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said in fails(*words)
