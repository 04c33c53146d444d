"""From annotation tools and back: the same masks from every tool, splits and classes, mappings, damaged exports, archives, the way home."""
import json
import random
import re
import shutil
import zipfile

import annotation_writers as writers
import numpy as np
import pytest
from annotation_writers import NAMES, scene_pictures
from helpers import mask as mask_file
from helpers import picture
from PIL import Image
from pycocotools import mask as coco_masks

from semiseg_nb import annotations
from semiseg_nb.annotations import export_coco, import_annotations
from semiseg_nb.catalogue import load_task
from semiseg_nb.core import UserError
from semiseg_nb.experiment import run
from semiseg_nb.folders import Folder
from semiseg_nb.pictures import look_at, read_image, read_mask

PICTURES = scene_pictures()
TOOLS = {
    "coco": writers.coco, "coco, numbers": lambda r, p: writers.coco(r, p, form="rle"), "coco, text": lambda r, p: writers.coco(r, p, form="text"),
    "panoptic": writers.panoptic, "labelme": writers.labelme, "labelme, embedded": lambda r, p: writers.labelme(r, p, embedded=True),
    "labelme, mask": lambda r, p: writers.labelme(r, p, form="mask"), "cvat": writers.cvat, "cvat, mask": lambda r, p: writers.cvat(r, p, form="mask"),
    "yolo": writers.yolo, "labelstudio": writers.studio, "labelstudio, brush": lambda r, p: writers.studio(r, p, form="brushlabels"),
    "masks, colours": writers.colours,
}
each_tool = pytest.mark.parametrize("tool", TOOLS)


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


@pytest.fixture
def target(tmp_path): return tmp_path / "target"


def masks_in(folder): return {p.relative_to(folder / "masks").with_suffix("").as_posix(): read_mask(p).numpy() for p in sorted((folder / "masks").rglob("*.png"))}
def class_names(report): return [c["name"] for c in report.classes]


def classes_as_loaded(target):
    "The names in the folder that was written, each mask compared with its image"
    folder = Folder(target)
    for item in folder.items: look_at(item)
    return list(folder.all_classes)


def same_masks(target, report, pictures=PICTURES):
    "Every pixel has the class that it had, whatever number the class got"
    found = masks_in(target)
    ids = np.array([class_names(report).index(n) for n in NAMES])
    assert len(found) == len(pictures)
    for name, (_, truth) in pictures.items():
        got = found[name] if name in found else found[name.replace(" ", "_")] if name.replace(" ", "_") in found else next(m for n, m in found.items() if n.endswith(name.replace(" ", "_")))
        assert (got == ids[truth]).all(), name


# ---------------------------------------------------------------- the same from every tool
@each_tool
def test_every_tool_gives_the_same_masks(tool, source, target):
    TOOLS[tool](source, PICTURES)
    before = {p: p.read_bytes() for p in source.rglob("*") if p.is_file()}
    report = import_annotations(source, target)
    assert report.kind == tool.partition(",")[0] and not report.problems
    same_masks(target, report)
    assert {p: p.read_bytes() for p in source.rglob("*") if p.is_file()} == before, "originals are never touched"
    assert classes_as_loaded(target) == class_names(report)


def test_images_are_copied_byte_for_byte(source, target):
    writers.ids(source, PICTURES)
    import_annotations(source, target)
    for path in (source / "images").iterdir(): assert (target / "images" / path.name).read_bytes() == path.read_bytes()


def test_masks_are_pictures_in_palette_mode_with_the_colours_of_dataset_json(source, target):
    writers.colours(source, PICTURES)
    report = import_annotations(source, target)
    info = json.loads((target / "dataset.json").read_text())
    assert [c["color"] for c in info["classes"]] == writers.PALETTE.tolist() and info["import"]["kind"] == "masks"
    with Image.open(target / "masks/scene 1.png") as file:
        assert file.mode == "P" and (np.asarray(file.convert("RGB")) == writers.PALETTE[PICTURES["scene 1"][1]]).all()
    assert "#dc143c is flag" in str(report)


