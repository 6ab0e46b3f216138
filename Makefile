# `make demo` and `make test` need nothing but python3 (3.10 to 3.13) and a package index: the environment is part of them.
#   PYTHON=python3.12   interpreter of the environment          ARGS="..."   passed on to the command
#   WORKERS=4           test processes

PYTHON  ?= python3
WORKERS ?= 2
ARGS    ?=

VENV    := .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.installed
DOCS    := $(VENV)/.docs
TYPING  := build/typing/qgnn_plugin

.PHONY: env test test-all lint demo bench-accuracy

env: $(STAMP)

# torch comes first: it is by far the largest, and a failure there should show at once.
$(STAMP): pyproject.toml setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

# One thread in each of the test processes.
test test-all: export OMP_NUM_THREADS ?= 1
test test-all: export NUMBA_NUM_THREADS ?= 1
test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" $(ARGS)

test-all: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

# The tests on the oldest versions that pyproject.toml claims, in an environment of its own (ARGS="tests/layers -x").
FLOORS := build/floors
.PHONY: test-floors
test-floors: export OMP_NUM_THREADS ?= 1
test-floors: export NUMBA_NUM_THREADS ?= 1
test-floors:
	test -x $(FLOORS)/bin/python || $(PYTHON) -m venv $(FLOORS)
	$(FLOORS)/bin/python -m pip install --quiet pytest pytest-xdist hypothesis "setuptools>=77" wheel tomli
	$(FLOORS)/bin/python -m pip install --quiet $$($(FLOORS)/bin/python tools/floors.py)
	$(FLOORS)/bin/python -m pip install --quiet --no-deps --no-build-isolation -e .
	$(FLOORS)/bin/python -m pytest -n $(WORKERS) -m "not slow" $(ARGS)

# mypy and the documentation do not follow package-dir: they read a tree of links laid out as the installed package.
.PHONY: links docs
links:
	rm -rf $(TYPING) && mkdir -p $(TYPING)
	ln -s $(CURDIR)/qgnn_plugin/* $(CURDIR)/kernels $(CURDIR)/lightning_modules $(TYPING)
	ln -sfn $(CURDIR)/tools build/typing/tools

$(DOCS): $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

# The site, under build/site; a warning is an error.
docs: $(DOCS) links
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build $(ARGS)

lint: $(STAMP) links
	$(BIN)/ruff check .
	cd build/typing && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml \
		--cache-dir $(CURDIR)/.mypy_cache -p qgnn_plugin -p tools

demo: $(STAMP)
	$(BIN)/python -m examples.demo $(ARGS)

bench-accuracy: $(STAMP)
	$(BIN)/python -m benchmarks.accuracy $(ARGS)

# Whether the smoothness constraint is met, what it is good for, and what it costs; about four hours of one core (ARGS="--jobs 2").
.PHONY: bench-smp
bench-smp: $(STAMP)
	$(BIN)/python -m benchmarks.smp $(ARGS)

# Kernels, inference, memory, files, growth and recall; finished sections are kept (ARGS=--fresh measures again).
.PHONY: bench-cpu
bench-cpu: $(STAMP)
	$(BIN)/python -m benchmarks.cpu $(ARGS)

# The README's pictures, and its table, which is printed, from the results that are there; nothing is measured.
.PHONY: pictures
pictures: $(STAMP)
	$(BIN)/python -m benchmarks.pictures $(ARGS)
	$(BIN)/python -m benchmarks.headline

# Graph classification and regression at every width (ARGS="--root data --tasks CSL MUTAG").
.PHONY: bench-graphs bench-layers
bench-graphs: $(STAMP)
	$(BIN)/python -m benchmarks.graphs $(ARGS)

# Every class that torch_geometric.nn.conv and .models export: path, error, speed and memory; writes docs/layers_table.md.
bench-layers: $(STAMP)
	$(BIN)/python -m benchmarks.layers $(ARGS)

# Registers, load widths and instruction mix of the Triton kernels; needs no GPU.
.PHONY: kernel-report bench-gpu
kernel-report: $(STAMP)
	$(BIN)/python -m benchmarks.kernel_report $(ARGS)

# Correctness on the device, then every timing; ARGS=--dry-run works without a GPU. On a machine without a package index
# no environment is needed: `python3 -m benchmarks.gpu --out DIR`.
bench-gpu: $(STAMP)
	$(BIN)/python -m benchmarks.gpu $(ARGS)
