"Scenes: a pure function of the index, masks that no style changes, errors that a person can read"
import time

import numpy as np
import pytest
import torch
from matplotlib.colors import rgb_to_hsv

from semiseg_nb.core import UserError
from semiseg_nb.scenes import CLASSES, HUE, PALETTE, STYLES, box_sums, cumulative, make_scenes, one_object

SHIFTS = STYLES[1:]
SHARE, MEAN = [0.60544, 0.10107, 0.11212, 0.07539, 0.10598], [95.13, 93.77, 91.36]  # of scenes 0..63: classes, and red, green, blue


def test_shapes_and_types():
    images, masks = make_scenes(range(5), size=48)
    assert images.shape == (5, 3, 48, 48) and masks.shape == (5, 48, 48)
    assert images.dtype == masks.dtype == torch.uint8
    assert images.is_contiguous() and int(masks.max()) < len(CLASSES) == len(PALETTE)


def test_same_scene_twice():
    for a, b in zip(make_scenes(range(40)), make_scenes(range(40))): assert torch.equal(a, b)


@pytest.mark.parametrize("size", [33, 50, 64])
def test_scene_does_not_depend_on_its_batch(size):
    "Alone, in another order, repeated, or in another chunk: scene i is scene i"
    images, masks = make_scenes(range(100), size=size)
    for i in (0, 31, 32, 99):
        image, mask = make_scenes(i, size=size)
        assert torch.equal(image[0], images[i]) and torch.equal(mask[0], masks[i])
    some = [77, 3, 3, 50]
    for one, all_ in zip(make_scenes(some, size=size, style="inverted"), make_scenes(range(100), size=size, style="inverted")):
        assert torch.equal(one, all_[some])


def test_kinds_of_indices_agree():
    expected = make_scenes([4, 9])[0]
    for indices in ((4, 9), np.array([4, 9], np.int32), torch.tensor([4, 9])): assert torch.equal(make_scenes(indices)[0], expected)
    assert make_scenes([])[0].shape == (0, 3, 64, 64)
    assert make_scenes([2**40])[0].shape == (1, 3, 64, 64)


@pytest.mark.parametrize("style", SHIFTS)
def test_no_style_changes_the_mask(style):
    photo, masks = make_scenes(range(30))
    for strength in (0.1, 0.5, 1.0):
        images, same = make_scenes(range(30), style=style, strength=strength)
        assert torch.equal(same, masks) and not torch.equal(images, photo)


@pytest.mark.parametrize("style", STYLES)
def test_strength_zero_is_photo_bit_for_bit(style):
    assert torch.equal(make_scenes(range(30), style=style, strength=0)[0], make_scenes(range(30))[0])


def test_plain_scenes_wear_the_colours_of_their_classes():
    (photo, masks), (plain, same) = make_scenes(range(60)), make_scenes(range(60), plain=1.0)
    assert torch.equal(masks, same), "the layout stays"
    def typical(images, c):
        "Part of a class's pixels whose hue is at most a tenth of the circle from the class's own"
        hue = torch.from_numpy(rgb_to_hsv(images.movedim(1, 3)[masks == c].numpy() / 255)[:, 0])
        away = (hue - float(HUE[c])).abs()
        return (torch.minimum(away, 1 - away) < 0.1).float().mean()
    assert all(typical(plain, c) > 0.9 and typical(photo, c) < 0.7 for c in range(1, 5)), [(typical(plain, c), typical(photo, c)) for c in range(1, 5)]
    assert not torch.equal(make_scenes(range(4), plain=0.5)[0], make_scenes(range(4), plain=1.0)[0])


def test_photo_has_no_strength():
    assert torch.equal(make_scenes(range(4), strength=0.3)[0], make_scenes(range(4))[0])


@pytest.mark.parametrize("style", SHIFTS)
def test_more_strength_is_further_from_photo(style):
    photo = make_scenes(range(40))[0].float()
    away = [(make_scenes(range(40), style=style, strength=s)[0].float() - photo).abs().mean().item() for s in (0, 0.25, 0.5, 0.75, 1)]
    assert all(a < b for a, b in zip(away, away[1:])), away
    assert away[-1] > 4