def test_the_report_counts_objects_and_pixels(source, target):
    writers.coco(source, PICTURES)
    report = import_annotations(source, target)
    for v, row in enumerate(report.classes):
        assert row["pixels"] == sum(int((m == v).sum()) for _, m in PICTURES.values()) and row["images"] == sum(bool((m == v).any()) for _, m in PICTURES.values())
        if v: assert row["objects"] == sum(k == v for _, m in PICTURES.values() for k, _ in writers.objects(m))
    assert report.splits == {"": {"images": 5, "masks": 5}}
    assert json.loads(json.dumps(report.as_dict())) == report.as_dict()
    assert re.search(r"2 +ladybird +\d+ +\d+ +\d+\.\d %", str(report)) and "5 images, 5 with a mask" in str(report)


# ---------------------------------------------------------------- images without annotation, splits, groups
def test_images_without_annotation_are_unlabelled(source, target):
    bare = PICTURES | {"empty": (PICTURES["scene 0"][0], np.zeros((48, 48), np.uint8))}
    writers.coco(source, bare)
    picture(source / "images/more.png")
    report = import_annotations(source, target)
    assert report.splits == {"": {"images": 7, "masks": 5}}
    assert "1 image(s) are not in the annotations" in str(report) and "1 image(s) have no object" in str(report)
    report = import_annotations(source, target, empty="background")
    assert report.splits == {"": {"images": 7, "masks": 6}} and not masks_in(target)["empty"].any()


def test_splits_of_the_source_are_kept(source, target):
    splits = dict(zip(PICTURES, ["train", "train", "train", "valid", "test"]))
    writers.yolo(source, PICTURES, splits=splits)
    report = import_annotations(source, target)
    assert report.splits == {"test": {"images": 1, "masks": 1}, "train": {"images": 3, "masks": 3}, "val": {"images": 1, "masks": 1}}
    assert set(masks_in(target)) == {f"{'val' if s == 'valid' else s}/{n}" for n, s in splits.items()}
    classes_as_loaded(target)
    for p in (source / "images/train").iterdir(): p.unlink()
    with pytest.raises(UserError, match="the splits test, val, but none for training"): import_annotations(source, target)


def test_further_folders_beside_the_splits_are_splits(source, target):
    for k, split in enumerate(("train2017", "val2017", "ood_night", "unlabelled_rain")):
        picture(source / f"images/{split}/{k}.png")
        if k < 3: mask_file(source / f"masks/{split}/{k}.png")
    assert import_annotations(source, target).splits == {"ood_night": {"images": 1, "masks": 1}, "train": {"images": 1, "masks": 1},
                                                         "unlabelled_rain": {"images": 1, "masks": 0}, "val": {"images": 1, "masks": 1}}


def test_nothing_is_dropped_without_a_note(source, target):
    writers.coco(source, PICTURES)
    (source / "images/dead.png").symlink_to("nowhere.png")
    (source / "images/x.heic").write_bytes(b"x")
    (source / "images/broken.png").write_bytes(b"x")
    report = import_annotations(source, target)
    assert "1 file(s) are links to nothing, 'dead.png'" in str(report) and "1 file(s) have endings that are not read, 'x.heic'" in str(report)
    assert "broken.png' cannot be read" in report.problems[0] and report.problems[0].endswith("it is left out.") and report.splits[""]["images"] == 5


def test_one_split_is_none(source, target):
    writers.yolo(source, PICTURES, splits=dict.fromkeys(PICTURES, "train"))
    assert list(import_annotations(source, target).splits) == [""]


