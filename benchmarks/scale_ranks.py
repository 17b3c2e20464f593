"""Cuts of PromptIR by real processes over gloo: seconds, bytes, peak memory. Started by `scale.py processes`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from scale_round import received, reduced, words

from mirl_dist.pruning import masks as masking
from mirl_dist.pruning.partition import Partition
from mirl_dist.pruning.prune import PruneConfig, PruneResult, prune

GATHERS, REDUCES = "50 all-gathers of 2048 counts", "50 all-reduces of 2048 counts"


def part_of(tensor: Tensor, rank: int, ranks: int) -> Tensor:
    flat = tensor.reshape(-1)
    return flat[flat.numel() * rank // ranks : flat.numel() * (rank + 1) // ranks]


def status(field: str) -> int:
    """Bytes of a field of this process's status."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


def on_the_wire() -> int:
    """Bytes received over loopback so far, by all processes of this network namespace."""
    line = next(x for x in Path("/proc/self/net/dev").read_text().splitlines() if x.strip().startswith("lo:"))
    return int(line.split()[1])


def rank_work(folder: Path, runs: int) -> None:
    """On every rank: cuts of a PromptIR that is replicated, and of one that is dealt out."""
    import torch.distributed

    from mirl_dist.distributed.ranks import Ranks
    from mirl_dist.models import create

    ranks = Ranks(device="cpu")
    torch.manual_seed(0)
    whole = {n: p.detach() for n, p in create("promptir").named_parameters()}
    mine = {n: part_of(w, ranks.rank, ranks.world).clone() for n, w in whole.items()}
    rule, counts = PruneConfig(0.2), torch.arange(2048)
    masks = {"replicas": masking.dense_masks(whole, whole), "dealt": masking.dense_masks(mine, mine)}
    made: dict[str, PruneResult] = {}

    def cut(way: str) -> None:
        held, share = (
            (whole, ranks.partition) if way == "replicas" else (mine, Partition(ranks.rank, is_replicated=False))
        )
        made[way] = prune(held, masks[way], rule, share, ranks.gather)

    def often(gathers: bool) -> None:
        for _ in range(50):
            if gathers:
                ranks.gather(counts).sum(dim=0)
            else:
                torch.distributed.all_reduce(counts.clone())

    ways: dict[str, Callable[[], object]] = {
        "replicas": lambda: cut("replicas"),
        "dealt": lambda: cut("dealt"),
        GATHERS: lambda: often(True),
        REDUCES: lambda: often(False) if ranks.world > 1 else None,
        "digest of weights": lambda: masking.digest_tensors(whole),
        "digest of masks": lambda: masking.digest(masks["replicas"]),
    }
    seen: dict[str, list[list[float]]] = {way: [] for way in ways}
    for _ in range(runs):
        for way, work in ways.items():
            made.pop(way, None)
            ranks.barrier()
            Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew
            before, wire, cpu, began = status("VmRSS"), on_the_wire(), time.process_time(), time.perf_counter()
            work()
            mine_s = [time.perf_counter() - began, time.process_time() - cpu, float(status("VmHWM") - before)]
            ranks.barrier()
            seen[way].append([*mine_s, (on_the_wire() - wire) / ranks.world])
    for name, new in made["dealt"].masks.items():
        assert torch.equal(new, part_of(made["replicas"].masks[name], ranks.rank, ranks.world)), name
    every = ranks.gather_objects(seen)
    if ranks.rank == 0:
        by_rank = {way: torch.tensor([of[way] for of in every]).median(dim=1).values for way in ways}
        medians = {way: [*m.median(dim=0).values.tolist(), m[:, 2].max().item()] for way, m in by_rank.items()}
        said = {"digest": masking.digest(made["replicas"].masks), "tensors": len(whole), "ways": medians}
        (folder / "found.json").write_text(json.dumps(said))
    ranks.close()


def launched(world: int, runs: int, **environment: str) -> dict[str, Any]:
    """What `rank_work` found on that many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
        worker = [__file__, folder, str(runs)]
        environment |= os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *launcher, *worker], env=environment, check=True)
        said: dict[str, Any] = json.loads((Path(folder) / "found.json").read_text())
        return said


def processes(worlds: Sequence[int], runs: int) -> None:
    print("| ranks | what | wall, s | CPU a rank, s | peak memory, MB: median, most | bytes a rank | by the formula |")
    print("|---|---|---|---|---|---|---|")
    digests = set()
    for world in worlds:
        said = launched(world, runs)
        lean = launched(world, 2, MALLOC_MMAP_THRESHOLD_="131072")  # slow, but what is freed does not stay counted
        digests |= {said["digest"], lean["digest"]}
        given = {way: words(said["tensors"], own=way == "dealt", sampled=True) for way in ("replicas", "dealt")}
        cuts = {way: received(world, number) for way, number in given.items()}
        formula = cuts | {GATHERS: 50 * received(world, 2048), REDUCES: 50 * reduced(world, 2048)}
        for way, (wall, cpu, _, wire, _) in said["ways"].items():
            memory = ", ".join(f"{lean['ways'][way][i] / 1e6:.1f}" for i in (2, 4))
            row = f"| {world} | {way} | {wall:.3f} | {cpu:.3f} | {memory} | {wire:,.0f} |"
            print(f"{row} {formula[way]:,} |" if way in formula else f"{row} |", flush=True)
    print("\nbytes: all traffic of the loopback interface meanwhile, other programs' too, divided by the ranks")
    print(f"masks {', '.join(d[:12] for d in digests)} on all numbers of ranks; load {os.getloadavg()[0]:.1f}")
    assert len(digests) == 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank_work(Path(sys.argv[1]), int(sys.argv[2]))
