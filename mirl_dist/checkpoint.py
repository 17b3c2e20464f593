"""Where a run is kept and when a commit is whole. All names inside a run folder live here.

    run.json                                      config, fingerprint, versions; written once
    initial.safetensors                           the first weights; written once
    tracking.json                                 MLflow ids
    lease/00000004.*                              who may write: the fourth launch (lease.py)
    accepted/00000004.json                        the commits that it found (commits.py)
    rounds/03/mask.safetensors                    bit-packed
    rounds/03/steps/00012000-0004/{weights,moments}.safetensors, state.json, outbox.jsonl, COMPLETE.json
    rounds/03/{weights.safetensors, state.json, ticket.json, outbox.jsonl, COMPLETE.json}, pictures.png

A commit is its COMPLETE.json, written last (commits.py). Steps carry the number of the launch that wrote them: one
that has lost the run cannot spoil the parts of its successor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import safetensors.torch
from torch import Tensor

from mirl_dist import ticket as tickets
from mirl_dist.commits import Commits, Facts, Reader, Writer, dump, facts, sealed, unsealed, unsigned
from mirl_dist.faults import Fault
from mirl_dist.pruning import masks as masking
from mirl_dist.state import Progress, Snapshot
from mirl_dist.storage import NotAllowed, NotThere, Store, TryAgain
from mirl_dist.ticket import Ticket

RUN, INITIAL, TRACKING, BEST = "run.json", "initial.safetensors", "tracking.json", "best.json"
WEIGHTS, MOMENTS, STATE, MASK = "weights.safetensors", "moments.safetensors", "state.json", "mask.safetensors"
TICKET, PICTURES, OUTBOX = "ticket.json", "pictures.png", "outbox.jsonl"
_IDENTITY = {"config", "fingerprint", "manifest_digest", "initial_digest"}


class Commit(NamedTuple):
    """A complete commit: its folder, its round, and its step inside the round; step None: the round's ticket."""

    folder: str
    round_: int
    step: int | None


def round_folder(round_: int) -> str:
    return f"rounds/{round_:02d}"


_FOLDER = re.compile(r"rounds/(\d+)(?:/steps/(\d+)(?:-(\d+))?)?")


