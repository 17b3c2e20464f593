"""Tries the package on one GPU in under eight minutes: python benchmarks/gpu_smoke [--cpu] [--only a,b] [--seconds N]

Run it in the repository's root. It needs torch and the packages of pyproject.toml without mlflow and boto3 (tracking is
off, shards lie in a folder); stages of DeepSpeed are skipped where that is missing. Stages run in the order of their
worth, each in processes of its own and with a limit of its own; one that fails stops none of the others. After every
stage the results are written to gpu_smoke.json in the folder that the variable OUT names (default: here), and at the
end a table is printed. --cpu: every stage on the CPU at tiny sizes, to try the script; figures mean nothing there. Exit
code 1 if a stage failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import in_process
import speed
import with_commands
from commands import Commands, Limit

Result = dict[str, Any]
_ERRORS = (OSError, ValueError, LookupError, AttributeError, RuntimeError)
INNER = {"facts": in_process.facts, "numbers": in_process.numbers, "sizes": in_process.sizes, "speed": speed.speed}
STAGES = {
    "facts": 20,
    "numbers": 45,
    "shards": 40,
    "plain": 60,
    "full": 100,
    "speed": 120,
    "killed": 60,
    "sizes": 60,
    "refusals": 60,
    "using": 60,
    "halves": 40,
    "torchrun": 40,
    "engines": 90,
    "criteria": 60,
}
"""Seconds that a stage may take on a GPU, in the order of their worth; on a CPU three times as long."""


def run_stage(name: str, commands: Commands) -> Result:
    """Run one stage. 'ok' in the result: True, False, or why it was skipped."""
    if name in INNER:
        flags = ["--inner", name, *(["--cpu"] if commands.cpu else [])]
        result = commands.run([sys.executable, str(Path(__file__).parent), *flags])
        lines = [line for line in result.pop("text").splitlines() if line.startswith("RESULT ")]
        return json.loads(lines[-1].removeprefix("RESULT ")) if lines else {"ok": False} | result
    return getattr(with_commands, name)(commands)


def run_all(names: list[str], cpu: bool, seconds: float, out: Path) -> dict[str, Result]:
    """Run stages by name, and write the results so far after each."""
    results: dict[str, Result] = {}
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="gpu-smoke-") as work:
        for name in names:
            began = time.monotonic()
            limit = min(STAGES[name] * (3 if cpu else 1), end - began)
            try:
                commands = Commands(Path(work), cpu, Limit(began + limit))
                results[name] = run_stage(name, commands) if limit > 10 else {"ok": "skipped: no time is left"}
            except _ERRORS as error:  # a stage that fails stops none of the others
                results[name] = {"ok": False, "error": f"{type(error).__name__}: {str(error)[:300]}"}
            results[name]["seconds"] = round(time.monotonic() - began, 1)
            out.write_text(json.dumps(results, indent=1) + "\n")
            print(row(name, results[name]), flush=True)
    return results


def row(name: str, result: Result) -> str:
    verdict = {True: "ok", False: "FAILED"}.get(result["ok"], str(result["ok"]))
    figures = {key: value for key, value in result.items() if key not in ("ok", "seconds")}
    return f"{name:10}{result['seconds']:7.1f} s  {verdict:28} {json.dumps(figures)[:160]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="everything on the CPU, tiny, to try the script")
    parser.add_argument("--only", default="", help=f"stages, with commas: {', '.join(STAGES)}")
    parser.add_argument("--seconds", type=float, default=450, help="for all stages together")
    parser.add_argument("--inner", choices=INNER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inner:
        print("RESULT " + json.dumps(INNER[args.inner](args.cpu)), flush=True)
        return 0
    names = args.only.split(",") if args.only else list(STAGES)
    if unknown := set(names) - set(STAGES):
        parser.error(f"--only: no stage is called {', '.join(sorted(unknown))}")
    out = Path(os.environ.get("OUT", "."))
    out.mkdir(parents=True, exist_ok=True)
    results = run_all(names, args.cpu, args.seconds, out / "gpu_smoke.json")
    print("\n" + "\n".join(row(name, result) for name, result in results.items()))
    return int(any(result["ok"] is False for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
