"""Sources of the site: each notebook without what needs a kernel, a page for each module from its signatures and docments, and the leaderboard."""
import ast
import base64
import json
import os
import posixpath
import re
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WIDGET = "application/vnd.jupyter.widget-view+json"
PICTURES = {"image/png": "png", "image/jpeg": "jpg"}
SLIDERS = "*Sliders stand here in the notebook. A page on the web has none: run the lesson to move them.*"
PROSE = ("CONTRIBUTING.md", "CHANGELOG.md")


def settings():
    ini = ConfigParser(interpolation=None)
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    return ini["DEFAULT"]


def repository() -> str:
    "Address of the repository: that of settings.ini, or of the workflow that builds the site, or ''"
    host, name = (os.environ.get(f"GITHUB_{key}", "") for key in ("SERVER_URL", "REPOSITORY"))
    return settings()["git_url"].rstrip("/") or (f"{host}/{name}" if host and name else "")


def markdown_cell(id: str, text: str) -> dict: return {"cell_type": "markdown", "id": id, "metadata": {}, "source": text}
def source(cell: dict) -> str: return "".join(cell["source"])


# ---------------------------------------------------------------- prose

def local_links(
    text: str,  # Markdown of a file of the repository
    folder: str,  # that of the file: "nbs", or "" for the root
    repo: str,  # address of the repository, "": none, and what is not on the site is named without a link
) -> str:
    "Links to other files turned to their pages, or to the repository"
    def link(m):
        words, target = m.groups()
        path = posixpath.normpath(posixpath.join(folder, target))
        if path in PROSE: return f"[{words}]({path})"
        if path.startswith("nbs/") and path.split("#")[0].endswith(".ipynb"): return f"[{words}]({path.removeprefix('nbs/')})"
        return f"[{words}]({repo}/blob/main/{path})" if repo else words
    return re.sub(r"(?<!!)\[([^\]]+)\]\((?!\w+:|#)([^)\s]+)\)", link, text)


def badges(
    stem: str,  # of a notebook
    repo: str,
) -> str:
    "Links that open a notebook elsewhere, as text: a page loads nothing from other servers"
    if not repo: return ""
    path, links = f"nbs/{stem}.ipynb", {}
    if "//github.com/" in repo:
        name = repo.split("//github.com/")[1]
        links["Open in Colab"] = f"https://colab.research.google.com/github/{name}/blob/main/{path}"
        links["Open in Binder"] = f"https://mybinder.org/v2/gh/{name}/main?labpath={path.replace('/', '%2F')}"
    links["The notebook"] = f"{repo}/blob/main/{path}"
    row = " ".join(f'<a class="badge" href="{url}">{words}</a>' for words, url in links.items())
    hint = f" Colab needs <code>%pip install git+{repo}</code> in a first cell." if len(links) > 1 else ""
    return f'<p class="badges">{row}{hint}</p>'


# ---------------------------------------------------------------- notebooks

def markdown_output(text: str) -> dict: return {"output_type": "display_data", "metadata": {}, "data": {"text/markdown": text}}


def exported(nb: dict) -> str:
    "The module that a notebook exports, or ''"
    found = re.search(r"^#\|\s*default_exp\s+(\S+)", "\n".join(map(source, nb["cells"])), re.M)
    return found[1] if found else ""


def outputs(
    cell: dict,
    name: str,  # of the cell's pictures, without an ending
) -> tuple[list, dict]:  # the outputs of the page, and name -> bytes of its pictures
    "What a cell shows on a page: sliders are a sentence there, progress bars nothing, pictures files with a text in their place"
    kept, pictures = [], {}
    for output in cell["outputs"]:
        data, plain = output.get("data", {}), "".join(output.get("data", {}).get("text/plain", ""))
        kind = next((k for k in PICTURES if k in data), None)
        if WIDGET in data:
            if "0%|" not in plain: kept.append(markdown_output(SLIDERS))
        elif kind:
            alt = output["metadata"].get(kind, {}).get("alt", "").strip() or "A figure of the code above"
            file = f"{name}-{len(pictures) + 1}.{PICTURES[kind]}"
            pictures[file] = base64.b64decode("".join(data[kind]))
            words = re.sub(r"([][*_`$<>\\])", r"\\\1", " ".join(alt.split()))
            kept.append(markdown_output(f"![{words}](pictures/{file})"))
        else: kept.append(output)
    return kept, pictures


