"""A run taken up where it stands: the right to write, the first weights, the newest whole commit."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import safetensors.torch
from torch import Tensor

from mirl_dist.config.config import Config
from mirl_dist.data.sampler import GlobalSampler, Position
from mirl_dist.data.shards import Shards
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.distributed.signals import StopSignal
from mirl_dist.errors import InvariantError, Stopped, UserError
from mirl_dist.observability.progress import say
from mirl_dist.pruning import masks as masking
from mirl_dist.pruning.masks import Masks
from mirl_dist.storage import Folder, Store
from mirl_dist.storage.async_writer import AsyncWriter
from mirl_dist.storage.lease import Lease
from mirl_dist.training.checkpoint import (
    MASK,
    MOMENTS,
    START,
    STATE,
    TICKET,
    WEIGHTS,
    Checkpoints,
    Commit,
    unpack_masks,
)
from mirl_dist.training.crash_loop import CrashLoopGuard
from mirl_dist.training.initial import InitialState
from mirl_dist.training.state import Progress, TrainState
from mirl_dist.training.ticket import Ticket, parse


@contextmanager
def hold_lease(
    config: Config,
    store: Store,
    ranks: Ranks,
    news: dict[str, Any],
    stop_asked: StopSignal,
    refuse_another_run: Callable[[], None],
) -> Iterator[Checkpoints]:
    """The run's checkpoints, which rank 0 alone may write, as long as it holds the run's lease.

    news: what the lease's signs of life tell, changed by the caller. Raises UserError, on every rank, where another launch
    is alive; Stopped when asked to stop while finding that out.
    """
    lease: Lease | None = None
    if ranks.is_main:
        launch = {"world": ranks.world, "tracking": config.tracking.model_dump(mode="json")}
        lease = Lease(
            store, seconds=config.store.lease_seconds, status=lambda: {**news, "phase": ranks.phase}, launch=launch
        )
    checkpoints = Checkpoints(store, lease)

    def claim() -> bool:
        assert lease is not None
        try:
            lease.claim(stop_asked)
        except Stopped:
            return False
        try:
            checkpoints.fence_older_writers()
            refuse_another_run()  # for the run may have been begun since that was looked at
        except UserError:
            lease.release("failed")
            raise
        return True

    if not ranks.on_main(claim, what="lease"):
        raise Stopped("stopped as asked before any step was trained")
    why = "failed"
    try:
        yield checkpoints
        why = "finished"
    except Stopped:
        why = "stopped"
        raise
    finally:
        if lease is not None:
            lease.release(why)


def commit_writer(config: Config, store: Store) -> AsyncWriter:
    """Who writes commits. An S3 store is patient itself; a folder that is full is tried again by the keeper."""
    return AsyncWriter(config.store.patience_seconds if isinstance(store, Folder) else 0.0)


def crash_loop_guard(run_id: str, config: Config, order: GlobalSampler, shards: Shards, ranks: Ranks) -> CrashLoopGuard:
    """Where rank 0 leaves word of the step that it is in. Raises UserError, on every rank, when launch after launch died in
    one and the same step."""
    opened: list[CrashLoopGuard] = []

    def on_main() -> None:
        opened.append(CrashLoopGuard.open(run_id, config.guard.same_step_failures))
        if (repeated := opened[0].repeated) is not None:
            round_, updates = repeated
            at = Position(*divmod(updates, order.steps_per_epoch))
            keys = [
                f"{order.tasks[slot.task].name}:{shards.index(shards.train[slot.shard]).entries[slot.sample].key}"
                for slot in order.slots(round_, at)
            ]
            raise UserError(opened[0].describe(keys))

    ranks.on_main(on_main, what="footprint")
    return opened[0] if opened else CrashLoopGuard.disabled()


class RunOrigin(NamedTuple):
    """What a run began with, the same on every rank. masks: of round 0, None where all are alive; parent: the digest of
    the ticket that they are of; id: tells the run from any other that lies, or lay, at the same address."""

    initial: dict[str, Tensor]
    masks: Masks | None
    parent: str | None
    id: str


def load_or_create_initial(
    checkpoints: Checkpoints,
    make: Callable[[], InitialState],
    identity: Callable[[str, str, str | None], dict[str, Any]],
    ranks: Ranks,
) -> RunOrigin:
    """The one set of first values and masks: made and written by rank 0 once, sent to every rank, verified by digest.

    identity: what run.json says, given the digest of the values, that of the masks ('' for all alive), and the parent.
    A file that is damaged or missing is made anew where `make` still gives the very same; else UserError.
    """
    kept: list[InitialState] = []

    def on_main() -> dict[str, Any]:
        found = checkpoints.identity()
        if found is None:
            kept.append(make())
            weights, masks, parent = kept[0]
            found = identity(masking.digest_tensors(weights), masking.digest(masks) if masks else "", parent)
            checkpoints.begin(found)
            checkpoints.save_initial(weights)
            if masks is not None:
                checkpoints.save_tensors(START, masking.pack(masks))
        else:
            kept.append(_load_initial(checkpoints, found, make))
        return {key: found.get(key) for key in ("initial_digest", "start_digest", "parent", "id")}

    told = ranks.on_main(on_main, what="first weights")
    initial = ranks.broadcast_tensors(kept[0].weights if kept else None)
    masks = ranks.broadcast_tensors(kept[0].masks or {} if kept else None)
    for what, mine, said in (
        ("initial weights", masking.digest_tensors(initial), told["initial_digest"]),
        ("first masks", masking.digest(masks) if masks else "", told["start_digest"] or ""),
    ):
        if mine != said:
            raise InvariantError(
                f"{ranks.names[ranks.rank]} received {what} {mine[:12]} where run.json says {said[:12]}. Check that "
                "machine's memory and network, then start again."
            )
    return RunOrigin(initial, masks or None, told["parent"], told["id"] or checkpoints.store.where())


def _load_initial(checkpoints: Checkpoints, identity: dict[str, Any], make: Callable[[], InitialState]) -> InitialState:
    """What the run's files hold; made anew where they are damaged or missing."""
    weights, starts = checkpoints.initial(), identity.get("start_digest") or ""
    expected, masks = str(identity["initial_digest"]), None
    whole = weights is not None and masking.digest_tensors(weights) == expected
    if whole and starts:
        assert weights is not None
        packed = checkpoints.tensors(START) or {}
        shapes = {name: tuple(weights[name].shape) for name in packed if name in weights}
        with contextlib.suppress(ValueError):
            masks = masking.unpack(packed, shapes)
        whole = masks is not None and masking.digest(masks) == starts
    if whole and weights is not None:
        return InitialState(weights, masks, identity.get("parent"))
    made = make()
    same = (
        masking.digest_tensors(made.weights) == expected
        and (masking.digest(made.masks) if made.masks else "") == starts
    )
    if not same:
        raise UserError(
            f"{checkpoints.store.where('initial.safetensors')} is damaged or belongs to another run, and the "
            f"seed gives other weights than run.json tells ({expected[:12]}). Restore a copy of the file."
        )
    say("warning: initial.safetensors was damaged or missing; made anew from the seed, same digest")
    checkpoints.save_initial(made.weights)
    if made.masks is not None:
        checkpoints.save_tensors(START, masking.pack(made.masks))
    return made