def test_two_coco_files_are_two_splits(source, target):
    writers.coco(source, PICTURES)
    whole = json.loads((source / "annotations/instances.json").read_text())
    (source / "annotations/instances.json").unlink()
    for split, ids in (("train2017", {11, 12, 13}), ("val2017", {14, 15})):
        part = whole | {"images": [i for i in whole["images"] if i["id"] in ids], "annotations": [a for a in whole["annotations"] if a["image_id"] in ids]}
        (source / f"annotations/instances_{split}.json").write_text(json.dumps(part))
    report = import_annotations(source, target)
    assert report.splits == {"train": {"images": 3, "masks": 3}, "val": {"images": 2, "masks": 2}}
    assert not (masks_in(target)["val/scene 3"] != PICTURES["scene 3"][1]).any()


def test_a_csv_file_names_pairs_splits_and_groups(source, target):
    (source / "x").mkdir()
    for k in range(4): picture(source / f"x/{k}.jpg")
    for k in range(3): mask_file(source / f"x/of{k}.png")
    rows = ["Image;Mask;Split;Group", "x/0.jpg;x/of0.png;train;ann", "x/1.jpg;x/of1.png;val;bob", "x/2.jpg;x/of2.png;train;ann", "x/3.jpg;;train;"]
    (source / "list.csv").write_text("\n".join(rows))
    for given in (source, source / "list.csv"):
        report = import_annotations(given, target)
        assert report.kind == "csv" and report.splits == {"train": {"images": 3, "masks": 2}, "val": {"images": 1, "masks": 1}}
    assert (target / "groups.csv").read_text().splitlines() == ["image\tgroup", "train/0\tann", "val/1\tbob", "train/2\tann"]
    (source / "list.csv").write_text("\n".join([*rows, "x/9.jpg;;;"]))
    with pytest.raises(UserError, match="Line 6 .* names 'x/9.jpg', but .* holds no such file"): import_annotations(source, target)


def test_equal_names_in_different_folders_stay_apart(source, target):
    for year in ("2024", "2025"):
        picture(source / f"images/{year}/a.png")
        mask_file(source / f"masks/{year}/a.png", values=(0, int(year[-1]) - 3))
    import_annotations(source, target)
    found = masks_in(target)
    assert sorted(found) == ["images__2024__a", "images__2025__a"] and found["images__2024__a"].max() == 1 and found["images__2025__a"].max() == 2


# ---------------------------------------------------------------- classes
def test_mapping_merges_renames_and_ignores(source, target):
    writers.cvat(source, PICTURES)
    report = import_annotations(source, target, mapping={"melon": "food", "kite": "toy", "flag": "toy", "ladybird": "ignore"})
    assert class_names(report) == ["background", "food", "toy"]
    for name, got in masks_in(target).items(): assert (got == np.array([0, 1, 255, 2, 2])[PICTURES[name][1]]).all()
    assert "of the pixels are unknown (255)" in str(report)


def test_classes_fix_the_order(source, target):
    writers.labelme(source, PICTURES)
    import_annotations(source, target, classes=["background", *NAMES[:0:-1]])
    for name, got in masks_in(target).items(): assert (got == np.array([0, 4, 3, 2, 1])[PICTURES[name][1]]).all()
    import_annotations(source, target, classes=NAMES[1:])
    for name, got in masks_in(target).items(): assert (got == np.array([255, 0, 1, 2, 3])[PICTURES[name][1]]).all(), "no background among the classes: unknown"
    import_annotations(source, target, mapping={"background": "ignore"})
    assert all(set(np.unique(m)) <= {0, 1, 2, 3, 255} for m in masks_in(target).values())


