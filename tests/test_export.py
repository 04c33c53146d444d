"An exported network: the same logits at every size, its card inside, and a script that needs neither this package nor PyTorch"
import importlib.util
import json
import subprocess
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import tifffile
import torch
from helpers import awkward_folder
from PIL import Image

from semiseg_nb import export
from semiseg_nb.catalogue import load_task
from semiseg_nb.core import UserError
from semiseg_nb.experiment import run
from semiseg_nb.export import SIZES, TOLERANCE, export_onnx, export_pt2, exported_card, outcome, parity, runner, script_for
from semiseg_nb.models import build_model, padded
from semiseg_nb.networks import PyramidPooling, region_means
from semiseg_nb.predict import Predictor, load_model
from semiseg_nb.records import read_records
from semiseg_nb.supervised import Supervised

ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
onnx_only = pytest.mark.skipif(not ONNX, reason="the extra [export] is not installed")
PALETTE = [[0, 0, 0], [200, 0, 0], [0, 0, 200]]
PYRAMID = {"model": "psp", "encoder": "test_efficientnet"}  # regions of every size, padding, an encoder at stride 8 with gates, in few layers


def predictor(rule="native", reading=None, **net):
    torch.manual_seed(0)
    net = {"model": "unet", "encoder": None, "width": 2, "n_classes": 3, "mean": [0.2, 0.4, 0.6]} | net
    card = {"classes": ["sky", "tree", "sea"], "palette": PALETTE, "reading": reading or {}, "size": {"rule": rule, "training": [24, 40]}, "network": net, "scores": {"miou": 0.5}}
    made = build_model(**net)
    x = torch.rand(4, 3, 32, 32)
    made.train()(x)  # statistics that are not 0 and 1, as after training
    if hasattr(made, "head"):
        with torch.no_grad():  # logits that differ from pixel to pixel, and win in turn
            made.eval().head.weight.mul_(10)
            made.head.bias.sub_(made(x).mean((0, 2, 3)))
    return Predictor(made, card)


@pytest.fixture(scope="module", autouse=True)
def programs():
    "A network is traced once, for both forms of its export"
    known, traced = {}, export.traced

    def once(model):
        if model.fingerprint not in known: known[model.fingerprint] = traced(model)
        return known[model.fingerprint]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "traced", once)
        yield


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder, model = tmp_path_factory.mktemp("exported"), predictor()
    return folder, model, export_onnx(model, folder)


# ---------------------------------------------------------------- ONNX

@onnx_only
def test_the_logits_are_those_of_the_network_at_five_sizes(exported):
    folder, model, found = exported
    assert set(found) == set(SIZES) and max(found.values()) <= TOLERANCE
    assert len({(h, w) for _, h, w in SIZES}) >= 5 and all(h % 32 and w % 32 for _, h, w in SIZES) and len({b for b, _, _ in SIZES}) > 1
    assert sorted(p.name for p in folder.iterdir()) == ["card.json", "model.onnx", "predict.py"]
    assert parity(model, folder / "model.onnx", [(1, 1, 1), (5, 64, 31)])[5, 64, 31] <= TOLERANCE


@onnx_only
def test_batch_height_and_width_are_free_and_all_weights_are_in_one_file(exported):
    import onnx
    proto = onnx.load(exported[0] / "model.onnx", load_external_data=False)
    onnx.checker.check_model(proto)
    b, c, h, w = proto.graph.input[0].type.tensor_type.shape.dim
    assert c.dim_value == 3 and all(d.dim_param for d in (b, h, w)) and not any(t.external_data for t in proto.graph.initializer)
    assert proto.graph.input[0].name == "image" and proto.graph.output[0].name == "logits"


@onnx_only
def test_the_card_is_inside_and_beside(exported):
    folder, model, _ = exported
    inside = exported_card(folder / "model.onnx")
    assert inside == json.loads((folder / "card.json").read_text()) and inside["classes"] == ["sky", "tree", "sea"] and inside["scores"] == {"miou": 0.5}
    assert "0 to 1, not normalised" in inside["input"] and inside["fingerprint"] == model.fingerprint