@dataclass
class LatestCommit:
    """The newest whole commit. parts: its files, on rank 0 alone."""

    commit: Commit
    progress: dict[str, Any]
    ticket: str | None
    parts: dict[str, bytes] = field(default_factory=dict)


def load_latest(checkpoints: Checkpoints, ranks: Ranks) -> LatestCommit | None:
    """The commit to go on from; None for a run without one. Rank 0 chooses, and says what was damaged on the way."""
    parts: dict[str, bytes] = {}

    def on_main() -> LatestCommit | None:
        found = checkpoints.latest()
        if found is None:
            return None
        commit, read, damaged = found
        for text in damaged:
            say(f"warning: {text}; falling back to {commit.folder}")
        parts.update(read)
        ticket = parts[TICKET].decode() if TICKET in parts else None
        return LatestCommit(commit, json.loads(parts[STATE]), ticket)

    chosen = ranks.on_main(on_main, what="newest commit")
    if chosen is not None:
        chosen.parts = parts
    return chosen


def restore(state: TrainState, chosen: LatestCommit | None, ranks: Ranks) -> Ticket | None:
    """Put a commit into the state; its ticket when a round had ended."""
    if chosen is None:
        return None
    kept: dict[str, Any] = {}

    def on_main() -> None:
        parts = chosen.parts
        kept["weights"] = safetensors.torch.load(parts[WEIGHTS])
        kept["moments"] = safetensors.torch.load(parts[MOMENTS]) if MOMENTS in parts else {}
        shapes = {n: state.engine.layout.shapes[n] for n in state.masks}
        state.check_same_network(kept["weights"])
        kept["masks"] = unpack_masks(parts[MASK], shapes, chosen.commit.folder)
        parts.clear()

    ranks.on_main(on_main, what="state of the commit")
    engine = state.engine
    weights = ranks.broadcast_tensors(kept.pop("weights", None), layout=engine.layout, what="weights")
    masks: Masks = ranks.broadcast_tensors(kept.pop("masks", None), layout=engine.layout, what="masks")
    progress = Progress.model_validate(chosen.progress)
    digest = masking.digest_of_masks(state.gather_full(masks))
    if digest != progress.mask_digest:
        raise UserError(
            f"the mask of round {progress.round} has digest {digest[:12]}, its commit says "
            f"{progress.mask_digest[:12]}. Restore mask.safetensors from a copy of the run.",
            everywhere=True,
        )
    state.load_weights(weights)
    state.begin_round(progress.round, masks, threshold=progress.threshold, parent=progress.parent)
    state.progress = progress
    state.load_moments(ranks.broadcast_tensors(kept.pop("moments", None), layout=engine.owned_layout, what="moments"))
    if ranks.is_main:
        place = "finished" if chosen.commit.step is None else f"after step {chosen.commit.step}"
        say(f"resuming: round {progress.round}, {place}")
    return parse(chosen.ticket.encode(), chosen.commit.folder) if chosen.ticket is not None else None
