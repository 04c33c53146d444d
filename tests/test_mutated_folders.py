"""Forty of the thousand folders of `mutated_folders.py` each time, and the record of the last whole run."""
import json
import random
import warnings
from pathlib import Path

import mutated_folders as M
import pytest

RECORD = Path(__file__).resolve().parents[1] / "results/benchmarks/mutated_folders.json"


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_each_folder_is_loaded_right_or_refused_in_a_sentence(first):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(first, first + 10):
            expected, outcome, chosen, said = M.trial(seed)
            assert M.good(expected, outcome), (seed, expected, outcome, [w for _, w in chosen], said)


def test_every_mutation_changes_a_healthy_folder(tmp_path):
    "Else it would prove nothing"
    def state(root): return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else p.is_symlink() for p in root.rglob("*")}
    still = []
    for name, change in (M.LOAD | M.REFUSE | M.EITHER).items():
        changed = False
        for layout in ("plain", "splits"):
            root = tmp_path / f"{name} {layout}"
            M.healthy(root, layout)
            before = state(root)
            change(root, random.Random(3))
            changed |= state(root) != before
        if not changed: still.append(name)
    assert not still


def test_the_whole_run_found_no_traceback():
    record = json.loads(RECORD.read_text())
    assert record["folders"] == 1000 and record["tracebacks"] == 0 and record["bad"] == [] and record["commit"]
    assert record["mutations"] == {"load": len(M.LOAD), "refuse": len(M.REFUSE), "either": len(M.EITHER)}
