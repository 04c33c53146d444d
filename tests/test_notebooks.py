"""Every notebook runs from top to bottom under papermill, stops at a parameter that it does not have, and is fit to be read and diffed."""
import ast
import io
import json
import re
import tempfile
import tokenize
from functools import cache
from pathlib import Path

import papermill
import pytest
import yaml
from helpers import awkward_folder
from kernels import fork_kernels
from papermill.exceptions import PapermillExecutionError
from PIL import Image
from safetensors import safe_open
from traitlets.config import Config

from semiseg_nb.checkpoint import read_weights
from semiseg_nb.command import sort_names
from semiseg_nb.core import UserError, check_parameters, notebook_parameters
from semiseg_nb.experiment import find_method

fork_kernels()
ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
SMOKE = yaml.safe_load((ROOT / "nbs/params/smoke.yaml").read_text())
COMMON = ("dataset data_root n_labelled split_seed model encoder size batch_size steps lr seed device out_dir resume").split()


def number(path): return int(path.name[:2]) if path.name[:2].isdigit() else -1


def each(paths): return pytest.mark.parametrize("path", paths, ids=lambda p: p.stem)


@cache
def read(path): return json.loads(path.read_text(encoding="utf-8"))
def code_cells(path): return [c for c in read(path)["cells"] if c["cell_type"] == "code"]
def source(cell): return "".join(cell["source"])
def tagged(path): return [c for c in code_cells(path) if "parameters" in c["metadata"].get("tags", [])]
@cache
def declared(path): return papermill.inspect_notebook(str(path))


METHODS = [p for p in NOTEBOOKS if 10 <= number(p) < 50 and tagged(p)]  # the others are pieces that methods share: nothing is trained there
NO_LABELS = {"40_stylegan2", "41_semanticgan"}  # label no given image: no segmenter among their parameters, no record for the leaderboard
NO_RECORD = NO_LABELS | {"15_failures"}  # mistakes made on purpose
OWN_DATA = {"17_tags", "45_inversion"}          # image tags; a generator trained on the same images: any other folder is refused
ON_A_FOLDER = [p for p in METHODS if p.stem not in OWN_DATA] + [ROOT / "nbs/95_your_method.ipynb"]
OUTCOME = [p for p in ON_A_FOLDER if p.stem not in NO_LABELS | {"15_failures", "46_mask_cycle"}]  # 46: a variant of 42
FOLDER = {"dataset": "folder", "look": {"target_split": "unlabelled_far", "target_val": "ood_far"}, "targets": ["ood_far"]}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    "Somebody's images: for every second notebook the unlabelled ones have no masks anywhere"
    root = tmp_path_factory.mktemp("folders")
    return {hidden: awkward_folder(root / f"awkward-{hidden}", bool(hidden)) for hidden in (0, 1)}


def execute(path, cwd=ROOT, **parameters):
    """Run a notebook as a person would from the root of the repository; its pipes (no open ports) have names of their own, for notebooks run side by side.
    Nothing is written but what the notebook writes: papermill would save all of it before and after every cell, a quarter of the time."""
    with tempfile.TemporaryDirectory() as pipes:
        config = Config({"KernelManager": {"transport": "ipc", "ip": f"{pipes}/kernel"}})
        return papermill.execute_notebook(str(path), None, parameters=parameters, cwd=str(cwd), progress_bar=False, config=config)


def smoke_parameters(path, folder, data_root=None):
    "The smoke values for the names that a notebook declares, with its files in a folder of the test"
    names = declared(path)
    values = {k: v for k, v in (SMOKE | (FOLDER | {"data_root": str(data_root)} if data_root else {})).items() if k in names}
    return values | ({"out_dir": str(folder / "out")} if "out_dir" in names else {})


def markdown_outputs(nb):
    return ["".join(o["data"]["text/markdown"]) for c in nb["cells"] for o in c.get("outputs", []) if "text/markdown" in o.get("data", {})]


