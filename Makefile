# run: serve. test, lint: what CI runs. fix: what a tool can mend. bench: the figures of bench/README.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test test-gpu lint fix bench

run: $(VENV)/run.done
	$(BIN)/gunicorn wsgi:app

test: $(VENV)/dev.done
	$(BIN)/pytest -n 2 --dist loadfile

test-gpu: $(VENV)/dev.done
	CRANE_TEST_DEVICE=cuda $(BIN)/pytest -m gpu

lint: $(VENV)/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: $(VENV)/dev.done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/bench.done
	$(BIN)/python -m bench.overhead
	$(BIN)/python -m bench.quota
	$(BIN)/python -m bench.generation
	$(BIN)/python -m bench.embeddings
	$(BIN)/python -m bench.images
	$(BIN)/python -m bench.speech
	$(BIN)/python -m bench.video
	$(BIN)/python -m bench.swap
	$(BIN)/python -m bench.neighbours

# What is installed is remembered by these files, so a second run starts at once.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.done: requirements.txt requirements-sample.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet -r requirements.txt -r requirements-sample.txt
	touch $@

$(VENV)/dev.done: $(VENV)/run.done requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

$(VENV)/bench.done: $(VENV)/dev.done requirements-bench.txt
	$(BIN)/python -m pip install --quiet -r requirements-bench.txt
	touch $@