def lesson(
    nb: dict,  # a notebook with its outputs
    stem: str,
    repo: str,
) -> tuple[dict, dict]:  # the notebook of the page, and name -> bytes of its pictures
    "A notebook as a page: directives are taken out, hidden cells too, and badges stand under the title"
    cells, pictures = [], {}
    for cell in nb["cells"]:
        text = source(cell)
        directives = re.findall(r"^#\|\s*(\w+)", text, re.M)
        if "hide" in directives: continue
        cell = {k: v for k, v in cell.items() if k != "attachments"} | {"metadata": {"tags": ["exported"] if "export" in directives else []}}
        if cell["cell_type"] == "markdown": cell["source"] = local_links(text, "nbs", repo)
        else:
            cell["source"] = re.sub(r"^#\|.*\n?", "", text, flags=re.M).strip("\n")
            cell["outputs"], own = outputs(cell, f"{stem}-{cell['id']}")
            pictures |= own
            if not cell["source"]: continue
        cells.append(cell)
    title, _, rest = source(cells[0]).partition("\n")
    name = exported(nb)
    origin = f"Cells with a blue edge make up the module [`semiseg_nb.{name}`](api/{name}.md)." if name else ""
    cells[0]["source"] = "\n\n".join(filter(None, [title, badges(stem, repo), rest.strip("\n"), origin]))
    return {**nb, "metadata": {"kernelspec": nb["metadata"]["kernelspec"]}, "cells": cells}, pictures


def leaderboard(nb: dict) -> dict:
    "The page of notebook 91's results alone: its tables and charts, without the code that makes them"
    cells, before = [], []
    for cell in nb["cells"][1:]:
        if cell["cell_type"] == "markdown": before = [cell]
        elif any("data" in output for output in cell["outputs"]):
            cells += [*before, {**cell, "metadata": {"tags": ["remove-input"]}}]
            before = []
    title = "# Leaderboard\n\nEvery record under `results/`. How rows are compared, and the code, stand in [the lesson](91_leaderboard.ipynb)."
    return {**nb, "cells": [markdown_cell("title", title), *cells]}


# ---------------------------------------------------------------- modules

def signature(node: ast.AST, lines: list[str]) -> str:
    "The head of a function as it is written, with its docments"
    first, last = node.lineno - 1, node.body[0].lineno - 1
    if first == last: return lines[first][:node.body[0].col_offset].strip()
    head = lines[first:last]
    return "\n".join(line[node.col_offset:] for line in head).rstrip()


def prose(node: ast.AST) -> str:
    "A docstring as Markdown: what looks like a tag of HTML is text"
    return re.sub(r"(`[^`]*`)|<", lambda m: m[1] or r"\<", ast.get_docstring(node) or "")


def described(
    node: ast.AST,  # a function or a class
    lines: list[str],  # of its module
    level: int,  # of its heading
    owner: str = "",  # the class of a method
) -> list[str]:  # blocks of Markdown
    "Name, what it does, signature; of a class its fields and public methods too"
    name = f"{owner}.{node.name}" if owner else node.name
    blocks = [f"{'#' * level} `{name}`", prose(node)]
    if isinstance(node, ast.FunctionDef): return [*blocks, f"```python\n{signature(node, lines)}\n```"]
    functions = [f for f in node.body if isinstance(f, ast.FunctionDef)]
    fields = [lines[f.lineno - 1].strip() for f in node.body if isinstance(f, ast.AnnAssign)]
    bases = ", ".join(map(ast.unparse, node.bases))
    head = [f"class {node.name}{f'({bases})' if bases else ''}", *(f"    {field}" for field in fields)]
    for f in functions:
        if f.name == "__init__": head += ["", *("    " + line for line in signature(f, lines).splitlines())]
    blocks.append("```python\n" + "\n".join(head) + "\n```")
    for f in functions:
        if not f.name.startswith("_"): blocks += described(f, lines, level + 1, node.name)
    return blocks


