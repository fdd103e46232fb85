# Every target builds .venv first if it is missing or out of date. Needs only Python >= 3.11.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: help demo test check bench docs clean

help:
	@echo "make demo   train a model over two devices, slow one down, watch the plan change"
	@echo "make test   check, then run the tests"
	@echo "make check  formatting, lint, types, import contracts"
	@echo "make bench  run every benchmark; results go to benchmarks/results/ (DATA=folder: graphs to place)"
	@echo "make docs   run every code block of the documentation"
	@echo "make clean  remove .venv, caches and demo output"

demo: $(READY)
	@$(BIN)/forescale demo --out demo-output

# These neither need a machine of their own nor measure time, so they run side by side.
APART := tests/property tests/simulation tests/unit/test_architecture.py \
	$(addprefix tests/unit/,api cli control core engine forecast graph plan registry)

test: check
	@$(BIN)/pytest -n 2 --dist worksteal $(APART)
	@$(BIN)/pytest $(APART:%=--ignore=%)

check: $(READY)
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/pyright
	@$(BIN)/lint-imports --no-logo

bench: $(READY)
	@set -e; for script in benchmarks/bench_*.py; do \
		case "$$script" in *placement.py) data="$(DATA)"; [ -n "$$data" ] || continue;; *) data=;; esac; \
		echo "== $$script"; $(BIN)/python "$$script" $${data:+"$$data"}; \
	done

docs: $(READY)
	@$(BIN)/pytest tests/integration/test_docs.py

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache demo-output

# The stamp is written last, so an interrupted installation is repeated.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Forescale needs Python 3.11 or newer: make PYTHON=python3.12")'
	@echo "Installing Forescale and its locked dependencies into .venv (once, a few minutes) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev,forecast,mlflow,onnx,otel,plan,postgres,report,serve]'
	@touch $@
