"""Build the site: `python docs/build.py FOLDER`. Needs the extra `[site]`, and nothing from the network."""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from check import faults, report
from pages import ROOT, repository, write


def build(
    site: Path,  # the folder of the pages, written anew
    notebooks: list[Path],
) -> list[str]:  # what is wrong with it
    "Sources, then pages, then a look for faults; a warning of Sphinx is an error, and the old pages stay until new ones are there"
    with tempfile.TemporaryDirectory() as folder:
        sources, pages = Path(folder) / "sources", Path(folder) / "pages"
        write(sources, notebooks, repository())
        subprocess.run([sys.executable, "-m", "sphinx", "-q", "-b", "html", "-W", "--keep-going", "-j", "2", "-c", str(ROOT / "docs"),
                        "-d", f"{folder}/trees", str(sources), str(pages)], check=True)
        shutil.rmtree(site, ignore_errors=True)
        shutil.copytree(pages, site, ignore=shutil.ignore_patterns("_sources", ".buildinfo", "objects.inv"))
    (site / ".nojekyll").touch()  # GitHub would leave out folders whose names begin with _
    return faults(site)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    try: wrong = build(target, sorted((ROOT / "nbs").glob("*.ipynb")))
    except subprocess.CalledProcessError: sys.exit("The site was not built: Sphinx names the pages above.")
    if wrong: sys.exit("\n".join(wrong))
    print(report(target), f"Open {target / 'index.html'}.")
