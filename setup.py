"""Hands the metadata of settings.ini to setuptools, and the lessons to the wheel."""
import sys
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(interpolation=None)
ini.read(here / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]

licenses = {"apache2": "Apache-2.0"}
statuses = {"2": "2 - Pre-Alpha", "3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}
suffix = "_requirements"
links = {"Source": "", "Issues": "/issues", "Changelog": "/blob/main/CHANGELOG.md"}
lessons = ["nbs/*.ipynb", "nbs/*.csv", "nbs/params/*.yaml", "nbs/splits/*.txt", "nbs/weights/*.json", "nbs/weights/*.safetensors", "results/**/*.json"]


def lesson_files() -> list:  # of (folder below the environment, its files)
    "The lessons and records, to be installed under share/; an editable install has them in the checkout"
    if "editable_wheel" in sys.argv or "develop" in sys.argv: return []
    found = {}
    for path in sorted(p for pattern in lessons for p in here.glob(pattern)):
        inside = path.relative_to(here)
        found.setdefault(f"share/{cfg['lib_name']}/{inside.parent.as_posix()}", []).append(inside.as_posix())
    return list(found.items())


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license_expression=licenses[cfg["license"]],
    license_files=["LICENSE"],
    keywords=cfg["keywords"].split(),
    project_urls={name: cfg["git_url"] + end for name, end in links.items()} if cfg["git_url"] else {},
    classifiers=[
        f"Development Status :: {statuses[cfg['status']]}",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Framework :: Jupyter",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
    packages=find_packages(include=[cfg["lib_path"], f"{cfg['lib_path']}.*"]),
    package_data={cfg["lib_path"]: ["py.typed"]},
    data_files=lesson_files(),
    install_requires=cfg["requirements"].split(),
    extras_require={key.removesuffix(suffix): cfg[key].split() for key in cfg if key.endswith(suffix)},
    entry_points={"nbdev": [f"{cfg['lib_name']} = {cfg['lib_path']}._modidx:d"], "console_scripts": cfg["console_scripts"].splitlines()},
    zip_safe=False,
)