def test_every_class_has_a_fair_share():
    masks = make_scenes(range(600))[1]
    share = torch.bincount(masks.flatten().long(), minlength=5) / masks.numel()
    assert 0.5 < share[0] < 0.7 and (share[1:] > 0.06).all(), share
    seen = torch.stack([(masks == c).flatten(1).any(1).float().mean() for c in range(5)])
    assert (seen[1:] > 0.4).all(), seen  # a few labelled images can show every class


def test_scenes_differ():
    images, masks = make_scenes(range(200), size=32)
    assert len({m.numpy().tobytes() for m in masks}) == 200
    assert images.float().flatten(1).mean(1).std() > 15  # of 255: brightness varies from scene to scene


def test_one_scene_at_two_resolutions():
    "Coordinates do not depend on the size: every second pixel of the large mask is nearly the small mask"
    small, large = make_scenes(range(50), size=64)[1], make_scenes(range(50), size=192)[1]
    assert (large[:, 1::3, 1::3] == small).float().mean() > 0.999  # the centre of each 3x3 block is the small pixel's centre


def test_colour_is_a_weak_hint():
    "The nearest mean colour tells an object's class only a little better than guessing"
    images, masks = make_scenes(range(400))
    x, y = images.permute(0, 2, 3, 1)[masks > 0].float(), masks[masks > 0].long()
    half = len(x) // 2
    means = torch.stack([x[:half][y[:half] == c].mean(0) for c in range(1, 5)])
    accuracy = (torch.cdist(x[half:], means).argmin(1) + 1 == y[half:]).float().mean().item()
    assert 0.25 < accuracy < 0.45, accuracy


def test_pixels_are_those_of_the_records():
    "Committed results belong to these pixels; a change of the generator must be seen (tolerance: another processor's last bit)"
    images, masks = make_scenes(range(64))
    share = torch.bincount(masks.flatten().long(), minlength=5) / masks.numel()
    torch.testing.assert_close(share, torch.tensor(SHARE), atol=2e-4, rtol=0)
    torch.testing.assert_close(images.float().mean((0, 2, 3)), torch.tensor(MEAN), atol=0.05, rtol=0)


@pytest.mark.parametrize("arguments, word", [
    (dict(indices=[0], style="foto"), "photo"), (dict(indices=[0], style="paper"), "inverted"),
    (dict(indices=[0], strength=1.5), "1.5"), (dict(indices=[0], strength=-0.1), "-0.1"), (dict(indices=[0], strength=float("nan")), "nan"),
    (dict(indices=[0], strength="high"), "high"), (dict(indices=[0], plain=2), "plain is 2"), (dict(indices=[0], size=16), "16"), (dict(indices=[0], size=0), "32"),
    (dict(indices=[0], size=(64, 96)), "square"), (dict(indices=[0], size=64.0), "64.0"), (dict(indices=[-1]), "-1"),
    (dict(indices=[0.5]), "0.5"), (dict(indices=[True]), "integers"),
])
def test_wrong_arguments_are_one_sentence(arguments, word):
    with pytest.raises(UserError, match=word.replace("(", r"\(")) as error: make_scenes(**arguments)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_throughput_is_printed():
    make_scenes([0])
    start = time.perf_counter()
    make_scenes(range(500))
    rate = 500 / (time.perf_counter() - start)
    print(f"{rate:.0f} scenes a second at 64 px")
    assert rate > 100  # far below what any machine should reach: only a Python loop over images is this slow


def test_a_window_holds_one_whole_object():
    masks = torch.zeros(3, 16, 16, dtype=torch.uint8)
    masks[0, 2:7, 8:13], masks[1, 0:6, 0:6] = 2, 1                                         # whole; cut off by the border of the scene
    rows, kinds, corners = one_object(masks, 3, 9)
    assert rows.tolist()[0] == 0 and kinds.tolist()[0] == 2 and 2 not in rows, "a scene without an object gives no window"
    top, left = corners[0].tolist()
    assert top <= 2 and top + 9 >= 7 and left <= 8 and left + 9 >= 13


def test_windows_are_summed_as_by_a_loop():
    x = torch.randn(2, 7, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(box_sums(cumulative(x), 3), torch.nn.functional.avg_pool2d(x[None], 3, 1)[0] * 9)
