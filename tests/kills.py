"""Kill runs of every recipe and of several methods at random places, start them again, and compare with a run that nobody killed.

    python tests/kills.py 100 --seed 0          # prints a table; --out FILE writes it as JSON; --only NAME[,NAME]

A run dies before a step, in the middle of a write, between a write and its name, or at any time. Equal must be, bit for bit, the weights and
the record; left may be no temporary file, no checkpoint that cannot be read, and one record only. The runs are forked: torch is imported once.
"""
import argparse
import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch
import torch._dynamo  # once, before runs are forked: the first optimiser would import it in each

from semiseg_nb import core, engine, experiment
from semiseg_nb.catalogue import load_across, load_task
from semiseg_nb.checkpoint import fingerprint, read_state, read_weights
from semiseg_nb.data import Images, Labelled
from semiseg_nb.records import read_records

torch.set_num_threads(1)
PLACES = ("step", "step", "write", "rename", "time")
TINY_GAN = {"translator": {"ngf": 4, "blocks": 1}, "critic": {"ndf": 4, "n_layers": 1, "norm": "none"}}
RUNS = {  # name -> task, settings
    "cct_weak": ("tags", {"tag_steps": 6, "tag_batch": 4}), "continuation": ("tags", {"start_steps": 6, "tag_steps": 4}),
    "cyclegan": ("across", {"translation_steps": 6, "translation_batch": 2, "gan": TINY_GAN, "least": 0.0}),
    "phases": ("scenes", {"n_painted": 8, "gan": TINY_GAN}),
    "semanticgan": ("scenes", {"gan": {"generator": {"d": 8, "width": 8}, "discriminator": {"ndf": 4}}, "encoder": {"inversion_steps": 1}, "encoder_steps": 4}),
    "supervised": ("scenes", {}), "uda": ("scenes", {}), "mean_teacher": ("scenes", {}), "temporal": ("scenes", {"storage": {"file": "bank.bin"}}), "cct": ("scenes", {}),
    "unimatch": ("scenes", {}), "cps": ("scenes", {}), "advsemiseg": ("scenes", {"ndf": 4, "n_layers": 1}), "s4gan": ("scenes", {"ndf": 4}),
    "guidedmix": ("scenes", {}), "mask_cycle": ("scenes", {}), "phase1": ("portraits", {}),
}


@cache
def task(name):
    "A small task, of 32 pixels"
    if name == "across": whole = load_across("scenes", n_labelled=6, size=32)[1]
    elif name == "portraits": whole = load_task("portraits", n_labelled=6, size=32)
    else: whole = load_task("scenes", n_labelled=6, size=32, weak_tags=name == "tags")
    u, v = whole.unlabelled, whole.val
    return replace(whole, unlabelled=Images(u.ids[:12], u.images[:12], None if u.tags is None else u.tags[:12]),
                   val=Labelled(v.ids[:6], v.images[:6], v.masks[:6], v.n_classes), tune=None)


def die(): os.kill(os.getpid(), signal.SIGKILL)


