.DEFAULT_GOAL := help
.PHONY: help python setup setup-dev serve test chaos soak chart-test chart-readme bench-compare bench-memory load-test url lint format lock demo-model clean

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
LOAD := .cache/load-test

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

test: setup-dev ## Install, then run the tests, two files at a time
	@exec $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

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

bench-memory: setup-dev ## Install, then measure tokens per second by memory setting (CONFIG=benchmarks/quick.yaml)
	@exec $(BIN)/python benchmarks/gpu_memory_sweep.py $(or $(CONFIG),benchmarks/quick.yaml) $(ARGS)

load-test: url setup $(LOAD)/ready ## Install, then load-test the server at URL, with the key in OPENAI_API_KEY
	@PYTHONPATH=$(CURDIR) exec $(LOAD)/bin/python benchmarks/load/run.py $(URL) $(ARGS)

url:
	@$(if $(URL),,$(error URL=http://host:port is missing))

# GuideLLM and Locust over .venv, whose torch they use: they want other versions of small packages than it has.
$(LOAD)/ready: benchmarks/load/requirements.txt | setup
	@rm -rf $(LOAD) && $(BIN)/python -m venv $(LOAD)
	@$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		"$$($(LOAD)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/engine.pth"
	@$(LOAD)/bin/python -m pip install --quiet --disable-pip-version-check -r $< && touch $@

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

demo-model: setup ## Train the embedded model anew, within an hour on two cores; goes on where it was stopped
	@exec $(BIN)/python -m gemma_serve.demo_model.train $(ARGS)

clean: ## Remove .venv, caches and build results
	rm -rf .venv .venv.lock .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
