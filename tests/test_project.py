"""What must agree: notebooks and modules, floors and imports, settings.ini and the files that repeat it, index and README."""
import ast
import importlib
import importlib.util
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from pathlib import Path

import papermill
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "semiseg_nb"
MODULES = sorted(p.stem for p in PACKAGE.glob("*.py") if not p.stem.startswith("_"))
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))

FLOORS = {
    0: ["core"],
    1: ["scenes", "data", "pictures", "augment", "policies", "cutmix", "networks", "models", "losses", "metrics", "rasters", "viz"],
    2: ["folders", "tool_files", "formats", "mask_files", "annotations", "doctor", "official", "catalogue", "clock", "checkpoint", "engine", "records", "large_pictures"],
    3: ["supervised", "adversarial", "ganaugment", "bank"],  # the baseline, and pieces that several methods share
    5: ["tags", "continuation", "failures", "semanticgan", "inversion", "phases", "mask_cycle", "unimatch"],  # each goes on from methods of the floor below
    6: ["experiment", "out_of_domain", "leaderboard"],  # they run and compare the methods
    7: ["checks", "runs", "budget", "verdict", "predict", "export", "ablations"],  # what people do with the results
    8: ["command"],  # all of it from a terminal
}
FLOOR = dict.fromkeys(MODULES, 4) | {name: floor for floor, names in FLOORS.items() for name in names}  # any other module is a method
NEIGHBOURS = {  # the imports on one floor that are allowed, each for a reason
    ("models", "networks"),  # by name: ours, or with a large encoder
    ("policies", "augment"),  # which views are drawn, and how one is drawn
    ("doctor", "folders"), ("catalogue", "doctor"),  # a folder is read, looked at, and then cut into a task
    ("catalogue", "folders"),  # a folder of one's own is one of the data sets
    ("official", "folders"), ("official", "doctor"), ("catalogue", "official"),  # and the well-known trees are others
    ("tool_files", "folders"), ("formats", "folders"), ("mask_files", "folders"), ("annotations", "folders"),  # importers write the layout that `folders` reads
    ("formats", "tool_files"), ("mask_files", "tool_files"), ("annotations", "tool_files"),  # all read into one form
    ("annotations", "formats"), ("annotations", "mask_files"),  # tools, then pictures, then the import of both
    ("records", "engine"),  # a record is made from a run
    ("budget", "runs"), ("verdict", "runs"),  # they look for finished runs in a folder
    ("verdict", "budget"),  # its sentence ends with what more masks would bring
    ("export", "predict"),  # what is exported is a predictor
    ("continuation", "tags"),  # it goes on from CCT with tags, and uses the tags itself
    ("inversion", "semanticgan"),  # the second stage goes on from the first
    ("engine", "clock"), ("engine", "checkpoint"), ("records", "checkpoint"),  # the loop hands every step its clock, and saves
}
IMPORT_NAMES = {"pillow": "PIL", "segmentation-models-pytorch": "segmentation_models_pytorch", "huggingface-hub": "huggingface_hub", "pyyaml": "yaml"}
LAZY = {"viz": {"IPython", "ipywidgets"}, "pictures": {"rasterio"}}  # imported inside the function that shows sliders; `import semiseg_nb.viz` needs neither


def settings():
    ini = ConfigParser(interpolation=None)
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return ini["DEFAULT"]


def names_of(requirements): return {re.split(r"[<>=!~\[;]", r)[0] for r in requirements}
def pyproject(): return tomllib.loads((ROOT / "pyproject.toml").read_text())
def sources(path): return ["".join(c["source"]) for c in json.loads(path.read_text(encoding="utf-8"))["cells"]]
def readme(): return (ROOT / "README.md").read_text(encoding="utf-8")


def script(name):
    "A file of scripts/ as a module"
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def imports(name):
    "Absolute names of the modules that a module imports anywhere, also inside functions"
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): found |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["semiseg_nb" if node.level else "", node.module]))
            found |= {f"{base}.{a.name}" for a in node.names} if base == "semiseg_nb" else {base}
    return found


def own_imports(name): return {i.split(".")[1] for i in imports(name) if i.startswith("semiseg_nb.")} - {"__version__"}
def foreign_imports(name): return {i.split(".")[0] for i in imports(name)} - {"semiseg_nb", "__future__"} - sys.stdlib_module_names


# ---------------------------------------------------------------- modules

