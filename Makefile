# Two commands: `make demo` sets everything up and builds the demo; `make test` sets everything up and tests.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
# Processes that test side by side, a file at a time, each with one thread.
TEST_WORKERS ?= 2
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-all vllm-env vllm-tests lint bench clean

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

setup: $(STAMP)
	$(BIN)/reapc doctor --install

demo: setup
	$(BIN)/reapc build recipes/demo.toml

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile -m 'not slow'

test-all: setup
	$(BIN)/python -m pytest

# Environments in which vLLM runs here without a GPU, cached; for tests only.
vllm-env: $(STAMP)
	$(BIN)/python tools/vllm_env.py

# vLLM's own parser reads what reapc emits, and a real server answers: about 10 minutes.
vllm-tests: setup vllm-env
	REAPC_REQUIRE_VLLM=1 $(BIN)/python -m pytest -m vllm

lint: $(STAMP)
	$(BIN)/ruff check reapc tests tools benchmarks
	$(BIN)/ruff format --check reapc tests tools benchmarks
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/observe.py
	$(BIN)/python benchmarks/llm_compressor.py
	$(BIN)/python benchmarks/families.py
	$(BIN)/python benchmarks/prune.py
	$(BIN)/python benchmarks/heal.py
	$(BIN)/python benchmarks/allocate.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/prune_damage.py
	$(BIN)/python benchmarks/fit.py
	$(BIN)/python benchmarks/quantizers.py

clean:
	rm -rf $(VENV) out
