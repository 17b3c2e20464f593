"""Algorithm 1 of MIR-L: train, evaluate, prune the weakest weights, rewind the surviving ones, repeat.

Lines of the paper's Algorithm 1: theta_0 of line 1 is `pruner.initial`; lines 3 to 5 are `train_and_score`; the
quantile of line 6 and the mask of line 7 are `select`; the rewind of line 8 is `begin_round`. The one-shot baselines
(PIR-OSM, PIR-OSR) prune once after round 0 and do not rewind. The released code loses some initial values; this code
does not (see pruning/masks.py).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from mirl_dist.config.config import Config
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.pruning import masks as masking
from mirl_dist.pruning.masks import find_unrewound, rewind, rewound_names
from mirl_dist.pruning.prune import PruneResult
from mirl_dist.training.guards import check_on_ranks
from mirl_dist.training.round import RoundRunner
from mirl_dist.training.selection import Pruner
from mirl_dist.training.state import TrainState
from mirl_dist.training.ticket import Ticket


def play(runner: RoundRunner, pruner: Pruner, newest: Ticket | None) -> None:
    """Run all remaining rounds.

    newest: the ticket of `state.progress.round` if that round is finished (its weights are in the state), else None.
    Until the next round trains, a restart needs only the ticket of its parent. Raises InvariantError, naming rank and
    tensor, if a check on weights fails; Stopped, on all ranks, if any was asked to stop.
    """
    config, state, ranks = runner.plan.config, runner.state, runner.ranks
    while True:
        if newest is None:
            initial_digest = masking.digest_of(state.gather_full(pruner.initial))
            ranks.check_agreement("the initial weights", initial_digest)
            newest = runner.train_and_score(initial_digest)
        runner.record(newest)
        if config.prune.ends_after(newest.round, newest.total_sparsity):
            return
        runner.stop_if_requested("selecting")
        with ranks.in_phase("selecting"):
            check_replicas(state, ranks)
            pruned = pruner.select()
        runner.stop_if_requested("pruning")
        with ranks.in_phase("pruning"):
            ranks.check_agreement("the new masks", masking.digest_of_masks(state.gather_full(pruned.masks)))
        with ranks.in_phase("rewinding"):
            point = pruner.rewind_point()
            begin_round(config, state, point, ranks, pruned, newest, runner.plan.sampler.steps_per_epoch)
        runner.stop_if_requested("the next round")
        newest = None


def check_replicas(state: TrainState, ranks: Ranks) -> None:
    """Check that replicas of the trained weights are equal. Sharded weights have a single copy: nothing to compare."""
    if state.engine.layout.is_replicated:
        ranks.check_agreement("the trained weights", masking.digest_tensors(state.weights))


def begin_round(
    config: Config,
    state: TrainState,
    point: dict[str, Tensor],
    ranks: Ranks,
    pruned: PruneResult,
    parent: Ticket,
    steps_per_epoch: int,
) -> None:
    """Rewind the surviving weights to `point` under the new masks, and verify the result on every rank."""
    round_ = parent.round + 1
    names = names_to_rewind(config, state.weights, round_)
    rewind(state.weights, point, pruned.masks, names)
    state.engine.weights_changed()
    check_on_ranks(
        f"the weights at the start of round {round_} are not mask x what they were rewound to",
        find_unrewound(state.weights, point, pruned.masks, names),
        ranks,
    )
    state.begin_round(
        round_,
        pruned.masks,
        threshold=pruned.threshold,
        parent=parent.digest(),
        began=config.rewind.step or 0,
        steps_per_epoch=steps_per_epoch,
    )


def names_to_rewind(config: Config, names: Iterable[str], round_: int) -> frozenset[str]:
    """Return the tensors that are rewound at the start of round `round_`; none with rewind.to 'rate' or 'finetune'."""
    if config.rewinds_to() in ("rate", "finetune"):
        return frozenset()
    return rewound_names(names, config.rewind.what, round_)
