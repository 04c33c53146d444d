"""Masks that are pictures: ids, grey values, colours, transparency, and how they find their images."""
import numpy as np
import pytest
from annotation_writers import PALETTE
from PIL import Image

from semiseg_nb.annotations import import_annotations
from semiseg_nb.core import UserError
from semiseg_nb.mask_files import pairs_of, read_masks
from semiseg_nb.tool_files import ToolFiles


def save(path, array, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = array if isinstance(array, Image.Image) else Image.fromarray(np.asarray(array))
    picture.save(path, **more)


def with_masks(root, *masks, **more):
    for i, m in enumerate(masks):
        save(root / f"masks/{i}.png", m, **more)
        h, w = m.size[::-1] if isinstance(m, Image.Image) else np.shape(m)[:2]
        save(root / f"images/{i}.png", np.zeros((h, w, 3), np.uint8))
    return ToolFiles(root)


def read(source, mapping=(), colours=(), classes=None):
    export = read_masks(source, dict(mapping), dict(colours), classes)
    return export, [np.array(export.names)[p.values()].tolist() for p in export.pictures if p.values]


A = np.array([[0, 1], [1, 2]], np.uint8)


# ---------------------------------------------------------------- values
def test_0_and_255_alone_are_an_object(tmp_path):
    _, named = read(with_masks(tmp_path, np.uint8([[0, 255], [255, 0]]), np.uint8([[0, 0]])))
    assert named == [[["background", "object"], ["object", "background"]], [["background", "background"]]]


def test_255_beside_ids_is_unknown(tmp_path):
    _, named = read(with_masks(tmp_path, np.uint8([[0, 1], [2, 255]])))
    assert named == [[["class 0", "class 1"], ["class 2", "ignore"]]]


def test_names_come_from_files_beside_the_masks_or_from_the_user(tmp_path):
    source = with_masks(tmp_path, A)
    assert read(source, classes=["sky", "road", "car"])[1] == [[["sky", "road"], ["road", "car"]]]
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\n")
    export, named = read(ToolFiles(tmp_path))
    assert named == [[["a", "b"], ["b", "c"]]] and export.names[:3] == ["a", "b", "c"]
    (tmp_path / "classes.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match="holds the value 2, but the class names are for 0 to 1: say what it means"): read(ToolFiles(tmp_path))


def test_grey_values_need_a_key(tmp_path):
    source = with_masks(tmp_path, A * np.uint8(85))
    with pytest.raises(UserError, match="the values 0, 85, 170, shades of grey.*mapping={'0': '...', '85': '...', '170': '...'}"): read(source)
    assert import_annotations(tmp_path, tmp_path.parent / "out", mapping={"0": "sky", "85": "road", "170": "ignore"}).classes[1]["name"] == "road"
    deep = with_masks(tmp_path / "deep", np.array([[0, 1000]], np.uint16))
    assert read(deep, {"0": "sky", "1000": "road"})[1] == [[["0", "1000"]]]


@pytest.mark.parametrize("masks, says", [
    ([np.uint8([[0, 1]]), np.uint8([[0, 255]])], "may be the same object or 'unknown': say which"),
    ([np.float32([[0, 0.5]])], "holds the value 0.5: write whole numbers"), ([np.float32([[0, np.inf]])], "the value inf|whole numbers"),
    ([np.arange(10000).reshape(100, 100).astype(np.int32)], "holds 10000 colours or values: it looks like a photo"),
    ([np.int32([[0, -3]])], "holds the value -3"),
    ([np.clip(np.add.outer(np.arange(60) * 0, np.r_[np.zeros(40), np.arange(0, 255, 11), np.full(40, 255)]), 0, 255).astype(np.uint8)], "smoothed|shades of grey"),
    ([A, np.uint8([[[1, 2, 3], [4, 5, 6]]])], "Some masks .* are coloured and some hold grey values"),
])
def test_masks_that_nobody_can_read_are_refused(tmp_path, masks, says):
    for i, m in enumerate(masks):
        save(tmp_path / f"masks/{i}.tif", m)
        save(tmp_path / f"images/{i}.png", np.zeros((*m.shape[:2], 3), np.uint8))
    with pytest.raises(UserError, match=says): read(ToolFiles(tmp_path))


def test_float_masks_with_gaps_are_unknown_there(tmp_path):
    save(tmp_path / "masks/a.tif", np.float32([[0, 1], [np.nan, 2]]))
    save(tmp_path / "images/a.png", np.zeros((2, 2, 3), np.uint8))
    assert read(ToolFiles(tmp_path))[1] == [[["class 0", "class 1"], ["ignore", "class 2"]]]


# ---------------------------------------------------------------- colours
def test_colours_without_a_table_become_classes_and_are_shown(tmp_path):
    export, named = read(with_masks(tmp_path, PALETTE[A]))
    assert named == [[["background", "#804080"], ["#804080", "#4682b4"]]] and export.colours["#804080"] == (128, 64, 128)
    assert "#804080 is #804080" in export.notes[0]


@pytest.mark.parametrize("name, text", [
    ("labelmap.txt", "# label:color_rgb:parts:actions\nsky:0,0,0::\nroad 2:128,64,128::\ncar:70,130,180::\n"), ("label_colors.txt", "0 0 0\t\tsky\n128 64 128 road 2\n70 130 180 car\n"),
    ("class_dict.csv", "name,r,g,b\nsky,0,0,0\nroad 2,128,64,128\ncar,70,130,180,1\n"),
])
def test_tables_of_colours_as_tools_write_them(tmp_path, name, text):
    with_masks(tmp_path, PALETTE[A])
    (tmp_path / name).write_text(text)
    assert read(ToolFiles(tmp_path))[1] == [[["sky", "road 2"], ["road 2", "car"]]]
    (tmp_path / name).write_text("\n".join(text.splitlines()[:-1]))
    with pytest.raises(UserError, match="the colour #4682b4 in 1 pixels, which is not in the table"): read(ToolFiles(tmp_path))


def test_a_table_given_by_the_user(tmp_path):
    with_masks(tmp_path / "s", PALETTE[A])
    report = import_annotations(tmp_path / "s", tmp_path / "t", colours={"sky": "#000000", "road": (128, 64, 128), "car": [70, 130, 180], "bus": "#ffffff"})
    assert [c["name"] for c in report.classes] == ["sky", "road", "car", "bus"], "a class that no mask shows keeps its place"


def test_palettes_that_number_anew_are_read_by_colour(tmp_path):
    masks = []
    for order in ([0, 1, 2], [2, 0, 1]):
        m = Image.fromarray(np.uint8(np.argsort(order))[A])
        m.putpalette(PALETTE[order].tobytes())
        masks.append(m)
    _, named = read(with_masks(tmp_path, *masks))
    assert named[0] == named[1] == [["background", "#804080"], ["#804080", "#4682b4"]]
    same = with_masks(tmp_path / "same", masks[0], masks[0])
    assert read(same)[1][0] == [["class 0", "class 1"], ["class 1", "class 2"]], "one palette for all: its numbers are ids"


def test_smoothed_colours_are_refused(tmp_path):
    truth = np.kron(np.random.default_rng(0).integers(0, 4, (6, 6)), np.ones((8, 8), int))
    blurred = Image.fromarray(PALETTE[truth]).resize((24, 24), Image.Resampling.BILINEAR).resize((48, 48), Image.Resampling.BICUBIC)
    with pytest.raises(UserError, match="smoothed"): read(with_masks(tmp_path, blurred))
    save(tmp_path / "jpeg/masks/0.jpg", PALETTE[truth])
    save(tmp_path / "jpeg/images/0.png", PALETTE[truth])
    with pytest.raises(UserError, match="is a JPEG or WebP file"): read(ToolFiles(tmp_path / "jpeg"))


def test_transparency(tmp_path):
    alpha = np.uint8([[0, 255], [255, 255]])
    white = np.dstack([np.full((2, 2, 3), 255, np.uint8), alpha])
    assert read(with_masks(tmp_path / "a", white))[1] == [[["background", "object"], ["object", "object"]]], "only the opacity tells"
    opaque = np.dstack([PALETTE[A], np.full((2, 2), 255, np.uint8)])
    assert read(with_masks(tmp_path / "b", opaque))[1] == [[["background", "#804080"], ["#804080", "#4682b4"]]]
    with pytest.raises(UserError, match="transparent in part and coloured in part"): read(with_masks(tmp_path / "c", np.dstack([PALETTE[A], alpha])))
    grey = np.dstack([A, A, A])
    assert read(with_masks(tmp_path / "d", grey))[1] == [[["class 0", "class 1"], ["class 1", "class 2"]]], "grey saved in colour"


# ---------------------------------------------------------------- pairs
@pytest.mark.parametrize("image, mask", [
    ("a.jpg", "a_mask.png"), ("a.png", "a_mask.png"), ("images/a.jpg", "labels/a.png"), ("images/x/a.jpg", "masks/x/a_label.png"), ("JPEGImages/a.jpg", "SegmentationClass/a.png"),
    ("train/images/a.jpg", "train/masks/a.png"), ("leftImg8bit/train/a_leftImg8bit.png", "gt/train/a_gtFine_labelIds.png"), ("a.jpg", "annotations/a.png"), ("a b.JPG", "masks/a b.PNG"),
])
def test_masks_find_their_images(tmp_path, image, mask):
    for name in (image, mask): save(tmp_path / name, np.zeros((2, 2), np.uint8), format="PNG")
    assert pairs_of(ToolFiles(tmp_path)) == ([(tmp_path / image, tmp_path / mask)], [])


def test_a_photo_whose_name_ends_like_a_mask_stays_a_photo(tmp_path):
    for name in ("images/venetian_mask.jpg", "images/b.jpg", "masks/venetian_mask.png"): save(tmp_path / name, np.zeros((2, 2), np.uint8))
    pairs, lost = pairs_of(ToolFiles(tmp_path))
    assert dict(pairs) == {tmp_path / "images/venetian_mask.jpg": tmp_path / "masks/venetian_mask.png", tmp_path / "images/b.jpg": None} and not lost


def test_doubtful_pairs_are_refused(tmp_path):
    for name in ("images/a.png", "masks/a.png", "gt/a.png"): save(tmp_path / name, A)
    with pytest.raises(UserError, match="has two masks, .* keep one, or name the pairs in a CSV"): pairs_of(ToolFiles(tmp_path))
    for name in ("2/x/a.png", "2/y/a.png", "2/masks/a.png"): save(tmp_path / name, A)
    with pytest.raises(UserError, match="can belong to"): pairs_of(ToolFiles(tmp_path / "2"))


def test_masks_without_image_are_told(tmp_path):
    with_masks(tmp_path / "s", A, A)
    save(tmp_path / "s/masks/lone.png", A)
    report = import_annotations(tmp_path / "s", tmp_path / "t")
    assert "1 mask(s) have no image" in report.problems[0] and report.splits == {"": {"images": 2, "masks": 2}}


def test_masks_beside_a_tool_are_a_choice(tmp_path):
    with_masks(tmp_path / "s", A)
    (tmp_path / "s/images/0.txt").write_text("0 0 0 1 0 1 1\n")
    with pytest.raises(UserError, match=r"several kinds, yolo .*, masks .*: choose one with kind='yolo'"): import_annotations(tmp_path / "s", tmp_path / "t")
    assert import_annotations(tmp_path / "s", tmp_path / "t", kind="masks").kind == "masks"


def test_nothing_that_is_known(tmp_path):
    save(tmp_path / "s/a.png", A)
    with pytest.raises(UserError, match="holds no annotations that are known: give a folder with images and the export of a tool .coco,"): import_annotations(tmp_path / "s", tmp_path / "t")
    with pytest.raises(UserError, match="does not exist"): import_annotations(tmp_path / "z", tmp_path / "t")
