"""Where a run is kept and when a commit is whole. All names inside a run folder live here.

    run.json                                      config, fingerprint, versions; written once
    initial.safetensors                           the first weights; written once
    tracking.json                                 MLflow ids
    rounds/03/mask.safetensors                    bit-packed
    rounds/03/steps/00012000/{weights,moments}.safetensors, state.json, COMPLETE.json
    rounds/03/{weights.safetensors, ticket.json, COMPLETE.json}, pictures.png

A commit is its COMPLETE.json, written last, with names, sizes and SHA-256 of every part. Readers trust nothing else.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import safetensors.torch
from torch import Tensor

from mirl_dist import ticket as tickets
from mirl_dist.faults import Fault
from mirl_dist.pruning import masks as masking
from mirl_dist.state import Progress
from mirl_dist.storage import NotAllowed, NotThere, Store, TryAgain
from mirl_dist.ticket import Ticket

RUN, INITIAL, TRACKING, BEST = "run.json", "initial.safetensors", "tracking.json", "best.json"
COMPLETE, WEIGHTS, MOMENTS = "COMPLETE.json", "weights.safetensors", "moments.safetensors"
STATE, MASK, TICKET, PICTURES = "state.json", "mask.safetensors", "ticket.json", "pictures.png"


_IDENTITY = {"config", "fingerprint", "manifest_digest", "initial_digest"}


class Commit(NamedTuple):
    """A complete commit: its folder, its round, and its step inside the round; step None: the round's ticket."""

    folder: str
    round_: int
    step: int | None


def round_folder(round_: int) -> str:
    return f"rounds/{round_:02d}"


_COMMIT = re.compile(rf"(rounds/(\d+)(?:/steps/(\d+))?)/{re.escape(COMPLETE)}")


def _facts(data: bytes) -> dict[str, Any]:
    """What COMPLETE.json says of a part."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def pack_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Named tensors to safetensors bytes; the same tensors give the same bytes."""
    plain = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    return safetensors.torch.save(plain)


