# make demo   install, then train the baseline and UDA on generated scenes and show what came out (7 minutes)
# make test   install, then lint, check that notebooks and modules agree, and run every test and notebook
# make lab    install, then open a copy of the notebooks (_lessons) in JupyterLab: running them changes nothing here
# make site   the notebooks and modules as pages with search, in _site
# Others: install, export (notebooks -> modules), readme, lint, clean

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test lab site export readme lint clean

ifdef PY
READY :=
else
PY := .venv/bin/python
READY := .venv/.installed
endif

# One thread for each process: the networks of the lessons are small, and two processes that share cores otherwise wait for each other.
export OMP_NUM_THREADS ?= 1

help:
	@sed -n 's/^# //p' Makefile | head -5

install: $(READY)

# The stamp makes the install run once; it runs again when the requirements change.
.venv/.installed: settings.ini setup.py pyproject.toml
	@python=$$(for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done || true); \
	if [ -z "$$python" ]; then echo "semiseg_nb needs Python 3.11 or newer, and none was found on the PATH: install one and run make again." >&2; exit 1; fi; \
	if ! $$python -c 'import venv, ensurepip' 2>/dev/null; then \
	  echo "This Python ($$(command -v $$python)) has no venv module: install it (on Debian and Ubuntu: apt install python3-venv) and run make again." >&2; exit 1; fi; \
	echo "Making .venv with $$($$python --version) and installing; PyTorch is large, so the first time takes some minutes."; \
	$$python -m venv .venv
	.venv/bin/python -m pip install --quiet --upgrade pip
	.venv/bin/python -m pip install --progress-bar off -e '.[dev,browser]'
	@touch $@

demo: $(READY)
	@rm -rf _demo
	$(PY) scripts/demo.py nbs/11_uda.ipynb _demo
	@$(PY) -m semiseg_nb report _demo --all

test: lint
	$(PY) -m pytest -n 2 --dist worksteal --durations 10

# A file that is in _lessons already stays as it is: delete the folder for a fresh copy.
lab: $(READY)
	@$(PY) -m semiseg_nb lessons _lessons
	$(PY) -m jupyter lab --notebook-dir _lessons/nbs

site: $(READY)
	@$(PY) -c "import furo, latex2mathml, myst_nb" 2>/dev/null || $(PY) -m pip install --progress-bar off -e '.[site]'
	$(PY) docs/build.py _site

export: $(READY)
	$(PY) -c "from nbdev.doclinks import nbdev_export; nbdev_export()"
	$(PY) -c "from nbdev.clean import nbdev_clean; nbdev_clean()"

readme: $(READY)
	$(PY) scripts/readme.py

lint: $(READY)
	$(PY) -m ruff check .

clean:
	rm -rf _demo _site build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
