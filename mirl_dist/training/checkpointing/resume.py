"""Resumes a run: claims the lease, loads the initial weights, restores the newest complete commit."""

from __future__ import annotations

import contextlib
import platform
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from mirl_dist import __version__
from mirl_dist.config.config import Config
from mirl_dist.data.sampler import Position
from mirl_dist.distributed.ranks import Ranks
from mirl_dist.distributed.signals import StopSignal
from mirl_dist.errors import InvariantError, Stopped, UserError
from mirl_dist.observability.progress import say
from mirl_dist.pruning import masks as masking
from mirl_dist.pruning.masks import Masks
from mirl_dist.storage.lease import Lease
from mirl_dist.training.checkpointing.checkpoint import (
    INITIAL,
    MASK,
    MOMENTS,
    START,
    STATE,
    TICKET,
    WEIGHTS,
    Checkpoints,
    Commit,
)
from mirl_dist.training.checkpointing.crash_loop import CrashLoopGuard
from mirl_dist.training.initial import InitialState, OpenTicket, create_initial
from mirl_dist.training.preflight import RunPlan
from mirl_dist.training.progress import Progress
from mirl_dist.training.state import TrainState, check_same_network, unpack_masks
from mirl_dist.training.ticket import Ticket, parse


@contextmanager
def hold_lease(
    plan: RunPlan,
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
        lease = Lease(
            plan.store,
            seconds=plan.config.store.lease_seconds,
            status=lambda: {**status, "phase": ranks.phase},
            launch={"world": ranks.world, "tracking": plan.config.tracking.model_dump(mode="json")},
        )
    checkpoints, reason = Checkpoints(plan.store, lease), "failed"

    def claim() -> None:
        assert lease is not None
        try:
            lease.claim(stop)
        except Stopped:
            raise Stopped("stopped on request before any step was trained") from None
        checkpoints.fence_older_writers()
        check_again()  # another launch may have begun the run since it was checked

    try:
        ranks.on_main(claim, what="lease")
        yield checkpoints
        reason = "finished"
    except Stopped:
        reason = "stopped"
        raise
    finally:
        if lease is not None:
            lease.release(reason)


def crash_loop_guard(run_id: str, plan: RunPlan, ranks: Ranks) -> CrashLoopGuard:
    """Return the crash-loop guard, which records on rank 0 only.

    Raises UserError on every rank, naming the samples of the step, if too many consecutive launches crashed in the same
    step.
    """

    def on_main() -> CrashLoopGuard:
        guard = CrashLoopGuard.open(run_id, plan.config.guard.same_step_failures)
        if guard.repeated is not None:
            raise UserError(guard.describe(_sample_keys(plan, *guard.repeated)))
        return guard

    return ranks.keep_on_main(on_main, what="footprint") or CrashLoopGuard()


def _sample_keys(plan: RunPlan, round_: int, updates: int) -> list[str]:
    """Return the samples of a step as task:key."""
    sampler, shards = plan.sampler, plan.shards
    position = Position(*divmod(updates, sampler.steps_per_epoch))
    return [
        f"{sampler.tasks[slot.task].name}:{shards.index(shards.train[slot.shard]).entries[slot.sample].key}"
        for slot in sampler.slots(round_, position)
    ]


def load_or_create_initial(
    checkpoints: Checkpoints, plan: RunPlan, open_ticket: OpenTicket, ranks: Ranks
) -> tuple[InitialState, str]:
    """Load the initial weights and masks, or create and write them for a new run; broadcast and verify their digests.

    Returns also the run's id, which distinguishes it from earlier or later runs at the same address. A damaged or
    missing file is recreated if that still gives the same values. Raises UserError otherwise, and InvariantError if a
    rank received other values than rank 0 sent.
    """
    states: list[InitialState] = []

    def on_main() -> dict[str, Any]:
        identity = checkpoints.identity()
        if identity is None:
            states.append(create_initial(plan.config, open_ticket))
            identity = _begin_run(checkpoints, states[0], plan)
        else:
            states.append(_load_initial(checkpoints, identity, plan.config, open_ticket))
        return {key: identity.get(key) for key in ("initial_digest", "start_digest", "parent", "id")}

    identity = ranks.on_main(on_main, what="first weights")
    weights = ranks.broadcast_tensors(states[0].weights if states else None)
    masks = ranks.broadcast_tensors(states[0].masks or {} if states else None)
    for what, received, expected in (
        ("initial weights", masking.digest_tensors(weights), identity["initial_digest"]),
        ("first masks", masking.digest(masks) if masks else "", identity["start_digest"] or ""),
    ):
        if received != expected:
            raise InvariantError(
                f"{ranks.names[ranks.rank]} received {what} {received[:12]} where run.json says {expected[:12]}. Check "
                "that machine's memory and network, then start again."
            )
    return InitialState(weights, masks or None, identity["parent"]), identity["id"] or checkpoints.store.where()


def _begin_run(checkpoints: Checkpoints, state: InitialState, plan: RunPlan) -> dict[str, Any]:
    """Write run.json, then the initial weights and masks."""
    start = {"start_digest": masking.digest(state.masks), "parent": state.parent} if state.masks else {}
    identity = {
        "config": plan.config.dump(),
        "fingerprint": plan.config.fingerprint(),
        "manifest_digest": plan.manifest_digest(),
        "initial_digest": masking.digest_tensors(state.weights),
        **start,
        "id": uuid.uuid4().hex,
        "versions": {"mirl_dist": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    checkpoints.begin(identity)
    _save_initial(checkpoints, state)
    return identity


def _save_initial(checkpoints: Checkpoints, state: InitialState) -> None:
    """Write the initial weights and masks, replacing any of an older run; run.json already records their digests."""
    checkpoints.save_tensors(INITIAL, state.weights)
    if state.masks is not None:
        checkpoints.save_tensors(START, masking.pack(state.masks))


def _load_initial(
    checkpoints: Checkpoints, identity: dict[str, Any], config: Config, open_ticket: OpenTicket
) -> InitialState:
    """Load the initial weights and masks from their files; recreate damaged or missing files.

    Raises UserError if they are recreated with other values than run.json records.
    """
    expected, expected_masks = str(identity["initial_digest"]), str(identity.get("start_digest") or "")
    weights = checkpoints.tensors(INITIAL)
    if weights is not None and masking.digest_tensors(weights) == expected:
        masks = _load_first_masks(checkpoints, weights) if expected_masks else None
        if (masking.digest(masks) if masks else "") == expected_masks:
            return InitialState(weights, masks, identity.get("parent"))
    state = create_initial(config, open_ticket)
    masks_digest = masking.digest(state.masks) if state.masks else ""
    if (masking.digest_tensors(state.weights), masks_digest) != (expected, expected_masks):
        raise UserError(
            f"{checkpoints.store.where('initial.safetensors')} is damaged or belongs to another run, and the "
            f"seed gives other weights than run.json tells ({expected[:12]}). Restore a copy of the file."
        )
    say("warning: initial.safetensors was damaged or missing; made anew from the seed, same digest")
    _save_initial(checkpoints, state)
    return state


def _load_first_masks(checkpoints: Checkpoints, weights: Mapping[str, Tensor]) -> Masks | None:
    """Load the masks of round 0 from their file; None if it is damaged or missing."""
    packed = checkpoints.tensors(START) or {}
    shapes = {name: tuple(weights[name].shape) for name in packed if name in weights}
    with contextlib.suppress(ValueError):
        return masking.unpack(packed, shapes)
    return None


class LatestCommit(NamedTuple):
    """The newest intact commit. parts: its files on rank 0; on other ranks only the state and the ticket, if any."""

    commit: Commit
    parts: dict[str, bytes]


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
        return LatestCommit(commit, {name: parts[name] for name in (STATE, TICKET) if name in parts})

    chosen = ranks.on_main(on_main, what="newest commit")
    return None if chosen is None else LatestCommit(chosen.commit, chosen.parts | parts)


def restore(state: TrainState, latest: LatestCommit | None, ranks: Ranks) -> Ticket | None:
    """Load a commit into the state of every rank; return its ticket if its round is finished, else None.

    Raises UserError, on every rank, if the commit does not match the network or its masks have another digest.
    """
    if latest is None:
        return None
    folder, parts, layout = latest.commit.folder, latest.parts, state.engine.layout
    progress = Progress.model_validate_json(parts[STATE])
    ticket = parse(parts[TICKET], folder) if TICKET in parts else None

    def read() -> dict[str, dict[str, Tensor]]:
        weights = safetensors.torch.load(parts[WEIGHTS])
        moments = safetensors.torch.load(parts[MOMENTS]) if MOMENTS in parts else {}
        check_same_network(folder, weights, layout.shapes)
        masks = unpack_masks(parts[MASK], {n: layout.shapes[n] for n in state.masks}, folder)
        parts.clear()  # frees the bytes, which the caller holds as long as it trains
        return {"weights": weights, "masks": masks, "moments": moments}

    tensors = ranks.keep_on_main(read, what="state of the commit") or {}
    weights = ranks.broadcast_tensors(tensors.pop("weights", None), layout=layout, what="weights")
    masks = ranks.broadcast_tensors(tensors.pop("masks", None), layout=layout, what="masks")
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
    moments = tensors.pop("moments", None)
    state.load_moments(ranks.broadcast_tensors(moments, layout=state.engine.owned_layout, what="moments"))
    if ranks.is_main:
        position = "finished" if latest.commit.step is None else f"after step {latest.commit.step}"
        say(f"resuming: round {progress.round}, {position}")
    return ticket
