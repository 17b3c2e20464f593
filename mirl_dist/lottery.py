"""MIR-L's story: train, evaluate, prune the weakest, rewind the survivors, again.

Beside Algorithm 1 of the paper: line 1 theta_0 is `initial`; lines 3 to 5 are `train_and_score`; line 6 the quantile
and line 7 the mask are `prune`; line 8 the rewind is `rewind`. One-shot baselines (PIR-OSM, PIR-OSR) are one cut
after round 0 and no rewind. Differs from the released code where that drops the first values (see pruning/rewind).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mirl_dist.faults import Fault
from mirl_dist.pruning import masks as masking
from mirl_dist.pruning.prune import Rule, prune
from mirl_dist.pruning.rewind import rewind, rewound_names, unproven
from mirl_dist.ranks import Ranks
from mirl_dist.state import State
from mirl_dist.ticket import Ticket


@dataclass(frozen=True)
class Lottery:
    """How rounds follow one another. rounds: pruned rounds after round 0; rewind: 'all', 'published' or 'nothing'."""

    rule: Rule
    rounds: int
    target_sparsity: float | None
    rewind: str

    def finished(self, ticket: Ticket) -> bool:
        reached = self.target_sparsity is not None and ticket.total_sparsity >= self.target_sparsity
        return ticket.round >= self.rounds or reached


def play(
    lottery: Lottery,
    state: State,
    initial: dict[str, Tensor],
    ranks: Ranks,
    *,
    newest: Ticket | None,
    train_and_score: Callable[[], Ticket],
    record: Callable[[Ticket], None],
    stop_if_asked: Callable[[str], None],
) -> None:
    """Play all rounds that are still to do.

    newest: the ticket of `state.progress.round` when that round is finished already (its weights are in `state`).
    train_and_score: trains the round from its position and makes its ticket; record: keeps a ticket, twice is once;
    stop_if_asked: raises Stopped on all ranks when any was asked, naming what comes next: until the next round trains,
    its parent's ticket is all that a restart needs. Raises Fault naming rank and tensor when a law is broken.
    """
    while True:
        if newest is None:
            prove_first_values(initial, ranks)
            newest = train_and_score()
        record(newest)
        if lottery.finished(newest):
            return
        stop_if_asked("selecting")
        with ranks.in_phase("selecting"):
            ranks.agree("the trained weights", masking.digest_tensors(state.weights))
            pruned = prune(state.weights, state.masks, lottery.rule, ranks.share, ranks.gather)
        stop_if_asked("pruning")
        with ranks.in_phase("pruning"):
            ranks.agree("the new masks", masking.digest(pruned.masks))
        with ranks.in_phase("rewinding"):
            begin_round(lottery, state, initial, ranks, pruned.masks, pruned.threshold, newest)
        stop_if_asked("the next round")
        newest = None


def begin_round(
    lottery: Lottery,
    state: State,
    initial: dict[str, Tensor],
    ranks: Ranks,
    new_masks: masking.Masks,
    threshold: float,
    parent: Ticket,
) -> None:
    """Rewind the survivors under the new masks and prove it on every rank."""
    round_ = parent.round + 1
    names = frozenset[str]() if lottery.rewind == "nothing" else rewound_names(state.weights, lottery.rewind, round_)
    rewind({n: p.data for n, p in state.weights.items()}, initial, new_masks, names)
    prove(
        f"the weights at the start of round {round_} are not mask x initial",
        unproven(state.weights, initial, new_masks, names),
        ranks,
    )
    state.begin_round(round_, new_masks, threshold=threshold, parent=parent.digest())


def prove_first_values(initial: dict[str, Tensor], ranks: Ranks) -> None:
    """Every rank holds the same initial weights, by digest."""
    ranks.agree("the initial weights", masking.digest_tensors(initial))


def prove_dead_weights(state: State, ranks: Ranks) -> None:
    """Dead weights are exactly zero on every rank after training."""
    prove(
        f"pruned weights moved in round {state.progress.round}",
        masking.open_dead(state.weights, state.masks),
        ranks,
    )


def prove(broken: str, tensor: str | None, ranks: Ranks) -> None:
    """Raise Fault on every rank when any rank names a tensor."""
    found = ranks.gather_objects(tensor)
    odd = [f"rank {rank}, tensor '{name}'" for rank, name in enumerate(found) if name is not None]
    if odd:
        raise Fault(
            f"{broken}: {'; '.join(odd)}. The round cannot be trusted and was not recorded; start again with "
            "--resume auto, and report this with the run's config.",
            everywhere=True,
        )
