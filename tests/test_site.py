"""The site: notebooks and modules as pages, what a check of built pages finds, and, with the extra `[site]`, all of it in a browser."""
import ast
import base64
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import check
import pages
import pytest
import yaml
from browser import browser

ROOT = Path(__file__).resolve().parents[1]
REPO = "https://github.com/someone/semiseg_nb"
EXTRA = ("sphinx", "myst_nb", "furo", "latex2mathml")
DOT = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")


def code(source, *outputs, id="c"): return {"cell_type": "code", "id": id, "metadata": {}, "source": source, "outputs": list(outputs), "execution_count": None}
def shown(kind, data, plain="", alt=None): return {"output_type": "display_data", "data": {kind: data, "text/plain": plain}, "metadata": {kind: {"alt": alt}} if alt else {}}
def notebook(*cells): return {"cells": [{"cell_type": "markdown", "id": "t", "metadata": {}, "source": "# Title\nWords."}, *cells], "metadata": {"kernelspec": {"name": "python3"}}, "nbformat": 4, "nbformat_minor": 5}
def texts(cells): return ["".join(o["data"]["text/markdown"]) for c in cells for o in c["outputs"]]


# ---------------------------------------------------------------- notebooks

def test_directives_and_hidden_cells_are_not_on_a_page():
    page, _ = pages.lesson(notebook(code("#| default_exp x"), code("#| hide\nsecret = 1"), code("#| export\nx = 1"), code("#|export\ny = 2")), "11_x", "")
    assert [c["source"] for c in page["cells"][1:]] == ["x = 1", "y = 2"]
    assert page["cells"][1]["metadata"] == {"tags": ["exported"]}
    assert page["cells"][0]["source"] == "# Title\n\nWords.\n\nCells with a blue edge make up the module [`semiseg_nb.x`](api/x.md)."


def test_sliders_become_a_sentence_and_progress_bars_nothing():
    slider, bar = shown(pages.WIDGET, {}, "VBox(children=())"), shown(pages.WIDGET, {}, "UDA:   0%|          | 0/60")
    strip = shown("image/png", base64.b64encode(DOT).decode(), alt="alpha = 0.2: [two] states")
    page, pictures = pages.lesson(notebook(code("controls()", slider, bar, strip)), "11_x", "")
    sentence, picture = texts(page["cells"][1:])
    assert "run the lesson to move them" in sentence and pictures == {"11_x-c-1.png": DOT}
    assert picture == r"![alpha = 0.2: \[two\] states](pictures/11_x-c-1.png)"


def test_links_lead_to_pages_or_to_the_repository():
    text = "[a](11_uda.ipynb) [b](../CONTRIBUTING.md) [c](../LICENSE) [d](https://arxiv.org) [e](#here) ![f](x.png)"
    assert pages.local_links(text, "nbs", REPO) == f"[a](11_uda.ipynb) [b](CONTRIBUTING.md) [c]({REPO}/blob/main/LICENSE) [d](https://arxiv.org) [e](#here) ![f](x.png)"
    assert pages.local_links("[c](LICENSE) [u](nbs/11_uda.ipynb)", "", "") == "c [u](11_uda.ipynb)"


def test_badges_open_the_notebook_in_colab_and_binder(monkeypatch):
    row = pages.badges("11_uda", REPO)
    assert 'href="https://colab.research.google.com/github/someone/semiseg_nb/blob/main/nbs/11_uda.ipynb"' in row
    assert 'href="https://mybinder.org/v2/gh/someone/semiseg_nb/main?labpath=nbs%2F11_uda.ipynb"' in row and f"git+{REPO}" in row
    assert "colab" not in pages.badges("11_uda", "https://code.example.org/x") and pages.badges("11_uda", "") == ""
    monkeypatch.setenv("GITHUB_SERVER_URL", "https://github.com")
    monkeypatch.setenv("GITHUB_REPOSITORY", "someone/semiseg_nb")
    assert pages.repository() == (pages.settings()["git_url"] or REPO)


