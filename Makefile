PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
RUN := $(VENV)/bin

.PHONY: setup demo test test-slow bench bench-goals report lint format clean

setup: ## make .venv with a CPU build of everything (does nothing if it is up to date)
	@$(PYTHON) .ci/setup_environment.py $(VENV)

demo: setup ## build the demo model and ask questions about a novel
	$(RUN)/memlong-vllm demo

test: setup ## the whole suite but what is marked slow
	$(RUN)/python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder

test-slow: setup ## the checks that take minutes each
	$(RUN)/python -m pytest -m slow

RESULTS := benchmarks/results
THROUGHPUT := $(RUN)/python benchmarks/throughput.py --workloads
REPORTED := prefill prefill_xeon decode decode_xeon decode_8k retrieval prefill_flat decode_flat end_to_end \
  end_to_end_xeon prefill_long decode_long fixed_memory compiled document latency memory memory_xeon online paper_scale

bench: bench-goals ## every benchmark, for hours; one that was stopped goes on
	$(THROUGHPUT) prefill --without-known --cells 8192x1 16384x1 32768x1 65536x1 --repetitions 1 --limit-s 1200 \
	  --engines memlong window full fp8 authors --output $(RESULTS)/prefill_long.json
	$(THROUGHPUT) decode --cells 8192x1 65536x1 --repetitions 1 --limit-s 3600 --kv-gib 4 \
	  --engines memlong window full fp8 --output $(RESULTS)/decode_long.json
	$(THROUGHPUT) prefill --without-known --cells 8192x16 --kv-gib 1.42 --step-tokens 512 --answer 512 --repetitions 1 \
	  --limit-s 3600 --engines memlong window full fp8 --output $(RESULTS)/fixed_memory.json
	$(THROUGHPUT) prefill decode --without-known --compiled --cells 2048x8 --engines memlong window full --repetitions 2 \
	  --output $(RESULTS)/compiled.json
	$(THROUGHPUT) document --repetitions 2 --fewer authors=1 --output $(RESULTS)/document.json
	$(RUN)/python benchmarks/latency.py --repetitions 2 --output $(RESULTS)/latency.json
	$(RUN)/python benchmarks/memory.py --output $(RESULTS)/memory.json
	$(RUN)/python benchmarks/online.py --output $(RESULTS)/online.json
	$(RUN)/python benchmarks/paper_scale.py --run --output $(RESULTS)/paper_scale.json
	$(MAKE) report

bench-goals: setup ## those that the goals are about, in their first hours
	$(THROUGHPUT) prefill --repetitions 8 --fewer full=2 fp8=2 authors=1 --output $(RESULTS)/prefill.json
	$(THROUGHPUT) decode --fewer full=2 fp8=2 authors=1 --output $(RESULTS)/decode.json
	$(THROUGHPUT) decode --cells 2048x8 --engines memlong window off --repetitions 8 --output $(RESULTS)/decode.json
	$(THROUGHPUT) decode --cells 8192x8 --kv-gib 4 --repetitions 2 --engines memlong window full fp8 --fewer full=1 fp8=1 \
	  --output $(RESULTS)/decode_8k.json
	$(RUN)/python benchmarks/retrieval.py --output $(RESULTS)/retrieval.json
	$(THROUGHPUT) prefill --without-known --cells 8192x1 32768x1 65536x1 --repetitions 4 --engines memlong \
	  --output $(RESULTS)/prefill_flat.json
	$(THROUGHPUT) decode --cells 8192x1 65536x1 --repetitions 4 --engines memlong --kv-gib 4 \
	  --output $(RESULTS)/decode_flat.json
	$(THROUGHPUT) prefill --without-known --cells 32768x4 --repetitions 2 --limit-s 14400 --kv-gib 7 \
	  --engines memlong window full fp8 --fewer full=1 fp8=1 --output $(RESULTS)/end_to_end.json
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
	find . -name "*.nb[ic]" -delete  # Numba's cache
