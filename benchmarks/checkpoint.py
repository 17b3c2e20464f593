"""What a commit costs: how long training stands still for it, and how fast its bytes travel.

    python benchmarks/checkpoint.py [--megaweights 35] [--commits 7] [--out FILE.json]

The network is PromptIR's size unless said otherwise: weights and two moments, 3 x 4 bytes a weight. The store is a real
S3 server on this machine (Ceph's radosgw where it is installed, else moto), or a folder. Three ways take turns: the
snapshot that goes up in the background (what training does), the same commit waited for (what it would cost without a
background), and a raw upload of the same bytes by boto3's own transfer manager (what the server and the wire allow).
A busy thread counts short pieces of work meanwhile, as a training step would: how many it loses while a commit is
written tells what the background costs.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mirl_dist.distributed.engines.ddp import DdpEngine
from mirl_dist.pruning import masks as masking
from mirl_dist.storage import open_store
from mirl_dist.storage.async_writer import AsyncWriter
from mirl_dist.training.checkpointing.checkpoint import Checkpoints
from mirl_dist.training.state import TrainState
from tests.services.ceph_server import CephServer
from tests.services.s3_server import S3Server

TENSORS = 542  # as many as PromptIR has


def state_of(megaweights: float) -> TrainState:
    """A state with weights, moments and a mask, as in the middle of a round."""
    each = max(1, int(megaweights * 1e6 / TENSORS))
    torch.manual_seed(0)
    weights = {f"layer{i:03d}.weight": nn.Parameter(torch.randn(each)) for i in range(TENSORS)}
    masks = {name: torch.rand(each) > 0.5 for name in weights}
    state = TrainState(DdpEngine(weights, lambda named: torch.optim.AdamW(named.values())), masks)
    for parameter in weights.values():
        parameter.grad = torch.randn(each)
    state.engine.step(1e-3, refused=torch.zeros(()))
    state.progress.mask_digest = masking.digest(masks)
    return state


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def pieces(until: Callable[[], bool]) -> tuple[int, float]:
    """Pieces of work done until then, and the seconds that took: a stand-in for training steps on this core."""
    matrix, done, began = torch.randn(256, 256), 0, time.perf_counter()
    while not until():
        matrix = torch.tanh(matrix @ matrix)
        done += 1
    return done, time.perf_counter() - began


def measure(kept: Checkpoints, state: TrainState, commits: int, raw: Callable[[str, bytes], None]) -> dict[str, Any]:
    """Medians over interleaved rounds."""
    state.snapshot()  # its memory is made once
    data = os.urandom(sum(p.numel() for p in state.weights.values()) * 12)
    found: dict[str, list[float]] = {k: [] for k in ("snapshot", "background", "waited", "raw", "pieces_lost")}
    quiet = None
    for number in range(commits):
        end = time.perf_counter() + 1.0
        done, took = pieces(lambda end=end: time.perf_counter() >= end)  # type: ignore[misc]
        quiet = done / took
        keeper = AsyncWriter(60)
        state.progress.updates = 10 * number + 1
        began = time.perf_counter()
        snapshot = state.snapshot()
        keeper.begin(lambda s=snapshot: kept.commit_step(s, 2), "a commit")  # type: ignore[misc]
        found["snapshot"].append(time.perf_counter() - began)
        done, took = pieces(lambda keeper=keeper: not keeper.busy)  # type: ignore[misc]
        found["background"].append(time.perf_counter() - began)
        found["pieces_lost"].append(1 - done / took / quiet)
        keeper.wait()
        state.progress.updates += 5
        found["waited"].append(seconds(lambda: kept.commit_step(state.snapshot(), 2)))
        found["raw"].append(seconds(lambda number=number: raw(f"raw-{number % 2}", data)))  # type: ignore[misc]
    medians = {name: statistics.median(values) for name, values in found.items()}
    medians["megabytes"] = len(data) / 1e6
    return medians


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--megaweights", type=float, default=35.0)
    ask.add_argument("--commits", type=int, default=7)
    ask.add_argument("--out", type=Path)
    asked = ask.parse_args()
    state, results = state_of(asked.megaweights), {}
    server: Any = CephServer() if CephServer.installed() else S3Server()
    try:
        os.environ.update(server.env())
        address = server.bucket("bench")
        kept = Checkpoints(open_store(f"{address}/run"))
        client = server.client()
        results["s3"] = measure(
            kept, state, asked.commits, lambda name, data: client.upload_fileobj(io.BytesIO(data), "bench", name)
        )
    finally:
        server.stop()
    with tempfile.TemporaryDirectory() as folder:
        kept = Checkpoints(open_store(f"{folder}/run"))

        def raw(name: str, data: bytes) -> None:
            with open(f"{folder}/{name}", "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())

        results["folder"] = measure(kept, state, asked.commits, raw)
    conditions = {
        "date": time.strftime("%Y-%m-%d"),
        "server": type(server).__name__,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commits": asked.commits,
        "megaweights": asked.megaweights,
    }
    for store, m in results.items():
        size = m["megabytes"]
        print(f"{store}: {size:.0f} MB a commit, medians of {asked.commits}")
        print(f"  training stands still        {m['snapshot'] * 1e3:9.0f} ms  (waited for: {m['waited'] * 1e3:.0f} ms)")
        print(f"  on its way in the background {m['background']:9.2f} s   {size / m['background']:7.0f} MB/s")
        print(f"  waited for                   {m['waited']:9.2f} s   {size / m['waited']:7.0f} MB/s")
        print(f"  raw upload of the same bytes {m['raw']:9.2f} s   {size / m['raw']:7.0f} MB/s")
        print(f"  work lost meanwhile          {m['pieces_lost']:9.0%}")
    print(conditions)
    if asked.out:
        asked.out.write_text(json.dumps({"conditions": conditions, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
