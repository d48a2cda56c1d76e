# `make demo` and `make test` set everything up by themselves, in .venv, on a machine that has Python 3.11+.
# A second run installs nothing and needs no network: the stamps in .venv hold a checksum of what was asked for.

PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12 python3.11,$(shell $(call recent,$p) && echo $p)))
recent = $(1) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null

VENV := .venv
BIN := $(VENV)/bin
ASKED := $(shell cat pyproject.toml constraints.txt | cksum | cut -d ' ' -f 1)
FOR_DEMO := $(VENV)/.demo-$(ASKED)
FOR_DEV := $(VENV)/.dev-$(ASKED)

export HF_HUB_OFFLINE := 1
export NO_MKDOCS_2_WARNING := 1

.PHONY: help demo test lint docs serve clean

help: ## Say what can be made (this)
	@awk -F ': .*## ' '/^[a-z]+:.*## / { printf "make %-6s %s\n", $$1, $$2 }' Makefile

demo: $(FOR_DEMO) ## Distil a small vision-language model, and show what it gains
	$(BIN)/linmu demo $(ARGS)

test: lint docs ## Check everything: style, types, the site, the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadscope $(ARGS)

lint: $(FOR_DEV) ## Check style and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

docs: $(FOR_DEV) ## Build the site into site/
	$(BIN)/python -m mkdocs build --strict --quiet

serve: $(FOR_DEV) ## Show the site on this machine, rebuilt as it is edited
	$(BIN)/python -m mkdocs serve

clean: ## Remove what was built; .venv stays
	rm -rf site build dist .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" && $(call recent,$(PYTHON)) || { echo "linmu needs Python 3.11 or newer, found $$(python3 --version 2>/dev/null || echo none); name one by: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu install python3-venv"; exit 1; }

$(FOR_DEMO): | $(BIN)/python
	$(call install,demo)
	@touch $@

$(FOR_DEV): | $(BIN)/python
	$(call install,dev)
	@touch $@ $(FOR_DEMO)

define install
	@echo "Setting up $(VENV), once; this takes a few minutes and the network."
	@rm -f $(VENV)/.demo-* $(VENV)/.dev-*
	$(BIN)/python -m pip install --no-compile -e '.[$(1)]' -c constraints.txt
endef
