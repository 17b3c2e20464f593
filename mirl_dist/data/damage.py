"""What is done about damaged shards and samples: a UserError where damage is refused, else one line for each."""

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
    """Raises or reports damage, as `data.damage` says; called from several threads at once."""

    def __init__(self, policy: str, say: Callable[[str], None]) -> None:
        """policy: 'refuse' or 'skip'. say: takes one line for people."""
        self._policy, self._say = policy, say
        self._lock = threading.Lock()
        self._reported: set[tuple[str, int]] = set()

    def skips(self, shard: Shard) -> bool:
        """Tell whether damage of a shard is skipped: never where scores come from, whose means would be others."""
        return self._policy == "skip" and shard.role == "train"

    def report_shard(self, local: LocalShard, damaged: dict[int, str], address: str) -> None:
        """Name the damaged samples of a shard by key. Raises UserError where damage is refused.

        damaged: number of a sample -> what is wrong with it. address: of the shard in its store, for the message.
        """
        lines = [f"sample '{local.entries[i].key}' {problem}" for i, problem in list(damaged.items())[:_SHOWN]]
        if len(damaged) > _SHOWN:
            lines.append(f"and {len(damaged) - _SHOWN} more")
        text = "; ".join(lines) or "no image is damaged, only what lies between them"
        if not self.skips(local.shard):
            raise UserError(f"{address}: its bytes are not the manifest's: {text}. {REMEDY}")
        self.report_once(local.shard, WHOLE_SHARD, text)

    def mark_sample(self, local: LocalShard, sample: int, problem: str) -> None:
        """Add a sample to the damaged ones of its shard. Raises UserError where damage is refused."""
        key = local.entries[sample].key
        if not self.skips(local.shard):
            raise UserError(f"{local.shard.name}, sample '{key}': {problem}. {REMEDY}")
        with self._lock:
            local.damaged.setdefault(sample, problem)
        self.report_once(local.shard, sample, f"sample '{key}': {problem}")

    def report_once(self, shard: Shard, sample: int, text: str) -> None:
        """Say that a sample, or WHOLE_SHARD, is skipped; the second time nothing."""
        with self._lock:
            if (shard.name, sample) in self._reported:
                return
            self._reported.add((shard.name, sample))
        self._say(f"skipped of {shard.name}: {text}")
