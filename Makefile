# Every target sets up what it needs in $(VENV), once. Pass flags on with ARGS="…".
PYTHON ?= python3
VENV   ?= .venv
# An NVIDIA GPU brings the CUDA build of JAX along; EXTRAS=cuda13, tpu or nothing to choose.
EXTRAS ?= $(if $(shell command -v nvidia-smi 2>/dev/null),cuda12)

comma := ,
BIN     := $(VENV)/bin
PRODUCT := $(VENV)/.product-$(EXTRAS)
TESTING := $(VENV)/.test-$(EXTRAS)
AOT     := $(abspath $(VENV))/aot

.PHONY: help install serve chat test test-aot lint clean
.DEFAULT_GOAL := help

help: ## Print this list
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## /  make \1\t/'

install: $(PRODUCT) ## Install jaxserve into .venv

serve: $(PRODUCT) ## Serve a model (the default one, or ARGS="MODEL --port 8001 …")
	@$(BIN)/jaxserve serve $(ARGS)

chat: $(PRODUCT) ## Chat with a model in the terminal (ARGS="MODEL" or ARGS="--url URL")
	@$(BIN)/jaxserve chat $(ARGS)

test: $(TESTING) ## Run the tests (ARGS="-k name" to choose)
	$(BIN)/python -m pytest $(ARGS)

test-aot: $(AOT)/.installed ## Compile for an H200 and for TPUs, which need not be here
	PYTHONPATH=$(AOT) PATH="$$PATH:$(AOT)/nvidia/cu13/bin" $(BIN)/python -m pytest -m aot $(ARGS)

lint: $(TESTING) ## Check style and types
	$(BIN)/python -m ruff check --no-cache .
	$(BIN)/python -m mypy

clean: ## Remove .venv and everything built
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(PRODUCT): pyproject.toml
	$(call install,$(EXTRAS))
	@touch $@

$(TESTING): pyproject.toml
	$(call install,$(if $(EXTRAS),$(EXTRAS)$(comma))test)
	@touch $@ $(PRODUCT)

# Compilers alone, and out of the way of all else: with them jax looks for the devices.
$(AOT)/.installed: $(TESTING)
	@echo "installing compilers for NVIDIA GPUs and TPUs into $(AOT)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(AOT) \
		$$($(BIN)/python -m tests.aot packages)
	@touch $@

define install
@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	f"jaxserve needs Python 3.11 or newer; $(PYTHON) is {v[0]}.{v[1]}. Name another: make PYTHON=python3.11 $(MAKECMDGOALS)")'
@$(PYTHON) -m venv $(VENV)
@echo "installing jaxserve$(if $(1),[$(1)]) into $(VENV)"
@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.$(if $(1),[$(1)])'
@$(BIN)/jaxserve compile --native-only
endef
