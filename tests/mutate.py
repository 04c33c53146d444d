"""Break files in every way that disks, copies and people have, and read each with the public functions.

    python tests/mutate.py 1000 --seed 0        # prints a table; --out FILE writes it as JSON; --only KIND:N repeats one

Every mutation must end in a `UserError`, or in exactly the numbers of the file as it was.
"""
import argparse
import collections
import contextlib
import copy
import functools
import io
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from datetime import UTC, datetime
from pathlib import Path

import torch
import yaml
from safetensors.torch import save

sys.path.insert(0, str(Path(__file__).parent))
from helpers import plain_folder

from semiseg_nb import command
from semiseg_nb.catalogue import load_task
from semiseg_nb.checkpoint import fingerprint, load_weights, read_state, read_weights, save_weights, write_state
from semiseg_nb.core import UserError, seed_everything
from semiseg_nb.data import Images, Labelled, Task
from semiseg_nb.doctor import check_folder
from semiseg_nb.engine import Run, fit
from semiseg_nb.leaderboard import compare
from semiseg_nb.models import build_model
from semiseg_nb.records import make_record, read_records, write_record
from semiseg_nb.supervised import Supervised
from semiseg_nb.temporal import TemporalEnsembling

RAW = {"huge": "1" + "0" * 400, "infinite": "1e999", "nan": "NaN", "deep": "[" * 3000 + "]" * 3000, "deeper": "[" * 60000 + "]" * 60000}
ODD = [None, True, -1, 1.5, -0.5, 10**12, "", "x", "/", [], {}, [[1]], {"a": None}, float("nan"), float("inf"), 10**30]
ODD_TENSORS = [lambda t: t.double(), lambda t: torch.full_like(t.float(), float("nan")), lambda t: torch.full_like(t.float(), float("inf")),
               lambda t: t[None], lambda t: t.reshape(-1)[:0], lambda t: t.to(torch.int8), lambda t: t.to(torch.complex64), lambda t: "text",
               lambda t: None, lambda t: t.tolist(), lambda t: t.float().half() if t.dtype != torch.float16 else t.float()]


# ---------------------------------------------------------------- what is done to bytes
def flip(data, r):
    out = bytearray(data)
    for _ in range(r.choice((1, 1, 1, 3, 20))): out[r.randrange(len(out))] ^= 1 << r.randrange(8)
    return bytes(out)


def cut(data, r): return data[:r.randrange(len(data))]
def behead(data, r): return data[1 + r.randrange(len(data)):]


def repeat(data, r):
    i, j = sorted(r.randrange(len(data) + 1) for _ in range(2))
    return data[:j] + data[i:]


def zeros(data, r):
    i, j = sorted(r.randrange(len(data) + 1) for _ in range(2))
    return data[:i] + bytes(j - i) + data[j:]


def append(data, r): return data + r.choice((b"\0", b"\n", b"x" * 100, data))
def empty(data, r): return b""
def text(data, r): return r.choice((b"hello\n", b"[]", b"{}", b"null", b"3", b'"x"', b"[" * 50000, b"\xff\xfe\x00", b"PK\x03\x04", b"\x80\x02}q\x00."))


BYTES = (flip, flip, flip, cut, behead, repeat, zeros, append, empty, text)


# ---------------------------------------------------------------- what is done inside
def places(value, path=()):
    "Every place in a nested structure"
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for k, v in items:
        yield (*path, k)
        yield from places(v, (*path, k))


def changed(value, r, odd, tensors=False):
    "The structure with one value replaced or removed; and where"
    value = copy.deepcopy(value)
    path = r.choice([p for p in places(value) if not ((tensors and "numpy" in p[:-1]) or "python" in p[:-1])] or [()])
    if not path: return r.choice(odd), ()
    where = value
    for k in path[:-1]: where = where[k]
    how = r.randrange(8)
    if how == 0: del where[path[-1]]
    elif how == 1 and isinstance(where, dict): where[f"{path[-1]}x"] = where.pop(path[-1])
    elif isinstance(where[path[-1]], torch.Tensor): where[path[-1]] = r.choice(ODD_TENSORS)(where[path[-1]])
    else: where[path[-1]] = r.choice(odd)
    return value, path


def inside_json(data, r):
    "A value of a JSON file replaced by something odd"
    value, _ = changed(json.loads(data), r, [*ODD, *(f"<{name}>" for name in RAW)])
    out = json.dumps(value)
    for name, raw in RAW.items(): out = out.replace(f'"<{name}>"', raw)
    return out.encode()


