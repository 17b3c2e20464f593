"""Keeps a few images in memory for validation during a round, while the cache is full of training shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mirl_dist.data.manifest import CLEAN, DEGRADED, Shard
from mirl_dist.data.sample import Pixels
from mirl_dist.data.shard_pool import ShardPool
from mirl_dist.data.shards import SamplePlace


class ImageSource(Protocol):
    """Where images of evaluation samples come from: a ShardPool, or ResidentImages."""

    def acquire(self, shard: Shard) -> None: ...
    def release(self, shard: Shard) -> None: ...
    def image(self, place: SamplePlace, which: str) -> Pixels: ...


class ResidentImages:
    """Images of evaluation samples, read once from a shard pool, whose methods it then offers."""

    def __init__(self) -> None:
        self._images: dict[tuple[str, str, str], Pixels] = {}

    def read(self, pool: ShardPool, places: Sequence[SamplePlace]) -> None:
        """Read and keep the images of some samples. Raises UserError for damage."""
        for place in sorted(places, key=lambda place: place.shard.name):
            for which in (CLEAN, DEGRADED):
                if place.entry.image(which) is not None:
                    key = (place.shard.name, place.entry.key, which)
                    self._images[key] = self._images[key] if key in self._images else pool.image(place, which)

    def acquire(self, shard: Shard) -> None:
        """Do nothing: all images are here."""

    def release(self, shard: Shard) -> None:
        """Do nothing: all images stay."""

    def image(self, place: SamplePlace, which: str) -> Pixels:
        """Return one of the images, uint8 (H, W, 3)."""
        return self._images[place.shard.name, place.entry.key, which]
