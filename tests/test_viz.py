"Pictures: colours as given, 255 grey, every function draws without a screen, errors in one sentence"
import io

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from ipywidgets import Dropdown, IntSlider
from PIL import Image

from semiseg_nb.core import UserError
from semiseg_nb.viz import (
    GREY,
    controls,
    curves,
    figure_words,
    image_to_rgb,
    mask_to_rgb,
    overlay,
    reliability,
    save_figure,
    show,
    show_grid,
    show_predictions,
    stack,
    to_png,
)

PALETTE = [(0, 0, 0), (255, 0, 0), (0, 0, 255)]


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def pictures(n=2, size=(12, 16)):
    g = torch.Generator().manual_seed(0)
    return torch.rand(n, 3, *size, generator=g), torch.randint(0, 3, (n, *size), generator=g)


def test_masks_take_the_palette_and_255_is_grey():
    rgb = mask_to_rgb(torch.tensor([[0, 1], [2, 255]]), PALETTE)
    assert rgb.dtype == np.uint8 and rgb.tolist() == [[[0, 0, 0], [255, 0, 0]], [[0, 0, 255], list(GREY)]]
    assert mask_to_rgb(np.full((2, 3, 4), 255, np.uint8)).shape == (2, 3, 4, 3)


@pytest.mark.parametrize("value", [3, 254, -1])
def test_a_class_without_a_colour_is_named(value):
    with pytest.raises(UserError, match=f"class {value}, .*colours for 0 to 2"): mask_to_rgb(torch.tensor([[0, value]]), PALETTE)


def test_images_of_either_type_become_the_same_picture():
    x = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    assert np.array_equal(image_to_rgb(x), image_to_rgb(x.float() / 255)) and image_to_rgb(x).shape == (5, 7, 3)
    assert image_to_rgb(torch.tensor([-1.0, 2.0, float("nan")]).expand(3, 1, 3))[0, :, 0].tolist() == [0, 255, 0]
    with pytest.raises(UserError, match=r"\(5, 4, 4\)"): image_to_rgb(torch.zeros(5, 4, 4))


def test_overlay_mixes_and_leaves_unknown_pixels_alone():
    image = torch.full((3, 1, 2), 100, dtype=torch.uint8)
    assert overlay(image, torch.tensor([[1, 255]]), PALETTE, alpha=0.4).tolist() == [[[162, 60, 60], [100, 100, 100]]]


def test_grid_takes_images_masks_and_maps_mixed():
    x, y = pictures()
    fig = show_grid([x[0], (x[0] * 255).byte(), y[0], y[0] > 1, x[0, 0], overlay(x[0], y[0])], list("abcdef"), columns=4, palette=PALETTE, title="see")
    shown = [ax for ax in fig.axes if ax.images]
    assert [ax.get_title() for ax in shown] == list("abcdef") and fig.get_suptitle() == "see"
    assert np.array_equal(shown[2].images[0].get_array(), mask_to_rgb(y[0], PALETTE))
    row = show_grid([y[:1], x[0, :1]], palette=PALETTE)
    assert np.array_equal(row.axes[0].images[0].get_array(), mask_to_rgb(y[0], PALETTE)), "(1,H,W) is a mask or map as well"
    with pytest.raises(UserError, match="no picture"): show_grid([])


def test_predictions_stand_side_by_side_with_a_legend():
    x, y = pictures()
    y[0, 0, 0] = 255
    fig = show_predictions(x, y, {"baseline": y, "method": (y + 1) % 3 * (y < 3)}, PALETTE, ["a", "b", "c"], errors=True)
    assert [ax.get_title() for ax in fig.axes[:4]] == ["image", "truth", "baseline", "method"]
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["a", "b", "c", "unknown (255)"]
    assert not fig.axes[2].collections, "no outline where nothing is wrong"
    assert fig.axes[3].collections, "an outline where something is wrong"
    assert len(show_predictions(x, None, {"method": y}, PALETTE).axes) == 4
    ragged = show_predictions([x[0], x[1, :, :5]], None, {"method": [y[0], y[1, :5]]}, PALETTE, ["a", "b", "c"])
    assert [t.get_text() for t in ragged.legends[0].get_texts()] == ["a", "b", "c", "unknown (255)"], "pictures may have sizes of their own"


