"""The policy for damaged shards and samples: raise a UserError (refuse), or report each once and continue (skip)."""

from __future__ import annotations

import threading
from collections.abc import Callable

from mirl_dist.data.integrity import LocalShard
from mirl_dist.data.manifest import Shard
from mirl_dist.errors import UserError

REMEDY = "Copy the shard again, build the shards again, or go on without such samples by data.damage: skip."
WHOLE_SHARD = -1
_SHOWN = 5


class DamagePolicy:
    """Raises or reports damage according to `data.damage`. Thread-safe."""

    def __init__(self, policy: str, say: Callable[[str], None]) -> None:
        """policy: 'refuse' or 'skip'. say: prints one line of text."""
        self._policy, self._say = policy, say
        self._lock = threading.Lock()
        self._reported: set[tuple[str, int]] = set()

    def skips(self, shard: Shard) -> bool:
        """Return whether damage in this shard is skipped: never in evaluation shards, where it would change scores."""
        return self._policy == "skip" and shard.role == "train"

    def report_shard(self, local: LocalShard, damaged: dict[int, str], address: str) -> None:
        """Report the damaged samples of a shard by key. Raises UserError if damage is refused.

        damaged: sample number -> problem. address: the shard's address in its store, for the message.
        """
        lines = [f"sample '{local.entries[i].key}' {problem}" for i, problem in list(damaged.items())[:_SHOWN]]
        if len(damaged) > _SHOWN:
            lines.append(f"and {len(damaged) - _SHOWN} more")
        text = "; ".join(lines) or "no image is damaged, only what lies between them"
        if not self.skips(local.shard):
            raise UserError(f"{address}: its bytes are not the manifest's: {text}. {REMEDY}")
        self.report_once(local.shard, WHOLE_SHARD, text)

    def mark_sample(self, local: LocalShard, sample: int, problem: str) -> None:
        """Mark a sample of a shard as damaged and report it. Raises UserError if damage is refused."""
        key = local.entries[sample].key
        if not self.skips(local.shard):
            raise UserError(f"{local.shard.name}, sample '{key}': {problem}. {REMEDY}")
        with self._lock:
            local.damaged.setdefault(sample, problem)
        self.report_once(local.shard, sample, f"sample '{key}': {problem}")

    def report_once(self, shard: Shard, sample: int, text: str) -> None:
        """Report that a sample (or WHOLE_SHARD) is skipped, unless that was reported before."""
        with self._lock:
            if (shard.name, sample) in self._reported:
                return
            self._reported.add((shard.name, sample))
        self._say(f"skipped of {shard.name}: {text}")
