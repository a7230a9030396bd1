# `make demo` trains a small agent in minutes, `make test` runs every test, `make help` lists the rest.
#
#   SEED=1                             another seed of the demo
#   OVERRIDES="run.num_steps=5"        further settings of the demo
#   ARGS="--seeds 0"                   arguments of a benchmark or of pytest
#   PYTHON=/path/to/python3.12         the interpreter to build .venv with
#   TORCH_ARGS="--extra-index-url ..." where pip finds torch, e.g. PyTorch's CPU wheel index

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

SEED ?= 0
OVERRIDES ?=
ARGS ?=
PYTHON ?=
TORCH_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# CUDA's lock where a driver answers, the CPU's elsewhere. Each has its own stamp: a second `make` installs nothing, and
# a folder that moves from a laptop to a GPU node is installed anew.
KIND := $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
STAMP := $(VENV)/.installed-$(KIND)

RUN := runs/hop_search-seed$(SEED)
# One OpenMP thread: two spinning teams on two cores slow vLLM twentyfold.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help install demo test test-fast chaos lint bench bench-rollout bench-learner bench-weights bench-checkpoint bench-credit bench-rewards bench-async bench-methods bench-recipes bench-textworld clean
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## make .venv and install the pinned dependencies into it

$(STAMP): pyproject.toml tools/install.sh $(wildcard requirements/*.txt)
	@PYTHON="$(PYTHON)" TORCH_ARGS="$(TORCH_ARGS)" tools/install.sh "$(VENV)" "$(KIND)"
	@touch $@

demo: install ## train a tiny agent on two CPU cores, in minutes (SEED=0)
	@if [ -e "$(RUN)" ]; then \
	    old="$(RUN)-$$(date +%Y%m%d-%H%M%S)"; mv "$(RUN)" "$$old"; echo "an earlier run is kept in $$old"; \
	fi
	@$(BIN)/grove train experiment=hop_search seed=$(SEED) $(OVERRIDES)
	@echo "Open $(RUN)/report.html: the curve, the settings, and one tree with the reward and credit of each step."

test: install ## run all tests; those that need a CUDA device are skipped without one
	@GROVE_REQUIRE_KEYS=1 $(PYTEST) -n auto --dist loadgroup --no-loadscope-reorder $(ARGS)

test-fast: install ## run the tests that need no Ray, vLLM, network or GPU, in under two minutes
	@HYPOTHESIS_PROFILE=$${HYPOTHESIS_PROFILE:-few} $(PYTEST) -n auto -m "not ray and not vllm and not slow and not gpu" $(ARGS)

chaos: install ## 50 steps whose workers are killed every 5, against an undisturbed run; minutes
	@GROVE_CHAOS_STEPS=50 $(PYTEST) tests/rl/test_chaos.py $(ARGS)

lint: install ## check style, formatting and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright

bench: bench-rollout bench-learner bench-weights bench-checkpoint bench-credit bench-rewards bench-async bench-methods bench-recipes bench-textworld ## run all benchmarks; tables here, figures in benchmarks/out/

bench-rollout: install ## the pool against a bare engine; tokens that an engine computes, trees against chains
	@$(BIN)/python -m benchmarks.rollout $(ARGS)
	@$(BIN)/python -m benchmarks.computed

bench-learner: install ## packed trees against padded and unpadded trajectories: speed, share of the ideal, memory
bench-weights: install ## new weights to an engine: rows of every learner process, against one gathered file
bench-checkpoint: install ## seconds that training stands still for a checkpoint, written beside it or not
bench-credit: install ## credit for 4,096 trees of 64 steps: seconds on one core, growth with the nodes
bench-rewards: install ## scores per second of the reward service on one core, against a pool of processes
	@$(BIN)/python -m benchmarks.rewards $(ARGS)

bench-async: install ## steps per minute with batches that grow ahead, on a task whose tools sleep
	@$(BIN)/python -m benchmarks.asynchronous $(ARGS)

bench-methods: install ## held-out success of the methods at equal generated tokens, over seeds
bench-recipes: install ## held-out success of every recipe of credit at equal generated tokens, over seeds
bench-textworld: install ## success at text games that were never played, by three rewards; draws the curve in the docs

bench-learner bench-weights bench-checkpoint bench-credit bench-methods bench-recipes bench-textworld:
	@$(BIN)/python -m benchmarks.$(@:bench-%=%) $(ARGS)

clean: ## remove .venv and every cache; runs/ stays
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
