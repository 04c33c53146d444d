"""A notebook as plain text and back, for people who write in an editor.

    python scripts/nbtext.py 11_uda             nbs/11_uda.ipynb -> 11_uda.txt
    python scripts/nbtext.py 11_uda.txt         11_uda.txt -> nbs/11_uda.ipynb, keeping the outputs of unchanged code cells

A cell starts with a line `# %% md id=...` or `# %% code id=... tags=...`; its text follows as it is. The id may be left out in a
new cell. The text file is a working copy: only the notebook is committed.
"""
import hashlib
import json
import os
import re
import sys
from pathlib import Path

NBS = Path(__file__).resolve().parents[1] / "nbs"
HEADER = re.compile(r"^# %% (md|code)((?: \w+=\S+)*)$")
KINDS = {"markdown": "md", "code": "code"}


def to_text(nb: dict) -> str:
    "The cells of a notebook as text, without outputs"
    lines = []
    for cell in nb["cells"]:
        source = "".join(cell["source"])
        if any(HEADER.match(line) for line in source.splitlines()):
            sys.exit(f"Cell '{cell['id']}' holds a line that looks like the start of a cell ('# %% md' or '# %% code'): change it first.")
        tags = ",".join(cell["metadata"].get("tags", []))
        lines.append(f"# %% {KINDS[cell['cell_type']]} id={cell['id']}" + (f" tags={tags}" if tags else ""))
        lines.append(source)
    return "\n".join(lines) + "\n"


def to_notebook(text: str, old: dict) -> dict:
    "The notebook that a text describes; code cells whose source stands in `old` keep their outputs"
    outputs = {"".join(c["source"]): c["outputs"] for c in old.get("cells", []) if c["cell_type"] == "code"}
    cells = []
    for line in text.splitlines(keepends=True):
        if header := HEADER.match(line.rstrip("\n")):
            fields = dict(field.split("=", 1) for field in header[2].split())
            metadata = {"tags": fields["tags"].split(",")} if "tags" in fields else {}
            kind = "code" if header[1] == "code" else "markdown"
            cells.append({"cell_type": kind, "id": fields.get("id"), "metadata": metadata, "source": []})
        elif cells: cells[-1]["source"].append(line)
        else: sys.exit("The text must start with a cell: '# %% md' or '# %% code'.")
    for number, cell in enumerate(cells):
        source = "".join(cell["source"]).removesuffix("\n")
        cell["source"] = source.splitlines(keepends=True)
        cell["id"] = cell["id"] or hashlib.sha1(f"{number}|{source}".encode()).hexdigest()[:8]
        if cell["cell_type"] == "code": cell.update(outputs=outputs.get(source, []), execution_count=None)
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    return {"cells": cells, "metadata": old.get("metadata", kernel), "nbformat": 4, "nbformat_minor": 5}


def main(name: str) -> None:
    if name.endswith(".txt"):
        path = NBS / f"{Path(name).stem}.ipynb"
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        nb = to_notebook(Path(name).read_text(encoding="utf-8"), old)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    else:
        path = Path(f"{Path(name).stem}.txt")
        path.write_text(to_text(json.loads((NBS / f"{path.stem}.ipynb").read_text(encoding="utf-8"))), encoding="utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    if len(sys.argv) != 2: sys.exit(__doc__)
    main(sys.argv[1])
