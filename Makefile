# The two commands a newcomer needs are `make demo` and `make test`; each sets itself up.

VENV := .venv
PYTHON ?= python3
STAMP := $(VENV)/.installed
PYTEST ?= -n auto --dist loadgroup

.PHONY: setup demo test check results comparison benchmark clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: setup
	$(VENV)/bin/atpatch demo --out demo-out

test: setup
	$(VENV)/bin/python -m pytest $(PYTEST)

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

results: setup
	$(VENV)/bin/python -m samples.results

comparison: setup
	$(VENV)/bin/python -m samples.comparison

benchmark: setup
	$(VENV)/bin/python -m samples.performance

clean:
	rm -rf $(VENV) build dist *.egg-info demo-out
