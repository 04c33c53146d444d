"Pictures that are read and written by rows: every layout of a TIFF, what is refused, memory, PNG"
import importlib.util
import io

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from semiseg_nb import large_pictures
from semiseg_nb.core import UserError
from semiseg_nb.large_pictures import LargePicture, SmallPicture, Spool, at_size, open_raster, overlay_picture, tiff_rows, write_png
from semiseg_nb.pictures import read_image

PALETTE = [[0, 0, 0], [200, 0, 0], [0, 0, 200]]
LAYOUTS = {"strips": {"rowsperstrip": 7}, "one strip": {"rowsperstrip": 61}, "tiles": {"tile": (16, 32)}}
CODES = {"plain": {}, "deflate": {"compression": "deflate"}, "differences": {"compression": "deflate", "predictor": 2}, "big-endian": {"byteorder": ">"}}


def numbers(*shape, kind=np.uint8, seed=0): return np.random.default_rng(seed).integers(0, 250, shape).astype(kind)


@pytest.fixture
def large(monkeypatch):
    "Every file is large, and no library but tifffile helps"
    monkeypatch.setattr(large_pictures, "IN_MEMORY", 100)
    monkeypatch.setattr(large_pictures, "SMALL", 900)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr(large_pictures, "rasterio_or_none", lambda: None)


def as_in_training(path, **reading):
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try: return read_image(path, **reading)
    finally: Image.MAX_IMAGE_PIXELS = limit


# ---------------------------------------------------------------- rows of a TIFF

@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("kind", "code"), [(kind, code) for kind in ("u1", "u2", "f4") for code in CODES if (kind, code) != ("f4", "differences")])  # which needs imagecodecs
def test_rows_of_every_layout(tmp_path, layout, code, kind):
    for n, bands, planes in ((0, 1, False), (1, 3, False), (2, 5, False), (3, 3, True)):
        a = numbers(61, 47, bands, kind=kind)
        stored = a[..., 0] if bands == 1 else a.transpose(2, 0, 1) if planes else a
        more = {"photometric": "rgb" if bands == 3 else "minisblack"} | ({"planarconfig": "separate" if planes else "contig"} if bands > 1 else {})
        tifffile.imwrite(tmp_path / f"{n}.tif", stored, **more, **LAYOUTS[layout], **CODES[code])
        rows = tiff_rows(tmp_path / f"{n}.tif")
        for top, h in ((0, 61), (0, 1), (13, 20), (60, 1)): assert np.array_equal(rows(top, h), a[top:top + h]), (bands, planes, top, h)


def test_only_the_pieces_that_rows_touch_are_decoded(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "x.tif", numbers(64, 48, 3), photometric="rgb", tile=(16, 16), compression="deflate")
    rows, found = tiff_rows(tmp_path / "x.tif"), []
    monkeypatch.setattr(tifffile.FileHandle, "seek", lambda self, place, *more, seek=tifffile.FileHandle.seek: found.append(place) or seek(self, place, *more))
    with tifffile.TiffFile(tmp_path / "x.tif") as f: starts = list(f.pages.first.dataoffsets)
    found.clear()
    rows(20, 20)
    assert [starts.index(p) for p in found if p in starts] == [3, 4, 5, 6, 7, 8]


def test_other_kinds_of_tiffs_are_left_to_others(tmp_path):
    picture = Image.fromarray(numbers(20, 30)).convert("P")
    picture.save(tmp_path / "palette.tif")
    picture.convert("1").save(tmp_path / "bits.tif")
    for name in ("palette", "bits"):
        with pytest.raises(ValueError, match="its pixels are"): tiff_rows(tmp_path / f"{name}.tif")


# ---------------------------------------------------------------- pictures

@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_large_tiff_is_opened_and_gives_windows(large, tmp_path, layout):
    a = numbers(61, 47, 3)
    tifffile.imwrite(tmp_path / "x.tif", a, photometric="rgb", compression="deflate", **LAYOUTS[layout])
    picture, x = open_raster(tmp_path / "x.tif"), torch.from_numpy(a).permute(2, 0, 1)
    assert isinstance(picture, LargePicture) and picture.size == (61, 47) and picture.place is None and picture.valid is None
    assert torch.equal(picture.window(10, 20, 30, 7), x[:, 10:40, 20:27]) and torch.equal(picture.window(10, 0, 30, 5), x[:, 10:40, :5])
    small = at_size(picture, (15, 11))
    exact = at_size(SmallPicture(x), (15, 11))
    assert small.shape == exact.shape and (small.float() - exact.float()).abs().mean() < 6


@pytest.mark.parametrize("mode", ["L", "I;16", "F"])
def test_grey_and_deep_tiffs_by_rows_are_as_in_training(large, tmp_path, mode):
    a = np.random.default_rng(0).integers(0, 4000 if mode != "L" else 256, (30, 40)).astype({"L": np.uint8, "I;16": np.uint16, "F": np.float32}[mode])
    Image.fromarray(a).save(tmp_path / "x.tif")
    for reading in ({}, {"white": 4095}) if mode != "L" else ({},):
        picture = open_raster(tmp_path / "x.tif", reading)
        assert isinstance(picture, LargePicture)
        assert torch.equal(picture.window(3, 5, 20, 30), as_in_training(tmp_path / "x.tif", **reading)[:, 3:23, 5:35])


def test_bands_are_chosen_and_levels_spread():
    a = np.random.default_rng(0).integers(0, 3000, (6, 5, 4)).astype(np.uint16)
    picture = LargePicture((6, 5), lambda top, h: a[top:top + h], white=2000, black=500, bands=[4, 2, 1])
    wanted = ((a[1:4, :, [3, 1, 0]].astype(np.float32) - 500) / 1500 * 255).clip(0, 255).round()
    assert np.array_equal(picture.window(1, 0, 3, 5).permute(1, 2, 0).numpy(), wanted.astype(np.uint8))
    grey = LargePicture((6, 5), lambda top, h: a[top:top + h, :, 1:2], white=2000).window(0, 0, 6, 5)
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])


