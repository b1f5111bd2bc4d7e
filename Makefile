# One environment in .venv/, made on demand and remade when pyproject.toml or the constraints change.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
CONSTRAINTS ?= constraints/cpu.txt
# Extra words for pip, e.g. an index with CPU builds of torch.
PIP_ARGS ?=
# Extra words for pytest, e.g. PYTEST_ARGS='-k wire -x'.
PYTEST_ARGS ?=
# 2: test files run side by side, in less time; tests that count processes may then see those of others.
TEST_PROCESSES ?= 0

BIN := .venv/bin
READY := .venv/.ready
PACKAGES := isthmus router prefill_service decode_service kv_transfer kernels

# Several torch processes with several OpenMP threads each spin against one another (100 times slower).
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONUNBUFFERED := 1

.PHONY: help env demo test test-newest test-cpu-kinds sim oracle chaos gpu-test gpu-bench check lint types imports proto containers stubs format clean

help: ## show the targets
	@grep -hE '^[a-z%-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

env: $(READY) ## make or refresh .venv

$(READY): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'isthmus needs Python 3.11 or newer: make PYTHON=python3.12 ...' >&2; exit 1; }
	@echo 'installing into .venv (once, about a minute)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

demo: $(READY) ## start the stack, stream a few prompts, print what was measured, stop it
	@$(BIN)/isthmus demo

test: check ## static checks and every test that needs no GPU
	@$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile $(PYTEST_ARGS)

# What a user's own installation meets: the newest release of everything but torch, whose newest is a CUDA build of
# several GB. The faces: gRPC, HTTP, client library, command line, Redis. An environment of its own, remade each time.
NEWEST := .venv-newest
NEWEST_TORCH ?= torch==2.13.0
NEWEST_TESTS ?= tests/router tests/client tests/shared tests/cli tests/e2e/test_health.py tests/e2e/test_resume.py tests/kv_transfer
test-newest: ## the faces against the newest dependencies; not in CI: it would go red without a commit
	@rm -rf $(NEWEST) && $(PYTHON) -m venv $(NEWEST)
	@$(NEWEST)/bin/python -m pip install --quiet $(PIP_ARGS) '$(NEWEST_TORCH)'
	@$(NEWEST)/bin/python -m pip install --quiet $(PIP_ARGS) -e '.[engine,embedded,tests]'
	@$(NEWEST)/bin/python --version && $(NEWEST)/bin/python -m pip freeze --exclude-editable
	@$(NEWEST)/bin/python -m pytest $(NEWEST_TESTS) $(PYTEST_ARGS)

# The libraries choose their kernels by processor. What has to be equal bit for bit is tried with the choices of others.
EXACT := tests/kernels/test_gemm.py tests/kernels/test_gemm_fp8.py tests/kernels/test_moe.py tests/kernels/test_mla_decode.py \
	tests/kernels/test_mla_prefill.py tests/engine/test_exactness.py tests/engine/test_oplist.py tests/engine/test_canary.py
CPU_KINDS := OPENBLAS_CORETYPE=Haswell OPENBLAS_CORETYPE=SkylakeX OPENBLAS_CORETYPE=Nehalem ATEN_CPU_CAPABILITY=default \
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
test-cpu-kinds: $(READY) ## exactness suites as on other processors
	@status=0; for kind in $(CPU_KINDS); do echo "== $$kind"; \
		env $$kind $(BIN)/python -m pytest -q $(EXACT) $(PYTEST_ARGS) || status=1; done; exit $$status

SIM_SEEDS ?= 20000
sim: $(READY) ## the simulated cluster over many seeds
	@SIM_SEEDS=$(SIM_SEEDS) $(BIN)/python -m pytest tests/sim --timeout 3600 $(PYTEST_ARGS)

ORACLE_SEEDS ?= 8
oracle: $(READY) ## every architecture against transformers; ORACLE_SEEDS=20 tries more configurations
	@ORACLE_SEEDS=$(ORACLE_SEEDS) $(BIN)/python -m pytest tests/oracle $(PYTEST_ARGS)

CHAOS_SECONDS ?= 1200
CHAOS_FLUSHING ?= 60
CHAOS_FLUSH_EVERY ?= 10
chaos: $(READY) ## kills, freezes and restarts under load for 20 minutes; CHAOS_SECONDS=60 is what `make test` does
	@GRPC_VERBOSITY=ERROR CHAOS_SECONDS=$(CHAOS_SECONDS) CHAOS_FLUSHING=$(CHAOS_FLUSHING) CHAOS_FLUSH_EVERY=$(CHAOS_FLUSH_EVERY) \
		$(BIN)/python -m pytest tests/chaos -s $(PYTEST_ARGS)

# An interpreter with a CUDA build of torch, where .venv has none: GPU_PYTHON=python3.
GPU_PYTHON ?=
GPU_RESULTS ?= benchmarks/results/$(shell date +%F)
gpu-test: $(if $(GPU_PYTHON),,$(READY)) ## what needs a GPU: exactness on the device, kernels against their definitions
	@$(or $(GPU_PYTHON),$(BIN)/python) -m pytest tests/gpu tests/kernels tests/engine/test_triton_runner.py \
		tests/engine/test_device_memory.py tests/engine/test_device_sampler.py \
		--ignore tests/kernels/test_static_gate.py --ignore tests/kernels/test_benchmarks_dry.py $(PYTEST_ARGS)

gpu-bench: $(if $(GPU_PYTHON),,$(READY)) ## the four GPU benchmarks, under 8 minutes each, into benchmarks/results
	@status=0; for name in kernels decode_step prefill gpu_stack; do \
		$(or $(GPU_PYTHON),$(BIN)/python) -m benchmarks.$$name --out $(GPU_RESULTS)-$$name.md || status=1; done; exit $$status

check: lint types imports proto containers ## all static checks

lint: $(READY) ## ruff: rules and format
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check

types: $(READY) ## basedpyright
	@$(BIN)/basedpyright --level error

imports: $(READY) ## import contracts
	@$(BIN)/lint-imports

proto: $(READY) ## proto lint and format, stubs current
	@$(BIN)/buf lint
	@$(BIN)/buf format --diff --exit-code
	@$(BIN)/python tools/generate_stubs.py --check

containers: $(READY) ## compose file and Dockerfile, without a daemon
	@$(BIN)/docker-compose --profile gpu config --quiet
	@$(BIN)/hadolint Dockerfile

stubs: $(READY) ## regenerate isthmus/v1 from proto/
	@$(BIN)/python tools/generate_stubs.py

format: $(READY) ## apply ruff's fixes and format
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

bench-%: benchmarks/%.py $(READY) ## one benchmark: bench-transfer, bench-handoff, bench-serve, bench-step_loop
	@$(BIN)/python -m benchmarks.$*

clean: ## remove the environment and every cache
	rm -rf .venv $(NEWEST) .pytest_cache .ruff_cache .hypothesis .import_linter_cache .isthmus build dist
	find $(PACKAGES) tests tools benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
