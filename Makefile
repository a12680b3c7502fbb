# The commands of the README. Everything lives in .venv; the model store is outside the checkout.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
NATIVE := CMakeLists.txt $(wildcard porcelet/kernels/cpu/*.cpp porcelet/kernels/cpu/*.h)

.PHONY: help serve chat test test-slow sanitize check format bench claims clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,bench]'
	touch $@

serve: $(READY) ## Fetch the default model and serve API and chat on http://127.0.0.1:8000
	$(BIN)/porcelet serve

chat: $(READY) ## Talk to the default model in the terminal
	$(BIN)/porcelet pull
	$(BIN)/porcelet chat

test: $(READY) ## Run the whole suite
	$(BIN)/porcelet pull
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-slow: $(READY) ## Run the long tests as well
	$(BIN)/porcelet pull
	$(BIN)/python -m pytest -m "not gpu"

# test_memory.py is about the C library's own allocator, which sanitizers replace.
sanitize: $(READY) ## Run the kernel tests under sanitizers: addresses, undefined behaviour, races
	.ci/sanitize address,undefined tests/kernels --ignore tests/kernels/test_memory.py
	.ci/sanitize thread tests/kernels --ignore tests/kernels/test_memory.py

check: $(READY) ## Lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## Put the code into its format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## Run the benchmarks and append their results
	$(BIN)/porcelet pull
	$(BIN)/python -m benchmarks.attention --append
	$(BIN)/python -m benchmarks.decode --append
	$(BIN)/python -m benchmarks.gradients --append
	$(BIN)/python -m benchmarks.kernels --append
	$(BIN)/python -m benchmarks.load --append
	$(BIN)/python -m benchmarks.loop --append
	$(BIN)/python -m benchmarks.mla --append
	$(BIN)/python -m benchmarks.rewards --append
	$(BIN)/python -m benchmarks.start --append
	$(BIN)/python -m benchmarks.step --append
	$(BIN)/python -m benchmarks.train --append

claims: $(READY) ## List every figure of README and docs with its source, and measure again
	$(BIN)/porcelet pull
	$(BIN)/python -m benchmarks.claims --rerun

clean: ## Remove what was built
	rm -rf .venv build dist
