# make demo   the whole mission, small: shards, two ranks, four tickets, a picture
# make test   the checks, and all tests but the long ones: some minutes
# make test-all the long tests too: chaos, networks, SLURM, Ceph, engines at length (test-long: these alone)
# make check  ruff, format, types, who imports whom
# make report five methods side by side on real images (needs MIRL_DATA; over an hour on two cores)
# make bench  measurements (see benchmarks/)
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export PATH := $(abspath $(BIN)):$(PATH)
# One thread per rank and per test process: two ranks on two cores would fight for them otherwise.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test check report bench install clean
.DEFAULT_GOAL := demo

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: install
	mirl-dist shards build shards/demo.yaml --out demo/shards
	mirl-dist train configs/demo.yaml --launch auto
	mirl-dist tickets pictures demo/run --out demo/restored.png
	mirl-dist tickets compare demo/run --out demo/report --title "The demo's tickets" >/dev/null
	@echo "all of it on one page: demo/report/tickets.html"

check: install
	ruff check .
	ruff format --check .
	mypy

# Tests with ranks of their own start many processes: a file of them at a time in each of two.
test: check
	pytest --numprocesses 2 tests --ignore tests/multiprocess
	pytest --numprocesses 2 --dist loadfile tests/multiprocess

report: install
	python benchmarks/five_methods.py

bench: install
	python benchmarks/selection.py

clean:
	rm -rf demo .mypy_cache .ruff_cache .pytest_cache build *.egg-info
