"leaderboard: what may be compared, the baseline, paired differences, intervals, published numbers apart"
import csv
from pathlib import Path

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from semiseg_nb.core import UserError
from semiseg_nb.leaderboard import chart, compare, gain_text, interval, markdown_table, read_reference, title_of

ROOT = Path(__file__).resolve().parents[1]


def record(method, seed, miou, split="s", profile="lesson", model="unet", **params):
    data = {"name": "scenes", "split_id": split, "n_labelled": 12, "size": [64, 64]}
    return {"method": method, "profile": profile, "model": model, "encoder": None, "pretrained": False, "seed": seed, "seconds": 10.0,
            "dataset": data, "params": {"steps": 900, "batch_size": 8, "width": 8, "scored_on": "val", **params}, "result": {"miou": miou}}


def test_the_best_supervised_row_is_the_baseline_and_differences_are_paired_by_seed():
    rows, = compare([record("supervised", 0, .5), record("supervised", 1, .7), record("supervised_ema", 0, .6), record("supervised_ema", 1, .7),
                     record("uda", 1, .80), record("uda", 0, .65), record("uda", 2, .99)]).values()
    uda, base, plain = rows
    assert base.method == "supervised_ema" and base.is_baseline and gain_text(base) == "baseline"
    assert uda.gain == pytest.approx([.05, .10]) and plain.gain == pytest.approx([-.1, 0])
    assert [seed for _, seed in uda.repetitions] == [0, 1, 2] and uda.mean == pytest.approx((.65 + .80 + .99) / 3)


@pytest.mark.parametrize("change", [{"model": "deeplabv3"}, {"steps": 1800}, {"width": 16}, {"scored_on": "tune"}, {"batch_size": 4}])
def test_another_budget_or_network_is_another_group(change):
    groups = compare([record("supervised", 0, .5), record("uda", 0, .9, **change)])
    assert len(groups) == 2 and all(not r.gain for rows in groups.values() for r in rows)


def test_other_labelled_images_are_not_paired():
    rows, = compare([record("supervised", 0, .5), record("uda", 0, .9, split="other")]).values()
    assert rows[0].gain == []


def test_variants_of_a_method_are_rows_of_their_own():
    rows, = compare([record("supervised", 0, .5), record("uda", 0, .6, threshold=.8), record("uda", 0, .7, threshold=.9)]).values()
    assert [r.method for r in rows] == ["uda", "uda", "supervised"]
    assert "threshold 0.9" in markdown_table(rows).splitlines()[2]


def test_smoke_never_stands_beside_the_rest():
    assert compare([record("uda", 0, .5, profile="smoke")]) == {}


def test_interval_covers_the_mean_and_needs_two_values():
    values = np.random.default_rng(0).normal(5, 1, 40)
    low, high = interval(values)
    assert low < values.mean() < high and high - low == pytest.approx(2 * 1.96 * values.std() / 40**.5, rel=.25)
    assert all(np.isnan(interval([1.0])))
    assert interval([.2, .2]) == (.2, .2)


def test_a_group_without_baseline_has_no_differences():
    rows, = compare([record("uda", 0, .9)]).values()
    assert rows[0].gain == [] and gain_text(rows[0]) == ""


def test_table_and_chart_are_drawn():
    groups = compare([record(m, s, v + .01 * s) for m, v in (("supervised", .5), ("uda", .6)) for s in range(3)])
    (group, rows), = groups.items()
    assert "12 labelled" in title_of(group) and "+10.0 [+10.0, +10.0]" in markdown_table(rows)
    fig, ax = plt.subplots()
    chart(rows, ax, "title")
    assert [t.get_text() for t in ax.get_yticklabels()] == ["uda"]
    plt.close(fig)


def test_published_numbers_have_a_source_and_the_uda_text_is_quoted_as_published():
    rows = read_reference(ROOT / "nbs/reference.csv")
    assert all(row["source"] for row in rows)
    assert [(r["method"], r["model"], float(r["miou"])) for r in rows if "Lant" in r["source"]] == [
        ("supervised", "DeepLab v3", .600), ("UDA", "DeepLab v3", .662), ("supervised", "U-Net", .676), ("UDA", "U-Net", .678)]
    with (ROOT / "nbs/reference.csv").open() as f: assert len({len(line) for line in csv.reader(f)}) == 1
    with pytest.raises(UserError, match="There is no file"): read_reference(ROOT / "nbs/none.csv")
