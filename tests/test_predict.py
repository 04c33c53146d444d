"From files to masks: scale, windows, formats, order of files, resume, what is refused; a large picture in little memory"
import importlib.util
import io
import json
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from semiseg_nb import large_pictures, predict
from semiseg_nb.catalogue import load_task
from semiseg_nb.checkpoint import read_weights, save_weights
from semiseg_nb.core import UserError
from semiseg_nb.experiment import run
from semiseg_nb.large_pictures import LargePicture, SmallPicture, open_raster
from semiseg_nb.models import build_model
from semiseg_nb.pictures import read_image
from semiseg_nb.predict import Predictor, enlarged, find_jobs, load_model, predict_files, windows

ROOT = Path(__file__).resolve().parents[1]
geo_only = pytest.mark.skipif(not importlib.util.find_spec("rasterio"), reason="the extra [geo] is not installed")
PALETTE = [[0, 0, 0], [200, 0, 0], [0, 0, 200]]


def card(rule="native", training=(16, 16), n=3, **reading):
    return {"classes": [f"class {i}" for i in range(n)], "palette": PALETTE[:n], "reading": reading, "size": {"rule": rule, "training": list(training)},
            "network": {"model": "unet", "encoder": None, "width": 2, "n_classes": n, "mean": [0.5, 0.5, 0.5]}}


class Brightest(nn.Module):
    "Three classes told by single pixels: class 0 where red is brightest, 1 green, 2 blue"
    def __init__(self, sharp=40.0):
        super().__init__()
        self.sharp = nn.Parameter(torch.tensor(sharp))

    def forward(self, x): return self.sharp * x


class Surroundings(nn.Module):
    "Looks at everything around a pixel, as far as 9 away: an edge of a window changes it"
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 19, padding=9)

    def forward(self, x): return 30 * self.conv(x)


