"""Algorithm 1 of MIR-L: train, evaluate, prune the weakest weights, rewind the surviving ones, repeat.

Lines of the paper's Algorithm 1: theta_0 of line 1 is `initial`; lines 3 to 5 are `train_and_score`; the quantile of
line 6 and the mask of line 7 are `select`; the rewind of line 8 is `begin_round`. The one-shot baselines (PIR-OSM,
PIR-OSR) prune once after round 0 and do not rewind. The released code loses some initial values; this code does not
(see pruning/masks.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mirl_dist.distributed.ranks import Ranks
from mirl_dist.errors import InvariantError
from mirl_dist.pruning import masks as masking
from mirl_dist.pruning.masks import find_unrewound, rewind, rewound_names
from mirl_dist.pruning.prune import PruneResult
from mirl_dist.training.state import TrainState
from mirl_dist.training.ticket import Ticket


@dataclass(frozen=True)
class LotteryConfig:
    """The schedule of rounds.

    rounds: pruned rounds after round 0; target_sparsity: over all parameters, ends the run early when reached.
    rewinds_to: 'initial', 'step', 'rate' or 'finetune', as in the config; what: which tensors are rewound, 'all' or
    'published'. began: the optimiser step at which rounds after round 0 begin; steps_per_epoch: converts it to epochs.
    """

    rounds: int
    target_sparsity: float | None
    rewinds_to: str
    what: str
    began: int
    steps_per_epoch: int

    def finished(self, ticket: Ticket) -> bool:
        """Whether a ticket is the last one: of the last round, or with the target sparsity reached."""
        reached = self.target_sparsity is not None and ticket.total_sparsity >= self.target_sparsity
        return ticket.round >= self.rounds or reached

    def rewound_names(self, state: TrainState, round_: int) -> frozenset[str]:
        """Return the tensors that are rewound at the start of round `round_`; none for 'rate' and 'finetune'."""
        if self.rewinds_to in ("rate", "finetune"):
            return frozenset()
        return rewound_names(state.weights, self.what, round_)


def play(
    lottery: LotteryConfig,
    state: TrainState,
    initial: dict[str, Tensor],
    ranks: Ranks,
    *,
    newest: Ticket | None,
    train_and_score: Callable[[], Ticket],
    record: Callable[[Ticket], None],
    select: Callable[[], PruneResult],
    rewind_point: Callable[[], dict[str, Tensor]],
    stop_if_requested: Callable[[str], None],
) -> None:
    """Run all remaining rounds.

    newest: the ticket of `state.progress.round` if that round is finished (its weights are in `state`), else None.
    train_and_score: trains the round from its position and returns its ticket; record: shows a ticket, idempotent;
    select: returns the masks of the next round; rewind_point: returns the values that surviving weights return to;
    stop_if_requested: raises Stopped on all ranks when any was asked to stop. Until the next round trains, a restart
    needs only the ticket of its parent. Raises InvariantError, naming rank and tensor, if a check on weights fails.
    """
    while True:
        if newest is None:
            check_initial_weights(state, initial, ranks)
            newest = train_and_score()
        record(newest)
        if lottery.finished(newest):
            return
        stop_if_requested("selecting")
        with ranks.in_phase("selecting"):
            check_replicas(state, ranks)
            pruned = select()
        stop_if_requested("pruning")
        with ranks.in_phase("pruning"):
            ranks.check_agreement("the new masks", masking.digest_of_masks(state.gather_full(pruned.masks)))
        with ranks.in_phase("rewinding"):
            begin_round(lottery, state, rewind_point(), ranks, pruned, newest)
        stop_if_requested("the next round")
        newest = None


def begin_round(
    lottery: LotteryConfig,
    state: TrainState,
    point: dict[str, Tensor],
    ranks: Ranks,
    pruned: PruneResult,
    parent: Ticket,
) -> None:
    """Rewind the surviving weights to `point` under the new masks, and verify the result on every rank."""
    round_ = parent.round + 1
    names = lottery.rewound_names(state, round_)
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
        began=lottery.began,
        steps_per_epoch=lottery.steps_per_epoch,
    )


def check_initial_weights(state: TrainState, initial: dict[str, Tensor], ranks: Ranks) -> None:
    """Check by digest that every rank holds the same initial weights."""
    ranks.check_agreement("the initial weights", masking.digest_of(state.gather_full(initial)))


def check_replicas(state: TrainState, ranks: Ranks) -> None:
    """Check that replicas of the trained weights are equal. Sharded weights have a single copy: nothing to compare."""
    if state.engine.layout.is_replicated:
        ranks.check_agreement("the trained weights", masking.digest_tensors(state.weights))


def check_pruned_weights(state: TrainState, ranks: Ranks) -> None:
    """Check that pruned weights are exactly zero on every rank after training."""
    check_on_ranks(
        f"pruned weights moved in round {state.progress.round}",
        masking.find_nonzero_pruned(state.weights, state.masks),
        ranks,
    )


def check_on_ranks(broken: str, tensor: str | None, ranks: Ranks) -> None:
    """Raise InvariantError on every rank if any rank passes the name of a tensor. broken: the invariant, in words."""
    names = ranks.gather_objects(tensor)
    violations = [f"{ranks.names[rank]}, tensor '{name}'" for rank, name in enumerate(names) if name is not None]
    if violations:
        raise InvariantError(
            f"{broken}: {'; '.join(violations)}. The round cannot be trusted and was not recorded; start again with "
            "--resume auto, and report this with the run's config.",
            everywhere=True,
        )
