# demo          install into .venv, then complete a prompt with a small quantised model and two adapters, on the CPU
# test          install into .venv, then everything that needs no GPU
# check         the static part of it
# gpu           the GPU tests, with this machine's own python3 and packages: nothing is installed
# multi-gpu     those of several GPUs, likewise
# compile-all   compile each kernel for each supported GPU, with the installed Triton or with TRITON=3.6.0
# clean         remove what the others made
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Many tests start processes, which would compile what they import anew if the environment forbids to keep it.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test check static gpu multi-gpu compile-all clean

demo: $(VENV)/.installed
	$(BIN)/quant-moelora demo

# Processes of one thread each. Triton reads TRITON_INTERPRET when it is imported: interpreted tests have their own.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal
test: static
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) tests/launched

check: static
	$(BIN)/python -m pytest -q tests/test_layering.py

static: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --threads 2 --warnings --pythonpath $(BIN)/python

gpu:
	$(PYTHON) -m pytest tests -m gpu -q

multi-gpu:
	$(PYTHON) -m pytest tests/distributed -m multi_gpu -q

# Another Triton lies in a folder of its own, without what it depends on: only its compiler is wanted.
compile-all: $(VENV)/.installed-test $(if $(TRITON),$(VENV)/triton-$(TRITON))
	PYTHONPATH=$(if $(TRITON),$(VENV)/triton-$(TRITON)) $(BIN)/python -m pytest -n logical -m compile_all -v tests/kernels

$(VENV)/triton-%: $(VENV)/.installed-test
	rm -rf $@
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==$* || { rm -rf $@; exit 1; }
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find quant_moelora tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# A half-made venv is removed, so that the next run starts anew.
$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 or newer, or name it with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$$($(PYTHON) --version) is too old: quant_moelora needs Python 3.11 or newer; name one with make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# setuptools goes first and the build is not isolated: so the pinned one is used, and nothing is downloaded for a build.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) setuptools
	$(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) setuptools
	$(PIP) --no-build-isolation --editable ".[test]"
	@touch $(VENV)/.installed $@
