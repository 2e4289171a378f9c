# Everything runs in .venv, which is made on first use and remade when what it was made from changes.
# `make PYTHON=python3.12` picks the interpreter.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
CSRC := $(shell find ibkernels/csrc -type f)

.PHONY: demo test test-slow bench aot lint format install clean

demo: $(INSTALLED)
	$(BIN)/ibft lab demo --output_dir runs/demo --overwrite

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

bench: $(INSTALLED)
	$(BIN)/python -m pytest benchmarks

aot: $(INSTALLED)
	$(BIN)/python -m ibkernels.aot

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy ibkernels ibft benchmarks

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(INSTALLED)

# The build needs torch, which is therefore installed first; --no-build-isolation lets the build see it.
$(INSTALLED): constraints.txt pyproject.toml setup.py CMakeLists.txt $(CSRC)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "ibft needs Python 3.11 or newer, and $(PYTHON) is not; name one with make PYTHON=path/to/python" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt torch setuptools cmake ninja
	$(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e ".[dev]"
	@cat ibkernels/_native_build.json
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .benchmarks .mypy_cache .pytest_cache .ruff_cache runs
	rm -f ibkernels/libibkernels_cpu.so ibkernels/_native_build.json
	find . -name __pycache__ -type d -exec rm -rf {} +