def test_every_module_that_has_a_floor_is_there(): assert set(MODULES) == set(FLOOR)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_lower_floors(name):
    higher = {n for n in own_imports(name) if FLOOR[n] >= FLOOR[name] and (name, n) not in NEIGHBOURS}
    assert not higher, f"{name} stands on floor {FLOOR[name]} and imports {sorted(higher)}"


def test_every_named_exception_is_in_use(): assert all(b in own_imports(a) for a, b in NEIGHBOURS)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_what_is_required(name):
    allowed = {IMPORT_NAMES.get(n, n) for n in names_of(settings()["requirements"].split())}
    assert foreign_imports(name) <= allowed | LAZY.get(name, set())
    assert name == "viz" or "matplotlib" not in foreign_imports(name), "pictures are the business of viz"


def test_every_requirement_is_imported_by_a_module():
    used = set().union(*map(foreign_imports, MODULES))
    needed = names_of(settings()["requirements"].split())
    assert {IMPORT_NAMES.get(n, n) for n in needed} <= used


def test_modules_import_without_notebook_tools(tmp_path):
    blocked = ["nbdev", "execnb", "fastcore", "IPython", "ipykernel", "ipywidgets", "jupyter", "jupyter_core", "jupyter_client", "jupyterlab",
               "nbformat", "nbclient", "nbconvert", "papermill", "notebook"]
    code = (f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
            f"import importlib\nfor name in {MODULES}: importlib.import_module('semiseg_nb.' + name)\nprint('imported', {len(MODULES)})")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and f"imported {len(MODULES)}" in done.stdout, done.stderr[-2000:]


def test_init_holds_the_version_and_nothing_else():
    assert (PACKAGE / "__init__.py").read_text() == f'__version__ = "{settings()["version"]}"\n'


# ---------------------------------------------------------------- notebooks and modules

def test_modules_are_those_that_notebooks_export():
    exported = [m for p in NOTEBOOKS for s in sources(p) for m in re.findall(r"^#\|\s*default_exp\s+(\S+)", s, re.M)]
    assert sorted(exported) == MODULES


def test_export_and_clean_change_nothing(tmp_path):
    "On a copy, so that nobody's work in progress is touched"
    kept = [*NOTEBOOKS, *sorted(PACKAGE.rglob("*.py"))]
    for path in [*kept, ROOT / "pyproject.toml"]:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    code = "from nbdev.doclinks import nbdev_export; from nbdev.clean import nbdev_clean; nbdev_export(); nbdev_clean()"
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=env, capture_output=True)
    changed = [str(p.relative_to(ROOT)) for p in kept if p.read_bytes() != (tmp_path / p.relative_to(ROOT)).read_bytes()]
    assert not changed, "run `make export`"
    made = {p.relative_to(tmp_path) for folder in ("nbs", "semiseg_nb") for p in (tmp_path / folder).rglob("*.*") if p.suffix in (".ipynb", ".py", ".txt")}
    assert made == {p.relative_to(ROOT) for p in kept}, "run `make export`, or remove the module whose notebook is gone"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_survives_the_way_through_text(path):
    nbtext = script("nbtext")
    nb = json.loads(path.read_text(encoding="utf-8"))
    back = nbtext.to_notebook(nbtext.to_text(nb), nb)
    assert json.dumps(back, sort_keys=True, indent=1, ensure_ascii=False) + "\n" == path.read_text(encoding="utf-8")


def test_an_edited_cell_loses_its_output_and_the_others_keep_theirs():
    nbtext = script("nbtext")
    old = nbtext.to_notebook("# %% md id=a\n# Title\n# %% code id=b tags=parameters\nx = 1\n\n# %% code id=c\nprint(x)\n", {})
    for cell in old["cells"][1:]: cell["outputs"] = [cell["id"]]
    new = nbtext.to_notebook(nbtext.to_text(old).replace("x = 1", "x = 2") + "# %% code\nx\n", old)
    assert [c.get("outputs") for c in new["cells"]] == [None, [], ["c"], []]
    assert [c["id"] for c in new["cells"]][:3] == ["a", "b", "c"] and new["cells"][3]["id"]
    assert new["cells"][1]["metadata"] == {"tags": ["parameters"]}
    with pytest.raises(SystemExit, match="must start with a cell"): nbtext.to_notebook("x = 1\n", {})


# ---------------------------------------------------------------- settings.ini and those that repeat it