def colours(h, w, seed=0): return torch.randint(0, 256, (3, h, w), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
def save(x, path, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x.permute(1, 2, 0).numpy()).save(path, **how)
    return x


def mask_of(path): return torch.from_numpy(np.array(Image.open(path)))
def brightest(x): return x.argmax(0).byte()
def quiet(model, sources, out, **more): return predict_files(model, sources, out, progress=False, **more)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs")
    task = load_task("scenes", n_labelled=6, size=32, n_unlabelled=0, n_tune=0)
    return task, run("supervised", task, steps=3, batch_size=4, width=4, device="cpu", progress=False, out_dir=out, data={"size": 32})


# ---------------------------------------------------------------- load_model

def test_a_run_is_loaded_in_one_line_from_wherever_it_lies(trained, tmp_path):
    task, result = trained
    x = task.val.images[:3]
    with torch.no_grad(): z = result.method.eval().predict(x.float() / 255)
    for place in (result.folder, result.folder.parent, result.folder / "weights.safetensors", str(result.folder)):
        model = load_model(place, "cpu")
        said = model(x)
        assert torch.equal(said.labels, z.argmax(1).byte()) and model.classes == task.classes and model.palette == task.palette
        torch.testing.assert_close(said.confidence, z.softmax(1).amax(1))
    (tmp_path / "best").mkdir()
    (tmp_path / "best/weights.safetensors").write_bytes((result.folder / "weights.safetensors").read_bytes())
    assert load_model(tmp_path, "cpu").fingerprint == model.fingerprint and model.card["scores"]["images"] == 200


def test_what_cannot_be_loaded_is_said_in_one_sentence(trained, tmp_path, monkeypatch):
    for name in ("one", "two"): save_weights(nn.Conv2d(1, 1, 1), tmp_path / name / "weights", {})
    with pytest.raises(UserError, match=r"holds 2 runs \(one, two\): give the folder of one"): load_model(tmp_path)
    with pytest.raises(UserError, match="has no card from which its network can be built"): load_model(tmp_path / "one")
    with pytest.raises(UserError, match="There is no '.*nowhere'"): load_model(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no finished run"): load_model(tmp_path / "empty")
    save_weights(nn.Conv2d(1, 1, 1), tmp_path / "gan", {"why not": "it predicts with two networks"})
    with pytest.raises(UserError, match="cannot be built from its card: it predicts with two networks"): load_model(tmp_path / "gan.safetensors")
    save_weights(nn.Conv2d(1, 1, 1), tmp_path / "other", card())
    with pytest.raises(UserError, match="holds another network"): load_model(tmp_path / "other.safetensors")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="PyTorch sees no GPU"): load_model(trained[1].folder, "cuda")


@pytest.mark.parametrize("path", sorted((ROOT / "nbs/weights").glob("*.safetensors")), ids=lambda p: p.stem)
def test_stored_weights_of_lessons_are_refused_in_words(path):
    with pytest.raises(UserError, match="has no card from which its network can be built"): load_model(path, "cpu")


# ---------------------------------------------------------------- scale

def test_native_images_stay_and_others_are_resized_as_training_did():
    native, squash, letter, crop = (Predictor(Brightest(), c) for c in (card(), card("resize"), card("resize", fit="letterbox"), card("resize", fit="crop")))
    assert [m.working_size((20, 40)) for m in (native, squash, letter, crop)] == [(20, 40), (16, 16), (8, 16), (16, 32)]


def test_a_resized_image_is_that_of_training_and_its_logits_are_enlarged(tmp_path):
    net, x = build_model("unet", 3, width=2).eval(), save(colours(50, 71), tmp_path / "x.png")
    said = Predictor(net, card("resize"))(tmp_path / "x.png")
    small = read_image(tmp_path / "x.png", size=(16, 16))
    with torch.no_grad(): z = F.interpolate(net(small[None].float() / 255), (50, 71), mode="bilinear", align_corners=False)[0]
    assert torch.equal(said.labels, z.argmax(0).byte()) and said.labels.shape == x.shape[1:]
    torch.testing.assert_close(said.confidence, z.softmax(0).amax(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(7, 9), (40, 33), (3, 100), (16, 16)])
def test_bands_of_enlarged_logits_are_those_of_the_whole(size, monkeypatch):
    z = torch.randn(3, 11, 13, generator=torch.Generator().manual_seed(0))
    whole = F.interpolate(z[None], size, mode="bilinear", align_corners=False)[0].softmax(0).amax(0)
    monkeypatch.setattr(predict, "SMALL", 20)
    bands = list(enlarged(z, size))
    assert len(bands) > 1
    torch.testing.assert_close(torch.cat([b.confidence for b in bands]), whole)


def test_everything_that_is_an_image_gives_the_same():
    model, x = Predictor(Brightest(), card()), colours(9, 14)
    array = x.permute(1, 2, 0).numpy()
    turned = io.BytesIO()
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.rot90(array)).save(turned, "PNG", exif=exif)
    for image in (x, array, Image.fromarray(array), Image.open(turned)): assert torch.equal(model(image).labels, brightest(x))
    assert model(torch.stack([x, x])).labels.shape == (2, 9, 14) and model(array[..., 0]).labels.shape == (9, 14)
    for wrong in (x.float(), x[:2], np.zeros((3, 3, 3, 3), np.uint8), 7):
        with pytest.raises(UserError, match=r"The image is .*, but should be uint8 \(3,H,W\)"): model(wrong)


def test_the_mirrored_image_counts_half():
    net, x = build_model("unet", 3, width=2).eval(), colours(16, 24)
    model = Predictor(net, card())
    z, mirrored = model.logits(x[None]), model.logits(x.flip(-1)[None])
    torch.testing.assert_close(model(x, flip=True).confidence, ((z + mirrored.flip(-1)) / 2)[0].softmax(0).amax(0))


# ---------------------------------------------------------------- windows

@pytest.mark.parametrize(("length", "tile", "overlap"), [(100, 40, 0.25), (41, 40, 0.5), (40, 40, 0.5), (7, 40, 0.75), (101, 30, 0.0), (1, 1, 0.75), (73, 24, 0.75)])
def test_windows_cover_an_axis_and_their_weights_add_up(length, tile, overlap):
    starts, weights = windows(length, tile, overlap)
    total, size = torch.zeros(length), min(tile, length)
    for a, w in zip(starts, weights):
        assert 0 <= a and a + size <= length
        total[a:a + size] += w
    torch.testing.assert_close(total, torch.ones(length))
    shared = [a + size - b for a, b in zip(starts, starts[1:])]
    assert all(s >= int(overlap * size) - 1 for s in shared)


