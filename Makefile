# On a fresh machine with Python 3.11 and make: `make demo` and `make test` set up what they need in .venv.
PYTHON ?= python3.11
BIN := .venv/bin
PACKAGES = .venv/lib/python3.11/site-packages

.PHONY: setup demo test lint bench clean

setup: .venv/.complete

# pip with the constraints, and torch first: an open range would bring another build of it and gigabytes of CUDA.
.venv/.complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch numpy
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: setup
	$(BIN)/superpose prepare '$(PACKAGES)/torch/**/*.py' '$(PACKAGES)/transformers/**/*.py' --bytes --validation 0.05 --out runs/demo-data
	$(BIN)/superpose compare recipes/demo.toml --out runs/demo

bench: setup
	$(BIN)/python benchmarks/run.py

clean:
	rm -rf .venv runs .pytest_cache .mypy_cache .ruff_cache
