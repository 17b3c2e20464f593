"""Runs on every rank: `collectives.py FOLDER` reads weights.safetensors there and writes what it saw to W-r.json."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import safetensors.torch
import torch

from mirl_dist.config.config import Config
from mirl_dist.data.sample import Batch
from mirl_dist.distributed.engines.ddp import DdpEngine
from mirl_dist.distributed.host_copy import HostCopy
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.errors import MirlError, Stopped, UserError
from mirl_dist.pruning import masks as masking
from mirl_dist.pruning.prune import PruneConfig, PruneResult, prune
from mirl_dist.training import guards, lottery
from mirl_dist.training.state import Progress, TrainState
from mirl_dist.training.step_status import StepStatus, sum_status
from mirl_dist.training.ticket import Ticket

RULES = {
    "global": PruneConfig(0.2),
    "layer": PruneConfig(0.2, per="layer"),
    "random": PruneConfig(0.2, criterion="random", seed=7),
    "random layer": PruneConfig(0.3, criterion="random", per="layer", seed=7),
}


def refused(work: Callable[[], object]) -> dict[str, Any] | str | None:
    """The MirlError that some work meets, or what the Stopped says, or None."""
    try:
        work()
    except MirlError as fault:
        return {"text": str(fault), "everywhere": fault.everywhere, "resumable": fault.resumable}
    except Stopped as asked:
        return str(asked)
    return None


def pruned(weights: dict[str, torch.Tensor], ranks: Ranks) -> dict[str, Any]:
    """Two cuts in a row by every rule."""
    found = {}
    for name, rule in RULES.items():
        masks = masking.dense_masks(weights, [n for n in weights if "weight" in n])
        for cut in (1, 2):
            made = prune(weights, masks, rule, ranks.partition, ranks.gather)
            masks = made.masks
            said = [masking.digest(masks), made.threshold.hex(), made.removed, masking.count_surviving(masks)]
            found[f"{name} {cut}"] = said
    return found


def told(ranks: Ranks) -> dict[str, Any]:
    """What travels between ranks."""
    last = ranks.rank == ranks.world - 1

    def main_raises(error: Exception) -> Any:
        def fail() -> None:
            raise error

        return refused(lambda: ranks.on_main(fail, what="commit"))

    sent = {
        "flags": torch.tensor([[True, False], [False, True]]),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "counts": torch.tensor([2**40, -1]),
        "half": torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
    }
    got = ranks.broadcast_tensors(sent if ranks.is_main else None)
    mine = torch.tensor([1e8, 1.0, -1e8, 0.1], dtype=torch.float32).roll(ranks.rank)
    return {
        "agree": refused(lambda: ranks.check_agreement("the colour", "red" if not last else "blue")),
        "agreed": refused(lambda: ranks.check_agreement("the colour", "red")),
        "from main": ranks.on_main(lambda: f"from rank {ranks.rank}"),
        "main stops": main_raises(Stopped("stopped on request")),
        "main fails": main_raises(UserError(f"found something on rank {ranks.rank}, here, do that.")),
        "server away": main_raises(UserError("the server is away.", resumable=True)),
        "any": [ranks.any(last, what="whether one is last"), ranks.any(False, what="whether none is")],
        "sent": {n: [str(t.dtype), list(t.shape), t.tolist()] for n, t in got.items()},
        "gather": ranks.gather(torch.tensor([ranks.rank, 10 * ranks.rank])).tolist(),
        "sum": [x.hex() for x in ranks.sum(mine).tolist()],
        "objects": ranks.gather_objects(f"rank {ranks.rank}"),
    }


def small_state(seed: int) -> TrainState:
    generator = torch.Generator().manual_seed(seed)
    weights = {
        n: torch.nn.Parameter(torch.randn(s, generator=generator))
        for n, s in (("a.weight", (4, 3)), ("b.weight", (5,)))
    }
    engine = DdpEngine(weights, lambda p: torch.optim.AdamW(p.values(), lr=0.1))
    return TrainState(engine, masking.dense_masks(weights, weights))


def a_ticket(state: TrainState) -> Ticket:
    known = {"round": state.progress.round, "mask_digest": state.progress.mask_digest, "parent": None, "scores": {}}
    counts = {"alive": 17, "prunable": 17, "total": 17}
    unknown = dict.fromkeys(("initial_digest", "weights_digest", "fingerprint", "manifest_digest", "protocol"), "")
    return Ticket.model_validate(
        {"threshold": 0, "layer_density": {}, "updates": 0, "samples": 0}
        | known
        | counts
        | unknown
        | {"seconds": 0, "world": 1, "versions": {}}
    )


def nudge(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.view(-1)[0] = torch.nextafter(tensor.view(-1)[0], torch.tensor(9.0))


def guarded(ranks: Ranks) -> dict[str, Any]:
    """Laws that one rank breaks, by the smallest step that a float can take."""
    last = ranks.rank == ranks.world - 1
    config, opened = Config(), []

    def play(state: TrainState, initial: dict[str, torch.Tensor]) -> None:
        runner: Any = SimpleNamespace(
            plan=SimpleNamespace(config=config, sampler=SimpleNamespace(steps_per_epoch=1)),
            state=state,
            ranks=ranks,
            train_and_score=lambda initial_digest: a_ticket(state),
            record=lambda ticket: None,
            stop_if_requested=opened.append,
        )
        pruner: Any = SimpleNamespace(
            initial=initial,
            select=lambda: prune(state.weights, state.masks, PruneConfig(0.2), ranks.partition, ranks.gather),
            rewind_point=lambda: initial,
        )
        lottery.play(runner, pruner, None)

    def first(state: TrainState) -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in state.weights.items()}

    drifted, other_start, unproven, risen = (small_state(3) for _ in range(4))
    starts = [first(s) for s in (drifted, other_start, unproven, risen)]
    masks = {
        n: torch.rand(p.shape, generator=torch.Generator().manual_seed(1)) > 0.3 for n, p in drifted.weights.items()
    }
    masking.apply_masks(risen.weights, masks)
    risen.begin_round(1, masks, threshold=0.0, parent=None)
    if last:
        nudge(drifted.weights["a.weight"])
        nudge(starts[1]["b.weight"])
        with torch.no_grad():
            risen.weights["b.weight"][~masks["b.weight"]] = 1e-30

    def rewind_that_fails() -> None:
        def wrong(weights: Any, *rest: Any) -> None:  # as on a machine that gets it wrong
            rewind(weights, *rest)
            if last:
                nudge(weights["b.weight"])

        rewind, result = lottery.rewind, PruneResult(masks, 0.5, 0, ())
        with mock.patch.object(lottery, "rewind", wrong):
            lottery.begin_round(config, unproven, starts[2], ranks, result, a_ticket(unproven), steps_per_epoch=1)

    found = {
        "drift": refused(lambda: play(drifted, starts[0])),
        "drifted masks": masking.count_surviving(drifted.masks),
        "other start": refused(lambda: play(other_start, starts[1])),
        "rewind": refused(rewind_that_fails),
        "risen": refused(lambda: guards.check_pruned_weights(risen, ranks)),
    }
    return found | {"opened": opened, "loss": refused(lambda: lossy(ranks, last)), "stop": stops(ranks, last)}


def status_of(losses: guards.StepLosses, flags: tuple[bool, bool, bool, bool], ranks: Ranks) -> StepStatus:
    total = sum_status(flags, losses.replaced(), losses.sum(ranks.device), torch.tensor(1.5), ranks)
    return StepStatus.of(HostCopy(total).read(), ranks.world)


def lossy(ranks: Ranks, last: bool) -> None:
    losses = torch.tensor([0.1, float("inf") if last else 0.2])
    none = torch.zeros(2)
    batch = Batch(none, none, none, (f"derain:one-{ranks.rank}", f"derain:two-{ranks.rank}"))
    seen = guards.StepLosses([(losses, batch)])
    progress = Progress(round=1, epoch=2, step=3)
    guards.check_step(status_of(seen, (False,) * 4, ranks), seen, progress, 0, ranks)


def stops(ranks: Ranks, last: bool) -> tuple[bool, int]:
    """Asked of one rank alone, heard by all; so is what every rank's batch replaced."""
    losses = torch.tensor([0.1, 0.2])
    batch = Batch(losses, losses, losses, ("a", "b"), skipped=2 if ranks.rank else 1)
    status = status_of(guards.StepLosses([(losses, batch)]), (False, last, False, False), ranks)
    assert abs(status.loss - ranks.world * 0.3) < 1e-6 and status.norm == 1.5
    assert not (status.is_bad or status.no_batch or status.commit_busy or status.commit_failed)
    return (status.stop, status.replaced)


