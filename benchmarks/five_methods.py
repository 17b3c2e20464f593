"""Dense, MIR-L-G, MIR-L-LW, PIR-OSM and PIR-OSR on real images, several seeds, with controls: one command, one report.

python benchmarks/five_methods.py [--runs runs/five_methods] [--out docs/results/five_methods] [--seeds 0 1] [--lanes 2]

Needs MIRL_DATA. What is trained already is not trained again: a second call goes on where the first one stopped. Runs
are single processes, `lanes` of them side by side, each on one thread.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CONFIG, RECIPE = "configs/five_methods.yaml", "shards/bsd_small.yaml"
ONE_SHOT = {"prune.style": "one_shot", "prune.rounds": "1", "prune.fraction": "0.7"}
METHODS: dict[str, dict[str, str]] = {
    "global": {},
    "layer": {"prune.per": "layer"},
    "osm70": ONE_SHOT,
    "osr70": ONE_SHOT | {"prune.criterion": "random"},
}
"""Folder -> what it sets. The fifth method, dense, is round 0 of each of them."""


def mirl(*arguments: str, log: Path | None = None) -> None:
    """`mirl-dist ARGUMENTS`; ends this program when it fails."""
    command = [sys.executable, "-m", "mirl_dist", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log or os.devnull, "ab") as file:
        out = None if log is None else file
        code = subprocess.run(command, env=environment, stdout=out, stderr=out, check=False).returncode
    if code:
        sys.exit(f"mirl-dist {' '.join(arguments)} ended with code {code}" + (f"; see {log}" if log else ""))


def train(runs: Path, method: str, seed: int) -> None:
    """One run to its end, or nothing where it has ended."""
    run = runs / f"{method}-{seed}"
    sets = {"run.folder": str(run), "run.seed": str(seed)} | METHODS[method]
    options = [text for key, value in sets.items() for text in ("--set", f"{key}={value}")]
    print(f"{run} ...", flush=True)
    mirl("train", CONFIG, *options, log=runs / f"{method}-{seed}.log")
    print(f"{run} done", flush=True)


def judge(runs: Path, seed: int, launch: Path) -> None:
    """The controls of one global run."""
    mirl("tickets", "judge", str(runs / f"global-{seed}"), "--train", str(launch), log=runs / f"controls-{seed}.log")
    print(f"{runs}/global-{seed}/controls done", flush=True)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--runs", type=Path, default=Path("runs/five_methods"))
    asked.add_argument("--out", type=Path, default=Path("docs/results/five_methods"))
    asked.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    asked.add_argument("--lanes", type=int, default=2)
    said = asked.parse_args()
    said.runs.mkdir(parents=True, exist_ok=True)
    shards = Path("shards/bsd_small")
    if not (shards / "manifest.json").exists():
        if "MIRL_DATA" not in os.environ:
            sys.exit("MIRL_DATA is not set: it names the folder of image sets that the shards are built from")
        mirl("shards", "build", RECIPE, "--out", str(shards))
    with ThreadPoolExecutor(said.lanes) as lanes:
        list(lanes.map(lambda one: train(said.runs, *one), [(m, s) for m in METHODS for s in said.seeds]))
        list(lanes.map(lambda seed: judge(said.runs, seed, Path("launch/one.yaml")), said.seeds))
    runs = [str(said.runs / f"{method}-{seed}") for method in METHODS for seed in said.seeds]
    controls = sorted(str(folder) for folder in said.runs.glob("*/controls/*") if folder.is_dir())
    title = "Five methods on real images"
    mirl(
        "tickets", "compare", *runs, *controls, "--out", str(said.out), "--title", title, "--experiment", "five_methods"
    )
    mirl("tickets", "judge", *(str(said.runs / f"global-{seed}") for seed in said.seeds))


if __name__ == "__main__":
    main()