@pytest.mark.parametrize("overlap", [0, 0.25, 0.6])
@pytest.mark.parametrize("size", [(50, 70), (16, 33), (15, 9)])
def test_blended_windows_are_the_sum_of_weighted_probabilities(size, overlap):
    model, x = Predictor(Surroundings(), card()), colours(*size)
    said = model(x, tile=16, overlap=overlap)
    p = torch.zeros(3, *size)
    for top, wy in zip(*windows(size[0], 16, overlap)):
        for left, wx in zip(*windows(size[1], 16, overlap)):
            part = x[:, top:top + 16, left:left + 16]
            p[:, top:top + 16, left:left + 16] += model.logits(part[None])[0].softmax(0) * wy[:, None] * wx
    torch.testing.assert_close(p.sum(0), torch.ones(size), atol=1e-5, rtol=0)
    torch.testing.assert_close(said.confidence, p.amax(0), atol=1e-5, rtol=0)
    assert float((said.labels == p.argmax(0)).float().mean()) > 0.999


def test_overlap_cures_seams():
    model, x = Predictor(Surroundings(), card()), colours(96, 96)
    whole, cut, blended = model(x).labels, model(x, tile=32, overlap=0).labels, model(x, tile=32, overlap=0.5).labels
    assert (blended != whole).float().mean() < 0.8 * (cut != whole).float().mean()


def test_a_picture_too_large_for_one_pass_is_cut_by_itself(monkeypatch):
    model, x = Predictor(Brightest(), card()), colours(60, 50)
    monkeypatch.setattr(predict, "SMALL", 1000)
    assert model.tile_of((60, 50), None) == 512 and model.tile_of((20, 20), None) is None
    assert Predictor(Brightest(), card("resize")).tile_of((60, 50), None) is None, "it is resized: the network sees little"
    assert torch.equal(model(x).labels, brightest(x))


# ---------------------------------------------------------------- large files

@pytest.fixture
def large(monkeypatch):
    "Every file is large, and no library but tifffile helps"
    for module in (large_pictures, predict): monkeypatch.setattr(module, "SMALL", 900)
    monkeypatch.setattr(large_pictures, "IN_MEMORY", 100)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr(large_pictures, "rasterio_or_none", lambda: None)


def test_a_large_file_is_predicted_as_a_small_one(large, tmp_path):
    x = save(colours(61, 47), tmp_path / "in/x.tif")
    for rule in ("native", "resize"):
        model = Predictor(Brightest(), card(rule))
        said = quiet(model, tmp_path / "in", tmp_path / rule)
        assert said.done == ["x"] and not said.failed
        Image.MAX_IMAGE_PIXELS = None
        labels, shown = mask_of(tmp_path / rule / "masks/x.png"), Image.open(tmp_path / rule / "overlays/x.jpg")
        Image.MAX_IMAGE_PIXELS = 100
        assert labels.shape == (61, 47) and shown.size == (47, 61)
        if rule == "native": assert torch.equal(labels, brightest(x))


