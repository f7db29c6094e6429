# Two commands are all that a bare machine needs: `make demo` and `make test`. They create .venv from $(PYTHON)
# (3.10 or later), install what they need, and run. pip speaks on stderr, so that stdout is the command's own.

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BENCHMARK_INSTALLED := $(VENV)/.installed-benchmark

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help demo test quick torture lint format docs bench bench-capture losses clean

help:
	@echo 'make demo [ARGS="--once --json"]   a real worker, tasks that die, and the page that shows them'
	@echo 'make test [ARGS="-k journal"]      ruff, mypy and every test'
	@echo 'make quick                         one scenario with a real worker of each framework, below a minute'
	@echo 'make torture [ARGS="-k kill"]      the crash, fault and property tests at length, and what they found'
	@echo 'make lint                          ruff and mypy alone'
	@echo 'make format                        let ruff rewrite the sources'
	@echo 'make docs                          write the generated parts of docs/ anew'
	@echo 'make bench                         what recording costs, beside two other tracers'
	@echo 'make bench-capture                 what hearing a call costs, beside the bare SDK and OpenTelemetry'
	@echo 'make losses                        what three tracers deliver when workers end'
	@echo 'make clean                         remove .venv and caches'

demo: $(INSTALLED)
	@$(BIN)/waxell-workers demo $(ARGS)

# Without arguments in two parts: most tests wait for processes, so that two can run at once; what measures time runs
# alone.
test: lint
ifeq ($(strip $(ARGS)),)
	@status=0; \
	$(BIN)/python -m pytest -m "not timed" --numprocesses=2 || status=$$?; \
	$(BIN)/python -m pytest -m timed || status=$$?; \
	exit $$status
else
	@$(BIN)/python -m pytest $(ARGS)
endif

quick: $(INSTALLED)
	@$(BIN)/python -m pytest -m quick tests/conformance $(ARGS)

torture: $(INSTALLED)
	@$(BIN)/python -m tests.torture $(ARGS)

lint: $(INSTALLED)
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet || { echo 'ruff format: run `make format`' >&2; exit 1; }
	@$(BIN)/mypy --no-error-summary

format: $(INSTALLED)
	@$(BIN)/ruff check --quiet --fix
	@$(BIN)/ruff format --quiet

docs: $(INSTALLED)
	@$(BIN)/python -m tests.docs.test_docs

bench: $(BENCHMARK_INSTALLED)
	@$(BIN)/python tests/benchmarks/recording.py $(ARGS)

bench-capture: $(INSTALLED)
	@$(BIN)/python -m tests.benchmarks.capture $(ARGS)

losses: $(BENCHMARK_INSTALLED)
	@$(BIN)/python -m tests.benchmarks.losses $(ARGS)

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis .tox build dist

# `--group` came with pip 25.1; the pip of a fresh venv is often older.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo '$(PYTHON) is older than Python 3.10: make PYTHON=python3.12 …' >&2; exit 1; }
	@echo 'installing into $(VENV) …' >&2
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1' >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable . --group dev >&2
	@touch $@

$(BENCHMARK_INSTALLED): pyproject.toml $(INSTALLED)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --group benchmark >&2
	@touch $@
