# The two commands are `make demo` and `make test`. Both make .venv themselves, with plain Python.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
UV := $(PY) -m uv

.DEFAULT_GOAL := help
.PHONY: help demo test check lint generate lock bench bench-audit bench-halt bench-overshoot bench-state chaos fuzz \
  screenshots clean

help: ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | sort

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "spendfuse needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements.lock
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

demo: $(STAMP) ## the weekend, stopped: broker, worker, ClickHouse and 23 agents on this machine
	@$(VENV)/bin/spendfuse demo

test: $(STAMP) check ## every test that this machine can run; a skip prints why
	$(PY) -m pytest -n auto --no-loadscope-reorder --durations=15

check: $(STAMP) lint ## generated files are what their sources say
	$(PY) schemas/generate.py --check
	$(PY) schemas/build_vectors.py --check
	$(PY) schemas/build_price_book.py --check
	$(PY) -m spendfuse.grafana.generate --check
	$(PY) docs/tables.py --check

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

generate: $(STAMP) ## write the generated files anew
	$(PY) schemas/generate.py
	$(PY) schemas/build_vectors.py
	$(PY) schemas/build_price_book.py
	$(PY) -m spendfuse.grafana.generate
	$(PY) docs/tables.py

bench: $(STAMP) ## what the worker takes, and halt lag on a real Kafka (needs Java and Maven)
	$(PY) tests/bench/throughput.py
	$(PY) tests/bench/halt_lag.py

bench-audit: $(STAMP) ## what the audit's database takes and answers, over 10 million rows (ROWS=50000000 KEEP=dir)
	$(PY) tests/bench/audit.py --rows $(or $(ROWS),10000000) $(if $(KEEP),--keep $(KEEP))

bench-halt: $(STAMP) ## halt lag over 1,000 trips beside 1,000 usages/s, by hop (a real Kafka: needs Java and Maven)
	$(PY) tests/bench/halt_lag.py --trips 1000 --rate 1000

bench-overshoot: $(STAMP) ## overshoot by concurrency: after the fact, with holds, by LiteLLM; draws docs/images/overshoot.png
	$(PY) tests/bench/overshoot.py --chart docs/images/overshoot.png

bench-state: $(STAMP) ## memory for each agent and time to recover, at 100,000 agents on a real Kafka (AGENTS=20000 for less)
	$(PY) tests/bench/state.py --agents $(or $(AGENTS),100000)

chaos: $(STAMP) ## 100 random faults on a real three-node Kafka, then every number compared (needs Java and Maven)
	$(PY) tests/chaos/chaos.py $(if $(SEED),--seed $(SEED)) $(if $(KILLS),--kills $(KILLS))

fuzz: $(STAMP) ## a million changed messages into every reader of bytes, and 2,000 machines of events against an oracle
	$(PY) tests/fuzz/fuzz.py --inputs $(or $(INPUTS),1000000) $(if $(SEED),--seed $(SEED))
	SPENDFUSE_MACHINES=$(or $(MACHINES),2000) $(PY) -m pytest -q --timeout=7200 tests/pipeline/test_machine.py

lock: $(STAMP) ## pin every dependency again, with hashes and without addresses
	$(PY) -m pip install --quiet uv
	$(UV) pip compile pyproject.toml --extra all --extra prices --group dev --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-header --no-annotate -o requirements.lock
	for name in chart litellm peers profile; do $(UV) pip compile tests/bench/locks/$$name.in --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-header --no-annotate -o tests/bench/locks/$$name.txt || exit 1; done

clean: ## forget the virtual environment and caches
	rm -rf $(VENV) .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis .spendfuse