def words_of(nb):
    "Everything that the code of a notebook has printed"
    outputs = [o for c in nb["cells"] for o in c.get("outputs", [])]
    return "\n".join("".join(o.get("text", "")) + "".join(o.get("data", {}).get("text/markdown", "")) for o in outputs)


@pytest.mark.slow
@each(NOTEBOOKS)
def test_runs_with_the_smoke_parameters(path, tmp_path, folders):
    """What trains a method runs on a folder of somebody's own images instead of scenes; what is drawn for a demonstration is drawn all the same"""
    data_root = folders[number(path) % 2] if path in ON_A_FOLDER else None
    nb = execute(path, **smoke_parameters(path, tmp_path, data_root))
    if data_root: assert not re.search("scene", words_of(nb), re.I), "nobody has asked for scenes"
    if path in OUTCOME:
        masks = list((tmp_path / "out").rglob("predictions/masks/**/*.png"))
        record, = {Path(str(m).split("/predictions/")[0]) for m in masks}
        assert record.with_suffix(".json").is_file(), "what comes out lies beside the record, in a folder of its name"
        assert Image.open(next(m for m in masks if m.stem in ("v0", "o0"))).size in {(5, 7), (50, 39)}, "a mask has the size of its picture"
    if path in METHODS and path.stem not in NO_RECORD:
        records = [json.loads(p.read_text()) for p in (tmp_path / "out").rglob("*.json")]
        records = [r for r in records if "schema" in r]
        assert records, "a method's notebook writes the record of its run"
        assert {r["profile"] for r in records} == {"smoke"}, "a run of a few steps may never pass for more"
    if path.stem == "index":
        assert markdown_outputs(nb) == markdown_outputs(read(path)), "run nbs/index.ipynb again: its tables are not those of results/"


@pytest.mark.slow
@each([p for p in METHODS if "skip_training" in declared(p)])
def test_runs_with_its_stored_weights(path, tmp_path):
    quick = {k: v for k, v in {"steps": 2, "oracle_steps": 2}.items() if k in declared(path)}  # of what is trained beside them
    nb = execute(path, skip_training=True, device="cpu", out_dir=str(tmp_path / "out"), **quick)
    assert any({"image/png", "image/jpeg"} & set(o.get("data", {})) for c in nb["cells"] for o in c.get("outputs", []))


@pytest.mark.slow
def test_a_folder_that_cannot_be_used_is_refused_in_one_sentence(tmp_path, folders):
    path = ROOT / "nbs/45_inversion.ipynb"
    with pytest.raises(PapermillExecutionError) as error: execute(path, **smoke_parameters(path, tmp_path, folders[0]))
    assert error.value.ename == "UserError" and "does not hold a SemanticGAN for 'awkward-0'" in error.value.evalue
    assert not list(tmp_path.rglob("*.json")), "nothing was trained before"


@pytest.mark.slow
def test_a_copy_runs_from_anywhere_and_takes_a_size_as_text(tmp_path, folders):
    "As `papermill copy/95_your_method.ipynb out.ipynb -p size \"[24, 32]\"` does from any folder, one with a folder results/ of its own"
    path = tmp_path / "copy/95_your_method.ipynb"
    path.parent.mkdir()
    path.write_bytes((ROOT / "nbs/95_your_method.ipynb").read_bytes())
    (tmp_path / "elsewhere/results").mkdir(parents=True)
    execute(path, tmp_path / "elsewhere", **smoke_parameters(path, tmp_path, folders[0]) | {"size": "[24, 32]", "out_dir": "runs"})
    records = [json.loads(p.read_text()) for p in (tmp_path / "elsewhere/runs").glob("*/*.json")]
    assert {tuple(r["dataset"]["size"]) for r in records if "schema" in r} == {(24, 32)}


