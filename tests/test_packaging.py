"""What an installation holds: the wheel with its lessons and its command, the source archive with all that `make test` needs."""
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from semiseg_nb.command import parse

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = (".git", ".venv", "_demo", "_lessons", "_runs", "_docs", "_site", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".ipynb_checkpoints")
NOTEBOOKS = {p.name for p in (ROOT / "nbs").glob("*.ipynb")}


def names(pattern): return {p.relative_to(ROOT).as_posix() for p in ROOT.glob(pattern)}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "A wheel and a source archive, built from a copy, so that no build folder stays behind"
    copy, out = tmp_path_factory.mktemp("package") / "source", tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
    (copy / "nbs/scratch.log").write_text("a file that nobody wants")
    code = "import sys; from setuptools import build_meta as b; out = sys.argv[1]; b.build_wheel(out); b.build_sdist(out)"  # argv is theirs then
    done = subprocess.run([sys.executable, "-c", code, str(out)], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    "The wheel unpacked as an installer does: the package, and what belongs into share/"
    home, unpacked = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(*built.glob("*.whl")) as wheel: wheel.extractall(unpacked)
    data, = unpacked.glob("*.data/data")
    shutil.copytree(data, home, dirs_exist_ok=True)
    shutil.copytree(unpacked / "semiseg_nb", home / "site/semiseg_nb")
    return home


@pytest.mark.slow
def test_the_wheel_holds_package_command_types_and_lessons(built):
    wheel = zipfile.ZipFile(*built.glob("*.whl"))
    held = set(wheel.namelist())
    read = {name.rsplit("/", 1)[1]: wheel.read(name).decode() for name in held if name.endswith((".dist-info/entry_points.txt", ".dist-info/METADATA"))}
    assert {n for n in held if n.startswith("semiseg_nb/")} == names("semiseg_nb/*.py") | {"semiseg_nb/py.typed"}
    share = {n.split("/data/share/semiseg_nb/")[1] for n in held if "/data/share/semiseg_nb/" in n}
    assert share == (names("nbs/*.ipynb") | names("nbs/*.csv") | names("nbs/params/*.yaml") | names("nbs/splits/*.txt")
                     | names("nbs/weights/*.json") | names("nbs/weights/*.safetensors") | names("results/**/*.json"))
    assert "semiseg = semiseg_nb.command:main" in read["entry_points.txt"]
    assert "\nRequires-Dist: pyyaml>=" in read["METADATA"] and "\nClassifier: Typing :: Typed\n" in read["METADATA"]


@pytest.mark.slow
def test_the_source_archive_holds_all_that_make_test_needs(built):
    with tarfile.open(*built.glob("*.tar.gz")) as archive: held = {n.split("/", 1)[1] for n in archive.getnames() if "/" in n}
    wanted = ["Makefile", "environment.yml", "settings.ini", "setup.py", "pyproject.toml", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff",
              "LICENSE", ".ci/run", ".pre-commit-config.yaml", ".github/workflows/ci.yml", "semiseg_nb/py.typed"]
    assert set(wanted) <= held
    for pattern in ("nbs/*.ipynb", "nbs/params/*", "nbs/splits/*", "nbs/weights/*", "results/**/*.json", "tests/*.py", "tests/parity/*", "scripts/*.py", "docs/*.py", "docs/static/*", "benchmarks/*.py"):
        assert names(pattern) <= held, pattern


@pytest.mark.slow
def test_lessons_come_out_of_an_installation_and_run(installed, tmp_path):
    code = f"""
import json, os, sysconfig
get = sysconfig.get_path
sysconfig.get_path = lambda name, *a, **k: {str(installed)!r} if name == "data" else get(name, *a, **k)
from semiseg_nb.command import main
main(["lessons", "mine"])
os.chdir("mine/nbs")
cells = json.load(open("01_scenes.ipynb", encoding="utf-8"))["cells"]
exec(next("".join(c["source"]) for c in cells if c["cell_type"] == "code" and "import" in "".join(c["source"])))
from semiseg_nb.records import find, read_records
print(len(read_records(find("results"))[0]))
"""
    env = os.environ | {"PYTHONPATH": str(installed / "site")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    said, count = done.stdout.splitlines()
    assert said.startswith(f"{len(list((tmp_path / 'mine').rglob('*.*')))} files copied") and int(count) > 100
    assert {p.name for p in (tmp_path / "mine/nbs").glob("*.ipynb")} == NOTEBOOKS


@pytest.mark.parametrize("words", ["train uda --data x n_labelled=4", "train uda steps=3 --out o n_labelled=4", "train uda -f a.yaml n_labelled=4"])
def test_values_may_stand_behind_options(words):
    parsed = parse(words.split())
    assert parsed.values[-1] == "n_labelled=4" and parsed.method == "uda"


@pytest.mark.parametrize("words", ["train uda --nothing n=4", "report runs more"])
def test_words_that_nobody_knows_are_refused(words, capsys):
    with pytest.raises(SystemExit): parse(words.split())
    assert "unrecognized arguments" in capsys.readouterr().err


def test_an_editable_install_takes_no_copy_of_the_lessons(monkeypatch):
    import setuptools
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **k: given.update(k))
    for words, empty in ((["setup.py", "editable_wheel"], True), (["setup.py", "bdist_wheel"], False)):
        monkeypatch.setattr(sys, "argv", words)
        exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"), {"__file__": str(ROOT / "setup.py"), "__name__": "setup"})
        assert (given["data_files"] == []) is empty