def test_binder_makes_the_environment_and_installs_the_package():
    assert (ROOT / ".binder/environment.yml").read_text() == (ROOT / "environment.yml").read_text()
    assert os.access(ROOT / ".binder/postBuild", os.X_OK) and "pip install --no-deps -e ." in (ROOT / ".binder/postBuild").read_text()


def test_the_leaderboard_shows_results_without_code():
    page = pages.leaderboard(json.loads((ROOT / "nbs/91_leaderboard.ipynb").read_text()))
    assert sum(c["cell_type"] == "code" for c in page["cells"]) >= 3
    assert all(c["metadata"]["tags"] == ["remove-input"] for c in page["cells"] if c["cell_type"] == "code")
    assert any("| method | mIoU" in "".join(o["data"].get("text/markdown", "")) for c in page["cells"] for o in c.get("outputs", []) if "data" in o)


# ---------------------------------------------------------------- modules

MODULE = '''"""What it holds."""
__all__ = ["LIMIT", "short", "Long"]
LIMIT = 3  # of something
def short(x: int) -> int: return x
def _private(): pass
@checked
class Long(Base):
    "A class with <tags> and `<code>`"
    field: int = 3  # a field
    def __init__(
        self,
        n: int,  # how many
    ):
        self.n = n
    def method(self) -> int:  # the number
        "Says it"
        return self.n
    def _hidden(self): return 1
'''


def test_a_module_page_holds_signatures_with_their_docments():
    page = pages.api("x", MODULE, "11_x")
    assert page.startswith("# `semiseg_nb.x`\n\nWhat it holds. Built in [11_x](../11_x.ipynb).\n\n## Constants")
    assert "LIMIT = 3  # of something" in page and "## `short`\n\n```python\ndef short(x: int) -> int:\n```" in page
    assert "A class with \\<tags> and `<code>`" in page
    assert "class Long(Base)\n    field: int = 3  # a field\n\n    def __init__(\n        self,\n        n: int,  # how many\n    ):\n```" in page
    assert "### `Long.method`\n\nSays it\n\n```python\ndef method(self) -> int:  # the number\n```" in page
    assert "return" not in page and "_private" not in page and "_hidden" not in page


def test_every_exported_name_is_on_the_page_of_its_module():
    for path in (ROOT / "semiseg_nb").glob("[a-z]*.py"):
        text = path.read_text(encoding="utf-8")
        page = pages.api(path.stem, text, "00_x")
        constants = re.findall(r"^## Constants\n(.*?)^```$", page.replace("```python", ""), re.S | re.M)
        names = {*re.findall(r"^## `(\w+)`$", page, re.M), *re.findall(r"\w+", " ".join(constants))}
        exported = ast.literal_eval(re.search(r"^__all__ = (\[.*?\])", text, re.S | re.M)[1])
        assert set(exported) <= names, path.stem


# ---------------------------------------------------------------- the index, the check, the workflow

def test_every_notebook_is_in_the_contents():
    index = json.loads((ROOT / "nbs/index.ipynb").read_text())
    trees = pages.contents("\n".join(map(pages.source, index["cells"])))
    assert {line for line in trees.splitlines() if line[:2].isdigit()} == {p.stem for p in (ROOT / "nbs").glob("[0-9]*.ipynb")}


@pytest.mark.parametrize(("body", "fault"), [
    ('<a href="gone.html">x</a>', "points at gone.html, which is not there"),
    ('<a href="#nowhere">x</a>', "has no such place"),
    ('<img src="gone.png" alt="x">', "points at gone.png"),
    ('<img src="dot.png">', "without a text in its place"),
    ('<script src="https://cdn.example.org/x.js"></script>', "from another server"),
    ("x" * 1_600_000, "weighs 1.6 MB"),
])
def test_the_check_of_a_site_finds(tmp_path, body, fault):
    (tmp_path / "dot.png").write_bytes(DOT)
    good = '<p id="a"><a href="#a">x</a> <a href="index.html#a">y</a> <a href="https://arxiv.org">z</a> <img src="dot.png" alt="a dot">'
    (tmp_path / "index.html").write_text(good)
    assert check.faults(tmp_path) == []
    (tmp_path / "index.html").write_text(good + body)
    found, = check.faults(tmp_path)
    assert fault in found and found.startswith("index.html")


