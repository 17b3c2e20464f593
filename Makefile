# make demo   the whole mission, small: shards, two ranks, three tickets, a picture
# make test   the checks, and all tests that take no minutes and no server from Debian
# make test-all  that and the long tests: chaos, networks, SLURM, Ceph, engines at length (make test-long: these alone)
# make check  ruff, format, types, who imports whom
# make report five methods side by side on real images (needs MIRL_DATA; over an hour on two cores)
# make bench  each costly piece of work against the published way: docs/performance.md (make bench-check compares)
# make lock   pins the newest versions in constraints.txt
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)
# One thread per rank and per test process: two ranks on two cores would fight for them otherwise.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-long test-all check report bench bench-check install lock clean
.DEFAULT_GOAL := demo

# constraints.txt pins every package, so that an installation next year is the one of today.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e ".[dev]"
	touch $@

# Pins the newest versions of everything that an installation uses, for all Pythons that pyproject.toml allows.
lock: install
	$(PIP) uv
	uv pip compile --quiet --universal --python-version 3.10 --no-python-downloads --upgrade --no-annotate \
		--custom-compile-command "make lock" --extra dev pyproject.toml --output-file constraints.txt

demo: install
	mirl-dist shards build shards/demo.yaml --out demo/shards
	mirl-dist train configs/demo.yaml --launch auto
	mirl-dist tickets pictures demo/run --out demo/restored.png --overwrite
	mirl-dist tickets compare demo/run --out demo/report --title "The demo's tickets" --overwrite >/dev/null
	@echo "all of it on one page: demo/report/tickets.html"

check: install
	ruff check .
	ruff format --check .
	mypy
	lint-imports --no-logo

# A file of tests at a time in each of two processes: servers and runs that the tests of a file share are made once.
PYTEST := pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: check
	$(PYTEST) -m "not long"

# These wait a good deal, for servers, leases and processes that start: three at a time keep two cores busy.
test-long: install
	$(PYTEST) --numprocesses 3 -m long

test-all: test test-long

report: install
	python benchmarks/five_methods.py

bench: install
	python benchmarks/performance.py --write

bench-check: install
	python benchmarks/performance.py --check

clean:
	rm -rf demo .mypy_cache .ruff_cache .import_linter_cache .pytest_cache build *.egg-info
