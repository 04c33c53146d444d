"records: whole or absent, the same run replaces itself, strangers are refused with a reason"
import json
import os
import subprocess
import sys

import pytest

from semiseg_nb.catalogue import load_task
from semiseg_nb.core import UserError
from semiseg_nb.engine import Run
from semiseg_nb.records import commit, find, identity, lessons_home, make_record, matching, profile_of, read_records, table, thin, what_is_wrong, write_record

RESULT = {"miou": 0.61, "iou_per_class": [0.9, 0.5, float("nan"), 0.4, 0.6], "pixel_accuracy": 0.8, "ece": 0.05}


@pytest.fixture(scope="module")
def task(): return load_task("scenes", n_labelled=6, size=32)


def record(task, seed=0, method="uda", steps=900, **params):
    run = Run(steps, seed, 8, history=[{"step": 10, "supervised": 1.0}, {"step": steps, "supervised": 0.5, "miou": 0.61}], seconds=12.3, images=900)
    return make_record(method, run, task, RESULT, params)


def test_a_record_has_every_field_of_the_design(task):
    r = record(task)
    assert what_is_wrong(r) is None
    assert {"schema", "method", "title", "profile", "seed", "model", "encoder", "pretrained", "dataset", "params", "result", "curve", "seconds",
            "images_per_second", "device", "peak_memory_mb", "versions", "commit", "created"} == r.keys()
    assert r["dataset"].keys() >= {"name", "n_classes", "split_id", "n_labelled", "n_unlabelled", "n_val", "size"}


def test_round_trip_with_nan_as_null(task, tmp_path):
    path = write_record(record(task), tmp_path)
    assert path.parent.name == "scenes-6" and path.name.startswith("uda-")
    assert json.loads(path.read_text(), parse_constant=lambda c: pytest.fail(c))["result"]["iou_per_class"][2] is None
    (read,), refused = read_records(tmp_path)
    assert read["result"]["miou"] == 0.61 and not refused


def test_the_same_run_replaces_itself_and_another_does_not(task, tmp_path):
    one, again = write_record(record(task), tmp_path), write_record(record(task) | {"seconds": 99.0}, tmp_path)
    assert one == again and len(list(tmp_path.rglob("*.json"))) == 1
    for other in (record(task, seed=1), record(task, threshold=0.9), record(task, method="supervised"), record(task, steps=901)):
        assert write_record(other, tmp_path) != one
    assert identity(record(task)) == identity(record(task))


@pytest.mark.parametrize("dataset, steps, profile", [("scenes", 6, "smoke"), ("camvid", 6, "smoke"), ("scenes", 900, "lesson"), ("camvid", 900, "real")])
def test_profile_is_derived(dataset, steps, profile): assert profile_of(dataset, steps) == profile


@pytest.mark.parametrize("change, reason", [
    ({"schema": 2}, "schema 2"), ({"method": "ma gic"}, "method 'ma gic' is not a name"), ({"profile": "great"}, "profile 'great'"), ({"seed": "0"}, "field 'seed'"),
    ({"result": {"miou": 61.0}}, "miou 61.0 is not a fraction"), ({"result": {}}, "miou None"), ({"dataset": {}}, "dataset lacks 'name'"), ({"encoder": 3}, "field 'encoder'"), ({"seconds": float("inf")}, "field 'seconds'"), ({"curve": [3]}, "row without a step"),
    ({"title": []}, "field 'title'"), ({"params": {}}, "params lack the steps"),
])
def test_strangers_are_refused_with_a_reason(task, tmp_path, change, reason):
    bad = record(task) | change
    assert reason in what_is_wrong(bad)
    (tmp_path / "scenes-6").mkdir()
    (tmp_path / "scenes-6" / "bad.json").write_text(json.dumps(bad))
    (tmp_path / "scenes-6" / "torn.json").write_text('{"schema": 1')
    (tmp_path / "scenes-6" / "deep.json").write_text("[" * 50_000)
    (tmp_path / "scenes-6" / "huge.json").write_text('{"seed": 1' + "0" * 400 + "}")
    records, refused = read_records(tmp_path)
    assert not records and refused.keys() == {f"scenes-6/{name}.json" for name in ("bad", "deep", "huge", "torn")} and "readable JSON" in refused["scenes-6/torn.json"]
    with pytest.raises(UserError, match="cannot be written"): write_record(bad, tmp_path)


