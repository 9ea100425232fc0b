PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
RUN := $(VENV)/bin

.PHONY: setup demo test test-slow bench report lint format clean

setup: ## make .venv with a CPU build of everything (does nothing if it is up to date)
	@$(PYTHON) .ci/setup_environment.py $(VENV)

demo: setup ## build the demo model and ask questions about a novel
	$(RUN)/memlong-vllm demo

test: setup ## the whole suite but what is marked slow
	$(RUN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: setup ## the checks that take minutes each
	$(RUN)/python -m pytest -m slow

RESULTS := benchmarks/results
THROUGHPUT := $(RUN)/python benchmarks/throughput.py --workloads
REPORTED := prefill decode document prefill_long decode_long end_to_end latency online memory retrieval paper_scale

bench: setup ## every benchmark, for hours; one that was stopped goes on
	$(THROUGHPUT) prefill --output $(RESULTS)/prefill.json
	$(THROUGHPUT) decode --output $(RESULTS)/decode.json
	$(THROUGHPUT) document --output $(RESULTS)/document.json
	$(THROUGHPUT) prefill --without-known --cells 8192x1 16384x1 32768x1 65536x1 --repetitions 2 \
	  --fewer full=1 fp8=1 authors=1 --limit-s 400 --output $(RESULTS)/prefill_long.json
	$(THROUGHPUT) decode --cells 8192x1 65536x1 --engines memlong window --output $(RESULTS)/decode_long.json
	$(THROUGHPUT) prefill --without-known --cells 32768x4 --repetitions 1 --limit-s 14400 \
	  --kv-gib 7 --engines memlong window full --output $(RESULTS)/end_to_end.json
	for name in latency online memory retrieval; do \
	  $(RUN)/python benchmarks/$$name.py --output $(RESULTS)/$$name.json || exit 1; done
	$(RUN)/python benchmarks/paper_scale.py --run --output $(RESULTS)/paper_scale.json
	$(MAKE) report

report: ## goals, tables and plots, of the results there are
	$(RUN)/python benchmarks/report.py $(wildcard $(REPORTED:%=$(RESULTS)/%.json)) --output $(RESULTS)/report.md

lint: setup
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

format: setup
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
	find . -name '*.nb[ic]' -delete  # Numba's cache: it does not notice edits of what a kernel calls
