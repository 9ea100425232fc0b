PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
RUN := $(VENV)/bin

.PHONY: setup demo test test-slow lint format clean

setup: ## make .venv with a CPU build of everything (does nothing if it is up to date)
	@$(PYTHON) .ci/setup_environment.py $(VENV)

demo: setup ## build the demo model and ask questions about a novel
	$(RUN)/memlong-vllm demo

test: setup ## the whole suite but what is marked slow
	$(RUN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: setup ## the checks that take minutes each
	$(RUN)/python -m pytest -m slow

lint: setup
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

format: setup
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
