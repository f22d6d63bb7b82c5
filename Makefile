# `make demo` and `make test` do everything on a fresh machine, `make data` builds instruction data; all print the plain commands they run.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo demo-short demo-ablation data test test-slow docs clean

demo: $(STAMP)  ## train both stages on the embedded world, evaluate, write the report
	$(BIN)/vlit demo

demo-short: $(STAMP)  ## the same with a few steps: does everything run?
	$(BIN)/vlit demo --short --output-dir outputs/demo-short

demo-ablation: $(STAMP)  ## what each ingredient is worth, from runs
	$(BIN)/vlit demo-ablation

data: $(STAMP)  ## annotations -> instruction data, measured, filtered, on a review page
	$(BIN)/vlit synth build

test: $(STAMP)  ## linters and the test suite, but for the tests marked slow
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "not slow"

test-slow: $(STAMP)  ## the rest: several ranks, kills, hangs, whole commands in fresh processes
	$(BIN)/python -m pytest -m slow

docs: $(STAMP)  ## regenerate the configuration reference and its JSON schema
	$(BIN)/vlit reference --out docs

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $(STAMP)

clean:
	rm -rf outputs
