# Everything that the project does, from a fresh machine on: `make help`.

PYTHON    ?= python3
VENV      ?= .venv
VENV_TL4  ?= .venv-tl4
VENV_PEERS ?= .venv-peers
VENV_DOCS ?= .venv-docs
VENV_TRITON ?= .venv-triton
MODEL     ?= smollm2-135m
PROFILE   ?= quick
NOTEBOOKS ?=
GROUP     ?= paper
# Small dictionaries train 1.4 times as fast on two halves of the machine as on all of it at once; large ones do not.
JOBS      ?= $(if $(filter full gpu paper,$(PROFILE)),1,2)
ARGS      ?=

BIN        := $(VENV)/bin
SETUP      := $(VENV)/.asi_lens-setup
CHROME     := $(VENV)/.asi_lens-chrome
SETUP_TL4  := $(VENV_TL4)/.asi_lens-setup
SETUP_PEERS := $(VENV_PEERS)/.asi_lens-setup
SETUP_DOCS := $(VENV_DOCS)/.asi_lens-setup
SETUP_TRITON := $(VENV_TRITON)/.asi_lens-setup
# Tests of the kernels; without Triton most of them are skipped.
TRITON_TESTS := tests/kernels/triton tests/sae/test_kernel_training.py
SOURCES    := $(wildcard notebooks/*.ipynb)
PIP_QUIET  := $(if $(CI),--quiet)
# Cells keep their names: renumbering them would make every insertion a change of the whole file.
NBSTRIPOUT := $(BIN)/nbstripout --keep-id

.DEFAULT_GOAL := help
.PHONY: help setup setup-tl4 setup-peers setup-triton setup-docs docs figures publish compare test test-tl4 test-peers test-triton lint format lab bench lock clean clean-all
.DELETE_ON_ERROR:

help: ## show this
	@echo "make TARGET [MODEL=$(MODEL)] [PROFILE=$(PROFILE)] [NOTEBOOKS=01_rank_curves,...] [ARGS=...]"
	@echo
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "  MODEL      a packaged name, a hub name, a folder or a .gguf file"
	@echo "  PROFILE    smoke (minutes, no claims), quick, full (hours), gpu (one GPU), paper (GPUs)"
	@echo "  NOTEBOOKS  comma-separated names or numbers; those of GROUP if empty"
	@echo "  GROUP      paper (00 to 13), beyond (14 and later) or all"
	@echo "  JOBS       notebooks at a time (now $(JOBS))"
	@echo "  ARGS       more arguments for the program behind figures, test, test-tl4, lab and bench"

setup: $(SETUP) ## make .venv, register the kernel, find or fetch a Chrome (again: only what is missing)
	@$(BIN)/python -m asi_lens.results.chrome
	@touch $(CHROME)

figures: $(SETUP) $(CHROME) ## run the notebooks that are out of date, build the gallery figures/index.html
	$(BIN)/python -m asi_lens.reproduce --model "$(MODEL)" --profile "$(PROFILE)" --notebooks "$(or $(NOTEBOOKS),$(GROUP))" --jobs $(JOBS) $(ARGS)

publish: $(SETUP) ## copy what a run left to figures/published, which is committed, and write the README's table
	$(BIN)/python -m asi_lens.reproduce.publish --model "$(MODEL)" --profile "$(PROFILE)" $(if $(NOTEBOOKS),--notebooks "$(NOTEBOOKS)") $(ARGS)

compare: $(SETUP) ## compare a run with the published one, table by table, with stated tolerances
	$(BIN)/python -m asi_lens.reproduce.compare --model "$(MODEL)" --profile "$(PROFILE)" $(ARGS)

test: $(SETUP) $(CHROME) ## install and run the tests
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

setup-tl4: $(SETUP_TL4)

setup-peers: $(SETUP_PEERS)

setup-triton: $(SETUP_TRITON)

setup-docs: $(SETUP_DOCS)

test-tl4: $(SETUP_TL4) ## run the model-facing tests in a second environment with TransformerLens 4
	$(VENV_TL4)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m model_facing $(ARGS)

test-peers: $(SETUP_PEERS) ## check dictionaries and converted models against other libraries, in a third environment
	$(VENV_PEERS)/bin/python -m pytest tests/sae/test_peers.py tests/sae/test_foreign.py tests/lorsa/test_peers.py \
	    tests/experiments/test_released.py tests/inputs/test_conversions.py \
	    "tests/test_docs.py::test_the_code_of_a_page_runs[docs/your_trainer.md]" $(ARGS)

test-triton: $(SETUP_TRITON) ## run the kernels in Triton's interpreter and compile them for Hopper, without a card
	TRITON_INTERPRET=1 $(VENV_TRITON)/bin/python -m pytest -n auto $(TRITON_TESTS) $(ARGS)

docs: $(SETUP_DOCS) ## build the documentation as pages that open from disk, site/index.html
	NO_MKDOCS_2_WARNING=1 $(VENV_DOCS)/bin/python -m mkdocs build --quiet --strict $(ARGS)

lint: $(SETUP) ## ruff, format, types, and no outputs in notebooks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(SOURCES),$(NBSTRIPOUT) --verify $(SOURCES))

format: $(SETUP) ## apply ruff's fixes and format, strip the notebooks' outputs
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(SOURCES),$(NBSTRIPOUT) $(SOURCES))

lab: $(SETUP) $(CHROME) ## open the notebooks in JupyterLab (start with 00_explore)
	$(BIN)/jupyter lab notebooks $(ARGS)

bench: $(SETUP_PEERS) $(CHROME) ## run the benchmarks beside the peers, write benchmarks/results.json and its tables
	$(BIN)/python benchmarks/run.py --peers-python $(VENV_PEERS)/bin/python $(ARGS)

lock: $(SETUP) ## write requirements.lock anew from what .venv holds
	@{ sed -n '/^#/p' requirements.lock; \
	   $(BIN)/pip freeze --all --exclude-editable | sed -E 's/\+(cpu|cu[0-9]+)$$//' | \
	   grep -viE '^(pip==|wheel==|triton==|cuda-|nvidia-)|@'; \
	   grep -v '^#' requirements.lock | grep ' ; '; } > .requirements.lock
	@mv .requirements.lock requirements.lock

clean: ## remove what runs leave (not the published figures, environments or downloads)
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find asi_lens tests benchmarks notebooks -name __pycache__ -prune -exec rm -rf {} +
	find figures -mindepth 1 -maxdepth 1 ! -name published -exec rm -rf {} +

clean-all: clean ## the same and all environments
	rm -rf $(VENV) $(VENV_TL4) $(VENV_PEERS) $(VENV_DOCS) $(VENV_TRITON)

# $(call new-environment,folder): a venv, or a plain word about what this machine lacks.
define new-environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "asi_lens needs Python 3.11 or newer, and '$(PYTHON)' is not one ($$($(PYTHON) -V 2>&1)); name one: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
		echo "'$(PYTHON)' cannot make environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(1)
endef

$(SETUP): pyproject.toml requirements.lock
	$(call new-environment,$(VENV))
	$(BIN)/python -m pip install $(PIP_QUIET) -r requirements.lock
	$(BIN)/python -m pip install $(PIP_QUIET) --no-deps --no-build-isolation -e .
	$(BIN)/python -m ipykernel install --sys-prefix --name asi_lens --display-name asi_lens
	@touch $@

$(CHROME): $(SETUP) asi_lens/results/chrome.py
	@$(BIN)/python -m asi_lens.results.chrome
	@touch $@

# $(call laid-over,folder,requirements): what the file names is installed there; the rest is that of $(VENV).
define laid-over
	$(call new-environment,$(1))
	main=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
	echo "import site; site.addsitedir('$$main')" > \
	  "$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main.pth"
	$(1)/bin/python -m pip install $(PIP_QUIET) --no-deps -r $(2)
endef

$(SETUP_PEERS): $(SETUP) requirements-peers.txt
	$(call laid-over,$(VENV_PEERS),requirements-peers.txt)
	@touch $@

$(SETUP_DOCS): $(SETUP) requirements-docs.txt
	$(call laid-over,$(VENV_DOCS),requirements-docs.txt)
	@touch $@

$(SETUP_TL4): $(SETUP) requirements-tl4.txt
	$(call laid-over,$(VENV_TL4),requirements-tl4.txt)
	@touch $@

$(SETUP_TRITON): $(SETUP) requirements-triton.txt
	$(call laid-over,$(VENV_TRITON),requirements-triton.txt)
	@touch $@