def test_ablations_and_benchmarks_are_not_rows_of_the_leaderboard(task, tmp_path):
    write_record(record(task), tmp_path / "ablations" / "uda")
    assert read_records(tmp_path) == ([], {})


def test_a_full_disk_while_writing_a_record(task, tmp_path):
    "The file size limit of the process stands for the full disk: the write itself fails"
    path = write_record(record(task), tmp_path)
    before = path.read_bytes()
    code = f"""
import resource, signal, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_records import record, write_record
from semiseg_nb.catalogue import load_task
r = record(load_task("scenes", n_labelled=6, size=32))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))
try: write_record(r, {str(tmp_path)!r})
except ValueError as e: print(type(e).__name__, e)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert "UserError Could not write" in done.stdout and "the older file is untouched" in done.stdout, done.stderr
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_thin_keeps_scores_and_at_most_200_rows():
    rows = [{"step": i} | ({"miou": 0.5} if i % 50 == 0 else {}) for i in range(1, 1001)]
    kept = thin(rows)
    assert len(kept) <= 200 and [r["step"] for r in kept if "miou" in r] == list(range(50, 1001, 50))
    assert [r["step"] for r in kept] == sorted(r["step"] for r in kept)
    assert len(thin([{"step": i, "miou": 0.1} for i in range(500)])) == 200


def test_commit_names_the_checkout():
    name = commit()
    assert name is None or len(name.rstrip("+")) == 10


def test_a_table_of_records(task):
    lines = table([record(task)]).splitlines()
    assert len(lines) == 3 and lines[0].startswith("method") and "0.610" in lines[2]


def test_a_folder_without_records(tmp_path):
    with pytest.raises(UserError, match="There is no folder"): read_records(tmp_path / "none")


def test_a_record_that_was_changed_or_renamed_is_refused_and_the_others_stay(task, tmp_path):
    good, bad = (write_record(record(task, seed=seed), tmp_path) for seed in (0, 1))
    bad.write_text(bad.read_text().replace('"miou": 0.61,\n  "iou', '"miou": 0.91,\n  "iou'))
    good.rename(good.with_name("uda-00000000.json"))
    third = write_record(record(task, seed=2), tmp_path)
    records, refused = read_records(tmp_path)
    assert [r["path"] for r in records] == [str(third)]
    assert "was changed since it was written" in refused[f"scenes-6/{bad.name}"] and "of another record" in refused["scenes-6/uda-00000000.json"]


def test_corrected_masks_are_another_record(task):
    other = load_task("scenes", n_labelled=6, size=32)
    masks = other.labelled.masks.clone()
    masks[0, 0, 0] = (masks[0, 0, 0] + 1) % 5
    other.labelled = type(other.labelled)(other.labelled.ids, other.labelled.images, masks, other.n_classes)
    cropped = load_task("scenes", n_labelled=6, size=32, crop=16)
    assert len({identity(record(t)) for t in (task, other, cropped)}) == 3


def test_only_records_of_one_task_and_of_the_same_values_are_compared(task):
    mine, other = record(task, views="weak"), record(load_task("scenes", n_labelled=5, size=32), views="weak")
    records = [mine, other, record(task, seed=1, views="weak"), record(task, views="strong"), record(task, method="cyclegan")]
    assert matching(records, task, seed=0, views="weak") == [mine], "a record without this setting is passed over"
    assert matching(records, task, steps=900) == [r for r in records if r is not other]
    old = mine | {"dataset": {k: v for k, v in mine["dataset"].items() if k != "fingerprint"}}
    assert not matching([old], task), "what was scored on unknown files is not compared"


def test_files_of_the_lessons_are_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find("results") == lessons_home() / "results", "a folder results/ of somebody's own project is not ours"
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs/00_core.ipynb").write_text("a copy, by `semiseg lessons`")
    assert find("results").resolve() == tmp_path / "results"
    monkeypatch.chdir(tmp_path / "nbs")
    assert find("results").resolve() == tmp_path / "results"
    with pytest.raises(UserError, match="There is no nbs/weights in .*: get it with `semiseg lessons FOLDER`"): find("nbs/weights")
