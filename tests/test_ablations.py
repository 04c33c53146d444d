"""Variants beside their reference: pairing, the noise, verdicts that hold what they promise, and words that follow from records."""
import csv
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest

from semiseg_nb.ablations import Variant, changes, draw_variants, families, lent_spread, reference_of, seed_scores, sentence, spread, variants
from semiseg_nb.core import UserError
from semiseg_nb.leaderboard import read_reference
from semiseg_nb.records import read_records

ROOT = Path(__file__).resolve().parents[1]


def record(variant, seed=0, miou=.5, method="uda", n_labelled=12, split="a", **params):
    return {"method": method, "title": method.upper(), "profile": "lesson", "model": "unet", "encoder": None, "pretrained": False, "seed": seed,
            "dataset": {"name": "scenes", "n_labelled": n_labelled, "size": [64, 64], "split_id": split}, "seconds": 1.0,
            "params": {"steps": 900, **params} | ({"variant": variant} if variant else {}), "result": {"miou": miou}}


# ---------------------------------------------------------------- the noise

def random_rows(rng, most): return [list(rng.uniform(-50, 50, rng.integers(1, 6))) for _ in range(rng.integers(0, most + 1))]


@pytest.mark.parametrize("seed", range(40))
def test_spread_is_that_of_the_rows_about_their_own_means(seed):
    rng = np.random.default_rng(seed)
    rows, shift = random_rows(rng, 5), rng.uniform(-20, 20)
    sd, freedom = spread(rows)
    assert freedom == sum(len(r) - 1 for r in rows)
    if not freedom: assert np.isnan(sd)
    moved, _ = spread([[v + shift for v in row] for row in rows])
    np.testing.assert_allclose(moved, sd, atol=1e-6)
    if len(rows) == 1 and freedom: np.testing.assert_allclose(sd, np.std(rows[0], ddof=1), atol=1e-9)


def test_luck_that_a_seed_gives_to_all_variants_changes_nothing():
    rng = np.random.default_rng(0)
    scores = {name: dict(enumerate(rng.uniform(.4, .8, 4))) for name in "abcd"}
    luck = rng.normal(0, .1, 4)
    lucky = {name: {s: v + luck[s] for s, v in runs.items()} for name, runs in scores.items()}
    for before, after in zip(variants(scores, "a"), variants(lucky, "a"), strict=True):
        assert before.name == after.name and before.verdict == after.verdict
        np.testing.assert_allclose(before.gain, after.gain, atol=1e-9)


def test_exchanging_reference_and_variant_turns_the_sign():
    scores = {"a": {0: .5, 1: .6, 2: .58}, "b": {0: .55, 1: .61, 2: .7}}
    (there,), (back,) = variants(scores, "a", least=1), variants(scores, "b", least=1)
    np.testing.assert_allclose(there.mean, -back.mean)
    np.testing.assert_allclose(there.half, back.half)


def test_one_row_in_twenty_is_told_from_its_twin_and_a_real_difference_always():
    rng = np.random.default_rng(1)
    told, rows = 0, 0
    for _ in range(150):
        scores = {f"v{k}": dict(enumerate(rng.normal(.7, .02, 3))) for k in range(6)}
        found = variants(scores | {"worse": dict(enumerate(rng.normal(.4, .02, 3)))}, "v0")
        assert found[0].name == "worse" and found[0].verdict == "below"
        told += sum(v.verdict != "noise" for v in found[1:])
        rows += len(found) - 1
    assert .02 < told / rows < .09


def test_a_family_with_few_seeds_borrows_and_one_without_anything_has_no_verdict():
    scores = {"a": {0: .80}, "b": {0: .75}, "c": {0: .90}}
    assert [v.verdict for v in variants(scores, "a")] == ["unknown"] * 2
    assert [v.verdict for v in variants(scores, "a", lent=(3., 50))] == ["noise", "above"]
    with pytest.raises(UserError, match="There is no variant 'x': one of a, b, c"): variants(scores, "x")


def test_the_leaderboard_lends_from_the_method_itself_before_all_others():
    base = [record(None, s, .5 + .01 * s, "supervised") for s in range(6)]
    still = [record(None, s, .6 + .01 * s, "cps") for s in range(6)]
    wild = [record(None, s, .6 + .05 * (-1) ** s, "uda") for s in range(6)]
    twin = [record(None, s, .6 + .05 * (-1) ** s + .001 * s, "uda", weight=3) for s in range(6)]
    elsewhere = [record(None, s, .1 * s, "uda", n_labelled=24, weight=w) for s in range(6) for w in (1, 2)]
    everyone, n = lent_spread(base + still + wild + elsewhere, record("x"))
    own, m = lent_spread(base + still + wild + twin + elsewhere, record("x"))
    assert (n, m) == (10, 5) and own < .5 < everyone
    assert lent_spread(base, record("x"))[1] == 0, "supervised rows lend nothing"


# ---------------------------------------------------------------- records and words

def test_a_folder_of_two_methods_is_two_families_and_a_stranger_joins_the_one_with_a_reference():
    found = families([record("A as above"), record("no box"), record("B as above", method="mt"), record("kl", method="mt"), record("neither", method="fixmatch")])
    assert {key: sorted(names) for key, names in found.items()} == {
        ("uda", "scenes", 12): ["A as above", "no box"], ("mt", "scenes", 12): ["B as above", "kl", "neither"]}
    assert reference_of(["no box"]) is None and reference_of(["phase 1", "full"]) == "full"
    assert seed_scores({"x": [record("x", 3, .25)]}) == {"x": {("a", 3): .25}}