def inside_yaml(data, r):
    "A value of a YAML file replaced by something odd"
    return yaml.safe_dump(changed(yaml.safe_load(data), r, ODD)[0]).encode()


def inside_state(path, r): write_state(path, changed(read_state(path), r, ODD, tensors=True)[0])


def inside_weights(path, r):
    "A tensor of a weights file replaced, with a right fingerprint"
    tensors, card = read_weights(path)
    tensors = changed(tensors, r, [])[0]
    tensors = {k: v.contiguous() for k, v in tensors.items() if isinstance(v, torch.Tensor)}
    path.write_bytes(save(tensors, {"card": json.dumps(card), "fingerprint": fingerprint(tensors)}))


# ---------------------------------------------------------------- the files, made once
class Bench:
    "A file of each kind, how to read it, and what reading it gives"

    def __init__(self, root: Path):
        self.root, self.home = root, root / "home"
        self.work, whole = root / "work", load_task("scenes", n_labelled=6, size=32)
        def few(s, n): return s.ids[:n], s.images[:n]
        n = whole.n_classes
        self.task = Task("tiny", whole.classes, whole.palette, Labelled(*few(whole.labelled, 6), whole.labelled.masks[:6], n),
                         Images(*few(whole.unlabelled, 6)), Labelled(*few(whole.val, 6), whole.val.masks[:6], n))
        self.home.mkdir(parents=True)
        self.kinds = {kind: getattr(self, f"make_{kind}")() for kind in ("checkpoint", "finished", "weights", "record", "folder", "bank", "run", "yaml")}
        self.right = {}
        for kind in self.kinds:
            self.reset(kind)
            self.right[kind] = self.read(kind)

    def reset(self, kind):
        "The files of a kind as they were"
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.home / kind, self.work)

    def read(self, kind): return getattr(self, f"read_{kind}")()

    def files(self, kind): return [self.work / name for name in self.kinds[kind]]

    def method(self, cls=Supervised, **settings):
        seed_everything(0)
        return cls(build_model("unet", self.task.n_classes, width=4, mean=self.task.mean), self.task, **settings)

    def fit(self, method, folder, **more):
        return fit(method, self.task, 4, 2, out_dir=folder, checkpoint_every=2, progress=False, workers=0, **more)

    def half(self, method, folder):
        "Two steps of four"
        own, count = method.updates, iter(range(99))
        def updates(*args):
            if next(count) == 2: raise KeyboardInterrupt
            return own(*args)
        method.updates = updates
        with contextlib.suppress(KeyboardInterrupt): self.fit(method, folder)

    def make_checkpoint(self):
        self.half(self.method(), self.home / "checkpoint")
        return ["checkpoint.pt"]

    def read_checkpoint(self):
        method = self.method()
        run = self.fit(method, self.work)
        if list(self.work.glob("*.tmp")): raise AssertionError("a temporary file was left")
        return fingerprint(method), run.result["miou"], run.steps

    def make_finished(self):
        self.fit(self.method(), self.home / "finished")
        return ["checkpoint.pt"]

    read_finished = read_checkpoint

    def make_weights(self):
        method = self.method()
        save_weights(method.net, self.home / "weights" / "unet", {"model": "unet", "width": 4, "lr": 0.001})
        return ["unet.safetensors"]

    def read_weights(self):
        net = build_model("unet", self.task.n_classes, width=4)
        card = load_weights(net, self.work / "unet")
        return fingerprint(net), json.dumps(card)

    def make_record(self):
        paths = []
        for seed in range(3):
            history = [{"step": 450, "seconds": 6.0, "lr": 0.001, "supervised": 0.9}, {"step": 900, "seconds": 12.3, "lr": 0.0, "supervised": 0.5, "miou": 0.6 + seed / 100}]
            result = {"miou": 0.6 + seed / 100, "iou_per_class": [0.9, 0.5, float("nan"), 0.4, 0.6], "pixel_accuracy": 0.8, "ece": 0.05}
            made = make_record("uda", Run(900, seed, 8, history, 12.3, 900), self.task, result, {"width": 8, "threshold": 0.8, "scored_on": "val"}, title="UDA")
            paths.append(write_record(made, self.home / "record").relative_to(self.home / "record"))
        return paths[:1]

    def read_record(self):
        records, refused = read_records(self.work)
        lines = io.StringIO()
        with contextlib.redirect_stdout(lines): command.main(["report", str(self.work), "--all"])
        rows = [row for rows in compare(records, ("smoke", "lesson", "real")).values() for row in rows]
        seeds = sorted(r["seed"] for r in records)
        if seeds not in ([0, 1, 2], [1, 2]): raise AssertionError(f"the leaderboard has the seeds {seeds}")
        if seeds == [1, 2] and not refused: raise UserError("renamed: no record any more")
        found = sorted(v for row in rows for v in row.miou)
        if found != [0.6 + s / 100 for s in seeds]: raise AssertionError(f"the leaderboard says {found}")
        if refused:
            if str(next(iter(refused))) not in lines.getvalue(): raise AssertionError("the report does not name the refused file")
            raise UserError(str(refused))
        return [{k: v for k, v in r.items() if k != "path"} for r in records]

    def make_folder(self):
        home = self.home / "folder"
        plain_folder(home)
        stems = [f"p{i:02d}" for i in range(10)]
        info = {"name": "own", "classes": [{"id": i, "name": n, "color": [i, 9 * i, 20]} for i, n in enumerate("abc")], "label_order": {"seed0": stems}}
        (home / "dataset.json").write_text(json.dumps(info))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ids = load_task("folder", home, n_labelled=4).labelled.ids
        (home / "order.json").write_text(json.dumps(ids[::-1]))
        return ["dataset.json", "dataset.json", "order.json", "images/p03.png", "masks/p03.png"]

    def read_folder(self):
        order = self.work / "order.json"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            check_folder(self.work)
            task = load_task("folder", self.work, n_labelled=4, label_order=order if order.exists() else None)
        return task.fingerprint, task.n_classes, task.split_id

    def bank_method(self): return self.method(TemporalEnsembling, storage={"file": str(self.work / "bank.bin"), "dtype": "uint8"}, warmup=0.0, threshold=0.0)

    def make_bank(self):
        self.work.mkdir()
        self.half(self.bank_method(), self.work)
        shutil.move(self.work, self.home / "bank")
        return ["bank.bin", "bank.bin.places"]

    def read_bank(self):
        method = self.bank_method()
        run = self.fit(method, self.work)
        return fingerprint(method.net), run.result["miou"]

    def make_run(self):
        data, self.work_run = self.home / "data", self.home / "run"
        plain_folder(data)
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            command.main(["train", "supervised", "--data", str(data), "--out", str(self.work_run), "n_labelled=4", "steps=2", "batch_size=2", "width=4"])
        (folder,) = self.work_run.glob("supervised-*/")
        self.folder = folder.name
        return [f"{folder.name}/run.json", f"{folder.name}/run.json", f"{folder.name}/weights.safetensors", f"{folder.name}/supervised/checkpoint.pt"]

    def read_run(self):
        lines = io.StringIO()
        with contextlib.redirect_stdout(lines), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            command.main(["score", str(self.work / self.folder)])
        return lines.getvalue()

    def make_yaml(self):
        values = {"dataset": "scenes", "size": 32, "n_labelled": 6, "n_unlabelled": 8, "split_seed": 0, "steps": 2, "batch_size": 2, "width": 4, "seed": 0, "model": "unet",
                  "lr": 0.002, "threshold": 0.9, "mix": 0.5, "views": "weak", "eval_every": None, "clip": 1.0, "score_on": "val"}
        (self.home / "yaml").mkdir()
        (self.home / "yaml" / "p.yaml").write_text(yaml.safe_dump(values))
        return ["p.yaml"]

    def read_yaml(self):
        "What was asked for arrives, or is refused; the training itself is cut to one step"
        got, real = {}, command.run
        @functools.wraps(real)
        def short(what, task, **arguments):
            got.update(arguments)
            small = {"steps": 1, "batch_size": 2, "width": 4} if all(type(arguments.get(k, 1)) is int and arguments.get(k, 1) > 0 for k in ("steps", "batch_size", "width")) else {}
            got["result"] = real(what, self.task if task.name == "scenes" else task, **(arguments | small | {"progress": False, "out_dir": self.work / "out"}))
            return got["result"]
        command.run = short
        try:
            with contextlib.redirect_stdout(io.StringIO()): command.main(["train", "uda", "-f", str(self.work / "p.yaml"), "--out", str(self.work / "out")])
        finally: command.run = real
        asked = yaml.safe_load((self.work / "p.yaml").read_text(encoding="utf-8"))
        for name in ("lr", "threshold", "mix"):
            told = got["result"].record["params"][name]
            if name in asked and told != asked[name]: raise AssertionError(f"{name} is {asked[name]} in the file and {told} in the run")
        return "ran as asked"