@pytest.mark.parametrize("options, says", [
    ({"mapping": {"melom": "x"}}, "mapping 'melom' is not known .did you mean 'melon'"),
    ({"mapping": {"melon": 3}}, "turns 'melon' into 3"),
    ({"mapping": dict.fromkeys(NAMES, "ignore")}, "give 0 class"),
    ({"mapping": ["melon"]}, "mapping is .* a dictionary"),
    ({"classes": ["background", "melon"]}, "the class 'ladybird', which is not among the classes background, melon: add it, or map it"),
    ({"classes": ["melon"] * 3}, "'ladybird'|twice"), ({"classes": "melon"}, "give a list"), ({"kind": "coca"}, "kind 'coca' is not known.*did you mean 'coco'"),
    ({"kind": "yolo"}, "no annotations of the kind yolo"), ({"empty": "no"}, "empty 'no' is not known"), ({"colours": {"a": "#12"}}, "colours gives 'a'"),
])
def test_wrong_arguments_are_one_sentence(source, target, options, says):
    writers.coco(source, PICTURES)
    with pytest.raises(UserError, match=says): import_annotations(source, target, **options)
    assert not target.exists() and list(target.parent.iterdir()) == [source]


# ---------------------------------------------------------------- draw order
def coco_of(source, *shapes, size=(8, 12), **more):
    Image.new("RGB", size[::-1]).save(source / "a.png")
    rows = [{"id": i, "image_id": 1, "category_id": c, "segmentation": s} | more for i, (c, s) in enumerate(shapes)]
    image = {"id": 1, "file_name": "a.png", "height": size[0], "width": size[1]}
    (source / "a.json").write_text(json.dumps({"images": [image], "annotations": rows, "categories": [{"id": 1, "name": "plate"}, {"id": 2, "name": "table"}]}))


PLATE, TABLE = [3, 2, 7, 2, 7, 6, 3, 6], [1, 1, 11, 1, 11, 7, 1, 7]


def test_in_coco_the_larger_lies_below_and_in_labelme_the_earlier(source, target):
    coco_of(source, (1, [PLATE]), (2, [TABLE]))
    report = import_annotations(source, target)
    assert masks_in(target)["a"].tolist() == [[0] * 12, [0] + [2] * 10 + [0], *[[0, 2, 2, 1, 1, 1, 1, 2, 2, 2, 2, 0]] * 4, [0] + [2] * 10 + [0], [0] * 12]
    assert "overlap, in 16 pixels: the smaller lies above" in str(report)
    (source / "a.json").write_text(json.dumps({"shapes": [{"label": n, "points": np.reshape(p, (-1, 2)).tolist()} for n, p in (("plate", PLATE), ("table", TABLE))],
                                               "imagePath": "a.png"}))
    assert "the order of the tool counts" in str(import_annotations(source, target))
    assert (masks_in(target)["a"] == 2).sum() == 60 and not (masks_in(target)["a"] == 1).any()


def test_a_crowd_lies_below_and_z_order_counts(source, target):
    coco_of(source, (1, {"size": [8, 12], "counts": [33, 4, 59]}), (2, [TABLE]), iscrowd=0)
    info = json.loads((source / "a.json").read_text())
    info["annotations"][0]["iscrowd"] = 1
    (source / "a.json").write_text(json.dumps(info))
    import_annotations(source, target)
    assert not (masks_in(target)["a"] == 1).any(), "the crowd is smaller and lies below all the same"
    (source / "a.json").unlink()
    shape = '<polygon label="{}" points="{}" z_order="{}"/>'
    points = [";".join(f"{x},{y}" for x, y in np.reshape(p, (-1, 2))) for p in (PLATE, TABLE)]
    xml = "<annotations><image id='0' name='a.png' width='12' height='8'>{}{}</image></annotations>"
    for z, plate_pixels in ((1, 16), (0, 0)):
        (source / "a.xml").write_text(xml.format(shape.format("plate", points[0], z), shape.format("table", points[1], 0)))
        import_annotations(source, target)
        assert (masks_in(target)["a"] == 1).sum() == plate_pixels


def test_objects_without_a_pixel_are_told(source, target):
    coco_of(source, (1, [[1.6, 1.6, 2.4, 1.6, 2.4, 2.4]]), (2, [TABLE]), (1, [[50, 50, 60, 50, 60, 60]]))
    assert "2 object(s) of the class 'plate' hold no pixel" in str(import_annotations(source, target))