class Checkpoints:
    """The commits of one run in one store. Only rank 0 uses it."""

    def __init__(self, store: Store) -> None:
        self.store = store

    # -- the run ------------------------------------------------------------------------------------------------

    def identity(self) -> dict[str, Any] | None:
        """What run.json says, or None where there is no run. Raises Fault for a run.json that cannot be read."""
        try:
            data = self.store.get(RUN)
        except NotThere:
            return None
        try:
            found = json.loads(data)
        except (json.JSONDecodeError, UnicodeDecodeError):
            found = None
        if not isinstance(found, dict) or not found.keys() >= _IDENTITY:
            raise Fault(f"{self.store.where(RUN)} does not describe a run. Choose another run.folder.")
        return found

    def begin(self, identity: dict[str, Any]) -> None:
        """Write run.json, which states the digest of the first weights. Raises Fault when another start was faster."""
        if not self.store.put_if_absent(RUN, _json(identity)):
            raise Fault(f"{self.store.where()} was begun by another launch a moment ago. Choose another run.folder.")

    def has_initial(self) -> bool:
        return self.store.exists(INITIAL)

    def save_initial(self, weights: Mapping[str, Tensor]) -> None:
        """Write the first weights, over any that an older run left here; run.json already states their digest."""
        self.store.put(INITIAL, pack_tensors(weights))

    def initial(self) -> dict[str, Tensor]:
        """The first weights. Raises Fault for a damaged file."""
        try:
            return safetensors.torch.load(self.store.get(INITIAL))
        except safetensors.SafetensorError as error:
            raise Fault(f"{self.store.where(INITIAL)} is damaged ({error}). Restore a copy of the run.") from None

    def sweep(self) -> None:
        """Remove what dead writers left: temporary files, and step commits that never became whole."""
        self.store.sweep()
        whole = {c.folder for c in self.commits()}
        for name in self.store.list("rounds"):
            path = name.split("/")
            if len(path) == 5 and path[2] == "steps" and "/".join(path[:4]) not in whole:
                self.store.remove(name)

    def remembered(self) -> dict[str, str]:
        """MLflow ids by name. Raises Fault for a file that holds none."""
        try:
            found = json.loads(self.store.get(TRACKING))
        except NotThere:
            return {}
        except (json.JSONDecodeError, UnicodeDecodeError):
            found = None
        if not isinstance(found, dict) or not all(isinstance(id_, str) for id_ in found.values()):
            raise Fault(f"{self.store.where(TRACKING)} holds no MLflow ids. Remove it: the run shows anew in MLflow.")
        return found

    def remember(self, ids: dict[str, str]) -> None:
        """Keep further MLflow ids."""
        self.store.put(TRACKING, _json(self.remembered() | ids))

    # -- commits ------------------------------------------------------------------------------------------------

    def _commit(self, folder: str, parts: Mapping[str, bytes]) -> None:
        said = {}
        for name, data in parts.items():
            self.store.put(f"{folder}/{name}", data)
            said[name] = _facts(data)
        self.store.put(f"{folder}/{COMPLETE}", _json({"parts": said}))

    def _said(self, folder: str) -> dict[str, Any]:
        """What COMPLETE.json says of each part. Raises Fault for one that is damaged."""
        name = f"{folder}/{COMPLETE}"
        try:
            parts = json.loads(self.store.get(name))["parts"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            parts = None
        if not isinstance(parts, dict):
            raise Fault(f"{self.store.where(name)} is damaged: it does not list the parts of a commit")
        return parts

    def _parts(self, folder: str) -> dict[str, bytes]:
        """All parts of a commit, verified. Raises Fault naming a part that is missing or damaged."""
        found = {}
        for name, facts in self._said(folder).items():
            where = self.store.where(f"{folder}/{name}")
            try:
                data = self.store.get(f"{folder}/{name}")
            except NotThere:
                raise Fault(f"{where} is missing from its commit") from None
            if facts != _facts(data):
                raise Fault(f"{where} is damaged: its bytes are not those that were committed")
            found[name] = data
        return found

    def commits(self) -> list[Commit]:
        """All complete commits, the newest first."""
        found = []
        for name in self.store.list("rounds"):
            match = _COMMIT.fullmatch(name)
            if match:
                step = match.group(3)
                found.append(Commit(match.group(1), int(match.group(2)), None if step is None else int(step)))
        return sorted(found, key=lambda c: (c.round_, c.step is None, c.step or 0), reverse=True)

    def save_mask(self, round_: int, masks: Mapping[str, Tensor]) -> None:
        self.store.put(f"{round_folder(round_)}/{MASK}", pack_tensors(masking.pack(masks)))

    def masks(self, round_: int, shapes: Mapping[str, tuple[int, ...]]) -> masking.Masks:
        name = f"{round_folder(round_)}/{MASK}"
        data = self.store.get(name)
        try:
            return masking.unpack(safetensors.torch.load(data), shapes)
        except (ValueError, safetensors.SafetensorError) as error:
            raise Fault(f"{self.store.where(name)}: {error}. The prune.scope or the model differs.") from None

    def commit_step(
        self,
        progress: Progress,
        weights: Mapping[str, Tensor],
        moments: Mapping[str, Tensor],
        keep_last: int,
    ) -> None:
        """Commit the middle of a round, then remove all but its newest `keep_last` commits."""
        folder = f"{round_folder(progress.round)}/steps/{progress.updates:08d}"
        self._commit(
            folder,
            {
                WEIGHTS: pack_tensors(weights),
                MOMENTS: pack_tensors(moments),
                STATE: _json(progress.model_dump()),
            },
        )
        inside = [c for c in self.commits() if c.round_ == progress.round and c.step is not None]
        for old in inside[keep_last:]:
            self._remove(old.folder)

    def commit_round(
        self, ticket: Ticket, weights: Mapping[str, Tensor], pictures: bytes | None, progress: Progress
    ) -> None:
        """Commit a round with its ticket, then remove the commits of its middle."""
        folder = round_folder(ticket.round)
        if pictures is not None:
            self.store.put(f"{folder}/{PICTURES}", pictures)
        mask = self.store.get(f"{folder}/{MASK}")
        self._commit(
            folder,
            {
                MASK: mask,
                WEIGHTS: pack_tensors(weights),
                STATE: _json(progress.model_dump()),
                TICKET: ticket.dump(),
            },
        )
        for commit in self.commits():
            if commit.step is not None and commit.round_ <= ticket.round:
                self._remove(commit.folder)

    def _remove(self, folder: str) -> None:
        """COMPLETE.json goes first: a half-removed commit is none."""
        self.store.remove(f"{folder}/{COMPLETE}")
        for name in self.store.list(folder):
            self.store.remove(name)

    def drop_weights(self, round_: int) -> None:
        """Keep a round's ticket and mask, drop the weights it trained."""
        folder = round_folder(round_)
        said = self._said(folder)
        if said.pop(WEIGHTS, None) is not None:
            self.store.put(f"{folder}/{COMPLETE}", _json({"parts": said}))
            self.store.remove(f"{folder}/{WEIGHTS}")

    # -- reading back -------------------------------------------------------------------------------------------

    def newest(self) -> tuple[Commit, dict[str, bytes], list[str]] | None:
        """The newest commit that verifies, its parts, and what was found damaged on the way; None without any.

        Raises Fault when there are commits but none of them verifies.
        """
        damaged: list[str] = []
        commits = self.commits()
        for commit in commits:
            try:
                parts = self._parts(commit.folder)
                if WEIGHTS not in parts:
                    raise Fault(f"{self.store.where(commit.folder)} kept its ticket but not its weights")
                return commit, parts, damaged
            except (NotAllowed, TryAgain):
                raise  # a store that refuses or fails is not a damaged commit
            except Fault as fault:
                damaged.append(str(fault))
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
            parts = self._parts(folder)
        except NotThere:
            raise Fault(
                f"{self.store.where(folder)} holds no finished round. `mirl-dist tickets list` shows them."
            ) from None
        if WEIGHTS not in parts:
            raise Fault(f"{self.store.where(folder)} kept its ticket but not its weights (keep.rounds: best).")
        return safetensors.torch.load(parts[WEIGHTS])

    def has_weights(self, round_: int) -> bool:
        """Whether a finished round's weights were kept."""
        return WEIGHTS in self._said(round_folder(round_))

    def mark_best(self, round_: int, score: float, by: tuple[str, ...]) -> None:
        self.store.put(BEST, _json({"round": round_, "score": score, "by": list(by)}))

    def best(self) -> int | None:
        """The round that the run chose by validation, if it did."""
        try:
            return int(json.loads(self.store.get(BEST))["round"])
        except NotThere:
            return None