def arm(place: str, at: int, count: dict) -> None:
    "Let this process die at its step, write or rename number `at` (never: -1), and count them all"
    def counted(kind, function, dying):
        def wrapper(*args, **kwargs):
            count[kind] += 1
            if place == kind and count[kind] == at: dying(*args)
            return function(*args, **kwargs)
        return wrapper

    def half(output, data):  # a part of the bytes gets to the disk
        output.file.write(bytes(data)[: max(1, len(bytes(data)) // 2)])
        output.file.flush()
        die()

    engine.one_step = counted("step", engine.one_step, lambda *a: die())
    core.Output.write = counted("write", core.Output.write, half)
    core.os.replace = counted("rename", core.os.replace, lambda *a: die())


def start(name: str, folder: Path, place: str = "", at: int = -1, seconds: float | None = None) -> bool:
    "Run in a forked child; False when it was killed, `RuntimeError` with its traceback when it failed"
    child = os.fork()
    if child == 0:
        try:
            os.chdir(folder)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1), os.dup2(null, 2)
            count, begin = collections.Counter(), time.time()
            arm(place, at, count)
            kind, settings = RUNS[name]
            result = experiment.run(name, task(kind), steps=8, batch_size=4, width=4, settings=settings, checkpoint_every=2, out_dir="out", progress=False, device="cpu")
            own = ("created", "seconds", "images_per_second", "peak_memory_mb", "curve", "commit")
            record = {k: v for k, v in result.record.items() if k not in own}
            record["curve"] = [{k: v for k, v in row.items() if k != "seconds"} for row in result.record["curve"]]
            done = {"weights": fingerprint(result.method), "record": record, "count": count, "seconds": time.time() - begin}
            Path("done.json").write_text(json.dumps(done))
            os._exit(0)
        except BaseException:
            Path("error.txt").write_text(traceback.format_exc())
            os._exit(1)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status): return False
    if os.WEXITSTATUS(status): raise RuntimeError((folder / "error.txt").read_text())
    return True


def half_written(folder: Path) -> list[str]:
    "What cannot be read, after a kill: everything that has its name must be whole"
    wrong = []
    for path in folder.rglob("checkpoint.pt"): wrong += unreadable(read_state, path)
    for path in folder.rglob("*.safetensors"): wrong += unreadable(read_weights, path)
    for path in folder.rglob("*.json"): wrong += unreadable(lambda p: json.loads(p.read_text()), path)
    return wrong


def unreadable(read, path: Path) -> list[str]:
    try: read(path)
    except Exception as e: return [f"{path.name}: {e}"]
    return []


def wrong_with(name: str, folder: Path, whole: dict) -> list[str]:
    "How a finished run differs from one that nobody killed, and what it left over"
    found, wrong = json.loads((folder / "done.json").read_text()), half_written(folder)
    if found["weights"] != whole["weights"]: wrong.append("other weights")
    wrong += [f"record: {k} is {str(found['record'].get(k))[:200]}, not {str(v)[:200]}" for k, v in whole["record"].items() if found["record"].get(k) != v]
    wrong += [f"left over: {p.relative_to(folder)}" for p in folder.rglob("*.tmp")]
    records, refused = read_records(folder / "out")
    if len(records) != (2 if name == "supervised" else 1) or refused: wrong.append(f"{len(records)} records, refused {refused}")
    return wrong


def kills(n: int, seed: int = 0, names=tuple(RUNS)) -> tuple[dict, list]:
    "n kills, spread over the runs: name -> place -> number, and everything that was wrong"
    table, wrong, r = {name: collections.Counter() for name in names}, [], random.Random(seed)
    with tempfile.TemporaryDirectory() as root:
        for i, name in enumerate(names):
            task(RUNS[name][0])
            planned = n // len(names) + (i < n % len(names))
            home = Path(root) / name
            (home / "whole").mkdir(parents=True)
            start(name, home / "whole")
            whole = json.loads((home / "whole" / "done.json").read_text())
            chain = 0
            while table[name].total() < planned:
                chain += 1
                folder, story = home / f"killed{chain}", []
                folder.mkdir()
                try:
                    while True:
                        place = r.choice(PLACES) if table[name].total() < planned else ""
                        most = whole["count"].get(place, 1)
                        at = r.randint(1, max(1, most if not story else most * 2 // 3)) if place else -1
                        seconds = r.uniform(0.02, whole["seconds"]) if place == "time" else None
                        story.append((place, at if seconds is None else round(seconds, 2)))
                        if start(name, folder, place, at, seconds): break
                        table[name][place] += 1
                        wrong += [{"run": name, "seed": seed, "story": story, "wrong": w} for w in half_written(folder)]
                    wrong += [{"run": name, "seed": seed, "story": story, "wrong": w} for w in wrong_with(name, folder, whole)]
                except RuntimeError as e:
                    wrong.append({"run": name, "seed": seed, "story": story, "wrong": str(e)})
                    break
                shutil.rmtree(folder)
    return {k: dict(v) for k, v in table.items()}, wrong


def main():
    p = argparse.ArgumentParser()
    p.add_argument("n", type=int, nargs="?", default=100)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out")
    p.add_argument("--only")
    words = p.parse_args()
    begin, names = time.time(), tuple(words.only.split(",")) if words.only else tuple(RUNS)
    table, wrong = kills(words.n, words.seed, names)
    for w in wrong: print(w, "\n")
    places = sorted(set(PLACES))
    print("run".ljust(14), *(o.rjust(8) for o in places))
    for name, row in table.items(): print(name.ljust(14), *(str(row.get(o, 0)).rjust(8) for o in places))
    total = sum(sum(row.values()) for row in table.values())
    print(f"{total} kills in {time.time() - begin:.0f} s, {len(wrong)} faults")
    if words.out:
        commit = subprocess.run(["git", "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
        Path(words.out).write_text(json.dumps({"kills": total, "seed": words.seed, "commit": commit, "date": datetime.now(UTC).date().isoformat(),
                                               "places": table, "faults": len(wrong)}, indent=1) + "\n")
    sys.exit(bool(wrong))


if __name__ == "__main__": main()
