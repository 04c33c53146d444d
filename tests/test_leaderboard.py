"leaderboard: what may be compared, the baseline, paired differences, intervals, published numbers apart"
import csv
from pathlib import Path

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from semiseg_nb.core import UserError
from semiseg_nb.leaderboard import REFERENCE, chart, compare, gain_text, interval, markdown_table, read_reference, reference_tables, title_of

ROOT = Path(__file__).resolve().parents[1]


def record(method, seed, miou, split="s", profile="lesson", model="unet", **params):
    data = {"name": "scenes", "split_id": split, "n_labelled": 12, "size": [64, 64]}
    title = {"uda": "UDA"}.get(method, method)
    return {"method": method, "title": title, "profile": profile, "model": model, "encoder": None, "pretrained": False, "seed": seed, "seconds": 10.0,
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
    assert [t.get_text() for t in ax.get_yticklabels()] == ["UDA"]
    plt.close(fig)


def test_published_numbers_have_a_source_and_the_uda_text_is_quoted_as_published():
    rows = read_reference(ROOT / "nbs/reference.csv")
    assert all(row["source"] and row["protocol"] and row["labels"] for row in rows)
    assert all(0.3 < float(row["miou"]) < 0.95 for row in rows), "a share, not per cent"
    assert [(r["method"], r["model"], float(r["miou"])) for r in rows if "Lant" in r["source"]] == [
        ("supervised", "DeepLab v3", .600), ("UDA", "DeepLab v3", .662), ("supervised", "U-Net", .676), ("UDA", "U-Net", .678)]
    with (ROOT / "nbs/reference.csv").open(newline="") as f: assert {len(line) for line in csv.reader(f)} == {len(REFERENCE)}
    assert len({tuple(r.values()) for r in rows}) == len(rows), "no number twice"


def test_the_table_of_the_poster_is_quoted_as_published():
    poster = [r for r in read_reference(ROOT / "nbs/reference.csv") if "poster" in r["source"]]
    def table(n): return [(r["method"], r["labels"], r["tags"], float(r["miou"])) for r in poster if r["source"].endswith(f"table {n}")]
    assert table(1) == [("WSSL", "1.5k", "9k", .646), ("MDC", "1.5k", "9k", .657), ("FickleNet", "1.5k", "9k", .658), ("Hung et al.", "1.5k", "", .681),
                        ("CCT", "1k", "", .640), ("CCT", "1.5k", "", .694), ("CCT", "1.5k", "9k", .732)]
    assert [(r["backbone"], float(r["miou"])) for r in poster if r["source"].endswith("table 2")] == [("PoolFormer-M36", .708), ("ConvNeXt-Base (ImageNet-22k)", .725)]
    assert [t[-1] for t in table(3)] == [.733, .7346, .735, .681]


def test_protocols_never_share_a_table():
    tables = reference_tables(read_reference(ROOT / "nbs/reference.csv"))
    fine, coarse = tables["VOC 2012: original masks"], tables["VOC 2012: augmented masks (SBD)"]
    assert "| 92 labels | 183 labels | 366 labels | 732 labels | 1464 labels |" in fine and "662 labels" not in fine and "92 labels" not in coarse
    poster = next(table for title, table in tables.items() if "CCT (1.5k" in title)
    assert "| CCT | PSPNet ResNet-50 | 64.0 | 69.4, 73.2 (9k tags) | as quoted | [1] |" in poster and "[1] KAIST" in poster
    assert all(len({line.count("|") for line in table.split("\n\n")[0].splitlines()}) == 1 for table in tables.values())


def test_a_reference_file_that_is_absent_or_old_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="There is no file"): read_reference(tmp_path / "none.csv")
    (tmp_path / "old.csv").write_text("method,data,labels,model,miou,protocol,source\nA,B,1,C,0.5,D,E\n")
    with pytest.raises(UserError, match=r"old.csv' has no column tags, backbone: the first line must read method,data"): read_reference(tmp_path / "old.csv")
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(UserError, match="has no column method"): read_reference(tmp_path / "empty.csv")
