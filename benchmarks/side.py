"""One side of a comparison: prepares the work of a module, then does it once for each line "run" on standard input.

    python -m benchmarks.side benchmarks.published.step '{"threads": 2, "batch": 8}'

The module's `prepare(**options)` returns a function that does one unit of work. Prints one line of JSON for each run:
its seconds, and the largest resident memory beyond that of the prepared work, in bytes (0 where the kernel does not
tell).
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path

import torch

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident_bytes(field: str) -> int:
    """Return VmRSS (now) or VmHWM (the largest since the last reset) of this process."""
    for line in _STATUS.read_text().splitlines() if _STATUS.exists() else []:
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def main() -> None:
    options = json.loads(sys.argv[2])
    torch.set_num_threads(options.pop("threads"))
    work = importlib.import_module(sys.argv[1]).prepare(**options)
    prepared = resident_bytes("VmRSS")
    for _ in sys.stdin:
        if _CLEAR_REFS.exists():
            _CLEAR_REFS.write_text("5")  # resets VmHWM
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "bytes": resident_bytes("VmHWM") - prepared}), flush=True)


if __name__ == "__main__":
    main()
