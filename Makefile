# From a bare clone: `make demo`, `make test`. All of it happens in .venv.

SHELL := /bin/bash
# The first Python on the PATH that runs (pyenv's shims may not) and is new enough.
PYTHON := $(shell for p in python3.12 python3 python3.13 python3.14; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
# A worker that has finished takes tests from the other, those of one file mostly together: they share fixtures.
# --budget: processor seconds that one test may take; the summary has the sum of each directory (tests/budget.py).
PARALLEL := -n auto --maxprocesses 8 --dist worksteal

# Where it is set, each process of the tests and of the demo would compile the whole package from its text.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install test test-slow faults lint docs notebooks claims demo

install: .venv/installed

# Again only when the requirements change. The demo needs the library alone, development its tools as well.
define pip_install
@test -n "$(PYTHON)" || { echo "llama_jax needs Python 3.12 or newer, and there is none on the PATH." >&2; exit 1; }
@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
@echo "Installing into .venv (minutes the first time)..."
@$(BIN)/python -m pip install -q --disable-pip-version-check -e '$(1)' -c constraints.txt
endef

.venv/installed: pyproject.toml constraints.txt
	$(call pip_install,.[dev])
	@touch .venv/library $@

.venv/library: pyproject.toml constraints.txt
	$(call pip_install,.)
	@touch $@

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

test: lint
	$(BIN)/pytest $(PARALLEL) --budget 40

# All, or a part of them: PART=1/4.
test-slow: install
	$(BIN)/pytest -m slow $(PARALLEL) --budget 200 --part $(or $(PART),1/1)

# All trials of faults, quick and slow, into docs/reliability.md, or a share of them: TRIALS=0.2.
faults: install
	$(BIN)/pytest tests/faults -m "slow or not slow" $(PARALLEL) --reliability docs/reliability.md --trials $(or $(TRIALS),1)

# Run in full, in .cache/notebooks, where `make docs` finds what came out: all, or NOTEBOOK=quickstart.
notebooks: install
	$(BIN)/python docs/run_notebooks.py $(NOTEBOOK)

# Popular claims measured with several seeds, into docs/claims.md: all, or CLAIMS=norms. Continues where it was stopped.
claims: install
	$(BIN)/python docs/claims.py $(CLAIMS)

# Guides, notebooks and API reference as a site, in .cache/site; any warning is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet
	@echo "open .cache/site/index.html, or serve it: $(BIN)/python -m mkdocs serve"

# A small Llama on the interpreter's own standard library, then what it writes.
demo: .venv/library
	$(BIN)/python train.py tiny_python --run-dir runs/demo
	$(BIN)/python sample.py runs/demo --prompt "def " --max-new-tokens 200