INSIDE = {".pt": inside_state, ".safetensors": inside_weights}


def mutate(bench: Bench, kind: str, r: random.Random) -> str:
    "Change the files of a kind in the work folder; in words"
    path = r.choice(bench.files(kind))
    how = r.randrange(20)
    if how == 0:
        path.rename(path.with_name(f"{path.stem}2{path.suffix}"))
        return f"{path.name} renamed"
    if how == 1:
        other = r.choice([p for p in bench.home.rglob("*") if p.is_file() and p.suffix != path.suffix])
        shutil.copy(other, path)
        return f"{path.name} is {other.name}"
    if how == 2:
        path.unlink()
        path.mkdir()
        return f"{path.name} is a folder"
    if how < 11 and path.suffix in INSIDE:
        INSIDE[path.suffix](path, r)
        return f"a value in {path.name}"
    if how < 13 and path.suffix in (".json", ".yaml"):
        path.write_bytes((inside_json if path.suffix == ".json" else inside_yaml)(path.read_bytes(), r))
        return f"a value in {path.name}"
    change = r.choice(BYTES)
    path.write_bytes(change(path.read_bytes(), r))
    return f"{change.__name__} {path.name}"


def late(*args): raise TimeoutError("more than 60 seconds")


def attempt(bench: Bench, kind: str, number: int, seed: int) -> tuple[str, str, str]:
    "One mutation: what was done, how it ended, and what was said"
    r = random.Random(f"{seed} {kind} {number}")
    bench.reset(kind)
    done = mutate(bench, kind, r)
    signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    try: found = bench.read(kind)
    except UserError as e: return done, "refused", str(e)
    except SystemExit as e:
        return done, "refused" if str(e).startswith("error: ") else "VIOLATION", str(e)
    except Exception: return done, "VIOLATION", traceback.format_exc().strip()
    finally: signal.alarm(0)
    if found == bench.right[kind]: return done, "same numbers", ""
    if kind == "folder" and found[:1] != bench.right[kind][:1]: return done, "known as other data", ""
    if kind == "folder" and found[2] != bench.right[kind][2]: return done, "known as other data", ""
    return done, "VIOLATION", f"read {str(found)[:300]} instead of {str(bench.right[kind])[:300]}"


