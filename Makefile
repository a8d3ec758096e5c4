.DEFAULT_GOAL := help
.PHONY: help python setup setup-dev serve test chaos soak chart-test chart-readme bench-compare lint format lock clean

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "ARGS passes options on: make serve ARGS='--port 9000', make test ARGS='-k cache'"

setup: python ## Install gemma_serve and its engine into .venv (GEMMA_SETUP=cpu or cuda overrides the choice)
	@$(PYTHON) requirements/install.py

setup-dev: python
	@$(PYTHON) requirements/install.py --dev

python:
	@command -v $(PYTHON) > /dev/null || { \
		echo "$(PYTHON) is missing: apt-get install -y python3 python3-venv" >&2; exit 1; }

serve: setup ## Install, then serve the embedded model on port 8000
	@exec $(BIN)/gemma-server serve --config configs/demo.yaml $(ARGS)

test: setup-dev ## Install, then run the tests
	@exec $(BIN)/pytest $(ARGS)

chaos: setup-dev ## Install, then make much more trouble than the tests do: half an hour
	@CHAOS=full exec $(BIN)/pytest -s tests/chaos $(ARGS)

soak: setup-dev ## Install, then 30 minutes of mixed load (SOAK_MINUTES=5 for less): does memory grow?
	@SOAK_MINUTES=$${SOAK_MINUTES:-30} exec $(BIN)/pytest -s tests/chaos/test_soak.py $(ARGS)

chart-test: setup-dev ## Install, then check the Helm chart, its dashboards and Dockerfile.cuda
	@exec $(BIN)/pytest tests/chart $(ARGS)

chart-readme: setup-dev ## Install, then write the chart's README from its values
	@$(BIN)/python charts/readme.py

bench-compare: setup ## Install, then measure this server against vLLM's own, in turn: an hour
	@exec $(BIN)/python benchmarks/compare_vllm.py $(ARGS)

lint: setup-dev ## Install, then check style, types and import contracts
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup-dev ## Sort imports and format the code
	$(BIN)/ruff check --select I --fix
	$(BIN)/ruff format

lock: setup ## Resolve the dependencies anew: requirements/*.txt and gemma_serve/engine_fields.py
	@$(BIN)/python requirements/lock.py

clean: ## Remove .venv, caches and build results
	rm -rf .venv .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