# ---------------------------------------------------------------- upright
@pytest.mark.parametrize("turn", range(1, 9))
def test_masks_of_pictures_on_their_side_are_turned_with_them(source, target, turn):
    exif, rng = Image.Exif(), np.random.default_rng(0)
    exif[274] = turn
    truth = rng.integers(0, 2, (4, 7))
    picture = Image.fromarray(np.repeat(truth[..., None] * 255, 3, -1).astype(np.uint8))
    picture.save(source / "a.png", exif=exif)
    columns = truth.T.ravel()
    runs = [0] * int(columns[0]) + np.diff([0, *(np.flatnonzero(np.diff(columns)) + 1), columns.size]).tolist()
    coco_of_size = {"images": [{"id": 1, "file_name": "a.png", "height": 4, "width": 7}], "categories": [{"id": 1, "name": "white"}],
                    "annotations": [{"image_id": 1, "category_id": 1, "segmentation": {"size": [4, 7], "counts": runs}}]}
    (source / "a.json").write_text(json.dumps(coco_of_size))
    report = import_annotations(source, target)
    upright, got = read_image(target / "images/a.png")[0].numpy() > 0, masks_in(target)["a"]
    if turn >= 5: assert (got == upright).all() and "turned upright" in str(report)
    else: assert (got == truth).all() and ("taken as upright" in str(report)) == (turn > 1)


def test_an_annotation_of_another_size_is_refused(source, target):
    coco_of(source, (1, [PLATE]), (2, [TABLE]))
    Image.new("RGB", (24, 16)).save(source / "a.png")
    with pytest.raises(UserError, match="was annotated at 12 x 8 pixels, but the image has 24 x 16"): import_annotations(source, target)


# ---------------------------------------------------------------- target and archives
def test_an_earlier_import_is_replaced_and_anything_else_stays(source, target):
    writers.coco(source, PICTURES)
    import_annotations(source, target)
    import_annotations(source, target, mapping={"melon": "kite"})
    assert len(json.loads((target / "dataset.json").read_text())["classes"]) == 4
    (target / "images/mine.png").write_bytes(b"x")
    with pytest.raises(UserError, match="holds files that no import wrote"): import_annotations(source, target)
    assert (target / "images/mine.png").exists()
    other = target.parent / "other"
    other.mkdir()
    import_annotations(source, other)                                                        # an empty folder is fine
    for wrong in (source, source.parent):
        with pytest.raises(UserError, match="no import wrote|inside the target"): import_annotations(source, wrong)
    inside = source / "out"
    import_annotations(source, inside)
    assert import_annotations(source, inside).splits == {"": {"images": 5, "masks": 5}}, "the target is no part of the source"


def test_what_stops_half_way_leaves_nothing(source, target, monkeypatch):
    writers.coco(source, PICTURES)
    import_annotations(source, target, mapping={"melon": "kite"})
    kept = {p: p.read_bytes() for p in target.rglob("*") if p.is_file()}
    for error in (KeyboardInterrupt, OSError(28, "No space left on device")):
        def stop(*args, error=error): raise error
        monkeypatch.setattr(annotations, "_draw", stop)
        with pytest.raises((KeyboardInterrupt, UserError)): import_annotations(source, target)
        assert {p: p.read_bytes() for p in target.rglob("*") if p.is_file()} == kept and sorted(p.name for p in target.parent.iterdir()) == ["source", "target"]


def test_an_archive_is_unpacked(source, target):
    writers.labelme(source, PICTURES)
    archive = shutil.make_archive(str(source.parent / "export"), "zip", source)
    same_masks(target, import_annotations(archive, target))