def test_pyproject_repeats_settings():
    cfg, project = settings(), pyproject()["project"]
    assert project["name"] == cfg["lib_name"] and project["requires-python"] == f">={cfg['min_python']}"
    assert {"version", "description", "license", "authors", "dependencies", "optional-dependencies"} <= set(project["dynamic"])
    nbdev = pyproject()["tool"]["nbdev"]
    assert (nbdev["lib_path"], nbdev["nbs_path"]) == (cfg["lib_path"], cfg["nbs_path"])
    assert nbdev["allowed_cell_metadata_keys"] == ["tags"]
    assert nbdev["allowed_out_metadata_keys"] == ["image/png", "image/jpeg"], "the texts in the place of pictures stay"


def test_the_citation_file_repeats_settings():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["authors"]) == (settings()["version"], [{"name": settings()["author"]}])


def test_setup_hands_over_what_settings_say(monkeypatch):
    import setuptools
    cfg, given = settings(), {}
    monkeypatch.setattr(setuptools, "setup", lambda **k: given.update(k))
    exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"), {"__file__": str(ROOT / "setup.py"), "__name__": "setup"})
    assert (given["name"], given["version"], given["description"]) == (cfg["lib_name"], cfg["version"], cfg["description"])
    assert given["install_requires"] == cfg["requirements"].split()
    assert given["extras_require"] == {extra: cfg[f"{extra}_requirements"].split() for extra in ("dev", "bench", "export", "geo", "browser", "site")}
    assert set(cfg["export_requirements"].split()) <= set(cfg["dev_requirements"].split()), "the tests export"
    assert given["entry_points"]["console_scripts"] == [cfg["console_scripts"]]
    assert given["project_urls"] == {} or given["project_urls"]["Source"] == cfg["git_url"]


def test_every_requirement_has_a_lower_bound():
    cfg = settings()
    bare = [r for key in cfg if key.endswith("requirements") for r in cfg[key].split() if not re.fullmatch(r"[\w-]+>=\d[\d.]*", r)]
    assert not bare


def test_every_script_of_the_console_is_a_function():
    name, _, target = settings()["console_scripts"].partition(" = ")
    module, _, function = target.partition(":")
    assert name == "semiseg" and callable(getattr(importlib.import_module(module), function))


def test_environment_yml_lists_the_same_packages():
    cfg = settings()
    conda_names = {"pytorch": "torch", "matplotlib-base": "matplotlib", "huggingface_hub": "huggingface-hub"}
    env = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert env["name"] == cfg["lib_name"] and env["channels"] == ["conda-forge"]
    python, *tools = env["dependencies"][:4]
    assert python == f"python>={cfg['min_python']}" and tools == ["pip", "git", "make"]
    listed = {re.sub(r"^[\w-]+", lambda m: conda_names.get(m[0], m[0]), d) for d in env["dependencies"][4:]}
    assert listed == set(cfg["requirements"].split()) | set(cfg["dev_requirements"].split())


# ---------------------------------------------------------------- README

def test_readme_is_that_of_the_index_notebook():
    index = json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8"))
    assert readme() == script("readme").readme(index), "run `make readme`"


def test_readme_lists_the_notebooks_that_exist():
    assert set(re.findall(r"\]\(nbs/(\d\d_\w+\.ipynb)\)", readme())) == {p.name for p in NOTEBOOKS} - {"index.ipynb"}


def test_readme_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)", readme()) if "://" not in link]
    assert links and not [link for link in links if not (ROOT / link).exists()]


def test_index_links_lead_somewhere_from_its_own_folder():
    links = [link for s in sources(ROOT / "nbs/index.ipynb") for link in re.findall(r"\]\(([^)#]+)", s) if "://" not in link]
    assert links and not [link for link in links if not (ROOT / "nbs" / link).exists()]


def test_readme_argues_for_every_dependency():
    cfg = settings()
    rows = re.findall(r"^\| (`[\w-]+`(?:, `[\w-]+`)*) \|", readme(), re.M)
    argued = {name for row in rows for name in re.findall(r"`([\w-]+)`", row)}
    wanted = names_of(" ".join(v for k, v in cfg.items() if k.endswith("requirements")).split())
    assert argued == wanted