def test_curves_leave_out_rows_without_the_key():
    fig = curves({"a": [{"step": 0, "loss": 1.0}, {"step": 1, "miou": 0.5}, {"step": 2, "miou": 0.6}], "b": [{"step": 1, "miou": None}, {"step": 2, "miou": 0.7}]})
    assert [line.get_xydata().tolist() for line in fig.axes[0].lines] == [[[1, 0.5], [2, 0.6]], [[2, 0.7]]]
    with pytest.raises(UserError, match=r"'mioo' over 'step'.*loss, miou, step"): curves({"a": [{"step": 0, "loss": 1.0, "miou": 1}]}, "mioo")


def test_reliability_counts_the_calibration_error_by_hand():
    fig = reliability(torch.tensor([0.95, 0.95, 0.55, 0.55]), torch.tensor([True, False, True, False]), bins=10)
    assert fig.axes[0].get_title() == "calibration error 0.250"  # half of |0.95 - 0.5| plus half of |0.55 - 0.5|
    assert reliability(torch.ones(3), torch.ones(3).bool()).axes[0].get_title() == "calibration error 0.000"
    with pytest.raises(UserError, match="3 confidences and 2"): reliability(torch.ones(3), torch.ones(2).bool())


def test_figures_are_written_whole_and_of_modest_size(tmp_path):
    x, y = pictures(4, (64, 64))
    path = save_figure(show_predictions(x, y, {"method": y}, PALETTE, ["a", "b", "c"]), tmp_path / "new" / "grid.png")
    assert path.read_bytes()[:4] == b"\x89PNG" and 5_000 < path.stat().st_size < 200_000
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]
    with pytest.raises(UserError, match=r"grid\.bmp"): save_figure(plt.figure(), tmp_path / "grid.bmp")


def test_controls_redraw_when_a_knob_moves_and_leave_no_open_figure():
    widgets = pytest.importorskip("ipywidgets")
    seen = []

    def draw(strength):
        seen.append(strength)
        return show_grid([np.zeros((4, 4), int)], title=str(strength))
    open_before = plt.get_fignums()
    knob = widgets.FloatSlider(0.5, min=0, max=1)
    controls(draw, strength=knob)
    knob.value = 0.75
    assert seen == [0.5, 0.75] and plt.get_fignums() == open_before and knob.description == "strength"


def test_a_figure_is_shown_with_its_words(monkeypatch):
    said = []
    monkeypatch.setattr("IPython.display.display", lambda fig, metadata: said.extend((form, words["alt"]) for form, words in metadata.items()))
    fig = curves({"baseline": [{"step": 0, "miou": .1}]}, title="It learns")
    assert figure_words(fig) == "It learns, miou over step, baseline"
    show(fig)
    show(plt.figure(), "a circle", photo=True)
    assert said == [("image/png", "It learns, miou over step, baseline"), ("image/jpeg", "a circle")] and not plt.get_fignums()
    assert figure_words(plt.figure()) == "A picture without a title"


def test_states_of_the_knobs_stay_on_the_page(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda thing, **more: shown.append((thing, more)))
    def draw(size, colour):
        fig = plt.figure(figsize=(size, 1), dpi=50)
        fig.suptitle(colour)
        return fig
    controls(draw, [{"size": 2}, {"size": 3, "colour": "blue"}], size=IntSlider(2, 1, 9), colour=Dropdown(options=["red", "blue"]))
    (_, _), (strip, more) = shown
    assert more["metadata"]["image/png"]["alt"] == "size = 2: red. size = 3, colour = blue: blue"
    assert strip.data[:4] == b"\x89PNG"


def test_pictures_stand_side_by_side_where_they_fit():
    wide, high = (plt.figure(figsize=size, dpi=50) for size in ((4, 1), (4, 2)))
    for fig in (wide, high): fig.add_axes((0, 0, 1, 1))
    pngs = [to_png(wide), to_png(high)]
    across, below = (Image.open(io.BytesIO(stack(pngs, width=width))) for width in (1000, 300))
    assert across.width > below.width and across.height < below.height
