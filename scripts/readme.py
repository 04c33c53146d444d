"""Write README.md from nbs/index.ipynb: its prose, and the tables that its code cells printed (the code itself stays in the notebook).

    python scripts/readme.py
"""
import json
import posixpath
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTE = "<!-- Written by scripts/readme.py from nbs/index.ipynb: edit the notebook. -->"


def from_root(text: str) -> str:
    "Links that are relative to nbs/ made relative to the root of the repository"
    return re.sub(r"\]\((?!\w+:|#)([^)]+)\)", lambda m: f"]({posixpath.normpath('nbs/' + m[1])})", text)


def readme(nb: dict) -> str:
    "The README that belongs to an index notebook"
    parts = [NOTE]
    for cell in nb["cells"]:
        if cell["cell_type"] == "markdown": parts.append(from_root("".join(cell["source"])))
        for output in cell.get("outputs", []):
            if "text/markdown" in output.get("data", {}): parts.append("".join(output["data"]["text/markdown"]))
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


if __name__ == "__main__":
    text = readme(json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8")))
    (ROOT / "README.md").write_text(text, encoding="utf-8")
    print(f"wrote README.md, {len(text.splitlines())} lines")
