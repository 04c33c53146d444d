"""Run a notebook headless through papermill and show what its cells print while they run.

    python scripts/demo.py nbs/11_uda.ipynb _demo
"""
import sys
import tempfile
import time
from pathlib import Path

import papermill
from papermill.exceptions import PapermillExecutionError
from traitlets.config import Config


def main(notebook: str, folder: str) -> None:
    "Execute `notebook` with its own defaults; the executed copy and all its files go to `folder`"
    out = Path(folder) / Path(notebook).name
    out.parent.mkdir(parents=True, exist_ok=True)
    print(f"Running {notebook}; its training takes some minutes.", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as pipes:  # in place of open ports
        config = Config({"KernelManager": {"transport": "ipc", "ip": f"{pipes}/kernel"}})
        try: papermill.execute_notebook(notebook, str(out), parameters={"out_dir": folder}, progress_bar=False, stdout_file=sys.stdout, config=config)
        except PapermillExecutionError as e: sys.exit(f"{notebook} stopped: {e.ename}: {e.evalue} (see {out})")
    print(f"\n{notebook} ran in {time.monotonic() - start:.0f} s.\n", flush=True)
    for what, pattern in [("executed notebook", "*.ipynb"), ("picture", "**/*.png"), ("record", "*/*.json")]:
        for path in sorted(out.parent.glob(pattern)): print(f"{what:18} {path}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 3: sys.exit(__doc__)
    main(*sys.argv[1:])
