"""A browser without a window, for the tests of JupyterLab and of the site."""
import shutil
import subprocess
from contextlib import contextmanager

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]


def chromium():
    "Path of a Chromium that starts, or None: a name alone may be a stub that asks for a snap"
    for path in filter(None, map(shutil.which, NAMES)):
        if subprocess.run([path, "--version"], capture_output=True, timeout=60).returncode == 0: return path


@contextmanager
def browser():
    "A context of playwright in which every page has four minutes for whatever it waits for; the test is skipped where there is no browser"
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[browser]'")
    path = chromium()
    if not path: pytest.skip("no Chromium was found on the PATH (on Debian: apt install chromium)")
    with api.sync_playwright() as p:
        engine = p.chromium.launch(executable_path=path, args=FLAGS)
        context = engine.new_context(viewport={"width": 1400, "height": 1000})
        context.set_default_timeout(240_000)
        try: yield context
        finally: engine.close()
