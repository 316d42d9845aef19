# Two commands do everything: `make demo` runs the four stages on the embedded default, `make test` passes the tests.
# Each sets up .venv first, once.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

# The package index's Linux build of torch brings gigabytes of CUDA along. A machine without an NVIDIA driver takes
# PyTorch's own CPU build instead; where that index cannot be reached, pip goes on with what it has.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi 2>/dev/null),,--extra-index-url https://download.pytorch.org/whl/cpu --retries 1)
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile

# What is installed is compiled where it is first imported; where this is set never, and every process compiles anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-slow test-all lint docs wheel lock interop clean

demo: $(VENV)/installed
	$(BIN)/sae demo

test: $(VENV)/tested
	$(BIN)/python -m pytest -n auto

test-slow: $(VENV)/tested
	$(BIN)/python -m pytest -n auto -m slow --durations=15

test-all: $(VENV)/tested
	$(BIN)/python -m pytest -n auto -m "slow or not slow"

lint: $(VENV)/tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation, in site/: plain files, which open from a disk and load nothing from elsewhere.
docs: $(VENV)/tested
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The wheel in an environment of its own, without anything of the checkout: it must be able to run the demo (a small one).
WHEEL := .wheel
SMALL := tokenize.tokens=60000 tokenize.validation_tokens=4096 harvest.tokens=10000 harvest.validation_tokens=4096 \
	train.sae.d_sae=256 train.steps=50 eval.tokens=2048 eval.dead_rows=0

wheel: $(VENV)/tested
	rm -rf dist $(WHEEL) && $(BIN)/python -m hatchling build -t wheel -d dist && $(PYTHON) -m venv $(WHEEL)
	$(subst $(BIN),$(WHEEL)/bin,$(PIP)) --constraint constraints.txt $(TORCH_INDEX) torch
	$(subst $(BIN),$(WHEEL)/bin,$(PIP)) --constraint constraints.txt dist/*.whl
	cd "$$(mktemp -d)" && $(CURDIR)/$(WHEEL)/bin/sae demo $(addprefix --set ,$(SMALL))

# The versions that every installation gets, of all extras, on Linux and macOS; those that still fit stay as they are.
LOCK := .lock
lock:
	$(PYTHON) -m venv $(LOCK) && $(LOCK)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(LOCK)/bin/uv pip compile pyproject.toml --all-extras --universal --fork-strategy fewest --python-version 3.11 \
		--no-annotate --custom-compile-command "make lock" --output-file constraints.txt $(UPGRADE)

# Other tools' own code against ours: an environment for each, since none of them can be installed beside the others.
INTEROP := .interop
THEIRS  := sae-lens==6.54.12 dictionary-learning==0.1.0 eai-sparsify==1.3.3 circuit-tracer==0.5.0 \
	llamascopium==2.0.0b34
WITH_llamascopium := "transformer-lens<4"

interop: $(VENV)/tested $(foreach tool,$(THEIRS),$(INTEROP)/$(firstword $(subst ==, ,$(tool)))/installed)
	SAE_INTEROP=$(INTEROP) SAE_INTEROP_TABLE=$(INTEROP)/table.txt $(BIN)/python -m pytest -m slow \
		tests/pipeline/formats/test_in_their_tools.py
	cat $(INTEROP)/table.txt

$(INTEROP)/%/installed:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH_INDEX) torch
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(filter $*==%,$(THEIRS)) $(WITH_$*)
	touch $@

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) --constraint constraints.txt $(TORCH_INDEX) torch
	touch $@

$(VENV)/installed: $(VENV)/torch pyproject.toml constraints.txt
	$(PIP) --constraint constraints.txt --editable .
	touch $@

$(VENV)/tested: $(VENV)/torch pyproject.toml constraints.txt
	$(PIP) --constraint constraints.txt --editable ".[dev]"
	touch $(VENV)/installed $@

clean:
	rm -rf $(VENV) $(INTEROP) $(WHEEL) $(LOCK) dist site demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
