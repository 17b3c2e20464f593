"""Measures each costly piece of work against the published way of doing it: `make bench`, `make bench-check`.

    python benchmarks/performance.py [--runs 7] [--only step,prune] [--small] [--write] [--check]

Both sides of an axis run in processes of their own, as a user would start them, and take turns: published, ours,
published, ours. A ratio compares two neighbouring runs, so a machine that slows down slows both. The table has the
median ratio with its smallest and largest value. --write puts the table into docs/performance.md and the figures into
docs/results/performance.json; --check exits with code 1 if a ratio is lower than there by more than the tolerance.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "docs/results/performance.json", ROOT / "docs/performance.md"
TABLE_START, TABLE_END = "<!-- table: make bench -->", "<!-- end of table -->"
TOLERANCE = 0.15
WARM_UP = 1


class Axis(NamedTuple):
    """One row of the table: the same work, done in two ways.

    published, ours: a module under benchmarks/ and the options of its `prepare`. target: the least ratio wanted, by
    class of CPU ('' for any). memory: the name and target of a further row, for the memory that the work adds.
    """

    key: str
    name: str
    published: tuple[str, dict[str, Any]]
    ours: tuple[str, dict[str, Any]]
    target: Mapping[str, float]
    memory: tuple[str, float] | None = None


class Row(NamedTuple):
    """A measured row. ratios: published / ours, one for each pair of neighbouring runs; unit: 's' or 'MB'."""

    key: str
    name: str
    published: float
    ours: float
    ratios: list[float]
    target: float | None
    unit: str


def axes(small: bool) -> list[Axis]:
    """Return all axes. small: tiny sizes, to try the script itself."""
    size: dict[str, Any] = {"batch": 8, "patch": 64}
    image: dict[str, Any] = {"image": [321, 481]}
    weights: dict[str, Any] = {"weights": 35_000_000}
    if small:
        tiny = {"dim": 8, "blocks": [1, 1, 1, 1]}
        size, image, weights = tiny | {"batch": 2, "patch": 16}, tiny | {"image": [33, 49]}, {"weights": 100_000}
    two, one = {"threads": 2}, {"threads": 1}
    step = ("published.step", size | two)
    return [
        Axis(
            "step",
            "training step, fp32, 8 patches of 64x64, 2 threads",
            step,
            ("ours.step", size | two),
            {"avx2": 1.35, "avx512": 2.2, "amx": 2.2},
            memory=("memory of that step", 1 / 0.75),
        ),
        Axis(
            "bf16",
            "training step, ours in bf16, published in fp32",
            step,
            ("ours.step", size | two | {"precision": "bf16"}),
            {"amx": 3.4},
        ),
        Axis("image", "one image of 481x321, fp32, 2 threads", ("published.step", image | two),
             ("ours.step", image | two), {"": 2.0}),
        Axis(
            "prune",
            "cut, prune and rewind 35 million weights, 1 thread",
            ("published.prune", weights | one),
            ("ours.prune", weights | one),
            {"": 4.0},
            memory=("memory of that cut", 10.0),
        ),
        Axis(
            "ranks",
            "training step: 2 ranks of 1 thread against 1 of 2 (ours both)",
            ("ours.step", size | two),
            ("ours.ranks", size | one | {"ranks": 2}),
            {"": 0.9},
        ),
    ]  # fmt: skip


class Side:
    """One way of doing the work, in a process of its own that waits for its turn."""

    def __init__(self, module: str, options: Mapping[str, Any]) -> None:
        command = [sys.executable, "-m", "benchmarks.side", f"benchmarks.{module}", json.dumps(options)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.name = module

    def run(self) -> dict[str, float]:
        """Do the work once. Return 'seconds' and 'bytes', the largest memory beyond that of the prepared work."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name}: ended with code {self._process.wait()}")
        figures: dict[str, float] = json.loads(line)
        return figures

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)


