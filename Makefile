# Needs Python 3.11 with venv, nothing else. `make demo` is the place to start.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test compat chaos lint docs docs-site docs-serve clean

setup: $(VENV)/.ready

# torch first and by its exact version: pip then never looks at newer builds. The constraints leave its resolver
# nothing to search, and it prints what it fetches.
$(VENV)/.ready: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: make PYTHON=python3 …"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo 'setup 1/2: torch'
	$(BIN)/pip install torch==2.13.0
	@echo 'setup 2/2: the orchestrator and its tools, at the versions of constraints.txt'
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev,demo,docs]'
	touch $@

demo: setup
	$(BIN)/python jobs/fetch.py quickstart
	$(BIN)/orchestrator plan jobs/quickstart.yaml
	$(BIN)/orchestrator train jobs/quickstart.yaml

test: setup
	$(BIN)/python -m pytest -m 'not chaos and not compat'

# All architectures × tasks × tuning, and docs/compatibility.md, which says what each does.
compat: setup
	$(BIN)/python -m pytest tests/compat/test_cells.py --write-page

chaos: setup
	$(BIN)/python -m pytest -m chaos --timeout 3600 -s

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup
	$(BIN)/orchestrator schema --markdown > docs/reference.md
	$(BIN)/orchestrator schema > docs/job.schema.json
	$(BIN)/python -m orchestrator.kube.overlays cluster/overlays

# The site under build/site; warnings are errors. `make docs-serve` shows it on http://127.0.0.1:8000.
docs-site: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

clean:
	rm -rf $(VENV) runs prepared jobs/data
