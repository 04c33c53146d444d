"""The benchmarks run: one step of each kind. What they measure is in results/benchmarks."""
import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import augment
import gan
import predict
import step

from semiseg_nb.engine import make_accelerator


@pytest.fixture
def cheap(monkeypatch): monkeypatch.setattr(step, "ceiling", lambda device, rounds=1: 1e12)


def test_steps_of_two_methods(cheap, capsys):
    settings = dict(size=32, batch_size=2, steps=1, rounds=1, threads=1, models=[("unet", 4)], record=False)
    step.main(Namespace(**settings, methods=["supervised", "cct K=4"]))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "supervised" in lines[2] and "cct K=4" in lines[3]
    assert "uda" in step.METHODS and "phases" not in step.METHODS, "recipes take no steps"


def test_an_iteration_of_each_gan(cheap):
    accelerator = make_accelerator("cpu")
    for name, iteration in gan.iterations(32, 2, accelerator, 1):
        iteration()
        assert name.endswith("one iteration")


def test_a_view_of_each_kind():
    torch.set_num_threads(1)
    for cells in augment.columns(2, 16, "cpu").values():
        for column in cells.values():
            image, label = column()
            assert image.shape == (2, 3, 16, 16)


def test_a_few_pictures_and_a_large_one(tmp_path, monkeypatch, capsys):
    a = predict.words().parse_args(["--images", "3", "--size", "48", "--training", "32", "--width", "2", "--rounds", "1", "--side", "300", "--batch-size", "2", "--threads", "1"])
    rates = predict.speed(a, tmp_path)
    assert set(rates) == {"plain loop", "predict_files"} and all(row["images_per_second"] > 0 for row in rates.values())
    a.alone = tmp_path
    predict.alone(a)
    row = json.loads(capsys.readouterr().out)
    assert row["side"] == 300 and row["peak_mb"] >= row["before_mb"] > 0 and (tmp_path / "out/masks/large.png").is_file()
    with Image.open(tmp_path / "large.tif") as picture: assert picture.size == (300, 300) and picture.mode == "RGB" and np.array(picture).std() > 10