def test_readme_commands_name_parameters_that_exist():
    commands = re.findall(r"^papermill (nbs/\S+\.ipynb) (.*)$", readme().replace("\\\n", " "), re.M)
    assert commands
    for notebook, rest in commands: assert set(re.findall(r"-p (\w+)", rest)) <= set(papermill.inspect_notebook(str(ROOT / notebook)))


def test_readme_make_targets_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    assert {"demo", "test", "lab"} <= set(re.findall(r"\bmake (\w+)", readme())) <= targets


@pytest.mark.slow
def test_readme_script_runs(tmp_path):
    block, = (b for b in re.findall(r"```python\n(.*?)```", readme(), re.S) if "run(" in b)
    assert "steps=900" in block and len([line for line in block.splitlines() if line.strip()]) <= 10
    (tmp_path / "script.py").write_text(block.replace("steps=900", "steps=3"))
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"^0\.\d+$", done.stdout, re.M)


def test_readme_calls_the_command_as_it_is():
    from semiseg_nb.command import parse
    from semiseg_nb.experiment import methods
    calls = re.findall(r"^semiseg (.+?)(?:  +#.*)?$", readme(), re.M)
    assert {words.split()[0] for words in calls} == {"import", "check", "train", "verdict", "predict", "export", "score", "report", "methods", "lessons"}
    for words in map(str.split, calls):
        parsed = parse(words)
        assert getattr(parsed, "method", None) is None or parsed.method in methods(), words


def test_readme_is_short():
    assert len(readme().splitlines()) <= 200
    assert len(re.findall(r"^\| .* \| 0\.\d{3} \|", readme(), re.M)) == 10


# ---------------------------------------------------------------- make

def fake_python(folder, body):
    for name in ("python", "python3", *(f"python3.{minor}" for minor in range(11, 20))):
        path = folder / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IEXEC)


@pytest.mark.parametrize(("body", "sentence"), [
    ("exit 1", "semiseg_nb needs Python 3.11 or newer"),
    ('case "$2" in *venv*) exit 1;; esac', "has no venv module"),
], ids=["old python", "no venv"])
def test_make_says_in_one_sentence_what_is_missing(tmp_path, body, sentence):
    for name in ("Makefile", "settings.ini", "setup.py", "pyproject.toml"): shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    fake_python(tmp_path / "bin", body)
    env = {k: v for k, v in os.environ.items() if not k.startswith("MAKE") and k != "PY"} | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(["make", "install"], cwd=tmp_path, env=env, capture_output=True, text=True)
    said = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("make")]
    assert done.returncode != 0 and len(said) == 1 and sentence in said[0] and said[0].endswith("run make again.")
    assert not (tmp_path / ".venv").exists()


def test_ci_runs_what_a_person_runs():
    run = ROOT / ".ci/run"
    assert os.access(run, os.X_OK)
    commands = [line for line in run.read_text().splitlines() if line and not line.startswith(("#", "set ", "cd "))]
    assert commands[-1] == "exec make test"
    assert [line for line in commands if "apt-get install" in line], "JupyterLab is tested in a browser"
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]
    assert [step["run"] for step in jobs["steps"] if "run" in step] == ["bash .ci/run"]
    assert jobs["strategy"]["matrix"]["python"][0] == settings()["min_python"]


def test_forms_for_issues_are_whole():
    forms = {p.stem: yaml.safe_load(p.read_text()) for p in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")}
    assert set(forms) == {"bug", "data-set", "method"}
    for form in forms.values():
        ids = [field["id"] for field in form["body"]]
        assert form["name"] and form["description"] and len(ids) == len(set(ids))


def test_hooks_before_a_commit_are_the_projects_own():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    repo, = config["repos"]
    assert repo["repo"] == "local" and [hook["id"] for hook in repo["hooks"]] == ["ruff", "sync", "readme"]
    own = " ".join(re.findall(r"^def (test_\w+)", Path(__file__).read_text(), re.M))
    for hook in repo["hooks"]:
        for name in re.findall(r"\w+", "".join(re.findall(r'-k "(.+)"', hook["entry"])).replace(" or ", " ")): assert name in own


def test_a_lesson_is_run_on_a_copy():
    makefile, = re.findall(r"^lab:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
    assert "semiseg_nb lessons _lessons" in makefile and "--notebook-dir _lessons/nbs" in makefile
    assert "_lessons/" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_changelog_begins_with_this_version():
    versions = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert next(v for v, _ in versions if v != "Unreleased") == settings()["version"]
    assert (settings()["version"], str(citation["date-released"])) in versions