def test_a_workflow_publishes_what_make_site_builds():
    jobs = yaml.safe_load((ROOT / ".github/workflows/site.yml").read_text())["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    assert [step["run"] for step in steps if "run" in step] == ["make site"]
    assert [step["with"]["path"] for step in steps if "upload-pages-artifact" in step.get("uses", "")] == ["_site"]
    assert "\nsite: " in (ROOT / "Makefile").read_text() and "_site/" in (ROOT / ".gitignore").read_text().splitlines()


# ---------------------------------------------------------------- the built site

@pytest.fixture(scope="module")
def site(tmp_path_factory):
    missing = [name for name in EXTRA if not importlib.util.find_spec(name)]
    if missing: pytest.skip(f"the site was not built: {', '.join(missing)} not installed (pip install -e '.[site]')")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run([sys.executable, ROOT / "docs/build.py", folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


# Texts whose colour has too little contrast with the ground that they stand on (WCAG 2, level AA).
FAINT = """() => {
    const parse = text => { const v = text.match(/[\\d.]+/g).map(Number); return v.length < 4 ? [...v, 1] : v; };
    const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const over = (top, below) => top.slice(0, 3).map((v, i) => v * top[3] + below[i] * (1 - top[3]));
    const ground = e => { if (!e) return [255, 255, 255]; const c = parse(getComputedStyle(e).backgroundColor);
        return c[3] === 1 ? c : over(c, ground(e.parentElement)); };
    const faint = new Set();
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const e = walker.currentNode.parentElement, style = getComputedStyle(e);
        if (!walker.currentNode.data.trim() || !e.checkVisibility({checkVisibilityCSS: true, checkOpacity: true}) || !e.getClientRects().length) continue;
        const below = ground(e), [a, b] = [light(over(parse(style.color), below)), light(below)].sort((x, y) => y - x);
        const large = parseFloat(style.fontSize) >= (style.fontWeight >= 700 ? 18.66 : 24);
        if ((a + 0.05) / (b + 0.05) < (large ? 3 : 4.5)) faint.add(`${e.tagName}.${e.className} ${walker.currentNode.data.trim().slice(0, 30)}: ${((a + 0.05) / (b + 0.05)).toFixed(2)}`);
    }
    return [...faint];
}"""
FOCUS = """() => { const e = document.activeElement, style = getComputedStyle(e);
    return [e.innerText || e.placeholder || e.title || e.ariaLabel || '', style.outlineStyle !== 'none' || style.boxShadow !== 'none']; }"""


@pytest.mark.slow
def test_pages_can_be_read_searched_and_used_by_keyboard(site, tmp_path):
    asked = []
    with browser() as context:
        context.on("request", lambda request: asked.append(request.url))
        for name in ("11_uda", "api/viz", "leaderboard"):
            for mode in ("light", "dark"):
                page = context.new_page()
                page.emulate_media(color_scheme=mode)
                page.goto((site / f"{name}.html").as_uri())
                assert page.evaluate(FAINT) == [], f"{name} in {mode} colours"
                assert page.evaluate("[...document.images].every(i => getComputedStyle(i).backgroundColor === 'rgb(255, 255, 255)')"), "figures stand on white"
                page.screenshot(path=tmp_path / f"{name.replace('/', '_')}_{mode}.png")
                page.close()
        page = context.new_page()
        page.goto((site / "11_uda.html").as_uri())
        stops = []
        for _ in range(8):
            page.keyboard.press("Tab")
            stops.append(page.evaluate(FOCUS))
        assert stops[0][0] == "Skip to content" and "Search" in [words for words, _ in stops]
        assert all(seen for _, seen in stops), stops
        page.locator("input.sidebar-search").fill("cutmix")
        page.keyboard.press("Enter")
        page.locator("#search-results ul.search li a").first.wait_for()
    assert not [url for url in asked if not url.startswith(("file:", "data:"))]
