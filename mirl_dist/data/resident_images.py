"""Holds a few images in memory for validation during a round, while training shards occupy the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mirl_dist.data.manifest import CLEAN, DEGRADED, Shard
from mirl_dist.data.sample import Pixels
from mirl_dist.data.shard_pool import ShardPool
from mirl_dist.data.shards import SamplePlace


class ImageSource(Protocol):
    """A source of images of evaluation samples: ShardPool or ResidentImages."""

    def acquire(self, shard: Shard) -> None: ...
    def release(self, shard: Shard) -> None: ...
    def image(self, place: SamplePlace, which: str) -> Pixels: ...


class ResidentImages:
    """Evaluation images that were read once from a shard pool; an ImageSource."""

    def __init__(self) -> None:
        self._images: dict[tuple[str, str, str], Pixels] = {}

    def read(self, pool: ShardPool, places: Sequence[SamplePlace]) -> None:
        """Read the images of some samples into memory. Raises UserError for damage."""
        for place in sorted(places, key=lambda place: place.shard.name):
            for which in (CLEAN, DEGRADED):
                if place.entry.image(which) is not None:
                    key = (place.shard.name, place.entry.key, which)
                    self._images[key] = self._images[key] if key in self._images else pool.image(place, which)

    def acquire(self, shard: Shard) -> None:
        """Do nothing; all images are in memory."""

    def release(self, shard: Shard) -> None:
        """Do nothing; all images remain in memory."""

    def image(self, place: SamplePlace, which: str) -> Pixels:
        """Return one of the images, uint8 (H, W, 3)."""
        return self._images[place.shard.name, place.entry.key, which]
