# make demo                 serve a real model with --quantization nvfp4 and talk to it (MODEL=..., FRAMEWORK=sglang)
# make test                 every test that needs no GPU
# make gpu-test             the tests that need one
# make lint                 ruff and mypy
# make clean                remove what the others made
#
# Each sets up .venv by itself. DEVICE=cpu or DEVICE=cuda overrides what was found on this machine.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
FRAMEWORK ?= vllm
MODEL ?=
DEVICE ?= $(if $(shell nvidia-smi -L 2>/dev/null | grep GPU),cuda,cpu)
INSTALLED := $(VENV)/.installed-$(DEVICE)
PYTEST := $(BIN)/python -m pytest --durations=15
# Engines wait more than they work. What compiles kernels gains nothing by it on two cores.
PARALLEL := -n 2 --dist loadfile
COMPILE_TESTS := $(sort $(wildcard tests/kernels/test*compile.py))
# Kernels also have to compile on these versions of Triton, beside that of .venv, and to run in the interpreter of the last.
TRITONS := 3.6.0 3.8.0 3.9.0
PIP_INSTALL := -m pip install --disable-pip-version-check --progress-bar off -q

.PHONY: demo test gpu-test lint clean install
.DELETE_ON_ERROR:

demo: $(INSTALLED)
	$(BIN)/nvfp4 demo $(MODEL) --framework $(FRAMEWORK)

# Compilation has processes of its own: the kernels' other tests run them in Triton's interpreter, which is chosen on import.
test: $(INSTALLED) $(TRITONS:%=.triton/%/.installed)
	$(PYTEST) $(PARALLEL) tests --ignore=tests/gpu --ignore=tests/vllm --ignore=tests/sglang $(COMPILE_TESTS:%=--ignore=%)
	$(PYTEST) $(COMPILE_TESTS)
	set -e; for version in $(TRITONS); do \
	  echo "Triton $$version"; PYTHONPATH=.triton/$$version $(PYTEST) $(COMPILE_TESTS); done
	PYTHONPATH=.triton/$(lastword $(TRITONS)) $(PYTEST) $(PARALLEL) tests/kernels $(COMPILE_TESTS:%=--ignore=%)
	$(PYTEST) $(PARALLEL) tests/vllm
	$(PYTEST) $(PARALLEL) tests/sglang

gpu-test: $(INSTALLED)
	$(PYTEST) tests/gpu

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

install: $(INSTALLED)

$(INSTALLED): pyproject.toml $(wildcard requirements/*)
	$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("error: %s is Python %d.%d; allowed: 3.11 to 3.13, name one with make PYTHON=..." % (sys.executable, *sys.version_info[:2]))'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) --upgrade 'pip>=25'
	@echo "Installing into $(VENV) for $(DEVICE): some minutes and 4 GB the first time"
	$(BIN)/python $(PIP_INSTALL) -r requirements/$(DEVICE).txt -e '.[dev]'
	$(BIN)/python $(PIP_INSTALL) --no-deps -r requirements/$(DEVICE)-no-deps.txt
	$(if $(filter cpu,$(DEVICE)),cp requirements/torchvision_cpu_ops.* $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'))
	touch $@

.triton/%/.installed: | $(INSTALLED)
	$(BIN)/python $(PIP_INSTALL) --target .triton/$* --no-deps --upgrade triton==$*
	touch $@

clean:
	rm -rf $(VENV) .triton build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
