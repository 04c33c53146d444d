"""The clock: every random number of a step is a function of seed, stream and step, cut to the rows of a process."""
import pytest
import torch

from semiseg_nb.clock import Clock
from semiseg_nb.policies import flip_crop


def halves(draw):
    "The same draw made by one process with 4 images, and by two with 2 each"
    one = draw(Clock(5, 10, 3), 4)
    two = [draw(Clock(5, 10, 3, rank, 2), 2) for rank in range(2)]
    return one, two


def test_draws_are_functions_of_seed_stream_and_step():
    def draw(*a, stream="labelled"): return torch.rand(3, generator=Clock(*a).rng(stream))
    assert torch.equal(draw(5, 10, 0), draw(5, 99, 0)), "the length of the run does not matter"
    others = draw(6, 10, 0), draw(5, 10, 1), draw(5, 10, 0, stream="weak")
    assert not any(torch.equal(draw(5, 10, 0), other) for other in others)


@pytest.mark.parametrize("name", ["rand", "randn"])
def test_numbers_of_two_processes_are_those_of_one(name):
    one, two = halves(lambda clock, n: getattr(clock, name)("noise", n, 3, 2))
    assert one.shape == (4, 3, 2) and torch.equal(one, torch.cat(two))
    assert torch.equal(one, getattr(torch, name)(4, 3, 2, generator=Clock(5, 10, 3).rng("noise")))


def test_boxes_and_views_of_two_processes_are_those_of_one():
    one, two = halves(lambda clock, n: clock.boxes(torch.zeros(n, 3, 8, 8), 0.5))
    assert one.dtype == torch.bool and torch.equal(one, torch.cat(two))
    image = torch.rand(4, 3, 8, 8)
    def view(clock, n): return flip_crop().apply_image(image[clock.rows(n)], clock.draw(flip_crop(), "weak", image[clock.rows(n)]))
    one, two = halves(view)
    assert torch.equal(one, torch.cat(two))


def test_only_a_part_of_the_images_gets_a_box():
    clock, images = Clock(0, 1), torch.zeros(400, 3, 8, 8)
    assert not clock.boxes(images, 0.0).any() and clock.boxes(images, 1.0).flatten(1).any(1).float().mean() > 0.9
    assert 0.15 < clock.boxes(images, 0.3).flatten(1).any(1).float().mean() < 0.4


def test_fraction_rows_and_ramp():
    clock = Clock(25, 100, rank=1, world=3)
    assert clock.fraction == 0.25 and clock.rows(4) == slice(4, 8)
    assert clock.ramp(0.5) == 0.5 and clock.ramp(0.1) == 1 and clock.ramp(0) == 1 and Clock(0, 100).ramp(0.5) == 0