@each([p for p in NOTEBOOKS if number(p) >= 0])
def test_files_of_the_repository_are_found_from_anywhere(path):
    "A path such as 'results' or 'nbs/weights/...' is handed to `find`, which looks in the lessons whatever the working directory is"
    opened, given = {"Path", "open", "read_records", "read_reference", "read_weights", "load_weights", "read_json"}, set()
    for cell in code_cells(path):
        calls = [node for node in ast.walk(ast.parse(source(cell))) if isinstance(node, ast.Call) and node.args]
        given |= {id(part) for call in calls if ast.unparse(call.func) in ("find", "existing") for part in ast.walk(call)}
        for call in calls:
            name = call.args[0].value if isinstance(call.args[0], ast.Constant) else None
            if ast.unparse(call.func) not in opened or id(call) in given or not isinstance(name, str): continue
            assert not re.match(r"(\.\./|\./)*(nbs|results|weights|params)\b", name), f"cell {cell['id']} opens {name!r}"


@each(OUTCOME)
def test_a_methods_notebook_ends_in_what_people_use(path):
    assert sum(bool(re.search(r"\boutcome\(.*\)\.show\(\)", source(c), re.S)) for c in code_cells(path)) == 1


@each([p for p in NOTEBOOKS if tagged(p)])
def test_an_unknown_parameter_stops_the_notebook(path):
    "The cell after the parameters compares them first; what papermill does with a notebook that stops is the same for all, see below"
    cells, (parameters,) = code_cells(path), tagged(path)
    check, injected = cells[cells.index(parameters) + 1], "# Parameters\nstepz = 1\n"
    statement = next(node for node in ast.parse(source(check)).body if not isinstance(node, ast.Import | ast.ImportFrom))
    assert "notebook_parameters(globals())" in ast.unparse(statement), "it stops before anything is computed"
    namespace = {"notebook_parameters": notebook_parameters, "In": [source(parameters), injected]}
    for text in (source(parameters), injected): exec(text, namespace)
    with pytest.raises(UserError, match=r"parameter 'stepz' is not known.*choose one of .*\."): exec(ast.unparse(statement), namespace)
    namespace["In"] = [source(parameters)]
    exec(ast.unparse(statement), namespace)


@each([p for p in NOTEBOOKS if tagged(p)])
def test_a_size_may_be_two_numbers(path):
    "`papermill -p size \"[96, 128]\"` hands over text: the cells get a list, or one sentence where only squares are drawn"
    (cell,), given = tagged(path), {}
    exec(source(cell), given)
    for name in {"size", "crop"} & set(given):
        namespace = given | {"In": [source(cell), f"# Parameters\n{name} = '[96, 128]'\n"], name: "[96, 128]"}
        if given[name] is None: assert notebook_parameters(namespace)[name] == namespace[name] == [96, 128]
        else:
            with pytest.raises(UserError, match=f"parameter '{name}' is .96, 128., but it should be of the kind int"): notebook_parameters(namespace)


@pytest.mark.slow
def test_papermill_stops_at_an_unknown_parameter(tmp_path):
    path = ROOT / "nbs/11_uda.ipynb"
    with pytest.raises(PapermillExecutionError) as error: execute(path, **smoke_parameters(path, tmp_path), stepz=1)
    assert error.value.ename == "UserError" and "parameter 'stepz' is not known" in error.value.evalue
    assert not list(tmp_path.rglob("*.json")), "it stops before anything is computed"


def test_every_smoke_parameter_is_declared_somewhere():
    assert set(SMOKE) <= {name for path in NOTEBOOKS for name in declared(path)}


def test_a_parameter_file_fits_its_notebook():
    for path in (ROOT / "nbs/params").glob("*-*.yaml"):
        notebook, = (p for p in METHODS if p.stem.split("_", 1)[1] == path.stem.split("-")[0])
        values, defaults = yaml.safe_load(path.read_text()), {}
        known = set(declared(notebook))
        others = {k: v for k, v in values.items() if k not in known}                       # what a lesson leaves to `semiseg train`
        if others: sort_names(others, find_method(path.stem.split("-")[0]))                # raises for a name that it does not take
        cell, = tagged(notebook)
        exec(source(cell), defaults)
        check_parameters(source(cell), "", defaults | {k: v for k, v in values.items() if k in known})  # and the values are of the right kind