def averaged(ranks: Ranks) -> dict[str, Any]:
    """Replicas that start apart, and one backward pass of each on its own number."""
    torch.manual_seed(ranks.rank)
    bare = torch.nn.Linear(2, 1, bias=False)
    wrapped = ranks.network.wrap(bare)
    ranks.network.backward(wrapped(torch.full((1, 2), float(ranks.rank))).sum())
    weights = dict(bare.named_parameters())
    gradient = weights["weight"].grad
    assert gradient is not None
    return {"weights": masking.digest_tensors(weights), "gradient": gradient.tolist(), "type": type(wrapped).__name__}


def as_plain_ddp(ranks: Ranks, passes: int) -> list[str]:
    """Digests of the gradients of three steps: of the network as it is wrapped here, then of torch's plain DDP."""
    digests = []
    for is_plain in (False, True):
        torch.manual_seed(0)
        bare = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.GELU(), torch.nn.Conv2d(5, 5, 3, groups=5))
        engine = DdpEngine(dict(bare.named_parameters()), lambda p: torch.optim.AdamW(p.values(), lr=0.1))
        wrapped: Any = bare
        if not is_plain:
            wrapped = ranks.network.wrap(bare)
        elif ranks.world > 1:
            wrapped = torch.nn.parallel.DistributedDataParallel(bare)
        draws = torch.Generator().manual_seed(ranks.rank)
        gradients = {}
        for step in range(3):
            for number in range(passes):
                images, more = torch.randn(2, 3, 9, 9, generator=draws), number + 1 < passes
                if is_plain:
                    with wrapped.no_sync() if more and ranks.world > 1 else nullcontext():
                        wrapped(images).square().mean().backward()
                    continue
                with ranks.network.accumulate(wrapped, more):
                    ranks.network.backward(wrapped(images).square().mean())
            gradients |= {f"{step} {n}": p.grad.clone() for n, p in bare.named_parameters() if p.grad is not None}
            engine.step(0.1, torch.zeros(()))
            assert all(p.grad is None for p in bare.parameters())
        digests.append(masking.digest_tensors(gradients))
    return digests


def main(folder: Path) -> None:
    ranks = Ranks(device="cpu")
    weights = safetensors.torch.load_file(folder / "weights.safetensors")
    found = {"pruned": pruned(weights, ranks), "told": told(ranks), "averaged": averaged(ranks)}
    found["as plain DDP"] = [as_plain_ddp(ranks, passes) for passes in (1, 2)]
    if ranks.world > 1:
        found["guarded"] = guarded(ranks)
    (folder / f"{ranks.world}-{ranks.rank}.json").write_text(json.dumps(found))
    ranks.barrier()
    ranks.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # as the commands do: taking a gloo group apart at Python's end can hang