def mutations(n: int, seed: int = 0, only: tuple | None = None) -> tuple[dict, list]:
    "n mutations, spread over the kinds: kind -> outcome -> number, and every violation"
    table, wrong = collections.defaultdict(collections.Counter), []
    with tempfile.TemporaryDirectory() as root:
        bench = Bench(Path(root))
        kinds = list(bench.kinds)
        for i in range(n) if only is None else [0]:
            kind, number = (kinds[i % len(kinds)], i // len(kinds)) if only is None else only
            done, outcome, said = attempt(bench, kind, number, seed)
            table[kind][outcome] += 1
            if outcome == "VIOLATION": wrong.append({"repeat": f"python tests/mutate.py --seed {seed} --only {kind}:{number}", "done": done, "said": said})
            if only: print(done, "->", outcome, said)
    return {k: dict(v) for k, v in table.items()}, wrong


def main():
    p = argparse.ArgumentParser()
    p.add_argument("n", type=int, nargs="?", default=1000)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out")
    p.add_argument("--only", metavar="KIND:N")
    words = p.parse_args()
    begin, only = time.time(), (words.only.split(":")[0], int(words.only.split(":")[1])) if words.only else None
    table, wrong = mutations(words.n, words.seed, only)
    for w in wrong: print(w["repeat"], "|", w["done"], "|", w["said"], "\n")
    outcomes = sorted({o for row in table.values() for o in row})
    print("kind".ljust(12), *(o.rjust(20) for o in outcomes))
    for kind, row in table.items(): print(kind.ljust(12), *(str(row.get(o, 0)).rjust(20) for o in outcomes))
    print(f"{words.n} mutations in {time.time() - begin:.0f} s, {len(wrong)} violations")
    if words.out:
        commit = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
        Path(words.out).write_text(json.dumps({"mutations": words.n, "seed": words.seed, "commit": commit, "date": datetime.now(UTC).date().isoformat(),
                                               "outcomes": table, "violations": len(wrong)}, indent=1) + "\n")
    sys.exit(bool(wrong))


if __name__ == "__main__": main()