def test_changes_names_what_differs_and_nothing_else():
    assert changes(record("b", mix=0.0, lr=.002), record("a", mix=1.0, lr=.002)) == "mix 0 (was 1)"
    assert changes(record("b", mix=1), record("a", mix=1.0)) == "", "1 and 1.0 are the same number"
    assert changes(record("b", tsa="log"), record("a")) == "tsa log (was -)"


@pytest.mark.parametrize("seed", range(40))
def test_a_sentence_counts_every_row_once(seed):
    rng = np.random.default_rng(seed)
    halves = [np.nan] * 8 if seed < 4 else rng.choice([np.nan, 5., 20., 60.], 8)
    found = [Variant(f"v{i}", gain, half) for i, (gain, half) in enumerate(zip([*random_rows(rng, 7), [1.]], halves))]
    text, verdicts = sentence(found, "ref"), [v.verdict for v in found]
    named = set(re.findall(r"\*(v\d)\*", text))
    assert named == {v.name for v in found if v.verdict in ("above", "below")}
    if set(verdicts) == {"unknown"}: assert text.startswith("Nothing here was repeated")
    if named: assert f"other {verdicts.count('noise')} of {len(found)} rows" in text


def test_a_chart_has_a_row_for_each_variant_and_greys_what_says_nothing():
    found = variants({"a": {0: .5, 1: .5, 2: .5}, "low": {0: .1, 1: .1, 2: .1}, "twin": {0: .48, 1: .52, 2: .5}, "too": {0: .5, 1: .51, 2: .49}}, "a")
    fig, ax = plt.subplots()
    draw_variants(found, ax, "title")
    assert [t.get_text() for t in ax.get_yticklabels()] == [v.name for v in found] and found[0].name == "low"
    dots = {line.get_ydata()[0]: line.get_color() for line in ax.lines if line.get_marker() == "o"}
    assert dots[0] != "0.6" and dots[1] == dots[2] == "0.6"
    plt.close(fig)


def test_a_row_far_away_is_a_number_and_squeezes_no_other():
    scores = {"a": {0: .5, 1: .5}, "far": {0: .1, 1: .11}} | {f"v{k}": {0: .5 + k / 100, 1: .49} for k in range(4)}
    found = variants(scores, "a", least=1)
    fig, ax = plt.subplots()
    draw_variants(found, ax, "title")
    assert any("-39.5" in text.get_text() for text in ax.texts) and ax.get_xlim()[0] > found[0].mean
    assert all(ax.get_xlim()[0] <= v.mean <= ax.get_xlim()[1] for v in found[1:])
    plt.close(fig)


def test_every_committed_family_has_a_reference_or_nothing_to_compare():
    for folder in (p for p in (ROOT / "results/ablations").glob("*") if p.is_dir() and p.name not in ("tuning", "out_of_domain")):
        for key, names in families(read_records(folder)[0]).items():
            assert reference_of(names) or len(names) == 1, f"{folder.name}: no variant of {key} ends in 'as above'"


# ---------------------------------------------------------------- published numbers

def cells(stem): return json.loads((ROOT / f"nbs/{stem}.ipynb").read_text(encoding="utf-8"))["cells"]


def test_no_published_score_is_typed_into_the_notebook():
    for cell in cells("94_published"):
        if cell["cell_type"] != "markdown" or cell["id"].startswith("differs-"): continue
        assert not re.search(r"(?<![\w.])\d\d\.\d{1,2}(?![\d.])", "".join(cell["source"])), cell["id"]


def test_scores_on_the_page_are_those_of_the_file_and_gains_are_their_differences():
    scores = {}
    for r in read_reference(ROOT / "nbs/reference.csv"): scores.setdefault(r["method"], set()).add(round(100 * float(r["miou"]), 2))
    seen = 0
    for cell in (c for c in cells("94_published") if c["id"] in ("fine", "coarse", "cct", "city")):
        for text in ("".join(o["data"]["text/markdown"]) for o in cell["outputs"] if "text/markdown" in o.get("data", {})):
            for line in (line for line in text.splitlines() if line.startswith("| ") and " | [" in line):
                method, _, *columns = [c.strip() for c in line.strip("|").split(" | ")]
                for score, gain in re.findall(r"(?<![\w.(+-])(\d\d\.\d{1,2})(?: \(([+-]\d+\.\d)\))?", " ; ".join(columns[:-2])):
                    seen += 1
                    assert float(score) in scores[method], (method, score)
                    if gain: assert any(abs(float(score) - float(gain) - s) < .06 for m in scores if m.startswith("supervised") for s in scores[m])
    assert seen > 200


def test_what_logs_show_has_numbers_and_a_source():
    with (ROOT / "nbs/reference_logs.csv").open(newline="") as f: rows = list(csv.DictReader(f))
    assert list(rows[0]) == "kind method data labels backbone first second source".split()
    for r in rows: assert float(r["first"]) >= 0 and float(r["second"]) >= 0 and r["source"] and r["kind"], r
