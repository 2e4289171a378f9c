# Everything runs in .venv, which is made on first use and remade when what it was made from changes.
# `make PYTHON=python3.12` picks the interpreter.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
CSRC := $(shell find ibkernels/csrc -type f)

# A GPU machine needs torch, triton, numpy and pytest, and no installation: everything runs from the source tree.
# `make gpu DRY=1` runs it all at toy sizes in Triton's interpreter (that of Triton 3.6 needs numpy below 2.4); OUT names
# the folder for results.
GPU_PYTHON := $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
DRY_RUN := $(if $(filter-out 0,$(DRY)),IBKERNELS_DRY=1 TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=)

.PHONY: demo test test-slow bench gpu gpu-tests gpu-times gpu-step aot sanitize lint format install clean

demo: $(INSTALLED)
	$(BIN)/ibft lab --quick --output_dir runs/lab-quick --overwrite

# A process a core, of one thread each: the tensors are small.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 4

test-slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

# Made to take less than 10 minutes on 2 cores: every op beside its peers, a training step. Records go to OUT, runs/bench by default;
# `python -m benchmarks compare` takes two of them.
bench: $(INSTALLED)
	$(BIN)/python -m pytest benchmarks -q --benchmark-quiet --records $(or $(OUT),runs/bench)

# Timings follow even where a test failed: they have gates of their own, and time on a GPU is dear. Where a command may
# take ten minutes, make takes the two one by one, with TESTS_SECONDS below that: what failed until then is reported.
gpu:
	@status=0; $(MAKE) --no-print-directory gpu-tests || status=1; \
	$(MAKE) --no-print-directory gpu-times || status=1; exit $$status

# Three processes where pytest-xdist is there: most of the time goes into compiling kernels. (pytest's options:
# pyproject.toml's need plugins.) What else PYTHONPATH names is kept: other libraries may have been brought along.
GPU_PATH := .$(if $(PYTHONPATH),:$(PYTHONPATH))
gpu-tests:
	@limit=; parallel=; export PYTHONPATH=$(GPU_PATH) $(DRY_RUN); \
	if [ -n "$(TESTS_SECONDS)" ]; then limit="timeout --signal=INT --kill-after=30 $(TESTS_SECONDS)"; fi; \
	if [ -z "$$IBKERNELS_DRY" ] && $(GPU_PYTHON) -c 'import xdist' 2>/dev/null; then parallel="-n 3"; fi; \
	$$limit $(GPU_PYTHON) -m pytest tests/gpu -o addopts=--import-mode=importlib -q -rs --durations=10 $$parallel

gpu-times:
	@export PYTHONPATH=$(GPU_PATH) $(DRY_RUN); $(GPU_PYTHON) -m benchmarks.gpu

# Of a model of 1.3B parameters: needs transformers and peft too, and for all of its variants trl, datasets and Liger.
gpu-step:
	@export PYTHONPATH=$(GPU_PATH) $(DRY_RUN); $(GPU_PYTHON) -m benchmarks.gpu_step

aot: $(INSTALLED)
	$(BIN)/python -m ibkernels.aot

# The C++ tests, and the op tests of the C++ backend in a copy of the sources with a sanitized library, on two threads.
# Python itself is not sanitized, hence the preload (of libstdc++ for exceptions), and leaks on purpose. Sanitized loops are
# no vector code, and add up in one lane what others do in sixteen: left out is a test of the last digits of such a sum.
SANITIZED := build/sanitize
sanitize: $(INSTALLED)
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -B $(SANITIZED) -G Ninja -DPython3_EXECUTABLE=$(BIN)/python -DIBKERNELS_SANITIZE=ON
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build $(SANITIZED)
	ctest --test-dir $(SANITIZED) --output-on-failure
	rm -rf $(SANITIZED)/tree && mkdir $(SANITIZED)/tree
	cp -r benchmarks ibft ibkernels tests pyproject.toml CMakeLists.txt $(SANITIZED)/tree
	cp $(SANITIZED)/libibkernels_cpu.so $(SANITIZED)/_native_build.json $(SANITIZED)/tree/ibkernels
	cd $(SANITIZED)/tree && LD_PRELOAD="$(foreach lib,libasan.so libstdc++.so,$$($${CXX:-c++} -print-file-name=$(lib)))" ASAN_OPTIONS=detect_leaks=0 \
	  UBSAN_OPTIONS=print_stacktrace=1 IBKERNELS_REQUIRE_CPP=1 OMP_NUM_THREADS=2 $(CURDIR)/$(BIN)/python -m pytest \
	  tests/ibkernels/test_bottleneck.py tests/ibkernels/test_cross_entropy.py tests/ibkernels/test_noise.py \
	  tests/ibkernels/test_native.py -k "(cpp or native) and not peak_memory and not tail_of_tiny" -p no:cacheprovider --capture=sys

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
