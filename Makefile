# make demo       a small real model, tuned on this machine, before and after
# make test       the tests; make test-slow: those that take minutes or measure time
# make check      formatting, lint, types
# make bench      measurements against other tools and limits; bench/ has larger ones
# make clean      remove all that these made; runs/ stays
#
# PYTHON=python3.12 picks another Python (3.11 or later), VENV=... another place for the packages.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input
LOCKS := requirements.lock requirements-nodeps.lock

export PIP_ROOT_USER_ACTION := ignore

.DEFAULT_GOAL := demo
.PHONY: demo test test-slow check bench clean

# The second lock holds packages that are wanted without what they depend on; see there. The project
# itself comes last, and needs no network: what builds it is in the first lock.
$(VENV)/.ready: $(LOCKS) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: Lamina needs Python 3.11 or later; try make PYTHON=python3.12" >&2; exit 1; }
	@echo "Setting up $(VENV): a few minutes, once."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install -r requirements.lock
	@$(PIP) install --no-deps -r requirements-nodeps.lock
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

demo: $(VENV)/.ready
	@$(BIN)/python examples/docstrings/demo.py

test: $(VENV)/.ready
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m slow

check: $(VENV)/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.ready
	@set -e; for name in training data reads streaming plan; do $(BIN)/python bench/$$name.py; done

clean:
	rm -rf $(VENV) build demo *.egg-info src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests bench examples -name __pycache__ -prune -exec rm -rf {} +