def summary(module: ast.Module) -> str: return (ast.get_docstring(module) or "").splitlines()[0]


def api(
    name: str,  # of a module
    code: str,  # its text
    notebook: str,  # stem of the notebook that exports it
) -> str:  # Markdown
    "The page of a module: everything that it exports, in the order of the notebook"
    module, lines = ast.parse(code), code.splitlines()
    public = next(ast.literal_eval(n.value) for n in module.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__")
    blocks = [f"# `semiseg_nb.{name}`", f"{summary(module)} Built in [{notebook}](../{notebook}.ipynb)."]
    constants = []
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in public: blocks += described(node, lines, 2)
        elif isinstance(node, ast.Assign) and {n.id for n in ast.walk(node.targets[0]) if isinstance(n, ast.Name)} & set(public):
            constants += lines[node.lineno - 1:node.end_lineno]
    if constants: blocks[2:2] = ["## Constants", "```python\n" + "\n".join(constants) + "\n```"]
    return "\n\n".join(filter(None, blocks)) + "\n"


def api_index(modules: dict) -> str:  # name -> (text, stem of the notebook)
    "All modules in the order of their notebooks, with one line each"
    rows = [f"| [`{name}`]({name}.md) | {summary(ast.parse(code))} |" for name, (code, _) in modules.items()]
    tree = "\n".join(modules)
    return "\n".join(["# Modules", "", "What each module exports, from its signatures and the comments beside its parameters.", "",
                      "| module | what it holds |", "|---|---|", *rows, "", f"```{{toctree}}\n:hidden:\n\n{tree}\n```", ""])


# ---------------------------------------------------------------- all of it

def contents(text: str) -> str:
    "Hidden tables of contents, one for each table of lessons in the index"
    trees = []
    for part in re.split(r"^###? ", text, flags=re.M)[1:]:
        firsts = re.findall(r"^\| (\[.*?) \|", part, re.M)
        stems = list(dict.fromkeys(stem for cell in firsts for stem in re.findall(r"\((\d\d_\w+)\.ipynb\)", cell)))
        if stems: trees.append((part.splitlines()[0], stems))
    trees.append(("Reference", ["leaderboard", "api/index", *(name.removesuffix(".md") for name in PROSE)]))
    return "\n\n".join(f"```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(stems) + "\n```" for caption, stems in trees)


def write(out: Path, notebooks: list[Path], repo: str) -> None:
    "Write the sources of the site into a folder"
    for folder in ("pictures", "api"): (out / folder).mkdir(parents=True, exist_ok=True)
    modules = {}
    for path in notebooks:
        nb = json.loads(path.read_text(encoding="utf-8"))
        page, pictures = lesson(nb, path.stem, repo)
        if path.stem == "index": page["cells"].append(markdown_cell("contents", contents("\n".join(map(source, nb["cells"])))))
        pages = {path.stem: page} | ({"leaderboard": leaderboard(page)} if path.stem == "91_leaderboard" else {})
        for stem, page in pages.items(): (out / f"{stem}.ipynb").write_text(json.dumps(page), encoding="utf-8")
        for name, data in pictures.items(): (out / "pictures" / name).write_bytes(data)
        name = exported(nb)
        if name: modules[name] = ((ROOT / f"semiseg_nb/{name}.py").read_text(encoding="utf-8"), path.stem)
    for name, (code, stem) in modules.items(): (out / f"api/{name}.md").write_text(api(name, code, stem), encoding="utf-8")
    (out / "api/index.md").write_text(api_index(modules), encoding="utf-8")
    for name in PROSE: (out / name).write_text(local_links((ROOT / name).read_text(encoding="utf-8"), "", repo), encoding="utf-8")
