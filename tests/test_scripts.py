"scripts and benchmarks: they run, write what they promise, and answer a mistake with one line"
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(*args):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True, env=env, timeout=300)


def test_train_writes_two_rows_for_a_supervised_run_and_the_weights(tmp_path):
    done = run("scripts/train.py", "supervised", "--size", 32, "--n-labelled", 6, "--width", 4, "--steps", 3, "--set", "views=strong",
               "--out", tmp_path, "--save", tmp_path / "net")
    assert done.returncode == 0, done.stderr
    records = {p.name.split("-")[0]: json.loads(p.read_text()) for p in tmp_path.glob("scenes-6/*.json")}
    assert records.keys() == {"supervised_strong", "supervised_ema"}
    assert all(r["profile"] == "smoke" and r["params"]["views"] == "strong" and r["params"]["strength"] == 0.5 for r in records.values())
    assert (tmp_path / "net.safetensors").exists() and json.loads((tmp_path / "net.json").read_text())["model"] == "unet"


@pytest.mark.parametrize("args, text", [
    (("uda", "--set", "treshold=0.9"), "setting of UDA 'treshold' is not known (did you mean 'threshold'?)"),
    (("uda", "--model", "unett"), "'unett'"), (("uda", "--dataset", "folder", "--data-root", "no/such/folder"), "no/such/folder"),
    (("uda", "--n-labelled", "700"), "700"), (("uda", "--set", "temperature=0"), "temperature is 0"),
])
def test_a_mistake_is_one_line(args, text, tmp_path):
    done = run("scripts/train.py", *args, "--size", 32, "--out", tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ") and text in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_step_benchmark_prints_its_table():
    done = run("benchmarks/step.py", "--size", 32, "--batch-size", 2, "--steps", 1, "--rounds", 1, "--models", "unet:4", "--threads", 1,
               "--methods", "supervised;temporal;cct K=4;cct K=4, one by one")
    assert done.returncode == 0, done.stderr
    about, head, *rows = done.stdout.strip().splitlines()
    assert head.split()[:3] == ["model", "method", "data"] and "beyond" in head
    for name in ("supervised", "temporal", "cct K=4", "cct K=4, one by one"): assert any(f" {name} " in row for row in rows), name