def measure(axis: Axis, runs: int, cpu: str) -> list[Row]:
    sides = [Side(*axis.published), Side(*axis.ours)]
    try:
        for _ in range(WARM_UP):
            for side in sides:
                side.run()
        pairs = [[side.run() for side in sides] for _ in range(runs)]
    finally:
        for side in sides:
            side.close()

    def row(key: str, name: str, figure: str, target: float | None, unit: str, scale: float) -> Row:
        published, ours = ([pair[at][figure] / scale for pair in pairs] for at in (0, 1))
        ratios = [p / max(o, 1e-9) for p, o in zip(published, ours, strict=True)]
        return Row(key, name, statistics.median(published), statistics.median(ours), ratios, target, unit)

    target = axis.target.get(cpu, axis.target.get(""))
    rows = [row(axis.key, axis.name, "seconds", target, "s", 1.0)]
    if axis.memory is not None:
        rows.append(row(f"{axis.key}_memory", axis.memory[0], "bytes", axis.memory[1], "MB", 1e6))
    return rows


def cpu_class() -> str:
    """Return what the CPU computes fastest with: 'amx', 'avx512' or 'avx2'."""
    flags = set(next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "flags" in line), "").split())
    return "amx" if "amx_tile" in flags else "avx512" if "avx512f" in flags else "avx2"


def conditions() -> dict[str, str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown CPU")
    cores = sum(line.startswith("processor") for line in lines)
    date = datetime.date.today().isoformat()
    return {"date": date, "cpu": model, "class": cpu_class(), "cores": str(cores), "torch": torch.__version__}


def table(rows: Sequence[Row], facts: Mapping[str, str], runs: int) -> str:
    lines = [
        f"{facts['date']}, {facts['cpu']} ({facts['class']}, {facts['cores']} cores, shared), torch {facts['torch']}, "
        f"medians of {runs} interleaved runs:",
        "",
        "| work | published | ours | ratio (least to most) | wanted |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        digits = 2 if row.unit == "s" else 0
        ratio = f"**{statistics.median(row.ratios):.2f}** ({min(row.ratios):.2f} to {max(row.ratios):.2f})"
        wanted = "" if row.target is None else f"{row.target:.2f}"
        published, ours = (f"{value:.{digits}f} {row.unit}" for value in (row.published, row.ours))
        lines.append(f"| {row.name} | {published} | {ours} | {ratio} | {wanted} |")
    return "\n".join(lines)


def write(rows: Sequence[Row], facts: Mapping[str, str], runs: int) -> None:
    """Keep the figures of this class of CPU, and renew the table on the page."""
    kept: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    ratios = {row.key: round(statistics.median(row.ratios), 3) for row in rows}
    kept[facts["class"]] = {
        "conditions": dict(facts) | {"runs": str(runs)},
        "ratios": ratios,
        "table": table(rows, facts, runs),
    }
    RESULTS.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    page = PAGE.read_text()
    before, rest = page.split(TABLE_START)
    after = rest.split(TABLE_END)[1]
    tables = "\n\n".join(entry["table"] for _, entry in sorted(kept.items()))
    PAGE.write_text(f"{before}{TABLE_START}\n{tables}\n{TABLE_END}{after}")


def check(rows: Sequence[Row], facts: Mapping[str, str]) -> list[str]:
    """Return the rows whose ratio is lower than the committed one of this class of CPU, as lines."""
    kept: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if facts["class"] not in kept:
        raise SystemExit(f"{RESULTS.name} has no figures of a CPU with {facts['class']}: nothing to compare with")
    committed = kept[facts["class"]]["ratios"]
    return [
        f"{row.name}: {statistics.median(row.ratios):.2f} times published, {committed[row.key]:.2f} committed"
        for row in rows
        if row.key in committed and statistics.median(row.ratios) < committed[row.key] * (1 - TOLERANCE)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--only", default="", help="keys of axes, with commas between them")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    chosen, keys = axes(args.small), [axis.key for axis in axes(args.small)]
    if args.only:
        if unknown := set(args.only.split(",")) - set(keys):
            parser.error(f"--only: no axis is called {', '.join(sorted(unknown))}; there are {', '.join(keys)}")
        chosen = [axis for axis in chosen if axis.key in args.only.split(",")]
    if args.write and (args.only or args.small):
        parser.error("--write needs all axes at full size: leave out --only and --small")
    facts, rows = conditions(), []
    for axis in chosen:
        rows += measure(axis, args.runs, facts["class"])
        print(f"{axis.name}: {statistics.median(rows[-1].ratios):.2f}", file=sys.stderr, flush=True)
    print(table(rows, facts, args.runs))
    if args.write:
        write(rows, facts, args.runs)
    if args.check and (lower := check(rows, facts)):
        raise SystemExit("slower than committed:\n" + "\n".join(f"  {line}" for line in lower))


if __name__ == "__main__":
    main()