@pytest.mark.slow
def test_the_memory_of_a_large_picture_is_bounded(tmp_path):
    "36 million pixels are 108 MB as bytes and 432 MB as probabilities of three classes: they cost less than 120 MB"
    code = f"""
import resource, sys, torch
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}, {str(ROOT / 'benchmarks')!r}]
from predict import write_tiff
from test_predict import Brightest, Predictor, card, quiet
write_tiff('x.tif', 6000)
model = Predictor(Brightest(), card())
model(torch.zeros(3, 512, 512, dtype=torch.uint8))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert quiet(model, 'x.tif', 'out', batch_size=1).done == ['x']
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split()[-1]) < 120


# ---------------------------------------------------------------- files

@pytest.fixture
def photos(tmp_path):
    "Two sizes, two names that are equal but for the ending, one in a subfolder, one on its side, one broken"
    root, x = tmp_path / "photos", {}
    x["a"] = save(colours(12, 20, 1), root / "a.png")
    x["sub/a"] = save(colours(12, 20, 2), root / "sub/a.png")
    x["b.png"] = save(colours(9, 9, 3), root / "b.png")
    x["b.bmp"] = save(colours(12, 20, 4), root / "b.bmp")
    exif = Image.Exif()
    exif[274] = 6
    x["side"] = colours(20, 12, 5)
    Image.fromarray(np.rot90(x["side"].permute(1, 2, 0).numpy())).save(root / "side.png", exif=exif)
    (root / "broken.png").write_bytes((root / "a.png").read_bytes()[:80])
    (root / "notes.txt").write_text("no picture")
    save(colours(4, 4), root / ".hidden/h.png")
    return root, x


def test_a_folder_becomes_masks_overlays_and_confidence(photos, tmp_path):
    root, x = photos
    said = quiet(Predictor(Brightest(), card()), root, tmp_path / "out", batch_size=2)
    assert sorted(said.done) == sorted(x) and list(said.failed) == [str(root / "broken.png")] and "NOT READ" in str(said)
    for name, pixels in x.items():
        mask = Image.open(tmp_path / f"out/masks/{name}.png")
        assert torch.equal(torch.from_numpy(np.array(mask)), brightest(pixels)) and mask.mode == "P" and mask.getpalette()[:9] == [c for rgb in PALETTE for c in rgb]
        confidence = mask_of(tmp_path / f"out/confidence/{name}.png")
        expected = (40 * pixels.float() / 255).softmax(0).amax(0)
        assert (confidence.float() / 255 - expected).abs().max() <= 0.003
        assert np.array(Image.open(tmp_path / f"out/overlays/{name}.jpg")).shape == (*pixels.shape[1:], 3)
    found = {p.relative_to(tmp_path / "out/masks").as_posix() for p in (tmp_path / "out/masks").rglob("*.png")}
    assert found == {f"{name}.png" for name in x} and not list((tmp_path / "out").rglob("*.tmp"))


def test_the_same_call_goes_on_and_another_model_is_refused(photos, tmp_path):
    root, x = photos
    model, out = Predictor(Brightest(), card()), tmp_path / "out"
    quiet(model, root / "a.png", out, overlays=False, confidence=False)
    assert {p.name for p in out.iterdir()} == {"masks", "predictions.jsonl"}
    stamp = (out / "masks/a.png").stat().st_mtime_ns
    with open(out / "predictions.jsonl", "a") as f: f.write('{"name": "b.p')  # cut while it wrote
    said = quiet(model, root, out, overlays=False, confidence=False)
    assert said.skipped == ["a"] and len(said.done) == 4 and (out / "masks/a.png").stat().st_mtime_ns == stamp
    assert len(quiet(model, root, out, overlays=False, confidence=False).skipped) == 5
    assert len(quiet(model, root, out).done) == 5, "overlays are wanted now"
    save(colours(12, 20, 9), root / "a.png")
    (out / "masks/sub/a.png").unlink()
    assert sorted(quiet(model, root, out).done) == ["a", "sub/a"], "a file that changed, and one whose mask is gone"
    for other, more in ((Predictor(Brightest(3.0), card()), {}), (model, {"flip": True}), (model, {"tile": 8})):
        with pytest.raises(UserError, match="holds predictions of another model, or made in another way"): quiet(other, root, out, **more)


def test_inputs_are_never_overwritten(photos, tmp_path):
    root, _ = photos
    model = Predictor(Brightest(), card())
    before = {p: p.read_bytes() for p in root.rglob("*.*") if p.is_file()}
    with pytest.raises(UserError, match="is the folder of the pictures"): quiet(model, root, root)
    with pytest.raises(UserError, match="lies in the folder out"): quiet(model, root / "a.png", root)
    with pytest.raises(UserError, match="lies in the folder out"): quiet(model, root / "sub", tmp_path)
    mask = tmp_path / "set/masks/a.png"
    save(colours(4, 4), mask)
    with pytest.raises(UserError, match="set/masks' is there already, and holds no predictions of ours"): quiet(model, root, tmp_path / "set")
    first, again = quiet(model, root, root / "out"), quiet(model, root, root / "out")
    assert len(first.done) == 5 == len(again.skipped) and not again.done, "a folder inside is left out"
    assert all(p.read_bytes() == data for p, data in before.items())


def test_sources_are_files_folders_and_patterns(photos, tmp_path):
    root, _ = photos
    def names(sources): return [j.name for j in find_jobs(sources, tmp_path / "out")]
    assert names(root / "sub") == ["a"] and names(root / "a.png") == ["a"] and names(str(root / "*.bmp")) == ["b"]
    assert names([root / "sub", root / "a.png"]) == ["sub/a", "a"] and names([root / "a.png", root / "a.png"]) == ["a"]
    assert sorted(names(str(root / "**/a.png"))) == ["a", "sub/a"]
    for wrong, said in (([], "There is no source"), (root / "lost.png", "does not exist"), (str(root / "*.webp"), "holds no picture"), (tmp_path / "photos/sub/a.png/x", "does not exist")):
        with pytest.raises(UserError, match=said): names(wrong)
    save(colours(4, 4), tmp_path / "set/images/i.png")
    save(colours(4, 4), tmp_path / "set/masks/i.png")
    assert names(tmp_path / "set") == ["i"], "masks of a data set are no pictures"


def test_a_full_disk_stops_with_a_sentence(photos, tmp_path, monkeypatch):
    def full(*a, **k): raise OSError(28, "No space left on device")
    monkeypatch.setattr(predict, "write_png", full)
    with pytest.raises(UserError, match="No space left on device.*free some space"): quiet(Predictor(Brightest(), card()), photos[0], tmp_path / "out")


def test_polygons_are_asked_of_the_module_that_knows_them(photos, tmp_path, monkeypatch):
    calls = []
    module = types.ModuleType("semiseg_nb.annotations")
    module.export_coco = lambda *given, **more: calls.append((*given, more))
    monkeypatch.setitem(sys.modules, "semiseg_nb.annotations", module)
    quiet(Predictor(Brightest(), card()), photos[0], tmp_path / "out", coco=True)
    masks, path, classes, more = calls[0]
    assert set(masks) == set(photos[1]) and all(p.is_file() for p in masks.values()) and path == tmp_path / "out/coco.json"
    assert classes == ("class 0", "class 1", "class 2") and more == {"images": photos[0]}


def test_a_path_is_a_model_and_arguments_are_checked(trained, photos, tmp_path):
    _, result = trained
    said = quiet(result.folder, photos[0] / "a.png", tmp_path / "out", device="cpu")
    assert said.done == ["a"] and mask_of(tmp_path / "out/masks/a.png").shape == (12, 20)
    known = json.loads((tmp_path / "out/predictions.jsonl").read_text().splitlines()[0])
    assert known["classes"] == list(read_weights(result.folder / "weights")[1]["classes"])
    for wrong, text in ((dict(batch_size=0), "batch_size is 0"), (dict(overlap=0.9), "overlap is 0.9.*between 0 and 0.75"), (dict(tile=-1), "tile is -1"), (dict(flipp=True), "flipp")):
        with pytest.raises(UserError, match=text): quiet(result.folder, photos[0], tmp_path / "out2", **wrong)


def write_geo(path, x, **more):
    "A GeoTIFF of UTM zone 32 N, half a metre a pixel; its place"
    import rasterio
    from rasterio.transform import from_origin
    place = dict(crs="EPSG:32632", transform=from_origin(500000, 5300000, 0.5, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = dict(driver="GTiff", width=x.shape[2], height=x.shape[1], count=len(x), dtype=str(x.dtype), tiled=True, blockxsize=16, blockysize=16, compress="lzw")
    with rasterio.open(path, "w", **profile, **place, **more) as f: f.write(x)
    return rasterio.crs.CRS.from_epsg(32632), place["transform"]


@geo_only
@pytest.mark.parametrize("most", [2**25, 100], ids=["in memory", "by rows"])
def test_a_georeferenced_tiff_keeps_its_place(tmp_path, monkeypatch, most):
    import rasterio
    x = colours(70, 90)
    place = write_geo(tmp_path / "in/x.tif", x.numpy())
    monkeypatch.setattr(large_pictures, "IN_MEMORY", most)
    said = quiet(Predictor(Brightest(), card()), tmp_path / "in", tmp_path / "out", tile=32)
    assert isinstance(open_raster(tmp_path / "in/x.tif"), SmallPicture if most > 100 else LargePicture) and not said.failed
    with rasterio.open(tmp_path / "out/masks/x.tif") as f:
        assert (f.crs, f.transform, f.nodata) == (*place, 255) and f.colormap(1)[1] == (200, 0, 0, 255)
        assert torch.equal(torch.from_numpy(f.read(1)), brightest(x))
    with rasterio.open(tmp_path / "out/confidence/x.tif") as f: assert (f.crs, f.transform, f.nodata) == (*place, None)


@geo_only
def test_without_the_extra_a_note_says_what_is_missing(tmp_path, monkeypatch):
    write_geo(tmp_path / "in/x.tif", colours(70, 90).numpy())
    for module in (large_pictures, predict): monkeypatch.setattr(module, "rasterio_or_none", lambda: None)
    said = quiet(Predictor(Brightest(), card()), tmp_path / "in", tmp_path / "plain")
    assert "semiseg_nb[geo]" in str(said) and (tmp_path / "plain/masks/x.png").is_file()


@geo_only
@pytest.mark.parametrize("rule", ["native", "resize"])
@pytest.mark.parametrize("most", [2**25, 100], ids=["in memory", "by rows"])
@pytest.mark.parametrize("kind", ["value", "nan", "alpha"])
def test_pixels_without_data_have_no_label_and_no_confidence(tmp_path, monkeypatch, kind, most, rule):
    import rasterio
    x, more = colours(70, 90).numpy(), {}
    empty = np.zeros((70, 90), bool)
    empty[:13, 40:] = empty[66:] = empty[30, 30] = True
    a = x.clip(1, 254)
    if kind == "nan":
        a, more = a.astype(np.float32), {"nodata": float("nan")}
        a[:, empty] = np.nan
    elif kind == "value": a[:, empty], more = 0, {"nodata": 0}
    else: a, more = np.concatenate([a, np.where(empty, 0, 255)[None].astype(np.uint8)]), {"photometric": "RGB", "alpha": "yes"}
    place = write_geo(tmp_path / "in/x.tif", a, **more)
    monkeypatch.setattr(large_pictures, "IN_MEMORY", most)
    model = Predictor(Brightest(), card(rule, training=(70, 90)))
    said = quiet(model, tmp_path / "in", tmp_path / "out")
    assert said.done == ["x"] and not said.failed
    truth = torch.where(torch.from_numpy(empty), 255, brightest(torch.from_numpy(x.clip(1, 254))))
    with rasterio.open(tmp_path / "out/masks/x.tif") as f:
        assert (f.crs, f.transform, f.nodata) == (*place, 255)
        assert torch.equal(torch.from_numpy(f.read(1)), truth.byte()) and np.array_equal(f.read_masks(1) == 0, empty)
    with rasterio.open(tmp_path / "out/confidence/x.tif") as f: assert np.array_equal(f.read(1) == 0, empty)
    one = model(tmp_path / "in/x.tif")
    assert torch.equal(one.labels, truth.byte()) and np.array_equal(one.confidence == 0, empty)


@geo_only
def test_a_mask_without_a_place_holds_255_with_a_colour(tmp_path):
    import rasterio
    x = colours(20, 30).clip(1).numpy()
    x[:, :5] = 0
    with rasterio.open(tmp_path / "x.tif", "w", driver="GTiff", width=30, height=20, count=3, dtype="uint8", nodata=0) as f: f.write(x)
    quiet(Predictor(Brightest(), card()), tmp_path / "x.tif", tmp_path / "out")
    mask = Image.open(tmp_path / "out/masks/x.png")
    labels = np.array(mask)
    assert (labels[:5] == 255).all() and (labels[5:] < 3).all() and mask.getpalette()[3 * 255:] == [150] * 3