@onnx_only
@pytest.mark.slow
@pytest.mark.parametrize("net", [dict(model="deeplabv3"), PYRAMID], ids=lambda n: "-".join(n.values()))
def test_other_networks_and_an_encoder(net, tmp_path):
    "All of them, and larger encoders, in benchmarks/parity.py"
    found = export_onnx(predictor(**net), tmp_path)
    assert set(found) == set(SIZES) and max(found.values()) <= TOLERANCE


def hidden(script, *words):
    "Run a script where neither the package nor PyTorch can be imported"
    code = ("import sys, runpy\nfor name in ('torch', 'semiseg_nb', 'scipy', 'torchvision'): sys.modules[name] = None\n"
            "del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code, str(script), *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@onnx_only
@pytest.mark.parametrize(("rule", "reading"), [("native", {}), ("resize", {}), ("resize", {"fit": "letterbox"}), ("native", {"white": 4095})], ids=str)
def test_the_script_beside_it_predicts_as_the_predictor_does(exported, tmp_path, rule, reading):
    folder = exported[0]
    (tmp_path / "model.onnx").write_bytes((folder / "model.onnx").read_bytes())
    model = predictor(rule, reading)
    (tmp_path / "card.json").write_text(json.dumps(model.card))
    (tmp_path / "predict.py").write_text(script_for(model.card, ("model.onnx", "card.json", "predict.py")))
    rng = np.random.default_rng(0)
    if reading.get("white"): picture = Image.fromarray(rng.integers(0, 4096, (61, 83)).astype(np.uint16))
    else: picture = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((83, 61), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[274] = 6
    picture.save(tmp_path / "photo.png", **({} if reading.get("white") else {"exif": exif}))
    hidden(tmp_path / "predict.py", tmp_path / "photo.png", tmp_path / "mask.png")
    mask = Image.open(tmp_path / "mask.png")
    labels = model(tmp_path / "photo.png").labels
    assert mask.getpalette()[:9] == [c for rgb in PALETTE for c in rgb] and mask.size == labels.shape[::-1] and len(labels.unique()) > 1
    assert float((torch.from_numpy(np.array(mask)) == labels).float().mean()) > 0.999
    assert "tifffile" not in (folder / "predict.py").read_text().splitlines()[0]
    lines = [line for line in (tmp_path / "predict.py").read_text().splitlines() if line.strip() and not line.startswith(("import", "from", '"""'))]
    assert len(lines) <= (24 if reading.get("white") else 20)
    if reading.get("white"): return
    Image.fromarray(rng.integers(0, 4096, (61, 83)).astype(np.uint16)).save(tmp_path / "deep.png")
    done = subprocess.run([sys.executable, tmp_path / "predict.py", tmp_path / "deep.png", tmp_path / "m.png"], capture_output=True, text=True)
    assert done.returncode and done.stderr.strip() == "The picture has more than 8 bits; the model learnt from 8."


@onnx_only
@pytest.mark.parametrize("planes", [False, True], ids=["pixel after pixel", "band after band"])
@pytest.mark.parametrize("bands", [[5, 1, 3], [4]], ids=str)
def test_chosen_bands_are_those_of_training(tmp_path, monkeypatch, exported, bands, planes):
    model = predictor(reading={"bands": bands, "white": 4095})
    monkeypatch.setattr(export, "into_place", lambda model, data, path: path.write_bytes((exported[0] / "model.onnx").read_bytes()))
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **k: types.SimpleNamespace(model=types.SimpleNamespace(metadata_props={}), model_proto=types.SimpleNamespace(SerializeToString=bytes)))
    export_onnx(model, tmp_path)
    known = json.loads((tmp_path / "card.json").read_text())
    assert known["reading"]["bands"] == bands and f"channels {bands} of the file as RGB, counted from 1" in known["input"]
    assert "tifffile for TIFFs" in (tmp_path / "predict.py").read_text().splitlines()[0]
    a = np.random.default_rng(0).integers(0, 4096, (61, 83, 5)).astype(np.uint16)
    tifffile.imwrite(tmp_path / "x.tif", a.transpose(2, 0, 1) if planes else a, photometric="minisblack", planarconfig="separate" if planes else "contig")
    hidden(tmp_path / "predict.py", tmp_path / "x.tif", tmp_path / "mask.png")
    b = a[..., [n - 1 for n in bands] * (3 // len(bands))] / 4095 * 255
    labels = model(b.round().astype(np.uint8)).labels
    assert len(labels.unique()) > 1 and float((torch.from_numpy(np.array(Image.open(tmp_path / "mask.png"))) == labels).float().mean()) > 0.999
    tifffile.imwrite(tmp_path / "y.tif", a[..., :3], photometric="rgb")
    words = [sys.executable, tmp_path / "predict.py", tmp_path / "y.tif", tmp_path / "mask.png"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode and done.stderr.strip() == f"bands are {bands}, but the picture has 3 channel(s)."


@onnx_only
def test_a_name_of_ones_own_and_a_file_of_somebody_else(exported, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **k: pytest.fail("it exports"))
    (tmp_path / "street.py").write_text("print('mine')")
    with pytest.raises(UserError, match="street.py' is a script of somebody else: choose another name"): export_onnx(exported[1], tmp_path / "street.onnx")
    assert (tmp_path / "street.py").read_text() == "print('mine')"


@onnx_only
def test_a_wrong_export_is_not_left_behind(exported, tmp_path):
    other = predictor(mean=[0.9, 0.9, 0.9])
    with pytest.raises(UserError, match=r"was not written: at \(B,H,W\) = .* its logits differ from the network's by"):
        export.into_place(other, (exported[0] / "model.onnx").read_bytes(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="differ from the network's by inf"): export.check({(1, 2, 3): float("inf")}, tmp_path)
    with pytest.raises(UserError, match="differ"): export.check({(1, 2, 3): float("nan")}, tmp_path)


def test_what_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"Export needs onnxscript, which is not installed: pip install 'semiseg_nb\[export\]'"): export_onnx(predictor(), tmp_path)
    with pytest.raises(UserError, match=r"should end in .onnx or .pt2"): runner(tmp_path / "x.txt")


# ---------------------------------------------------------------- torch.export

@pytest.mark.slow
def test_a_pt2_file_holds_network_and_card(tmp_path):
    "Networks with an encoder: in benchmarks/parity.py"
    model = predictor()
    found = export_pt2(model, tmp_path / "street")
    assert set(found) == set(SIZES) and max(found.values()) <= TOLERANCE and [p.name for p in tmp_path.iterdir()] == ["street.pt2"]
    assert exported_card(tmp_path / "street.pt2")["palette"] == PALETTE
    x = torch.rand(1, 3, 45, 33)
    with torch.no_grad(): torch.testing.assert_close(torch.export.load(tmp_path / "street.pt2").module()(x), model.net(x))


@pytest.mark.slow
def test_a_pt2_file_of_a_pyramid_takes_any_size(tmp_path):
    "At 45 x 33 a map of stride 8 has fewer rows than that of the padded image: a slice left a guard that refused such sizes"
    model = predictor(**PYRAMID)
    assert max(export_pt2(model, tmp_path / "street").values()) <= TOLERANCE
    assert parity(model, tmp_path / "street.pt2", [(1, 45, 33), (2, 64, 64)])[1, 45, 33] <= TOLERANCE


# ---------------------------------------------------------------- what the networks do for it

def test_sizes_are_rounded_up_without_negative_numbers():
    assert [padded(n) for n in (1, 31, 32, 33, 64)] == [32, 32, 32, 64, 64]


@pytest.mark.slow
def test_an_operation_that_pt2_cannot_hold_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"m.pt2' was not written: this PyTorch cannot store .*ceil.*export it as .onnx"):
        export_pt2(predictor(model="psp", encoder="resnet10t"), tmp_path / "m")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [(9, 7), (6, 6), (1, 5), (13, 64)])
def test_products_are_adaptive_pooling(size, monkeypatch):
    x = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    layer = PyramidPooling(4, 4).eval()
    plain, pooled = layer(x), [region_means(x, n) for n in (1, 2, 3, 6)]
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    for n, known in zip((1, 2, 3, 6), pooled): torch.testing.assert_close(region_means(x, n), known)
    torch.testing.assert_close(layer(x), plain)


# ---------------------------------------------------------------- what comes out of a run

def trained(task, folder, what="supervised"):
    return run(what, task, steps=1, batch_size=2, width=2, device="cpu", out_dir=folder / "out", progress=False)


@pytest.fixture(scope="module")
def scenes_run(tmp_path_factory):
    task = load_task("scenes", n_labelled=4, n_unlabelled=6, size=32)
    return trained(task, tmp_path_factory.mktemp("run")), task


def test_a_run_leaves_masks_at_the_size_of_its_pictures_and_its_weights(tmp_path):
    folder = awkward_folder(tmp_path / "awkward")
    with pytest.warns(UserWarning, match="the middle of each is used"): task = load_task("folder", folder, n_labelled=4, size=32)
    result = trained(task, tmp_path)
    found = outcome(result, task, n=5)
    sizes = {path.stem: Image.open(path).size for path in [*(folder / "images/val").iterdir(), *(folder / f"images/train/t{i}.png" for i in range(4, 9))]}
    assert {path.stem: Image.open(path).size for path in found.masks} == sizes and {(5, 7), (1600, 2000)} <= set(sizes.values())
    assert all(found.record.with_suffix("") in path.parents for path in found.masks), "the files lie in a folder beside the record, of its name"
    assert load_model(found.model, "cpu").classes == task.classes and "a run of a few steps is not exported" in str(found)
    assert [p.stem for p in outcome(result, task, n=1).masks] == ["v0", "t4"], "the same run made again replaces its folder"


def test_drawn_pictures_are_written_and_the_model_is_exported_as_asked(scenes_run):
    result, task = scenes_run
    found = outcome(result, task, n=2, form="pt2")
    assert len(found.masks) == 4 and {Image.open(p).size for p in found.masks} == {(32, 32)}
    assert found.model.suffix == ".pt2" and exported_card(found.model)["record"]["name"] == task.name and "agree" in found.note
    names = [text.get_text() for text in found.figure.legends[0].get_texts()]
    assert names[:len(task.classes)] == list(task.classes), "the picture says which colour is which class"


@onnx_only
def test_a_run_long_enough_to_be_a_result_is_exported(scenes_run):
    result, task = scenes_run
    found = outcome(replace(result, record=result.record | {"profile": "real"}), task, n=1)
    assert found.model.suffix == ".onnx" and read_records(result.path.parents[1])[1] == {}, "no file beside a record is taken for one"


class Tricky(Supervised):
    "Asks for the values of an image, which no exported file can"
    name, title = "tricky", "Tricky"
    def predict(self, x): return self.net(x) if x.mean().item() > 2 else self.net(x) * (1 + x.flatten().tolist()[0])


def test_a_method_that_cannot_be_exported_keeps_its_weights(scenes_run, tmp_path):
    _, task = scenes_run
    method = Tricky(build_model("unet", task.n_classes, width=2), task)
    del method.ema
    record = dict(method="tricky", title="Tricky", result={"miou": 0.1}, profile="real")
    own = replace(scenes_run[0], method=method, record=record, path=tmp_path / "tricky-1.json", folder=None)
    found = outcome(own, task, n=1, form="pt2")
    assert found.model.name == "weights.safetensors" and "cannot be exported as pt2" in found.note and len(found.masks) == 2
    with pytest.raises(UserError, match="was not made by `run`"): load_model(found.model, "cpu")


def test_a_run_without_a_record_is_refused(scenes_run):
    with pytest.raises(UserError, match="left no record: give `run` an out_dir"): outcome(replace(scenes_run[0], path=None), scenes_run[1])
