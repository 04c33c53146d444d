"""Lessons in JupyterLab as a person has them: a copy of the notebooks, opened in a browser, run, and their sliders moved."""
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from browser import browser

ROOT = Path(__file__).resolve().parents[1]
LESSONS = ("09_viz", "06_metrics")  # quick ones: nothing is trained
QUIET = ("--no-browser", "--allow-root", "--ServerApp.port=0", "--LabApp.news_url=None", "--LabApp.extension_manager=readonly",
         "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", "--KernelManager.transport=ipc")
SETTINGS = {"notebook-extension/tracker": {"windowingMode": "none"},  # every cell is laid out, seen or not
            "apputils-extension/notification": {"fetchNews": "false"}}

# Answers '' while cells wait or run, 'done' when all have run, or the text of an error.
STATE = """() => {
    const error = document.querySelector('[data-mime-type="application/vnd.jupyter.error"]');
    if (error) return error.innerText;
    const cells = [...document.querySelectorAll('.jp-Notebook .jp-CodeCell')].filter(c => c.querySelector('.cm-content').innerText.trim());
    return cells.length && cells.every(c => /\\[\\d+\\]/.test(c.querySelector('.jp-InputPrompt').innerText)) ? 'done' : '';
}"""
LOADED = "img => img.complete && img.naturalWidth > 0"  # an empty source would be the page itself
PICTURE = "img => fetch(img.src).then(r => r.blob()).then(b => b.arrayBuffer()).then(a => Array.from(new Uint8Array(a)).join())"
CHANGED = f"([img, old]) => ({LOADED})(img) && ({PICTURE})(img).then(now => now !== old, gone => false)"


@contextmanager
def jupyterlab(folder):
    "Address of a JupyterLab in a folder: the system chooses its port, and its settings, kernels and log stay with the test"
    with tempfile.TemporaryDirectory() as home:
        for name, values in SETTINGS.items():
            path = Path(home, "config/lab/user-settings/@jupyterlab", f"{name}.jupyterlab-settings")
            path.parent.mkdir(parents=True)
            path.write_text(json.dumps(values))
        env = os.environ | {"JUPYTER_RUNTIME_DIR": f"{home}/run", "JUPYTER_CONFIG_DIR": f"{home}/config", "JUPYTER_DATA_DIR": f"{home}/data", "IPYTHONDIR": f"{home}/ipython"}
        with open(folder / "jupyterlab.log", "w+") as log:
            server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *QUIET, f"--KernelManager.ip={home}/kernel"], cwd=folder / "nbs", env=env,
                                      stdout=log, stderr=log, start_new_session=True)
            try:
                end = time.monotonic() + 120
                while not (found := [text for p in Path(home, "run").glob("jpserver-*.json") if (text := p.read_text()).rstrip().endswith("}")]):
                    assert server.poll() is None and time.monotonic() < end, Path(log.name).read_text()
                    time.sleep(0.1)
                yield json.loads(found[0])
            finally:
                server.send_signal(signal.SIGTERM)  # it ends its kernels
                try: server.wait(60)
                except subprocess.TimeoutExpired: os.killpg(server.pid, signal.SIGKILL)


def wait_for_idle(page):
    "The status bar knows; the toolbar says idle before there is a kernel, and then cells do not run"
    page.locator("#jp-main-statusbar").get_by_text(re.compile(r"\| Idle$")).wait_for()


def run_all(page):
    "What a person clicks: Run, Run All Cells"
    wait_for_idle(page)
    page.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
    page.locator('.lm-Menu-item[data-command="runmenu:run-all"]').click()


def move(slider):
    "To the end that is farther away, by the keyboard"
    now, low, high = (float(slider.get_attribute(f"aria-value{key}")) for key in ("now", "min", "max"))
    slider.press("End" if now - low < high - now else "Home")


@pytest.mark.slow
def test_two_lessons_run_in_jupyterlab_and_their_sliders_move(tmp_path):
    subprocess.run([sys.executable, "-m", "semiseg_nb", "lessons", str(tmp_path)], check=True, capture_output=True, cwd=ROOT)
    with browser() as context, jupyterlab(tmp_path) as server:
        complaints, pages = [], {}  # a connection that is made again on a busy machine is no complaint
        for lesson in LESSONS:  # they start together, each in a window of its own
            page = pages[lesson] = context.new_page()
            page.on("console", lambda message: complaints.append(message.text) if message.type == "error" and "WebSocket" not in message.text else None)
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.goto(f"{server['url']}doc/workspaces/{lesson}/tree/{lesson}.ipynb?token={server['token']}")
            run_all(page)
        for lesson, page in pages.items():
            state = page.wait_for_function(STATE, polling=500).json_value()
            assert state == "done", f"{lesson}: {state}"
            page.bring_to_front()
            sliders = page.locator(".jp-OutputArea .noUi-handle")
            sliders.first.wait_for()
            for slider in sliders.all():
                picture = slider.locator("xpath=ancestor::*[contains(@class, 'jp-OutputArea-output')]").locator("img.widget-image").element_handle()
                page.wait_for_function(LOADED, arg=picture)
                wait_for_idle(page)
                before = picture.evaluate(PICTURE)
                move(slider)
                page.wait_for_function(CHANGED, arg=[picture, before], polling=100)
            wait_for_idle(page)
            assert picture.evaluate("img => img.width <= img.naturalWidth"), "the picture is blown up"
            page.screenshot(path=tmp_path / f"{lesson}.png")
            assert (tmp_path / f"{lesson}.png").stat().st_size > 10_000
        assert not complaints