@pytest.mark.parametrize("name", ["../evil.json", "/evil.json", "a/../../evil.json", "C:/evil.json", "..\\evil.json"])
def test_an_archive_whose_paths_leave_the_folder_is_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive: archive.writestr(name, "x")
    with pytest.raises(UserError, match="leaves the folder"): import_annotations(tmp_path / "bad.zip", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.zip"]


def test_an_archive_that_is_too_large_or_broken_is_refused(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "big.zip", "w", zipfile.ZIP_DEFLATED) as archive: archive.writestr("a.txt", b"0" * 10**6)
    monkeypatch.setattr(annotations, "MOST_UNPACKED", 10**5)
    with pytest.raises(UserError, match="would unpack to"): import_annotations(tmp_path / "big.zip", tmp_path / "out")
    (tmp_path / "cut.zip").write_bytes((tmp_path / "big.zip").read_bytes()[:-30])
    with pytest.raises(UserError, match="no readable archive"): import_annotations(tmp_path / "cut.zip", tmp_path / "out")


# ---------------------------------------------------------------- and back
@pytest.mark.parametrize("form", ["rle", "polygon"])
def test_masks_come_home_bit_for_bit(tmp_path, form):
    rng = np.random.default_rng(3)
    truth = {n: m for n, (_, m) in PICTURES.items()} | {"noise": rng.choice([0, 1, 2, 3, 4, 255], (48, 48)).astype(np.uint8), "none": np.zeros((48, 48), np.uint8)}
    for name in truth: picture(tmp_path / f"photos/{name}.jpg", size=(48, 48))
    export_coco(truth, tmp_path / "photos/back.json", NAMES, images=tmp_path / "photos", form=form)
    import_annotations(tmp_path / "photos", tmp_path / "home", empty="background")
    found = masks_in(tmp_path / "home")
    assert found.keys() == truth.keys()
    for name, m in truth.items(): assert (found[name] == m).all(), name
    export_coco(tmp_path / "home/masks", tmp_path / "photos/back.json", images=tmp_path / "home/images", form=form)  # names from dataset.json
    import_annotations(tmp_path / "photos", tmp_path / "again", empty="background", classes=NAMES)
    for name, m in truth.items(): assert (masks_in(tmp_path / "again")[name] == m).all(), name


def test_pycocotools_reads_what_is_exported(tmp_path):
    truth = PICTURES["scene 0"][1]
    info = json.loads(export_coco({"a": truth}, tmp_path / "back.json", NAMES).read_text())
    assert [c["name"] for c in info["categories"]] == NAMES[1:]
    whole = np.zeros_like(truth)
    for row in info["annotations"]:
        rle = row["segmentation"] | {"counts": row["segmentation"]["counts"].encode()}
        piece = coco_masks.decode(rle).astype(bool)
        assert row["area"] == piece.sum() and row["bbox"] == coco_masks.toBbox(rle).tolist()
        whole[piece] = row["category_id"]
    assert (whole == truth).all()


def test_a_set_without_background_comes_home_with_its_classes(tmp_path):
    truth = PICTURES["scene 2"][1]
    picture(tmp_path / "photos/a.png", size=(48, 48))
    export_coco({"a": truth}, tmp_path / "photos/back.json", ["ground", *NAMES[1:]])
    import_annotations(tmp_path / "photos", tmp_path / "home", classes=["ground", *NAMES[1:]])
    assert (masks_in(tmp_path / "home")["a"] == truth).all()


def colours_in(root): return [tuple(c["color"]) for c in json.loads((root / "dataset.json").read_text())["classes"]]


@pytest.mark.parametrize("source", ["argument", "dataset.json", "palette of the masks"])
def test_colours_go_out_and_come_home(tmp_path, source):
    "Of every class but the background, which no tool wants as an object"
    names, colours, mask = ["background", "sky", "tree"], [(9, 9, 9), (10, 200, 30), (0, 0, 250)], np.array([[0, 1], [2, 255]], np.uint8)
    picture(tmp_path / "photos/a.png", size=(2, 2))
    file = Image.fromarray(mask)
    if source == "palette of the masks": file.putpalette(bytes(np.array(colours + [(0, 0, 0)] * 253, np.uint8)))
    (tmp_path / "out/masks").mkdir(parents=True)
    file.save(tmp_path / "out/masks/a.png")
    if source == "dataset.json": (tmp_path / "out/dataset.json").write_text(json.dumps({"classes": [{"name": n, "color": c} for n, c in zip(names, colours)]}))
    given = {"colours": colours} if source == "argument" else {}
    path = export_coco(tmp_path / "out/masks", tmp_path / "photos/back.json", None if source == "dataset.json" else names, **given)
    assert [c.get("color") for c in json.loads(path.read_text())["categories"]] == [[10, 200, 30], [0, 0, 250], None]
    import_annotations(tmp_path / "photos", tmp_path / "home")
    assert colours_in(tmp_path / "home") == [(0, 0, 0), (10, 200, 30), (0, 0, 250)]
    assert Image.open(tmp_path / "home/masks/a.png").getpalette()[3:9] == [10, 200, 30, 0, 0, 250]


def test_a_colour_that_two_classes_have_is_given_to_the_first_alone(tmp_path):
    picture(tmp_path / "photos/a.png", size=(2, 2))
    export_coco({"a": np.array([[0, 1], [2, 3]], np.uint8)}, tmp_path / "photos/x.json", list("abcd"), colours=[(5, 5, 5), (0, 0, 0), (7, 7, 7), (7, 7, 7)])
    import_annotations(tmp_path / "photos", tmp_path / "home")
    found = colours_in(tmp_path / "home")
    assert [(5, 5, 5), (0, 0, 0), (7, 7, 7)] == found[1:4] and len(set(found)) == len(found) == 5, "black was the background's, before a class claimed it"


@pytest.mark.parametrize("colours", [[(1, 2, 3)], [(1, 2, 3), (1, 2, 256)], "red"])
def test_colours_that_are_none_are_refused(tmp_path, colours):
    with pytest.raises(UserError, match="should be one .red, green, blue. with values 0 to 255 for each of the 2 classes"):
        export_coco({"a": np.zeros((2, 2), np.uint8)}, tmp_path / "x.json", ["background", "sky"], colours=colours)


def test_wrong_masks_are_not_exported(tmp_path):
    with pytest.raises(UserError, match="holds the value 7, but there are 5 classes"): export_coco({"a": np.full((3, 3), 7)}, tmp_path / "x.json", NAMES)
    with pytest.raises(UserError, match="needs the names of the classes"): export_coco({"a": np.zeros((3, 3))}, tmp_path / "x.json")
    with pytest.raises(UserError, match="holds no mask"): export_coco(tmp_path, tmp_path / "x.json", NAMES)
    with pytest.raises(UserError, match="form 'box' is not known"): export_coco({}, tmp_path / "x.json", NAMES, form="box")
    assert not (tmp_path / "x.json").exists()


# ---------------------------------------------------------------- damaged exports
ODD = [None, -1, 0, 3, "x", "", [], {}, True, 1e300, float("nan"), float("inf"), 10**17, 10**30, "../../a.png", [[]], 1.5, -0.5, [1, 2], "scene 1.png", "é\ud800"]
WORDS = ["nan", "-5", "1e999", "", "abc", "99999999999", "1.5", "-0", "\x00", "é", "0", "<", '"', ","]


def places(value, path=()):
    "Every path into a JSON value"
    yield path
    rows = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in rows: yield from places(inner, (*path, key))


def damaged_json(value, rng):
    "The value with one to three entries replaced, lost or doubled"
    for _ in range(rng.randint(1, 3)):
        path = rng.choice([p for p in places(value) if p] or [None])
        if path is None: return rng.choice(ODD)
        at = value
        for key in path[:-1]: at = at[key]
        how = rng.random()
        if how < 0.7: at[path[-1]] = json.loads(json.dumps(rng.choice(ODD)))
        elif how < 0.85: del at[path[-1]]
        elif isinstance(at, list): at.insert(path[-1], json.loads(json.dumps(at[path[-1]])))
    return value


def damage(root, rng):
    "Spoil one file of an export"
    files = sorted(p for p in root.rglob("*") if p.is_file())
    path = rng.choice([p for p in files if p.suffix not in (".png", ".jpg")] or files) if rng.random() < 0.8 else rng.choice(files)
    data, how = path.read_bytes(), rng.random()
    if how < 0.08: path.unlink()
    elif how < 0.16: path.write_bytes(data[:rng.randrange(len(data))])
    elif how < 0.2: path.rename(path.with_name(rng.choice(["other.png", "b.json", "ü x.txt"])))
    elif path.suffix == ".json" and how < 0.9: path.write_text(json.dumps(damaged_json(json.loads(data), rng), ensure_ascii=True))
    elif path.suffix in (".png", ".jpg") and how < 0.6: Image.new(rng.choice(["RGB", "L", "I;16", "F", "RGBA"]), (rng.randint(1, 30), 12)).save(path, format="TIFF")
    else:
        text = data.decode("latin-1")
        spans = [m.span() for m in re.finditer(r"[\w.#-]+", text)]
        for a, b in sorted(rng.sample(spans, min(len(spans), rng.randint(1, 2))), reverse=True): text = text[:a] + rng.choice(WORDS) + text[b:]
        path.write_bytes(text.encode("latin-1"))


def import_of_damaged(tmp_path, number):
    "True when it was imported; an error other than `UserError` fails the test"
    rng = random.Random(number)
    tool = list(TOOLS)[number % len(TOOLS)]
    source, target = tmp_path / f"s{number}", tmp_path / f"t{number}"
    shutil.copytree(tmp_path / tool, source)
    damage(source, rng)
    try: report = import_annotations(source, target, kind=rng.choice([None, None, tool.partition(",")[0]]))
    except UserError as e:
        assert re.search(r"[.)]$", str(e)) and "Traceback" not in str(e) and len(str(e)) < 900, str(e)
        assert not target.exists() and not list(tmp_path.glob(".*"))
        return False
    assert classes_as_loaded(target) == class_names(report) and len(str(report)) > 50
    for c in report.classes: assert c["pixels"] >= 0
    shutil.rmtree(target)
    shutil.rmtree(source)
    return True


def small_exports(tmp_path):
    small = {n: (i[:12, :14], m[:12, :14]) for n, (i, m) in list(scene_pictures(3).items())[:3]}
    small["scene 2"][1][2:6, 2:6] = 3
    for tool, write in TOOLS.items():
        (tmp_path / tool).mkdir()
        write(tmp_path / tool, small)


def test_damaged_exports_are_one_sentence_or_a_right_import(tmp_path):
    small_exports(tmp_path)
    imported = [import_of_damaged(tmp_path, number) for number in range(200)]
    assert 30 < sum(imported) < 170, "some damage is harmless, most is not"


def test_a_run_has_the_same_score_whichever_tool_wrote_the_masks(tmp_path):
    scores = {}
    for tool in ("coco", "labelme", "cvat", "yolo", "masks, colours"):
        source, target = tmp_path / f"{tool} source", tmp_path / tool
        source.mkdir()
        TOOLS[tool](source, PICTURES)
        import_annotations(source, target, classes=NAMES)
        task = load_task("folder", target, n_labelled=None, size=32, n_unlabelled=0)
        record = run("supervised", task, steps=3, batch_size=2, width=4, device="cpu", progress=False).record
        scores[tool] = (record["result"]["miou"], record["result"]["iou_per_class"], task.labelled.masks.sum().item())
    assert len({str(s) for s in scores.values()}) == 1, scores
