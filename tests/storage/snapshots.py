"""A small run to commit, and launches of it that sleep or die before a call of the store that the test chooses."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mirl_dist.errors import UserError
from mirl_dist.evaluation.score import Score
from mirl_dist.pruning import masks as masking
from mirl_dist.storage import NotFound, Store
from mirl_dist.storage.commits import Commits, Reader
from mirl_dist.storage.lease_files import claim_name, newest_generation
from mirl_dist.training.checkpointing.checkpoint import Checkpoints
from mirl_dist.training.progress import Progress
from mirl_dist.training.state import Snapshot
from mirl_dist.training.ticket import Ticket

SHAPES = {"a.weight": (3, 3), "b.weight": (5,)}


def weights(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(*shape, generator=generator) for name, shape in SHAPES.items()}


def masks() -> masking.Masks:
    return {name: weight > 0 for name, weight in weights(9).items()}


def progress(round_: int, updates: int) -> Progress:
    return Progress(round=round_, updates=updates, step=updates, mask_digest=masking.digest(masks()))


def snapshot(round_: int, updates: int, seed: int) -> Snapshot:
    return Snapshot(progress(round_, updates), masks(), weights(seed), {"a.weight.exp_avg": torch.ones(3)})


def ticket(round_: int = 0, **more: Any) -> Ticket:
    told: dict[str, Any] = {
        "round": round_,
        "alive": 10,
        "prunable": 14,
        "total": 20,
        "threshold": 0.5,
        "layer_density": {"a.weight": 0.5},
        "mask_digest": masking.digest(masks()),
        "initial_digest": "i",
        "weights_digest": "w",
        "parent": None,
        "fingerprint": "f",
        "manifest_digest": "m",
        "protocol": "p",
        "scores": {
            "derain/r": Score(psnr=30.0, ssim=0.9, degraded_psnr=20.0, degraded_ssim=0.5, images=2),
            "denoise_25/c": Score(psnr=28.0, ssim=0.8, degraded_psnr=19.0, degraded_ssim=0.4, images=3),
        },
        "updates": 4,
        "samples": 32,
        "seconds": 1.5,
        "world": 2,
        "versions": {"torch": "2"},
    }
    return Ticket(**(told | more))


def commit_steps(kept: Checkpoints, *updates: int, round_: int = 0, keep_last: int = 2, seed: int = 0) -> None:
    """Commit the middle of a round; the weights differ from step to step and from seed to seed."""
    for count in updates:
        kept.commit_step(snapshot(round_, count, 100 * seed + count), keep_last)


def commit_round(kept: Checkpoints, round_: int, *, seed: int = 0) -> None:
    kept.commit_round(ticket(round_, seconds=1.5 + seed), snapshot(round_, 4, 100 * seed + round_), b"csv", b"png", 2)


def whole(store: Store) -> dict[str, dict[str, bytes]]:
    """The commits that count for a reader and are sound: their parts by folder."""
    commits, found = Commits(store, Reader()), {}
    for folder in commits.complete("rounds"):
        with contextlib.suppress(UserError):
            found[folder] = commits.parts(folder)
    return found


class Memory:
    """A store in a dictionary, for tests that need a thousand of them; see `Store` for what it promises."""

    def __init__(self, files: Mapping[str, bytes] = {}) -> None:
        self.files, self._lock = dict(files), threading.Lock()

    def where(self, name: str = "") -> str:
        return f"memory/{name}".rstrip("/")

    def put(self, name: str, data: bytes) -> None:
        with self._lock:
            self.files[name] = data

    def put_if_absent(self, name: str, data: bytes) -> bool:
        with self._lock:
            return self.files.setdefault(name, data) is data

    def get(self, name: str) -> bytes:
        with self._lock:
            if name not in self.files:
                raise NotFound(f"{self.where(name)} does not exist")
            return self.files[name]

    def exists(self, name: str) -> bool:
        with self._lock:
            return name in self.files

    def list(self, prefix: str) -> list[str]:
        with self._lock:
            return sorted(name for name in self.files if not prefix or name.startswith(f"{prefix}/"))

    def remove(self, name: str) -> None:
        with self._lock:
            self.files.pop(name, None)

    def sweep(self, older_than_seconds: float = 0.0) -> None:
        pass


class Died(BaseException):
    """The process is gone: nothing in it runs any more."""


class Calls:
    """A store whose `at`-th call, from 1, does not happen before `before` has been called."""

    def __init__(self, store: Store, at: int = 0, before: Callable[[], None] = lambda: None) -> None:
        self._store, self.at, self.before, self.made = store, at, before, 0

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._store, name)

        def call(*args: Any) -> Any:
            self.made += 1
            if self.made == self.at:
                self.before()
            return found(*args)

        return found if name == "where" else call


class Claim:
    """The right to write, taken and looked at as lease.py does, without beats and without waiting for anybody."""

    def __init__(self, store: Store, generation: int | None = None) -> None:
        """generation: one that is claimed already; None claims the next."""
        self._store, self.generation = store, generation or newest_generation(store) + 1
        if generation is None:
            assert store.put_if_absent(claim_name(self.generation), str(self.generation).encode())

    def check(self) -> None:
        if newest_generation(self._store) != self.generation:
            raise UserError("this launch no longer holds the run")

    def lost(self) -> bool:
        return newest_generation(self._store) != self.generation


def launch(store: Store) -> Checkpoints:
    """A launch that has taken the run over."""
    kept = Checkpoints(store, Claim(store))
    kept.fence_older_writers()
    return kept


class Sleeper:
    """Some work in a thread, which falls asleep before a call of its store, and ends when it is woken."""

    def __init__(self, calls: Calls, work: Callable[[], None]) -> None:
        self._asleep, self._woken, self._work = threading.Event(), threading.Event(), work
        self.ended: BaseException | None = None
        self.finished = False
        calls.before = self._sleep
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._asleep.wait(60)

    def _sleep(self) -> None:
        self._asleep.set()
        assert self._woken.wait(60)

    def _run(self) -> None:
        try:
            self._work()
        except UserError as fault:
            self.ended = fault
        self.finished = True
        self._asleep.set()

    def wake(self) -> None:
        """Until its end. Twice is once."""
        self._woken.set()
        self._thread.join(60)
        assert self.finished, "it met something that is no UserError"