def pack_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Named tensors to safetensors bytes; the same tensors give the same bytes."""
    plain = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    return safetensors.torch.save(plain)


def _if_any(name: str, data: bytes) -> dict[str, bytes]:
    return {name: data} if data else {}


class Checkpoints:
    """The run in one store. `writer`: who may write; only rank 0 of a launch may, and only after `take_over`."""

    def __init__(self, store: Store, writer: Writer | None = None) -> None:
        self.store = store
        self._commits = Commits(store, writer or Reader())
        self._damaged: set[str] = set()

    # -- the run ------------------------------------------------------------------------------------------------

    def take_over(self) -> None:
        """Begin to write, after the lease was claimed: what dead writers left goes, and they cannot commit any more."""
        self._commits.take_over()
        whole = {c.folder for c in self.commits()}
        for name in self.store.list("rounds"):
            path = name.split("/")
            if len(path) == 5 and path[2] == "steps" and "/".join(path[:4]) not in whole:
                self.store.remove(name)

    def identity(self) -> dict[str, Any] | None:
        """What run.json says, or None where there is no run. Raises Fault for a run.json that cannot be read."""
        try:
            data = self.store.get(RUN)
        except NotThere:
            return None
        found = unsealed(data) or unsigned(data, _IDENTITY | {"versions"})
        if found is None or not found.keys() >= _IDENTITY:
            raise Fault(
                f"{self.store.where(RUN)} does not describe a run, or is damaged. Restore a copy of it, or choose "
                "another run.folder."
            )
        return found

    def begin(self, identity: dict[str, Any]) -> None:
        """Write run.json, which states the digest of the first weights. Raises Fault when another start was faster."""
        if not self.store.put_if_absent(RUN, sealed(identity)):
            raise Fault(f"{self.store.where()} was begun by another launch a moment ago. Choose another run.folder.")

    def save_initial(self, weights: Mapping[str, Tensor]) -> None:
        """Write the first weights, over any that an older run left here; run.json already states their digest."""
        self.store.put(INITIAL, pack_tensors(weights))

    def initial(self) -> dict[str, Tensor] | None:
        """The first weights; None where the file is damaged or missing. Their digest is the caller's to compare."""
        try:
            return safetensors.torch.load(self.store.get(INITIAL))
        except (NotThere, safetensors.SafetensorError):
            return None

    def remembered(self) -> dict[str, str]:
        """MLflow ids by name; none for a file that is damaged: the runs are then found by their tags."""
        try:
            found = json.loads(self.store.get(TRACKING))
        except (NotThere, json.JSONDecodeError, UnicodeDecodeError):
            return {}
        well = isinstance(found, dict) and all(isinstance(id_, str) for id_ in found.values())
        return found if well else {}

    def remember(self, ids: dict[str, str]) -> None:
        """Keep further MLflow ids."""
        self.store.put(TRACKING, dump(self.remembered() | ids))

    # -- commits ------------------------------------------------------------------------------------------------

    def commits(self) -> list[Commit]:
        """All complete commits, the newest first."""
        found = []
        for folder in self._commits.whole("rounds"):
            if match := _FOLDER.fullmatch(folder):
                round_, step, generation = (None if text is None else int(text) for text in match.groups())
                found.append((Commit(folder, round_ or 0, step), generation or 0))
        found.sort(key=lambda c: (c[0].round_, c[0].step is None, c[0].step or 0, c[1]), reverse=True)
        return [commit for commit, _ in found]

    def save_mask(self, round_: int, masks: Mapping[str, Tensor]) -> None:
        self.store.put(f"{round_folder(round_)}/{MASK}", pack_tensors(masking.pack(masks)))

    def masks(self, round_: int, shapes: Mapping[str, tuple[int, ...]]) -> masking.Masks:
        name = f"{round_folder(round_)}/{MASK}"
        data = self.store.get(name)
        try:
            return masking.unpack(safetensors.torch.load(data), shapes)
        except (ValueError, safetensors.SafetensorError) as error:
            raise Fault(f"{self.store.where(name)}: {error}. The prune.scope or the model differs.") from None

    def commit_step(self, snapshot: Snapshot, keep_last: int, outbox: bytes = b"") -> None:
        """Commit the middle of a round, then remove what is no longer needed. outbox: what MLflow has not heard yet."""
        progress = snapshot.progress
        generation = self._commits.writer.generation
        folder = f"{round_folder(progress.round)}/steps/{progress.updates:08d}-{generation:04d}"
        parts = {
            WEIGHTS: pack_tensors(snapshot.weights),
            MOMENTS: pack_tensors(snapshot.moments),
            STATE: dump(progress.model_dump()),
        }
        self._commits.commit(folder, parts | _if_any(OUTBOX, outbox), self._mask_facts(snapshot))
        self._tidy(keep_last)

    def commit_round(
        self, ticket: Ticket, snapshot: Snapshot, pictures: bytes | None, keep_last: int, outbox: bytes = b""
    ) -> None:
        """Commit a round with its ticket, then remove what is no longer needed."""
        folder = round_folder(ticket.round)
        if pictures is not None:
            self.store.put(f"{folder}/{PICTURES}", pictures)
        needs = self._mask_facts(snapshot)
        if facts(self.store.get(f"{folder}/{MASK}")) not in needs.values():
            self.save_mask(ticket.round, snapshot.masks)
        parts = {
            WEIGHTS: pack_tensors(snapshot.weights),
            STATE: dump(snapshot.progress.model_dump()),
            TICKET: ticket.dump(),
        }
        self._commits.commit(folder, parts | _if_any(OUTBOX, outbox), needs)
        self._tidy(keep_last)

    def _mask_facts(self, snapshot: Snapshot) -> dict[str, Facts]:
        """The mask of a commit's round is part of it, though it is written once."""
        return {f"{round_folder(snapshot.progress.round)}/{MASK}": facts(pack_tensors(masking.pack(snapshot.masks)))}

    def _tidy(self, keep_last: int) -> None:
        """Remove step commits, but none of the newest `keep_last` commits that are sound, and no round."""
        sound = [c for c in self.commits() if c.folder not in self._damaged]
        kept = {c.folder for c in sound[:keep_last]}
        for commit in self.commits():
            if commit.step is not None and commit.folder not in kept:
                self._commits.remove(commit.folder)

    def finish(self) -> None:
        """The last round has ended: no step commit is needed any more."""
        for commit in self.commits():
            if commit.step is not None:
                self._commits.remove(commit.folder)

    def drop_weights(self, round_: int) -> None:
        """Keep a round's ticket and mask, drop the weights it trained."""
        self._commits.drop(round_folder(round_), WEIGHTS)

    # -- reading back -------------------------------------------------------------------------------------------

    def newest(self) -> tuple[Commit, dict[str, bytes], list[str]] | None:
        """The newest commit that verifies, its parts, and what was found damaged on the way; None without any.

        Raises Fault when there are commits but none of them verifies.
        """
        damaged: list[str] = []
        commits = self.commits()
        for commit in commits:
            try:
                parts = self._commits.parts(commit.folder)
                if WEIGHTS not in parts:
                    raise Fault(f"{self.store.where(commit.folder)} kept its ticket but not its weights")
                return commit, parts, damaged
            except (NotAllowed, TryAgain):
                raise  # a store that refuses or fails is not a damaged commit
            except Fault as fault:
                damaged.append(str(fault))
                self._damaged.add(commit.folder)
        if commits:
            raise Fault("no commit of this run can be read: " + "; ".join(damaged) + ". Restore a copy of the run.")
        return None

    def progress(self, commit: Commit) -> Progress:
        """Where the run stood at a commit."""
        return Progress.model_validate_json(self.store.get(f"{commit.folder}/{STATE}"))

    def tickets(self) -> list[Ticket]:
        """The tickets of all complete rounds, in order."""
        rounds = sorted(c.round_ for c in self.commits() if c.step is None)
        return [self.ticket(r) for r in rounds]

    def ticket(self, round_: int) -> Ticket:
        name = f"{round_folder(round_)}/{TICKET}"
        return tickets.parse(self.store.get(name), self.store.where(name))

    def pictures(self, round_: int) -> bytes | None:
        """The PNG of degraded, restored and clean that a round drew, if it had images to score."""
        try:
            return self.store.get(f"{round_folder(round_)}/{PICTURES}")
        except NotThere:
            return None

    def round_weights(self, round_: int) -> dict[str, Tensor]:
        """The weights that a round trained, verified. Raises Fault where they are damaged or were not kept."""
        folder = round_folder(round_)
        try:
            parts = self._commits.parts(folder)
        except NotThere:
            raise Fault(
                f"{self.store.where(folder)} holds no finished round. `mirl-dist tickets list` shows them."
            ) from None
        if WEIGHTS not in parts:
            raise Fault(f"{self.store.where(folder)} kept its ticket but not its weights (keep.rounds: best).")
        return safetensors.torch.load(parts[WEIGHTS])

    def has_weights(self, round_: int) -> bool:
        """Whether a finished round's weights were kept."""
        return WEIGHTS in self._commits.said(round_folder(round_))["parts"]

    def mark_best(self, round_: int, score: float, by: tuple[str, ...]) -> None:
        self.store.put(BEST, dump({"round": round_, "score": score, "by": list(by)}))

    def best(self) -> int | None:
        """The round that the run chose by validation, if it did."""
        try:
            return int(json.loads(self.store.get(BEST))["round"])
        except NotThere:
            return None