def test_the_peak_is_that_of_pixels_that_hold_data():
    a = numbers(6, 5, 3, kind=np.uint16)
    a[0, 0] = 65535
    valid = np.ones((6, 5), bool)
    valid[0, 0] = False
    def rows(top, h): return a[top:top + h]
    assert LargePicture((6, 5), rows).white == 65535 and LargePicture((6, 5), rows, valid=lambda top, h: valid[top:top + h]).white == 255


def test_a_model_of_many_bands_names_the_file_that_lacks_them(large, tmp_path):
    tifffile.imwrite(tmp_path / "x.tif", numbers(61, 47, 3), photometric="rgb")
    with pytest.raises(UserError, match=r"bands are \[5, 3, 2\], but '.*x.tif' has 3 channel\(s\): give pictures of the kind"): open_raster(tmp_path / "x.tif", {"bands": [5, 3, 2]})
    tifffile.imwrite(tmp_path / "y.tif", numbers(61, 47, 5), photometric="minisblack", planarconfig="contig")
    picture = open_raster(tmp_path / "y.tif", {"bands": [5, 3, 2]})
    assert np.array_equal(picture.window(0, 0, 61, 47).permute(1, 2, 0), numbers(61, 47, 5)[..., [4, 2, 1]])


def test_what_cannot_be_read_by_rows_says_what_to_install(large, tmp_path):
    x = Image.fromarray(numbers(61, 47, 3))
    x.save(tmp_path / "x.png")
    x.convert("P").save(tmp_path / "palette.tif")
    for name in ("x.png", "palette.tif"):
        with pytest.raises(UserError, match=r"too large to be read at once: save it as a TIFF without compression or with deflate, or install .*semiseg_nb\[geo\]'; for a TIFF of LZW"):
            open_raster(tmp_path / name)
    x.save(tmp_path / "turned.tif", tiffinfo={274: 6})
    with pytest.raises(UserError, match="too large to be read with an orientation"): open_raster(tmp_path / "turned.tif")
    x.save(tmp_path / "x.tif")
    with pytest.raises(UserError, match="too large to be read stretch=True: save it upright with 8 bits"): open_raster(tmp_path / "x.tif", {"stretch": True})


@pytest.mark.skipif(importlib.util.find_spec("imagecodecs") is not None, reason="imagecodecs is installed")
def test_lzw_needs_a_library_more(large, tmp_path):
    Image.fromarray(numbers(61, 47, 3)).save(tmp_path / "x.tif", compression="tiff_lzw")
    with pytest.raises(UserError, match="for a TIFF of LZW or JPEG, imagecodecs is enough"): open_raster(tmp_path / "x.tif")


@pytest.mark.parametrize("name", ["x.tif", "p.tif", "x.png", "p.png"])
def test_rasterio_reads_the_rest(large, tmp_path, monkeypatch, name):
    rasterio = pytest.importorskip("rasterio")
    picture = Image.fromarray(numbers(61, 47, 3))
    if name.startswith("p"): picture = picture.convert("P")
    picture.save(tmp_path / name, **({"compression": "tiff_lzw"} if name == "x.tif" else {}))
    monkeypatch.setattr(large_pictures, "rasterio_or_none", lambda: rasterio)
    found, wanted = open_raster(tmp_path / name), as_in_training(tmp_path / name)
    assert isinstance(found, LargePicture) and torch.equal(found.window(9, 5, 40, 30), wanted[:, 9:49, 5:35])


def test_a_broken_file_is_named(tmp_path):
    tifffile.imwrite(tmp_path / "x.tif", numbers(61, 47, 3), photometric="rgb")
    (tmp_path / "half.tif").write_bytes((tmp_path / "x.tif").read_bytes()[:60])
    (tmp_path / "text.png").write_text("no picture")
    for name in ("half.tif", "text.png", "lost.tif"):
        with pytest.raises(UserError, match=f"{name}' (cannot be read|does not exist)"): open_raster(tmp_path / name)


# ---------------------------------------------------------------- writing

def test_a_png_written_by_rows_is_a_png():
    a = np.random.default_rng(0).integers(0, 3, (17, 23)).astype(np.uint8)
    for palette in (None, PALETTE):
        f = io.BytesIO()
        write_png(f, a.shape, [a[:5], a[5:6], a[6:]], palette)
        picture = Image.open(f)
        picture.load()
        assert np.array_equal(np.array(picture), a) and picture.mode == ("P" if palette else "L")
        if palette: assert picture.getpalette()[:9] == [c for rgb in PALETTE for c in rgb]


@pytest.mark.parametrize("most", [2**25, 50], ids=["in memory", "on disk"])
def test_a_spool_gives_back_its_rows_in_blocks(tmp_path, monkeypatch, most):
    monkeypatch.setattr(large_pictures, "IN_MEMORY", most)
    monkeypatch.setattr(large_pictures, "SMALL", 60)
    a = torch.from_numpy(numbers(31, 20))
    spool = Spool((31, 20), tmp_path)
    for rows in a.split(7): spool.add(rows)
    for _ in range(2): assert np.array_equal(np.concatenate(list(spool.blocks())), a)
    assert [len(b) for b in spool.blocks(4)] == [4] * 7 + [3]
    shown = overlay_picture(SmallPicture(torch.zeros(3, 31, 20, dtype=torch.uint8)), spool, PALETTE, most=10)
    assert shown.size == (5, 8)
