# Needs Python 3.11 or newer, git and nothing else. `make demo` shows the product, `make test` checks it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(shell for p in python3.11 python3; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
PY := .venv/bin/python
PYTEST_ARGS ?= -m "not slow"
SITE := .build/site

SECONDS ?= 60

.PHONY: help venv demo test lint type contracts unit compile fuzz clean
help:
	@echo "make demo | test | lint | type | contracts | unit | compile | venv | clean"
venv: .venv/.installed-dev
demo: .venv/.installed-demo
	@.venv/bin/qcore demo
test: lint type contracts unit

# A dot for each package that pip collects, then its last stage: the wait is seen, and logs stay short.
define install
	@echo "[venv] installing kfp-qcore[$(1)] as pinned in constraints.txt (kfp, mlflow, onnxruntime, ...)"
	@PYTHONUNBUFFERED=1 $(PY) -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt -e '.[$(1)]' \
	  2> >(grep -v 'WARNING: Location' >&2) | while read -r line; do case "$$line" in Collecting*) printf .;; "Installing collected"*) printf ' unpacking, about a minute\n';; esac; done
	@touch .venv/.installed-$(1)
endef
.venv/.created:
	@"$(or $(PYTHON),python3)" -c 'import sys; v = sys.version_info; v < (3, 11) and sys.exit("Python %d.%d is too old; 3.11 or newer is needed: make PYTHON=/path/to/python3.11" % v[:2])'
	@echo "[venv] making .venv with $(PYTHON)"
	@"$(PYTHON)" -m venv .venv && touch $@
.venv/.installed-demo: pyproject.toml constraints.txt | .venv/.created
	$(call install,demo)
.venv/.installed-dev: pyproject.toml constraints.txt | .venv/.created
	$(call install,dev)
	@touch .venv/.installed-demo

lint: .venv/.installed-dev
	@echo "[lint] ruff"
	@$(PY) -m ruff check --quiet . && $(PY) -m ruff format --check --quiet .
# Types and imports are checked on the installed tree: only there are components/ and pipelines/ inside qcore.
site: .venv/.installed-dev
	@rm -rf build $(SITE) && $(PY) -m pip install --quiet --no-deps --no-build-isolation --target $(SITE) .
type: site
	@echo "[type] mypy --strict"
	@cd $(SITE) && ../../$(PY) -m mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p qcore
contracts: site
	@echo "[contracts] import-linter"
	@cd $(SITE) && ../../.venv/bin/lint-imports --no-logo --config ../../pyproject.toml --cache-dir ../imports
unit: .venv/.installed-dev
	@echo "[test] pytest"
	@$(PY) -m pytest -n auto --dist loadfile $(PYTEST_ARGS)
compile: .venv/.installed-dev
	@$(PY) -m qcore.pipelines.compile . && $(PY) -m qcore.schemas docs/schemas
# Opt-in: atheris is no dependency, and has no wheel for every Python.
fuzz: .venv/.installed-dev
	@$(PY) -m pip install --quiet --disable-pip-version-check atheris
	@QCORE_FUZZ_SECONDS=$(SECONDS) $(PY) -m pytest -n 0 tests/fuzz
clean:
	rm -rf .venv .build build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
