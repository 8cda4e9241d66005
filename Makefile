PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: setup serve test test-slow chaos soak fuzz check bench zoo protos clean
.DEFAULT_GOAL := serve

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

serve: setup
	$(BIN)/fathom serve $(ARGS)

test: setup
	$(BIN)/pytest -n auto --maxprocesses 8 --dist loadfile $(ARGS)

test-slow: setup
	$(BIN)/pytest -m slow $(ARGS)

chaos: setup
	$(BIN)/python -m tests.chaos $(ARGS)

soak: setup
	$(BIN)/python -m tests.soak $(ARGS)

fuzz: setup
	$(BIN)/python -m tests.gateway.test_fuzz 100000 $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/fathom bench decode
	$(BIN)/fathom bench long
	$(BIN)/fathom bench gateway

zoo: setup
	$(BIN)/python -m models.train $(ARGS)

protos: setup
	$(BIN)/python -m protos

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
