# Two commands: `make run` trains and generates, `make test` checks everything.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
OUT ?= runs/quickstart
PROMPT ?= def read_file(path):

.PHONY: run setup setup-dev test lint docs notebooks dist clean

run: setup  ## train the quickstart model on the standard library's sources, then generate from it
	$(BIN)/manyhands train --preset quickstart --out $(OUT)
	$(BIN)/manyhands generate $(OUT) --prompt "$(PROMPT)" --max-new-tokens 120 --temperature 0.7 --top-p 0.9 --seed 1

setup: $(VENV)/.installed  ## create .venv and install manyhands

setup-dev: $(VENV)/.installed-dev  ## the same, with what the tests need

# One worker more than there are cores, as a fifth of a worker's time is waiting for processes that tests start.
test: setup-dev  ## the whole suite: no network, no GPU
	$(BIN)/python -m pytest --dist worksteal --numprocesses \
	    $$($(BIN)/python -c 'import os; print(min(4, (os.cpu_count() or 1) + 1))')

lint: setup-dev  ## ruff, mypy (strict), the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy scripts/typed_calls.py
	$(BIN)/mypy --config-file scripts/mypy.ini scripts benchmarks
	$(BIN)/lint-imports

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/.installed-docs  ## the documentation as a site, in site/; a warning is an error
	$(BIN)/mkdocs build --strict
	@echo "site/index.html"

notebooks: setup  ## run the notebooks of examples/ as Jupyter does, two minutes
	$(PIP) install -q -e '.[notebooks]'
	$(BIN)/python scripts/notebooks.py

# torch first and pinned: an open range pulls gigabytes of CUDA packages.
$(VENV)/.installed: pyproject.toml constraints.txt setup.py $(wildcard native/*.cpp native/*.h native/*.inl)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "manyhands needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt torch==2.13.0
	$(PIP) install -q -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt -e '.[docs]'
	touch $@

# Each wheel from the sdist: what lies in build/ or beside the sources gets into none.
dist: setup  ## sdist, this machine's wheel, the wheel without kernels
	$(PIP) install -q build
	$(BIN)/python -m build -q --outdir dist
	MANYHANDS_PURE=1 $(BIN)/python -m build -q --outdir dist
	cd dist && sha256sum manyhands-*

clean:  ## remove what `make` made, except runs
	rm -rf $(VENV) build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
