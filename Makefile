# Each target sets up what it needs: a virtual environment in .venv with the package and its tools.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export RAY_USAGE_STATS_ENABLED = 0

.PHONY: demo test test-cluster chaos dry-run messages lint format clean
demo: $(VENV)/installed  ## distil the bundled digits, 5 to 8 minutes on 2 cores
	$(BIN)/cvdd run digits-demo --out runs/demo

test: $(VENV)/installed  ## all tests, no GPU or network needed
	$(BIN)/pytest

test-cluster: $(VENV)/installed  ## three machines in network namespaces; needs root, Linux, sshd and rsync
	$(BIN)/pytest -m cluster tests/cluster

chaos: $(VENV)/installed  ## faults at random moments; what comes out is compared with an undisturbed run; begins nothing new after 25 minutes
	$(BIN)/python tests/chaos/chaos.py

dry-run: $(VENV)/installed  ## ImageNet-1K's 1,000 classes, jobs and shards with tiny images
	$(BIN)/python tests/scale/dry_run.py

messages: $(VENV)/installed  ## tests/badinput/MESSAGES.md: every bad input and what is said of it
	$(BIN)/python tests/badinput/table.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .ruff_cache

# torch and torchvision are asked for together, so that their builds match
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch torchvision --editable ".[dev]"
	touch $@
