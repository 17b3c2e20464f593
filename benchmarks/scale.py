"""What scale costs: the exact cut on simulated ranks and on real ones, and a round on 1 to 512 GPUs.

    python benchmarks/scale.py simulate [--weights 35592263] [--ranks 1 2 3 8 64 512 1000 4096]
    python benchmarks/scale.py ties
    python benchmarks/scale.py processes [--ranks 1 2 4 8] [--runs 3]
    python benchmarks/scale.py round [--set samples_per_second=144 network_bandwidth=1.1e9] [--plot FILE.png]

simulate: weights come from a counter-based generator, so that 10**10 of them need little memory; the package's `Search`
counts each rank's part, the counts are summed as after a gather, and the result is held against a sort. ties: the masks
of parts on threads. processes: real ranks over gloo (torchrun); to see their own bytes only, begin with
`unshare -n sh -c "ip link set lo up; ..."`. round: a model. docs/scale.md says what came out.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))

from scale_ranks import part_of, processes
from scale_round import Constants, plot, received, reduced, table, words

from mirl_dist.pruning import masks as masking
from mirl_dist.pruning.magnitudes import BitSearch, CountedPart, count, magnitude_bits
from mirl_dist.pruning.partition import Partition
from mirl_dist.pruning.prune import PruneConfig, PruneResult, count_to_remove, prune
from mirl_dist.pruning.quantile import Gather, Threshold

T = TypeVar("T")
PIECE = 1 << 20
PROMPTIR = 35_592_263


def drawn(piece: int, seed: int = 0) -> Tensor:
    """PIECE weights, float32, uniform in +-0.05 as a convolution's first values are; the piece-th of a long row."""
    raw = np.random.Philox(key=seed, counter=piece << 64).random_raw(PIECE // 2)
    return torch.from_numpy(raw.view(np.int32)).float().mul_(0.05 / 2**31)


def parts(weights: int, ranks: int, seed: int = 0) -> Iterator[tuple[int, Tensor]]:
    """The row of weights in order, with the rank that each stretch belongs to. Ranks hold equal contiguous parts."""
    rank, at = 0, 0
    for piece in range(-(-weights // PIECE)):
        values, begin = drawn(piece, seed), piece * PIECE
        while at < min(begin + PIECE, weights):
            end = min(weights * (rank + 1) // ranks, begin + PIECE, weights)
            if end > at:
                yield rank, values[at - begin : end - begin]
            at = end
            if at == weights * (rank + 1) // ranks:
                rank += 1


class Found(NamedTuple):
    """equal: weights equal to the cut, by rank; allotted: how many of them go, by rank; seconds: of the first pass's
    counting, by rank; adding: of summing the counts that a rank gathered; sorted_bits: of the cut, found by a sort."""

    cut: Threshold
    equal: Tensor
    allotted: Tensor
    seconds: Tensor
    adding: float
    sorted_bits: int


def search(weights: int, ranks: int, k: int, seed: int = 0) -> Found:
    """The k-th smallest magnitude of simulated ranks.

    Later passes look only at what begins as the first pass found, so that is kept while it is drawn, on a guess from
    the first piece; a wrong guess costs a second drawing.
    """
    sample = drawn(0, seed)[:weights]
    first = BitSearch(max(1, k * len(sample) // weights))
    guess = first.narrowed(count([CountedPart(sample)], first).counts).prefix
    step, seconds, adding, place = BitSearch(k), torch.zeros(ranks, dtype=torch.float64), 0.0, 0
    kept, counts = list[tuple[int, Tensor]](), torch.empty(0)
    while step.width:
        counts = torch.zeros(ranks, 1 << step.width, dtype=torch.int64)
        for rank, part in kept if step.known else parts(weights, ranks, seed):
            began = time.perf_counter()
            counts[rank] += count([CountedPart(part)], step).counts
            if not step.known:
                seconds[rank] += time.perf_counter() - began
                kept.append((rank, beginning(part, guess)))
        began = time.perf_counter()
        summed = counts.sum(dim=0)
        adding += time.perf_counter() - began
        step = step.narrowed(summed)
        if step.known == 11:
            place = step.remaining - 1
            if step.prefix != guess:
                kept = [(rank, beginning(part, step.prefix)) for rank, part in parts(weights, ranks, seed)]
    equal = counts[:, step.prefix & 1023]
    allotted = (step.remaining - (equal.cumsum(0) - equal)).clamp(min=0).minimum(equal)  # as prune._cut_group
    within = magnitude_bits(torch.cat([part for _, part in kept])).numpy()
    by_sort = int(np.partition(within, place)[place])
    return Found(
        Threshold(step.prefix, step.below, step.remaining, step.within), equal, allotted, seconds, adding, by_sort
    )


def beginning(part: Tensor, prefix: int) -> Tensor:
    """Those whose magnitude has these first 11 bits."""
    return part[(magnitude_bits(part) >> 20) == prefix]


class Meeting:
    """Where threads that stand for ranks gather; counts what each of them receives."""

    def __init__(self, ranks: int) -> None:
        self.brought, self.received = [torch.empty(0)] * ranks, 0
        self._barrier = threading.Barrier(ranks, self._stack, timeout=120)

    def _stack(self) -> None:
        self.everyone = torch.stack(self.brought)
        self.received += self.everyone.nbytes - self.brought[0].nbytes

    def gather(self, rank: int) -> Gather:
        def gathered(values: Tensor) -> Tensor:
            self.brought[rank] = values
            self._barrier.wait()
            return self.everyone

        return gathered

    def on_all(self, work: Callable[[int, Gather], T]) -> list[T]:
        """What the work returned on each rank."""
        with ThreadPoolExecutor(len(self.brought)) as pool:
            return list(pool.map(lambda rank: work(rank, self.gather(rank)), range(len(self.brought))))


def pruned_apart(weights: Mapping[str, Tensor], ranks: int, rule: PruneConfig) -> tuple[list[PruneResult], str, int]:
    """A cut of weights that are dealt out over threads, the digest of the joined masks, and what each rank received."""
    meeting = Meeting(ranks)

    def one(rank: int, gather: Gather) -> PruneResult:
        mine = {n: part_of(w, rank, ranks) for n, w in weights.items()}
        return prune(mine, masking.dense_masks(mine, mine), rule, Partition(rank, is_replicated=False), gather)

    found = meeting.on_all(one)
    joined = {n: torch.cat([f.masks[n] for f in found]).reshape(w.shape) for n, w in weights.items()}
    return found, masking.digest(joined), meeting.received


def simulate(weights: int, worlds: Sequence[int]) -> None:
    k = count_to_remove(weights, 0.2)
    print(f"{weights:,} weights, the {k:,} smallest go; one thread, seconds of the wall\n")
    print("| ranks | cut | equal to it, go | first count: median, longest | adding up | all-gather, all-reduce: MB |")
    print("|---|---|---|---|---|---|")
    for ranks in worlds:
        found = search(weights, ranks, k)
        assert found.cut.bits == found.sorted_bits and found.cut.below + found.cut.ties == k
        assert int(found.allotted.sum()) == found.cut.ties
        if weights <= 10**8:
            every = np.concatenate([magnitude_bits(part).numpy() for _, part in parts(weights, 1)])
            assert np.partition(every, k - 1)[k - 1] == found.cut.bits, "the search and a sort of all disagree"
        times = f"{float(found.seconds.median()):.4f}, {float(found.seconds.max()):.4f} | {found.adding:.4f}"
        given = words(1, own=False)
        wire = f"{received(ranks, given) / 1e6:.2f}, {reduced(ranks, given) / 1e6:.3f}"
        equal = f"{int(found.equal.sum())}, {found.cut.ties}"
        print(f"| {ranks:,} | {found.cut.bits:#x} | {equal} | {times} | {wire} |", flush=True)


def ties() -> None:
    """Cuts by the package's `prune` through many ties, of parts on threads that meet."""
    tied = {f"{i}.weight": drawn(i).mul(2000).round() for i in range(4)}
    for rule in (PruneConfig(0.2), PruneConfig(0.2, per="layer")):
        said = {ranks: pruned_apart(tied, ranks, rule)[1] for ranks in (1, 3, 64, 256)}
        assert len(set(said.values())) == 1, said
        print(
            f"4 million weights of 101 magnitudes, per {rule.per}, on {list(said)} ranks: masks {said[1][:12]} on all"
        )


def positive(word: str) -> int:
    if not word.isdecimal() or int(word) == 0:
        raise argparse.ArgumentTypeError(f"found {word}; give a whole number from 1 on")
    return int(word)


def constant(pair: str) -> tuple[str, float]:
    name, _, value = pair.partition("=")
    if name not in Constants._fields:
        raise argparse.ArgumentTypeError(f"found {name}; there are {', '.join(Constants._fields)}")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {pair}; give {name}=NUMBER") from None


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = ask.add_subparsers(dest="what", required=True)
    what.add_parser("ties")
    simulated = what.add_parser("simulate")
    simulated.add_argument("--weights", type=positive, default=PROMPTIR)
    simulated.add_argument("--ranks", type=positive, nargs="+", default=[1, 2, 3, 8, 64, 512, 1000, 4096])
    real = what.add_parser("processes")
    real.add_argument("--ranks", type=positive, nargs="+", default=[1, 2, 4, 8])
    real.add_argument("--runs", type=positive, default=3)
    model = what.add_parser("round")
    model.add_argument("--set", nargs="+", type=constant, default=[], metavar="NAME=NUMBER")
    model.add_argument("--batch", type=int, nargs="+", default=[0, 512], help="0: the smallest that the ranks divide")
    model.add_argument("--plot", type=Path)
    asked = ask.parse_args()
    torch.set_num_threads(1)
    if asked.what == "simulate":
        simulate(asked.weights, asked.ranks)
    elif asked.what == "ties":
        ties()
    elif asked.what == "processes":
        processes(asked.ranks, asked.runs)
    else:
        constants = Constants()._replace(**dict(asked.set))
        batches = [batch or None for batch in asked.batch]
        print(constants, *("\n" + "\n".join(table(constants, batch)) for batch in batches), sep="\n")
        if asked.plot:
            plot(constants, batches, asked.plot)


if __name__ == "__main__":
    main()
