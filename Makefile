# The two commands a newcomer needs are `make demo` and `make test`; each sets itself up.

VENV := .venv
PYTHON ?= python3
STAMP := $(VENV)/.installed
TORCH := torch==2.13.0
WORKERS := -n auto --dist loadgroup
PYTEST ?= $(WORKERS) -m "not nightly"

.PHONY: setup lock sbom demo test nightly check docs notebooks results comparison benchmark clean

setup: $(STAMP)

$(STAMP): pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --require-hashes --no-deps --requirement requirements.lock
	$(VENV)/bin/python -m pip install --quiet --no-deps $(TORCH)
	$(VENV)/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $(STAMP)

# Needs uv. Without torch, of which each index has a build for the CPU with a digest of its own, and what torch needs of CUDA.
lock:
	uv pip compile --quiet --no-header --no-annotate --universal --python-version 3.11 --generate-hashes \
	  --extra dev --constraint requirements.lock pyproject.toml --output-file requirements.new
	awk '/^[a-z]/ { keep = !/^(nvidia-|cuda-|triton==|torch==)/ } keep' requirements.new > requirements.lock
	rm requirements.new

# What the wheel pulls in, as CycloneDX: of an environment with nothing but the wheel.
sbom: setup
	rm -rf build/sbom dist
	$(VENV)/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	$(PYTHON) -m venv --without-pip build/sbom
	$(VENV)/bin/python -m pip --python build/sbom/bin/python install --quiet dist/*.whl
	$(VENV)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
	  --output-file dist/atpatch-onnx.cdx.json build/sbom/bin/python

demo: setup
	$(VENV)/bin/atpatch demo --out demo-out

test: setup
	$(VENV)/bin/python -m pytest $(PYTEST)

# Everything: the fast forms of samples, exporters and architectures too, which take as long again.
nightly: setup
	$(VENV)/bin/python -m pytest $(WORKERS)

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# Offline, in a minute: build/docs/index.html. What fits, trains or measures is run by the tests, not here.
docs: setup
	$(VENV)/bin/python -m sphinx --fail-on-warning --keep-going --quiet --builder html docs build/docs

# Runs docs/cookbook again, and keeps what it shows.
notebooks: demo
	$(VENV)/bin/python -m samples.cookbook --demo demo-out

results: setup
	$(VENV)/bin/python -m samples.results

comparison: setup
	$(VENV)/bin/python -m samples.comparison

benchmark: setup
	$(VENV)/bin/python -m samples.performance

clean:
	rm -rf $(VENV) build dist *.egg-info demo-out
