"""What single tools write: names that are looked up, shapes filled by hand, what is refused and with which remedy."""
import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from semiseg_nb.core import UserError
from semiseg_nb.formats import READERS, tool_kinds
from semiseg_nb.tool_files import ToolFiles, as_colour


def image(path, size=(8, 6), **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(path, **more)
    return path


def drawn(export, shape=(6, 8), number=0):
    "Objects of one picture, later over earlier, as places in the names"
    canvas = np.full(shape, -1)
    for s in export.pictures[number].shapes:
        region, _ = s.fill(shape)
        h, w = region.mask.shape
        canvas[region.top:region.top + h, region.left:region.left + w][region.mask] = export.names.index(s.name)
    return canvas


def picture(text, names="#o"): return np.array([[names.find(c) for c in line] for line in text.split()])


def written(tmp_path, name, content):
    image(tmp_path / "a.png")
    (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return ToolFiles(tmp_path)


# ---------------------------------------------------------------- names
def test_a_name_is_looked_up_by_as_many_folders_as_fit(tmp_path):
    for name in ("x/a.png", "y/a.png", "y/Ä b.png", ".hidden/c.png", "__MACOSX/c.png"): image(tmp_path / name)
    source = ToolFiles(tmp_path)
    assert source.find("data/elsewhere/y/a.png") == tmp_path / "y/a.png" == source.find("C:\\photos\\y\\A.PNG")
    assert source.find("A\u0308 b.png") == tmp_path / "y/Ä b.png" == source.find("ä b.jpg"), "another form of the same letter, another ending"
    assert source.find("c.png") is None and source.find("../../etc/passwd") is None and source.find("") is None and source.find("..") is None
    with pytest.raises(UserError, match="'a.png' can be .*x.a.png' or .*y.a.png': keep one"): source.find("a.png")


def test_a_split_settles_which_file_is_meant(tmp_path):
    for split in ("train", "val"): image(tmp_path / split / "a.png")
    assert ToolFiles(tmp_path).find("a.png", "val") == tmp_path / "val/a.png"


@pytest.mark.parametrize("value, colour", [("#0a0B0c", (10, 11, 12)), ("1, 2,3", (1, 2, 3)), ([1, 2, 3], (1, 2, 3)), ((1, 2, 256), None), ("red", None), (None, None), ([1, 2], None)])
def test_colours_in_three_forms(value, colour): assert as_colour(value) == colour


# ---------------------------------------------------------------- COCO
def coco(segmentation, **more):
    row = {"id": 5, "image_id": 1, "category_id": 2, "segmentation": segmentation} | more
    return {"images": [{"id": 1, "file_name": "a.png", "height": 6, "width": 8}], "categories": [{"id": 2, "name": "x"}], "annotations": [row]}


def test_coco_parts_and_holes(tmp_path):
    source = written(tmp_path, "e.json", coco([[0, 0, 5, 0, 5, 5, 0, 5], [1, 1, 4, 1, 4, 4, 1, 4], [6, 0, 8, 0, 8, 2, 6, 2]]))
    assert (drawn(READERS["coco"](source)) == picture("#####.## #...#.## #...#... #...#... #####... ........")).all()


@pytest.mark.parametrize("change, says", [
    (coco([]), "has no segmentation, and a box does not tell"), (coco([[1, 2, 3]]), "no list of pairs"), (coco("x"), "gives 'segmentation' as 'x'"),
    (coco([[0, 0, 1, 1, 2, 2]], category_id=9), "the category 9, which is not in the list"), (coco([[0, 0, 1, 1, 2, 2]], image_id=9), "the image 9, which it does not list"),
    (coco([[0, 0, 1, 1, 2, 2]]) | {"images": [{"id": 1, "file_name": "b.png"}]}, "lists 1 image.s., 'b.png' the first, but none of them is there"),
    (coco([[0, 0, 1, 1, 2, 2]]) | {"images": [{"id": 1, "file_name": "a.png", "height": 0, "width": 8}]}, "is 8 x 0 pixels: no image is"),
    (coco([[0, 0, 1, 1, 2, 2]]) | {"categories": [{"id": 2, "name": "x"}, {"id": 2, "name": "y"}]}, "calls the category 2 'y', but it is 'x' as well"),
    (coco([[0, 0, 1, 1, 2, 2]]) | {"categories": [2]}, "entry 0 of 'categories' as 2"), ({"images": 5, "annotations": [], "categories": []}, "gives 'images' as 5"),
])
def test_what_coco_may_not_hold(tmp_path, change, says):
    with pytest.raises(UserError, match=says): READERS["coco"](written(tmp_path, "e.json", change))


@pytest.mark.parametrize("segmentation, says", [
    ({"size": [8, 6], "counts": [48]}, "are for the size"), ({"size": [6, 8], "counts": [47]}, "count 47 pixels"), ({"size": [6, 8], "counts": "a b"}, "holds no run lengths"),
    ({"counts": [48]}, "are for the size None"), ([[0, 0, 1, 1, None, 2]], "no list of points"), ([[0, 0, 1, 1, 1e9, 2]], "leaves every image"),
])
def test_what_coco_may_not_draw(tmp_path, segmentation, says):
    export = READERS["coco"](written(tmp_path, "e.json", coco(segmentation)))
    with pytest.raises(UserError, match=says): drawn(export)


# ---------------------------------------------------------------- LabelMe
def labelme(*shapes, **more): return {"shapes": list(shapes), "imagePath": "a.png", "imageHeight": 6, "imageWidth": 8} | more


def test_labelme_shapes(tmp_path):
    file = io.BytesIO()
    Image.fromarray(np.array([[1, 0], [0, 1]], bool)).save(file, "PNG")
    shapes = [{"label": "o", "shape_type": "rectangle", "points": [[7, 3], [5, 0]]}, {"label": "x", "shape_type": "circle", "points": [[2, 3], [2, 4.2]]},
              {"label": "x", "shape_type": "mask", "points": [[6, 4], [7, 5]], "mask": base64.b64encode(file.getvalue()).decode()},
              {"label": "x", "shape_type": "line", "points": [[0, 0], [8, 6]]}, {"label": "x", "shape_type": "point", "points": [[0, 0]]}]
    export = READERS["labelme"](written(tmp_path, "a.json", labelme(*shapes)))
    assert export.names == ["o", "x"] and "2 object(s) of the kinds line, point have no area" in export.notes[0]
    assert (drawn(export) == picture(".....oo. .....oo. .xx..oo. .xx..... ......x. .......x", "ox")).all()


def test_labels_are_numbered_over_the_whole_set(tmp_path):
    for name, labels in (("a", ["tree", "car"]), ("b", ["car", "__ignore__"])):
        image(tmp_path / f"{name}.png")
        rows = [{"label": label, "points": [[0, 0], [8, 0], [8, 6]]} for label in labels]
        (tmp_path / f"{name}.json").write_text(json.dumps(labelme(*rows, imagePath=f"{name}.png")))
    assert READERS["labelme"](ToolFiles(tmp_path)).names == ["__ignore__", "car", "tree"]
    (tmp_path / "labels.txt").write_text("__ignore__\n_background_\ntree\ncar\n")
    assert READERS["labelme"](ToolFiles(tmp_path)).names == ["__ignore__", "_background_", "tree", "car"]


@pytest.mark.parametrize("shape, says", [
    ({"label": "x", "shape_type": "circle", "points": [[1, 2]]}, "a circle of 1 point"), ({"label": "x", "shape_type": "rectangle", "points": [[1, 2], [3, None]]}, "no pair of numbers"),
    ({"label": 3, "points": []}, "gives 'label' as 3"), ({"label": "x"}, "gives 'points' as nothing"), (7, "entry 0 of 'shapes' as 7"),
    ({"label": "x", "shape_type": "mask", "points": [[0, 0], [1, 1]]}, "gives 'mask' as nothing"),
])
def test_what_labelme_may_not_hold(tmp_path, shape, says):
    with pytest.raises(UserError, match=says): READERS["labelme"](written(tmp_path, "a.json", labelme(shape)))


def test_a_mask_of_labelme_that_is_broken_or_leaves_the_image(tmp_path):
    for data, says in (("!", "no data in base64"), (base64.b64encode(b"x").decode(), "cannot be read")):
        export = READERS["labelme"](written(tmp_path, "a.json", labelme({"label": "x", "shape_type": "mask", "points": [[0, 0], [1, 1]], "mask": data})))
        with pytest.raises(UserError, match=says): drawn(export)
    file = io.BytesIO()
    Image.new("1", (5, 5), 1).save(file, "PNG")
    row = {"label": "x", "shape_type": "mask", "points": [[6, 0], [10, 4]], "mask": base64.b64encode(file.getvalue()).decode()}
    with pytest.raises(UserError, match=r"5 x 5 at \(6, 0\) leaves the image of 8 x 6"): drawn(READERS["labelme"](written(tmp_path, "a.json", labelme(row))))


# ---------------------------------------------------------------- CVAT
def cvat(*elements, labels="", attributes="width='8' height='6'"):
    return f"<annotations>{labels}<image id='0' name='a.png' {attributes}>{''.join(elements)}</image></annotations>"


def test_cvat_shapes(tmp_path):
    labels = "<meta><job><labels><label><name>o</name><color>#ff0000</color></label><label><name>x</name></label></labels></job></meta>"
    shapes = ["<box label='x' xtl='0' ytl='0' xbr='2' ybr='2'/>", "<box label='o' xtl='4' ytl='1' xbr='8' ybr='3' rotation='90'/>", "<points label='x' points='1,1'/>",
              "<mask label='x' rle='1, 1, 1, 1' left='0' top='4' width='2' height='2'/>", "<ellipse label='x' cx='3' cy='4' rx='1' ry='1.2'/>", "<tag label='sunny'/>"]
    export = READERS["cvat"](written(tmp_path, "a.xml", cvat(*shapes, labels=labels)))
    assert export.names == ["o", "x"] and export.colours == {"o": (255, 0, 0)} and "1 object(s) of the kinds points" in export.notes[0]
    assert (drawn(export) == picture("xx...oo. xx...oo. .....oo. ..xx.oo. .xxx.... .x......", "ox")).all()


@pytest.mark.parametrize("text, says", [
    (cvat("<polygon label='x' points='1,2;3'/>"), None), (cvat("<polygon label='x'/>"), "points that are no pairs"), (cvat("<box label='x' xtl='3' ytl='0' xbr='2' ybr='2'/>"), "sizes are not negative"),
    (cvat("<box label='x' xtl='nan' ytl='0' xbr='2' ybr='2'/>"), "but numbers are right"), (cvat("<mask label='x' rle='a' left='0' top='0' width='2' height='2'/>"), "an rle that is no list"),
    (cvat("<mask label='x' rle='4' left='0' top='0' width='-2' height='2'/>"), "a mask of -2 x 2"), (cvat(attributes="width='8'"), "width, height as"),
    ("<annotations><track id='0'/></annotations>", r"a.xml' holds the tracks of a video, but no image frame_000000 lies beside it: export it from CVAT with its images"), (cvat()[:-9], "no whole XML"),
    ("<!DOCTYPE x [<!ENTITY a 'b'>]>" + cvat(), "entities of its own"),
])
def test_what_cvat_may_not_hold(tmp_path, text, says):
    with pytest.raises(UserError, match=says): drawn(READERS["cvat"](written(tmp_path, "a.xml", text)))


def track(label, *elements): return f"<track id='0' label='{label}'>{''.join(elements)}</track>"
def square(frame, x, outside=0): return f"<polygon frame='{frame}' outside='{outside}' points='{x},0;{x + 2},0;{x + 2},2;{x},2'/>"
def points(frame, outside): return f"<points frame='{frame}' outside='{outside}' points='1,1'/>"
def box(frame, x): return f"<box frame='{frame}' outside='0' z_order='1' xtl='{x}' ytl='0' xbr='{x + 2}' ybr='2'/>"


def video(folder, *tracks, frames=range(6), name="frame_{:06d}.PNG"):
    for n in frames: image(folder / "images" / name.format(n), (6, 2))
    (folder / "annotations.xml").write_text(f"<annotations><version>1.1</version>{''.join(tracks)}</annotations>")
    return folder


def rows(export, n=6): return ["".join(".ob"[v + 1] for v in drawn(export, (2, 6), i)[0]) for i in range(n)]


def test_the_tracks_of_a_video(tmp_path):
    "By hand: a ball that CVAT moved through frames 0 to 2 and that leaves at 3; above it a box that is listed at 0 and 4 alone"
    ball = track("ball", square(1, 1), square(0, 0), square(2, 2), square(3, 2, outside=1))
    image(tmp_path / "images/poster.png")
    source = video(tmp_path, ball, track("box", "<attribute name='wet'>no</attribute>", box(0, 3), box(4, 0)), track("ball", points(1, 0), points(2, 1)))
    export = READERS["cvat"](ToolFiles(source))
    assert export.names == ["ball", "box"] and rows(export) == ["oo.bb.", ".oobb.", "..obb.", "...bb.", "bb....", "bb...."]
    assert [p.path.name for p in export.pictures] == [*(f"frame_{i:06d}.PNG" for i in range(6)), "poster.png"]
    assert export.pictures[-1].shapes is None and {p.group for p in export.pictures} == {None}
    said = " ".join(export.notes)
    assert "In 4 frame(s) of" in said and "is one video, whose frames look alike" in said and "1 object(s) of the kinds points" in said and not export.problems


def test_frames_of_several_videos(tmp_path):
    "Each file takes the frames in its own folder, every fifth here; the frames of one video stay together"
    for name, x in (("a", 0), ("b", 3)): video(tmp_path / name, track("ball", square(5, x)), frames=(0, 5, 10))
    export = READERS["cvat"](ToolFiles(tmp_path))
    assert rows(export) == ["......", "oo....", "oo....", "......", "...oo.", "...oo."]
    assert [p.group for p in export.pictures] == ["a"] * 3 + ["b"] * 3


def test_frames_that_are_not_there_or_there_twice(tmp_path):
    export = READERS["cvat"](ToolFiles(video(tmp_path / "a", track("ball", square(0, 0), square(9, 0, outside=1)), track("ball", square(8, 1)), frames=[0])))
    assert rows(export, 1) == ["oo...."] and export.problems == [f"1 image(s) that '{tmp_path / 'a/annotations.xml'}' lists are not there, 'frame_000008' the first: they are left out."]
    for name, says in (("photo_{:02d}.png", r"b.annotations.xml' holds the tracks of a video, but no image frame_000000 lies beside it: export it from CVAT with its images, or as"),
                       ("frame_{:02d}.png", None), ("frame_{:03d}.png", r"Frame 0 of '.*' can be '.*frame_00.png' or '.*frame_000.png': keep one")):
        source = ToolFiles(video(tmp_path / "b", track("ball", square(0, 0)), frames=[0], name=name))
        if says is None:
            assert rows(READERS["cvat"](source), 1) == ["oo...."]
            continue
        with pytest.raises(UserError, match=says): READERS["cvat"](source)
    video(tmp_path / "c", track("ball", square("'x", 0)), frames=[0])
    with pytest.raises(UserError, match="no whole XML"): READERS["cvat"](ToolFiles(tmp_path / "c"))
    video(tmp_path / "c", track("ball", square("x", 0)), frames=[0])
    with pytest.raises(UserError, match=r"Track 0 of '.*' gives frame as \['x'\], but numbers are right"): READERS["cvat"](ToolFiles(tmp_path / "c"))


# ---------------------------------------------------------------- YOLO
def test_yolo_names_and_folders(tmp_path):
    image(tmp_path / "mine/a.png")
    image(tmp_path / "theirs/b.png")
    (tmp_path / "mine/a.txt").write_text("1 0 0 0.5 0 0.5 0.5 0 0.5\n\n")
    (tmp_path / "theirs/b.txt").write_text("")
    (tmp_path / "data.yaml").write_text("train: ../mine\nval:\n - ./theirs\nnames: [o, x]\n")
    export = READERS["yolo"](ToolFiles(tmp_path))
    assert {p.path.name: p.split for p in export.pictures} == {"a.png": "train", "b.png": "val"} and export.names == ["o", "x"]
    assert (drawn(export) == picture("####.... ####.... ####.... ........ ........ ........", "o#")).all() and export.pictures[1].shapes == []
    (tmp_path / "data.yaml").unlink()
    export = READERS["yolo"](ToolFiles(tmp_path))
    assert export.names == ["0", "1"] and "no data.yaml" in export.notes[0]


@pytest.mark.parametrize("line, says", [
    ("0 0.5 0.5 0.2 0.2", "Line 2 .* is a box"), ("0 0.1 0.1 0.5 0.5", "is a box"), ("7 0 0 1 0 1 1", "has the class 7, but there are names for 0 to 1"), ("0 0 0 1 0 1", "at least three pairs"),
    ("0 0 0 1 0 nan 1", "at least three pairs"), ("0 0 0 100 0 100 100", "has the coordinate 100, but parts"), ("x 0 0 1 0 1 1", "more than numbers"), ("-1 0 0 1 0 1 1", "has the class -1"),
])
def test_what_yolo_may_not_hold(tmp_path, line, says):
    (tmp_path / "data.yaml").write_text("names: {0: o, 1: x}")
    with pytest.raises(UserError, match=says): READERS["yolo"](written(tmp_path, "a.txt", f"0 0 0 1 0 1 1\n{line}\n"))


@pytest.mark.parametrize("text", ["names: 5", "names: [1, 2]", "names: {1: a}", "names: [a", "names: &a [*a]"])
def test_a_data_yaml_that_is_wrong(tmp_path, text):
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(UserError, match="data.yaml"): READERS["yolo"](written(tmp_path, "a.txt", "0 0 0 1 0 1 1\n"))


# ---------------------------------------------------------------- Label Studio
def studio(*result, n=1, data=None, **more):
    row = {"annotations": [{"result": list(result)} | more] * n, "data": data or {"image": "/data/local-files/?d=photos/a.png"}}
    return [row]


def region(kind, **value): return {"type": kind, "original_width": 8, "original_height": 6, "value": {kind: ["x"]} | value}


def test_studio_shapes(tmp_path):
    result = [region("rectanglelabels", x=0, y=0, width=25, height=50), region("ellipselabels", x=62.5, y=50, radiusX=12.5, radiusY=20), {"type": "choices", "value": {}}]
    export = READERS["labelstudio"](written(tmp_path, "p.json", studio(*result)))
    assert (drawn(export) == picture("##...... ##...... ##..##.. ....##.. ........ ........")).all() and "kinds choices" in export.notes[0]
    assert export.pictures[0].size == (6, 8)
    undone = READERS["labelstudio"](written(tmp_path, "p.json", studio(region("polygonlabels", points=[]), was_cancelled=True)))
    assert undone.pictures[0].shapes is None, "nobody has done the task"


@pytest.mark.parametrize("tasks, says", [
    (studio(n=2), "has 2 annotations of .*: keep one"), (studio(region("brushlabels", rle="x")), "gives 'rle' as 'x'"), (studio(region("polygonlabels", points=[], polygonlabels=["x", "y"])), "but one is right"),
    (studio(region("polygonlabels", points=[]) | {"image_rotation": 90}), "on a turned image"), (studio(data={"text": "hello"}), "shows no image"), (studio(data={"image": "http://x/b.png"}), "none of them is there"),
    (studio(region("rectanglelabels", x="1", y=0, width=1, height=1)), "gives 'x' as '1'"),
])
def test_what_studio_may_not_hold(tmp_path, tasks, says):
    with pytest.raises(UserError, match=says): READERS["labelstudio"](written(tmp_path, "p.json", tasks))


# ---------------------------------------------------------------- which tool
def test_the_tool_is_recognised_by_its_files(tmp_path):
    image(tmp_path / "a.png")
    assert tool_kinds(ToolFiles(tmp_path)) == {}
    (tmp_path / "a.json").write_text(json.dumps({"some": "settings"}))
    (tmp_path / "notes.txt").write_text("1 2 3 4 5 6 7")
    (tmp_path / "a.xml").write_text("<annotation/>")
    assert tool_kinds(ToolFiles(tmp_path)) == {}, "none of these is an export"
    (tmp_path / "b.json").write_text(json.dumps(coco([])))
    (tmp_path / "b.xml").write_text(cvat())
    (tmp_path / "a.txt").write_text("0 0 0 1 0 1 1\n")
    assert tool_kinds(ToolFiles(tmp_path)).keys() == {"coco", "cvat", "yolo"}
    assert tool_kinds(ToolFiles(tmp_path, tmp_path / "b.xml")).keys() == {"cvat"}, "the user named the file"
