"""How far exported networks are from their own: every network of the package and encoders of others, at five odd sizes.

    python benchmarks/parity.py --record
"""
import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from semiseg_nb.core import UserError
from semiseg_nb.export import SIZES, TOLERANCE, export_onnx, export_pt2
from semiseg_nb.models import build_model
from semiseg_nb.predict import Predictor
from semiseg_nb.records import commit, versions

RECORD = Path(__file__).resolve().parents[1] / "results/benchmarks/parity.json"
NETWORKS = [("unet", None), ("deeplabv3", None), ("psp", None), ("unet", "mobilenetv3_small_050"), ("deeplabv3plus", "resnet18"),
            ("unet", "efficientnet_lite0"), ("psp", "test_efficientnet")]
FORMS = {"onnx": export_onnx, "pt2": export_pt2}


def predictor(model: str, encoder: str | None) -> Predictor:
    "A network with random weights whose statistics are not 0 and 1"
    torch.manual_seed(0)
    net = {"model": model, "encoder": encoder, "width": 8, "n_classes": 5}
    made = build_model(**net)
    for _ in range(2): made.train()(torch.rand(4, 3, 64, 64))
    card = {"classes": list("abcde"), "palette": [[0, 0, 0]] * 5, "reading": {}, "size": {"rule": "native", "training": [64, 64]}, "network": net}
    return Predictor(made.eval(), card)


def row(model: str, encoder: str | None, folder: Path) -> dict:
    found = {"model": model, "encoder": encoder}
    made = predictor(model, encoder)
    for form, export in FORMS.items():
        start = time.perf_counter()
        try: worst = max(export(made, folder / f"{model}-{encoder}.{form}").values())
        except UserError as error: worst = str(error).replace(f"{folder}/", "")
        found[form] = worst if isinstance(worst, str) else float(f"{worst:.2g}")
        found[f"{form} seconds"] = round(time.perf_counter() - start, 1)
    return found


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--record", action="store_true", help="write results/benchmarks/parity.json")
    record = p.parse_args().record
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for names in NETWORKS:
            rows.append(row(*names, Path(folder)))
            print(rows[-1], flush=True)
    found = {"what": "largest difference of two logits between a network and its exported file", "sizes": SIZES, "tolerance": TOLERANCE,
             "device": "cpu, 1 thread", "rows": rows, "versions": versions(), "commit": commit()}
    if record: RECORD.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__": main()
