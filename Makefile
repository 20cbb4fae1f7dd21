# make demo: set up from nothing and watch a model forget and be patched; make demo-distill trains the patch, too.
# make test: set up from nothing and run ruff, mypy and the tests.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

export HF_HUB_OFFLINE := 1

.PHONY: demo demo-distill test tests test-fast test-slow kills fuzz lint bench bench-large bench-gpu real stitch evidence docs clean

# Python compiles what it imports and keeps that, so pip need not compile the other three quarters first.
INSTALL := $(PIP) install --no-compile -c constraints.txt
unexport PYTHONDONTWRITEBYTECODE

# torch comes first and pinned, so that nothing else chooses its build.
$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch
	@touch $@

$(BIN)/tailorcli: $(VENV)/torch pyproject.toml
	$(INSTALL) -e '.[plot]'
	@touch $@

$(VENV)/dev: $(VENV)/torch pyproject.toml
	$(INSTALL) -e '.[dev]'
	@touch $(BIN)/tailorcli $@

$(VENV)/real: $(VENV)/dev
	$(INSTALL) -e '.[dev,real]'
	@touch $@

demo: $(BIN)/tailorcli
	$(BIN)/tailorcli demo -o demo --overwrite

demo-distill: $(BIN)/tailorcli
	$(BIN)/tailorcli demo -o demo --overwrite --distill

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One thread a worker: the tests are many and small. A file's tests go to one worker, so that what they share is made
# once; files in the order of their names, as the longest are not the last.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# mypy takes one core: beside the tests, which wait a little at times.
test: $(VENV)/dev
	$(MAKE) -j 2 lint tests

tests: $(VENV)/dev
	$(PYTEST)

test-fast: $(VENV)/dev
	$(PYTEST) -x -k "not installed_command and not killed"

# What CI leaves out: the demo in full. `make real`, `make stitch`, `make evidence` and `make bench` are the other
# long ones.
test-slow: $(VENV)/dev
	$(BIN)/python -m pytest -m slow

# Each command that writes models, ended at every one of its operations on files: twenty minutes on one core.
kills: $(VENV)/dev
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONPATH=tests:. $(BIN)/python -m kills.harness

# Every reader against 10,000 damaged files, each within 10 s and 2 GB; `make test` has a share of it.
fuzz: $(VENV)/dev
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests $(BIN)/python -m fuzz --inputs 10000

bench: $(VENV)/dev
	$(BIN)/python -m benchmarks --rounds 3

# A pair of 7B checkpoints: 55 GB of disk, half an hour on two cores.
bench-large: $(VENV)/dev
	$(BIN)/python -m benchmarks --only large

# For a machine with a CUDA build of torch: PYTHON and VENV choose its environment.
bench-gpu: $(VENV)/dev
	$(BIN)/python -m benchmarks.gpu docs/results/gpu.md

real: $(VENV)/real
	$(BIN)/python -m benchmarks.real

stitch: $(VENV)/real
	$(BIN)/python -m benchmarks.stitch

# What each method brings back, on small models, SmolLM2 and a LLaVA of several seeds: four hours on two cores.
evidence: $(VENV)/real
	$(BIN)/python -m benchmarks.evidence

# The pages of docs/ as a site in site/, each link and anchor checked.
$(VENV)/docs: $(BIN)/tailorcli
	$(INSTALL) -e '.[docs]'
	@touch $@

docs: $(VENV)/docs
	$(BIN)/python scripts/reference_pages.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) site demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