@each(NOTEBOOKS)
def test_parameters_are_commented_literals(path):
    cells = tagged(path)
    assert len(cells) == 1 if path in METHODS else len(cells) <= 1
    for cell in cells:
        text = source(cell)
        assert text.startswith("# parameters\n"), "its first line is how `notebook_parameters` finds it"
        comments = {t.start[0] for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT}
        names = []
        for node in ast.parse(text).body:
            assert isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name), ast.unparse(node)
            ast.literal_eval(node.value)
            assert node.end_lineno in comments, f"no comment says what {node.targets[0].id} is"
            names.append(node.targets[0].id)
        assert len(names) == len(set(names))
        if path in METHODS: assert set(COMMON) <= set(names) | ({"model", "encoder"} if path.stem in NO_LABELS else set())


@each(NOTEBOOKS)
def test_stored_outputs_are_whole_and_clean(path):
    nb = read(path)
    outputs = [o for c in nb["cells"] for o in c.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error"]
    assert not any("injected-parameters" in c["metadata"].get("tags", []) for c in nb["cells"]), "outputs come from the lesson run"
    if number(path) >= 0 and path.stem != "08_records":  # whose subject is text
        assert any({"image/png", "image/jpeg"} & set(o.get("data", {})) for o in outputs), "a reader on the web sees pictures"
    for o in outputs:
        for form in {"image/png", "image/jpeg"} & set(o.get("data", {})):
            assert o["metadata"].get(form, {}).get("alt"), "a picture without words for who cannot see it: use viz.show(fig, alt)"
    assert path.stat().st_size <= 700_000


@each(NOTEBOOKS)
def test_no_path_of_a_machine(path):
    nb = read(path)
    texts = [source(c) for c in nb["cells"]]
    for output in (o for c in nb["cells"] for o in c.get("outputs", [])):
        texts += [json.dumps(v) for k, v in output.get("data", {}).items() if not k.startswith("image/")] + ["".join(output.get("text", []))]
    for text in texts: assert not re.search(r"(?<![\w.])/(home|root|tmp|work|Users|mnt|private)/\w|\b[A-Z]:\\\\?Users", text), text[:500]


@each(NOTEBOOKS)
def test_cells_are_short_and_explicit(path):
    nb = read(path)
    ids = [c.get("id") for c in nb["cells"]]
    assert all(ids), "every cell has an id, or each save makes new ones"
    assert len(ids) == len(set(ids)), "an id stands twice"
    assert nb["cells"][0]["cell_type"] == "markdown" and source(nb["cells"][0]).startswith("# ")
    for cell in code_cells(path):
        text = source(cell)
        most = 140 if text.startswith("#| export") else 45  # a class, or a function with its docments, stands in one cell
        assert len([line for line in text.splitlines() if not line.startswith("#|")]) <= most, f"cell {cell['id']} is too long to find an error in"
        assert not re.search(r"^\s*(from \S+ import \*|[!%]\s*(pip|conda|apt))", text, re.M), cell["id"]
        assert not re.search(r"\b(TODO|FIXME|XXX)\b|except[^:]*:\s*pass\b", text), cell["id"]


@each([p for p in NOTEBOOKS if number(p) >= 0])
def test_one_notebook_exports_one_module(path):
    modules = [m for c in code_cells(path) for m in re.findall(r"^#\|\s*default_exp\s+(\S+)", source(c), re.M)]
    exported = [c for c in code_cells(path) if re.match(r"#\|\s*export\b", source(c))]
    assert len(modules) == (1 if exported else 0)
    if modules: assert path.stem == f"{number(path):02d}_{modules[0]}"


def test_stored_weights_are_small_and_described():
    stored = sorted((ROOT / "nbs/weights").glob("*.safetensors"))
    assert {p.stem for p in stored} == {p.stem for p in METHODS if "skip_training" in declared(p)}, "a notebook that can skip training ships its weights"
    for path in stored:
        assert path.stat().st_size < 5e6 and not path.with_suffix(".json").exists(), path.name
        _, card = read_weights(path)                                                        # one file: tensors, card, fingerprint
        with safe_open(path, "pt") as f: assert card and f.metadata()["fingerprint"], path.name
