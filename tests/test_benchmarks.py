"""The benchmarks run: one step of each kind. What they measure is in results/benchmarks."""
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import augment
import gan
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
