"""Resumes a run: claims the lease, loads the initial weights, restores the newest complete commit."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import safetensors.torch
from torch import Tensor

from mirl_dist.config import schema
from mirl_dist.config.config import Config
from mirl_dist.data.sampler import Position
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.distributed.signals import StopSignal
from mirl_dist.errors import InvariantError, MirlError, Stopped, UserError
from mirl_dist.observability.progress import say
from mirl_dist.pruning import masks as masking
from mirl_dist.pruning.masks import Masks
from mirl_dist.storage import Folder, Store
from mirl_dist.storage.async_writer import AsyncWriter
from mirl_dist.storage.lease import Lease
from mirl_dist.training.checkpoint import MASK, MOMENTS, START, STATE, TICKET, WEIGHTS, Checkpoints, Commit
from mirl_dist.training.crash_loop import CrashLoopGuard
from mirl_dist.training.initial import InitialState
from mirl_dist.training.preflight import RunPlan
from mirl_dist.training.state import Progress, TrainState, unpack_masks
from mirl_dist.training.ticket import Ticket, parse


@contextmanager
def hold_lease(
    config: Config,
    store: Store,
    ranks: Ranks,
    status: dict[str, Any],
    stop: StopSignal,
    check_again: Callable[[], object],
) -> Iterator[Checkpoints]:
    """Hold the run's lease on rank 0 and yield the checkpoints, which only rank 0 may write.

    status: content of the lease's heartbeats, updated by the caller; check_again: checks the run's folder under the
    lease. Raises, on every rank, UserError if another launch holds the lease, and Stopped if asked to stop meanwhile.
    """
    lease: Lease | None = None
    if ranks.is_main:
        launch = {"world": ranks.world, "tracking": config.tracking.model_dump(mode="json")}
        seconds = config.store.lease_seconds
        lease = Lease(store, seconds=seconds, status=lambda: {**status, "phase": ranks.phase}, launch=launch)
    checkpoints = Checkpoints(store, lease)
    if not ranks.on_main(lambda: _claim(lease, checkpoints, stop, check_again), what="lease"):
        raise Stopped("stopped as asked before any step was trained")
    reason = "failed"
    try:
        yield checkpoints
        reason = "finished"
    except Stopped:
        reason = "stopped"
        raise
    finally:
        if lease is not None:
            lease.release(reason)


def _claim(lease: Lease | None, checkpoints: Checkpoints, stop: StopSignal, check_again: Callable[[], object]) -> bool:
    """Claim the lease and fence older writers; return False if asked to stop meanwhile."""
    assert lease is not None
    try:
        lease.claim(stop)
    except Stopped:
        return False
    try:
        checkpoints.fence_older_writers()
        check_again()  # another launch may have begun the run since it was checked
    except MirlError:
        lease.release("failed")
        raise
    return True


def commit_writer(section: schema.StoreSection, store: Store) -> AsyncWriter:
    """Return the writer of commits. It retries writes to a folder (disk full); an S3 store retries by itself."""
    return AsyncWriter(section.patience_seconds if isinstance(store, Folder) else 0.0)


def crash_loop_guard(run_id: str, section: schema.GuardSection, plan: RunPlan, ranks: Ranks) -> CrashLoopGuard:
    """Return the crash-loop guard, which records on rank 0 only.

    Raises UserError on every rank, naming the samples of the step, if too many consecutive launches crashed in the same
    step.
    """
    guards: list[CrashLoopGuard] = []

    def on_main() -> None:
        guards.append(CrashLoopGuard.open(run_id, section.same_step_failures))
        if guards[0].repeated is not None:
            raise UserError(guards[0].describe(_sample_keys(plan, *guards[0].repeated)))

    ranks.on_main(on_main, what="footprint")
    return guards[0] if guards else CrashLoopGuard.disabled()


def _sample_keys(plan: RunPlan, round_: int, updates: int) -> list[str]:
    """Return the samples of a step as task:key."""
    sampler, shards = plan.sampler, plan.shards
    position = Position(*divmod(updates, sampler.steps_per_epoch))
    return [
        f"{sampler.tasks[slot.task].name}:{shards.index(shards.train[slot.shard]).entries[slot.sample].key}"
        for slot in sampler.slots(round_, position)
    ]


class RunOrigin(NamedTuple):
    """The initial weights and masks of a run, the same on every rank.

    masks: of round 0, None if dense; parent: the digest of the ticket that they come from; initial_digest: of the
    initial weights; id: distinguishes the run from earlier or later runs at the same address.
    """

    initial: dict[str, Tensor]
    masks: Masks | None
    parent: str | None
    initial_digest: str
    id: str


def load_or_create_initial(
    checkpoints: Checkpoints,
    create: Callable[[], InitialState],
    identity_of: Callable[[str, str, str | None], dict[str, Any]],
    ranks: Ranks,
) -> RunOrigin:
    """Load the initial weights and masks, or create and write them for a new run; broadcast and verify their digests.

    identity_of: returns the content of run.json from the digest of the weights, that of the masks ('' if dense), and
    the parent. A damaged or missing file is recreated if `create` still returns the same values. Raises UserError
    otherwise, and InvariantError if a rank received other values than rank 0 sent.
    """
    states: list[InitialState] = []

    def on_main() -> dict[str, Any]:
        identity = checkpoints.identity()
        if identity is None:
            states.append(create())
            identity = _begin_run(checkpoints, states[0], identity_of)
        else:
            states.append(_load_initial(checkpoints, identity, create))
        return {key: identity.get(key) for key in ("initial_digest", "start_digest", "parent", "id")}

    identity = ranks.on_main(on_main, what="first weights")
    initial = ranks.broadcast_tensors(states[0].weights if states else None)
    masks = ranks.broadcast_tensors(states[0].masks or {} if states else None)
    for what, received, expected in (
        ("initial weights", masking.digest_tensors(initial), identity["initial_digest"]),
        ("first masks", masking.digest(masks) if masks else "", identity["start_digest"] or ""),
    ):
        if received != expected:
            raise InvariantError(
                f"{ranks.names[ranks.rank]} received {what} {received[:12]} where run.json says {expected[:12]}. Check "
                "that machine's memory and network, then start again."
            )
    run_id = identity["id"] or checkpoints.store.where()
    return RunOrigin(initial, masks or None, identity["parent"], identity["initial_digest"], run_id)


def _begin_run(
    checkpoints: Checkpoints,
    state: InitialState,
    identity_of: Callable[[str, str, str | None], dict[str, Any]],
) -> dict[str, Any]:
    """Write run.json, then the initial weights and masks."""
    weights, masks, parent = state
    identity = identity_of(masking.digest_tensors(weights), masking.digest(masks) if masks else "", parent)
    checkpoints.begin(identity)
    checkpoints.save_initial(weights)
    if masks is not None:
        checkpoints.save_tensors(START, masking.pack(masks))
    return identity


def _load_initial(
    checkpoints: Checkpoints, identity: dict[str, Any], create: Callable[[], InitialState]
) -> InitialState:
    """Load the initial weights and masks from their files; recreate damaged or missing files.

    Raises UserError if `create` returns other values than run.json records.
    """
    expected, expected_masks = str(identity["initial_digest"]), str(identity.get("start_digest") or "")
    weights, masks = checkpoints.initial(), None
    is_intact = weights is not None and masking.digest_tensors(weights) == expected
    if is_intact and expected_masks:
        assert weights is not None
        masks = _load_first_masks(checkpoints, weights)
        is_intact = masks is not None and masking.digest(masks) == expected_masks
    if is_intact and weights is not None:
        return InitialState(weights, masks, identity.get("parent"))
    state = create()
    masks_digest = masking.digest(state.masks) if state.masks else ""
    if (masking.digest_tensors(state.weights), masks_digest) != (expected, expected_masks):
        raise UserError(
            f"{checkpoints.store.where('initial.safetensors')} is damaged or belongs to another run, and the "
            f"seed gives other weights than run.json tells ({expected[:12]}). Restore a copy of the file."
        )
    say("warning: initial.safetensors was damaged or missing; made anew from the seed, same digest")
    checkpoints.save_initial(state.weights)
    if state.masks is not None:
        checkpoints.save_tensors(START, masking.pack(state.masks))
    return state


def _load_first_masks(checkpoints: Checkpoints, weights: Mapping[str, Tensor]) -> Masks | None:
    """Load the masks of round 0 from their file; None if it is damaged or missing."""
    packed = checkpoints.tensors(START) or {}
    shapes = {name: tuple(weights[name].shape) for name in packed if name in weights}
    with contextlib.suppress(ValueError):
        return masking.unpack(packed, shapes)
    return None


@dataclass
class LatestCommit:
    """The newest intact commit. ticket: JSON text if the round is finished; parts: its files, on rank 0 only."""

    commit: Commit
    progress: dict[str, Any]
    ticket: str | None
    parts: dict[str, bytes] = field(default_factory=dict)


def load_latest(checkpoints: Checkpoints, ranks: Ranks) -> LatestCommit | None:
    """Return the newest intact commit, chosen by rank 0, or None without commits; warn of damaged newer ones."""
    parts: dict[str, bytes] = {}

    def on_main() -> LatestCommit | None:
        latest = checkpoints.latest()
        if latest is None:
            return None
        commit, contents, damaged = latest
        for text in damaged:
            say(f"warning: {text}; falling back to {commit.folder}")
        parts.update(contents)
        ticket = parts[TICKET].decode() if TICKET in parts else None
        return LatestCommit(commit, json.loads(parts[STATE]), ticket)

    chosen = ranks.on_main(on_main, what="newest commit")
    if chosen is not None:
        chosen.parts = parts
    return chosen


def restore(state: TrainState, latest: LatestCommit | None, ranks: Ranks) -> Ticket | None:
    """Load a commit into the state of every rank; return its ticket if its round is finished, else None.

    Raises UserError, on every rank, if the commit does not match the network or its masks have another digest.
    """
    if latest is None:
        return None
    tensors: dict[str, Any] = {}

    def on_main() -> None:
        parts = latest.parts
        tensors["weights"] = safetensors.torch.load(parts[WEIGHTS])
        tensors["moments"] = safetensors.torch.load(parts[MOMENTS]) if MOMENTS in parts else {}
        shapes = {n: state.engine.layout.shapes[n] for n in state.masks}
        state.check_same_network(tensors["weights"])
        tensors["masks"] = unpack_masks(parts[MASK], shapes, latest.commit.folder)
        parts.clear()

    ranks.on_main(on_main, what="state of the commit")
    layout, owned_layout = state.engine.layout, state.engine.owned_layout
    weights = ranks.broadcast_tensors(tensors.pop("weights", None), layout=layout, what="weights")
    masks: Masks = ranks.broadcast_tensors(tensors.pop("masks", None), layout=layout, what="masks")
    progress = Progress.model_validate(latest.progress)
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
    moments = ranks.broadcast_tensors(tensors.pop("moments", None), layout=owned_layout, what="moments")
    state.load_moments(moments)
    if ranks.is_main:
        position = "finished" if latest.commit.step is None else f"after step {latest.commit.step}"
        say(f"resuming: round {progress.round}, {position}")
    return parse(latest.ticket.encode(), latest.commit.folder) if latest.ticket is not None else None
