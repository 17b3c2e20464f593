"""Dense, MIR-L-G, MIR-L-LW, PIR-OSM and PIR-OSR on real images, several seeds, with controls: one command, one report.

python benchmarks/five_methods.py [--runs runs/five_methods] [--out docs/results/five_methods] [--seeds 0 1] [--lanes 2]

Needs MIRL_DATA. The runs are those of configs/sweeps/five_methods.yaml; this adds the shards before and the controls
after them. What is trained already is not trained again: a second call goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SWEEP, RECIPE = "configs/sweeps/five_methods.yaml", "shards/bsd_small.yaml"


def mirl(*arguments: str, log: Path | None = None) -> None:
    """`mirl-dist ARGUMENTS`; ends this program when it fails. log: where its output goes, else to the terminal."""
    command = [sys.executable, "-m", "mirl_dist", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(log or os.devnull, "ab") as file:
        out = None if log is None else file
        code = subprocess.run(command, env=environment, stdout=out, stderr=out, check=False).returncode
    if code:
        print(f"mirl-dist {' '.join(arguments)} ended with code {code}" + (f"; see {log}" if log else ""))
        sys.exit(code)


def judge(runs: Path, seed: int) -> None:
    """The controls of one global run."""
    run = runs / f"global-seed{seed}"
    mirl("tickets", "judge", str(run), "--train", "launch/one.yaml", log=runs / f"controls-seed{seed}.log")
    print(f"{run}/controls done", flush=True)


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--runs", type=Path, default=Path("runs/five_methods"))
    asked.add_argument("--out", type=Path, default=Path("docs/results/five_methods"))
    asked.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    asked.add_argument("--lanes", type=int, default=2)
    said = asked.parse_args()
    shards = Path("shards/bsd_small")
    if not (shards / "manifest.json").exists():
        if "MIRL_DATA" not in os.environ:
            sys.exit("MIRL_DATA is not set: it names the folder of image sets that the shards are built from")
        mirl("shards", "build", RECIPE, "--out", str(shards))
    sets = [f"folder={said.runs}", f"compare.out={said.out}", f"seeds={said.seeds}", f"slots={said.lanes}"]
    sweep = ["sweep", SWEEP, *(text for one in sets for text in ("--set", one))]
    mirl(*sweep)
    with ThreadPoolExecutor(said.lanes) as lanes:
        list(lanes.map(lambda seed: judge(said.runs, seed), said.seeds))
    mirl(*sweep, "--compare")  # once more, with the controls
    mirl("tickets", "judge", *(str(said.runs / f"global-seed{seed}") for seed in said.seeds))


if __name__ == "__main__":
    main()
