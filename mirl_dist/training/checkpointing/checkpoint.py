"""Reads and writes the checkpoints of a run. All names inside a run folder are defined here.

    run.json                                      config, fingerprint, versions; written once
    initial.safetensors                           the initial weights; written once
    start.safetensors                             the masks of round 0 of a run that starts from a ticket; written once
    rewind-0123456789abcdef.safetensors           the weights of the rewind step, if there is one
    tracking.json                                 MLflow ids
    lease/00000004.*                              the lease of the fourth launch, which may write (lease.py)
    accepted/00000004.json                        the commits that this launch found (commits.py)
    rounds/03/steps/00012000-0004/                {weights, moments, mask}.safetensors, state.json, COMPLETE.json
    rounds/03/ticket-0004/                        {weights, mask}.safetensors, state.json, ticket.json, pictures.png,
                                                  COMPLETE.json
    best.json                                     the round chosen by validation
    controls/08-reinit/                           a separate run, a control of round 8 (cli/judge.py)

A commit is complete once COMPLETE.json, its last file, is written (commits.py). Its folder ends in the number of the
launch, so that a launch without the lease cannot overwrite newer commits. outbox.jsonl holds pending MLflow records.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from mirl_dist.config.canonical_json import to_json
from mirl_dist.errors import UserError
from mirl_dist.storage import NotFound, Rejected, Store, Unavailable
from mirl_dist.storage.commits import Commits, Reader, Writer, add_digest, check_digest
from mirl_dist.training.progress import Progress
from mirl_dist.training.ticket import Ticket, parse

if TYPE_CHECKING:  # torch takes seconds to import, and only tensors need it
    from torch import Tensor

    from mirl_dist.training.state import Snapshot

RUN, INITIAL, START, STATE, SCORES = "run.json", "initial.safetensors", "start.safetensors", "state.json", "scores.csv"
WEIGHTS, MOMENTS, MASK, BEST = "weights.safetensors", "moments.safetensors", "mask.safetensors", "best.json"
TICKET, PICTURES, OUTBOX, TRACKING = "ticket.json", "pictures.png", "outbox.jsonl", "tracking.json"
_IDENTITY = {"config", "fingerprint", "manifest_digest", "initial_digest"}


def rewind_name(digest: str) -> str:
    """Return the file name of a rewind point. It contains the digest, so that a late write by a launch that lost the
    lease cannot overwrite the weights that commits refer to."""
    return f"rewind-{digest[:16]}.safetensors"


class Commit(NamedTuple):
    """A complete commit: its folder, its round, the optimiser step within it, None for the round's ticket, and the
    lease generation that wrote it."""

    folder: str
    round_: int
    step: int | None
    generation: int

    @classmethod
    def of(cls, folder: str) -> Commit | None:
        """Return the commit that a folder name denotes; None for any other name."""
        match = re.fullmatch(r"rounds/(\d+)/(?:steps/(\d+)|ticket)-(\d+)", folder)
        if match is None:
            return None
        round_, step, generation = match.groups()
        return cls(folder, int(round_), None if step is None else int(step), int(generation))


class Checkpoints:
    """The run in one store. writer: rank 0's lease, to write after `fence_older_writers`; None: read only."""

    def __init__(self, store: Store, writer: Writer | None = None) -> None:
        self.store = store
        self._commits = Commits(store, writer or Reader())
        self._damaged: set[str] = set()

    # -- the run ------------------------------------------------------------------------------------------------

    def fence_older_writers(self) -> None:
        """Prevent older launches from committing, and remove their incomplete commits. Requires the claimed lease."""
        self._commits.fence_older_writers()
        whole, generation = {c.folder for c in self.commits()}, self._commits.writer.generation
        for name in self.store.list("rounds"):
            commit = Commit.of(name.rpartition("/")[0])
            if commit is not None and 0 < commit.generation < generation and commit.folder not in whole:
                self.store.remove(name)

    def _read(self, name: str) -> bytes | None:
        try:
            return self.store.get(name)
        except NotFound:
            return None

    def identity(self) -> dict[str, Any] | None:
        """Return the content of run.json, or None without a run. Raises UserError for an unreadable run.json."""
        if (data := self._read(RUN)) is None:
            return None
        identity = check_digest(data)
        if identity is None or not identity.keys() >= _IDENTITY:
            raise UserError(
                f"{self.store.where(RUN)} does not describe a run, or is damaged. Restore a copy of it, or choose "
                "another run.folder."
            )
        return identity

    def begin(self, identity: dict[str, Any]) -> None:
        """Write run.json. Raises UserError if another launch created it first."""
        if not self.store.put_if_absent(RUN, add_digest(identity)):
            raise UserError(
                f"{self.store.where()} was started by another launch a moment ago. Choose another run.folder."
            )

    def save_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write INITIAL, START or a rewind point. The caller must keep the digest."""
        from mirl_dist.training.state import pack_tensors

        self._commits.writer.check()
        self.store.put(name, pack_tensors(tensors))

    def tensors(self, name: str) -> dict[str, Tensor] | None:
        """Read what `save_tensors` wrote; None if damaged or missing. The caller must compare the digest."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            return load(self.store.get(name))
        except (NotFound, SafetensorError):
            return None

    def mlflow_ids(self) -> dict[str, str]:
        """Return MLflow ids by name; empty if the file is damaged or missing: runs are then found by tags."""
        try:
            ids = json.loads(self.store.get(TRACKING))
        except (NotFound, json.JSONDecodeError, UnicodeDecodeError):
            return {}
        return ids if isinstance(ids, dict) and all(isinstance(id_, str) for id_ in ids.values()) else {}

    def save_mlflow_ids(self, ids: dict[str, str]) -> None:
        """Add MLflow ids to the file."""
        self.store.put(TRACKING, to_json(self.mlflow_ids() | ids))

    # -- commits ------------------------------------------------------------------------------------------------

    def commits(self) -> list[Commit]:
        """Return all complete commits, newest first."""
        commits = [commit for folder in self._commits.complete("rounds") if (commit := Commit.of(folder))]
        return sorted(commits, key=lambda c: (c.round_, c.step is None, c.step or 0, c.generation), reverse=True)

    def commit_step(self, snapshot: Snapshot, keep_last: int, outbox: bytes = b"") -> None:
        """Commit a step of a round, then remove commits no longer needed. outbox: pending MLflow records."""
        from mirl_dist.training.state import pack_tensors

        parts = {MOMENTS: pack_tensors(snapshot.moments)}
        self._commit(f"steps/{snapshot.progress.updates:08d}", snapshot, parts, keep_last, outbox)

    def commit_round(
        self,
        ticket: Ticket,
        snapshot: Snapshot,
        scores: bytes,
        pictures: bytes | None,
        keep_last: int,
        outbox: bytes = b"",
    ) -> None:
        """Commit a round with its ticket, then remove commits no longer needed. scores: CSV, one row per image."""
        parts = {TICKET: ticket.dump(), SCORES: scores} | ({} if pictures is None else {PICTURES: pictures})
        self._commit("ticket", snapshot, parts, keep_last, outbox)

    def _commit(self, what: str, snapshot: Snapshot, more: dict[str, bytes], keep_last: int, outbox: bytes) -> None:
        """Write a commit, then remove step commits no longer needed."""
        from mirl_dist.pruning.masks import pack
        from mirl_dist.training.state import pack_tensors

        parts = {
            WEIGHTS: pack_tensors(snapshot.weights),
            MASK: pack_tensors(pack(snapshot.masks)),
            STATE: to_json(snapshot.progress.model_dump()),
        }
        folder = f"rounds/{snapshot.progress.round:02d}/{what}-{self._commits.writer.generation:04d}"
        self._commits.commit(folder, parts | more | ({OUTBOX: outbox} if outbox else {}))
        self._remove_steps(self.commits(), keep_last)

    def _remove_steps(self, commits: list[Commit], keep_last: int) -> None:
        """Remove all step commits but those among the newest `keep_last` undamaged commits."""
        kept = [c for c in commits if c.folder not in self._damaged][:keep_last]
        for commit in commits:
            if commit.step is not None and commit not in kept:
                self._commits.remove(commit.folder)

    def lost(self) -> bool:
        """Whether another launch is known to have taken over the run; does not query the store."""
        return self._commits.writer.lost()

    def check(self) -> None:
        """Raise UserError if another launch has taken over the run."""
        self._commits.writer.check()

    def finish(self) -> None:
        """Remove all step commits, after the last round."""
        commits = self.commits()
        self._commits.writer.check()
        self._remove_steps(commits, keep_last=0)

    def drop_weights(self, round_: int) -> None:
        """Remove the trained weights of a round, keeping its ticket and mask. Idempotent."""
        self._commits.drop(self._ended(round_), WEIGHTS)

    def _ended(self, round_: int) -> str:
        """Return the folder of a round's ticket. Raises UserError if the round is not finished."""
        for commit in self.commits():
            if (commit.round_, commit.step) == (round_, None):
                return commit.folder
        raise UserError(
            f"{self.store.where(f'rounds/{round_:02d}')} holds no finished round. `mirl-dist tickets list` shows them."
        )

    # -- reading back -------------------------------------------------------------------------------------------

    def latest(self) -> tuple[Commit, dict[str, bytes], list[str]] | None:
        """Return the newest intact commit, its parts, and a message per damaged newer commit; None without commits.

        Raises UserError if there are commits but none is intact.
        """
        damaged: list[str] = []
        commits = self.commits()
        for commit in commits:
            try:
                parts = self._commits.parts(commit.folder)
                if not {WEIGHTS, MASK, STATE} <= parts.keys():
                    raise UserError(f"{self.store.where(commit.folder)} does not hold all of a run's state (any more)")
                return commit, parts, damaged
            except (Rejected, Unavailable):
                raise  # a store that refuses or fails is not a damaged commit
            except UserError as fault:
                damaged.append(str(fault))
                self._damaged.add(commit.folder)
        if commits:
            raise UserError("no commit of this run can be read: " + "; ".join(damaged) + ". Restore a copy of the run.")
        return None

    def latest_progress(self, commits: list[Commit]) -> tuple[Commit | None, Progress]:
        """Return the first of `commits` with a readable state, if any, and its position. Reads no other part."""
        for commit in commits:
            try:
                return commit, Progress.model_validate_json(self._commits.part(commit.folder, STATE))
            except (Rejected, Unavailable):
                raise
            except UserError:  # damaged, or removed in the meantime
                continue
        return None, Progress()

    def tickets(self) -> list[Ticket]:
        """Return the tickets of all finished rounds, in order."""
        newest = {c.round_: c.folder for c in reversed(self.commits()) if c.step is None}
        return [self._ticket(newest[round_]) for round_ in sorted(newest)]

    def ticket(self, round_: int) -> Ticket:
        return self._ticket(self._ended(round_))

    def _ticket(self, folder: str) -> Ticket:
        return parse(self.store.get(f"{folder}/{TICKET}"), self.store.where(f"{folder}/{TICKET}"))

    def pictures(self, round_: int) -> bytes | None:
        """Return the PNG of degraded, restored and clean images of a round, or None if no images were scored."""
        return self._read(f"{self._ended(round_)}/{PICTURES}")

    def scores(self, round_: int) -> bytes | None:
        """Return the per-image scores of a round as CSV; None in runs of older versions."""
        return self._read(f"{self._ended(round_)}/{SCORES}")

    def round_masks(self, round_: int) -> bytes:
        """Return the bit-packed masks of a round as safetensors bytes, verified."""
        return self._commits.part(self._ended(round_), MASK)

    def round_weights(self, round_: int) -> dict[str, Tensor]:
        """Return the trained weights of a round, verified. Raises UserError if they are damaged or were not kept."""
        from safetensors.torch import load

        folder = self._ended(round_)
        parts = self._commits.parts(folder)
        if WEIGHTS not in parts:
            raise UserError(f"{self.store.where(folder)} kept its ticket but not its weights (keep.rounds: best).")
        return load(parts[WEIGHTS])

    def has_weights(self, round_: int) -> bool:
        """Whether a finished round's weights were kept."""
        return WEIGHTS in self._commits.read_complete(self._ended(round_))

    def mark_best(self, round_: int, score: float, by: tuple[str, ...]) -> None:
        self.store.put(BEST, add_digest({"round": round_, "score": score, "by": list(by)}))

    def best(self) -> int | None:
        """Return the best round by validation, or None if none was chosen. Raises UserError for a damaged file."""
        if (data := self._read(BEST)) is None:
            return None
        best = check_digest(data)
        if best is None:
            raise UserError(f"{self.store.where(BEST)} is damaged. Remove it: the last round then represents the run.")
        return int(best["round"])
