"""Outlines and pixels: the rule of centres by hand, holes, run lengths against their published encoder, traced borders."""
import numpy as np
import pytest
from annotation_writers import brush_rle
from pycocotools import mask as coco

from semiseg_nb.core import UserError
from semiseg_nb.rasters import (
    Region,
    brush_mask,
    counts_of_text,
    fill_ellipse,
    fill_outlines,
    mask_of_runs,
    paint,
    pieces_of,
    rectangle,
    region_of_runs,
    region_runs,
    rle_text,
    run_lengths,
    trace_outlines,
)
from semiseg_nb.scenes import make_scenes


def filled(*parts, shape=(6, 8)):
    canvas = np.zeros(shape, np.uint8)
    paint(canvas, fill_outlines(parts, shape)[0], 1)
    return canvas


def picture(text): return np.array([[c == "#" for c in line] for line in text.split()], np.uint8)


def noises():
    rng = np.random.default_rng(5)
    shapes = [(1, 1), (1, 9), (9, 1), (7, 5), (24, 31)]
    return [rng.random(s) < d for s in shapes for d in (0, 0.05, 0.3, 0.5, 0.8, 1)]


def scene_classes():
    _, masks = make_scenes([0, 1, 2], size=48)
    return [(m == k).numpy() for m in masks for k in range(5)]


# ---------------------------------------------------------------- outlines
def test_a_centre_inside_is_a_pixel():
    assert (filled([(1, 1), (4, 1), (4, 3), (1, 3)]) == picture("........ .###.... .###.... ........ ........ ........")).all()
    assert (filled([(0, 0), (6, 0), (0, 6)]) == picture("#####... ####.... ###..... ##...... #....... ........")).all(), "a centre on a slanted right border is out"
    assert (filled([(1.4, 0.6), (3.6, 0.6), (3.6, 2.4), (1.4, 2.4)]) == picture("........ .###.... ........ ........ ........ ........")).all()


def test_the_direction_and_the_start_of_an_outline_mean_nothing():
    rng = np.random.default_rng(0)
    for _ in range(30):
        p = rng.uniform(-3, 10, (7, 2))
        assert (filled(p) == filled(p[::-1])).all() and (filled(p) == filled(np.roll(p, 3, 0))).all()


def test_neighbours_share_no_pixel_and_leave_none_out():
    rng = np.random.default_rng(1)
    for k in range(200):
        a, b = rng.uniform(0, 8, 2) if k % 2 else rng.integers(0, 9, 2) + 0.5            # also right through the centres
        left, right = [(-1, -1), (a, -1), (b, 7), (-1, 7)], [(9, 7), (b, 7), (a, -1), (9, -1)]
        assert (filled(left) + filled(right) == 1).all()
        assert (filled([p[::-1] for p in left]) + filled([p[::-1] for p in right]) == 1)[:, :6].all()


def test_every_pixel_agrees_with_a_ray_counted_one_by_one():
    rng = np.random.default_rng(2)
    for _ in range(40):
        p = rng.uniform(-2, 9, (rng.integers(3, 9), 2))
        odd = np.zeros((6, 8), np.uint8)
        for y in range(6):
            for x in range(8):
                for (x0, y0), (x1, y1) in zip(p, np.roll(p, -1, 0)):
                    if (y0 > y + .5) != (y1 > y + .5) and x0 + (y + .5 - y0) / (y1 - y0) * (x1 - x0) < x + .5: odd[y, x] ^= 1
        assert (filled(p) == odd).all()


def test_parts_inside_are_holes_and_overlapping_parts_are_added():
    outer, inner, island = ([(a, a), (b, a), (b, c), (a, c)] for a, b, c in ((0, 8, 6), (1, 7, 5), (2, 6, 4)))
    ring = picture("######## #......# #.####.# #.####.# #......# ########")
    assert (filled(outer, inner, island) == ring).all() and (filled(island, outer, inner) == ring).all()
    assert filled(outer, outer).all(), "the same part twice is no hole"
    assert filled([(0, 0), (5, 0), (5, 4), (0, 4)], [(3, 2), (8, 2), (8, 6), (3, 6)]).sum() == 20 + 20 - 4
    assert fill_outlines([outer, inner, island], (6, 8))[1] == 2 and fill_outlines([outer, outer], (6, 8))[1] == 0


def test_what_lies_outside_or_between_centres_holds_nothing():
    for p in ([(20, 20), (30, 20), (30, 30)], [(-9, -9), (-1, -9), (-1, -1)], [(3.6, 0), (4.4, 0), (4.4, 6), (3.6, 6)], [(1, 1)], [(1, 1), (5, 5)]):
        assert not filled(p).any()
    assert filled([(-1e6, -1e6), (1e6, -1e6), (1e6, 1e6), (-1e6, 1e6)]).all()
    assert not fill_outlines([], (6, 8))[0].mask.size


@pytest.mark.parametrize("points", [[], [1, 2, 3], [(1, 2), (3,)], [(1, 2, 3)], [("1", "2")], [(None, 1)], [(np.nan, 1)], [(np.inf, 1)], [(1e300, 1)], "abc", None, {}])
def test_an_outline_that_is_none_is_refused(points):
    with pytest.raises(UserError, match="the outline .*"): fill_outlines([points], (6, 8))


def test_ellipses_and_boxes():
    whole = np.zeros((6, 8), np.uint8)
    paint(whole, fill_ellipse((4, 3), (2, 1.2), (6, 8)), 1)
    assert (whole == picture("........ ........ ..####.. ..####.. ........ ........")).all()
    assert (filled(rectangle(2, 1, 4, 2)) == picture("........ ..####.. ..####.. ........ ........ ........")).all()
    assert filled(rectangle(4, 0, 4, 2, 90, (0, 0))).sum() == 8 and (filled(rectangle(4, 0, 4, 2, 90, (0, 0)))[:4, 2:4] == 1).all()
    with pytest.raises(UserError, match="sizes are not negative"): rectangle(0, 0, -1, 2)
    with pytest.raises(UserError, match="both are more than 0"): fill_ellipse((0, 0), (0, 1), (4, 4))
    with pytest.raises(UserError, match="finite numbers"): fill_ellipse((0, 0), (np.inf, 1), (4, 4))


# ---------------------------------------------------------------- run lengths
@pytest.mark.parametrize("mask", noises() + scene_classes(), ids=lambda m: "x".join(map(str, m.shape)))
def test_run_lengths_are_those_of_pycocotools(mask):
    theirs = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    counts = run_lengths(mask)
    assert rle_text(counts) == theirs["counts"].decode()
    assert counts_of_text(theirs["counts"].decode()) == counts
    assert (mask_of_runs(counts, mask.shape) == mask).all() and (coco.decode({"size": mask.shape, "counts": rle_text(counts).encode()}) == mask).all()
    assert (mask_of_runs(run_lengths(mask, "C"), mask.shape, "C") == mask).all()
    assert region_runs(Region(0, 0, mask), mask.shape) == counts


def test_runs_of_a_window_are_those_of_the_whole_image():
    for mask in noises():
        whole = np.zeros((40, 50), bool)
        h, w = mask.shape
        whole[7:7 + h, 5:5 + w] = mask
        assert region_runs(Region(7, 5, mask), whole.shape) == run_lengths(whole)
        again = np.zeros_like(whole)
        paint(again, region_of_runs(run_lengths(whole), whole.shape), 1)
        assert (again == whole).all()
        back = np.zeros_like(whole)
        for piece in pieces_of(whole): paint(back, piece, 1)
        assert (back == whole).all()


def test_long_runs_need_several_groups():
    counts = [0, 1, 100000, 3, 70000, 1, 5, 2**31]
    assert counts_of_text(rle_text(counts)) == counts


@pytest.mark.parametrize("text", ["5221", "P", "\x00", "é", "oooooooooooooooooooo1", " "])
def test_a_text_that_is_cut_or_foreign_never_passes_for_a_mask(text):
    with pytest.raises(UserError): mask_of_runs(counts_of_text(text), (4, 4))


@pytest.mark.parametrize("counts", [[3], [17], [8, -4, 12], [8.0, 8], [True, 15], None, "88", [8, None]])
def test_run_lengths_that_do_not_fill_the_mask_are_refused(counts):
    for read in (mask_of_runs, region_of_runs):
        with pytest.raises(UserError, match="run lengths"): read(counts, (4, 4))


@pytest.mark.parametrize("mask", noises() + scene_classes()[:6], ids=lambda m: "x".join(map(str, m.shape)))
def test_the_brush_of_label_studio(mask): assert (brush_mask(brush_rle(mask), mask.shape) == mask).all()


def test_a_brush_that_is_cut_or_of_another_size_is_refused():
    rle = brush_rle(np.eye(5, dtype=bool))
    for wrong, shape in ((rle[:-3], (5, 5)), (rle, (5, 6)), ([], (5, 5)), ([1.5], (5, 5)), ([300], (5, 5)), (None, (5, 5)), ([255] * 40, (5, 5))):
        with pytest.raises(UserError, match="no picture of"): brush_mask(wrong, shape)


def test_the_solutions_of_the_lesson():
    board, half = np.indices((8, 8)).sum(0) % 2 == 1, np.zeros((8, 8), bool)
    half[:, :4] = True
    assert len(run_lengths(board)) == len(rle_text(run_lengths(board))) == 57 and rle_text(run_lengths(half)) == "0P1P1"
    for left, pixels in ((3.6, 0), (3.2, 5)): assert filled([(left, 0), (left + .8, 0), (left + .8, 5), (left, 5)], shape=(5, 6)).sum() == pixels


# ---------------------------------------------------------------- and back
@pytest.mark.parametrize("mask", noises() + scene_classes(), ids=lambda m: "x".join(map(str, m.shape)))
def test_traced_outlines_give_back_every_pixel(mask):
    loops = trace_outlines(mask)
    assert (filled(*loops, shape=mask.shape) == mask).all()
    for loop in loops:
        step = np.abs(np.roll(loop, -1, 0) - loop)
        assert ((step > 0).sum(1) == 1).all(), "every edge is horizontal or vertical, and none has the length 0"


def test_a_ring_has_two_outlines_and_a_diagonal_two_parts():
    ring = np.pad(np.ones((3, 3), bool), 1)
    ring[2, 2] = False
    assert sorted(o.tolist() for o in trace_outlines(ring)) == sorted([[[1, 1], [4, 1], [4, 4], [1, 4]], [[2, 2], [3, 2], [3, 3], [2, 3]]])
    assert [len(o) for o in trace_outlines(np.eye(2, dtype=bool))] == [4, 4] == [len(o) for o in trace_outlines(np.eye(2, dtype=bool)[::-1])]


def test_outlines_of_whole_numbers_mean_the_same_to_pycocotools():
    for mask in scene_classes():
        loops = trace_outlines(mask)
        if len(loops) != 1: continue                                                         # it fills holes
        rle = coco.frPyObjects([loops[0].astype(float).ravel().tolist()], *mask.shape)
        assert (coco.decode(coco.merge(rle)) == mask).all()
